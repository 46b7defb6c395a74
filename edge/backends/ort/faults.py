"""Interprets failures of a device in ONNX Runtime's messages, and whether the device is lost."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from edge.errors import BackendError, DeviceError, DeviceMemoryError, EdgeError

_NO_MEMORY = re.compile(r"out of memory|[Ff]ailed to allocate memory|ALLOC_FAILED", re.IGNORECASE)
_DEVICE_FAILED = re.compile(r"\b(?:CUDA|CUBLAS|CUDNN) (?:failure|error)", re.IGNORECASE)
_NO_DEVICE = re.compile(r"\bCUDA failure (?:35|100)\b")  # the driver is too old; there is no GPU


def names_device(text: str) -> bool:
    """Whether a message is about a device that exists, not about one that cannot be used."""
    failed = _NO_MEMORY.search(text) or _DEVICE_FAILED.search(text)
    return failed is not None and _NO_DEVICE.search(text) is None


class DeviceFaults:
    """Turns ONNX Runtime's exceptions, which have many classes, into ours.

    Args:
        device: its name in messages.
        cache: size of its KV cache, for the message about too little memory.

    Attributes:
        lost: why the device cannot be used any more; None while it can.
    """

    def __init__(self, device: str, cache: str) -> None:
        self._device, self._cache = device, cache
        self.lost: str | None = None

    def check(self) -> None:
        """Refuse work on a lost device.

        Raises:
            DeviceError: the device is lost.
        """
        if self.lost is not None:
            raise DeviceError(
                f"{self._device} failed in an earlier step and cannot be used any more "
                f"({self.lost}); restart the process",
                fatal=True,
            )

    @contextlib.contextmanager
    def explain(self, when: str) -> Iterator[None]:
        """Raise one of our errors for any failure inside; ``when`` says what was being done."""
        try:
            yield
        except EdgeError:
            raise
        except Exception as error:
            raise self._error(error, when) from error

    def _error(self, error: Exception, when: str) -> EdgeError:
        text = str(error)
        if isinstance(error, MemoryError) or _NO_MEMORY.search(text):
            return DeviceMemoryError(
                f"{self._device} ran out of memory {when}; the KV cache alone takes {self._cache}: "
                f"use fewer slots, a smaller --kv-capacity or a smaller model, or end other "
                f"programs ({text})"
            )
        if _DEVICE_FAILED.search(text):
            # Errors of a CUDA context stay with it: every later call would fail, too.
            self.lost = f"{self._device} failed {when}: {text}"
            return DeviceError(
                f"{self.lost}; restart the process, and run edge-llm doctor if it happens again",
                fatal=True,
            )
        return BackendError(f"ONNX Runtime failed {when}: {text}")
