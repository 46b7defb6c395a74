"""Runs a step on a device of ONNX Runtime, bound to memory there."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.backends.step import Step
from edge.bundle import io_spec
from edge.bundle.manifest import FloatType
from edge.model.spec import ModelSpec

from .device_cache import OrtDeviceCache
from .faults import DeviceFaults
from .float_bits import from_storage, to_storage
from .rows import Block
from .runner import RunShape, StepOutputs, cache_bindings, fill_inputs, make_inputs

_BF16 = 16  # onnx.TensorProto.BFLOAT16: NumPy has no such type, its bits travel as uint16


class DeviceStep:
    """Fixed buffers on the device for one step shape, bound once and run many times.

    Args:
        session: ONNX Runtime's session.
        dialect, model: dialect and dimensions of its graph.
        cache: the cache of all slots.
        faults: explains failures.
        float_type: float type of the graph.
        shape: shape of the steps.
        outputs: memory for logits and hidden states.
        kv_len_of_batch: whether to give the graph the length of this batch's longest sequence,
            which `GroupQueryAttention` needs.
        embeds_width: width of ``inputs_embeds``, as in `manifest.Manifest`.
    """

    def __init__(
        self,
        session: Any,
        dialect: io_spec.DialectSpec,
        model: ModelSpec,
        cache: OrtDeviceCache,
        faults: DeviceFaults,
        float_type: FloatType,
        shape: RunShape,
        outputs: StepOutputs,
        *,
        kv_len_of_batch: bool,
        embeds_width: int,
    ) -> None:
        first, batch, seq, _ = shape
        self._session, self._dialect, self._faults = session, dialect, faults
        self._float_type, self._kv_len_of_batch = float_type, kv_len_of_batch
        self._device, self._positions = cache.device, cache.positions
        self._element = _BF16 if float_type == "bf16" else cache.dtype.type
        # Bound anew in every step, since a binding copies host memory to where the graph needs it.
        # ONNX Runtime needs some of the indices on the host and some on the device.
        self._inputs = make_inputs(dialect, embeds_width, cache.dtype, shape)
        self._logits, self._hidden = outputs  # ONNX Runtime copies them from the device
        self._caches = cache.blocks(first, batch)
        inputs, bound, self._new = cache_bindings(
            dialect,
            self._caches,
            lambda name, _: cache.allocate(cache.tensors[name].shape(batch, seq)),
        )
        # Appending the rows that a graph returns is a separate run.
        self._append = cache.writer(self._caches, self._new) if self._new else None
        self.binding = session.io_binding()
        for name, block in inputs.items():
            self._bind(self.binding.bind_input, name, block, self._element)
        for name, block in bound.items():
            self._bind(self.binding.bind_output, name, block, self._element)
        leaving = {io_spec.output_name(model): self._logits}
        if self._hidden is not None:
            leaving[io_spec.HIDDEN_STATES] = self._hidden
        for name, array in leaving.items():
            where = (array.shape, array.ctypes.data)
            self.binding.bind_output(name, "cpu", 0, self._element, *where)

    def _bind(self, bind: Any, name: str, block: Block, element: Any) -> None:
        bind(name, self._device.name, self._device.index, element, block.shape, block.address)

    def run(self, step: Step) -> NDArray[np.float32]:
        """See `edge.backends.ort.runner.BoundStep`."""
        kv_len = step.end if self._kv_len_of_batch else step.kv_len
        kv_len = self._dialect.rows_read(step.starts, kv_len)
        rows = Block(self._positions.address, (kv_len,), self._positions.owner)
        with self._faults.explain(f"on a step of {step.positions.shape} tokens"):
            fill_inputs(self._inputs, step, to_storage(step.embeds, self._float_type))
            for name, buffer in self._inputs.items():
                element = self._element if name == io_spec.INPUTS_EMBEDS else np.int64
                self.binding.bind_input(name, "cpu", 0, element, buffer.shape, buffer.ctypes.data)
            self._bind(self.binding.bind_input, io_spec.KV_POSITIONS, rows, np.int64)
            self._session.run_with_iobinding(self.binding)
            if self._append is not None:
                self._append.write(step.starts)
        return self._as_floats(self._logits)

    @property
    def hidden(self) -> NDArray[np.float32] | None:
        """See `edge.backends.ort.runner.BoundStep`."""
        return None if self._hidden is None else self._as_floats(self._hidden)

    def _as_floats(self, bits: NDArray[Any]) -> NDArray[np.float32]:
        return from_storage(bits, self._float_type).astype(np.float32, copy=False)
