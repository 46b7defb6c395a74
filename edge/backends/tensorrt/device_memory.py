"""Plans a TensorRT engine's GPU memory before anything is loaded.

All of it is allocated once at load; a step allocates nothing. On a Jetson the GPU shares the host's
memory, so staging memory is mapped instead of copied, and pinned bytes are the only I/O memory.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from edge.bundle import io_spec
from edge.bundle.engine_file import EngineInfo
from edge.bundle.manifest import Manifest
from edge.bundle.sizes import (
    ALIGNMENT,
    DEFAULT_MAX_LOGITS,
    INDEX_BYTES,
    activation_bytes,
    cache_slots,
)
from edge.model.cache import Rows, alike, cache_tensors, check_cache
from edge.model.spec import ModelSpec


class StepSizes(NamedTuple):
    """The most that one run of an engine takes: sequences, tokens and rows of logits in all."""

    batch: int
    tokens: int
    logits: int


Arrays = dict[str, tuple[int, Any]]
"""Numbers of elements, and NumPy's type of them, by the name of the engine's tensor."""


@dataclass(frozen=True)
class EngineMemory:
    """Bytes by part, from `plan_engine_memory`.

    Attributes:
        weights_bytes: the plan, which is nearly all weights, and the weights outside it.
        cache_bytes: keys and values of all slots.
        activations_bytes: activations, shared by all execution contexts.
        activations_estimated: whether they are estimated, not TensorRT's own number.
        io_bytes: inputs and outputs on the device, and the adapters of all slots; on an integrated
            GPU only those without host memory.
        pinned_bytes: host memory that the GPU reads and writes.
        integrated: whether host and GPU share one memory.
    """

    weights_bytes: int
    cache_bytes: int
    activations_bytes: int
    activations_estimated: bool
    io_bytes: int
    pinned_bytes: int
    integrated: bool

    @property
    def device_bytes(self) -> int:
        """Return the bytes of all parts in the GPU's memory."""
        own = self.weights_bytes + self.cache_bytes + self.activations_bytes + self.io_bytes
        return own + (self.pinned_bytes if self.integrated else 0)

    def to_dict(self) -> dict[str, int | bool]:
        """Return every attribute, and ``device_bytes``, for JSON."""
        return {**dataclasses.asdict(self), "device_bytes": self.device_bytes}


def plan_engine_memory(
    info: EngineInfo,
    manifest: Manifest,
    *,
    num_slots: int | None = None,
    max_logits: int = DEFAULT_MAX_LOGITS,
    integrated: bool = True,
    activations_bytes: int | None = None,
) -> EngineMemory:
    """Plan an engine's memory from its ``engine.json``; needs no device.

    Args:
        info: the engine's record.
        manifest: manifest of its bundle.
        num_slots: sequences that the cache holds; None is the engine's ``max_batch``.
        max_logits: rows of logits that one run returns at most.
        integrated: whether to plan for a GPU that shares the host's memory.
        activations_bytes: activations in bytes, as TensorRT says; None estimates them.
    """
    model = manifest.model
    slots = cache_slots(info.max_batch if num_slots is None else num_slots)
    sizes = step_sizes(info, max_logits)
    rows = sum(placed(logits_arrays(size, model))[1] for size in sizes)
    cursor = io_spec.DIALECTS[manifest.dialect].cursor
    pinned = rows + sum(
        placed(input_arrays(size, model, cursor))[1]
        + placed(best_arrays(size, info.best_logits))[1]
        for size in sizes
    )
    io = pinned if not integrated else rows if info.best_logits else 0
    io += _align(info.kv_capacity * INDEX_BYTES)
    if not io_spec.DIALECTS[manifest.dialect].in_place:
        io += sum(new_rows_bytes(sizes[0], planes) for planes in cache_planes(manifest))
    if "adapters" in manifest.extras:
        from edge.adapters.device import slots_bytes

        io += slots_bytes(manifest, slots)
    estimated = activations_bytes is None
    return EngineMemory(
        weights_bytes=info.weights_bytes,
        cache_bytes=slots
        * info.kv_capacity
        * io_spec.kv_bytes_per_token(model, manifest.dtype, manifest.int8_layers),
        activations_bytes=(
            activation_bytes(
                model,
                manifest.dialect,
                [profile.limits for profile in info.profiles],
                info.kv_capacity,
                rows_in_fp32=bool(info.best_logits) and not info.own_top_k,
            )
            if activations_bytes is None
            else activations_bytes
        ),
        activations_estimated=estimated,
        io_bytes=io,
        pinned_bytes=pinned,
        integrated=integrated,
    )


