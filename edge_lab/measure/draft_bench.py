"""Benchmarks drafts: answers with and without them in turns, on one engine.

Drafts are right or wrong by the text, so random tokens tell nothing: a question each for code, chat
and prose is answered, greedily and at temperature 0.6, by the scheduler with its policy. Whatever
else the machine does slows both halves of a pair alike, so the ratio of each pair is what counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge.runtime.llm import LLM, Prompt
from edge.runtime.sampling_params import SamplingParams
from edge_make.progress import Progress, silent

from .bench import BenchConfig

TEXTS = {
    "code": "Write a Python function that merges two sorted lists, with types and a docstring.",
    "chat": "What should I think about before I adopt a cat?",
    "prose": "Write the opening of a short story about a lighthouse keeper.",
}
TEMPERATURES = (0.0, 0.6)


@dataclass(frozen=True)
class DraftPair:
    """One question, answered without and with drafts.

    Attributes:
        plain_tps, drafted_tps: tokens per second after the first ones, of all answers together.
        drafted, accepted: number of guessed tokens that were run, and of those that were right.
        steps: decode steps with guesses.
        saved_s: seconds saved, as `SchedulerStats.draft_saved_s` estimates them.
        same: whether both gave the same tokens.
    """

    plain_tps: float
    drafted_tps: float
    drafted: int
    accepted: int
    steps: int
    saved_s: float
    same: bool


def run_draft_bench(
    llm: LLM, config: BenchConfig, *, progress: Progress = silent
) -> list[dict[str, Any]]:
    """Answer each question ``config.repeats`` times with and without drafts.

    Args:
        llm: an LLM opened with drafts and ``config.batch`` slots, without reuse of prefixes.
        config: answers of a question at once, tokens of each, repeats, warm-ups and seed.
        progress: called for each pair.

    Returns:
        For each text and temperature the medians: ``plain_tps``, ``drafted_tps`` and their
        ``ratio``; the sums ``drafted``, ``accepted``, ``steps`` and ``saved_s``; ``acceptance``,
        None where nothing was drafted; and ``same``, the pairs whose tokens were equal.

    Raises:
        ContextLengthError: question and answer do not fit the cache.
        BackendError: an engine failed.
    """
    cases = [(text, temperature) for temperature in TEMPERATURES for text in TEXTS]
    total = len(cases) * (config.warmup + config.repeats)
    done = 0
    pairs: dict[tuple[str, float], list[DraftPair]] = {case: [] for case in cases}
    # Take the texts in turns: the policy meets a mixture, and a slow spell hits all pairs alike.
    for index in range(config.warmup + config.repeats):
        for case in cases:
            progress("drafts", done, total, "pairs")
            pair = _pair(llm, config, *case, index)
            if index >= config.warmup:
                pairs[case].append(pair)
            done += 1
    progress("drafts", total, total, "pairs")
    return [_summary(*case, found) for case, found in pairs.items()]


def _pair(llm: LLM, config: BenchConfig, text: str, temperature: float, index: int) -> DraftPair:
    params = SamplingParams(
        temperature=temperature,
        seed=config.seed + index * config.batch,
        max_tokens=config.output_tokens,
        ignore_eos=True,
    )
    question = TEXTS[text]
    prompt: Prompt = question if llm.template is None else [{"role": "user", "content": question}]
    order = (False, True) if index % 2 == 0 else (True, False)
    before = llm.scheduler.stats()
    found = dict(zip(order, _answers(llm, config, prompt, params, order), strict=True))
    after = llm.scheduler.stats()
    return DraftPair(
        plain_tps=found[False][0],
        drafted_tps=found[True][0],
        drafted=after.drafted_tokens - before.drafted_tokens,
        accepted=after.accepted_tokens - before.accepted_tokens,
        steps=after.draft_steps - before.draft_steps,
        saved_s=after.draft_saved_s - before.draft_saved_s,
        same=found[False][1] == found[True][1],
    )


def _answers(
    llm: LLM, config: BenchConfig, prompt: Prompt, params: SamplingParams, order: tuple[bool, ...]
) -> Iterator[tuple[float, list[list[int]]]]:
    """Answer once for each entry of ``order``; yield tokens per second, and the tokens."""
    for drafting in order:
        llm.scheduler.drafting = drafting
        generations = llm.submit(prompt, params, n=config.batch)
        results = [generation.result() for generation in generations]
        tokens = sum(result.stats.completion_tokens - 1 for result in results)
        began = min(result.stats.ttft_s for result in results)
        seconds = max(result.stats.total_s for result in results) - began
        yield tokens / seconds, [[token.id for token in result.tokens] for result in results]
    llm.scheduler.drafting = True


def _summary(text: str, temperature: float, pairs: list[DraftPair]) -> dict[str, Any]:
    drafted, accepted = sum(p.drafted for p in pairs), sum(p.accepted for p in pairs)
    ratios = [pair.drafted_tps / pair.plain_tps for pair in pairs]
    return {
        "text": text,
        "temperature": temperature,
        "plain_tps": float(np.median([pair.plain_tps for pair in pairs])),
        "drafted_tps": float(np.median([pair.drafted_tps for pair in pairs])),
        "ratio": float(np.median(ratios)),
        "ratios": ratios,
        "drafted": drafted,
        "accepted": accepted,
        "acceptance": accepted / drafted if drafted else None,
        "steps": sum(pair.steps for pair in pairs),
        "saved_s": sum(pair.saved_s for pair in pairs),
        "pairs": len(pairs),
        "same": sum(pair.same for pair in pairs),
    }
