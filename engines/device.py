"""The machine that builds: its GPU through the CUDA driver, and its memory."""

from __future__ import annotations

import contextlib
import ctypes
import re
import resource
from dataclasses import dataclass
from pathlib import Path

from edge.device.telemetry import read_available_memory_bytes

# cuda.h: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_CC_MAJOR, _CC_MINOR = 75, 76


@dataclass(frozen=True)
class Gpu:
    """The first GPU: ``compute_capability`` as ``8.7``."""

    name: str
    compute_capability: str


def find_gpu() -> Gpu | None:
    """Ask the driver; None without a driver or a GPU. Creates no CUDA context."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    calls = (
        (cuda.cuInit, 0),
        (cuda.cuDeviceGet, ctypes.byref(device), 0),
        (cuda.cuDeviceGetName, name, len(name), device),
        (cuda.cuDeviceGetAttribute, ctypes.byref(major), _CC_MAJOR, device),
        (cuda.cuDeviceGetAttribute, ctypes.byref(minor), _CC_MINOR, device),
    )
    for function, *arguments in calls:
        if function(*arguments) != 0:
            return None
    return Gpu(name.value.decode(errors="replace"), f"{major.value}.{minor.value}")


def available_memory_bytes(root: Path = Path("/")) -> int:
    """``MemAvailable``: what can be had without swapping."""
    available = read_available_memory_bytes(root)
    assert available is not None  # Linux >= 3.14
    return available


class PeakMemory:
    """The most resident memory that the process had since it was made."""

    def __init__(self) -> None:
        with contextlib.suppress(OSError):  # a container may forbid it: then since its start
            Path("/proc/self/clear_refs").write_text("5", "ascii")

    def read_bytes(self) -> int:
        """The peak so far."""
        status = Path("/proc/self/status").read_text("ascii", "replace")
        match = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
        if match is None:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return int(match[1]) * 1024
