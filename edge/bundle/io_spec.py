"""Defines the decoder graph's inputs and outputs: the contract between export, engines and edge.

This is the only place where a tensor's name, shape or type is written down. In shapes, ``B`` is the
batch, ``S`` the tokens of this step per sequence, and ``N`` the positions that get logits. ``K`` is
the cache rows that attention reads, ``C`` the capacity (static), and ``T`` the graph's float type.

Dialect ``native`` (opset 24, TensorRT >= 10.15, ONNX Runtime >= 1.26):

====  ========================  =================  =====  =========================================
I/O   name                      shape              type   meaning
====  ========================  =================  =====  =========================================
in    inputs_embeds             [B, S, hidden]     T      rows of the token table
in    position_ids              [B, S]             int64  absolute position of each token
in    write_indices             [B]                int64  first cache row that this step writes
in    kv_positions              [K]                int64  0..K-1; attention reads K cache rows
in    logits_indices            [B, N]             int64  which positions of S get logits
in    past_key_values.i.key     [B, kv, C, dim]    T      the cache; same for .value
out   present.i.key             [B, kv, C, dim]    T      the same memory, updated in place
out   logits                    [B, N, vocab]      T      scores
out   hidden_states             [B, S, hidden]     T      only in a bundle with a head
====  ========================  =================  =====  =========================================

Dialect ``portable`` (opset 21, TensorRT >= 10.3, ONNX Runtime 1.23): the cache is an input only
and the runtime appends the step's rows itself. ``write_indices`` is replaced by ``past_lengths``
[B], the valid cache rows per sequence, ``present.i.*`` by ``new.i.key/.value`` [B, kv, S, dim].

In a bundle with an 8-bit cache (`Manifest.kv_cache`) the cache tensors of most layers are int8:
multiples of the scales in `kv_scales`.

The first output depends on the model's task (`ModelSpec.task`): logits of the vocabulary; logits of
only the two tokens ``no`` and ``yes`` (``rerank``); or, without an lm_head, ``embeddings``
``[B, N, hidden]``, the hidden state after the final norm (``embed``).

An engine can be built with three more outputs. They hold what most draws need of each row of
logits, so that the row itself stays on the device. ``best_values`` ``[B, N, k]`` (T, descending)
and ``best_ids`` ``[B, N, k]`` (int32) are the k best logits and their tokens. ``best_rest``
``[B, N, 1]`` (fp32) is the mass of all others, where the mass of the best one is 1. They are not
part of a bundle: `engines.graph.adapt` adds them, and they come last.

An engine whose attention is our own (docs/kernels.md) uses the positions of tokens. TensorRT may
then drop inputs that only a mask reads: ``kv_positions`` and, in ``portable``, ``past_lengths``.

``hidden_states`` are read by a head that drafts tokens (`manifest.DraftHead`): the inputs of
three layers, joined by the head's ``fc``. A head is a decoder with the same contract. Its
``inputs_embeds`` are ``[embedding | hidden state]``, twice as wide, and its ``hidden_states`` are
its residual stream. They come for every token of a step, not only for ``logits_indices``: a head
reads the whole prompt, of which nobody wants all logits.

A cache row's index is the position of its token. A token attends to the cache rows whose position
is not greater than its own, so rows of padding after a sequence are never read.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge.errors import ConfigError
from edge.model.cache import ELEMENT_BYTES as ELEMENT_BYTES
from edge.model.cache import CacheSpec, cache_tensors
from edge.model.cache import ElementType as ElementType

if TYPE_CHECKING:
    from edge.model.spec import ModelSpec

    from .manifest import Dialect, FloatType

INPUTS_EMBEDS = "inputs_embeds"
POSITION_IDS = "position_ids"
WRITE_INDICES = "write_indices"
PAST_LENGTHS = "past_lengths"
KV_POSITIONS = "kv_positions"
LOGITS_INDICES = "logits_indices"
LOGITS = "logits"
EMBEDDINGS = "embeddings"
HIDDEN_STATES = "hidden_states"
PAST_PREFIX, PRESENT_PREFIX = "past_key_values.", "present."
BEST_VALUES = "best_values"
BEST_IDS = "best_ids"
BEST_REST = "best_rest"
MOST_BEST_LOGITS = 1024
# The token embedding table is beside the graph: its file, and the tensors in it. Rows are fp16,
# or INT8 with one fp32 scale each.
EMBEDDINGS_NAME = "embeddings.safetensors"
EMBEDDINGS_TENSOR = "token_embeddings"
EMBEDDINGS_SCALES = "token_embeddings.scale"

BATCH, SEQ, NUM_LOGITS, KV = "batch", "seq", "num_logits", "kv"

# A longer RoPE table costs more memory than any context on an edge device is worth.
MAX_ROPE_POSITIONS = 32768


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape (a string is a dynamic dimension) and element type of one input or output."""

    name: str
    shape: tuple[int | str, ...]
    dtype: ElementType


