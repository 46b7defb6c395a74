"""What `test_limited_child` lets a child do."""

from __future__ import annotations

import os
import signal
import sys
import time


def work(task: bytes) -> bytes:
    """Do what the task says: ``NAME ARGUMENT``."""
    name, _, argument = task.partition(b" ")
    if name == b"echo":
        return argument
    if name == b"pid":
        return str(os.getpid()).encode()
    if name == b"spin":
        while True:
            pass
    if name == b"compute":
        end_s = time.process_time() + float(argument)
        while time.process_time() < end_s:
            pass
    if name == b"sleep":
        time.sleep(float(argument))
    if name == b"take":
        return str(len(bytearray(int(argument)))).encode()
    if name == b"long":
        return bytes(int(argument))
    if name == b"abort":
        os.abort()
    if name == b"stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if name == b"exit":
        os._exit(3)
    if name == b"print":
        sys.stdout.write("on standard output")
    if name == b"raise":
        raise ValueError(argument.decode())
    return b"done"
