"""Finds the scales of an 8-bit KV cache, and the layers whose keys are better left in float.

Keys are rounded after RoPE, which turns pairs of channels. A pair's length is the same at every
position, so it gets one scale, from the longest pair of the calibration text: no position and no
slide of the cache brings a key out of range that was in range before. Values, and keys of a layer
without RoPE, have one scale per channel, from the largest magnitude.

Rounding to multiples of ``s`` has a mean squared error of ``s^2 / 12`` (Widrow & Kollar,
Quantization Noise, 2008), independently per channel. An attention score is ``q . k / sqrt(d)``, so
its expected squared error is ``sum(q^2 s^2) / 12 d``. `score_error` returns the root of it, with
the mean square of the text's queries. It is in nats, as softmax takes it: 0.1 changes an attention
weight by a tenth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge.bundle.manifest import Calibration, KvCache
from edge.errors import CheckpointError
from edge.model.names import module_name
from edge.model.parts import Attention, Layer, Linear, Norm, Rope, only
from edge.model.spec import ModelSpec
from edge_make.progress import Progress
from export.graph.kv_quantization import KvScales
from export.sources.checkpoint import Checkpoint

from .calibration import LayerRunner
from .fed_linears import value_name

Array = NDArray[np.float32]

SCORE_LIMIT = 0.25
"""The largest error of a layer's scores in 8 bits; docs/quantization.md says why."""
CACHE_TOKENS = 4096
"""Most tokens to calibrate with by default; four times as many raised the score errors of SmolLM2
by 3 %."""
_LEAST = 2.0**-14
_LARGEST = 127


@dataclass(frozen=True)
class Observed:
    """Ranges of one layer's keys, values and queries in the calibration text.

    A group is a pair of channels that RoPE turns, or a single channel that it leaves. The groups
    of a head are first the pairs, then the single channels, in the channels' order.

    Attributes:
        key_length: length of the longest group of each KV head, ``[kv_heads, groups]``.
        value_size: largest magnitude of each channel, ``[kv_heads, head_dim]``.
        query_square: mean square length of each group, ``[heads, groups]``.
    """

    key_length: Array
    value_size: Array
    query_square: Array