def output_name(model: ModelSpec) -> str:
    """Return the name of the main output ``[B, N, width]``, which depends on the task."""
    return EMBEDDINGS if model.task == "embed" else LOGITS


def output_width(model: ModelSpec) -> int:
    """Return the width of the main output: a row of logits, or a hidden state."""
    if model.task == "rerank":
        return 2
    return model.hidden_size if model.task == "embed" else model.vocab_size


def best_outputs(vocab_size: int, best_logits: int, dtype: FloatType) -> list[TensorSpec]:
    """Return the outputs for the best logits of each row, in graph order; none for 0 of them."""
    if not best_logits:
        return []
    shape = (BATCH, NUM_LOGITS, min(best_logits, vocab_size))
    return [
        TensorSpec(BEST_VALUES, shape, dtype),
        TensorSpec(BEST_IDS, shape, "int32"),
        TensorSpec(BEST_REST, (BATCH, NUM_LOGITS, 1), "fp32"),
    ]


def sum_parts(vocab_size: int) -> int:
    """Return the number of parts of a row's sum: the greatest divisor up to the square root.

    The parts are summed, then their sums. However an engine adds, no number passes through more
    than ``parts + vocab_size / parts`` additions, which bounds the rounding (`sum_error`).
    """
    return next(n for n in range(math.isqrt(vocab_size), 0, -1) if vocab_size % n == 0)


