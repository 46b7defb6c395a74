"""Structured output: whatever the model wants, the text has the form, and no form is too dear."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.bundle.manifest import SamplingDefaults, Tokens
from edge.errors import DependencyError, RequestError, ResourceError
from edge.runtime import structured_output
from edge.runtime.sampling import Sampler
from edge.runtime.sampling_params import SamplingParams
from edge.runtime.scheduler import Constraint
from edge.runtime.schema_rewrite import _writable, rewrite_schema
from edge.runtime.structured_output import GrammarCompiler, GrammarLimits, OutputFormat, OutputKind
from edge.text.streamed_text import Detokenizer
from edge.text.tokenizer import Tokenizer
from edge_make.read_tokenizer import read_tokenizer
from tests.edge.text.test_tokenizer import sentencepiece
from tests.makers.tiny_models import BOS, BOS_ID, CONTROL_IDS, EOS, EOS_ID, write_tokenizer

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

VOCAB = 325  # more than the tokenizer has, and no multiple of 32
TOKENS = Tokens(bos=BOS_ID, bos_text=BOS, eos=(EOS_ID,), eos_text=EOS, add_bos=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return read_tokenizer(directory / "tokenizer.json", TOKENS)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, VOCAB)


def write(
    tokenizer: Tokenizer,
    constraint: Constraint,
    seed: int,
    *,
    wanted: str = '"}]',
    max_tokens: int = 600,
    check: Callable[[list[int]], None] = lambda ids: None,
) -> tuple[str, bool]:
    """What a model of random logits, with some bent for the end, writes; and whether it ended."""
    rng = np.random.RandomState(seed)
    params = SamplingParams(temperature=1.0, seed=seed).resolve(SamplingDefaults())
    sampler = Sampler(params, VOCAB)
    bent = np.zeros(VOCAB, np.float32)
    bent[EOS_ID] = 3
    for char in wanted:
        bent[tokenizer.encode(char, goes_on=True)] = 3
    text = Detokenizer(tokenizer, skip=(EOS_ID,), goes_on=True)
    written, ids = "", list[int]()
    while len(ids) < max_tokens:
        check(ids)
        logits = rng.standard_normal(VOCAB).astype(np.float32) * 2 + bent
        ids.append(sampler.sample(logits, constraint.mask()).id)
        constraint.accept(ids[-1])
        written += text.push(ids[-1])
        if ids[-1] == EOS_ID:
            break
    return written + text.flush(), ids[-1] == EOS_ID


UNWRITABLE = "".join(map(chr, [*range(8), 11, *range(14, 32), 127]))
_writable_texts = st.text(st.characters(codec="utf-8", exclude_characters=UNWRITABLE), max_size=4)
_scalars = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(
        lambda low, span: {"type": "integer", "minimum": low, "maximum": low + span},
        st.integers(-200, 200),
        st.integers(0, 500),
    ),
    st.builds(
        lambda least, more: {"type": "string", "minLength": least, "maxLength": least + more},
        st.integers(0, 3),
        st.integers(0, 5),
    ),
    st.builds(lambda values: {"enum": values}, st.lists(_writable_texts, min_size=1, max_size=4)),
    st.just({"type": "string", "pattern": "^[a-c]{2,4}/[0-9]$"}),
    st.builds(
        lambda out, more: {"type": "string", "pattern": f"^[^{out}]{{0,5}}{more}$"},
        st.sampled_from(
            ['"', r"\\", r'"\\', r"\n", r'\n"', r"]\\", 'a-z"', r'\\/:*?"<>|', r"\s\\"]
        ),
        st.sampled_from(["", "x", '(a|[^"])', r"\\?"]),
    ),
    st.just({"type": "number", "minimum": 0, "exclusiveMaximum": 2}),
)


def _grow(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    properties = st.dictionaries(st.sampled_from(["a", "b", 'q"t', "ü"]), inner, max_size=3)
    return st.one_of(
        st.builds(
            lambda items, most: {"type": "array", "items": items, "maxItems": most},
            inner,
            st.integers(0, 3),
        ),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3)),
        properties.flatmap(
            lambda found: st.builds(
                lambda required: {
                    "type": "object",
                    "properties": found,
                    "required": sorted(required),
                    "additionalProperties": False,
                },
                st.sets(st.sampled_from(sorted(found))) if found else st.just(set()),
            )
        ),
    )


@given(schema=st.recursive(_scalars, _grow, max_leaves=6), seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_any_text_under_a_schema_is_valid_json_of_it(
    tokenizer: Tokenizer, compiler: GrammarCompiler, schema: Any, seed: int
) -> None:
    constraint = compiler.compile(OutputFormat("json_schema", schema))
    text, ended = write(tokenizer, constraint, seed)
    if ended:
        jsonschema.validate(json.loads(text), schema)
    assert ended or len(text) > 100


# How other texts are written: with a space in front, with one that nothing takes away, in NFC.
SPACED = Tokens(bos=1, bos_text="<s>", eos=(EOS_ID,), eos_text=EOS, add_bos=True)
OTHER_TEXT = {"spaced": sentencepiece(), "kept": sentencepiece(strip=False), "nfc": None}


@pytest.fixture(scope="module", params=sorted(OTHER_TEXT))
def rewriting(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer that does not give back each text as it was."""
    data = OTHER_TEXT[request.param]
    return tokenizer if data is None else Tokenizer.from_bytes(data, SPACED)


