"""Predicted speed: bytes and operations against a module's bandwidth and arithmetic.

A decode step reads every weight and every row of the cache once. A prefill step reads the weights
too, and multiplies::

    decode  = (weights / (bandwidth * WEIGHTS) + layers * LAYER) * (1 + BATCH * (batch - 1))
              + batch * context * kv_bytes / (bandwidth * CACHE)
    prefill = chunks * (weights / (bandwidth * WEIGHTS) + layers * LAYER)
              + operations / (peak * COMPUTE)

The five capital letters are `Efficiency`. The defaults are fitted to published figures of Orin
(`edge.planner.fit`); ``--calibrate`` measures two of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edge.bundle import io_spec
from edge.bundle.manifest import ModelSpec
from edge.bundle.schemes import SCHEMES
from edge.errors import ConfigError

from .devices import PowerMode
from .memory import ORT_SCALE_COPIES, Deployment
from .weights import Linear, Part


@dataclass(frozen=True)
class Efficiency:
    """What of a module's figures an engine reaches.

    Attributes:
        weights: share of the bandwidth while weights are read.
        layer_s: time of a layer that is neither reading nor multiplying (launches, norms, RoPE).
        cache: share of the bandwidth while the cache is read.
        compute: share of the tensor cores' dense operations in prefill.
        batch: what each further sequence of a decode step adds, as a share of the first.
        source: where the numbers come from.
    """

    weights: float
    layer_s: float
    cache: float
    compute: float
    batch: float
    source: str


# `fit.fit` computes weights, layer_s, compute and batch; a test holds them together. The
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
class Work:
    """What one model in one quantization costs.

    Attributes:
        step_bytes: weights that a step reads.
        num_layers: decoder layers.
        kv_bytes_per_token: cache that a token of context costs to read.
        linear_ops: operations of the layers' matrix products per token.
        head_ops: operations of the lm_head per token that gets logits.
        attention_ops: operations of attention per pair of tokens.
        int8_share: share of ``linear_ops`` that runs in INT8.
    """

    step_bytes: int
    num_layers: int
    kv_bytes_per_token: int
    linear_ops: int
    head_ops: int
    attention_ops: int
    int8_share: float


def work_of(
    model: ModelSpec,
    linears: Sequence[Linear],
    weights: Mapping[Part, int],
    deployment: Deployment,
) -> Work:
    """Count bytes and operations; ``weights`` are those in memory (`ProcessMemory.weights`)."""
    layer_ops = head_ops = int8_ops = 0
    for linear in linears:
        ops = 2 * linear.shape[0] * linear.shape[1]
        if linear.part == "lm_head":
            head_ops += ops
            continue
        layer_ops += ops
        int8_ops += ops if SCHEMES[linear.scheme.kind].int8_inputs else 0
    step_bytes = sum(size for part, size in weights.items() if part != "rope")
    if deployment.backend == "ort-cpu":
        step_bytes -= weights["scales"] // ORT_SCALE_COPIES  # the one beside the packed weights
    return Work(
        step_bytes=step_bytes,
        num_layers=model.num_layers,
        kv_bytes_per_token=io_spec.kv_bytes_per_token(model, deployment.float_type),
        linear_ops=layer_ops,
        head_ops=head_ops,
        attention_ops=4 * model.num_layers * model.num_heads * model.head_dim,
        int8_share=int8_ops / layer_ops,
    )


@dataclass(frozen=True)
class Speed:
    """Predicted speed at one context.

    Attributes:
        context: tokens in the cache of each sequence.
        tpot_s: one decode step.
        decode_tps: tokens per second over all sequences.
        roofline_tps: the same at the data sheet's bandwidth and nothing else: no engine exceeds it.
        prefill_s: a prompt of ``context`` tokens, one sequence.
        prefill_tps: its tokens per second.
        ttft_s: the same and the first token; no queue, no tokenizer.
    """

    context: int
    tpot_s: float
    decode_tps: float
    roofline_tps: float
    prefill_s: float
    prefill_tps: float
    ttft_s: float


def predict(
    work: Work,
    mode: PowerMode,
    efficiency: Efficiency,
    batch: int,
    context: int,
    max_prefill: int | None = None,
) -> Speed:
    """Speed at a context, see the top of this module; ``max_prefill`` as in `prefill_s`."""
    tpot_s = decode_s(work, mode, efficiency, batch, context)
    prefill = prefill_s(work, mode, efficiency, context, max_prefill)
    roofline = (work.step_bytes + batch * context * work.kv_bytes_per_token) / mode.bytes_per_s
    return Speed(
        context=context,
        tpot_s=tpot_s,
        decode_tps=batch / tpot_s,
        roofline_tps=batch / roofline,
        prefill_s=prefill,
        prefill_tps=context / prefill,
        ttft_s=prefill,
    )


def decode_s(
    work: Work, mode: PowerMode, efficiency: Efficiency, batch: int, context: float
) -> float:
    """Predict the seconds of one decode step."""
    return _weights_s(work, mode, efficiency) * (1 + efficiency.batch * (batch - 1)) + _cache_s(
        work, mode, efficiency, batch, context
    )


def prefill_s(
    work: Work,
    mode: PowerMode,
    efficiency: Efficiency,
    tokens: int,
    max_prefill: int | None = None,
) -> float:
    """Seconds from the first prompt token to logits, one sequence.

    A longer prompt than ``max_prefill`` goes in chunks, and each reads the weights again; None is
    one chunk.
    """
    arithmetic = _prefill_at_peak_s(work, mode, tokens) / efficiency.compute
    return _chunks(tokens, max_prefill) * _weights_s(work, mode, efficiency) + arithmetic


def _chunks(tokens: int, max_prefill: int | None) -> int:
    return 1 if max_prefill is None else -(-tokens // max_prefill)


def _weights_s(work: Work, mode: PowerMode, efficiency: Efficiency) -> float:
    read = work.step_bytes / (mode.bytes_per_s * efficiency.weights)
    return read + work.num_layers * efficiency.layer_s


def _cache_s(
    work: Work, mode: PowerMode, efficiency: Efficiency, batch: int, context: float
) -> float:
    read = batch * context * work.kv_bytes_per_token
    return read / (mode.bytes_per_s * efficiency.cache)


def _prefill_at_peak_s(work: Work, mode: PowerMode, tokens: int) -> float:
    linear = tokens * work.linear_ops
    int8 = linear * work.int8_share / mode.int8_ops
    pairs = tokens * (tokens + 1) / 2
    rest = linear * (1 - work.int8_share) + work.head_ops + pairs * work.attention_ops
    return int8 + rest / mode.fp16_flops


@dataclass(frozen=True)
class Measured:
    """What a benchmark says, for `calibrate`.

    Attributes:
        batch: sequences per decode step.
        context: mean tokens in the cache of a sequence while it decoded.
        tpot_s: median decode step.
        prompt_tokens: tokens of a prompt.
        max_prefill: tokens per prefill step.
        prefill_s: median time of its prefill.
        where: the file, for error messages and ``source``.
    """

    batch: int
    context: float
    tpot_s: float
    prompt_tokens: int
    max_prefill: int | None
    prefill_s: float
    where: str


def calibrate(work: Work, mode: PowerMode, base: Efficiency, measured: Measured) -> Efficiency:
    """Replace ``weights`` and ``compute`` so that the prediction meets the measurement.

    The other factors stay. If what they alone predict is longer than the measurement already, the
    time per layer is dropped first.

    Raises:
        ConfigError: the measurement is faster than the memory can be, or the prefill is faster than
            its weights can be read: another model, another device or another batch.
    """
    cache = _cache_s(work, mode, base, measured.batch, measured.context)
    step = (measured.tpot_s - cache) / (1 + base.batch * (measured.batch - 1))
    for layer_s in (base.layer_s, 0.0):
        left = step - work.num_layers * layer_s
        weights = work.step_bytes / (mode.bytes_per_s * left) if left > 0 else 2.0
        if weights <= 1 + 1e-9:  # all of the bandwidth, but for rounding
            break
    else:
        raise ConfigError(
            f"--calibrate {measured.where}: {measured.tpot_s * 1e3:.2f} ms per step is less than "
            f"{work.step_bytes / 1e6:,.0f} MB take at {mode.bytes_per_s / 1e9:.1f} GB/s; the file "
            "is of another model, quantization or device"
        )
    found = dataclasses.replace(
        base, weights=weights, layer_s=layer_s, source=f"measured: {measured.where}"
    )
    chunks = _chunks(measured.prompt_tokens, measured.max_prefill)
    rest = measured.prefill_s - chunks * _weights_s(work, mode, found)
    peak = _prefill_at_peak_s(work, mode, measured.prompt_tokens)
    # A prompt this short says nothing of the arithmetic: its prefill is all reading.
    if rest <= peak:
        return found
    return dataclasses.replace(found, compute=peak / rest)
