"""Closes a JSON schema: objects that list properties take no others unless the schema says so.

JSON Schema leaves them open, and then a model may add keys forever. Schemas that hold together for
one value (``allOf``, keys beside a ``$ref`` or an ``anyOf``) are joined, and closed once.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple
from urllib.parse import unquote

_IN_PLACE = ("$ref", "allOf", "anyOf", "oneOf")
_OPEN = {"additionalProperties", "patternProperties", "unevaluatedProperties"}
_ARRAY = {"items", "prefixItems", "additionalItems"}
_MEETS = {"properties", "required", "minProperties", *_OPEN, *_ARRAY}
_ELSEWHERE = {"$defs", "definitions", "$schema", "$id"}
_JOINED = {*_ELSEWHERE, *_ARRAY, "properties", "required", "additionalProperties"}
_MOST_STEPS = 50_000  # llguidance takes as many parts
_MOST_PARTS = 100


class _UnclearError(Exception):
    """The schema cannot be closed exactly."""


class _Plain(dict[str, Any]):
    """A schema without the keys of `_IN_PLACE`."""


class _Choice(NamedTuple):
    """Branches under ``anyOf`` or ``oneOf``; each is the schemas that hold together in it."""

    key: str
    branches: list[list[Any]]


def close_schema(schema: dict[str, Any], *, is_open: bool = False) -> dict[str, Any]:
    """Return a schema of the same answers, without those that have keys which it does not list.

    With ``anyOf`` and ``oneOf``, an answer has the keys of one branch. Since ``oneOf`` becomes
    ``anyOf``, no two branches may hold at once; llguidance takes the schema with ``is_open`` only
    then. A property that tells the branches apart is required.

    Args:
        schema: plain data that is not deeply nested; it is not changed.
        is_open: close nothing, and keep each ``oneOf``, with its references written out.

    Returns:
        The closed schema; or the schema itself, all of it open, in these cases. It has an unusual
        shape or a ``$ref`` that does not begin with ``#/``; ``patternProperties`` or the items of
        arrays meet other parts; or the joined schema becomes too large.
    """
    resource = _Resource(schema, is_open=is_open)
    try:
        closed = resource.close()
    except _UnclearError:
        return schema
    return closed if resource.has_changed else schema


class _Resource:
    """The root to which the references of a schema without ``$id`` are relative."""

    def __init__(self, root: dict[str, Any], *, is_open: bool) -> None:
        self.has_changed = False
        self._is_open = is_open
        self._root = root
        self._names: dict[tuple[int, ...], tuple[str, list[Any]]] = {}  # by ids of kept objects
        self._waiting: list[tuple[str, list[Any]]] = []  # a queue, so that a chain takes no stack
        self._steps = 0

    def close(self) -> dict[str, Any]:
        closed = self._place([self._root]) if self._root else {}
        kept = {key: self._root[key] for key in ("$schema", "$id") if key in self._root}
        named = {}
        while self._waiting:
            name, parts = self._waiting.pop()
            named[name] = self._join(parts)
        return {**kept, **closed, "$defs": named}

    def _place(self, values: list[Any]) -> Any:
        """Close the schemas that hold together for one value; they are parts of the source."""
        self._count(1)
        values = [value for value in values if value is not True and value != {}]
        if not values or any(value is False for value in values):
            return not values
        if not all(isinstance(value, dict) for value in values):
            raise _UnclearError
        first = values[0]
        if "$id" in first and first is not self._root and len(values) == 1:
            closed = close_schema(first, is_open=self._is_open)
            self.has_changed |= closed is not first
            return closed
        in_place = [key for value in values for key in _IN_PLACE if key in value]
        if not in_place and not any("$id" in value for value in values[1:]):
            return self._object(values)
        if len(values) > 1 or len(in_place) > 1 or first.keys() & _MEETS:
            return self._named(values)
        alone = {k: v for k, v in first.items() if k not in _ELSEWHERE and k not in _IN_PLACE}
        if in_place == ["$ref"]:
            return {**alone, **self._named([self._target(first)])}
        if in_place == ["allOf"]:
            return {**alone, "allOf": [self._place(_schemas(first, "allOf"))]}
        choice = self._choice(first, in_place[0])
        make = self._join if choice.key == "oneOf" else self._place
        return {**alone, choice.key: [make(branch) for branch in choice.branches]}

    def _choice(self, schema: dict[str, Any], key: str) -> _Choice:
        branches = [[each] for each in _schemas(schema, key)]
        if key == "anyOf":
            return _Choice(key, branches)
        self.has_changed = True
        teller = schema.get("discriminator")  # OpenAPI's; Pydantic does not require its defaults
        name = teller.get("propertyName") if isinstance(teller, dict) else None
        if isinstance(name, str):
            branches = [[*branch, {"required": [name]}] for branch in branches]
        return _Choice("oneOf" if self._is_open else "anyOf", branches)

    def _named(self, parts: list[Any]) -> dict[str, str]:
        key = tuple(map(id, parts))
        if key not in self._names:
            self._names[key] = str(len(self._names)), parts
            self._waiting.append(self._names[key])
        return {"$ref": f"#/$defs/{self._names[key][0]}"}

    def _join(
        self, parts: list[Any], plain: tuple[_Plain, ...] = (), seen: frozenset[int] = frozenset()
    ) -> Any:
        """Make one schema of all that hold together, or one of each choice."""
        todo = list(parts)
        while todo:
            part = todo.pop(0)
            if isinstance(part, _Plain):
                plain += (part,)
            elif isinstance(part, _Choice):
                branches = [self._join([*each, *todo], plain, seen) for each in part.branches]
                return {part.key: branches}
            elif part is False:
                return False
            elif part is not True and id(part) not in seen:
                self._count(1 + len(seen))
                seen |= {id(part)}
                if not isinstance(part, dict) or len(seen) > _MOST_PARTS:
                    raise _UnclearError
                if "$id" in part and part is not self._root:
                    raise _UnclearError
                todo[:0] = self._split(part)
        return self._object(plain)

    def _split(self, part: dict[str, Any]) -> list[Any]:
        """Return the parts of a schema in its order, which is that of the properties."""
        split: list[Any] = []
        plain = _Plain()
        for key, value in part.items():
            if key == "$ref":
                split.append(self._target(part))
            elif key == "allOf":
                split += _schemas(part, key)
            elif key in _IN_PLACE:
                split.append(self._choice(part, key))
            else:
                plain[key] = value
                if key == "properties":
                    split.append(plain)
        return split if "properties" in plain else [plain, *split]

    def _object(self, parts: Any) -> dict[str, Any]:
        """Make one schema of those that have no keys of `_IN_PLACE`."""
        if len(parts) > 1 and any("patternProperties" in part for part in parts):
            raise _UnclearError
        others = [part["additionalProperties"] for part in parts if "additionalProperties" in part]
        listed = [_schemas_by_name(part, "properties") for part in parts if "properties" in part]
        required = dict.fromkeys(name for part in parts for name in _required(part))
        is_closed = not self._is_open and bool(listed)
        is_closed = is_closed and not any(part.keys() & _OPEN for part in parts)
        names = dict.fromkeys(name for each in listed for name in each)
        if is_closed:
            names.update(required)
            least = [part.get("minProperties", 0) for part in parts]
            is_closed = all(isinstance(n, int | float) and n <= len(names) for n in least)
        self._count(len(names) * len(parts))
        rest = [each for each in map(self._rest, parts) if each]
        joined: dict[str, Any] = rest[0] if len(rest) == 1 else {"allOf": rest} if rest else {}
        for part in parts:
            if "type" in part:  # llguidance is faster if it reads the type first
                joined.setdefault("type", part["type"])
        if names:
            joined["properties"] = {
                name: self._place([_at(part, name) for part in parts]) for name in names
            }
        if required:
            joined["required"] = list(required)
        if others:
            joined["additionalProperties"] = self._place(others)
        elif is_closed:
            joined["additionalProperties"] = False
            self.has_changed = True
        return joined | self._array([part for part in parts if part.keys() & _ARRAY])

    def _array(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        """Join what schemas say about the items of an array."""
        if not parts:
            return {}
        is_old = any(isinstance(part.get("items"), list) for part in parts)  # before 2020-12
        first, others = ("items", "additionalItems") if is_old else ("prefixItems", "items")
        if is_old and not all(isinstance(part.get("items"), list) for part in parts):
            raise _UnclearError
        heads = [_schemas({first: [], **part}, first) for part in parts]
        tails = [part.get(others, True) for part in parts]
        joined = {}
        if any(heads):
            joined[first] = [
                self._place([t if h is None else h for h, t in zip(each, tails, strict=True)])
                for each in itertools.zip_longest(*heads)
            ]
        return {**joined, others: self._place(tails)}

    def _rest(self, part: dict[str, Any]) -> dict[str, Any]:
        """Return the part of a schema that stays as it is, except for schemas in it."""
        rest = {}
        for key, value in part.items():
            if key == "patternProperties":
                by_name = _schemas_by_name(part, key)
                rest[key] = {name: self._place([each]) for name, each in by_name.items()}
            elif key not in _JOINED:
                rest[key] = value
        return rest

    def _target(self, schema: dict[str, Any]) -> Any:
        """Return the target of a path into the root."""
        reference = schema["$ref"]
        if not isinstance(reference, str) or not (reference + "/").startswith("#/"):
            raise _UnclearError
        found: Any = self._root
        for name in unquote(reference).split("/")[1:]:
            key = name.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and len(key) <= 4 and key.isascii() and key.isdecimal():
                found = dict(enumerate(found)).get(int(key))
            elif isinstance(found, dict) and (found is self._root or "$id" not in found):
                found = found.get(key)
            else:
                raise _UnclearError
        if not isinstance(found, dict | bool):
            raise _UnclearError
        return found

    def _count(self, steps: int) -> None:
        self._steps += steps
        if self._steps > _MOST_STEPS:
            raise _UnclearError


def _schemas(schema: dict[str, Any], key: str) -> list[Any]:
    if not isinstance(schema[key], list):
        raise _UnclearError
    return list(schema[key])


def _schemas_by_name(schema: dict[str, Any], key: str) -> dict[str, Any]:
    if not isinstance(schema[key], dict):
        raise _UnclearError
    return dict(schema[key])


def _required(schema: dict[str, Any]) -> list[str]:
    names = schema.get("required", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _UnclearError
    return names


def _at(schema: dict[str, Any], name: str) -> Any:
    """Return the schema of a property."""
    if name in schema.get("properties", ()):
        return schema["properties"][name]
    return schema.get("additionalProperties", True)
