"""Defines every error that edge-llm raises on purpose.

::

    EdgeError                     exit code 70
      ConfigError                 a wrong option, recipe or parameter (also ValueError)       64
      RequestError                a wrong prompt, message or sampling parameter (ValueError)  65
        ContextLengthError        the prompt does not fit into the KV cache
      CheckpointError             a source model that cannot be exported                      65
      BundleError                 a bundle that is missing, incomplete or of another version  65
        IntegrityError            a file of the bundle differs from its recorded hash
      DependencyError             an optional library is missing or too old (ImportError)     69
      ResourceError               not enough disk, memory or CPU time                         71
        DeviceMemoryError         not enough memory of the GPU
      OverloadError               the queue is full; try again later                          75
      DeadlineError               a request did not finish in the time that it was given      75
      RegistryError               a registry cannot be reached or fails; try again later      75
      BackendError                the inference engine failed                                 70
        NonFiniteError            the model computed a NaN or an infinity
        DeviceError               the GPU or its driver failed
      BuildError                  TensorRT refused a graph or failed to build it              70
      GateError                   the result is not good enough                                3

Each message says what was wrong, what was found and what to do next. Exit codes are those of
BSD ``sysexits.h``, so that a service manager can tell a bad configuration (do not restart) from
a fault (restart).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

_DISTRIBUTION = "jetson-edge-llm"
EXIT_GATE_MISSED = 3
"""Exit code of a verb that worked but whose result misses a gate; not one of ``sysexits.h``."""


class EdgeError(Exception):
    """Base of every error raised on purpose.

    Its first argument is the message; others are facts for the program that catches it.
    """

    exit_code: ClassVar[int] = 70

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class ConfigError(EdgeError, ValueError):
    """An option, recipe or parameter is wrong."""

    exit_code = 64


class RequestError(EdgeError, ValueError):
    """A prompt, a message or a sampling parameter is wrong."""

    exit_code = 65


class ContextLengthError(RequestError):
    """The prompt does not fit into the KV cache.

    Attributes:
        num_tokens: tokens of the prompt.
        capacity: tokens that fit.
        at_least: whether the prompt was not encoded, and may have more than ``num_tokens``.
    """

    def __init__(self, num_tokens: int, capacity: int, at_least: bool = False) -> None:
        super().__init__(num_tokens, capacity, at_least)  # pickle and copy rebuild it from args
        self.num_tokens = num_tokens
        self.capacity = capacity
        self.at_least = at_least

    def __str__(self) -> str:
        return (
            f"the prompt has {self.num_tokens} tokens{' or more' if self.at_least else ''}, but "
            f"the KV cache holds {self.capacity} and "
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
    """Disk space, memory or CPU time does not suffice."""

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
        super().__init__(message, retry_after_s)  # pickle and copy rebuild it from args
        self.retry_after_s = retry_after_s


class DeadlineError(EdgeError):
    """A request did not finish in the time that it was given."""

    exit_code = 75


class RegistryError(EdgeError):
    """A registry cannot be reached or fails; what has arrived is kept."""

    exit_code = 75


class BackendError(EdgeError):
    """The inference engine failed."""


class NonFiniteError(BackendError):
    """The model computed a NaN or an infinity."""


class DeviceError(BackendError):
    """The GPU or its driver failed.

    Attributes:
        fatal: whether nothing works on the GPU any more until the process is restarted.
    """

    def __init__(self, message: str, fatal: bool = False) -> None:
        super().__init__(message, fatal)  # pickle and copy rebuild it from args
        self.fatal = fatal


class BuildError(EdgeError):
    """TensorRT refused a graph, or failed to build an engine of it.

    Attributes:
        cause: equal for refusals of one kind, wherever in a graph they are; empty if unknown.
    """

    def __init__(self, message: str, cause: str = "") -> None:
        super().__init__(message, cause)  # pickle and copy rebuild it from args
        self.cause = cause


class GateError(EdgeError):
    """The finished bundle misses a threshold of its gate.

    Attributes:
        figures: everything that was measured, as ``edge-llm eval --json`` prints it.
    """

    exit_code = EXIT_GATE_MISSED

    def __init__(self, message: str, figures: dict[str, Any]) -> None:
        super().__init__(message, figures)  # pickle and copy rebuild it from args
        self.figures = figures


def install_command(extra: str) -> str:
    """Return the command that installs the requirements of an extra.

    The project is on no package index, where anyone could take its name and run code here. So a
    checkout is installed by its path; elsewhere the extra's own requirements are named.

    Args:
        extra: one of ``optional-dependencies`` in ``pyproject.toml``.
    """
    import shlex  # imported here, since it is only needed when something is missing

    root = Path(__file__).resolve().parent.parent
    if _is_checkout(root):
        return f"{_pip_install()} -e {shlex.quote(f'{root}[{extra}]')}"
    requirements = _requirements(extra)
    if not requirements:
        return f"{_pip_install()} '.[{extra}]' (in a checkout of edge-llm)"
    return f"{_pip_install()} {' '.join(map(shlex.quote, requirements))}"


def _is_checkout(root: Path) -> bool:
    try:
        return f'name = "{_DISTRIBUTION}"' in (root / "pyproject.toml").read_text("utf-8")
    except OSError:
        return False


def _requirements(extra: str) -> list[str]:
    """Read the extra's requirements from the installed distribution, if it is installed."""
    import re
    from importlib import metadata

    try:
        lines = metadata.requires(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []
    found = []
    for line in lines:
        requirement, _, marker = line.partition(";")
        if not re.search(rf"extra == ['\"]{extra}['\"]", marker):
            continue
        asked = re.search(r"python_version (<|>=) ['\"]3\.(\d+)['\"]", marker)
        if asked is None or (sys.version_info < (3, int(asked[2]))) == (asked[1] == "<"):
            found.append(requirement.strip())
    return found


def _pip_install() -> str:
    """Return the command that installs for this very Python: pip on the path may be another's."""
    import shlex
    import shutil
    from importlib.util import find_spec

    if shutil.which("pip") == str(Path(sys.executable).with_name("pip")):
        return "pip install"
    if find_spec("pip") is None and shutil.which("uv"):  # environments made by uv lack pip
        return f"uv pip install --python {shlex.quote(sys.executable)}"
    return f"{shlex.quote(sys.executable)} -m pip install"
