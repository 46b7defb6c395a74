"""Measures ways to answer by right answers per cost: once, stopped when sure, by a vote, or both.

The cost is the wall time, the energy where the module's rails can be read, and steps of the engine.
A step of n rows counts 1 + 0.1 (n - 1).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.engine_config import EngineConfig
from edge.errors import ConfigError
from edge.runtime.llm import LLM
from edge.runtime.sampling_params import SamplingParams
from edge.runtime.scheduler.request import SchedulerStats
from edge.runtime.stream import join_chunks
from edge.votes.numbers import find_number, parse_number
from edge.votes.tally import VoteRule
from edge_lab.planner.devices import identify
from edge_lab.telemetry import EnergyMeter, read_snapshot
from edge_make.progress import Progress, prefixed, silent

from .evaluate import read_text
from .tasks import _NEXT_QUESTION, NumberItem, _prompt, _question, check_item, read_task

_ROW = 0.1  # cost of a further row in a step, as a share of the step
_RESAMPLES = 4000


@dataclass(frozen=True)
class Run:
    """How questions are asked.

    Attributes:
        bundle: the bundle that answers.
        engine: how it is opened.
        params: how every sample is drawn.
        confidence: confidence at which a thought is stopped.
        rule: rule of the votes.
    """

    bundle: Path
    engine: EngineConfig
    params: SamplingParams
    confidence: float
    rule: VoteRule


def measure_ways(
    run: Run,
    task_file: Path,
    ways: Sequence[str],
    limit: int | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Answer the questions of a file in each way, one after the other.

    Args:
        run: how they are asked.
        task_file: JSONL of questions with numbers, a layout of `edge_lab.measure.tasks`.
        ways: names in `WAYS`, ``one`` among them.
        limit: most questions to ask.
        progress: called with the steps ``WAY: answer``.

    Returns:
        ``device`` and ``power_mode`` of an Orin, ``energy`` (``rails`` or None), and in ``ways``
        the result of `summarize_way` for each.

    Raises:
        ConfigError: the questions have no numbers, or one does not fit into the KV cache.
        EdgeError: the bundle cannot be opened, or an engine failed.
    """
    items = read_task(task_file, limit)
    numbers = [(line, item) for line, item in items if isinstance(item, NumberItem)]
    if not numbers:
        raise ConfigError(f"--ways compares answers that are numbers, and {task_file} has others")
    rows: dict[str, NDArray[np.float64]] = {}
    joules: dict[str, float | None] = {}
    # One slot more than a vote takes, for a trial. All ways have the same engine, opened anew.
    engine = run.engine.with_options(num_slots=run.rule.most + 1)
    for way in ways:
        with LLM(run.bundle, engine) as llm:
            for line, item in numbers:
                check_item(llm, item, f"{task_file}, line {line}")
            told = prefixed(progress, f"{way}: ")
            told("answer", 0, len(numbers), "questions")
            found = []
            with EnergyMeter() as meter:
                for done, (_, item) in enumerate(numbers, 1):
                    found.append(_answer(llm, item, run, way))
                    told("answer", done, len(numbers), "questions")
            rows[way], joules[way] = np.array(found, np.float64), meter.joules
    here = read_snapshot()
    module = identify(here.module, here.memory_total_bytes)
    return {
        "bundle": str(run.bundle),
        "device": None if module is None else module.name,
        "power_mode": here.power_mode,
        "task": {
            "name": task_file.name,
            "sha256": hashlib.sha256(read_text(task_file).encode()).hexdigest(),
        },
        "temperature": run.params.temperature,
        "stop_when_sure": run.confidence,
        "vote": run.rule.most,
        "energy": None if None in joules.values() else "rails",
        "ways": [
            {"way": way, **summarize_way(rows[way], rows["one"], joules[way], run.params.seed or 0)}
            for way in ways
        ],
    }


def _answer(llm: LLM, item: NumberItem, run: Run, way: str) -> tuple[float, float, float, float]:
    """Ask a question; return whether it was right, tokens, weighed steps and seconds."""
    options: dict[str, Any] = {}
    if way in ("stop", "both"):
        options["stop_when_sure"] = run.confidence
    if way in ("vote", "both"):
        options["vote"] = run.rule
    params = run.params
    if llm.template is None:
        params = replace(params, stop=(*params.stop, _NEXT_QUESTION))
    before = llm.call(llm.scheduler.stats)
    began_s = time.monotonic()
    chunks = list(llm.stream(_prompt(llm, _question(item)), params, **options))
    spent_s = time.monotonic() - began_s
    # The call waits for trials that still run.
    steps = weighed_steps(before, llm.call(llm.scheduler.stats))
    vote, result = chunks[-1].vote, join_chunks(iter(chunks))
    answer = find_number(result.text) if vote is None else vote.answer
    right = answer is not None and parse_number(answer) == parse_number(item.expected)
    return float(right), result.stats.completion_tokens, steps, spent_s


def weighed_steps(before: SchedulerStats, after: SchedulerStats) -> float:
    """Weigh the steps between two states of an idle engine: 1 + 0.1 (n - 1) for one of n rows."""
    steps = after.steps - before.steps
    # The last token of a sequence is sampled, but never run.
    rows = _rows(after) - _rows(before)
    return (1 - _ROW) * steps + _ROW * rows


def _rows(stats: SchedulerStats) -> int:
    run = stats.prompt_tokens - stats.cached_tokens + stats.completion_tokens
    return run - sum(stats.outcomes.values())


def summarize_way(
    rows: NDArray[np.float64], base: NDArray[np.float64], joules: float | None, seed: int = 0
) -> dict[str, Any]:
    """Sum up a way beside one answer, with 95 % bootstrap intervals over the same questions.

    Args:
        rows: ``[questions, 4]``: right, tokens, weighed steps, seconds.
        base: the same for one answer.
        joules: energy of all questions, if known.
        seed: seed of the bootstrap.

    Returns:
        Sums, ``right_per_minute``, ``right_per_1000_steps``, ``right_per_kj``; against one answer
        ``gain`` of accuracy, ``steps_ratio`` and ``seconds_ratio``, each with its interval.
    """
    right, tokens, steps, seconds = rows.sum(axis=0).tolist()
    chosen = np.random.default_rng(seed).integers(len(rows), size=(_RESAMPLES, len(rows)))
    drawn = _against(rows[chosen].mean(axis=1), base[chosen].mean(axis=1))
    against: dict[str, Any] = {}
    for name, value in _against(rows.mean(axis=0), base.mean(axis=0)).items():
        against[name] = float(value)
        against[f"{name}_interval"] = np.percentile(drawn[name], [2.5, 97.5]).tolist()
    return {
        "questions": len(rows),
        "correct": int(right),
        "accuracy": right / len(rows),
        "tokens": int(tokens),
        "steps": steps,
        "seconds": seconds,
        "joules": joules,
        "right_per_minute": 60 * right / seconds,
        "right_per_1000_steps": 1000 * right / steps,
        "right_per_kj": None if not joules else 1000 * right / joules,
        **against,
    }


def _against(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> dict[str, Any]:
    return {
        "gain": ours[..., 0] - theirs[..., 0],
        "steps_ratio": ours[..., 2] / theirs[..., 2],
        "seconds_ratio": ours[..., 3] / theirs[..., 3],
    }
