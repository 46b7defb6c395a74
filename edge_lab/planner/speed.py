"""Computes the ceiling of speed, and predicts the speed below it.

A decode step reads every weight and every row of the cache once. A prefill step reads the weights
too, and multiplies. At a module's bandwidth and at the peak of its tensor cores that takes a time
that no engine can undercut: the ceiling (`ceiling`). It is computed; nothing in it is fitted.

A prediction takes shares of these figures that engines were seen to reach::

    decode  = (weights / (bandwidth * WEIGHTS) + layers * LAYER) * (1 + BATCH * (batch - 1))
              + batch * context * kv_bytes / (bandwidth * CACHE)
    prefill = chunks * (weights / (bandwidth * WEIGHTS) + layers * LAYER)
              + operations / (peak * COMPUTE)

The five words in capital letters are `Efficiency`. The defaults are fitted to published figures of
Orin (`tests/edge_lab/planner/fit.py`); ``--calibrate`` measures two or three of them.

For a built engine (`EngineWork`) the unpacked weights, the cache rows that a step reads and the
launches are known; ``layers`` are then its launches over `LAUNCHES_PER_LAYER`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from edge.bundle.memory_facts import Part
from edge.bundle.profile_layers import AttentionKind
from edge.bundle.schemes import SCHEMES
from edge.bundle.weights import ORT_SCALE_COPIES, Linear
from edge.errors import ConfigError
from edge.model.spec import ModelSpec
from edge_make.unpacked_weights import linear_unpacked_bytes

from .devices import PowerMode
from .memory import Deployment

StepKind = Literal["decode", "prefill"]

# Assumed, since nobody published how many layers the fitted engines have. In NVIDIA's Edge-LLM (its
# plugins guide) attention, with RoPE and the cache's update, is a plugin, and so is a product with
# INT4 weights; seven are taken: q, k, v, o, gate, up, down. TensorRT merges no plugins, but makes
# one kernel of what is between two: the norm; q, k and v joined; the sum and the norm; SiLU and its
# product.
LAUNCHES_PER_LAYER = 12
"""Kernels of a decoder layer in the engines that `FITTED` is based on."""


@dataclass(frozen=True)
class Efficiency:
    """The shares of a module's figures that an engine reaches.

    Attributes:
        weights: share of the bandwidth while weights are read.
        layer_s: time of a decoder layer of `LAUNCHES_PER_LAYER` launches that is neither reading
            nor multiplying (launches, norms, RoPE).
        cache: share of the bandwidth while the cache is read.
        compute: share of the tensor cores' dense operations in prefill.
        batch: cost of each further sequence of a decode step, as a share of the first.
        source: where the numbers come from.
    """

    weights: float
    layer_s: float
    cache: float
    compute: float
    batch: float
    source: str

    @property
    def launch_s(self) -> float:
        """Time of one launch, a part of ``layer_s``."""
        return self.layer_s / LAUNCHES_PER_LAYER


# `fit.fit` computes weights, layer_s, compute and batch; a test checks that they agree. The
# cache's share is the slope of decode time over context that EdgeReasoning measured: 191 GB/s.
FITTED = Efficiency(
    weights=0.861,
    layer_s=80.7e-6,
    cache=0.933,
    compute=0.597,
    batch=0.093,
    source="fitted to published TensorRT figures of the AGX Orin 64 GB (docs/planner.md)",
)


@dataclass(frozen=True)
class EngineStep:
    """A step of an engine's profile, from the table of its layers.

    Attributes:
        launches: layers that the GPU runs.
        unpacked_weights: stored weights that are written as floats; two planes count as two.
        unpacked_bytes: bytes written and read for them on top of the packed weights.
        reformats: launches that only change a layout or a type.
        attention: kind of attention, as in `edge_make.engine_layers.ProfileLayers`.
    """

    launches: int
    unpacked_weights: int
    unpacked_bytes: int
    reformats: int
    attention: AttentionKind


@dataclass(frozen=True)
class EngineWork:
    """Steps of a built engine, from its own tables.

    Attributes:
        decode, prefill: the steps; None if its table has no layers of the profile.
        kv_buckets: numbers of cache rows that a decode step can read, ascending; empty if it reads
            as many as there are.
    """

    decode: EngineStep | None
    prefill: EngineStep | None
    kv_buckets: tuple[int, ...] = ()


@dataclass(frozen=True)
class Work:
    """Cost of one model in one quantization.

    Attributes:
        step_bytes: weights that a step reads, packed, with scales, norms and biases.
        num_layers: decoder layers.
        kv_bytes_per_token: cache bytes to read per token of context.
        linear_ops: operations of the layers' matrix products per token. On a GPU the two planes of
            an INT8 weight are two products.
        head_ops: operations of the lm_head per token that gets logits.
        attention_ops: operations of attention per pair of tokens.
        int8_share: share of ``linear_ops`` that runs in INT8.
        unpacked_bytes: further bytes that a step moves because weights are unpacked, by rule.
        engine: the built engine's own numbers, used in place of rules; None without one.
    """

    step_bytes: int
    num_layers: int
    kv_bytes_per_token: int
    linear_ops: int
    head_ops: int
    attention_ops: int
    int8_share: float
    unpacked_bytes: int = 0
    engine: EngineWork | None = None

    def engine_step(self, kind: StepKind) -> EngineStep | None:
        """Return such a step from the engine's table; None if there is none."""
        if self.engine is None:
            return None
        return self.engine.decode if kind == "decode" else self.engine.prefill

    def weights_bytes(self, kind: StepKind) -> int:
        """Return the bytes that a step moves for the weights, unpacked copies included."""
        step = self.engine_step(kind)
        return self.step_bytes + (self.unpacked_bytes if step is None else step.unpacked_bytes)

    def launched_layers(self, kind: StepKind) -> float:
        """Return how many decoder layers of `LAUNCHES_PER_LAYER` make up the step's launches."""
        step = self.engine_step(kind)
        return self.num_layers if step is None else step.launches / LAUNCHES_PER_LAYER

    def rows_read(self, rows: float) -> float:
        """Return how many cache rows a decode step reads for a sequence that has this many."""
        buckets = () if self.engine is None else self.engine.kv_buckets
        return next((bucket for bucket in buckets if bucket >= rows), rows)

    def read_bytes(self, batch: int, rows: float, kind: StepKind = "decode") -> float:
        """Return the bytes that a step moves: the weights once, and the cache rows that it reads.

        Args:
            batch: sequences.
            rows: cache rows that each of them has.
            kind: kind of the step.
        """
        rows = self.rows_read(rows) if kind == "decode" else rows
        return self.weights_bytes(kind) + batch * rows * self.kv_bytes_per_token


