"""Runs the vision encoder as a TensorRT engine: a context for one tile, on its own stream."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.backends import cuda
from edge.backends.ort.float_bits import from_storage, storage_dtype, to_storage
from edge.backends.tensorrt.engine import ChosenEngine, Engine, load_module
from edge.backends.tensorrt.runner import TensorRTBackend
from edge.bundle.engine_file import rebuild_command
from edge.bundle.manifest import Manifest
from edge.bundle.sizes import ALIGNMENT
from edge.errors import BackendError, DeviceError

from .plan import vision_plan
from .section import IMAGE_ROWS, PIXEL_VALUES, VisionSection

_log = logging.getLogger(__name__)


class EncoderEngine(Engine):
    """The encoder's plan, deserialized as an `Engine`.

    Args:
        chosen: the directory, and a record that names this plan.
        manifest: the bundle's manifest.
        section: the manifest's section ``vision``.
    """

    def __init__(self, chosen: ChosenEngine, manifest: Manifest, section: VisionSection) -> None:
        edge = section.tile_px
        self.shapes = {
            PIXEL_VALUES: (3, edge, edge),
            IMAGE_ROWS: (section.rows_per_tile, manifest.model.hidden_size),
        }
        super().__init__(chosen, manifest)

    def _check(self, chosen: ChosenEngine, manifest: Manifest) -> None:
        """Compare names, types and shapes with the section: a wrong one gives a wrong address."""
        engine, types = self._engine, self._module.DataType
        dtype = types.BF16 if manifest.dtype == "bf16" else types.HALF
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        found = {name: tuple(engine.get_tensor_shape(name))[1:] for name in names}
        if found != self.shapes or any(engine.get_tensor_dtype(name) != dtype for name in names):
            raise BackendError(
                f"the encoder's plan in {chosen.directory} has {found}, expected {self.shapes} of "
                f"{manifest.dtype}; build it again with: "
                f"{rebuild_command(chosen.directory, chosen.info, again=True)}"
            )
        self.tensors = frozenset(names)


class EngineEncoder:
    """A `edge.vision.rows.TileEncoder` on TensorRT.

    Everything is allocated when it is opened. It takes turns with the decoder's engine, since both
    run in the engine's thread.

    Args:
        manifest: the bundle's manifest.
        section: the manifest's section ``vision``.
        backend: the decoder's backend; the encoder's plan is in its engine's directory.

    Raises:
        BundleError: the engine was built without an encoder, or the plan is damaged.
        BackendError: TensorRT refuses the plan.
        DeviceMemoryError: the GPU's memory is too small.
    """

    def __init__(
        self, manifest: Manifest, section: VisionSection, backend: TensorRTBackend
    ) -> None:
        info = vision_plan(backend.engine_dir, backend.info)
        chosen = ChosenEngine(backend.engine_dir, info, load_module(info.flavour))
        self._type = manifest.dtype
        self._device = cuda.Device()  # in the backend's mode of waiting
        self._resources = ExitStack()
        self._context: Any = None
        try:
            with self._device.active():
                self._device.make_room("the vision encoder", info.plan_bytes)
                self._engine = EncoderEngine(chosen, manifest, section)
                self._resources.callback(self._engine.close)
                self._stream = cuda.Stream(self._device)
                self._resources.callback(self._stream.close)
                self._bind()
        except BaseException:
            self.close()
            raise

    def _bind(self) -> None:
        """Allocate memory, and make a context that is bound to it."""
        device, engine = self._device, self._engine
        size = max(engine.activations_bytes, ALIGNMENT)
        activations = cuda.DeviceMemory(device, size, "the encoder's activations")
        self._resources.callback(activations.close)
        self._context = engine.create_context()
        self._call("set_optimization_profile_async", 0, self._stream.handle)
        with engine.listener:
            if hasattr(self._context, "set_device_memory"):
                self._context.set_device_memory(activations.address, activations.num_bytes)
            else:
                self._context.device_memory = activations.address
        dtype = storage_dtype(self._type)
        self._hosts: dict[str, NDArray[Any]] = {}
        self._addresses: dict[str, int] = {}
        for name, shape in engine.shapes.items():
            num_bytes = int(np.prod(shape)) * dtype.itemsize
            pinned = cuda.PinnedMemory(device, num_bytes, name, mapped=device.integrated)
            self._resources.callback(pinned.close)
            address = pinned.address
            if not device.integrated:
                memory = cuda.DeviceMemory(device, num_bytes, name)
                self._resources.callback(memory.close)
                address = memory.address
            self._hosts[name] = pinned.array.view(dtype).reshape(shape)
            self._addresses[name] = address
            self._call("set_tensor_address", name, address)
        self._call("set_input_shape", PIXEL_VALUES, (1, *engine.shapes[PIXEL_VALUES]))

    def encode(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Turn ``[3, height, width]`` into ``[rows, hidden]``."""
        if self._context is None:
            raise BackendError("the vision encoder is closed; load the bundle again")
        source, target = self._hosts[PIXEL_VALUES], self._hosts[IMAGE_ROWS]
        source[...] = to_storage(pixels, self._type)
        with self._device.active():
            try:
                if not self._device.integrated:
                    self._stream.upload(self._addresses[PIXEL_VALUES], source.reshape(-1))
                self._call("execute_async_v3", self._stream.handle)
                if not self._device.integrated:
                    self._stream.download(target.reshape(-1), self._addresses[IMAGE_ROWS])
            finally:
                self._stream.synchronize()  # work enqueued before an error still runs
        return from_storage(target, self._type).astype(np.float32)

    def _call(self, method: str, *args: Any) -> None:
        with self._engine.listener:
            try:
                done = getattr(self._context, method)(*args)
            except RuntimeError:  # set_optimization_profile_async refuses by this error
                done = False
        if not done:
            raise BackendError(
                f"TensorRT refused {method}{args} of the vision encoder: "
                f"{self._engine.last_error()}"
            )

    def close(self) -> None:
        """Free context and memory; calling it twice is harmless."""
        self._context, self._hosts = None, {}
        try:
            with self._device.active():
                self._resources.close()
        except DeviceError as error:  # on a lost device nothing can be freed
            _log.warning("not everything of the vision encoder could be freed: %s", error)
