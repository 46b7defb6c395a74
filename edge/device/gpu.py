"""Reads the GPU's name and size from the CUDA driver, ``libcuda.so.1``, without a context."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

# cuda.h: CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, and _COMPUTE_CAPABILITY_MAJOR and _MINOR
_NUM_SMS, _CC_MAJOR, _CC_MINOR = 16, 75, 76


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: the driver's name of the GPU.
        compute_capability: e.g. ``8.7``.
        num_sms: streaming multiprocessors that are on; on a Jetson the power mode decides.
    """

    name: str
    compute_capability: str
    num_sms: int | None = None


def find_gpu() -> Gpu | None:
    """Return the first GPU; None without a driver or a GPU."""
    try:
        cuda = load_driver()
    except OSError:
        return None
    device = ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return None
    return read_gpu(cuda, device)


def load_driver() -> ctypes.CDLL:
    """Load the driver's library, without initializing it.

    Raises:
        OSError: the library is not installed, or does not load.
    """
    return ctypes.CDLL("libcuda.so.1")


def read_gpu(cuda: ctypes.CDLL, device: ctypes.c_int) -> Gpu | None:
    """Ask an initialized driver about a device; None if the driver does not answer."""
    name = ctypes.create_string_buffer(256)
    major, minor, num_sms = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    codes = (
        cuda.cuDeviceGetName(name, len(name), device),
        cuda.cuDeviceGetAttribute(ctypes.byref(major), _CC_MAJOR, device),
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), _CC_MINOR, device),
        cuda.cuDeviceGetAttribute(ctypes.byref(num_sms), _NUM_SMS, device),
    )
    if any(codes):
        return None
    compute_capability = f"{major.value}.{minor.value}"
    return Gpu(name.value.decode(errors="replace"), compute_capability, num_sms.value)
