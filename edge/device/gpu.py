"""The GPU as the CUDA driver names it. Asked through ``libcuda.so.1`` alone, without a context."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

# cuda.h: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_CC_MAJOR, _CC_MINOR = 75, 76


@dataclass(frozen=True)
class Gpu:
    """A GPU; ``compute_capability`` is written as ``8.7``."""

    name: str
    compute_capability: str


def find_gpu() -> Gpu | None:
    """The first GPU; None without a driver or a GPU."""
    try:
        cuda = load_driver()
    except OSError:
        return None
    device = ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return None
    return read_gpu(cuda, device)


def load_driver() -> ctypes.CDLL:
    """Load the driver's library, which is not initialized yet.

    Raises:
        OSError: it is not installed, or does not load.
    """
    return ctypes.CDLL("libcuda.so.1")


def read_gpu(cuda: ctypes.CDLL, device: ctypes.c_int) -> Gpu | None:
    """Name and compute capability of a device of an initialized driver; None if it does not say."""
    name = ctypes.create_string_buffer(256)
    major, minor = ctypes.c_int(), ctypes.c_int()
    codes = (
        cuda.cuDeviceGetName(name, len(name), device),
        cuda.cuDeviceGetAttribute(ctypes.byref(major), _CC_MAJOR, device),
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), _CC_MINOR, device),
    )
    if any(codes):
        return None
    return Gpu(name.value.decode(errors="replace"), f"{major.value}.{minor.value}")
