"""Says which TensorRT takes which graph and own kernels, without importing TensorRT."""

from __future__ import annotations

from edge.bundle import io_spec
from edge.bundle.engine_file import Flavour, KvRead, where_tensorrt_is_from
from edge.bundle.manifest import Dialect
from edge.errors import ConfigError, DependencyError

_RTX_MINIMUM = (1, 3)
LENGTHS_SINCE = (11, 0)
_OWN_KERNELS_SINCE = (8, 0)  # the compute capability that the PTX is for


def parse_release(version: str) -> tuple[int, int]:
    """Parse major and minor version from a text such as ``10.16.2.10``.

    Raises:
        ConfigError: the text is not a version.
    """
    parts = version.split(".")
    try:
        return int(parts[0]), int(parts[1])
    except (IndexError, ValueError) as error:
        raise ConfigError(f"{version!r} is not a TensorRT version such as 10.3 or 11.4") from error


def check_support(
    flavour: Flavour, version: str, dialect: Dialect, kv_read: KvRead = "slice"
) -> None:
    """Check that a TensorRT takes a graph; it need not be this machine's.

    Raises:
        DependencyError: it is too old for the dialect or for this way to read the cache.
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
    """Check that a TensorRT can use own kernels, and that a GPU can run them.

    The oldest TensorRT allowed is the oldest whose bindings our plugin is checked against
    (`tools/trt-bindings`).

    Raises:
        DependencyError: this TensorRT or GPU cannot.
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
