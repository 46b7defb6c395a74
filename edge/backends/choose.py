"""The choice of the engine that runs a bundle."""

from __future__ import annotations

import logging
from pathlib import Path

from edge.bundle.engine_file import find_engines
from edge.bundle.manifest import Manifest
from edge.engine_config import EngineConfig
from edge.errors import BundleError, DependencyError, IntegrityError

from . import Backend
from .default_capacity import device_backend, host_capacity

_log = logging.getLogger(__name__)


def open_backend(bundle: Path, manifest: Manifest, config: EngineConfig) -> Backend:
    """Load a bundle, whose files are trusted (`manifest.verify_files` comes first).

    What ``auto`` passes over, and why, is logged.

    Args:
        bundle: directory of the bundle.
        manifest: manifest of the bundle.
        config: name of the engine, and the sizes of its cache and of its steps. A TensorRT engine
            has the longest step that it was built for. Without ``kv_capacity``, ONNX Runtime takes
            what memory holds of the bundle's (`default_capacity`).

    Raises:
        ConfigError, BundleError, DependencyError, BackendError, DeviceMemoryError: see the engine.
    """
    name = config.backend
    if name == "auto" and config.cpu_option is not None:
        # An engine that has no use for the option would ignore the caller's wish.
        if find_engines(bundle):
            _log.warning(
                "%s asks for the CPU: the bundle's TensorRT engines are not used", config.cpu_option
            )
        name = "ort-cpu"
    if name == "tensorrt" or (name == "auto" and find_engines(bundle)):
        try:
            return _open_tensorrt(bundle, manifest, config)
        except (BundleError, DependencyError) as error:
            if name == "tensorrt" or isinstance(error, IntegrityError):
                raise
            _log.warning("the bundle's TensorRT engines are not used: %s", error)
    if name == "ort-cuda" or (name == "auto" and _has_cuda_provider()):
        try:
            return _open_ort_cuda(bundle, manifest, config)
        except DependencyError as error:
            if name == "ort-cuda":
                raise
            _log.warning("ONNX Runtime's CUDA provider is not used: %s", error)
    return _open_ort_cpu(bundle, manifest, config)


def _open_tensorrt(bundle: Path, manifest: Manifest, config: EngineConfig) -> Backend:
    from .tensorrt import TensorRTBackend

    return TensorRTBackend(
        bundle, manifest, num_slots=config.num_slots, kv_capacity=config.kv_capacity
    )


def _open_ort_cuda(bundle: Path, manifest: Manifest, config: EngineConfig) -> Backend:
    from .ort_cuda import OrtCudaBackend

    def open_with(capacity: int) -> Backend:
        return OrtCudaBackend(
            bundle,
            manifest,
            num_slots=config.num_slots,
            kv_capacity=capacity,
            max_step_tokens=config.prefill_chunk,
        )

    if config.kv_capacity is None:
        return device_backend(open_with, manifest, config.num_slots)
    return open_with(config.kv_capacity)


def _open_ort_cpu(bundle: Path, manifest: Manifest, config: EngineConfig) -> Backend:
    from . import ort

    capacity = config.kv_capacity
    if capacity is None:
        capacity = host_capacity(manifest, config.num_slots, config.prefill_chunk)
    return ort.OrtBackend(
        bundle,
        manifest,
        num_slots=config.num_slots,
        kv_capacity=capacity,
        num_threads=config.num_threads,
        max_step_tokens=config.prefill_chunk,
        int8_activations=config.int8_activations,
    )


def _has_cuda_provider() -> bool:
    try:
        import onnxruntime
    except ImportError:
        return False  # `OrtBackend` says what to install
    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()
