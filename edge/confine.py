"""Confines this process for good: it can then only compute, and use what it has open.

A seccomp filter answers every other system call with EPERM. So no file is opened, no process or
thread started, no socket made and no signal sent, whatever the code in it tries. Linux on x86-64
and aarch64 only. Source: seccomp(2), linux/seccomp.h, linux/bpf_common.h and the tables of system
calls of Linux 6.1.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import struct
import sys

from edge.errors import ResourceError

_ALLOWED = {  # name: (number on x86-64, on aarch64)
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "fstat": (5, 80),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "nanosleep": (35, 101),
    "setitimer": (38, 103),  # clears the time limit of a finished task; RLIMIT_CPU stays
    "getpid": (39, 172),
    "exit": (60, 93),
    "gettimeofday": (96, 169),
    "getrusage": (98, 165),
    "sigaltstack": (131, 132),
    "futex": (202, 98),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "exit_group": (231, 94),
    "pselect6": (270, 72),  # time.sleep of Python 3.10
    "getrandom": (318, 278),
}
_MACHINES = {  # name: (AUDIT_ARCH_*, column of the table)
    "x86_64": (0xC000003E, 0),
    "aarch64": (0xC00000B7, 1),
}
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _MODE_FILTER = 38, 22, 2
_LOAD_WORD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
_NUMBER_AT, _MACHINE_AT = 0, 4  # in struct seccomp_data
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000


class _Program(ctypes.Structure):
    """``struct sock_fprog``."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def confine() -> None:
    """Confine this process; import everything it needs first, since no file opens afterwards.

    Raises:
        ResourceError: the kernel cannot confine a process.
    """
    machine = os.uname().machine
    if sys.platform != "linux" or machine not in _MACHINES:
        raise ResourceError(
            f"only Linux on {' or '.join(_MACHINES)} confines a process here, this is "
            f"{sys.platform} on {machine}"
        )
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    code = b"".join(struct.pack("=HBBI", *each) for each in _filter(*_MACHINES[machine]))
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    for option, value, third in (
        (_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero),
        (_PR_SET_SECCOMP, ctypes.c_ulong(_MODE_FILTER), ctypes.byref(program)),
    ):
        if libc.prctl(option, value, third, zero, zero) != 0:
            raise ResourceError(
                f"this kernel does not confine a process: {os.strerror(ctypes.get_errno())}; a "
                "container may forbid it (seccomp filters), another may not"
            )


def _filter(arch: int, column: int) -> list[tuple[int, int, int, int]]:
    """Return the filter's instructions: (code, jump if true, jump if false, constant)."""
    numbers = sorted(each[column] for each in _ALLOWED.values())
    count = len(numbers)
    return [
        (_LOAD_WORD, 0, 0, _MACHINE_AT),
        (_JUMP_EQUAL, 1, 0, arch),
        (_RETURN, 0, 0, _KILL),
        (_LOAD_WORD, 0, 0, _NUMBER_AT),
        *((_JUMP_EQUAL, count - at, 0, number) for at, number in enumerate(numbers)),
        (_RETURN, 0, 0, _REFUSE),
        (_RETURN, 0, 0, _ALLOW),
    ]
