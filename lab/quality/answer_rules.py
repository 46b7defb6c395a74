"""Compute from the pool of answers how each rule of stopping and voting does; decodes nothing.

usage: python3 -m lab answer-rules [POOL] [--size 0.5b|1.5b] [--orders N] [--json FILE]

POOL is a file that ``python3 -m lab answer-pool pack`` wrote. Every rule is compared with one
sampled answer on the same problems, by a bootstrap over problems. Steps are calls of the engine; a
step of n rows counts 1 + 0.1 (n - 1). The pool leads to these simplifications:

- A thought that is stopped gives the answer of its last trial, though some tokens come after that.
- A trial of more than six tokens is as probable as its first six.
- A sample that is stopped votes with the confidence of the whole one.
- All slots are free: no trial fails for want of one.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.errors import ConfigError
from edge.runtime.stop_when_sure import _ROW, _SHARE, TRIAL_TOKENS
from edge.votes.numbers import parse_number
from edge.votes.tally import Tally, VoteRule
from tools.command import run_main, say

from .answer_pool import PACKED, read_packed

SUFFIX_TOKENS = 8
"""Tokens of an answer's beginning, in Qwen2's tokenizer."""
FEWEST = 30
"""Fewest problems to judge a rule by: with fewer the bootstrap's intervals are too narrow."""
_RESAMPLES = 4000
_SAVED, _LOSS, _STEPS = 0.25, -0.04, 2.0  # the bars
_WEIGHTS: dict[str, Callable[[dict[str, Any]], float]] = {
    "confidence": lambda each: math.exp(each["logprob"]),
    "none": lambda _: 1.0,
    "margin": lambda each: float(each["margin"]),
    "weakest": lambda each: math.exp(each["weakest"]),
}


@dataclass(frozen=True)
class Stop:
    """Ends a thought once ``repeats`` trials in a row give one answer.

    Attributes:
        confidence: the least probability of each of these answers.
        repeats: number of trials.
    """

    confidence: float
    repeats: int


@dataclass(frozen=True)
class Vote:
    """Holds a vote like `VoteRule`; ``weights`` names how a vote is weighed."""

    first: int
    most: int
    error: float
    weights: str = "confidence"


@dataclass(frozen=True)
class Rule:
    """A way to answer: one sample, stopped, voted, or both."""

    stop: Stop | None = None
    vote: Vote | None = None

    @property
    def way(self) -> str:
        """``one``, ``stop``, ``vote`` or ``both``."""
        if self.stop is None:
            return "one" if self.vote is None else "vote"
        return "stop" if self.vote is None else "both"


@dataclass(frozen=True)
class Sample:
    """One answer under a rule of stopping.

    Attributes:
        answer: the number, written in one way; None if there is none.
        tokens: tokens of the answer, without those of trials.
        trial_rows: rows that its trials take beside it.
        weight: weight of its vote.
    """

    answer: str | None
    tokens: int
    trial_rows: int
    weight: float


@dataclass(frozen=True)
class Outcome:
    """Result of a problem; a mean if it was answered several times."""

    right: float
    tokens: float
    steps: float


# ------------------------------------------------------------------------------- one problem


def stopped(each: dict[str, Any], stop: Stop | None, weights: str = "confidence") -> Sample:
    """Return an answer of the pool as a rule of stopping would have left it."""
    weight = _WEIGHTS[weights](each)
    rows, last, repeats = 0, None, 0
    for trial in each["trials"] if stop is not None else ():
        trial_rows = SUFFIX_TOKENS + TRIAL_TOKENS
        if _ROW * (rows + trial_rows) > _SHARE * trial["at"]:
            continue
        rows += trial_rows
        assert stop is not None
        is_sure = trial["answer"] is not None and math.exp(sum(trial["logprobs"])) >= (
            stop.confidence
        )
        repeats = (repeats + 1 if trial["answer"] == last else 1) if is_sure else 0
        last = trial["answer"] if is_sure else None
        # The thought goes on while the trial runs; then the answer is begun, written and ended.
        ended_at = trial["at"] + trial["tokens"] + 1
        if repeats == stop.repeats and ended_at < each["tokens"]:
            tokens = ended_at + SUFFIX_TOKENS + trial["tokens"] + 1
            return Sample(_key(trial["answer"]), tokens, rows, weight)
    return Sample(_key(each["answer"]), each["tokens"], rows, weight)


