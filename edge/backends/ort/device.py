"""Opens sessions of ONNX Runtime on a device, and makes sure that they run there."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from edge.bundle.manifest import Manifest
from edge.errors import DependencyError, install_command

from .faults import names_device
from .session import import_onnxruntime

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OrtDevice:
    """The device on which the graph runs and its tensors are.

    Attributes:
        name: the device's name in ONNX Runtime's bindings.
        index: number of the device.
        provider: the execution provider.
        options: its options.
    """

    name: str = "cuda"
    index: int = 0
    provider: str = "CUDAExecutionProvider"
    options: Mapping[str, str] = field(
        # By default the arena grows in powers of two, and a Jetson has one memory for everything.
        default_factory=lambda: {"arena_extend_strategy": "kSameAsRequested"}
    )


def import_for_device(manifest: Manifest, device: OrtDevice) -> ModuleType:
    """Import the module ``onnxruntime``, built for a device.

    Raises:
        DependencyError: it is missing, too old, or built without the device's provider.
    """
    ort = import_onnxruntime(manifest, "the backend ort-cuda needs onnxruntime-gpu", "cuda")
    available = ort.get_available_providers()
    if device.provider not in available:
        raise DependencyError(
            f"the installed onnxruntime {ort.__version__} has no {device.provider} (it has "
            f"{', '.join(available)}); uninstall onnxruntime and install onnxruntime-gpu, with: "
            f"{install_command('cuda')} (for a Jetson see docs/orin.md)"
        )
    if device.name == "cuda" and hasattr(ort, "preload_dlls"):
        # Finds CUDA and cuDNN where pip installed them; it prints what it cannot find.
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            ort.preload_dlls()
        _log.debug("%s", printed.getvalue())
    return ort


def open_on_device(ort: ModuleType, device: OrtDevice, model: bytes, options: Any) -> Any:
    """Open a session on a device.

    Raises:
        DependencyError: the provider did not load; ONNX Runtime by itself would use the CPU.
    """
    provider = device.provider
    providers: list[Any] = [(provider, dict(device.options))]
    if provider != "CPUExecutionProvider":
        providers.append("CPUExecutionProvider")
    try:
        # Nothing that fails, now or in a step, may fall back to another provider.
        session = ort.InferenceSession(model, options, providers=providers, enable_fallback=0)
    except RuntimeError as error:  # the provider's errors; a graph's have other classes
        if names_device(str(error)):
            raise
        raise DependencyError(
            f"ONNX Runtime {ort.__version__} could not load {provider}: {error}; edge-llm doctor "
            "says what is missing"
        ) from error
    if session.get_providers()[0] != provider:
        raise DependencyError(
            f"ONNX Runtime {ort.__version__} could not load {provider}: a library that "
            "it needs is missing or of another version, or the driver is too old; "
            "edge-llm doctor finds out which"
        )
    return session
