"""Reasoning of bounded length, and a form for what follows it; tags of one token and of several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge.bundle.manifest import Tokens
from edge.errors import RequestError
from edge.runtime.thinking import ThinkingBudget
from edge.text.reasoning import ReasoningSplitter
from edge.text.tokenizer import Tokenizer
from edge_make.read_tokenizer import read_tokenizer
from tests.edge.text.test_tokenizer import sentencepiece
from tests.makers.tiny_models import BOS, BOS_ID, EOS, EOS_ID, write_tokenizer

VOCAB = 325
TOKENS = Tokens(bos=BOS_ID, bos_text=BOS, eos=(EOS_ID,), eos_text=EOS, add_bos=True)
TOKENS_OF_SPACED = Tokens(bos=1, bos_text="<s>", eos=(EOS_ID,), eos_text=EOS, add_bos=True)


def _one_token_tags(directory: Path) -> Tokenizer:
    write_tokenizer(directory)
    return read_tokenizer(directory / "tokenizer.json", TOKENS)


def _long_tags(directory: Path) -> Tokenizer:
    write_tokenizer(directory)
    data = json.loads((directory / "tokenizer.json").read_text())
    data["added_tokens"] = [t for t in data["added_tokens"] if "think" not in t["content"]]
    return Tokenizer.from_bytes(json.dumps(data).encode(), TOKENS)


@pytest.fixture(scope="module", params=[_one_token_tags, _long_tags])
def tokenizer(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    found: Tokenizer = request.param(tmp_path_factory.mktemp("tokenizer"))
    return found


class Spelled:
    """Allows one text and then the end; fails on any other token."""

    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        self._left = [*tokenizer.encode(text, goes_on=True), EOS_ID]

    def mask(self) -> NDArray[np.float32]:
        mask = np.full(VOCAB, -np.inf, np.float32)
        mask[self._left[0]] = 0
        return mask

    def accept(self, token_id: int) -> None:
        assert token_id == self._left.pop(0)


def run(constraint: ThinkingBudget, wanted: list[int], seed: int = 0, most: int = 80) -> list[int]:
    """Take what is wanted, in order, where it is allowed; else any token that is."""
    rng = np.random.RandomState(seed)
    wanted = list(wanted)
    ids: list[int] = []
    while len(ids) < most:
        mask = constraint.mask()
        if wanted and (mask is None or mask[wanted[0]] == 0):
            token = wanted.pop(0)
        else:  # plain tokens only, where every token is allowed
            token = int(rng.choice(300 if mask is None else np.flatnonzero(mask == 0)))
        constraint.accept(token)
        if token == EOS_ID:
            break
        ids.append(token)
    return ids


def split(text: str, *, opened: bool) -> tuple[str, str]:
    splitter = ReasoningSplitter(opened)
    pieces = [splitter.push(text), splitter.flush()]
    return "".join(piece[0] for piece in pieces), "".join(piece[1] for piece in pieces)


@given(budget=st.integers(0, 20), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_reasoning_ends_in_time_and_the_answer_has_its_form(
    tokenizer: Tokenizer, budget: int, seed: int
) -> None:
    constraint = ThinkingBudget(
        tokenizer, VOCAB, opened=True, budget=budget, answer=Spelled(tokenizer, "[1]")
    )
    ids = run(constraint, [], seed)
    assert split(tokenizer.decode(ids), opened=True)[1] == "[1]"
    one_token = "</think>" in tokenizer.control_tokens
    closing = (1 if one_token else len("</think>")) + len(tokenizer.encode("\n\n"))
    assert len(ids) <= budget + closing + len(tokenizer.encode("[1]"))


def test_the_model_may_end_its_reasoning_itself(tokenizer: Tokenizer) -> None:
    for behind in ("", "\n", "\n\n"):
        wanted = tokenizer.encode("so</think>" + behind, control=True)
        constraint = ThinkingBudget(
            tokenizer, VOCAB, opened=True, budget=50, answer=Spelled(tokenizer, "ja")
        )
        text = tokenizer.decode(run(constraint, wanted))
        assert text == "so</think>\n\nja"


def test_without_a_form_the_answer_is_free_and_only_the_length_is_forced(
    tokenizer: Tokenizer,
) -> None:
    constraint = ThinkingBudget(tokenizer, VOCAB, opened=True, budget=3)
    wanted = [*tokenizer.encode("abc"), *tokenizer.encode("</think>\n\n", control=True)]
    assert tokenizer.decode(run(constraint, wanted, most=len(wanted))) == "abc</think>\n\n"
    assert constraint.mask() is None
    early = ThinkingBudget(tokenizer, VOCAB, opened=True, budget=30)
    for token in tokenizer.encode("a</think>", control=True):
        assert early.mask() is None
        early.accept(token)
    assert early.mask() is None


def test_a_form_admits_no_end_inside_the_reasoning(tokenizer: Tokenizer) -> None:
    constraint = ThinkingBudget(tokenizer, VOCAB, opened=True, answer=Spelled(tokenizer, "a"))
    mask = constraint.mask()
    assert mask is not None
    assert np.flatnonzero(mask != 0).tolist() == [EOS_ID]


def test_a_tag_of_several_tokens_that_was_begun_is_finished(tokenizer: Tokenizer) -> None:
    begun = tokenizer.encode("ab</th")
    constraint = ThinkingBudget(tokenizer, VOCAB, opened=True, budget=len(begun))
    ids = run(constraint, begun, most=len(begun) + 4)
    if "</think>" in tokenizer.control_tokens:  # the token itself, which the model knows
        assert tokenizer.decode(ids).startswith("ab</th</think>\n\n")
    else:
        assert tokenizer.decode(ids).startswith("ab</think>")


@pytest.mark.parametrize("begun", ["a", "a</", "a</th"])
@pytest.mark.parametrize("with_form", [False, True])
def test_no_space_comes_into_the_closing_tag_or_before_the_answer(
    begun: str, with_form: bool
) -> None:
    tokenizer = Tokenizer.from_bytes(sentencepiece(), TOKENS_OF_SPACED)
    ids = tokenizer.encode(begun, goes_on=True)
    answer = Spelled(tokenizer, "b") if with_form else None
    constraint = ThinkingBudget(tokenizer, VOCAB, opened=True, budget=len(ids), answer=answer)
    written = f"{begun.removesuffix('</').removesuffix('</th')}</think>\n\nb"
    wanted = [*ids, *tokenizer.encode("b", goes_on=True)]
    found = run(constraint, wanted, most=len(tokenizer.encode(written, goes_on=True)))
    assert b"".join(map(tokenizer.token_bytes, found)).decode() == written


def test_text_after_the_tag_in_its_token_gets_no_space() -> None:
    tokenizer = Tokenizer.from_bytes(sentencepiece(), TOKENS_OF_SPACED)
    constraint = ThinkingBudget(tokenizer, VOCAB, opened=True, answer=Spelled(tokenizer, "b"))
    constraint._close(b"\nb")  # `Spelled` fails on anything but its text


@pytest.mark.parametrize("start", ["<think>", "\n<think>"])
def test_the_model_may_open_the_reasoning(tokenizer: Tokenizer, start: str) -> None:
    constraint = ThinkingBudget(tokenizer, VOCAB, opened=False, budget=2)
    wanted = tokenizer.encode(start + "abc", control=True)
    text = tokenizer.decode(run(constraint, wanted, most=len(wanted) + 12))
    assert text.startswith(start + "ab</think>\n\n")


def test_the_model_may_answer_at_once(tokenizer: Tokenizer) -> None:
    free = ThinkingBudget(tokenizer, VOCAB, opened=False, budget=0)
    for token in tokenizer.encode("no <think>", control=True):
        assert free.mask() is None
        free.accept(token)
    assert free.mask() is None  # a tag further on is plain text

    bound = ThinkingBudget(
        tokenizer, VOCAB, opened=False, budget=9, answer=Spelled(tokenizer, "ja")
    )
    assert tokenizer.decode(run(bound, tokenizer.encode("ja"))) == "ja"


def test_with_a_form_the_model_may_open_the_reasoning_or_begin_the_form(
    tokenizer: Tokenizer,
) -> None:
    def make(text: str) -> ThinkingBudget:
        return ThinkingBudget(
            tokenizer, VOCAB, opened=False, budget=1, answer=Spelled(tokenizer, text)
        )

    opening = tokenizer.encode("<think>", control=True)
    mask = make("ja").mask()
    assert mask is not None
    assert set(np.flatnonzero(mask == 0)) == {opening[0], tokenizer.encode("j")[0]}
    text = tokenizer.decode(run(make("ja"), [opening[0]]))
    assert text.startswith("<think>")
    assert text.endswith("</think>\n\nja")
    # Where the form itself may begin like a tag of several tokens, it is the form.
    assert tokenizer.decode(run(make("<b>"), tokenizer.encode("<"))) == "<b>"


def test_a_real_grammar_follows_the_reasoning(tokenizer: Tokenizer) -> None:
    pytest.importorskip("llguidance")
    from edge.runtime.structured_output import GrammarCompiler, OutputFormat

    compiler = GrammarCompiler(tokenizer, VOCAB)
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    schema["additionalProperties"] = False  # type: ignore[assignment]
    for seed in range(5):
        constraint = ThinkingBudget(
            tokenizer,
            VOCAB,
            opened=True,
            budget=10,
            answer=compiler.compile(OutputFormat("json_schema", schema)),
        )
        text = tokenizer.decode(run(constraint, tokenizer.encode("hm"), seed, most=900))
        reasoning, answer = split(text, opened=True)
        assert reasoning.startswith("hm")
        assert isinstance(json.loads(answer)["a"], bool)


@pytest.mark.parametrize("budget", [-1, 2.5, True])
def test_a_budget_that_would_never_end_is_refused(tokenizer: Tokenizer, budget: Any) -> None:
    with pytest.raises(RequestError, match="must be 0 or more"):
        ThinkingBudget(tokenizer, VOCAB, opened=True, budget=budget)


def test_text_after_the_tag_in_its_token_belongs_to_the_answer(tmp_path: Path) -> None:
    """A token of several characters may close the tag and begin the answer."""
    tokenizer = _long_tags(tmp_path)
    seen: list[int] = []

    class Recorder(Spelled):
        def accept(self, token_id: int) -> None:
            seen.append(token_id)

    constraint = ThinkingBudget(tokenizer, VOCAB, opened=True, answer=Recorder(tokenizer, "a"))
    whole = {300: b"</think>\nab"}
    real: Any = tokenizer.token_bytes

    class Patched:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def token_bytes(self, token_id: int) -> bytes:
            found: bytes = whole.get(token_id) or real(token_id)
            return found

    constraint._tokenizer = Patched()  # type: ignore[assignment]
    constraint.accept(300)
    assert seen == tokenizer.encode("ab")
