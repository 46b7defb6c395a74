"""How a thread waits for the GPU: the scheduling flags of the primary context."""

from __future__ import annotations

from edge.device.process import count_usable_cpus
from edge.engine_config import GpuWait

from .bindings import Calls

_SCHEDULING = 7  # CU_CTX_SCHED_MASK of cuda.h
# CU_CTX_SCHED_SPIN, CU_CTX_SCHED_YIELD, CU_CTX_SCHED_BLOCKING_SYNC; 0 is CU_CTX_SCHED_AUTO.
_NAMES = {1: "spin", 2: "yield", 4: "block"}
_FLAGS = {name: flag for flag, name in _NAMES.items()}
_SPIN_FROM_CPUS = 4  # one that spins leaves three for requests, tokens and the system


def set_wait(calls: Calls, ordinal: int, wish: GpuWait) -> str:
    """Choose how threads wait for a GPU, whether its primary context is there already or not.

    All of a process share the context: the last wish by name counts, and ``auto`` lets stand what
    somebody else has chosen.

    Args:
        calls: cuda-bindings, after ``cuInit``.
        ordinal: number of the GPU.
        wish: see `EngineConfig.gpu_wait`.

    Returns:
        What holds now: ``spin``, ``yield``, ``block``, or ``driver`` where the driver chooses.

    Raises:
        Error: a call failed; drivers before CUDA 11 refuse to change a context that is there.
    """
    device = calls("cuDeviceGet", ordinal)
    flags, _ = calls("cuDevicePrimaryCtxGetState", device)
    if wish == "auto":
        if flags & _SCHEDULING:
            return _name(flags)
        # The driver would choose by a power profile on a Jetson, where it may block (cuda.h,
        # CU_CTX_SCHED_AUTO), and a wait that blocks ends an interrupt and a wake-up late.
        wish = "spin" if count_usable_cpus() >= _SPIN_FROM_CPUS else "yield"
    if flags & _SCHEDULING != _FLAGS[wish]:
        # It overwrites the flags of a context that is there, too (CUDA driver API 11 and later,
        # cuDevicePrimaryCtxSetFlags); those that say something else are kept.
        calls("cuDevicePrimaryCtxSetFlags", device, flags & ~_SCHEDULING | _FLAGS[wish])
        flags, _ = calls("cuDevicePrimaryCtxGetState", device)
    return _name(flags)


def _name(flags: int) -> str:
    return _NAMES.get(flags & _SCHEDULING, "driver")
