"""Objects that list properties take no others: judged by the package jsonschema."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edge.runtime.closed_schema import close_schema
from edge.runtime.schema_rewrite import rewrite_schema

llguidance = pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

BYTES = llguidance.LLTokenizer("byte")


def grammar_of(schema: Any, *, is_closed: bool = True) -> Any:
    """The matcher of a schema over single bytes."""
    schema = json.loads(json.dumps(schema))
    rewrite_schema(schema)
    text = json.dumps(close_schema(schema, is_open=not is_closed))
    grammar = llguidance.LLMatcher.grammar_from_json_schema(
        text, overrides={"lenient": False, "whitespace_flexible": False}
    )
    return llguidance.LLMatcher(BYTES, grammar, log_level=0)


def takes(matcher: Any, value: Any) -> bool:
    """Whether a value may be the answer, as it is spelled here."""
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    matcher, written = matcher.deep_copy(), list(text.encode())
    return bool(matcher.try_consume_tokens(written) == len(written) and matcher.is_accepting())


def orders(value: Any) -> Iterator[Any]:
    """A value with the keys of its objects in every order."""
    if isinstance(value, list):
        yield from map(list, itertools.product(*map(orders, value)))
    elif isinstance(value, dict):
        for keys in itertools.permutations(value):
            for values in itertools.product(*(orders(value[key]) for key in keys)):
                yield dict(zip(keys, values, strict=True))
    else:
        yield value


# Schemas as their parts, from which the judge and the schema are written each on its own.


@dataclass(frozen=True)
class Part:
    """An object that lists properties, with what it says of others (None: nothing)."""

    properties: dict[str, Any]
    required: tuple[str, ...] = ()
    others: Any = None

    def schema(self) -> dict[str, Any]:
        written: dict[str, Any] = {
            "type": "object",
            "properties": {name: schema_of(place) for name, place in self.properties.items()},
        }
        if self.required:
            written["required"] = list(self.required)
        if self.others is not None:
            written["additionalProperties"] = self.others
        return written


@dataclass(frozen=True)
class Place:
    """Parts that hold together, and choices of one of some parts each."""

    parts: tuple[Part, ...]
    choices: tuple[tuple[Part, ...], ...] = ()
    written: str = "allOf"


@dataclass(frozen=True)
class Plain:
    """A schema without objects, or a reference."""

    schema: dict[str, Any] = field(default_factory=dict)


def schema_of(place: Place | Plain) -> dict[str, Any]:
    if isinstance(place, Plain):
        return place.schema
    first, *more = (part.schema() for part in place.parts)
    groups = [{"anyOf": [part.schema() for part in parts]} for parts in place.choices]
    if place.written == "beside":  # the first one is a neighbour of the others
        written = {**first, **(groups.pop() if groups else {})}
        return {**written, "allOf": [*more, *groups]} if more or groups else written
    return {"allOf": [first, *more, *groups]}


def has_no_extras(places: list[Any], value: Any, defs: dict[str, Place]) -> bool:
    """Whether a valid value has only keys that one choice of branches lists."""
    places = [
        defs[p.schema["$ref"][8:]] if "$ref" in getattr(p, "schema", ()) else p for p in places
    ]
    if isinstance(value, list):
        items = [Plain(p.schema["items"]) for p in places if "items" in p.schema]
        return all(has_no_extras(items, each, defs) for each in value)
    groups = [place for place in places if isinstance(place, Place)]
    if not isinstance(value, dict) or not groups:
        return True
    choices = itertools.product(*(parts for place in groups for parts in place.choices))
    for chosen in choices:
        parts = [*(part for place in groups for part in place.parts), *chosen]
        if not all(is_valid(part.schema(), value, defs) for part in parts):
            continue
        speaks = any(part.others is not None for part in parts)
        listed = {name for part in parts for name in (*part.properties, *part.required)}
        if (speaks or listed >= value.keys()) and all(
            has_no_extras([p.properties[key] for p in parts if key in p.properties], each, defs)
            for key, each in value.items()
        ):
            return True
    return False


def is_valid(schema: dict[str, Any], value: Any, defs: dict[str, Place]) -> bool:
    whole = {**schema, "$defs": {name: schema_of(place) for name, place in defs.items()}}
    return bool(jsonschema.Draft202012Validator(whole).is_valid(value))


NAMES = ["a", "b", "c"]
_plain = st.sampled_from(
    [
        Plain({"type": "integer", "minimum": 0, "maximum": 9}),
        Plain({"enum": ["x", 1, None]}),
        Plain({"type": "array", "items": {"$ref": "#/$defs/0"}, "maxItems": 1}),
        Plain({"$ref": "#/$defs/0"}),
        Plain({"$ref": "#/$defs/1", "description": "of one"}),
    ]
)


def _parts(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Part]:
    return st.builds(
        Part,
        st.dictionaries(st.sampled_from(NAMES), inner, max_size=2),
        st.lists(st.sampled_from(NAMES), max_size=1).map(tuple),
        st.sampled_from([None] * 7 + [True, False, {"type": "boolean"}]),
    )


def _places(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Place]:
    parts = _parts(inner)
    return st.builds(
        Place,
        st.lists(parts, min_size=1, max_size=2).map(tuple),
        st.lists(st.lists(parts, min_size=1, max_size=2).map(tuple), max_size=2).map(tuple),
        st.sampled_from(["allOf", "beside"]),
    )


_small = _places(_plain)
_place = _places(st.one_of(_plain, _small))


@st.composite
def _values(draw: st.DrawFn, places: list[Any], defs: dict[str, Place], depth: int = 0) -> Any:
    """Often a value of the schema, sometimes with a key that nothing lists."""
    place = places[0] if places else Plain({"enum": [3, False]})
    if isinstance(place, Plain):
        if "enum" in place.schema:
            return draw(st.sampled_from(place.schema["enum"]))
        if place.schema.get("type") == "integer":
            return draw(st.integers(0, 9))
        target = defs["1" if "1" in str(place.schema.get("$ref")) else "0"]
        if "items" in place.schema:
            return draw(
                st.lists(_values([target], defs, depth + 1), max_size=1 if depth < 3 else 0)
            )
        places = [target]
    groups = [each for each in places if isinstance(each, Place)]
    parts = [part for group in groups for part in group.parts]
    parts += [draw(st.sampled_from(choice)) for group in groups for choice in group.choices]
    optional = [name for part in parts for name in part.properties] if depth < 4 else []
    names = {name for part in parts for name in part.required}
    names |= set(draw(st.lists(st.sampled_from(optional), max_size=2))) if optional else set()
    names |= {"d"} if draw(st.integers(0, 9)) == 0 else set()
    return {
        name: draw(
            _values([p.properties[name] for p in parts if name in p.properties], defs, depth + 1)
        )
        for name in sorted(names)
    }


def walk(matcher: Any, seed: int, most: int = 200) -> str | None:
    """What a model of random logits, bent for the end, writes; None where it goes on."""
    rng, matcher, written = random.Random(seed), matcher.deep_copy(), bytearray()
    for _ in range(most):
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits[:128]).tolist()
        if matcher.is_accepting() and (not allowed or rng.random() < 0.5):
            return written.decode()
        good = [byte for byte in allowed if chr(byte) in '"}]abcdx019'] or allowed
        byte = rng.choice([each for each in good if chr(each) in '"}]'] * 2 + good)
        if not matcher.consume_token(byte):
            return None  # a value that would have to nest for ever
        written.append(byte)
    return None


@given(data=st.data(), place=_place, defs=st.fixed_dictionaries({"0": _small, "1": _small}))
@settings(max_examples=60, deadline=None)
def test_answers_are_those_of_the_schema_without_extra_keys(
    data: st.DataObject, place: Place, defs: dict[str, Place]
) -> None:
    schema = {**schema_of(place), "$defs": {name: schema_of(each) for name, each in defs.items()}}
    matcher = grammar_of(schema)
    if matcher.is_error() and "Unsatisfiable" not in matcher.get_error():
        assert grammar_of(schema, is_closed=False).is_error(), matcher.get_error()
    assume(not matcher.is_error())

    def is_answer(value: Any) -> bool:
        return is_valid(schema, value, defs) and has_no_extras([place], value, defs)

    for seed in range(3):
        if (text := walk(matcher, seed)) is not None:
            assert is_answer(json.loads(text)), text
    value = data.draw(_values([place], defs))
    assert any(takes(matcher, each) for each in orders(value)) == is_answer(value)


ONE = {"type": "object", "properties": {"a": {"type": "integer"}}}
TWO = {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]}


@pytest.mark.parametrize(
    ("schema", "taken", "refused"),
    [
        (ONE, ['{"a":1}', "{}"], ['{"a":1,"x":1}', '{"x":1}']),
        ({"type": "object", "properties": {}}, ["{}"], ['{"x":1}']),
        ({"type": "object"}, ['{"x":1}'], ["1"]),
        ({**ONE, "additionalProperties": True}, ['{"a":1,"x":{"y":1}}'], ['{"a":"1"}']),
        ({**ONE, "additionalProperties": {"type": "null"}}, ['{"x":null}'], ['{"x":1}']),
        ({**ONE, "patternProperties": {"^x": {"type": "null"}}}, ['{"x":null}', '{"y":1}'], []),
        # What must be there is listed, too, and more than are listed are not asked for in vain.
        ({**ONE, "required": ["x"]}, ['{"a":1,"x":[]}'], ['{"x":1,"y":1}', '{"a":1}']),
        ({**ONE, "required": ["a"], "minProperties": 2}, ['{"a":1,"x":1}'], ['{"a":1}']),
        ({"properties": {"a": ONE}}, ['{"a":{"a":1}}', "3"], ['{"a":{"x":1}}']),
        ({"items": ONE, "prefixItems": [TWO]}, ['[{"b":1},{"a":1}]'], ['[{"b":1},{"b":1}]']),
        ({"additionalProperties": ONE}, ['{"x":{"a":1}}'], ['{"x":{"x":1}}']),
        ({"patternProperties": {"x": ONE}}, ['{"x":{"a":1}}'], ['{"x":{"x":1}}']),
        # In the order that they are declared in.
        ({"allOf": [TWO, ONE]}, ['{"b":1,"a":1}', '{"b":1}'], ['{"a":1,"b":1}', '{"b":1,"x":1}']),
        ({**ONE, "allOf": [TWO]}, ['{"a":1,"b":1}'], ['{"b":1,"a":1}']),
        ({"allOf": [TWO], **ONE}, ['{"b":1,"a":1}'], ['{"a":1,"b":1}']),
        ({"$ref": "#/$defs/2", **ONE}, ['{"b":1,"a":1}'], ['{"b":1,"x":1}', '{"a":1}']),
        ({**ONE, "anyOf": [TWO, {"required": ["c"]}]}, ['{"a":1,"b":1}', '{"c":1}'],
         ['{"b":1,"c":1}', '{"a":1}']),
        ({"anyOf": [ONE, TWO, {"type": "null"}]}, ['{"a":1}', '{"b":1}', "null"],
         ['{"a":1,"b":1}']),
        ({"allOf": [ONE, {"additionalProperties": True}]}, ['{"a":1,"x":1}'], []),
        ({"allOf": [{**ONE, "additionalProperties": False}, {"properties": {"b": {}}}]},
         ['{"a":1}'], ['{"b":1}']),
        ({"items": ONE,
          "allOf": [{"additionalProperties": False}, {"properties": {"b": {}}}]},
         ["{}", '[{"a":1}]'], ['{"b":1}', '[{"b":1}]']),
        # Values that two parts ask for are closed where these meet.
        ({"properties": {"o": ONE}, "allOf": [{"properties": {"o": TWO}}]},
         ['{"o":{"a":1,"b":1}}'], ['{"o":{"a":1}}', '{"o":{"a":1,"b":1,"x":1}}']),
        ({"items": ONE, "allOf": [{"items": TWO}]}, ['[{"a":1,"b":1}]'], ['[{"b":1,"x":1}]']),
        # Before draft 2020-12.
        ({"$schema": "http://json-schema.org/draft-07/schema#", "items": [ONE, TWO],
          "additionalItems": False}, ['[{"a":1},{"b":1}]'], ['[{"a":1},{"b":1,"x":1}]', "[1]"]),
    ],
)  # fmt: skip
def test_which_objects_are_closed(schema: Any, taken: list[str], refused: list[str]) -> None:
    schema = {**schema, "$defs": {"2": TWO}}
    matcher = grammar_of(schema)
    assert not matcher.is_error(), matcher.get_error()
    assert [text for text in taken if not takes(matcher, text)] == []
    assert [text for text in refused if takes(matcher, text)] == []
    valid = jsonschema.validators.validator_for(schema)(schema).is_valid
    assert all(valid(json.loads(text)) for text in taken)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {**ONE, "additionalProperties": False},
        {**ONE, "allOf": [{"patternProperties": {"^x": {}}}]},
        {**ONE, "$ref": "#name"},
        {**ONE, "$ref": "https://example.com/x"},
        {**ONE, "$ref": "#/$defs/none"},
        {"properties": {"a": {"$id": "urn:x", **ONE}, "b": {"$ref": "#/properties/a/properties"}}},
        {"allOf": [ONE, {"$id": "urn:x", **TWO}]},
        {"properties": 3}, {"properties": {"a": 3}}, {"properties": {}, "required": 3},
        {**ONE, "allOf": 3}, {**ONE, "allOf": ["x"]}, {**ONE, "anyOf": {}}, {**ONE, "$ref": 3},
        {**ONE, "minProperties": "x"}, {"prefixItems": 3, **ONE}, {"patternProperties": 3},
    ],
)  # fmt: skip
def test_schemas_that_stay_open(schema: dict[str, Any]) -> None:
    before = json.dumps(schema)
    assert json.loads(json.dumps(close_schema(schema))) == json.loads(before)
    assert json.dumps(schema) == before


def test_a_schema_with_an_id_is_the_root_of_its_own_references() -> None:
    inner = {"$id": "urn:x", "$ref": "#/$defs/1", "$defs": {"1": TWO}}
    broken = {"$id": "urn:y", **ONE, "allOf": [{"patternProperties": {"^x": {}}}]}
    schema = {
        "properties": {"in": inner, "broken": broken, "out": {"$ref": "#/$defs/1"}},
        "$defs": {"1": ONE},
    }
    matcher = grammar_of(schema)
    for text, good in (
        ('{"in":{"b":1},"broken":{"y":1},"out":{"a":1}}', True),
        ('{"in":{"b":1,"x":1}}', False),
        ('{"out":{"b":1}}', False),
        ('{"y":1}', False),
    ):
        assert takes(matcher, text) == good, text


def test_references_that_meet_again_and_again_end() -> None:
    """llguidance does not join these at all."""
    defs = {
        name: {"type": "object", "properties": {"in": {"$ref": f"#/$defs/{name}"}, name: {}}}
        for name in "tu"
    }
    schema = {"$defs": defs, "allOf": [{"$ref": "#/$defs/t"}, {"$ref": "#/$defs/u"}]}
    matcher = grammar_of(schema)
    assert takes(matcher, '{"in":{"in":{"t":1,"u":1},"t":1},"u":1}')
    assert not takes(matcher, '{"in":{"in":{"t":1,"u":1,"x":1}}}')


_REFS = [{"$ref": f"#/$defs/{index}"} for index in range(1, 2000)]


@pytest.mark.parametrize(
    "schema",
    [
        {"$defs": {str(i): {**ONE, "allOf": [each]} for i, each in enumerate(_REFS)}, **_REFS[0]},
        {"$defs": {str(i): {**ONE, "anyOf": [each]} for i, each in enumerate(_REFS)}, **_REFS[0]},
        {"$defs": {str(i): {"anyOf": [each]} for i, each in enumerate(_REFS)}, **_REFS[0]},
        {**ONE, "allOf": [{"anyOf": [ONE, TWO]}] * 1000},
        {**ONE, "allOf": [{"anyOf": [{**ONE}, {**TWO}]} for _ in range(30)]},
        {"properties": {f"{i:x}": {} for i in range(999)}, "anyOf": [{"required": ["a"]}] * 3000},
        {"allOf": [{"properties": {f"{i:x}": {}}} for i in range(999)]},
        {"properties": {"a": {"anyOf": [ONE] * 5000}}},
        {"allOf": [{"$ref": "#"}, ONE], "properties": {"a": {"$ref": "#"}}},
    ],
)
@pytest.mark.timing
def test_a_schema_is_closed_in_a_moment(schema: dict[str, Any]) -> None:
    """Nothing ends it, as it is done in the server's own process."""
    started = time.process_time()
    text = json.dumps(close_schema(schema))
    assert time.process_time() - started < 0.6
    assert len(text) < 4_000_000