UNCOMPOSED = "re\u0301 a\u2126"  # not in NFC


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("json_object", None),
        ("json_schema", {"const": {"ab": [True, UNCOMPOSED]}}),
        ("json_schema", {"enum": ["a b", f"a {UNCOMPOSED}", f"b {UNCOMPOSED}"]}),
        (
            "json_schema",
            {
                "type": "object",
                "properties": {"a b": {"type": "null"}, UNCOMPOSED: {"enum": [1, "é"]}},
                "required": ["a b", UNCOMPOSED],
                "additionalProperties": False,
            },
        ),
        ("regex", f" (a|b) {UNCOMPOSED}[0-9]{{2}}"),
        ("regex", "ab"),
    ],
)
def test_text_that_must_come_is_that_text(
    rewriting: Tokenizer, kind: OutputKind, source: Any
) -> None:
    compiler = GrammarCompiler(rewriting, VOCAB)
    for seed in range(3):
        text, ended = write(rewriting, compiler.compile(OutputFormat(kind, source)), seed)
        assert ended
        if kind == "regex":
            assert re.fullmatch(source, text)
        else:
            jsonschema.validate(json.loads(text), source or {"type": "object"})


CAT = {"type": "object", "properties": {"k": {"const": "cat", "default": "cat"}, "n": {}}}
DOG = {
    "type": "object",
    "properties": {"k": {"enum": ["dog", "wolf"]}, "friend": {"$ref": "#/$defs/pet"}},
    "required": ["k"],
}


def pets(*branches: dict[str, Any]) -> dict[str, Any]:
    """A discriminated union, as Pydantic writes it."""
    references = [{"$ref": f"#/$defs/{index}~1"} for index in range(len(branches))]
    defs = {f"{index}/": branch for index, branch in enumerate(branches)}
    union = {"oneOf": references, "discriminator": {"propertyName": "k"}}
    return {"$defs": {**defs, "pet": union}, "$ref": "#/$defs/pet"}


def test_one_of_references_that_a_property_tells_apart(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    schema = pets(CAT, DOG)
    for text in (
        '{"k":"cat"}', '{"k":"cat","n":1}', '{"k":"dog"}', '{"k":"fox"}', "{}", '{"n":1}', "1",
        '{"k":"wolf","friend":{"k":"dog","friend":{"k":"cat"}}}', '{"k":"dog","friend":{"k":1}}',
    ):  # fmt: skip
        valid = jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))
        taken = takes(compiler, tokenizer, schema, text)
        assert taken == (valid and '"k"' in text), text


@pytest.mark.parametrize(
    "branches",
    [
        (CAT, CAT),
        (CAT, {**DOG, "properties": {"k": {"enum": ["dog", "cat"]}}}),
        (CAT, {"type": "object"}),
        (CAT, {"type": "object", "properties": {"k": {"const": 1}}, "required": 3}),
    ],
)
def test_one_of_that_may_hold_twice_is_refused_with_advice(
    compiler: GrammarCompiler, branches: tuple[dict[str, Any], ...]
) -> None:
    with pytest.raises(RequestError) as caught:
        compiler.compile(OutputFormat("json_schema", pets(*branches)))
    assert "coerce" not in str(caught.value)
    if "required" not in branches[1] or branches[1]["required"] != 3:
        assert "write anyOf" in str(caught.value)