def observe(model: ModelSpec, checkpoint: Checkpoint, layer: int, qkv: Array) -> Observed:
    """Reduce the outputs of a layer's projection.

    Args:
        model: has the layer.
        checkpoint: has the weights of the norms of queries and keys, if there are such.
        layer: its number.
        qkv: outputs of the linear of `cache_taps`, float32 ``[tokens, out]``.
    """
    parts = model.layer(layer)
    attention, ropes = only(parts, Attention)[0], only(parts, Rope)
    names, widths = zip(*_projection(parts).outputs, strict=True)
    split = np.split(qkv, np.cumsum(widths)[:-1], axis=1)
    heads = {
        name: x.reshape(len(x), -1, attention.dim) for name, x in zip(names, split, strict=True)
    }
    for norm in only(parts, Norm):
        if norm.of in heads:
            heads[norm.of] = _normed(
                heads[norm.of], checkpoint, module_name(layer, norm.name), model
            )
    rotary = ropes[0].dims if ropes else 0
    stretch = np.ones(attention.dim - rotary // 2, dtype=np.float32)
    stretch[: rotary // 2] = model.ropes[ropes[0].table].attention_factor if ropes else 1
    query_square = _squares(heads["q"], rotary).mean(axis=0, dtype=np.float64).astype(np.float32)
    if attention.scale is not None:  # instead of the default, which `score_error` takes
        query_square *= np.float32(attention.scale**2 * attention.dim)
    return Observed(
        key_length=np.sqrt(_squares(heads["k"], rotary).max(axis=0)) * stretch,
        value_size=np.abs(heads["v"]).max(axis=0),
        query_square=query_square * stretch**2,
    )


def cache_taps(layer: Layer) -> dict[str, str]:
    """Find the value of a layer that holds its queries, keys and values."""
    return {value_name(_projection(layer)): "qkv"}


def _projection(layer: Layer) -> Linear:
    for linear in only(layer, Linear):
        if {"q", "k", "v"} <= {name for name, _ in linear.outputs}:
            return linear
    raise CheckpointError(
        "--kv-cache int8: a layer has no linear that computes queries, keys and values together; "
        "leave the option out"
    )


def _normed(x: Array, checkpoint: Checkpoint, name: str, model: ModelSpec) -> Array:
    weight = checkpoint.tensor(f"{name}.weight").astype(np.float32)
    size = np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + np.float32(model.rms_norm_eps))
    result: Array = x / size * weight
    return result


def _squares(x: Array, rotary: int) -> Array:
    """Return the square length of each group, of which ``rotary`` leading channels make pairs."""
    squares: Array = np.square(x)
    half = rotary // 2
    pairs = squares[..., :half] + squares[..., half:rotary]
    return np.concatenate([pairs, squares[..., rotary:]], axis=-1)


def find_scales(observed: Observed, float_type: np.dtype[np.generic], *, wide: bool) -> KvScales:
    """Find the scales of a layer, rounded up to values of the graph's float type.

    Args:
        observed: ranges of the layer.
        float_type: fp16 or bf16.
        wide: whether the scale 1 is FP32, as in `KvScales`.
    """
    pairs = observed.value_size.shape[-1] - observed.key_length.shape[-1]
    lengths = np.concatenate([observed.key_length[..., :pairs], observed.key_length], axis=-1)
    keys, values = (
        _stored(np.maximum(sizes / _LARGEST, _LEAST), float_type)
        for sizes in (lengths, observed.value_size)
    )
    return KvScales(keys, values, wide)


def _stored(scales: Array, float_type: np.dtype[np.generic]) -> Array:
    stored: Array = scales.astype(float_type).astype(np.float32)
    short = stored < scales
    # Add one unit in the last place: 2^-10 for FP16's mantissa, 2^-7 for BF16's.
    step = np.float32(2.0**-10 if float_type == np.float16 else 2.0**-7)
    above: Array = (scales * (1 + step)).astype(float_type).astype(np.float32)
    return np.where(short, above, stored)


def score_error(observed: Observed, scales: KvScales) -> float:
    """Return the root of the expected squared error of scores, for the worst head, in nats."""
    heads, groups = observed.query_square.shape
    steps = np.square(scales.keys[:, -groups:].astype(np.float64))
    shared = heads // len(steps)
    noise = (observed.query_square * np.repeat(steps, shared, axis=0)).sum(axis=1)
    return float(np.sqrt(noise.max() / (12 * scales.keys.shape[1])))


def calibrate_kv_cache(
    checkpoint: Checkpoint,
    ids: NDArray[np.int64],
    calibration: Calibration,
    float_type: np.dtype[np.generic],
    *,
    wide: bool,
    progress: Progress,
) -> tuple[dict[int, KvScales], KvCache, dict[str, float]]:
    """Run a text through the float model, and find every layer's scales.

    Args:
        checkpoint: the model, with everything that the exporter folds into its weights.
        ids: token ids int64 ``[sequences, seq_len]``.
        calibration: describes them.
        float_type: float type of the graph.
        wide: whether the scale 1 is FP32, as in `KvScales`.
        progress: called as in `LayerRunner`.

    Returns:
        The scales of the layers in 8 bits, the manifest's description, and the largest magnitude
        of each value, as in `BlockPlan.peaks`.
    """
    model = checkpoint.spec
    runner = LayerRunner(checkpoint, ids, progress, cache_taps)
    hidden: Array | None = None
    scales: dict[int, KvScales] = {}
    errors: list[float] = []
    peaks: dict[str, float] = {}
    for layer in range(model.num_layers):
        seen = runner.run(layer, hidden)
        hidden = seen.hidden
        peaks |= {name: float(channels.max()) for name, channels in seen.peaks.items()}
        observed = observe(model, checkpoint, layer, seen.inputs["qkv"])
        scales[layer] = find_scales(observed, float_type, wide=wide)
        errors.append(score_error(observed, scales[layer]))
    kept = tuple(layer for layer, error in enumerate(errors) if not error <= SCORE_LIMIT)
    described = KvCache("int8", tuple(errors), SCORE_LIMIT, kept, calibration)
    stored = {layer: found for layer, found in scales.items() if layer not in kept}
    return stored, described, peaks
