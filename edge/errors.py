"""Every error that edge-llm raises on purpose.

::

    EdgeError                     exit code 70
      ConfigError                 a wrong option, recipe or parameter (also ValueError)       64
      RequestError                a wrong prompt, message or sampling parameter (ValueError)  65
        ContextLengthError        the prompt does not fit into the KV cache
      CheckpointError             a source model that cannot be exported                      65
      BundleError                 a bundle that is missing, incomplete or of another version  65
        IntegrityError            a file of the bundle differs from its recorded hash
      DependencyError             an optional library is missing or too old (ImportError)     69
      ResourceError               not enough disk or memory                                   71
        DeviceMemoryError         not enough memory of the GPU
      OverloadError               the queue is full; try again later                          75
      DeadlineError               a request did not finish in the time that it was given      75
      BackendError                the inference engine failed                                 70
        DeviceError               the GPU or its driver failed
      BuildError                  TensorRT refused a graph or failed to build it              70

Each message says what was wrong, what was found and what to do next. Exit codes are those of
BSD ``sysexits.h``, so that a service manager can tell a bad configuration (do not restart) from
a fault (restart).
"""

from __future__ import annotations

from typing import ClassVar


class EdgeError(Exception):
    """Base of every error raised on purpose."""

    exit_code: ClassVar[int] = 70


class ConfigError(EdgeError, ValueError):
    """An option, recipe or parameter is wrong."""

    exit_code = 64


class RequestError(EdgeError, ValueError):
    """A prompt, a message or a sampling parameter is wrong."""

    exit_code = 65


class ContextLengthError(RequestError):
    """The prompt does not fit into the KV cache.

    Attributes:
        num_tokens: tokens that were given.
        capacity: tokens that fit.
    """

    def __init__(self, num_tokens: int, capacity: int) -> None:
        super().__init__(num_tokens, capacity)  # pickle and copy rebuild it from these
        self.num_tokens = num_tokens
        self.capacity = capacity

    def __str__(self) -> str:
        return (
            f"the prompt has {self.num_tokens} tokens, but the KV cache holds {self.capacity} and "
            "one must be left for the answer; shorten the prompt or load with a larger "
            "--kv-capacity"
        )


class CheckpointError(EdgeError):
    """A source model cannot be exported."""

    exit_code = 65


class BundleError(EdgeError):
    """A bundle is missing, incomplete or written by another version."""

    exit_code = 65


class IntegrityError(BundleError):
    """A file of a bundle differs from the size or hash in its manifest."""


class DependencyError(EdgeError, ImportError):
    """An optional library is missing or too old."""

    exit_code = 69


class ResourceError(EdgeError):
    """Disk space or memory does not suffice."""

    exit_code = 71


class DeviceMemoryError(ResourceError):
    """The GPU has too little free memory."""


class OverloadError(EdgeError):
    """The queue of the scheduler is full, or the scheduler takes no more requests.

    Attributes:
        retry_after_s: seconds after which a place is likely to be free.
    """

    exit_code = 75

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s)  # pickle and copy rebuild it from these
        self.message = message
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


class DeadlineError(EdgeError):
    """A request did not finish in the time that it was given."""

    exit_code = 75


class BackendError(EdgeError):
    """The inference engine failed."""


class DeviceError(BackendError):
    """The GPU or its driver failed.

    Attributes:
        fatal: nothing works on the GPU any more until the process starts anew.
    """

    def __init__(self, message: str, fatal: bool = False) -> None:
        super().__init__(message, fatal)  # pickle and copy rebuild it from these
        self.message = message
        self.fatal = fatal

    def __str__(self) -> str:
        return self.message


class BuildError(EdgeError):
    """TensorRT refused a graph, or failed to build an engine of it."""