def sum_error(vocab_size: int) -> float:
    """Return a bound on the relative error of the sums from which ``best_rest`` comes.

    It covers float32 additions and an exponential. CUDA's fast exponential has an error below 2e-5
    above 1e-38 (CUDA C++ Programming Guide, "Intrinsic Functions": 2 units in the last place, and
    one for each 0.85 of the argument).
    """
    parts = sum_parts(vocab_size)
    return 1.1 * (parts + vocab_size // parts) * 2.0**-24 + 2e-5


def past_key(layer: int) -> str:
    """Return the name of the cache input of a layer's keys."""
    return f"{PAST_PREFIX}{layer}.key"


def past_value(layer: int) -> str:
    """Return the name of the cache input of a layer's values."""
    return f"{PAST_PREFIX}{layer}.value"


def present_key(layer: int) -> str:
    """Return the name of the in-place cache output of a layer's keys (``native``)."""
    return f"{PRESENT_PREFIX}{layer}.key"


def present_value(layer: int) -> str:
    """Return the name of the in-place cache output of a layer's values (``native``)."""
    return f"{PRESENT_PREFIX}{layer}.value"


def new_key(layer: int) -> str:
    """Return the name of the output of this step's keys of a layer (``portable``)."""
    return f"new.{layer}.key"


def new_value(layer: int) -> str:
    """Return the name of the output of this step's values of a layer (``portable``)."""
    return f"new.{layer}.value"


def cache_scale(tensor: str) -> str:
    """Return the name of the scales of an 8-bit cache tensor, ``[kv, 1, dim]``."""
    layer, _, part = tensor.partition(".")
    return f"layers.{layer}.{part[0]}.cache_scale"


def layer_output(layer: int) -> str:
    """Return the name of a decoder layer's output ``[B, S, hidden]``, a tensor in the graph."""
    return f"layers.{layer}.mlp_residual"


@dataclass(frozen=True)
class DialectSpec:
    """The differences between the dialects for code that plans or runs a decoder.

    Attributes:
        opset: version of its operators.
        min_tensorrt: the first TensorRT whose parser has all of them.
        min_onnxruntime: the first ONNX Runtime whose CPU has all of them.
        min_onnxruntime_int8: the first ONNX Runtime for a cache in 8 bits.
        cursor: name of the input ``[B]`` with the row after the last valid one of each sequence.
        new_prefix: names the output of a cache tensor, before the tensor's name.
        in_place: whether the graph itself writes the step's rows into the cache, also for idle
            slots; otherwise it returns them and the runtime appends them.
        one_attention_operator: whether attention is a single operator; otherwise its scores are
            tensors of the graph.
    """

    opset: int
    min_tensorrt: tuple[int, int]
    min_onnxruntime: tuple[int, int]
    min_onnxruntime_int8: tuple[int, int]
    cursor: str
    new_prefix: str
    in_place: bool
    one_attention_operator: bool

    def rows_read(self, starts: Sequence[int], kv_len: int) -> int:
        """Return how many cache rows a step's attention reads: the length of ``kv_positions``.

        Args:
            starts: first row of each sequence that the step writes.
            kv_len: valid rows of the longest sequence after the step.
        """
        if self.in_place:
            return kv_len
        # The step's own rows are not in the cache yet; an empty past still needs one row.
        return max(*starts, 1)


DIALECTS: dict[Dialect, DialectSpec] = {
    "native": DialectSpec(
        opset=24,
        min_tensorrt=(10, 15),
        min_onnxruntime=(1, 26),
        # 1.27 has GroupQueryAttention with an INT8 cache. But where that splits queries, keys and
        # values itself, it is wrong from the second sequence of a batch on.
        min_onnxruntime_int8=(1, 28),
        cursor=WRITE_INDICES,
        new_prefix=PRESENT_PREFIX,
        in_place=True,
        one_attention_operator=True,
    ),
    "portable": DialectSpec(
        opset=21,
        min_tensorrt=(10, 3),
        min_onnxruntime=(1, 23),
        min_onnxruntime_int8=(1, 23),
        cursor=PAST_LENGTHS,
        new_prefix="new.",
        in_place=False,
        one_attention_operator=False,
    ),
}


def rope_positions(model: ModelSpec) -> int:
    """Return the rows of the cos/sin table: the model's own maximum, at most 32k."""
    return min(model.max_position_embeddings, MAX_ROPE_POSITIONS)


def check_capacity(capacity: int, positions: int) -> None:
    """Refuse a KV capacity that the graph's RoPE table of ``positions`` rows cannot serve.

    Raises:
        ConfigError: it is outside 2..positions.
    """
    if not 2 <= capacity <= positions:
        raise ConfigError(
            f"--kv-capacity {capacity} is out of range: this model takes 2 to {positions} tokens"
        )


def needed_onnxruntime(dialect: Dialect, *, int8_cache: bool) -> tuple[int, int]:
    """Return the first ONNX Runtime whose CPU runs a decoder of this dialect."""
    spec = DIALECTS[dialect]
    return spec.min_onnxruntime_int8 if int8_cache else spec.min_onnxruntime


def decoder_inputs(
    model: ModelSpec,
    dialect: Dialect,
    dtype: FloatType,
    capacity: int,
    int8_layers: Collection[int] = (),
    embeds_width: int | None = None,
) -> list[TensorSpec]:
    """Return the decoder's inputs in graph order; ``embeds_width`` None is the hidden size."""
    return [
        TensorSpec(INPUTS_EMBEDS, (BATCH, SEQ, embeds_width or model.hidden_size), dtype),
        TensorSpec(POSITION_IDS, (BATCH, SEQ), "int64"),
        TensorSpec(DIALECTS[dialect].cursor, (BATCH,), "int64"),
        TensorSpec(KV_POSITIONS, (KV,), "int64"),
        TensorSpec(LOGITS_INDICES, (BATCH, NUM_LOGITS), "int64"),
        *_caches(PAST_PREFIX, cache_tensors(model, dtype, int8_layers), capacity),
    ]


def _caches(prefix: str, caches: dict[str, CacheSpec], rows: int | str) -> list[TensorSpec]:
    shapes = {name: spec.shape(BATCH, rows) for name, spec in caches.items()}
    return [TensorSpec(prefix + name, shapes[name], spec.type) for name, spec in caches.items()]


def decoder_outputs(
    model: ModelSpec,
    dialect: Dialect,
    dtype: FloatType,
    capacity: int,
    int8_layers: Collection[int] = (),
    hidden_width: int = 0,
    best_logits: int = 0,
) -> list[TensorSpec]:
    """Return the decoder's outputs in graph order.

    Hidden states, if any, are the last output of a bundle's graph; the ``best_logits`` best logits
    of each row, if any, the last ones of an engine.
    """
    spec = DIALECTS[dialect]
    rows = capacity if spec.in_place else SEQ
    specs = [TensorSpec(output_name(model), (BATCH, NUM_LOGITS, output_width(model)), dtype)]
    specs += _caches(spec.new_prefix, cache_tensors(model, dtype, int8_layers), rows)
    if hidden_width:
        specs.append(TensorSpec(HIDDEN_STATES, (BATCH, SEQ, hidden_width), dtype))
    specs += best_outputs(model.vocab_size, best_logits, dtype)
    return specs


def kv_bytes_per_token(
    model: ModelSpec, dtype: FloatType, int8_layers: Collection[int] = ()
) -> int:
    """Return how many bytes of cache one token takes over all layers."""
    return sum(spec.row_bytes for spec in cache_tensors(model, dtype, int8_layers).values())