NEEDS_A = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
MAY_B = {"type": "object", "properties": {"b": {"type": "integer"}}}


def test_branches_are_told_apart_as_they_are_given(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    """Closed, none of these would hold with another, but of the schema both hold for {"a":1}."""
    with pytest.raises(RequestError, match="write anyOf"):
        compiler.compile(OutputFormat("json_schema", {"oneOf": [NEEDS_A, MAY_B]}))
    for other, text in (({"type": "null"}, "null"), ({"type": "string"}, '"b"')):
        written, referred = {"oneOf": [other, MAY_B]}, pets(other, MAY_B)
        del referred["$defs"]["pet"]["discriminator"]
        for schema in (written, referred):
            for answer, good in ((text, True), ('{"b":1}', True), ('{"b":1,"x":1}', False)):
                assert takes(compiler, tokenizer, schema, answer) == good


@pytest.mark.parametrize("char", UNWRITABLE)
def test_a_text_that_no_answer_can_have_is_refused(compiler: GrammarCompiler, char: str) -> None:
    for schema in ({"const": char}, {"enum": ["x", {"a": [f"x{char}"]}]}):
        with pytest.raises(RequestError, match="a control character that answers cannot have"):
            compiler.compile(OutputFormat("json_schema", schema))


@pytest.mark.parametrize("written", ["{}", r"\x{:02x}", r"\u{{{:x}}}", "[{}]", r"[\x00-\x01{}]"])
@pytest.mark.parametrize("char", ["\x1b", "\x7f"])
def test_a_character_that_no_answer_can_have_is_not_left_out(
    tokenizer: Tokenizer, compiler: GrammarCompiler, char: str, written: str
) -> None:
    part = written.format(ord(char) if "{:" in written else char)
    with pytest.raises(RequestError, match="empty"):
        compiler.compile(OutputFormat("json_schema", {"type": "string", "pattern": f"^a{part}b$"}))
    schema = {"type": "string", "pattern": f"^({part}|a)b$"}
    assert takes(compiler, tokenizer, schema, '"ab"')
    assert not takes(compiler, tokenizer, schema, '"b"')


@pytest.mark.parametrize("seed", range(8))
def test_json_mode_gives_an_object(
    tokenizer: Tokenizer, compiler: GrammarCompiler, seed: int
) -> None:
    text, ended = write(tokenizer, compiler.compile(OutputFormat("json_object")), seed)
    assert ended
    assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    "pattern",
    ["[a-z]{3}(-[0-9]{1,2})?", "ja|nein", "", 'a/b\\\\"?', "(x+x+)+y", "[^a-z\n]{0,9}", "ä€?"],
)
@given(seed=st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_text_under_an_expression_matches_and_ends_only_where_it_does(
    tokenizer: Tokenizer, compiler: GrammarCompiler, pattern: str, seed: int
) -> None:
    constraint = compiler.compile(OutputFormat("regex", pattern))

    def check(ids: list[int]) -> None:
        mask = constraint.mask()
        text = tokenizer.decode(ids)
        # Half a character is no text yet.
        matches = "\ufffd" not in text and re.fullmatch(pattern, text) is not None
        assert (mask[EOS_ID] == 0) == matches == constraint.may_end

    text, ended = write(tokenizer, constraint, seed, wanted="y", check=check)
    assert ended
    assert re.fullmatch(pattern, text)


def takes(
    compiler: GrammarCompiler, tokenizer: Tokenizer, schema: dict[str, Any], text: str
) -> bool:
    """Whether a text is an answer of a schema."""
    constraint = compiler.compile(OutputFormat("json_schema", schema))
    try:
        for token_id in tokenizer.encode(text):
            constraint.accept(token_id)
    except RequestError:
        return False
    return constraint.may_end


CLASSES = (
    '^[^"]*$', r"^[^\\]*$", r'^[^"\\]*$', r"^[^\\/]+$", r'^[^\\/:*?"<>|]+$', r'^[^\n"]*$', '[^"]',
    r'^[^]"]*$', r'^[^\]"]*$', '^([^"]|a)+$', r"^\[[^\\]*\]$", r"^[\x00-\x21]*$", r"^\D*$", "^.*$",
    r'^([^"]|\x00)*$', r"^[^\S\n]*$", "^[!-[]+$", r"^[#-[\]-~]*$", "^([!-[a]b])?$", "^(?i-x:a)b$",
    r"^([]!#-[^-~ \t]|(\\[\t -~]))+$", "^(?P<a[0]>a)b$",
)  # fmt: skip
WRITTEN = ("", "ab", '"', "\\", 'a"b', "a\\b", "a\nb", "a/b", "\t", "a]b", "[x]", '[\\"]', "ü")


@pytest.mark.parametrize("pattern", CLASSES)
def test_a_class_takes_no_quote_and_no_backslash_that_it_excludes(
    tokenizer: Tokenizer, compiler: GrammarCompiler, pattern: str
) -> None:
    by_key = {"type": "object", "patternProperties": {pattern: {}}, "additionalProperties": False}
    python = pattern.removesuffix("$") + r"\Z" * pattern.endswith("$")
    for rust, other in (("[^]", r"[^\]"), ("a[0]>", "a>"), ("(?i-x:", "(?i:")):
        python = python.replace(rust, other)
    for text in WRITTEN:
        written = json.dumps(text, ensure_ascii=False)
        matches = re.search(python, text) is not None
        schema = {"type": "string", "pattern": pattern}
        assert takes(compiler, tokenizer, schema, written) == matches, text
        assert takes(compiler, tokenizer, by_key, f"{{{written}:1}}") == matches, text


@given(
    parts=st.lists(
        st.sampled_from(
            [*"[]^-&~!ab:", "[[", r"\]", r"\x41", r"\d", r"\p{L}", "[:alpha:]", "(?i)"]
        ),
        max_size=12,
    )
)
@settings(max_examples=150, deadline=None)
def test_an_expression_takes_the_same_texts_writable(parts: list[str]) -> None:
    llguidance = pytest.importorskip("llguidance")

    def texts_of(pattern: str) -> set[str] | None:
        schema = json.dumps({"type": "string", "pattern": f"^({pattern})$"})
        grammar = llguidance.LLMatcher.grammar_from_json_schema(schema)
        first = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), grammar, log_level=0)
        if first.is_error():
            return None
        taken = set()
        for text in (
            "",
            "a",
            "A",
            "b",
            "B",
            "-",
            "[",
            "]",
            "^",
            "!",
            "5",
            "~",
            "&",
            ":",
            "a]",
            "]]",
        ):
            matcher, written = first.deep_copy(), list(json.dumps(text).encode())
            if matcher.try_consume_tokens(written) == len(written) and matcher.is_accepting():
                taken.add(text)
        return taken

    pattern = "".join(parts)
    if (wanted := texts_of(pattern)) is not None:
        assert texts_of(_writable(pattern)) == wanted