def settled(each: dict[str, Any]) -> dict[str, Any]:
    """Cut an answer at the first trial that gives what it ends with, at no cost.

    No rule that stops at a trial and keeps all answers saves more: it would have to know the end.
    """
    final = _key(each["answer"])
    ends = [
        trial["at"] + trial["tokens"] + 1 + SUFFIX_TOKENS
        for trial in each["trials"]
        if final is not None and _key(trial["answer"]) == final
    ]
    return {**each, "tokens": min([each["tokens"], *ends]), "trials": []}


def voted(samples: Sequence[Sample], vote: Vote) -> tuple[str | None, int, float]:
    """Hold a vote of samples in their order; return answer, tokens, and weighed steps of decode."""
    rule = VoteRule(first=vote.first, most=vote.most, error=vote.error)
    tally, running, started = Tally(rule), dict[int, int](), 0
    tokens, steps = 0, 0.0

    def start(number: int) -> None:
        nonlocal started
        chosen = range(started, min(started + number, len(samples), rule.most))
        running.update((index, samples[index].tokens) for index in chosen)
        started = chosen.stop

    start(tally.missing(0))
    while running:
        index = min(running, key=lambda index: (running[index], index))
        passed = running[index]
        tokens += passed * len(running)
        steps += passed * _step(len(running))
        running = {other: left - passed for other, left in running.items() if other != index}
        steps += _ROW * samples[index].trial_rows
        tally.add(samples[index].answer, samples[index].weight)
        if tally.is_decided:
            # Cancelled samples have had their share of trials.
            steps += sum(
                _ROW * samples[other].trial_rows * (1 - left / samples[other].tokens)
                for other, left in running.items()
            )
            break
        start(tally.missing(len(running)))
    return tally.leader, tokens, steps


def outcome(item: dict[str, Any], rule: Rule, orders: int = 16) -> Outcome:
    """Compute a problem's result under a rule: a mean over its answers, or over orders."""
    weights = "confidence" if rule.vote is None else rule.vote.weights
    samples = [stopped(each, rule.stop, weights) for each in item["answers"]]
    expected, prompt_steps = _key(item["expected"]), _step(item["prompt_tokens"])
    if rule.vote is None:
        found = [
            (each.answer, each.tokens, each.tokens + _ROW * each.trial_rows) for each in samples
        ]
    else:
        found = []
        for order in range(orders):
            # The same orders for every rule.
            shuffled = random.Random(order).sample(samples, len(samples))
            found.append(voted(shuffled, rule.vote))
    right = np.mean([answer is not None and answer == expected for answer, _, _ in found])
    tokens = np.mean([tokens for _, tokens, _ in found])
    steps = np.mean([steps for _, _, steps in found])
    return Outcome(float(right), float(tokens), prompt_steps + float(steps))


def _step(rows: int) -> float:
    return 1 + _ROW * (rows - 1)


def _key(text: str | None) -> str | None:
    value = None if text is None else parse_number(text)
    return None if value is None else str(value)


# ------------------------------------------------------------------------------- all problems


def compare(
    outcomes: Sequence[Outcome], base: Sequence[Outcome], way: str, seed: int = 0
) -> dict[str, Any]:
    """Compare a rule with one answer on the same problems, with 95 % intervals.

    Returns:
        ``accuracy``, ``tokens``, ``steps`` and ``right_per_1000_steps``; ``gain`` (of accuracy),
        ``tokens_saved`` and ``steps_ratio`` against ``base``, each with its interval; and
        ``meets_bar``, None for few problems.
    """
    ours, theirs = (_array(each) for each in (outcomes, base))
    chosen = np.random.default_rng(seed).integers(len(ours), size=(_RESAMPLES, len(ours)))
    means = ours[chosen].mean(axis=1), theirs[chosen].mean(axis=1)
    figures = _figures(ours.mean(axis=0), theirs.mean(axis=0))
    for name, values in _figures(*means).items():
        figures[f"{name}_interval"] = np.percentile(values, [2.5, 97.5]).tolist()
    figures = {name: np.asarray(value).tolist() for name, value in figures.items()}
    right, tokens, steps = ours.mean(axis=0).tolist()
    return {
        "problems": len(ours),
        "accuracy": right,
        "tokens": tokens,
        "steps": steps,
        "right_per_1000_steps": 1000 * right / steps,
        **figures,
        "meets_bar": None if len(ours) < FEWEST else meets_bar(way, figures),
    }


def meets_bar(way: str, figures: dict[str, Any]) -> bool | None:
    """Return whether figures of `compare` meet the bar of a way; None for one answer."""
    low = figures["gain_interval"][0]
    steps = figures["steps_ratio"]
    if way == "stop":
        return bool(figures["tokens_saved"] >= _SAVED and low > _LOSS)
    if way == "vote":
        return bool(low > 0 and steps <= _STEPS)
    if way == "both":  # no worse in either, and clearly better in one
        is_clear = low > 0 or figures["steps_ratio_interval"][1] < 1
        return bool(figures["gain"] >= 0 and steps <= 1 and is_clear)
    return None


