"""What goes around calls of TensorRT: who hears what it says, and Ctrl-C.

TensorRT keeps the first logger that it is given until no builder and no runtime is left, and calls
it for all of them, also after Python has freed it (NVIDIA/TensorRT#1475, #4134). So each TensorRT
has one logger, for as long as the process lives, and whoever calls TensorRT listens meanwhile.
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
    """Write a message to Python's log; an error comes back as an exception."""
    _log.log(logging.WARNING if severity == "warning" else logging.DEBUG, "%s", message)


class Listener:
    """Hears what TensorRT says to this thread within ``with``, and what its own threads say.

    Args:
        trt: the module ``tensorrt`` or ``tensorrt_rtx``.
        log: receives every message: severity (``error``, ``warning``, ``info``) and text; by
            default it goes to Python's log.

    Attributes:
        logger: what TensorRT is given.
        errors: the last ones.
        said: the last message that is no mere information; that CUDA does not start is a warning.
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
        """The last one in words."""
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
            # Whose call a thread of TensorRT's own works for is not known.
            heard = [own] if own else list(self.listeners.values())
            for hear in [each[-1].hear for each in heard if each] or [_write]:
                hear(name, message)

    return Logger()


@contextmanager
def stoppable() -> Iterator[threading.Event]:
    """Hold Ctrl-C back until the end of the block: TensorRT's bindings swallow an exception.

    A ``try`` in the logger would not do, since Python raises before it is entered.

    Yields:
        What Ctrl-C sets.
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
