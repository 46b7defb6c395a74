"""The loop from ids to ids on a backend that checks every step: `tests.fakes.ScriptedBackend`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.embeddings import EmbeddingTable
from edge.errors import BackendError, ContextLengthError, RequestError
from edge.generation import Decoder, GenerationStats
from edge.sampling import Sampler, SamplingParams
from tests.fakes import Script, ScriptedBackend, random_logits

VOCAB = 50
END = 49
GREEDY = SamplingParams(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
COUNT_UP: Script = lambda seen: (seen[-1] + 1) % VOCAB  # noqa: E731


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddingTable]:
    """One row of two numbers per token."""
    rows = np.arange(2 * VOCAB, dtype=np.float16).reshape(VOCAB, 2)
    entry = {"dtype": "F16", "shape": rows.shape, "data_offsets": [0, rows.nbytes]}
    head = json.dumps({"token_embeddings": entry}).encode()
    path = tmp_path_factory.mktemp("table") / "embeddings.safetensors"
    path.write_bytes(len(head).to_bytes(8, "little") + head + rows.tobytes())
    opened = EmbeddingTable(path)
    yield opened
    opened.close()


class Loop:
    """A decoder with its backend; `run` collects one generation."""

    def __init__(self, table: EmbeddingTable, script: Script = COUNT_UP, **options: Any) -> None:
        self.backend = ScriptedBackend(table, script, **options)
        self.decoder = Decoder(self.backend, table)
        self.stats = GenerationStats()

    def start(
        self,
        prompt: list[int],
        max_tokens: int | None = None,
        end_ids: tuple[int, ...] = (END,),
        reuse: bool = False,
        params: SamplingParams = GREEDY,
    ) -> Iterator[Any]:
        self.stats = GenerationStats()
        return self.decoder.generate(
            prompt,
            Sampler(params, VOCAB, prompt),
            self.stats,
            max_tokens=max_tokens,
            end_ids=end_ids,
            reuse=reuse,
        )

    def run(self, prompt: list[int], *args: Any, **options: Any) -> tuple[list[int], str]:
        tokens, reasons = zip(*self.start(prompt, *args, **options), strict=True)
        assert all(reason is None for reason in reasons[:-1])
        return [token.id for token in tokens], reasons[-1]


def test_the_answer_ends_at_max_tokens(table: EmbeddingTable):
    loop = Loop(table)
    assert loop.run([1, 2, 3], max_tokens=4) == ([4, 5, 6, 7], "length")
    # The last token is never run: nobody asks for what follows it.
    assert loop.backend.steps == [(0, 3), (3, 1), (4, 1), (5, 1)]
    assert loop.decoder.cursor.ids == [1, 2, 3, 4, 5, 6]


def test_the_answer_ends_at_an_end_token(table: EmbeddingTable):
    loop = Loop(table)
    assert loop.run([46], max_tokens=100) == ([47, 48, 49], "stop")
    assert loop.run([1], end_ids=(3, 5)) == ([2, 3], "stop")
    assert loop.run([48]) == ([49], "stop")
    assert loop.run([END, 1], end_ids=(END, 3)) == ([2, 3], "stop")  # of a prompt it ends nothing
    # An end token that comes as the last one allowed is still an end.
    assert loop.run([1], max_tokens=2, end_ids=(3,)) == ([2, 3], "stop")


@pytest.mark.parametrize("num_prompt", [1, 5, 8, 9])
def test_the_answer_ends_where_the_cache_does(table: EmbeddingTable, num_prompt: int):
    """The backend asserts that no step passes the capacity; the last row is used."""
    loop = Loop(table, capacity=10, max_step_tokens=4)
    prompt = [0] * num_prompt
    for max_tokens in (None, 100):
        ids, reason = loop.run(prompt, max_tokens=max_tokens)
        assert reason == "length"
        assert ids == list(range(1, 10 - num_prompt + 2))
        assert loop.decoder.cursor.remaining == 0


def test_prompts_that_cannot_run(table: EmbeddingTable):
    loop = Loop(table, capacity=10)
    for prompt, error in (
        ([], RequestError),
        ([0] * 10, ContextLengthError),
        ([0] * 11, ContextLengthError),
    ):
        with pytest.raises(error):
            loop.run(prompt)
    with pytest.raises(RequestError, match="token id 50 is outside"):
        next(
            loop.decoder.generate(
                [VOCAB], Sampler(GREEDY, VOCAB), GenerationStats(), max_tokens=1, end_ids=()
            )
        )
    assert loop.backend.steps == []
    assert loop.run([1], max_tokens=1) == ([2], "length")


@settings(deadline=None)
@given(num_prompt=st.integers(1, 30), chunk=st.integers(1, 12))
def test_a_prompt_is_cut_into_as_few_chunks_as_possible(
    table: EmbeddingTable, num_prompt: int, chunk: int
):
    loop = Loop(table, max_step_tokens=chunk)
    loop.run([0] * num_prompt, max_tokens=1)
    steps = loop.backend.steps
    assert len(steps) == -(-num_prompt // chunk)
    assert [first for first, _ in steps] == list(range(0, num_prompt, chunk))
    assert sum(length for _, length in steps) == num_prompt


@settings(max_examples=50, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=20), min_size=1, max_size=5),
    chunk=st.integers(1, 9),
)
def test_reuse_changes_nothing_but_the_work(
    table: EmbeddingTable, prompts: list[list[int]], chunk: int
):
    """Also where answers become part of the next prompt, as in a chat."""
    script = random_logits(VOCAB)
    reusing = Loop(table, script, max_step_tokens=chunk, capacity=40)
    fresh = Loop(table, script, max_step_tokens=5, capacity=40)
    before: list[int] = []
    answer: list[int] = []
    for prompt in prompts:
        for continued in (prompt, [*before, *answer, *prompt][:39]):
            rows = list(reusing.decoder.cursor.ids)
            answer, reason = reusing.run(continued, max_tokens=3, reuse=True)
            assert (answer, reason) == fresh.run(continued, max_tokens=3)
            shared = reusing.stats.cached_tokens
            assert continued[:shared] == rows[:shared]
            assert (
                shared == len(continued) - 1
                or shared == len(rows)
                or (continued[shared] != rows[shared])
            )
            assert fresh.stats.cached_tokens == 0
            before = continued


def test_a_conversation_prefills_only_what_is_new(table: EmbeddingTable):
    loop = Loop(table)
    answer, _ = loop.run([1, 2, 3], max_tokens=3)
    loop.backend.steps.clear()
    # The last token of an answer was sampled but never run, so it is not in the cache.
    loop.run([1, 2, 3, *answer, 9], max_tokens=1, reuse=True)
    assert loop.stats.cached_tokens == 5
    assert loop.backend.steps == [(5, 2)]


def test_stats_add_up(table: EmbeddingTable, monkeypatch: pytest.MonkeyPatch):
    """On a clock that only the backend and the caller move."""
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    loop = Loop(table, max_step_tokens=4)
    forward = loop.backend.forward

    def slow_forward(*args: Any) -> Any:
        now[0] += 0.25 * args[2].shape[1]  # a quarter of a second per token
        return forward(*args)

    monkeypatch.setattr(loop.backend, "forward", slow_forward)
    for token, _ in loop.start([1] * 6, max_tokens=4):
        assert token.logprob is None
        now[0] += 0.5  # the caller's own work
    stats = loop.stats
    assert (stats.prompt_tokens, stats.cached_tokens, stats.completion_tokens) == (6, 0, 4)
    assert stats.ttft_s == 1.5
    assert stats.itl_s == [0.75] * 3
    assert stats.total_s == stats.ttft_s + sum(stats.itl_s) == 3.75
    assert stats.model_s == 1.5 + 3 * 0.25
    assert stats.own_s == 1.5
    assert stats.tpot_s == 0.75
    assert stats.prefill_tps == 4.0
    assert stats.decode_tps == pytest.approx(1 / 0.75)
    plain = stats.as_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["total_s"] == 3.75


def test_stats_of_a_single_token_divide_by_nothing(table: EmbeddingTable):
    assert GenerationStats().as_dict()["prefill_tps"] == 0
    loop = Loop(table)
    loop.run([1], max_tokens=1)
    assert loop.stats.tpot_s == loop.stats.decode_tps == 0
    assert loop.stats.ttft_s == loop.stats.total_s > 0


@pytest.mark.parametrize("at", [0, 1, 3])
def test_after_a_failed_step_the_slot_starts_empty(table: EmbeddingTable, at: int):
    loop = Loop(table, max_step_tokens=2)
    loop.run([1, 2, 3], max_tokens=2)
    steps = loop.start([1, 2, 3, 4], max_tokens=5, reuse=True)
    for _ in range(at):
        next(steps)
    loop.backend.fails = True
    with pytest.raises(BackendError, match="told to"):
        next(steps)
    assert loop.decoder.cursor.ids == []
    assert loop.run([1, 2, 3, 4], max_tokens=2, reuse=True) == ([5, 6], "length")
    assert loop.stats.cached_tokens == 0


def test_after_logits_that_are_no_numbers_the_slot_starts_empty(table: EmbeddingTable):
    """Where logits are NaN, so may be the rows of the cache behind them."""
    loop = Loop(table)
    loop.run([1, 2, 3], max_tokens=1)
    loop.backend.script = lambda seen: np.full(VOCAB, np.nan, np.float32)
    with pytest.raises(BackendError, match="non-finite logits"):
        loop.run([1, 2, 3, 4], reuse=True)
    loop.backend.script = COUNT_UP
    assert loop.run([1, 2, 3, 4], max_tokens=1, reuse=True) == ([5], "length")
    assert loop.stats.cached_tokens == 0


def test_a_generation_that_is_dropped_half_way_leaves_true_books(table: EmbeddingTable):
    loop = Loop(table)
    steps = loop.start([1, 2, 3])
    assert [next(steps)[0].id for _ in range(3)] == [4, 5, 6]
    steps.close()  # type: ignore[attr-defined]
    assert loop.decoder.cursor.ids == [1, 2, 3, 4, 5]
    assert loop.run([1, 2, 3, 4, 5, 6], max_tokens=1, reuse=True) == ([7], "length")
    assert loop.stats.cached_tokens == 5


@settings(max_examples=40, deadline=None)
@given(ids=st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=40), chunk=st.integers(1, 70))
def test_scores_are_log_softmax_whatever_the_chunks(
    table: EmbeddingTable, ids: list[int], chunk: int
):
    script = random_logits(VOCAB)
    loop = Loop(table, script, max_step_tokens=chunk)
    scores = loop.decoder.score(ids)
    assert scores.dtype == np.float64
    expected = []
    for end in range(1, len(ids)):
        logits = np.asarray(script(tuple(ids[:end])), dtype=np.float64)
        expected.append(logits[ids[end]] - np.log(np.exp(logits).sum()))
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert loop.decoder.cursor.ids == ids[:-1]


def test_scores_of_large_logits_do_not_overflow(table: EmbeddingTable):
    def script(seen: tuple[int, ...]) -> Any:
        logits = np.full(VOCAB, -3e4, np.float32)
        logits[[1, 2]] = 3e4
        return logits

    scores = Loop(table, script).decoder.score([0, 1, 3])
    np.testing.assert_allclose(scores, [-np.log(2), -6e4 - np.log(2)])


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        ([], RequestError),
        ([1], RequestError),
        ([1, VOCAB], RequestError),
        ([1, -1], RequestError),
        ([1, -1, 1], RequestError),
        ([1] * 12, ContextLengthError),
    ],
)
def test_what_cannot_be_scored(table: EmbeddingTable, ids: list[int], error: type[Exception]):
    """The last token is only looked up in the logits, where -1 would be another token."""
    loop = Loop(table, capacity=10)
    with pytest.raises(error):
        loop.decoder.score(ids)
    assert loop.backend.steps == []


def test_as_many_tokens_as_the_cache_holds_can_be_scored(table: EmbeddingTable):
    loop = Loop(table, random_logits(VOCAB), capacity=10)
    assert loop.decoder.score([1] * 10).shape == (9,)
