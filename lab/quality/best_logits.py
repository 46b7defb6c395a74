"""Draw tokens from whole rows of logits and from the best of them, and compare each token.

    python3 -m lab best-logits --rows 100000
    python3 -m lab best-logits --bundle BUNDLE "Write a story." "What is 12 * 13?"

The first form makes random rows, masks, parameters and seeds: peaked and flat rows, ties at the
border of the known logits, holes, extremes. The exit status is 1 if a token differs. The second
runs prompts through a bundle, and prints how often its rows had to be fetched and the processor
time per token both ways.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge.backends.best import BestLogits
from edge.bundle.io_spec import sum_error
from edge.bundle.manifest import SamplingDefaults, read_manifest
from edge.runtime.sampling import Sampler
from edge.runtime.sampling_params import SamplingParams
from edge.runtime.sampling_reference import Logits

PLACES = 4  # rows per answer


class Case(NamedTuple):
    """Rows of one answer, and how its tokens are chosen."""

    kind: str
    params: SamplingParams
    prompt: list[int]
    rows: list[Logits]
    masks: list[Logits | None]
    keep: int


def best_of(
    row: Logits, keep: int, fetch: Callable[[], Logits], rng: np.random.Generator | None = None
) -> BestLogits:
    """Return what an engine would hand out of a row of fp16 logits.

    Args:
        row: float32 ``[vocab]``.
        keep: most logits to hand out.
        fetch: fetches the row.
        rng: shuffles which of equal logits are kept, and in which order. It also changes the
            masses as an engine may: by logits not yet rounded to fp16, and by the rounding of its
            sums. None follows the ONNX specification.
    """
    keep = min(keep, row.size)
    first = np.arange(row.size) if rng is None else rng.permutation(row.size)
    order = first[np.argsort(-row[first], kind="stable")[:keep]]
    exact = row.astype(np.float64)
    off = 0.0
    if rng is not None:
        with np.errstate(invalid="ignore"):
            exact *= 1 + rng.uniform(-(2.0**-11), 2.0**-11, row.size)
        off = rng.uniform(-1, 1) * sum_error(row.size)
    with np.errstate(invalid="ignore", over="ignore"):
        masses = np.exp(exact - exact[order[0]])
        rest = float(masses.sum() - masses[order].sum() + off * masses.sum())
    return BestLogits(row[order], order.astype(np.int32), rest, row.size, "fp16", fetch)


def _row(kind: str, size: int, rng: np.random.Generator) -> Logits:
    row = rng.standard_normal(size) * rng.uniform(0.5, 6)
    if kind == "peaked":
        # As in real models: the n-th best is about log(n) below the best.
        row = -rng.uniform(1.2, 4) * np.log(1.0 + rng.permutation(size)) + rng.uniform(-20, 20)
    elif kind == "ties":
        row = rng.choice([-200.0, -30.0, -1.0, -0.5, 0.0, 0.5, 1.0], size)
    elif kind == "border":
        # As many equal ones as there is room for, a few more or a few less, and a flat rest.
        row = np.full(size, -8.0)
        row[rng.permutation(size)[: int(rng.integers(1, 300))]] = rng.choice([-7.9, 0.0])
    elif kind == "flat":
        row = np.full(size, rng.choice([-3.0, 0.0, 60000.0]))
    elif kind == "one-hot":
        row = np.full(size, -np.inf)
        row[rng.integers(size)] = rng.choice([-65504.0, 0.0, 65504.0])
    elif kind == "holes":
        row[rng.random(size) < 0.9] = -np.inf
        row[rng.integers(size)] = 1.0
    elif kind == "extremes":
        row = rng.choice([-65504.0, 65504.0, 0.0, 6.0e-8], size)
    row = row.astype(np.float16)
    return row.astype(np.float32)


KINDS = ("normal", "peaked", "peaked", "ties", "border", "flat", "one-hot", "holes", "extremes")


def cases(seed: int) -> Iterator[Case]:
    """Yield random answers without end."""
    rng = np.random.default_rng(seed)
    while True:
        kind = KINDS[rng.integers(len(KINDS))]
        size = int(rng.choice([1, 2, 40, 257, 700, 4000, 20_000]))

        def maybe(chance: float, value: Any, other: Any) -> Any:
            return value if rng.random() < chance else other

        raises = rng.random() < 0.1
        low = -1.5 if raises else 0.0
        ids = rng.integers(size, size=3)
        params = SamplingParams(
            temperature=float(rng.choice([0, 1e-4, 0.1, 0.6, 0.6, 1, 1, 1.5, 10])),
            top_k=int(maybe(0.3, rng.integers(1, 300), 0)),
            top_p=float(maybe(0.7, rng.choice([0.1, 0.5, 0.9, 0.95, 0.95, rng.random()]), 1)),
            min_p=float(maybe(0.3, rng.choice([0.02, 0.1, 1.0, rng.random()]), 0)),
            repetition_penalty=float(maybe(0.2, rng.uniform(0.5 if raises else 1, 2), 1)),
            presence_penalty=float(maybe(0.2, rng.uniform(low, 2), 0)),
            frequency_penalty=float(maybe(0.2, rng.uniform(low, 2), 0)),
            logit_bias={int(i): float(rng.uniform(-9, 9)) for i in ids} if raises else {},
            seed=int(rng.integers(1 << 40)),
            logprobs=maybe(0.02, 2, None),
        ).resolve(SamplingDefaults())
        rows = [_row(kind, size, rng) for _ in range(PLACES)]
        masks: list[Logits | None] = []
        for row in rows:
            share = maybe(0.2, rng.choice([0.02, 0.5, 0.98]), None)
            if share is None:
                masks.append(None)
                continue
            allowed = rng.random(size) < share
            allowed[rng.choice(np.flatnonzero(row > -np.inf))] = True
            masks.append(np.where(allowed, 0, -np.inf).astype(np.float32))
        prompt = rng.integers(size, size=int(rng.integers(0, 30))).tolist()
        yield Case(kind, params, prompt, rows, masks, int(rng.choice([1, 8, 64, 256])))


class Comparison(NamedTuple):
    """Rows drawn from, rows that were fetched, and differences."""

    rows: Counter[str]
    fetched: Counter[str]
    differences: list[str]


def compare(num_rows: int, seed: int) -> Comparison:
    """Draw from random rows both ways."""
    rng = np.random.default_rng(seed + 1)
    found = Comparison(Counter(), Counter(), [])
    for case in cases(seed):
        if found.rows.total() >= num_rows:
            return found
        size = case.rows[0].size
        whole, part = (Sampler(case.params, size, case.prompt) for _ in range(2))
        for place, (row, mask) in enumerate(zip(case.rows, case.masks, strict=True)):

            def fetch(row: Logits = row, kind: str = case.kind) -> Logits:
                found.fetched[kind] += 1
                return row

            expected = whole.sample(row, mask)
            token = part.sample(best_of(row, case.keep, fetch, rng), mask)
            found.rows[case.kind] += 1
            if token != expected:
                found.differences.append(
                    f"{case.kind} row of {size}, place {place}, {case.keep} kept: {token} is not "
                    f"{expected} with {case.params}"
                )
    raise AssertionError("there is always another case")


class Timing(NamedTuple):
    """Tokens of a model, rows that were fetched, and milliseconds of processor time per token."""

    tokens: int
    fetched: int
    row_ms: float
    best_ms: float


def time_rows(
    rows: list[NDArray[np.float16]], params: SamplingParams, keep: int, repeat: int
) -> Timing:
    """Draw from rows both ways, widening the whole ones as a runner of engines does."""
    from edge.backends.tensorrt.step_buffers import widen_fp16

    size, count, fetched = rows[0].size, len(rows) * repeat, [0]
    target = np.empty(size, np.float32)

    def widened(row: NDArray[np.float16]) -> Logits:
        widen_fp16(row.view(np.uint16), target)
        return target

    def fetch(row: NDArray[np.float16]) -> Callable[[], Logits]:
        def fetch_it() -> Logits:
            fetched[0] += 1
            return widened(row)

        return fetch_it

    best = [best_of(row.astype(np.float32), keep, fetch(row)) for row in rows]
    whole, part = (Sampler(params, size) for _ in range(2))
    started = time.process_time()
    expected = [whole.sample(widened(row)).id for _ in range(repeat) for row in rows]
    middle = time.process_time()
    found = [part.sample(each).id for _ in range(repeat) for each in best]
    ended = time.process_time()
    if found != expected:
        raise SystemExit("a token differs")
    row_ms, best_ms = 1e3 * (middle - started) / count, 1e3 * (ended - middle) / count
    return Timing(count, fetched[0], row_ms, best_ms)


def rows_of(bundle: Path, prompts: list[str], num_tokens: int) -> list[NDArray[np.float16]]:
    """Return the rows of logits of a model's answers at temperature 0.6 and top-p 0.95."""
    from edge.backends.ort.cpu import OrtBackend
    from edge.backends.step import prefill
    from edge.bundle.embeddings import EmbeddingTable
    from edge.bundle.io_spec import EMBEDDINGS_NAME
    from edge_make.read_tokenizer import read_tokenizer

    manifest = read_manifest(bundle)
    tokenizer = read_tokenizer(bundle / "tokenizer.json", manifest.tokens)
    table = EmbeddingTable(bundle / EMBEDDINGS_NAME)
    backend = OrtBackend(bundle, manifest)
    params = SamplingParams(temperature=0.6, top_p=0.95, seed=1).resolve(manifest.sampling)
    rows = []
    for prompt in prompts:
        ids, past = tokenizer.encode(prompt), 0
        sampler = Sampler(params, manifest.model.vocab_size, ids)
        for _ in range(num_tokens):
            *_, (_, logits) = prefill(backend, table, ids, past=past)
            past += len(ids)
            rows.append(logits[0].astype(np.float16))
            ids = [sampler.sample(logits[0]).id]
    return rows