def _array(outcomes: Sequence[Outcome]) -> NDArray[np.float64]:
    return np.array([(each.right, each.tokens, each.steps) for each in outcomes])


def _figures(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> dict[str, Any]:
    return {
        "gain": ours[..., 0] - theirs[..., 0],
        "tokens_saved": 1 - ours[..., 1] / theirs[..., 1],
        "steps_ratio": ours[..., 2] / theirs[..., 2],
    }


def grid() -> Iterator[Rule]:
    """Yield all rules that are computed."""
    yield Rule()
    stops = [Stop(*each) for each in product((0.5, 0.7, 0.8, 0.9, 0.95, 0.99), (1, 2, 3))]
    yield from (Rule(stop=stop) for stop in stops)
    sizes = [(2, 4), (2, 8), (2, 6), (2, 16), (3, 8), (4, 4), (4, 8), (6, 6), (8, 8)]
    votes = [Vote(*size, error) for size in sizes for error in (0.05, 0.1, 0.15, 0.3)]
    yield from (Rule(vote=vote) for vote in votes)
    others = [weights for weights in _WEIGHTS if weights != "confidence"]
    yield from (Rule(vote=Vote(8, 8, 0.1, weights)) for weights in others)
    held = (Vote(2, 4, 0.15), Vote(4, 4, 0.1), Vote(8, 8, 0.1))
    joined = product((Stop(0.8, 2), Stop(0.9, 1), Stop(0.9, 2), Stop(0.95, 2)), held)
    yield from (Rule(*each) for each in joined)


def compute(
    items: Sequence[dict[str, Any]], rules: Sequence[Rule], orders: int = 16
) -> list[dict[str, Any]]:
    """Compute all rules on the problems of one model, after the greedy answer and `settled`.

    Raises:
        ConfigError: there is no problem.
    """
    if not items:
        raise ConfigError("the pool has no problem of this model; run: python3 -m lab answer-pool")
    base = [outcome(item, Rule()) for item in items]
    greedy = [outcome({**item, "answers": [item["greedy"]]}, Rule()) for item in items]
    known = [
        outcome({**item, "answers": [settled(each) for each in item["answers"]]}, Rule())
        for item in items
    ]
    rows: list[dict[str, Any]] = [
        {"way": "greedy", "rule": {}, **compare(greedy, base, "greedy")},
        {"way": "settled", "rule": {}, **compare(known, base, "settled")},
    ]
    for rule in rules:
        found = [outcome(item, rule, orders) for item in items]
        over_greedy = compare(found, greedy, rule.way)
        rows.append(
            {
                "way": rule.way,
                "rule": {name: each for name, each in asdict(rule).items() if each is not None},
                **compare(found, base, rule.way),
                "gain_over_greedy": over_greedy["gain"],
                "gain_over_greedy_interval": over_greedy["gain_interval"],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        "python3 -m lab answer-rules",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pool", type=Path, nargs="?", default=PACKED)
    parser.add_argument("--size", choices=["0.5b", "1.5b"], default="0.5b")
    parser.add_argument("--orders", type=int, default=16, help="of the samples of a vote")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    items = [item for item in read_packed(options.pool) if item["size"] == options.size]
    rows = compute(items, list(grid()), options.orders)
    say(f"{options.size}: {len(items)} problems")
    for row in rows:
        say(_line(row))
    if len(items) < FEWEST:
        say(f"no rule is judged: {FEWEST} problems are needed")
    if options.json is not None:
        options.json.write_text(json.dumps({"size": options.size, "rules": rows}, indent=1) + "\n")


def _line(row: dict[str, Any]) -> str:
    words = [f"{value}" for part in row["rule"].values() for value in part.values()]
    low, high = row["gain_interval"]
    mark = "bar met" if row["meets_bar"] else ""
    return (
        f"{row['way']:7} {' '.join(words):26} {row['accuracy']:6.1%} right "
        f"{100 * row['gain']:+6.1f} ({100 * low:+.1f} to {100 * high:+.1f}) points, "
        f"{row['tokens_saved']:6.1%} tokens saved, {row['steps_ratio']:.2f} x steps, "
        f"{row['right_per_1000_steps']:.2f} right per 1,000 steps  {mark}"
    ).rstrip()


if __name__ == "__main__":
    run_main(main)