def work_of(
    model: ModelSpec,
    linears: Sequence[Linear],
    weights: Mapping[Part, int],
    deployment: Deployment,
) -> Work:
    """Count bytes and operations; ``weights`` are those in memory (`ProcessMemory.weights`)."""
    layer_ops = head_ops = int8_ops = 0
    on_cpu = deployment.backend == "ort-cpu"
    for linear in linears:
        # The CPU joins the planes when it loads them.
        products = 2 if linear.scheme.planes and not on_cpu else 1
        ops = products * 2 * linear.shape[0] * linear.shape[1]
        if linear.part == "lm_head":
            head_ops += ops
            continue
        layer_ops += ops
        int8_ops += ops if SCHEMES[linear.scheme.kind].int8_inputs else 0
    step_bytes = sum(size for part, size in weights.items() if part != "rope")
    if on_cpu:
        step_bytes -= weights["scales"] // ORT_SCALE_COPIES  # the one beside the packed weights
    return Work(
        step_bytes=step_bytes,
        num_layers=model.num_layers,
        kv_bytes_per_token=deployment.cache_token_bytes(model),
        linear_ops=layer_ops,
        head_ops=head_ops,
        attention_ops=4 * sum(part.heads * part.dim for part in model.attentions()),
        int8_share=int8_ops / layer_ops,
        unpacked_bytes=0 if on_cpu else sum(map(linear_unpacked_bytes, linears)),
    )


@dataclass(frozen=True)
class Ceiling:
    """The least time of a step, by a module's figures only.

    Attributes:
        read_bytes: bytes that the step moves.
        step_s: the longer of the times to move them and to multiply.
        tokens_per_s: tokens of all sequences per second.
        bound: which of the two times is longer.
    """

    read_bytes: int
    step_s: float
    tokens_per_s: float
    bound: Literal["bandwidth", "arithmetic"]


def ceiling(
    work: Work,
    mode: PowerMode,
    batch: int,
    tokens: int,
    rows: float,
    kind: StepKind = "decode",
) -> Ceiling:
    """Compute a bound that no engine exceeds: activations, launches and cache writes cost nothing.

    Args:
        work: bytes and operations.
        mode: bandwidth and arithmetic; if the arithmetic is not known, the bandwidth decides.
        batch: sequences of the step.
        tokens: tokens of each sequence; one of them gets logits.
        rows: cache rows that each sequence reads, its own tokens among them.
        kind: kind of the step, for an engine that tells them apart.
    """
    read = work.read_bytes(batch, rows, kind)
    reading_s, multiplying_s = read / mode.bytes_per_s, 0.0
    if mode.knows_arithmetic:
        multiplying_s = batch * _at_peak_s(work, mode, tokens, rows)
    step_s = max(reading_s, multiplying_s)
    bound: Literal["bandwidth", "arithmetic"] = (
        "bandwidth" if reading_s >= multiplying_s else "arithmetic"
    )
    return Ceiling(round(read), step_s, batch * tokens / step_s, bound)