@pytest.mark.parametrize(
    "schema",
    [
        {"a": {"type": "object", "properties": {f"{i:x}": {} for i in range(500)}},
         "oneOf": [{"$ref": "#/a"}] * 2000},
        {**{key: {"type": "object", "properties": {f"{i:x}": {"enum": ["a"]} for i in range(500)}}
            for key in "ab"},
         "allOf": [{"oneOf": [{"$ref": "#/a"}, {"$ref": "#/b"}]}] * 600},
        {"pattern": r"\p{" * 15000},
        {"pattern": "(?<" * 15000},
    ],
)  # fmt: skip
def test_a_schema_is_rewritten_in_a_moment(schema: dict[str, Any]) -> None:
    """Nothing ends it, as it is done in the server's own process."""
    schema = json.loads(json.dumps(schema))
    started = time.process_time()
    rewrite_schema(schema)
    assert time.process_time() - started < 0.4


def test_what_only_looks_like_a_pattern_stays(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    value = {"pattern": "[a]", "patternProperties": {"[a]": 1}}
    for schema in ({"const": value}, {"enum": [value]}):
        assert takes(compiler, tokenizer, schema, json.dumps(value, separators=(",", ":")))
    named = {"type": "object", "properties": {"pattern": {"const": 1}}, "required": ["pattern"]}
    assert takes(compiler, tokenizer, named, '{"pattern":1}')
    with pytest.raises(RequestError, match="has the flag x"):
        compiler.compile(OutputFormat("json_schema", {"type": "string", "pattern": "(?x) a # ["}))


def test_a_key_in_escapes_is_not_another_key(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    schema = {"properties": {"a": {"type": "integer"}}, "additionalProperties": True}
    for text, good in (
        ('{"a":1}', True), ('{"a":"x"}', False), (r'{"\u0061":"x"}', False),
        (r'{"\n\"":"x"}', True),
    ):  # fmt: skip
        assert takes(compiler, tokenizer, schema, text) == good


def test_white_space_cannot_go_on_for_ever(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    constraint = compiler.compile(OutputFormat("json_object"))
    constraint.accept(tokenizer.encode("{")[0])
    (space,) = tokenizer.encode("\t")
    for _ in range(64):
        assert constraint.mask()[space] == 0
        constraint.accept(space)
    assert constraint.mask()[space] == -np.inf


def test_a_grammar_that_counts(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    output = OutputFormat("grammar", 'start: "(" start? ")"')
    for seed in range(5):
        text, ended = write(tokenizer, compiler.compile(output), seed, wanted=")")
        assert ended
        assert text == "(" * (len(text) // 2) + ")" * (len(text) // 2) != ""


def test_no_control_token_and_no_padding_unless_the_grammar_names_it(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    anything = compiler.compile(OutputFormat("regex", r"(.|\n)*")).mask()
    allowed = set(np.flatnonzero(anything == 0).tolist())
    assert allowed - {EOS_ID} <= set(range(tokenizer.vocab_size)) - set(CONTROL_IDS.values())
    assert anything.dtype == np.float32
    assert anything.shape == (VOCAB,)
    assert np.isneginf(np.delete(anything, sorted(allowed))).all()

    named = compiler.compile(OutputFormat("grammar", 'start: <think> "a"'))
    assert np.flatnonzero(named.mask() == 0).tolist() == [CONTROL_IDS["<think>"]]


def test_after_the_end_only_end_tokens_remain(compiler: GrammarCompiler) -> None:
    constraint = compiler.compile(OutputFormat("regex", ""))
    for _ in range(3):
        assert np.flatnonzero(constraint.mask() == 0).tolist() == [EOS_ID]
        constraint.accept(EOS_ID)


def test_sequences_of_one_form_do_not_share_their_place(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    output = OutputFormat("regex", "ab")
    one, other = compiler.compile(output), compiler.compile(output)
    one.accept(tokenizer.encode("a")[0])
    # One mask object per sequence: the other's does not change under the caller's hands.
    kept = one.mask()
    first = kept.copy()
    assert not np.array_equal(first, other.mask())
    assert np.array_equal(first, kept)


def test_a_forbidden_token_is_an_error(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    constraint = compiler.compile(OutputFormat("regex", "ab"))
    with pytest.raises(RequestError, match="breaks the regular expression"):
        constraint.accept(tokenizer.encode("b")[0])


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("json_schema", {"not": {}}, 'Unimplemented keys: ."not".*leave that keyword out'),
        ("json_schema", {"$ref": "#/$defs/x"}, "'/.defs/x' does not exist"),
        ("json_schema", {"$ref": "https://example.com/x"}, "cannot be used: .*example.com"),
        ("json_schema", {"type": "strang"}, "strang"),
        ("json_schema", {"type": "string", "minLength": 3, "maxLength": 1}, "minLength"),
        ("json_schema", {"x-guidance": {"lenient": True}, "not": {}}, "x-guidance is not supp"),
        ("json_schema", "{", "is not JSON"),
        ("json_schema", "[" * 60_000, "is not JSON"),
        ("json_schema", "3", "must be an object"),
        ("json_schema", _nested(100), "nests more than 64 levels"),
        ("json_schema", {"properties": {f"p{i}": {} for i in range(1001)}}, "1001 properties"),
        ("json_schema", {"a": "x" * 70_000}, "has 700.. bytes, at most 65536"),
        ("regex", "([", "unclosed character class"),
        ("regex", "(?=a)b", "look-ahead"),
        ("regex", "\ud800", "no text"),
        ("grammar", "start: x", 'unknown name: "x"'),
        ("grammar", "begin: /x/", "start"),
        ("grammar", "start: <nothing>", "unknown special token"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_the_reason(
    compiler: GrammarCompiler, kind: OutputKind, source: Any, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        compiler.compile(OutputFormat(kind, source))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "multipleOf": 999_983},
        {"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{i}}}"} for i in range(30)]},
    ],
)
def test_a_form_that_would_compile_for_minutes_is_given_up(
    tokenizer: Tokenizer, schema: dict[str, Any]
) -> None:
    compiler = GrammarCompiler(tokenizer, VOCAB, GrammarLimits(compile_s=1))
    with pytest.raises(RequestError, match=r"takes more than 1 s .* simplify it"):
        compiler.compile(OutputFormat("json_schema", schema))


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("yaml", None, "unknown output format 'yaml'"),
        ("json_object", "{}", "takes no source"),
        ("regex", None, "needs a source"),
        ("json_schema", 3, "given as text"),
        ("grammar", {"a": 1}, "given as text"),
        ("json_schema", {"a": object()}, "not plain JSON data"),
    ],
)
def test_an_output_format_checks_itself(kind: Any, source: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        OutputFormat(kind, source)


def test_schemas_may_be_data_or_text() -> None:
    assert OutputFormat("json_schema", {"type": "null"}) == OutputFormat(
        "json_schema", '{"type":"null"}'
    )


def test_a_schema_may_be_a_model_of_pydantics(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    pydantic = pytest.importorskip("pydantic")
    model = pydantic.create_model("Person", age=(int, ...), likes=(list[str], []))
    output = OutputFormat("json_schema", model)
    assert output == OutputFormat("json_schema", model.model_json_schema())
    text, ended = write(tokenizer, compiler.compile(output), 3)
    assert ended
    model.model_validate_json(text)
    with pytest.raises(RequestError, match="given as text"):
        OutputFormat("grammar", model)


def test_without_the_library_the_error_names_the_extra(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(DependencyError, match=r"install .*-e .*\[serve\]"):
        GrammarCompiler(tokenizer, VOCAB).compile(OutputFormat("json_object"))


def test_a_check_that_breaks_is_not_blamed_on_the_grammar(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [])  # so the process finds no llguidance
    with pytest.raises(ResourceError, match="is llguidance installed whole"):
        compiler.compile(OutputFormat("regex", "not compiled before"))


def test_an_interpreter_that_cannot_start_is_an_error(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    with pytest.raises(ResourceError, match="cannot start a process"):
        compiler.compile(OutputFormat("regex", "never compiled before"))


# Calls in free text

CALL_SCHEMA = {
    "type": "object",
    "properties": {"name": {"const": "f"}, "arguments": {"enum": [{"a": 1}, {"a": 22}]}},
    "required": ["name", "arguments"],
    "additionalProperties": False,
}
CALL_MARKS = {"text": ("<tool_call>", "</tool_call>"), "control": ("<think>", "</think>")}


@pytest.fixture(params=sorted(CALL_MARKS))
def marks(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Marks that are plain text to the tokenizer, and marks that are control tokens."""
    return CALL_MARKS[request.param]


def follow(
    compiler: GrammarCompiler,
    tokenizer: Tokenizer,
    marks: tuple[str, str],
    text: str,
    **more: Any,
) -> tuple[str, bool]:
    """How far a text is let through, and whether it might end there."""
    start, end = marks
    source = {"start": start, "end": end, "schema": CALL_SCHEMA, **more}
    constraint = compiler.compile(OutputFormat("tool_calls", source))
    ids = tokenizer.encode(text, control=True)
    for at, token_id in enumerate(ids):
        if constraint.mask()[token_id] != 0:
            return tokenizer.decode(ids[:at]), constraint.may_end
        constraint.accept(token_id)
    return text, constraint.may_end


def test_text_is_free_and_calls_keep_to_the_schema(
    compiler: GrammarCompiler, tokenizer: Tokenizer, marks: tuple[str, str]
) -> None:
    start, end = marks
    call = f'{start}\n{{"name": "f", "arguments": {{"a": 22}}}}\n{end}'
    whole = ("", "plain < text\n\n{}", f"so: {call}", f"{call}\n{call} and more",
             f"a {start[:-1]} b", end, call.replace("\n", ""))  # fmt: skip
    for text in whole:
        if text == end and start in tokenizer.control_tokens:
            continue  # a closing token alone is no text
        assert follow(compiler, tokenizer, marks, text) == (text, True)
    for text, good in (
        (f'{start}{{"name": "g"', f'{start}{{"name": "'),
        (f'hm {start}\n{{"name": "f", "arguments": {{"a": 2}}', None),
        (f"{start}call me{end}", start),
        (f"{start}{end}", start),
    ):
        found, may_end = follow(compiler, tokenizer, marks, text)
        assert found == good or (good is None and found != text)
        assert not may_end


def test_a_mark_that_is_spelled_out_opens_no_call(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    """Where the mark is one control token, its letters would be read as a call all the same."""
    source = {"start": "<think>", "end": "</think>", "schema": CALL_SCHEMA}
    constraint = compiler.compile(OutputFormat("tool_calls", source))
    *letters, last = tokenizer.encode("<think>")
    for token_id in letters:
        assert constraint.mask()[token_id] == 0
        constraint.accept(token_id)
    assert constraint.mask()[last] != 0


def test_an_answer_is_calls_alone_or_keeps_to_its_schema(
    compiler: GrammarCompiler, tokenizer: Tokenizer, marks: tuple[str, str]
) -> None:
    """References of each schema lead into its own."""
    start, end = marks
    answer = {"$defs": {"N": {"type": "integer"}}, "type": "object",
              "properties": {"n": {"$ref": "#/$defs/N"}}, "required": ["n"],
              "additionalProperties": False}  # fmt: skip
    call = f'{start}\n{{"name": "f", "arguments": {{"a": 22}}}}\n{end}'
    for text in (call, f"{call}\n{call}", f"{call}{call}", '{"n": 5}'):
        assert follow(compiler, tokenizer, marks, text, answer=answer) == (text, True)
    for text, good in (
        (f"so {call}", ""),
        ('{"n": "5"}', '{"n": '),
        (f"{call} and", call),
        (f'{{"n": 5}}{call}', '{"n": 5}'),
        (f'{start}{{"name": "g"', f'{start}{{"name": "'),
    ):
        found, may_end = follow(compiler, tokenizer, marks, text, answer=answer)
        assert (found, may_end) == (good, good in (call, '{"n": 5}'))


def test_calls_and_answers_have_listed_keys_only(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    call = {**CALL_SCHEMA, "properties": {"name": {"const": "f"}, "arguments": NEEDS_A}}
    source = {"start": "<tool_call>", "end": "</tool_call>", "schema": call, "answer": NEEDS_A}
    for text, good in (
        ('<tool_call>{"name":"f","arguments":{"a":1}}</tool_call>', True),
        ('<tool_call>{"name":"f","arguments":{"a":1,"x":1}}</tool_call>', False),
        ('{"a":1}', True), ('{"a":1,"x":1}', False),
    ):  # fmt: skip
        constraint = compiler.compile(OutputFormat("tool_calls", source))
        allowed = []
        for token_id in tokenizer.encode(text):
            allowed.append(constraint.mask()[token_id] == 0)
            if not allowed[-1]:
                break
            constraint.accept(token_id)
        assert all(allowed) == good, text


@pytest.mark.parametrize(
    "source",
    [
        "{}",
        {"start": "<a>", "end": "</a>"},
        {"start": '<a>"', "end": "</a>", "schema": {}},
        {"start": "<a>", "end": "</a>", "schema": {"type": "poem"}},
        {"start": "<a>", "end": "</a>", "schema": {"x-guidance": {}}},
        {"start": "<a>", "end": "</a>", "schema": {}, "answer": {"x-guidance": {}}},
        {"start": "<a>", "end": "</a>", "schema": {}, "answer": {"type": "poem"}},
    ],
)
def test_forms_of_calls_that_cannot_be_read(compiler: GrammarCompiler, source: Any) -> None:
    with pytest.raises(RequestError, match=r"tool|JSON schema: x-guidance"):
        compiler.compile(OutputFormat("tool_calls", source))


def test_whether_a_form_is_kept_is_known_while_the_vocabulary_is_built(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    """The server's event loop asks."""
    building, go_on = threading.Event(), threading.Event()
    build = structured_output._build_vocabulary

    def slow(*args: Any) -> Any:
        building.set()
        go_on.wait(20)
        return build(*args)

    monkeypatch.setattr(structured_output, "_build_vocabulary", slow)
    compiler, form = GrammarCompiler(tokenizer, VOCAB), OutputFormat("json_object")
    with ThreadPoolExecutor(2) as pool:
        compiled = pool.submit(compiler.compile, form)
        try:
            assert building.wait(20)
            assert pool.submit(compiler.__contains__, form).result(timeout=5) is False
        finally:
            go_on.set()
        compiled.result()
    assert form in compiler
