"""What the tests of the scheduler share: answers by the plainest loop there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from edge.bundle.embeddings import EmbeddingTable
from edge.engine_config import EngineConfig
from edge.errors import BackendError, EdgeError
from edge.model.slot_rows import SlotRows
from edge.runtime.generation import GenerationStats, PromptProgress
from edge.runtime.sampling import SampledToken, Sampler
from edge.runtime.sampling_params import SamplingParams
from edge.runtime.scheduler import Request
from edge.runtime.scheduler.core import EngineCore
from edge.runtime.scheduler.drafting import Drafting
from edge.runtime.scheduler.request import FinishReason
from edge.runtime.scheduler.sequence import SequenceState
from tests.edge.runtime.conftest import VOCAB
from tests.standins.scripted_backend import Script, ScriptedBackend

END = 49
GREEDY = SamplingParams(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
SAMPLED = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.2)
COUNT_UP: Script = lambda seen: (seen[-1] + 1) % VOCAB  # noqa: E731


class Collected:
    """A sink that keeps what it is given, and checks that nothing comes after the end."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.last: FinishReason | EdgeError | None = None
        self.announced: FinishReason | None = None
        self.told: list[PromptProgress] = []

    def progress(self, progress: PromptProgress) -> None:
        assert not self.ids
        assert self.last is None
        self.told.append(progress)

    def push(self, token: SampledToken, reason: FinishReason | None) -> FinishReason | None:
        assert self.last is self.announced is None, f"{token} came after the end"
        self.ids.append(token.id)
        self.announced = reason
        return reason

    def finish(self, reason: FinishReason, stats: GenerationStats) -> None:
        assert self.last is None
        assert reason == (self.announced or "cancelled")
        self.last = reason

    def fail(self, error: EdgeError) -> None:
        assert self.last is None
        self.last = error

    @property
    def reason(self) -> str | None:
        return self.last if isinstance(self.last, str) else None


class DropMiddle:
    """An `Overflow` that keeps the first row and the newer half."""

    def slide(self, rows: SlotRows, ids: list[int]) -> tuple[SlotRows, list[int]]:
        kept = drop_middle(len(ids))
        return rows.each(lambda array: array[:, kept]), [ids[i] for i in kept]


def drop_middle(length: int) -> list[int]:
    return [0, *range(length // 2 + 1, length)]


def answer_alone(
    script: Script, request: Request, capacity: int, slides: bool = False, most: int = 10_000
) -> tuple[list[int], str]:
    """What a request must be answered with, whatever else runs: no cache, no batch, no drafts."""
    sampler = Sampler(request.params, VOCAB, request.ids)
    seen = list(request.ids)
    answer: list[int] = []
    while True:
        wanted = script(tuple(seen))
        if isinstance(wanted, np.ndarray):
            logits = wanted
        else:
            logits = np.zeros(VOCAB, np.float32)
            logits[wanted] = 100.0
        token = sampler.sample(logits).id
        answer.append(token)
        if token in request.end_ids:
            return answer, "stop"
        if len(answer) == request.params.max_tokens:
            return answer, "length"
        if len(seen) == capacity:
            if not slides:
                return answer, "length"
            seen = [seen[i] for i in drop_middle(capacity)]
        if len(answer) >= most:
            return answer, "length"
        seen.append(token)


def make_request(ids: Sequence[int], params: SamplingParams = GREEDY, **options: Any) -> Request:
    options.setdefault("end_ids", frozenset({END}))
    return Request(ids=tuple(ids), params=params, **options)


def take_config(options: dict[str, Any]) -> EngineConfig:
    """Move the engine's options out of a test's; `overflow` is the policy itself here."""
    names = {field.name for field in fields(EngineConfig)} - {"overflow"}
    return EngineConfig(**{name: options.pop(name) for name in names if name in options})


class Engine:
    """A core on a scripted backend, driven by hand."""

    def __init__(
        self,
        table: EmbeddingTable,
        script: Script = COUNT_UP,
        *,
        num_slots: int = 4,
        capacity: int = 64,
        max_step_tokens: int = 8,
        overlaps: bool = False,
        backend_type: Callable[..., ScriptedBackend] = ScriptedBackend,
        **options: Any,
    ) -> None:
        self.backend = backend_type(
            table,
            script,
            num_slots=num_slots,
            capacity=capacity,
            max_step_tokens=max_step_tokens,
            overlaps=overlaps,
        )
        # A real clock would let the machine's load decide what runs in which round.
        options.setdefault("clock", lambda: 0.0)
        config = take_config(options)
        self.overflow = options.get("overflow")
        self.core = EngineCore(self.backend, table, VOCAB, config, **options)

    def submit(
        self, request: Request, sink: Collected | None = None
    ) -> tuple[SequenceState, Collected]:
        sink = sink or Collected()
        sequence = self.core.sequence(request, sink, request.salt, self.core.now())
        self.core.add(sequence)
        return sequence, sink

    def run(self, most: int = 2000) -> None:
        """Step until nothing is left; a core that stalls fails here."""
        for _ in range(most):
            if self.core.is_idle:
                return
            self.core.step()
        raise AssertionError(f"still busy after {most} rounds")

    def answer(self, request: Request) -> tuple[list[int], str | None]:
        _, sink = self.submit(request)
        self.run()
        if isinstance(sink.last, EdgeError):
            raise sink.last
        return sink.ids, sink.reason

    def check_books(self) -> None:
        """Every slot holds what the books say, and running sequences have a slot each."""
        core, backend = self.core, self.backend
        owned = [sequence.slot for sequence in core.roster.running]
        assert len(set(map(id, owned))) == len(owned)
        for slot in core.roster.pool.slots:
            assert slot.in_use == any(slot is other for other in owned)
            assert slot.length <= backend.capacity
            assert backend.rows_of(slot.index, slot.length) == slot.ids
        for sequence in core.roster.running:
            own = sequence.slot
            assert own is not None
            assert sequence.pending
            if own.shareable:
                assert [*own.ids, *sequence.pending] == sequence.ids
            assert own.salt == sequence.salt
        if core.drafting is not None and core.drafting.failed is not None:
            # What a drafter asserts arrives there, too.
            assert "told to" in core.drafting.failed


def drafting_of(core: EngineCore) -> Drafting:
    assert core.drafting is not None
    return core.drafting


def failed_as_told(sink: Collected) -> bool:
    return isinstance(sink.last, BackendError) and "told to" in str(sink.last)
