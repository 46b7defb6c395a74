"""Binds an execution context of an engine to the memory of the runner.

Between two steps only differences are set: a decode step in the same slots sets nothing, another
bucket one shape. TensorRT wants addresses aligned to 256 bytes (NvInferRuntime.h).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from edge.backends import cuda
from edge.bundle import io_spec
from edge.bundle.manifest import Manifest
from edge.errors import BackendError
from edge.model.cache import cache_tensors

from .device_cache import DeviceCache, NewRows
from .engine import Engine
from .step_buffers import StepBuffers

if TYPE_CHECKING:
    from edge.adapters.device import DeviceSlots

    from .layer_times import LayerTimes


class StepShape(NamedTuple):
    """All that an execution context must be told for a step; equal shapes share a CUDA graph.

    Attributes:
        first: the first slot.
        batch, seq, num_logits: sequences, tokens and logits of each.
        kv: rows of the cache that attention reads.
        rank: rank of adapters; 0 if none of the sequences has one.
    """

    first: int
    batch: int
    seq: int
    num_logits: int
    kv: int
    rank: int = 0


class BoundContext:
    """An execution context, its profile, and the memory that its tensors are bound to.

    Args:
        engine: engine of the context.
        profile: ``prefill`` or ``decode``.
        activations: memory that all contexts share, since they run one after another on one stream.
        buffers, cache, new_rows, adapters: memory of the tensors; ``new_rows`` for ``portable``.
        kv_positions: address of 0, 1, 2, ... up to the capacity.
        stream: stream to run on.
    """

    def __init__(
        self,
        engine: Engine,
        profile: str,
        manifest: Manifest,
        *,
        activations: cuda.DeviceMemory,
        buffers: StepBuffers,
        cache: DeviceCache,
        new_rows: NewRows | None,
        adapters: DeviceSlots | None,
        kv_positions: int,
        stream: cuda.Stream,
    ) -> None:
        self._engine, self._stream = engine, stream
        self._cache, self._new_rows, self._adapters = cache, new_rows, adapters
        self._bound: StepShape | None = None
        self._times: LayerTimes | None = None
        self._hidden_size = manifest.model.hidden_size
        dialect = io_spec.DIALECTS[manifest.dialect]
        self._cursor = dialect.cursor
        tensors = cache_tensors(manifest.model, manifest.dtype)
        self._pasts = {io_spec.PAST_PREFIX + name: name for name in tensors}
        self._outputs = {dialect.new_prefix + name: name for name in tensors}
        # In place, a cache output has the address of its input.
        self._held = self._pasts if new_rows is not None else {**self._pasts, **self._outputs}
        self._context = engine.create_context()
        self._call("set_optimization_profile_async", engine.profile(profile), stream.handle)
        with engine.listener:
            if hasattr(self._context, "set_device_memory"):
                self._context.set_device_memory(activations.address, activations.num_bytes)
            else:
                self._context.device_memory = activations.address
        fixed = {**buffers.addresses, io_spec.KV_POSITIONS: kv_positions, **engine.weights}
        for name, address in fixed.items():
            if name in engine.tensors:
                self._call("set_tensor_address", name, address)

    def bind(self, shape: StepShape) -> None:
        """Set what differs from the step before.

        Raises:
            BackendError: TensorRT refuses a shape or an address.
        """
        old, self._bound = self._bound, None  # after a failure half way nothing can be relied on
        if shape == old:
            self._bound = old
            return
        first, batch, seq, num_logits, kv, rank = shape
        if old is None or (old.batch, old.seq) != (batch, seq):
            self._call("set_input_shape", io_spec.INPUTS_EMBEDS, (batch, seq, self._hidden_size))
            self._call("set_input_shape", io_spec.POSITION_IDS, (batch, seq))
        if old is None or (old.batch, old.num_logits) != (batch, num_logits):
            self._call("set_input_shape", io_spec.LOGITS_INDICES, (batch, num_logits))
        if (old is None or old.kv != kv) and io_spec.KV_POSITIONS in self._engine.tensors:
            self._call("set_input_shape", io_spec.KV_POSITIONS, (kv,))
        if old is None or old.batch != batch:
            if self._cursor in self._engine.tensors:
                self._call("set_input_shape", self._cursor, (batch,))
            for past, name in self._pasts.items():
                self._call("set_input_shape", past, self._cache.shape(name, batch))
        if old is None or old.first != first:
            for tensor, name in self._held.items():
                self._call("set_tensor_address", tensor, self._cache.address(name, first))
        new = old is None or (old.first, old.batch, old.rank) != (first, batch, rank)
        for name, dims, at in (
            self._adapters.inputs(first, batch, rank) if self._adapters and new else ()
        ):
            self._call("set_input_shape", name, dims)
            self._call("set_tensor_address", name, at)
        if self._new_rows is not None and (old is None or (old.batch, old.seq) != (batch, seq)):
            for output, name in self._outputs.items():
                address = self._new_rows.address(name, batch, seq)
                self._call("set_tensor_address", output, address)
        self._bound = shape

    def time_layers(self, times: LayerTimes) -> None:
        """Report the layers of every later run to ``times``; this cannot be undone."""
        self._context.profiler = self._profiler = self._engine.make_profiler(times)
        self._times = times

    def enqueue(self) -> None:
        """Put the step on the stream.

        Raises:
            EdgeError: TensorRT refuses it, or a plugin with own kernels fails.
        """
        with self._engine.listener:
            done = self._context.execute_async_v3(self._stream.handle)
        if not done:
            self._engine.raise_failure()
            reason = self._engine.last_error()
            raise BackendError(f"TensorRT refused a step {tuple(self._bound or ())}: {reason}")
        if self._times is not None:
            self._stream.synchronize()
            self._times.end_run()

    def close(self) -> None:
        """Destroy the context."""
        self._context = None

    def _call(self, method: str, *args: Any) -> None:
        with self._engine.listener:
            try:
                done = getattr(self._context, method)(*args)
            except RuntimeError:  # set_optimization_profile_async refuses by this error
                done = False
        if not done:
            self._engine.raise_failure()
            raise BackendError(f"TensorRT refused {method}{args}: {self._engine.last_error()}")
