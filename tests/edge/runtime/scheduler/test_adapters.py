"""Sequences of different adapters side by side: each is answered as if it were alone."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.adapters.weights import AdapterWeights
from edge.backends import Step
from edge.bundle.embeddings import EmbeddingTable
from edge.runtime.scheduler.request import StoredPrefix
from tests.edge.runtime.conftest import VOCAB
from tests.edge.runtime.scheduler.conftest import GREEDY, Engine, answer_alone, make_request
from tests.standins.scripted_backend import Script, ScriptedBackend, random_logits
from tests.standins.slot_rows import by_name

SCRIPT = random_logits(10 * VOCAB)
ADAPTERS = [AdapterWeights(f"a{n}", f"{n:064x}", n, {}) for n in range(1, 4)]


class AdapterBackend(ScriptedBackend):
    """A backend whose rows and logits depend on the adapter that its slot had in the step."""

    adapter_rank = 4

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.adapters: list[AdapterWeights | None] = [None] * self.num_slots
        self.set_adapter = self._put

    def _put(self, slot: int, weights: AdapterWeights | None) -> None:
        self._be_free()
        self.adapters[slot] = weights

    def forward(self, step: Step) -> NDArray[np.float32]:
        plain = self._ids
        shift = {slot: VOCAB * number(self.adapters[slot]) for slot in step.slots}
        results = []
        for slot, embeds, place, wanted in zip(
            step.slots, step.embeds, step.positions, step.logits_indices, strict=True
        ):
            self._ids = {row: token + shift[slot] for row, token in plain.items()}
            one = Step([slot], embeds[None], place[None], int(place.max()) + 1, wanted[None])
            results.append(super().forward(one))
        self._ids = plain
        return np.concatenate(results)


def number(adapter: AdapterWeights | None) -> int:
    return 0 if adapter is None else adapter.rank


def under(adapter: AdapterWeights | None) -> Script:
    """What the model says where every row was written with this adapter."""

    def script(seen: tuple[int, ...]) -> Any:
        shifted = tuple(token + VOCAB * number(adapter) for token in seen)
        logits = SCRIPT(shifted)
        assert isinstance(logits, np.ndarray)
        return logits[:VOCAB]

    return script


def script(seen: tuple[int, ...]) -> Any:
    """The same of a cache, whose rows are shifted already."""
    logits = SCRIPT(seen)
    assert isinstance(logits, np.ndarray)
    return logits[:VOCAB]


class Stored:
    """A store of the rows of one prompt, which the model computed alone."""

    def __init__(self, ids: list[int]) -> None:
        self._ids = ids

    def lookup(self, ids: Any) -> StoredPrefix | None:
        count = len(self._ids)
        if list(ids[:count]) != self._ids:
            return None
        rows = by_name(np.array(self._ids, np.float32)[None, None, :, None])
        return StoredPrefix(count, lambda: rows)


def make_engine(table: EmbeddingTable, **options: Any) -> Engine:
    return Engine(table, script, backend_type=AdapterBackend, **options)


@pytest.mark.parametrize("seed", range(20))
def test_each_answer_is_the_one_that_its_adapter_gives_alone(table: EmbeddingTable, seed: int):
    """Prompts share beginnings, slots are few, answers are preempted and cancelled."""
    draw = random.Random(seed)
    store = Stored([1, 2, 3, 4]) if draw.random() < 0.5 else None
    engine = make_engine(table, num_slots=draw.choice([2, 3, 5]), prefix_store=store)
    running = []
    for index in range(24):
        prompt = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 9, 9], [7, 7]][draw.randrange(3)]
        params = replace(GREEDY, max_tokens=draw.randint(1, 12))
        adapter = draw.choice([None, None, *ADAPTERS])
        client = f"client {draw.randrange(4)}"
        request = make_request(prompt, params, adapter=adapter, client=client, priority=index % 2)
        running.append((request, *engine.submit(request)))
        for _ in range(draw.randrange(6)):
            engine.core.step()
        if draw.random() < 0.15:
            draw.choice(running)[1].cancelled = True
    engine.run()
    for request, sequence, sink in running:
        expected = answer_alone(under(request.adapter), request, engine.backend.capacity)
        if sequence.cancelled:
            assert sink.ids == expected[0][: len(sink.ids)]
        else:
            assert (sink.ids, sink.reason) == expected
    backend = engine.backend
    assert isinstance(backend, AdapterBackend)
    assert backend.adapters == [None] * backend.num_slots, "a slot keeps an adapter for who is next"


def test_an_answer_put_away_continues_with_its_adapter(table: EmbeddingTable):
    request = make_request([1, 2, 3], replace(GREEDY, max_tokens=10), adapter=ADAPTERS[1])
    expected = answer_alone(under(ADAPTERS[1]), request, 64)
    engine = make_engine(table)
    sequence, _ = engine.submit(request)
    for _ in range(5):
        engine.core.step()
    resume_from = engine.core.suspend(sequence)
    assert resume_from is not None
    assert 0 < len(resume_from.answer) < 10
    other = make_engine(table)
    answer, reason = other.answer(replace(request, resume_from=resume_from))
    assert ([*resume_from.answer, *answer], reason) == expected


def test_equal_prompts_share_rows_within_an_adapter_only(table: EmbeddingTable):
    engine = make_engine(table, num_slots=4)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8]
    params = replace(GREEDY, max_tokens=1)
    cached = []
    for adapter in (None, ADAPTERS[0], ADAPTERS[0], None, replace(ADAPTERS[0], digest="f" * 64)):
        sequence, _ = engine.submit(make_request(prompt, params, adapter=adapter))
        engine.run()
        cached.append(sequence.stats.cached_tokens)
    assert cached == [0, 0, 7, 7, 0]
