r"""Rewrites a JSON schema so that llguidance's answers are answers of the original schema, too.

llguidance reads two things differently. In a string, a class with every control character but
without ``"`` or ``\`` lets those two through: ``[^"]`` allows ``\"``. And characters that JSON can
only spell with ``\u``, which answers do not use, are silently dropped from texts that need them.
"""

from __future__ import annotations

import re
from typing import Any

from edge.errors import RequestError

_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_PLAIN_DATA = ("const", "enum", "default", "examples")
# The parts of an expression of Rust's regex crate, outside a class and inside one.
# Dashes or a bracket that come first in a class are its characters, and so is the end of a range.
_CODE = r"[xuU]\{[^{}\\]*\}|x[^{].|u[^{].{3}|U[^{].{7}"
_PROPERTY = r"[pP]\{[^{}\\]*\}|[pP]."
# Characters for which JSON has only the escape u; llguidance counts DEL among them.
_UNWRITABLE = r"[\x00-\x07\x0b\x0e-\x1f\x7f]"
_FORBIDDEN = re.compile(_UNWRITABLE)
_MOST_PATTERN_CHARS = 2**16
_PIECE_CHARS = 2**16
_OPEN = r"(?P<open>\[\^?(?:-+|\])?)"
_OUTSIDE = re.compile(
    rf"(?P<class>\\(?:[av]|{_CODE}|{_PROPERTY})|{_UNWRITABLE})|\\.|{_OPEN}"
    r"|(?P<verbose>\(\?[a-zA-Z]*x)|\(\?P?<[\w.\[\]]*>|.",
    re.DOTALL,
)
_INSIDE = re.compile(
    rf"{_OPEN}|(?P<close>\])|--|&&|~~|\\(?:{_PROPERTY}|[dDsSwW])"
    rf"|(?:\\(?:{_CODE}|.)|.)(?:-(?:\\(?:{_CODE}|.)|[^\]-]))?",
    re.DOTALL,
)


def rewrite_schema(schema: dict[str, Any]) -> None:
    """Change a JSON schema in place; an answer of the new one is one of the old one, too.

    Args:
        schema: plain data that is not deeply nested.

    Raises:
        RequestError: an expression in it cannot be changed safely, or it requires a text that no
            answer can have.
    """
    _rewrite(schema)


def _rewrite(schema: Any) -> None:
    if isinstance(schema, list):
        for each in schema:
            _rewrite(each)
    if not isinstance(schema, dict):
        return
    for key in ("const", "enum"):
        _check_writable(schema.get(key))
    if isinstance(pattern := schema.get("pattern"), str):
        schema["pattern"] = _writable(pattern)
    if isinstance(by_pattern := schema.get("patternProperties"), dict):
        schema["patternProperties"] = {
            _writable(pattern): each for pattern, each in by_pattern.items()
        }
    for key, value in schema.items():
        if key in _SCHEMAS_BY_NAME and isinstance(value, dict):
            _rewrite(list(value.values()))
        elif key not in _PLAIN_DATA:
            _rewrite(value)


def _check_writable(value: Any) -> None:
    if isinstance(value, str) and any(
        _FORBIDDEN.search(value, at, at + _PIECE_CHARS) for at in range(0, len(value), _PIECE_CHARS)
    ):
        raise RequestError(
            f"the JSON schema: {value!r:.80} has a control character that answers cannot have; "
            r"leave it out (they have \n, \r, \t, \b and \f)"
        )
    if isinstance(value, list | dict):
        for each in value.values() if isinstance(value, dict) else value:
            _check_writable(each)


def _writable(pattern: str) -> str:
    """Remove from each class the control characters that no answer has, so that none has them all.

    Raises:
        RequestError: the expression is too long, or has comments, which may look like classes.
    """
    if len(pattern) > _MOST_PATTERN_CHARS:
        raise RequestError(
            f"the JSON schema: a pattern has {len(pattern)} characters, and at most "
            f"{_MOST_PATTERN_CHARS} are read; shorten it"
        )
    written = []
    at = depth = 0
    while at < len(pattern):
        part = (_INSIDE if depth else _OUTSIDE).match(pattern, at)
        assert part is not None
        at = part.end()
        kind, text = part.lastgroup, part[0]
        if kind == "verbose":
            raise RequestError(
                f"the JSON schema: the pattern {pattern!r:.80} has the flag x; write it without"
            )
        if kind == "open":
            if not depth:  # inside another class, [: would begin a named class
                text = "[" + text + "\\" * pattern.startswith("[:", part.start())
            depth += 1
        elif kind == "close":
            depth -= 1
            text = text if depth else f"{text}--{_UNWRITABLE}]"
        elif kind == "class":
            text = f"[{text}--{_UNWRITABLE}]"
        written.append(text)
    return "".join(written)
