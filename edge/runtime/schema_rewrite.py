r"""Writes a JSON schema so that llguidance keeps answers to it.

Two of its parts it takes otherwise. In a string, a class that has every control character but not
``"`` or ``\`` lets these through: ``[^"]`` allows ``\"``. And of a ``oneOf`` it sees that no two
branches can hold at once only where they are written out, not behind a ``$ref``.
"""

from __future__ import annotations

import re
from typing import Any, Literal
from urllib.parse import unquote

import msgspec

from edge.errors import RequestError

_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_PLAIN_DATA = ("const", "enum", "default", "examples")
# What matters of an expression of Rust's regex crate: escapes, brackets, NUL and the flag x. A
# bracket that comes first in a class is one of its characters.
_PARTS = re.compile(
    r"(?P<class>\\(?:[pP]\{[^}]*\}|[pP].|[xuU]\{[^}]*\}|x[^{].|u[^{].{3}|U[^{].{7})|\x00)"
    r"|\\.|(?P<open>\[\^?\]?)|(?P<close>\])|(?P<verbose>\(\?[a-zA-Z-]*x)",
    re.DOTALL,
)


def rewrite_schema(schema: Any, root: dict[str, Any] | None = None) -> None:
    """Change a JSON schema in place; an answer of the new one is one of the old one, too.

    Args:
        schema: plain data that does not nest deeply.
        root: where references into itself begin; None is the schema.

    Raises:
        RequestError: an expression in it cannot be changed safely.
    """
    if isinstance(schema, list):
        for each in schema:
            rewrite_schema(each, root)
    if not isinstance(schema, dict):
        return
    root = schema if root is None or "$id" in schema else root
    if isinstance(pattern := schema.get("pattern"), str):
        schema["pattern"] = _without_nul(pattern)
    if isinstance(by_pattern := schema.get("patternProperties"), dict):
        schema["patternProperties"] = {
            _without_nul(pattern): each for pattern, each in by_pattern.items()
        }
    if "anyOf" not in schema and _are_told_apart(schema.get("oneOf"), root):
        schema["anyOf"] = schema.pop("oneOf")
    for key, value in list(schema.items()):  # a branch inside may change what it is part of
        if key in _SCHEMAS_BY_NAME and isinstance(value, dict):
            rewrite_schema(list(value.values()), root)
        elif key not in _PLAIN_DATA:
            rewrite_schema(value, root)


def _without_nul(pattern: str) -> str:
    """Take NUL, which no answer can have, from each class: none has all control characters then.

    Raises:
        RequestError: the expression has comments, which may look like classes.
    """
    depth = 0

    def change(part: re.Match[str]) -> str:
        nonlocal depth
        text = part[0]
        before, after = "", ""
        if part["open"]:
            before = "" if depth else "["
            depth += 1
        elif part["close"] and depth:
            depth -= 1
            after = "" if depth else r"--\x00]"
        elif part["class"] and not depth:
            before, after = "[", r"--\x00]"
        elif part["verbose"] and not depth:
            raise RequestError(
                f"the JSON schema: the pattern {pattern!r:.80} has the flag x; write it without"
            )
        return before + text + after

    return _PARTS.sub(change, pattern)


class _Branch(msgspec.Struct):
    type: Literal["object"]
    properties: dict[str, Any]
    required: list[str] = []


class _Property(msgspec.Struct):
    const: str | None = None
    enum: list[str] = []


def _are_told_apart(branches: Any, root: dict[str, Any]) -> bool:
    """Whether a property has other texts in each branch of a ``oneOf`` with references.

    It is then required in all of them, so that none holds without it: Pydantic writes discriminated
    unions so, and does not require what has a default.
    """
    if not isinstance(branches, list):
        return False
    targets = [_resolve(each, root) for each in branches]
    if all(target is each for target, each in zip(targets, branches, strict=True)):
        return False
    try:
        objects = msgspec.convert(targets, list[_Branch])
    except msgspec.ValidationError:
        return False
    for name in objects[0].properties:
        texts = [_texts(each.properties.get(name)) for each in objects]
        if all(texts) and len(set().union(*texts)) == sum(map(len, texts)):
            for target, each in zip(targets, objects, strict=True):
                target["required"] = list(dict.fromkeys([*each.required, name]))
            return True
    return False


def _texts(schema: Any) -> set[str]:
    """The texts that a property may be; empty where it may be anything else."""
    try:
        found = msgspec.convert(schema, _Property)
    except msgspec.ValidationError:
        return set()
    return set(found.enum) if found.const is None else {found.const}


def _resolve(schema: Any, root: dict[str, Any]) -> Any:
    """What a reference into ``root`` leads to; any other schema is itself."""
    reference = schema.get("$ref") if isinstance(schema, dict) else None
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return schema
    found: Any = root
    for name in unquote(reference[2:]).split("/"):
        key = name.replace("~1", "/").replace("~0", "~")
        found = found.get(key) if isinstance(found, dict) else None
    return found
