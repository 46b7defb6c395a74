"""Sets how a thread waits for the GPU: the scheduling flags of the primary context."""

from __future__ import annotations

from edge.device.process import count_usable_cpus
from edge.engine_config import GpuWait

from .bindings import Calls

_SCHEDULING = 7  # CU_CTX_SCHED_MASK of cuda.h
# CU_CTX_SCHED_SPIN, CU_CTX_SCHED_YIELD, CU_CTX_SCHED_BLOCKING_SYNC; 0 is CU_CTX_SCHED_AUTO.
_NAMES = {1: "spin", 2: "yield", 4: "block"}
_FLAGS = {name: flag for flag, name in _NAMES.items()}
_SPIN_FROM_CPUS = 4  # a spinning thread leaves three for requests, tokens and the system


def set_wait(calls: Calls, ordinal: int, wish: GpuWait) -> str:
    """Choose how threads wait for a GPU, whether its primary context exists already or not.

    All threads of a process share the context. The last explicit wish counts; ``auto`` keeps what
    somebody else has chosen.

    Args:
        calls: cuda-bindings, after ``cuInit``.
        ordinal: number of the GPU.
        wish: the mode, as `EngineConfig.gpu_wait`.

    Returns:
        The mode now: ``spin``, ``yield``, ``block``, or ``driver`` if the driver chooses.

    Raises:
        Error: a call failed; drivers before CUDA 11 refuse to change an existing context.
    """
    device = calls("cuDeviceGet", ordinal)
    flags, _ = calls("cuDevicePrimaryCtxGetState", device)
    if wish == "auto":
        if flags & _SCHEDULING:
            return _name(flags)
        # The driver would choose by a power profile on a Jetson, where it may block (cuda.h,
        # CU_CTX_SCHED_AUTO), and a blocking wait ends an interrupt and a wake-up late.
        wish = "spin" if count_usable_cpus() >= _SPIN_FROM_CPUS else "yield"
    if flags & _SCHEDULING != _FLAGS[wish]:
        # This also overwrites the flags of an existing context (CUDA driver API 11 and later,
        # cuDevicePrimaryCtxSetFlags); flags of other kinds are kept.
        calls("cuDevicePrimaryCtxSetFlags", device, flags & ~_SCHEDULING | _FLAGS[wish])
        flags, _ = calls("cuDevicePrimaryCtxGetState", device)
    return _name(flags)


def _name(flags: int) -> str:
    return _NAMES.get(flags & _SCHEDULING, "driver")
