"""N-gram drafts: what is proposed, what it costs, and that answers stay what they were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge.bundle.embeddings import PICTURE_IDS, EmbeddingTable
from edge.bundle.io_spec import EMBEDDINGS_TENSOR
from edge.bundle.manifest import SamplingDefaults
from edge.engine_config import EngineConfig
from edge.errors import ConfigError
from edge.runtime.drafts import NgramDrafter, NgramIndex
from edge.runtime.sampling import Sampler
from edge.runtime.sampling_params import SamplingParams
from edge.runtime.scheduler.core import EngineCore
from edge.runtime.scheduler.drafter import DraftContext, Drafter
from edge.runtime.scheduler.request import Constraint, Request
from edge.runtime.scheduler.sequence import SequenceState
from tests.edge.runtime.drafting_support import NoneTwice
from tests.edge.runtime.sampling_definition import final_probabilities
from tests.edge.runtime.scheduler.conftest import Collected
from tests.standins.scripted_backend import Script, ScriptedBackend, random_logits

VOCAB = 12
_small_ids = st.lists(st.integers(0, 5), min_size=1, max_size=60)


def _by_search(ids: Sequence[int], longest: int, shortest: int, count: int) -> list[int]:
    """What is to be proposed, found by looking at every place."""
    for n in range(longest, shortest - 1, -1):
        for place in range(len(ids) - 1, n - 1, -1):
            if list(ids[place - n : place]) == list(ids[-n:]):
                text = list(ids)
                for _ in range(count):
                    text.append(text[place])
                    place += 1
                return text[len(ids) :]
    return []


@given(ids=_small_ids, cuts=st.lists(st.integers(1, 60)), limit=st.integers(0, 4))
def test_a_proposal_is_what_followed_the_last_place_of_the_longest_ngram(
    ids: list[int], cuts: list[int], limit: int
) -> None:
    drafter = NgramIndex(longest=3, shortest=1)
    for cut in sorted({*(cut for cut in cuts if cut < len(ids)), len(ids)}):
        # The index grows with the sequence, whatever the pieces.
        assert drafter.propose(ids[:cut], limit) == _by_search(ids[:cut], 3, 1, limit)


@given(
    period=st.lists(st.integers(0, 1000), min_size=1, max_size=9, unique=True),
    length=st.integers(1, 60),
)
def test_text_that_repeats_is_continued_rightly(period: list[int], length: int) -> None:
    text = period * 80
    draft = NgramIndex().propose(text[:length], 4)
    # From the second token of the second round on, the last two tokens stood there before.
    assert draft == (text[length : length + 4] if length >= len(period) + 2 else [])


@given(ids=_small_ids, limit=st.integers(0, 9))
def test_only_tokens_of_the_sequence_are_proposed_and_no_more_than_asked_for(
    ids: list[int], limit: int
) -> None:
    draft = NgramIndex().propose(ids, limit)
    assert len(draft) <= limit
    assert set(draft) <= set(ids)


def test_the_draft_grows_while_right_and_shrinks_when_wrong() -> None:
    drafter, ids = NgramIndex(), [1, 2, 3] * 20
    lengths: list[int] = []
    for right in (None, True, True, False, True):
        if right is not None:
            drafter.observe(lengths[-1], lengths[-1] if right else 2)
        lengths.append(len(drafter.propose(ids, 100)))
    assert lengths == [4, 8, 16, 3, 6]
    drafter.observe(0, 0)  # a draft that was not run says nothing
    assert len(drafter.propose(ids, 100)) == 6


def test_each_token_is_indexed_once() -> None:
    """The cost of a long sequence is that of its tokens, however often it is asked."""

    class Counted(list[int]):
        slices = 0

        def __getitem__(self, key: Any) -> Any:
            Counted.slices += 1
            return super().__getitem__(key)

    ids = Counted(np.random.RandomState(0).randint(0, 50, 400).tolist())
    drafter = NgramIndex()
    grown = Counted(ids[:1])
    Counted.slices = 0
    for token in ids[1:]:
        grown.append(token)
        drafter.propose(grown, 8)
    # Three n-grams entered, three looked up and one copy per token.
    assert Counted.slices <= 7 * len(ids)


@pytest.mark.parametrize(("longest", "shortest"), [(2, 3), (2, 0)])
def test_impossible_ngrams_are_refused(longest: int, shortest: int) -> None:
    with pytest.raises(ConfigError, match="1 <= shortest <= longest"):
        NgramIndex(longest, shortest)


# ---------------------------------------------------------------- exactness, through the scheduler


class _EagerDrafter(NgramDrafter):
    """Always has a draft, mostly a wrong one."""

    def offer(self, context: DraftContext) -> int:
        if not super().offer(context):
            self._found[context.slot] = context.ids[-1:] * min(context.limit, 2)
        return len(self._found[context.slot])


def _run(
    table: EmbeddingTable,
    script: Script,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    make_drafter: Callable[[], Drafter] | None,
    make_constraint: Callable[[], Constraint] | None = None,
) -> tuple[list[list[int]], EngineCore]:
    backend = ScriptedBackend(table, script, num_slots=len(prompts), capacity=64)
    clock = iter(range(1_000_000))  # every step takes the same time, so every draft pays
    core = EngineCore(
        backend,
        table,
        VOCAB,
        EngineConfig(speculative=8),
        drafter=None if make_drafter is None else make_drafter(),
        clock=lambda: float(next(clock)),
    )
    answers = [Collected() for _ in prompts]
    resolved = params.resolve(SamplingDefaults())
    for prompt, answer in zip(prompts, answers, strict=True):
        request = Request(
            ids=tuple(prompt),
            params=resolved,
            end_ids=frozenset(),
            constraint=make_constraint() if make_constraint is not None else None,
        )
        sampler = Sampler(resolved, VOCAB, prompt)
        core.add(SequenceState(request, sampler, answer, "", core.now()))
    while not core.is_idle:
        core.step()
    return [answer.ids for answer in answers], core


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddingTable]:
    library = pytest.importorskip("safetensors.numpy", reason="writes the file")
    path = tmp_path_factory.mktemp("table") / "embeddings.safetensors"
    rows = np.arange(VOCAB * 4, dtype=np.float16).reshape(VOCAB, 4)
    library.save_file({EMBEDDINGS_TENSOR: rows}, path)
    opened = EmbeddingTable(path)
    yield opened
    opened.close()


def _repeats(seen: tuple[int, ...]) -> NDArray[np.float32]:
    """Mostly goes on as five tokens before, sometimes not."""
    row = random_logits(VOCAB)(seen)
    assert isinstance(row, np.ndarray)
    row /= np.float32(3)
    row[seen[-5] if len(seen) >= 5 else 0] += 3
    return row


@pytest.mark.parametrize("make_drafter", [NgramDrafter, _EagerDrafter])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@given(
    prompts=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=12), min_size=1, max_size=3),
    seed=st.integers(0, 2**32),
    penalty=st.sampled_from([0.0, 0.5]),
    make_constraint=st.sampled_from([None, partial(NoneTwice, VOCAB)]),
)
@settings(max_examples=15, deadline=None)
def test_drafts_change_no_answer(
    table: EmbeddingTable,
    make_drafter: Callable[[], Drafter],
    temperature: float,
    prompts: list[list[int]],
    seed: int,
    penalty: float,
    make_constraint: Callable[[], Constraint] | None,
) -> None:
    """The same random numbers meet the same distributions: identical, greedy and sampled."""
    params = SamplingParams(
        temperature=temperature, seed=seed, max_tokens=30, presence_penalty=penalty
    )
    plain, _ = _run(table, _repeats, prompts, params, None, make_constraint)
    drafted, _ = _run(table, _repeats, prompts, params, make_drafter, make_constraint)
    assert drafted == plain


def test_text_that_repeats_takes_fewer_steps(table: EmbeddingTable) -> None:
    def script(seen: tuple[int, ...]) -> int:
        return (seen[-1] + 1) % 5

    params = SamplingParams(temperature=0.0, max_tokens=40)
    plain, plainly = _run(table, script, [[0, 1, 2]], params, None)
    drafted, speculated = _run(table, script, [[0, 1, 2]], params, NgramDrafter)
    assert drafted == plain
    assert speculated.times.steps <= plainly.times.steps / 2
    assert speculated.counts["accepted"] >= 20


@pytest.mark.slow
def test_the_distribution_of_sampled_answers_is_the_models_own(table: EmbeddingTable) -> None:
    """Chi-square of the fourth token over many seeds; most drafts of it are wrong."""
    prompt, num_runs = (1, 2, 3, 1, 2), 1500
    params = SamplingParams(temperature=1.0, max_tokens=4).resolve(SamplingDefaults())

    def next_token(seen: tuple[int, ...]) -> NDArray[np.float64]:
        return final_probabilities(_repeats(seen), params)

    beginnings: dict[tuple[int, ...], float] = {prompt: 1.0}
    for _ in range(3):
        beginnings = {
            (*seen, token): mass * p
            for seen, mass in beginnings.items()
            for token, p in enumerate(next_token(seen))
        }
    expected = sum(mass * next_token(seen) for seen, mass in beginnings.items()) * num_runs
    drawn: Counter[int] = Counter()
    totals: Counter[str] = Counter()
    for seed in range(num_runs):
        answers, core = _run(table, _repeats, [prompt], replace(params, seed=seed), _EagerDrafter)
        drawn[answers[0][3]] += 1
        totals += core.counts
    assert totals["drafted"] > num_runs / 2
    assert 0 < totals["accepted"] < totals["drafted"]
    counts = np.array([drawn[token] for token in range(VOCAB)])
    assert ((counts - expected) ** 2 / expected).sum() < 31.3  # 11 degrees of freedom, p = 0.001


def test_nobody_guesses_a_row_of_a_picture():
    row = PICTURE_IDS + 7
    assert NgramIndex().propose([1, 2, row, 3, 1, 2], 4) == []
    assert NgramIndex().propose([1, 2, 5, row, 1, 2], 4) == [5]
    assert NgramIndex().propose([1, 2, 5, 6, 1, 2], 3) == [5, 6, 1]