def step_sizes(info: EngineInfo, max_logits: int) -> tuple[StepSizes, StepSizes]:
    """Return the sizes of the buffers for steps of several tokens, and for decode.

    A run takes no more tokens in all than one prompt chunk. Several long chunks run one after the
    other, which is no slower and needs no larger buffers.
    """
    tokens = max(info.max_prefill, info.max_batch)
    return (
        StepSizes(info.max_batch, tokens, max(max_logits, info.max_batch)),
        StepSizes(info.max_batch, info.max_batch, info.max_batch),
    )


def input_arrays(
    sizes: StepSizes, model: ModelSpec, cursor: str, floats: Any = np.float16
) -> Arrays:
    """Return the inputs of a step; ``floats`` holds the bits of the engine's float type."""
    return {
        cursor: (sizes.batch, np.int64),
        io_spec.LOGITS_INDICES: (sizes.logits, np.int64),
        io_spec.POSITION_IDS: (sizes.tokens, np.int64),
        io_spec.INPUTS_EMBEDS: (sizes.tokens * model.hidden_size, floats),
    }


def logits_arrays(sizes: StepSizes, model: ModelSpec, floats: Any = np.float16) -> Arrays:
    """Return the main output of a step."""
    return {io_spec.output_name(model): (sizes.logits * io_spec.output_width(model), floats)}


def best_arrays(sizes: StepSizes, best_logits: int, floats: Any = np.float16) -> Arrays:
    """Return the outputs of `io_spec.best_outputs`; empty if an engine has none."""
    if not best_logits:
        return {}
    count = sizes.logits * best_logits
    return {
        io_spec.BEST_VALUES: (count, floats),
        io_spec.BEST_IDS: (count, np.int32),
        io_spec.BEST_REST: (sizes.logits, np.float32),
    }


def placed(arrays: Arrays) -> tuple[dict[str, int], int]:
    """Place arrays in one block, each aligned; return their offsets and its size, in bytes."""
    offsets, end = {}, 0
    for name, (count, kind) in arrays.items():
        offsets[name] = end
        end += _align(count * np.dtype(kind).itemsize)
    return offsets, end


class CachePlanes(NamedTuple):
    """Cache tensors with rows of one kind.

    Attributes:
        names: names of the tensors, in graph order.
        rows: their rows.
    """

    names: list[str]
    rows: Rows


def cache_planes(manifest: Manifest) -> list[CachePlanes]:
    """Group the cache tensors of an engine by their rows."""
    tensors = cache_tensors(manifest.model, manifest.dtype, manifest.int8_layers)
    check_cache(tensors, "can_cut", "a cache of an engine")
    return [CachePlanes(names, rows) for names, rows in alike(tensors) if isinstance(rows, Rows)]


def new_rows_stride(batch: int, seq: int, rows: Rows) -> int:
    """Return the bytes from a cache tensor's new rows to the next one's (dialect ``portable``).

    It is a whole number of rows, so that one strided copy takes all layers, and aligned.
    """
    pitch = seq * rows.row_bytes // rows.kv_heads
    used = batch * rows.kv_heads * pitch
    stride = -(-used // pitch) * pitch
    while stride % ALIGNMENT:
        stride += pitch
    return stride


def new_rows_bytes(sizes: StepSizes, planes: CachePlanes) -> int:
    """Return the bytes for the new rows of any step within ``sizes``."""
    row = planes.rows.row_bytes // planes.rows.kv_heads
    # At most ALIGNMENT / gcd - 1 further pitches align a stride, and one suffices for rows whose
    # size is a multiple of it.
    extra = 1
    while row * extra % ALIGNMENT:
        extra += 1
    stride = sizes.tokens * row * (planes.rows.kv_heads + extra)
    return len(planes.names) * _align(stride)


def _align(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
