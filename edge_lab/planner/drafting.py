"""Predicts the gain of a draft model: memory of the pair, and tokens per second by acceptance.

A decode step that verifies k guesses is a step of k + 1 tokens per sequence that reads the cache
once::

    verify(k) = (weights / (bandwidth * WEIGHTS) + layers * LAYER)
                * (1 + BATCH * (batch * (k + 1) - 1)) + cache
    step(k)   = verify(k) + k * decode of the draft
    tokens(k) = 1 + a + a^2 + ... + a^k

for guesses that are right with probability a, given those before them. The best k is taken; 0 is
plain decode, since a policy that measures does not draft where that loses. A drafter that stops
when it is unsure costs less per step than this, and gives a little less.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edge.bundle import io_spec
from edge.bundle.weights import Linear

from .devices import PowerMode
from .memory import Deployment, ProcessMemory, plan_process_memory
from .models import PlannedModel
from .speed import Efficiency, Work, decode_s, verify_s, work_of

ACCEPTANCES = (0.6, 0.7, 0.8, 0.9)
MOST_GUESSES = 8
_STEPS = 1000  # steps of the search for the least acceptance that pays


@dataclass(frozen=True)
class DraftPlan:
    """A draft model planned beside a target.

    Attributes:
        name: name of the model.
        quant: name of its quantization.
        memory: its memory in a process of its own; `memory.plan_process_pair` adds the target's.
        work: bytes and operations of its steps.
    """

    name: str
    quant: str
    memory: ProcessMemory
    work: Work


@dataclass(frozen=True)
class DraftSpeed:
    """Speed with drafts at one context and acceptance.

    Attributes:
        context: tokens in the cache.
        acceptance: probability that a guess is right, given those before it.
        guesses: guesses per step that give the most tokens per second; 0 if none does.
        decode_tps: tokens per second of all sequences.
        gain: ``decode_tps`` over that of plain decode.
    """

    context: int
    acceptance: float
    guesses: int
    decode_tps: float
    gain: float


def plan_draft(
    model: PlannedModel, quant: str, linears: list[Linear], deployment: Deployment
) -> DraftPlan:
    """Plan a draft model with the target's slots and, as far as its positions go, capacity."""
    positions = (
        io_spec.rope_positions(model.spec)
        if model.manifest is None
        else model.manifest.rope_positions
    )
    own = Deployment(
        deployment.backend,
        deployment.batch,
        min(deployment.kv_capacity, positions),
        deployment.max_prefill,
        deployment.dialect if model.manifest is None else model.manifest.dialect,
        () if model.manifest is None else model.manifest.int8_layers,
    )
    memory = plan_process_memory(model.spec, linears, positions, own)
    return DraftPlan(model.name, quant, memory, work_of(model.spec, linears, memory.weights, own))


def draft_speed(
    target: Work,
    draft: Work,
    mode: PowerMode,
    efficiency: Efficiency,
    batch: int,
    context: int,
    acceptance: float,
) -> DraftSpeed:
    """Predict the speed of a pair with the best number of guesses."""
    guess_s = decode_s(draft, mode, efficiency, batch, context)
    rates = []
    for guesses in range(MOST_GUESSES + 1):
        tokens = batch * sum(acceptance**i for i in range(guesses + 1))
        step_s = verify_s(target, mode, efficiency, batch, guesses, context)
        rates.append(tokens / (step_s + guesses * guess_s))
    best = max(range(len(rates)), key=lambda guesses: rates[guesses])
    return DraftSpeed(context, acceptance, best, rates[best], rates[best] / rates[0])


def least_acceptance(predict: Callable[[float], DraftSpeed]) -> float | None:
    """Find the least acceptance at which drafts pay; None if they never do.

    Args:
        predict: function from an acceptance to the speed.
    """
    if predict(1.0).guesses == 0:
        return None
    low, high = 0, _STEPS
    while low < high:
        middle = (low + high) // 2
        if predict(middle / _STEPS).guesses:
            high = middle
        else:
            low = middle + 1
    return low / _STEPS
