"""Chooses the engine that runs a bundle.

The CPU never replaces a GPU silently. If the bundle has an engine and the machine a GPU, an engine
that cannot be used is an error, unless the CPU was requested. If there is a GPU and no engine, the
CPU is used, and `unused_gpu` has the sentence for the log, ``/ready`` and ``/stats``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from edge.bundle.engine_file import EngineInfo, find_engines
from edge.bundle.manifest import HeadManifest, Manifest
from edge.engine_config import GPU_BACKENDS, BackendName, EngineConfig
from edge.errors import BundleError, ConfigError, DependencyError, IntegrityError

from . import Backend

_log = logging.getLogger(__name__)


def open_backend(
    bundle: Path, manifest: Manifest, config: EngineConfig, beside: Manifest | None = None
) -> Backend:
    """Load a bundle, whose files are trusted (`verify_files` comes first).

    It logs every engine that ``auto`` skips, and why. On a machine with a GPU ``auto`` skips no
    engine of the bundle.

    Args:
        bundle: directory of the bundle.
        manifest: manifest of the bundle.
        config: name of the engine, and the sizes of its cache and of its steps. A TensorRT engine
            has the longest step that it was built for. Without ``kv_capacity``, ONNX Runtime takes
            as much of the bundle's capacity as memory holds (`default_capacity`).
        beside: manifest of a bundle that will be opened beside this one, with the same slots and
            capacity; the CPU leaves memory for it.

    Raises:
        ConfigError, BundleError, DependencyError, BackendError, DeviceMemoryError: the engine
            cannot be opened; the engine's class says when.
    """
    backend = _open(bundle, manifest, config, beside)
    warning = unused_gpu(backend.name, config)
    if warning is not None:
        _log.warning("%s", warning)
    return backend


def tries_gpu(bundle: Path, config: EngineConfig) -> bool:
    """Whether `open_backend` tries another engine before the CPU's."""
    return next(_gpu_engines(bundle, config), None) is not None


def unused_gpu(backend: str, config: EngineConfig) -> str | None:
    """Return why the GPU is not used although nobody requested the CPU; else None.

    Args:
        backend: name of the engine that was chosen.
        config: options that the choice followed.
    """
    if backend != "ort-cpu" or config.backend == "ort-cpu":
        return None
    from edge.device.nodes import find_gpu_node

    if (node := find_gpu_node()) is None:
        return None
    why = f"{config.cpu_option} asks for it; leave that out"
    if config.cpu_option is None:
        why = (
            "the bundle has no TensorRT engine and ONNX Runtime no CUDA; edge-llm build BUNDLE "
            "makes an engine"
        )
    return (
        f"the CPU computes, though this machine has a GPU ({node}): {why}, or ask for the CPU with "
        "--backend ort-cpu"
    )


def serial_slots(backend: Backend, config: EngineConfig) -> str | None:
    """Return why fewer sequences are computed together than may run; else None.

    Args:
        backend: the engine that was opened.
        config: options that it was opened with.
    """
    info: EngineInfo | None = getattr(backend, "info", None)  # only TensorRT's has it
    wanted = min(config.max_batch or backend.num_slots, backend.num_slots)
    if info is None or wanted <= info.max_batch:
        return None
    return (
        f"{wanted} sequences may run at once, but the engine computes {info.max_batch} per step, "
        f"so they take turns: edge-llm build BUNDLE --max-batch {wanted} builds one for all; or "
        "ask for fewer"
    )


def _open(
    bundle: Path, manifest: Manifest, config: EngineConfig, beside: Manifest | None
) -> Backend:
    for name in _gpu_engines(bundle, config):
        try:
            return _ON_GPU[name](bundle, manifest, config)
        except (BundleError, DependencyError) as error:
            _pass_over(name, error, bundle, config)
    return _open_ort_cpu(bundle, manifest, config, beside)


def _gpu_engines(bundle: Path, config: EngineConfig) -> Iterator[BackendName]:
    """Yield the names of the GPU engines to try, in order; without one, the CPU's."""
    if config.backend in GPU_BACKENDS:
        yield config.backend
    elif config.gpu_option is not None:
        if not find_engines(bundle):
            raise ConfigError(
                f"{config.gpu_option} is for TensorRT, and the bundle has no engine: edge-llm "
                f"build {bundle} makes one; or leave the option out"
            )
        yield "tensorrt"
    # An engine that cannot honour an option for the CPU would ignore the caller's wish.
    elif config.backend == "auto" and config.cpu_option is None:
        if find_engines(bundle):
            yield "tensorrt"
        if _has_cuda_provider():
            yield "ort-cuda"