def main() -> None:
    """Run as the module's docstring says."""
    parser = argparse.ArgumentParser(
        "python3 -m lab best-logits", description=__doc__.splitlines()[0]
    )
    parser.add_argument("prompts", nargs="*", help="with --bundle: what its model is asked")
    parser.add_argument("--rows", type=int, default=100_000, help="random rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--tokens", type=int, default=100, help="of each answer")
    parser.add_argument("--keep", type=int, default=256, help="logits that the engine hands out")
    args = parser.parse_args()
    if args.bundle is not None:
        rows = rows_of(args.bundle, args.prompts or ["Write a short story."], args.tokens)
        for temperature, top_p in ((0.0, 1.0), (0.6, 0.95), (1.0, 0.95), (1.0, 1.0)):
            params = SamplingParams(temperature=temperature, top_p=top_p, top_k=0, seed=1)
            timing = time_rows(rows, params.resolve(SamplingDefaults()), args.keep, 20)
            print(
                f"temperature {temperature}, top-p {top_p}: {timing.fetched / timing.tokens:.1%} "
                f"of {timing.tokens} rows fetched; processor time of a token {timing.row_ms:.3f} "
                f"ms from the row, {timing.best_ms:.3f} ms from the best"
            )
        return
    found = compare(args.rows, args.seed)
    for kind, count in sorted(found.rows.items()):
        print(f"{kind}: {count} rows, {found.fetched[kind] / count:.1%} fetched")
    print(*found.differences[:20], sep="\n")
    print(f"{found.rows.total()} tokens, {len(found.differences)} differ")
    sys.exit(bool(found.differences))


if __name__ == "__main__":
    main()
