"""Which engine runs a bundle."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal, get_args

from edge.bundle.engine_file import find_engines
from edge.bundle.manifest import Manifest
from edge.errors import BundleError, ConfigError, DependencyError, IntegrityError

from . import Backend
from .default_capacity import device_backend, host_capacity

BackendName = Literal["auto", "tensorrt", "ort-cuda", "ort-cpu"]
_log = logging.getLogger(__name__)


def open_backend(
    name: BackendName,
    bundle: Path,
    manifest: Manifest,
    *,
    num_slots: int,
    kv_capacity: int | None = None,
    max_step_tokens: int = 512,
    num_threads: int | None = None,
    int8_activations: bool | None = None,
) -> Backend:
    """Load a bundle, whose files are trusted (`manifest.verify_files` comes first).

    Args:
        name: ``auto`` takes a TensorRT engine of the bundle that fits this machine, else ONNX
            Runtime on a CUDA GPU if the installed one can, else on the CPU. What was passed over
            and why is logged.
        bundle: its directory.
        manifest: its manifest.
        num_slots: sequences that the cache holds.
        kv_capacity: tokens per sequence; None is the engine's own, else the bundle's, or what
            memory holds of it (`default_capacity`).
        max_step_tokens: the most tokens per sequence and step; an engine has its own.
        num_threads: of the CPU, which ``auto`` then takes; None is one per physical core.
        int8_activations: of the CPU, which ``auto`` then takes if true, see `OrtBackend`; no other
            engine rounds activations.

    Raises:
        ConfigError: an unknown name, a number out of range, or ``num_threads`` or true
            ``int8_activations`` for a GPU.
        BundleError, DependencyError, BackendError, DeviceMemoryError: see the engine.
    """
    check_backend_name(name)
    if num_threads is not None and name in ("tensorrt", "ort-cuda"):
        raise ConfigError(f"num_threads is for ort-cpu; {name} computes on the GPU: leave it out")
    if int8_activations and name in ("tensorrt", "ort-cuda"):
        raise ConfigError(f"int8_activations is for ort-cpu; {name} rounds none: leave it out")
    if (num_threads is not None or int8_activations) and name == "auto":
        # Both are the CPU's: an engine that has no use for them would ignore the caller's wish.
        if find_engines(bundle):
            wish = "int8_activations" if num_threads is None else "num_threads"
            _log.warning("%s asks for the CPU: the bundle's TensorRT engines are not used", wish)
        name = "ort-cpu"
    if name == "tensorrt" or (name == "auto" and find_engines(bundle)):
        from .tensorrt import TensorRTBackend

        try:
            return TensorRTBackend(bundle, manifest, num_slots=num_slots, kv_capacity=kv_capacity)
        except (BundleError, DependencyError) as error:
            if name == "tensorrt" or isinstance(error, IntegrityError):
                raise
            _log.warning("the bundle's TensorRT engines are not used: %s", error)
    if name == "ort-cuda" or (name == "auto" and _has_cuda_provider()):
        from .ort_cuda import OrtCudaBackend

        def open_with(capacity: int) -> Backend:
            return OrtCudaBackend(
                bundle,
                manifest,
                num_slots=num_slots,
                kv_capacity=capacity,
                max_step_tokens=max_step_tokens,
            )

        try:
            if kv_capacity is None:
                return device_backend(open_with, manifest, num_slots)
            return open_with(kv_capacity)
        except DependencyError as error:
            if name == "ort-cuda":
                raise
            _log.warning("ONNX Runtime's CUDA provider is not used: %s", error)
    from . import ort

    if kv_capacity is None:
        kv_capacity = host_capacity(manifest, num_slots, max_step_tokens)
    return ort.OrtBackend(
        bundle,
        manifest,
        num_slots=num_slots,
        kv_capacity=kv_capacity,
        num_threads=num_threads,
        max_step_tokens=max_step_tokens,
        int8_activations=int8_activations,
    )


def check_backend_name(name: str) -> None:
    """Refuse a name that is none.

    Raises:
        ConfigError: it is not one of `BackendName`.
    """
    known = get_args(BackendName)
    if name not in known:
        raise ConfigError(f"unknown backend {name!r}; use {', '.join(known[:-1])} or {known[-1]}")


def _has_cuda_provider() -> bool:
    try:
        import onnxruntime
    except ImportError:
        return False  # `OrtBackend` says what to install
    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()
