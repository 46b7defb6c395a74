"""Measure what adapters at run time cost a decode step on the CPU.

usage: python3 -m lab adapter-cost PLAIN ADAPTED [--sequences 1 8] [--rounds 15] [--json FILE]

PLAIN and ADAPTED are one model, exported without and with ``--adapters``. Both are open in one
process on one thread, and steps take turns: the plain bundle, the other without an adapter (rank 0)
and with one for each sequence. It compares CPU time, which other work on the machine changes least,
and ratios of steps that followed each other. Sessions differ by where their memory is, so the ratio
of rank to rank 0 is taken within one. Prints medians with quartiles, then a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from edge.adapters.graph_inputs import adapted_linears
from edge.adapters.weights import AdapterWeights
from edge.backends.ort.cpu import OrtBackend
from edge.backends.step import step_after
from edge.bundle.manifest import read_manifest
from edge.model.spec import ModelSpec

PROMPT = 64
"""Tokens that each sequence has before the steps that are timed."""


def make_adapter(model: ModelSpec, rank: int, seed: int) -> AdapterWeights:
    """Make an adapter of small random numbers for all linears."""
    random = np.random.default_rng(seed)
    tensors = {}
    for layer in adapted_linears(model):
        inner = len(layer.rows) * rank
        a = 0.01 * random.standard_normal((inner, layer.shape[0]), np.float32)
        b, first = np.zeros((layer.shape[1], inner), np.float32), 0
        for part, rows in enumerate(layer.rows):
            own = b[first : first + rows, part * rank : (part + 1) * rank]
            own[...] = 0.01 * random.standard_normal(own.shape, np.float32)
            first += rows
        tensors[layer.name] = (a, b)
    return AdapterWeights(f"random {seed}", str(seed), rank, tensors)


class Sequences:
    """Sequences of random embeddings on a backend, which decode one more token at a time."""

    def __init__(self, backend: OrtBackend, hidden_size: int) -> None:
        self.backend = backend
        slots = range(backend.num_slots)
        self.embeds = np.random.default_rng(0).standard_normal(
            (len(slots), PROMPT, hidden_size), np.float32
        )
        for slot in slots:
            part = self.embeds[slot : slot + 1] * np.float32(0.02)
            backend.forward(step_after([slot], [0], part, np.array([[PROMPT - 1]])))

    def step_s(self, count: int) -> float:
        """Return the CPU time of a decode step of the first ``count`` sequences, in seconds."""
        slots, embeds = list(range(count)), self.embeds[:count, :1] * np.float32(0.02)
        step = step_after(slots, [PROMPT] * count, embeds, np.zeros((count, 1), np.int64))
        started = time.process_time()
        self.backend.forward(step)
        return time.process_time() - started


def summary(values: list[float]) -> dict[str, float]:
    """Return median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}


def measure(
    plain: Sequences, adapted: Sequences, adapters: list[Any], count: int, rounds: int
) -> dict[str, Any]:
    """Measure the ratios of steps of this many sequences."""
    times: dict[str, list[float]] = {"plain": [], "rank 0": [], "adapters": []}

    def give(active: bool) -> None:
        for slot in range(count):
            adapted.backend.set_adapter(slot, adapters[slot] if active else None)

    for _ in range(rounds):
        times["plain"].append(plain.step_s(count))
        give(active=False)
        adapted.step_s(count)  # binds the other rank, and meets memory that is not in the cache
        times["rank 0"].append(adapted.step_s(count))
        give(active=True)
        adapted.step_s(count)
        times["adapters"].append(adapted.step_s(count))
    pairs = [("rank 0 / plain", "rank 0", "plain"), ("adapters / rank 0", "adapters", "rank 0"),
             ("adapters / plain", "adapters", "plain")]  # fmt: skip
    return {
        "sequences": count,
        "step_ms": {name: round(1e3 * statistics.median(each), 2) for name, each in times.items()},
        **{
            name: summary([a / b for a, b in zip(times[over], times[under], strict=True)])
            for name, over, under in pairs
        },
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        "python3 -m lab adapter-cost", description=__doc__.splitlines()[0]
    )
    parser.add_argument("plain", type=Path)
    parser.add_argument("adapted", type=Path)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="append the line of JSON to this file")
    options = parser.parse_args()
    most = max(options.sequences)
    opened, manifest = [], read_manifest(options.adapted)
    for bundle in (options.plain, options.adapted):
        backend = OrtBackend(
            bundle,
            read_manifest(bundle),
            num_slots=most,
            num_threads=1,
            kv_capacity=256,
            max_step_tokens=PROMPT,
        )
        opened.append(Sequences(backend, manifest.model.hidden_size))
    plain, adapted = opened
    rank = adapted.backend.adapter_rank
    if plain.backend.adapter_rank or not rank:
        parser.error("PLAIN must be a bundle without --adapters, and ADAPTED one with it")
    adapters = [make_adapter(manifest.model, rank, seed) for seed in range(most)]
    started = time.process_time()
    for slot, adapter in enumerate(adapters):
        adapted.backend.set_adapter(slot, adapter)
    admit_s = (time.process_time() - started) / most
    found = {
        "model": manifest.name,
        "quantization": manifest.quantization.name,
        "rank": rank,
        "admit_ms": round(1e3 * admit_s, 1),
        "runs": [measure(plain, adapted, adapters, n, options.rounds) for n in options.sequences],
    }
    for run in found["runs"]:
        print(f"{run['sequences']} sequences: {run['step_ms']} ms", file=sys.stderr)
        for name in ("rank 0 / plain", "adapters / rank 0", "adapters / plain"):
            ratio = run[name]
            print(
                f"  {name}: {ratio['median']} ({ratio['low']} to {ratio['high']})", file=sys.stderr
            )
    line = json.dumps(found)
    print(line)
    if options.json:
        with options.json.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
