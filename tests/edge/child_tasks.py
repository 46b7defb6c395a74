"""What `test_limited_child` lets a child do."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

ATTEMPTS = {
    "read": lambda: Path("/etc/hostname").read_bytes(),
    "write": lambda: Path("/tmp/edge-llm-escaped").write_bytes(b""),
    "list": lambda: list(Path("/").iterdir()),
    "socket": socket.socket,
    "fork": os.fork,
    "run": lambda: os.execv("/bin/true", ["true"]),
    "kill": lambda: os.kill(os.getppid(), 0),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}


def _attempt(name: str) -> bytes:
    try:
        ATTEMPTS[name]()
    except OSError as error:
        return type(error).__name__.encode()
    return b"done"


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
    if name == b"attempt":
        return _attempt(argument.decode())
    if name == b"put_off":  # what code that took the child over would do to stay
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, signal.NSIG))
        while True:
            pass
    if name == b"exit":
        os._exit(3)
    if name == b"print":
        sys.stdout.write("on standard output")
    if name == b"raise":
        raise ValueError(argument.decode())
    return b"done"