def prefill_ceiling_s(
    work: Work, mode: PowerMode, tokens: int, max_prefill: int | None = None
) -> float:
    """Return the least seconds of a prompt, chunk by chunk as in `prefill_s`."""
    size = max_prefill or tokens
    ends = [*range(size, tokens, size), tokens]
    starts = [0, *ends[:-1]]
    chunks = zip(starts, ends, strict=True)
    return sum(ceiling(work, mode, 1, end - start, end, "prefill").step_s for start, end in chunks)


@dataclass(frozen=True)
class Speed:
    """Predicted speed at one context.

    Attributes:
        context: tokens in the cache of each sequence.
        tpot_s: time of one decode step.
        decode_tps: tokens per second over all sequences.
        decode_ceiling_tps: the most that ``decode_tps`` can be (`ceiling`).
        prefill_s: time of a prompt of ``context`` tokens, one sequence.
        prefill_tps: its tokens per second.
        prefill_ceiling_tps: the most that ``prefill_tps`` can be; None if arithmetic is unknown.
        ttft_s: time of that prompt and the first token; without queue and tokenizer.
    """

    context: int
    tpot_s: float
    decode_tps: float
    decode_ceiling_tps: float
    prefill_s: float
    prefill_tps: float
    prefill_ceiling_tps: float | None
    ttft_s: float


def predict(
    work: Work,
    mode: PowerMode,
    efficiency: Efficiency,
    batch: int,
    context: int,
    max_prefill: int | None = None,
) -> Speed:
    """Predict the speed at a context, as the module explains; ``max_prefill`` as in `prefill_s`."""
    tpot_s = decode_s(work, mode, efficiency, batch, context)
    prefill = prefill_s(work, mode, efficiency, context, max_prefill)
    least_s = prefill_ceiling_s(work, mode, context, max_prefill)
    return Speed(
        context=context,
        tpot_s=tpot_s,
        decode_tps=batch / tpot_s,
        decode_ceiling_tps=ceiling(work, mode, batch, 1, context).tokens_per_s,
        prefill_s=prefill,
        prefill_tps=context / prefill,
        prefill_ceiling_tps=context / least_s if mode.knows_arithmetic else None,
        ttft_s=prefill,
    )


def decode_s(
    work: Work, mode: PowerMode, efficiency: Efficiency, batch: int, context: float
) -> float:
    """Predict the seconds of one decode step."""
    weights_s = _weights_s(work, mode, efficiency, "decode")
    return weights_s * (1 + efficiency.batch * (batch - 1)) + _cache_s(
        work, mode, efficiency, batch, context
    )


def verify_s(
    work: Work, mode: PowerMode, efficiency: Efficiency, batch: int, guesses: int, context: float
) -> float:
    """Predict the seconds of a decode step that verifies this many guesses per sequence.

    The cache is read once per sequence, and each token costs as much as a further sequence. An
    engine's decode profile takes one token per sequence, so with guesses it is a step of prefill.
    """
    rows = batch * (1 + guesses)
    weights_s = _weights_s(work, mode, efficiency, "prefill" if guesses else "decode")
    return weights_s * (1 + efficiency.batch * (rows - 1)) + _cache_s(
        work, mode, efficiency, batch, context
    )


def prefill_s(
    work: Work,
    mode: PowerMode,
    efficiency: Efficiency,
    tokens: int,
    max_prefill: int | None = None,
) -> float:
    """Predict the seconds from the first prompt token to logits, for one sequence.

    A prompt longer than ``max_prefill`` goes in chunks, and each reads the weights again; None is
    one chunk.
    """
    arithmetic = _at_peak_s(work, mode, tokens, tokens) / efficiency.compute
    weights_s = _weights_s(work, mode, efficiency, "prefill")
    return _chunks(tokens, max_prefill) * weights_s + arithmetic


