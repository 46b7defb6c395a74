"""A device of ONNX Runtime: its provider, and sessions that really run there."""

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
    """Where the graph runs and its tensors lie.

    Attributes:
        name: as ONNX Runtime's bindings call it.
        index: which one.
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
    """The module ``onnxruntime``, built for a device.

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
        # Finds CUDA and cuDNN where pip installed them; what it cannot find it prints.
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            ort.preload_dlls()
        _log.debug("%s", printed.getvalue())
    return ort


def open_on_device(ort: ModuleType, device: OrtDevice, model: bytes, options: Any) -> Any:
    """A session on a device.

    Raises:
        DependencyError: the provider did not load; ONNX Runtime alone would go on with the CPU.
    """
    provider = device.provider
    providers: list[Any] = [(provider, dict(device.options))]
    if provider != "CPUExecutionProvider":
        providers.append("CPUExecutionProvider")
    try:
        # Nothing that fails, now or in a step, may go on elsewhere.
        session = ort.InferenceSession(model, options, providers=providers, enable_fallback=0)
    except RuntimeError as error:  # of the provider; those of a graph are of other classes
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
