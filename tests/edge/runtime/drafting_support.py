"""What tests of models and heads that draft share: a core with its own clock, and real answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge import LLM, SamplingParams
from edge.backends import Step
from edge.bundle.manifest import SamplingDefaults
from edge.runtime.scheduler import Request
from edge.runtime.scheduler.core import EngineCore
from edge.runtime.scheduler.sequence import SequenceState
from edge.runtime.structured_output import OutputFormat
from tests.edge.runtime.conftest import VOCAB
from tests.edge.runtime.scheduler.conftest import Collected, Engine
from tests.standins.scripted_backend import random_logits

TARGET = random_logits(VOCAB)
Seconds = Callable[[Step], float]


def unrelated(seen: tuple[int, ...]) -> NDArray[np.float32]:
    """A model that agrees by chance alone."""
    return np.asarray(TARGET((99, *seen)), np.float32)


class NoneTwice:
    """Forbids the last two tokens; wrong as soon as it sees a token that was not sampled."""

    def __init__(self, vocab_size: int = VOCAB) -> None:
        self._vocab_size = vocab_size
        self._last: list[int] = []

    def mask(self) -> NDArray[np.float32]:
        mask = np.zeros(self._vocab_size, np.float32)
        mask[self._last[-2:]] = -np.inf
        return mask

    def accept(self, token_id: int) -> None:
        assert token_id not in self._last[-2:]
        self._last.append(token_id)


def made(**options: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 24, **options}).resolve(SamplingDefaults())


class TimedPair:
    """A core and what drafts for it, by a clock that only their steps move."""

    engine: Engine
    core: EngineCore
    now = 0.0

    def charge(self, backend: Any, seconds: Seconds) -> None:
        forward = backend.forward

        def timed(step: Step) -> Any:
            self.now += seconds(step)
            return forward(step)

        setattr(backend, "forward", timed)  # noqa: B010

    def submit(
        self, prompt: Sequence[int], params: SamplingParams, **given: Any
    ) -> tuple[SequenceState, Collected]:
        given.setdefault("end_ids", frozenset())
        return self.engine.submit(Request(ids=tuple(prompt), params=params, **given))

    def answers(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, **given: Any
    ) -> list[Any]:
        make = given.pop("make_constraint", None)
        sinks = [
            self.submit(p, replace(params, seed=i), constraint=make() if make else None, **given)[1]
            for i, p in enumerate(prompts)
        ]
        while not self.core.is_idle:
            self.core.step()
            self.check_books()
        return [(sink.ids, sink.last) for sink in sinks]

    def check_books(self) -> None:
        self.engine.check_books()


def real_answers(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[list[Any], Any]:
    """Greedy, seeded, penalties, a grammar, stop strings, budgets, n of one prompt, all at once."""
    pytest.importorskip("llguidance")
    chat = [{"role": "user", "content": "what"}]
    form = OutputFormat("regex", "[0-9]{3,20}x")
    seeded = SamplingParams(temperature=1.0, top_p=0.95, seed=3, max_tokens=30)
    jobs: list[tuple[Any, SamplingParams, dict[str, Any]]] = [
        ("hello world", SamplingParams(temperature=0, max_tokens=40), {}),
        ("hello there", seeded, {"n": 3}),
        ("what is", replace(seeded, repetition_penalty=1.3, presence_penalty=0.5), {}),
        ("a number:", replace(seeded, seed=8), {"output": form}),
        ("hello", replace(seeded, stop=("e", "xyz"), seed=9, temperature=2.0), {}),
        (chat, replace(seeded, max_tokens=20), {"thinking_budget": 6}),
        ("to the end", SamplingParams(temperature=0.7, seed=1, ignore_eos=True), {}),
    ]
    # What is tiny or random drafts at a loss, which is what is tried here.
    monkeypatch.setattr("edge.runtime.scheduler.drafting._SAVED_STEPS", 1e12)
    with LLM(bundle, num_threads=1, num_slots=3, **options) as llm:
        if (drafting := llm.scheduler._core.drafting) is not None:
            drafting.trial_s = 1e9
        queued = [g for p, params, more in jobs for g in llm.submit(p, params, **{"n": 1, **more})]
        results = [generation.result() for generation in queued]
        return [(r.tokens, r.text, r.finish_reason) for r in results], llm.scheduler.stats()
