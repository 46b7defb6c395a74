"""Which TensorRT takes a graph, and which takes own kernels; nothing of it is imported."""

from __future__ import annotations

from edge.bundle import io_spec
from edge.bundle.engine_file import Flavour, KvRead, where_tensorrt_is_from
from edge.bundle.manifest import Dialect
from edge.errors import ConfigError, DependencyError

_RTX_MINIMUM = (1, 3)
LENGTHS_SINCE = (11, 0)
_OWN_KERNELS_SINCE = (8, 0)  # compute capability: that of the PTX


def parse_release(version: str) -> tuple[int, int]:
    """Major and minor of ``10.16.2.10``.

    Raises:
        ConfigError: not a version.
    """
    parts = version.split(".")
    try:
        return int(parts[0]), int(parts[1])
    except (IndexError, ValueError) as error:
        raise ConfigError(f"{version!r} is not a TensorRT version such as 10.3 or 11.4") from error


def check_support(
    flavour: Flavour, version: str, dialect: Dialect, kv_read: KvRead = "slice"
) -> None:
    """Check that a TensorRT takes a graph; pure, so that another machine's can be asked about.

    Raises:
        DependencyError: it is too old for the dialect or for the way to read the cache.
    """
    found = parse_release(version)
    if flavour == "tensorrt-rtx":
        if found < _RTX_MINIMUM:
            raise DependencyError(
                f"TensorRT for RTX {version} is too old: {_RTX_MINIMUM[0]}.{_RTX_MINIMUM[1]} or "
                f"newer is needed; {where_tensorrt_is_from(flavour)}"
            )
        return
    needed = io_spec.DIALECTS[dialect].min_tensorrt
    if found < needed:
        advice = (
            "export with --dialect portable, which JetPack 6 (TensorRT 10.3) takes, or upgrade to "
            "JetPack 7.2"
            if dialect == "native" and found >= io_spec.DIALECTS["portable"].min_tensorrt
            else "upgrade to JetPack 6.1 or newer"
        )
        raise DependencyError(
            f"dialect {dialect} needs TensorRT >= {needed[0]}.{needed[1]}, found {version}; "
            f"{advice}"
        )
    if kv_read == "lengths" and found < LENGTHS_SINCE:
        raise DependencyError(
            f"--kv-read lengths needs TensorRT >= 11.0, found {version}; leave it out"
        )


def check_own_kernels(flavour: Flavour, version: str, compute_capability: str) -> None:
    """Check that a TensorRT takes own kernels, and that a GPU runs them.

    The oldest TensorRT is the oldest whose bindings our plugin is held against
    (`scripts/trt-bindings`).

    Raises:
        DependencyError: it does not.
    """
    instead = "build with --kernels tensorrt"
    if flavour == "tensorrt-rtx":
        raise DependencyError(
            f"own kernels are plugins, and TensorRT for RTX {version} has none; {instead}, or with "
            f"TensorRT: {where_tensorrt_is_from('tensorrt')}"
        )
    needed = io_spec.DIALECTS["portable"].min_tensorrt
    if parse_release(version) < needed:
        raise DependencyError(
            f"own kernels need TensorRT >= {needed[0]}.{needed[1]}, found {version}; {instead}, or "
            "upgrade to JetPack 6.1 or newer"
        )
    major, minor = map(int, compute_capability.split("."))
    if (major, minor) < _OWN_KERNELS_SINCE:
        raise DependencyError(
            f"own kernels need a GPU of compute capability 8.0 or newer, this one has "
            f"{compute_capability}; {instead}"
        )
