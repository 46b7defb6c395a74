"""`OutputStream`: however the answer ends, its chunks are the text up to there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.bundle.manifest import Tokens
from edge.errors import BackendError
from edge.runtime.generation import FinishReason, GenerationStats
from edge.runtime.sampling import SampledToken
from edge.runtime.stream import GenerationChunk, OutputStream
from edge.text.reasoning import THINK_END, THINK_START, ReasoningSplitter
from edge.text.streamed_text import Detokenizer
from edge.text.tokenizer import Tokenizer
from edge_make.read_tokenizer import read_tokenizer
from tests.makers.tiny_models import BOS, BOS_ID, EOS, EOS_ID, write_tokenizer

_texts = st.lists(st.sampled_from(["a", "b", "\n", "🙂", "é", THINK_START, THINK_END])).map("".join)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    tokens = Tokens(bos=BOS_ID, bos_text=BOS, eos=(EOS_ID,), eos_text=EOS, add_bos=True)
    return read_tokenizer(directory / "tokenizer.json", tokens)


def read_all(stream: OutputStream) -> list[GenerationChunk]:
    chunks: list[GenerationChunk] = []
    while not chunks or chunks[-1].finish_reason is None:
        item = stream.get()
        assert isinstance(item, GenerationChunk)
        chunks.append(item)
    return chunks


@given(
    text=_texts,
    stop=st.lists(st.sampled_from(["ab", "ba\n", "🙂", "é<"]), max_size=2),
    splits=st.booleans(),
    opened=st.booleans(),
    end=st.sampled_from(["stop", "length", "cancelled"]),
)
def test_chunks_are_the_text_up_to_the_end(
    tokenizer: Tokenizer, text: str, stop: list[str], splits: bool, opened: bool, end: FinishReason
) -> None:
    def splitter() -> ReasoningSplitter | None:
        return ReasoningSplitter(opened) if splits else None

    stream = OutputStream(Detokenizer(tokenizer), stop, splitter())
    ids = tokenizer.encode(text, control=True)
    pushed: list[int] = []
    reason: FinishReason | None = None
    for place, id_ in enumerate(ids, 1):
        pushed.append(id_)
        is_last = end == "length" and place == len(ids)
        reason = stream.push(SampledToken(id_), "length" if is_last else None)
        if reason is not None:
            break
    if reason is None and end == "stop":
        reason = stream.push(SampledToken(EOS_ID), "stop")
        assert reason == "stop"

    def parts(ids: list[int]) -> tuple[str, str]:
        """What these tokens add to the answer and to the reasoning, stops unseen."""
        written, whole = tokenizer.decode(ids), splitter()
        if whole is None:
            return written, ""
        (reasoning, answer), (last_reasoning, last_answer) = whole.push(written), whole.flush()
        return answer + last_answer, reasoning + last_reasoning

    # The token that completes a stop string in the answer is the last.
    answer, reasoning = parts(pushed)
    if pushed != ids:
        assert reason == "stop"
        assert any(s in answer for s in stop)
    stream.finish(reason or "cancelled", GenerationStats())

    chunks = read_all(stream)
    assert [token.id for chunk in chunks for token in chunk.tokens] == pushed
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == (reason or "cancelled")
    kept = answer[: min((answer.find(s) for s in stop if s in answer), default=len(answer))]
    found = ("".join(c.text for c in chunks), "".join(c.reasoning for c in chunks))
    assert found == (kept, reasoning)


@pytest.mark.parametrize(
    ("written", "stop", "text", "reasoning"),
    [
        (
            "Question: 1</think>\n\nIt is 2.\n\nQuestion:",
            "Question:",
            "It is 2.\n\n",
            "Question: 1",
        ),
        ("so</think>\n\na\n\nb", "\n\n", "a", "so"),
        ("</think>\n\na\n\nb", "\n\n", "a", ""),
        ("so</think>\n\na</think>b", "</think>", "a", "so"),
    ],
)
def test_only_the_answer_ends_at_a_stop(
    tokenizer: Tokenizer, written: str, stop: str, text: str, reasoning: str
) -> None:
    stream = OutputStream(Detokenizer(tokenizer), [stop], ReasoningSplitter(opened=True))
    for token in tokenizer.encode(written, control=True):
        if stream.push(SampledToken(token), None) is not None:
            break
    else:
        pytest.fail("nothing stopped")
    stream.finish("stop", GenerationStats())
    chunks = read_all(stream)
    assert "".join(chunk.text for chunk in chunks) == text
    assert "".join(chunk.reasoning for chunk in chunks) == reasoning
    assert chunks[-1].stop == stop


def test_tokens_without_text():
    stream = OutputStream()
    assert stream.push(SampledToken(7), None) is None
    assert stream.push(SampledToken(EOS_ID), "stop") == "stop"
    stream.finish("stop", GenerationStats(prompt_tokens=3))
    first, last = read_all(stream)
    assert first == GenerationChunk(tokens=(SampledToken(7),))
    assert last == GenerationChunk(finish_reason="stop", stats=GenerationStats(prompt_tokens=3))


def test_an_error_comes_after_what_was_pushed():
    stream = OutputStream()
    stream.push(SampledToken(7), None)
    stream.fail(BackendError("broken"))
    assert isinstance(stream.get(), GenerationChunk)
    assert isinstance(stream.get(), BackendError)