def _pass_over(
    name: BackendName, error: BundleError | DependencyError, bundle: Path, config: EngineConfig
) -> None:
    """Log why an engine is not used, or raise if no other may replace it."""
    is_asked_for = config.backend != "auto" or config.gpu_option is not None
    if isinstance(error, DependencyError):
        if is_asked_for:
            from .missing_requirements import raise_missing

            raise_missing(error, config, bundle if name == "tensorrt" else None)
    elif name == "ort-cuda" or isinstance(error, IntegrityError):
        raise error
    if is_asked_for:
        raise error
    if name == "ort-cuda":
        _log.warning("ONNX Runtime's CUDA provider is not used: %s", error)
        return
    from edge.device.nodes import find_gpu_node

    if (node := find_gpu_node()) is not None:
        raise type(error)(
            f"{error}; since the bundle has an engine and this machine a GPU ({node}), the CPU is "
            "taken only where it is asked for: --backend ort-cpu"
        ) from error
    _log.warning("the bundle's TensorRT engines are not used: %s", error)


def _open_tensorrt(bundle: Path, manifest: Manifest, config: EngineConfig) -> Backend:
    if _wants_hidden_states(manifest, config):
        raise ConfigError(
            "--draft eagle3 reads the model's hidden states, which TensorRT engines do not put "
            "out; take --backend ort-cuda or ort-cpu, or a smaller model as --draft BUNDLE"
        )
    from .tensorrt.runner import TensorRTBackend

    return TensorRTBackend(
        bundle,
        manifest,
        num_slots=config.num_slots,
        kv_capacity=config.kv_capacity,
        max_draft_tokens=config.max_draft_tokens,
        gpu_wait=config.gpu_wait,
        trusted_keys=config.trusted_keys,
    )


def _open_ort_cuda(bundle: Path, manifest: Manifest, config: EngineConfig) -> Backend:
    from .default_capacity import device_backend
    from .ort.gpu import OrtCudaBackend

    def open_with(capacity: int) -> Backend:
        return OrtCudaBackend(
            bundle,
            manifest,
            num_slots=config.num_slots,
            kv_capacity=capacity,
            max_step_tokens=config.prefill_chunk,
            hidden_states=_wants_hidden_states(manifest, config),
        )

    if config.kv_capacity is None:
        return device_backend(open_with, manifest, config.num_slots)
    return open_with(config.kv_capacity)


_ON_GPU = {"tensorrt": _open_tensorrt, "ort-cuda": _open_ort_cuda}


def _open_ort_cpu(
    bundle: Path, manifest: Manifest, config: EngineConfig, beside: Manifest | None
) -> Backend:
    from .default_capacity import host_capacity
    from .ort import cpu as ort

    capacity, extra = config.kv_capacity, 0
    if capacity is None or capacity <= manifest.rope_positions:  # else the backend refuses it
        if config.prefill == "int8":
            from .ort.int8_prompts import int8_bytes

            extra = int8_bytes(manifest)
        sizes = config.num_slots, config.prefill_chunk
        capacity = host_capacity(manifest, *sizes, extra, beside, capacity)
    return ort.OrtBackend(
        bundle,
        manifest,
        num_slots=config.num_slots,
        kv_capacity=capacity,
        num_threads=config.num_threads,
        max_step_tokens=config.prefill_chunk,
        int8_activations=config.int8_activations,
        int8_prompts=config.prefill == "int8",
        deterministic=config.deterministic,
        hidden_states=_wants_hidden_states(manifest, config),
    )


def _wants_hidden_states(manifest: Manifest, config: EngineConfig) -> bool:
    """Whether hidden states are read: a model's by its head, a head's when it guesses on."""
    return config.drafts_with_head or isinstance(manifest, HeadManifest)


def _has_cuda_provider() -> bool:
    try:
        import onnxruntime
    except ImportError:
        return False  # `OrtBackend` says what to install
    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()
