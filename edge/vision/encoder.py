"""Opens a bundle's vision encoder on the decoder's engine, and runs it one tile at a time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from edge.backends import Backend
from edge.backends.ort.device import OrtDevice, import_for_device, open_on_device
from edge.backends.ort.float_bits import from_storage, storage_dtype, to_storage
from edge.backends.ort.session import import_onnxruntime, session_options
from edge.bundle.manifest import FloatType, Manifest
from edge.errors import BackendError, BundleError, EdgeError

from .section import IMAGE_ROWS, PIXEL_VALUES, VisionSection

if TYPE_CHECKING:
    from .rows import TileEncoder

_TYPES: dict[str, FloatType] = {
    "tensor(float)": "fp32", "tensor(float16)": "fp16", "tensor(bfloat16)": "bf16",
}  # fmt: skip
_BF16 = 16  # ONNX's number of the type; NumPy has no such type


def open_encoder(
    bundle: Path,
    manifest: Manifest,
    section: VisionSection,
    backend: Backend,
    num_threads: int | None,
) -> TileEncoder:
    """Open the encoder where ``backend`` runs; the bundle's files have been checked.

    Raises:
        BundleError: the graph is not what the section says, or the engine has no encoder.
        BackendError: the encoder cannot be opened.
        DependencyError: a library is missing.
    """
    if backend.name == "tensorrt":
        from edge.backends.tensorrt.runner import TensorRTBackend

        from .engine_encoder import EngineEncoder

        return EngineEncoder(manifest, section, cast(TensorRTBackend, backend))
    device = getattr(backend, "device", None)
    return OrtEncoder(bundle, manifest, section, device, num_threads)


class OrtEncoder:
    """The encoder on ONNX Runtime.

    Args:
        bundle: the bundle's directory.
        manifest: its manifest.
        section: its section ``vision``.
        device: device to run on; None is the CPU.
        num_threads: CPU threads; None is one per physical core.

    Raises:
        BundleError: the graph's inputs and outputs are not those of the section.
        BackendError: ONNX Runtime refuses the graph.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        section: VisionSection,
        device: OrtDevice | None,
        num_threads: int | None,
    ) -> None:
        name = section.cpu_graph if device is None else section.graph
        path = bundle / name
        if device is None:
            ort = import_onnxruntime(manifest, "pictures need onnxruntime", "cpu")
            device = OrtDevice("cpu", 0, "CPUExecutionProvider", {})
        else:
            ort = import_for_device(manifest, device)
        options = session_options(ort, bundle, manifest)
        if num_threads is not None:
            options.intra_op_num_threads = num_threads
        options.enable_cpu_mem_arena = False  # it would keep the largest tile's memory for good
        try:
            self._session = open_on_device(ort, device, path.read_bytes(), options)
        except EdgeError:
            raise
        except Exception as error:
            raise BackendError(f"ONNX Runtime cannot load {path}: {error}") from error
        edge = section.tile_px
        wanted = [(PIXEL_VALUES, [3, edge, edge]), (IMAGE_ROWS, [section.rows_per_tile,
                   manifest.model.hidden_size])]  # fmt: skip
        values = [*self._session.get_inputs(), *self._session.get_outputs()]
        found = [(value.name, value.shape[1:]) for value in values]
        kinds = {value.type for value in values}
        if found != wanted or len(kinds) != 1 or not kinds <= _TYPES.keys():
            raise BundleError(
                f"{path} does not fit the manifest's section vision: found {found} of "
                f"{', '.join(sorted(kinds))}, expected {wanted}; export the bundle again"
            )
        self._type = _TYPES[kinds.pop()]
        dtype = storage_dtype(self._type)
        self._element: Any = _BF16 if self._type == "bf16" else dtype.type
        self._output = np.empty((1, *wanted[1][1]), dtype)
        self._where = device.name

    def encode(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Turn ``[3, height, width]`` into ``[rows, hidden]``; the tile's edge is ``tile_px``."""
        if self._session is None:
            raise BackendError("the vision encoder is closed; load the bundle again")
        given = np.ascontiguousarray(to_storage(pixels[None], self._type))
        try:
            binding = self._session.io_binding()
            for bind, name, array in (
                (binding.bind_input, PIXEL_VALUES, given),
                (binding.bind_output, IMAGE_ROWS, self._output),
            ):
                bind(name, "cpu", 0, self._element, array.shape, array.ctypes.data)
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise BackendError(f"the vision encoder failed on {self._where}: {error}") from error
        return from_storage(self._output[0], self._type).astype(np.float32)

    def close(self) -> None:
        """Free the session; calling it twice is harmless."""
        self._session = None
