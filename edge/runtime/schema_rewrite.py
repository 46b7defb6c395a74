r"""Writes a JSON schema so that llguidance keeps answers to it.

Three of its parts it takes otherwise. In a string, a class that has every control character but
not ``"`` or ``\`` lets these through: ``[^"]`` allows ``\"``. Characters that JSON spells with
``\u`` only, which answers do without, it leaves out where a text has to have them. And of a
``oneOf`` it sees that no two branches can hold at once only where they are written out, not behind
a ``$ref``.
"""

from __future__ import annotations

import re
from typing import Any, Literal, TypeAlias
from urllib.parse import unquote

import msgspec

from edge.errors import RequestError

_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_PLAIN_DATA = ("const", "enum", "default", "examples")
# The parts of an expression of Rust's regex crate, outside of a class and inside of one.
# Dashes or a bracket that come first in a class are its characters, and so is what ends a range.
_CODE = r"[xuU]\{[^{}\\]*\}|x[^{].|u[^{].{3}|U[^{].{7}"
_PROPERTY = r"[pP]\{[^{}\\]*\}|[pP]."
# What JSON has no other escape for than u; llguidance counts DEL among them.
_UNWRITABLE = r"[\x00-\x07\x0b\x0e-\x1f\x7f]"
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

# By id: a schema, which stays as long as its id is used, and the texts of its properties.
_Known: TypeAlias = dict[int, tuple[Any, dict[str, set[str]]]]


def rewrite_schema(schema: dict[str, Any]) -> None:
    """Change a JSON schema in place; an answer of the new one is one of the old one, too.

    Args:
        schema: plain data that does not nest deeply.

    Raises:
        RequestError: an expression in it cannot be changed safely, or it asks for a text that no
            answer can have.
    """
    _rewrite(schema, schema, {})


def _rewrite(schema: Any, root: dict[str, Any], known: _Known) -> None:
    """Change a part of ``root``, where its references begin."""
    if isinstance(schema, list):
        for each in schema:
            _rewrite(each, root, known)
    if not isinstance(schema, dict):
        return
    root = schema if "$id" in schema else root
    for key in ("const", "enum"):
        _check_writable(schema.get(key))
    if isinstance(pattern := schema.get("pattern"), str):
        schema["pattern"] = _writable(pattern)
    if isinstance(by_pattern := schema.get("patternProperties"), dict):
        schema["patternProperties"] = {
            _writable(pattern): each for pattern, each in by_pattern.items()
        }
    if "anyOf" not in schema and _are_told_apart(schema.get("oneOf"), root, known):
        schema["anyOf"] = schema.pop("oneOf")
    for key, value in list(schema.items()):  # a branch inside may change what it is part of
        if key in _SCHEMAS_BY_NAME and isinstance(value, dict):
            _rewrite(list(value.values()), root, known)
        elif key not in _PLAIN_DATA:
            _rewrite(value, root, known)


def _check_writable(value: Any) -> None:
    if isinstance(value, str) and re.search(_UNWRITABLE, value):
        raise RequestError(
            f"the JSON schema: {value!r:.80} has a control character that answers cannot have; "
            r"leave it out (they have \n, \r, \t, \b and \f)"
        )
    if isinstance(value, list | dict):
        for each in value.values() if isinstance(value, dict) else value:
            _check_writable(each)


def _writable(pattern: str) -> str:
    """Take from each class the control characters that no answer has: none has all of them then.

    Raises:
        RequestError: the expression has comments, which may look like classes.
    """
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
            if not depth:  # inside of another, [: would begin a class by name
                text = "[" + text + "\\" * pattern.startswith("[:", part.start())
            depth += 1
        elif kind == "close":
            depth -= 1
            text = text if depth else f"{text}--{_UNWRITABLE}]"
        elif kind == "class":
            text = f"[{text}--{_UNWRITABLE}]"
        written.append(text)
    return "".join(written)


class _Branch(msgspec.Struct):
    type: Literal["object"]
    properties: dict[str, Any]
    required: list[str] = []


class _Property(msgspec.Struct):
    const: str | None = None
    enum: list[str] = []


def _are_told_apart(branches: Any, root: dict[str, Any], known: _Known) -> bool:
    """Whether a property has other texts in each branch of a ``oneOf`` with references.

    It is then required in all of them, so that none holds without it: Pydantic writes discriminated
    unions so, and does not require what has a default.
    """
    if not isinstance(branches, list):
        return False
    targets = [_resolve(each, root) for each in branches]
    if all(target is each for target, each in zip(targets, branches, strict=True)):
        return False
    if len(set(map(id, targets))) < len(targets):
        return False
    for target in targets:
        if id(target) not in known:
            known[id(target)] = target, _texts(target)
    objects = [known[id(target)][1] for target in targets]
    for name in objects[0]:
        before: set[str] = set()
        for each in objects:
            texts = each.get(name)
            if texts is None or not before.isdisjoint(texts):
                break
            before |= texts
        else:
            for target in targets:
                target["required"] = list(dict.fromkeys([*target.get("required", []), name]))
            return True
    return False


def _texts(schema: Any) -> dict[str, set[str]]:
    """The texts that each property of an object may be; not of one that may be anything else."""
    try:
        properties = msgspec.convert(schema, _Branch).properties
    except msgspec.ValidationError:
        return {}
    found = {}
    for name, value in properties.items():
        try:
            each = msgspec.convert(value, _Property)
        except msgspec.ValidationError:
            continue
        if texts := set(each.enum) if each.const is None else {each.const}:
            found[name] = texts
    return found


def _resolve(schema: Any, root: dict[str, Any]) -> Any:
    """What a reference into ``root`` leads to; any other schema is itself."""
    reference = schema.get("$ref") if isinstance(schema, dict) else None
    found = resolve(reference, root)
    return schema if found is None else found


def resolve(reference: Any, root: dict[str, Any]) -> Any:
    """Return what a reference leads to; None unless it is a path into ``root``, and ends there."""
    if not isinstance(reference, str) or not re.match("#(/|$)", reference):
        return None
    found: Any = root
    for name in unquote(reference).split("/")[1:]:
        key = name.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list):
            found = (
                found[int(key)]
                if re.fullmatch("[0-9]{1,4}", key) and int(key) < len(found)
                else None
            )
        elif isinstance(found, dict) and (found is root or "$id" not in found):
            found = found.get(key)
        else:
            return None
    return found
