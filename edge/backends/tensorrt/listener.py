"""Wraps calls of TensorRT: directs its messages to the caller, and holds Ctrl-C back.

TensorRT keeps the first logger that it is given until no builder and no runtime is left. It calls
that logger for all of them, even after Python has freed it (NVIDIA/TensorRT#1475, #4134). So each
TensorRT has one logger for the whole life of the process, and whoever calls TensorRT listens to it
meanwhile.
"""

from __future__ import annotations

import functools
import logging
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_log = logging.getLogger(__name__)


def _write(severity: str, message: str) -> None:
    """Write a message to Python's log; errors are raised elsewhere as exceptions."""
    _log.log(logging.WARNING if severity == "warning" else logging.DEBUG, "%s", message)


class Listener:
    """Hears TensorRT's messages to this thread within ``with``, and those of its own threads.

    Args:
        trt: the module ``tensorrt`` or ``tensorrt_rtx``.
        log: receives every message: severity (``error``, ``warning``, ``info``) and text; by
            default it goes to Python's log.

    Attributes:
        logger: the logger to give to TensorRT.
        errors: the last errors.
        said: the last message above ``info``; that CUDA does not start is only a warning.
    """

    def __init__(self, trt: Any, log: Callable[[str, str], None] = _write) -> None:
        self.logger = _logger_of(trt)
        self.errors: deque[str] = deque(maxlen=4)
        self.said = ""
        self._log = log

    def __enter__(self) -> Listener:
        self.logger.listeners.setdefault(threading.get_ident(), []).append(self)
        return self

    def __exit__(self, *_error: object) -> None:
        thread = threading.get_ident()
        del self.logger.listeners[thread][-1]
        if not self.logger.listeners[thread]:
            del self.logger.listeners[thread]

    @property
    def last_error(self) -> str:
        """Return the last error as text."""
        return self.errors[-1] if self.errors else "it gave no reason"

    def hear(self, severity: str, message: str) -> None:
        """Take a message."""
        if severity != "info":
            self.said = message.strip()
        if severity == "error":
            self.errors.append(message.strip())
        self._log(severity, message)


@functools.cache
def _logger_of(trt: Any) -> Any:
    severity = trt.ILogger.Severity
    names = {
        severity.INTERNAL_ERROR: "error",
        severity.ERROR: "error",
        severity.WARNING: "warning",
        severity.INFO: "info",
    }

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.listeners: dict[int, list[Listener]] = {}  # by thread, the innermost last

        def log(self, level: Any, message: str) -> None:
            name = names.get(level)
            if name is None:
                return
            own = self.listeners.get(threading.get_ident())
            # It is unknown for whose call a thread of TensorRT's own works.
            heard = [own] if own else list(self.listeners.values())
            for hear in [each[-1].hear for each in heard if each] or [_write]:
                hear(name, message)

    return Logger()


@contextmanager
def stoppable() -> Iterator[threading.Event]:
    """Hold Ctrl-C back until the end of the block: TensorRT's bindings swallow an exception.

    A ``try`` in the logger would not suffice, since Python may raise before it is entered.

    Yields:
        An event that Ctrl-C sets.
    """
    stopped = threading.Event()
    old = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(old):
        yield stopped
        return
    signal.signal(signal.SIGINT, lambda *_: stopped.set())
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, old)
        if stopped.is_set():
            signal.raise_signal(signal.SIGINT)
