"""Explains the CUDA driver's sentences: which errors lose the GPU, and why it does not start."""

from __future__ import annotations

import re
from pathlib import Path

from edge.device.memory import read_free_memory_bytes, read_mem_available_bytes
from edge.device.nodes import GPU_NODES, RENDER_NODES, may_open
from edge.errors import DeviceError
from edge.files import is_jetson

# PyCUDA's exceptions carry no number, only the driver's sentence for it (cuGetErrorString).
# After these the context is lost: every later call fails in the same way (cuda.h, CUresult).
_FATAL = (
    "illegal memory access",  # 700
    "launch timed out",  # 702
    "context is destroyed",  # 709
    "device-side assert",  # 710
    "hardware stack error",  # 714
    "illegal instruction",  # 715
    "misaligned address",  # 716
    "not supported on global/shared address space",  # 717
    "invalid program counter",  # 718
    "unspecified launch failure",  # 719
    "uncorrectable ECC error",  # 214
    "uncorrectable NVLink error",  # 220
    "external device asserted",  # 719 in another unit
    "invalid device context",  # 201
    "driver shutting down",  # 4
    "unknown error",  # 999
)
_NO_MEMORY = re.compile(
    r"out of memory|OutOfMemory|bad_alloc|insufficient memory|Cuda failure: 2\b", re.IGNORECASE
)
_NO_LIBRARY = (
    "the driver's library libcuda.so.1 does not load or is too old; install the driver (on a "
    "Jetson: the package nvidia-l4t-cuda), in a container start it with --runtime nvidia"
)
# Causes and cures of cuInit's errors; the first that fits counts.
_INIT_CURES = (
    (
        "no CUDA-capable device",
        "no NVIDIA GPU is visible here; check nvidia-smi (on a Jetson: "
        "tegrastats) and CUDA_VISIBLE_DEVICES, in a container start it with --runtime nvidia",
    ),
    (
        "unsupported display driver",
        "the kernel's driver and the user-space driver are of "
        "different versions (CUDA 803); reboot after a driver update, in a container use an image "
        "that fits the host",
    ),
    (
        "forward compatibility",
        "the CUDA forward-compatibility package does not work on this GPU "
        "(CUDA 804); remove cuda-compat from LD_LIBRARY_PATH",
    ),
    (
        "driver version is insufficient",
        "the driver is older than the CUDA libraries (CUDA 35); "
        "update the driver (on a Jetson: JetPack)",
    ),
    (
        "invalid device ordinal",
        "there is no GPU of this number here (CUDA 101); check CUDA_VISIBLE_DEVICES",
    ),
    # How cuda-bindings says that it found no driver: early versions of 12, later ones, and 13.
    ("Failed to dlopen", _NO_LIBRARY),
    ('Function "', _NO_LIBRARY),
    ("is an NVIDIA driver library", _NO_LIBRARY),
    ("not yet initialized", "the GPU is not ready yet (CUDA 802); wait and try again"),
    (
        "operation not supported",
        "the driver does not take this GPU (CUDA 801); in a container start it with --runtime "
        "nvidia and, on a Jetson, with the groups of /dev/nvmap and /dev/dri/renderD128; on a "
        "Jetson use libraries of its own JetPack",
    ),
    ("unknown error", "the driver failed without a reason (CUDA 999); look at dmesg, then reboot"),
)


def explain_init_failure(text: str, root: Path = Path("/")) -> str:
    """Say why the driver does not start, and what to do.

    Args:
        text: the driver's message.
        root: directory that contains ``dev`` with the device nodes.
    """
    # On a Jetson they belong to the groups video and render; elsewhere CUDA opens no render node.
    for name in (*GPU_NODES, *(RENDER_NODES if is_jetson(root) else ())):
        node = root / name[1:]
        if node.exists() and not may_open(node):
            return (
                f"this user may not open {node}; add the user to the groups video and render "
                "(sudo usermod -aG video,render $USER), log in again, in a service set "
                f"SupplementaryGroups=video render (CUDA said: {text})"
            )
    for sign, cure in _INIT_CURES:
        if sign in text:
            return f"{cure} (CUDA said: {text})"
    return f"CUDA does not start: {text}; edge-llm doctor looks for the cause"


def device_error(doing: str, error: BaseException) -> DeviceError:
    """Convert the driver's exception; ``doing`` completes the words "the GPU could not"."""
    reason = reason_of(error)
    fatal = is_fatal(reason)
    cure = "start the process anew" if fatal else "try again"
    return DeviceError(f"the GPU could not {doing}: {reason}; {cure}", fatal)


def cure_for_memory(num_bytes: int, cure: str, root: Path = Path("/")) -> str:
    """Say what helps after an allocation failed.

    Args:
        num_bytes: size of the allocation.
        cure: advice for when there is too little memory.
        root: directory that contains ``dev`` and ``proc``.

    Returns:
        ``cure``; but if a Jetson has that much memory and does not give it, the reason and what
        helps then.
    """
    free, available = read_free_memory_bytes(root), read_mem_available_bytes(root)
    if free is None or available is None or available < num_bytes or not is_jetson(root):
        return cure
    return (
        f"the driver (NvMap) refuses it though {available / 1e6:,.0f} MB are available, "
        f"{free / 1e6:,.0f} of them free at once; give up the page cache with: sync && echo 1 | "
        "sudo tee /proc/sys/vm/drop_caches, and start again, or reboot, which joins free memory "
        "that lies in pieces; Jetson Linux 36.4.7 and later are reported to refuse more "
        f"(CVE-2025-33177); else {cure}"
    )


def is_fatal(reason: str) -> bool:
    """Whether the driver's sentence means that nothing works on the GPU any more."""
    return any(sign in reason for sign in _FATAL)


def is_out_of_memory(text: str) -> bool:
    """Whether CUDA or TensorRT says that memory is short, the GPU's or the host's."""
    return _NO_MEMORY.search(text) is not None


def reason_of(error: BaseException) -> str:
    """Return the driver's sentence, as ``cuFunction failed: sentence``."""
    return str(error).replace("\n", " ").strip() or type(error).__name__