def _chunks(tokens: int, max_prefill: int | None) -> int:
    return 1 if max_prefill is None else -(-tokens // max_prefill)


def _weights_s(work: Work, mode: PowerMode, efficiency: Efficiency, kind: StepKind) -> float:
    read = work.weights_bytes(kind) / (mode.bytes_per_s * efficiency.weights)
    return read + work.launched_layers(kind) * efficiency.layer_s


def _cache_s(
    work: Work, mode: PowerMode, efficiency: Efficiency, batch: int, context: float
) -> float:
    read = batch * work.rows_read(context) * work.kv_bytes_per_token
    return read / (mode.bytes_per_s * efficiency.cache)


def _at_peak_s(work: Work, mode: PowerMode, tokens: int, rows: float) -> float:
    """Return the seconds of a sequence's products if its last token sees this many rows."""
    linear = tokens * work.linear_ops
    int8 = linear * work.int8_share / mode.int8_ops
    pairs = tokens * (rows - (tokens - 1) / 2)
    rest = linear * (1 - work.int8_share) + work.head_ops + pairs * work.attention_ops
    return int8 + rest / mode.fp16_flops


@dataclass(frozen=True)
class Measured:
    """A benchmark's results, for `calibrate`.

    Attributes:
        work: cost of its model.
        batch: sequences per decode step.
        context: mean tokens in the cache of a sequence while it decoded.
        tpot_s: median decode step.
        prompt_tokens: tokens of a prompt.
        max_prefill: tokens per prefill step.
        prefill_s: median time of its prefill.
        where: the file and the place in it, for error messages.
    """

    work: Work
    batch: int
    context: float
    tpot_s: float
    prompt_tokens: int
    max_prefill: int | None
    prefill_s: float
    where: str


def calibrate(
    mode: PowerMode, base: Efficiency, runs: Sequence[Measured], source: str
) -> Efficiency:
    """Replace ``weights`` and ``compute`` so that the predictions meet the measurements.

    One benchmark cannot tell reading from launching, so the time per layer stays, or is dropped if
    it alone predicts more than was measured. Several models or precisions can tell, and then that
    time is fitted too: least squares of relative errors, as in the fit of the defaults.

    Args:
        mode: the module's figures.
        base: the factors that are not measured.
        runs: one benchmark or more, all of this module in this mode.
        source: description of the result's source.

    Raises:
        ConfigError: a measurement is faster than the memory can be: another model, another device
            or another batch.
    """
    weights, layer_s = _fit_reading(mode, base, runs)
    found = dataclasses.replace(base, weights=weights, layer_s=layer_s, source=source)
    squares = products = 0.0
    for run in runs:
        chunks = _chunks(run.prompt_tokens, run.max_prefill)
        rest = run.prefill_s - chunks * _weights_s(run.work, mode, found, "prefill")
        peak = _at_peak_s(run.work, mode, run.prompt_tokens, run.prompt_tokens)
        # A prompt this short tells nothing about the arithmetic: its prefill only reads.
        if rest > peak:
            squares += (peak / run.prefill_s) ** 2
            products += peak * rest / run.prefill_s**2
    return dataclasses.replace(found, compute=squares / products) if products else found


def _fit_reading(
    mode: PowerMode, base: Efficiency, runs: Sequence[Measured]
) -> tuple[float, float]:
    """Fit the share of the bandwidth, at most 1, and the time per layer, at least 0."""
    reads, layers, wanted = [], [], []  # each as a share of the measured step
    for run in runs:
        share = (1 + base.batch * (run.batch - 1)) / run.tpot_s
        moved = run.work.weights_bytes("decode")
        reads.append(moved / mode.bytes_per_s * share)
        layers.append(run.work.launched_layers("decode") * share)
        wanted.append(1 - _cache_s(run.work, mode, base, run.batch, run.context) / run.tpot_s)
        if reads[-1] > wanted[-1] * (1 + 1e-9):  # all of the bandwidth, rounding aside
            raise ConfigError(
                f"--calibrate {run.where}: {run.tpot_s * 1e3:.2f} ms per step is less than "
                f"{moved / 1e6:,.0f} MB take at {mode.bytes_per_s / 1e9:.1f} "
                "GB/s; the file is of another model, quantization or device"
            )
    rr, rl, ll = _dot(reads, reads), _dot(reads, layers), _dot(layers, layers)
    rw, lw = _dot(reads, wanted), _dot(layers, wanted)
    apart = rr * ll - rl * rl
    layer_s = base.layer_s
    if apart > 1e-3 * rr * ll:  # they differ in bytes per layer by more than noise
        layer_s = max((rr * lw - rl * rw) / apart, 0.0)
    inverse = (rw - rl * layer_s) / rr
    # Reading cannot take less, rounding aside: one benchmark leaves no time for the layers.
    if inverse < 1.0 - 1e-9:
        layer_s = max((lw - rl) / ll, 0.0) if len(runs) > 1 else 0.0
        inverse = max((rw - rl * layer_s) / rr, 1.0)
    return min(1 / inverse, 1.0), layer_s


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))
