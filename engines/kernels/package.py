"""Loads the compiled kernels that come with the package for the GPU that is here."""

from __future__ import annotations

import hashlib
import json
import lzma
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge.errors import DependencyError, IntegrityError

DATA = Path(__file__).parent / "data"
_TEGRA = (87, 110)
"""Compute capabilities, times ten, of Jetsons. Their machine code runs on Jetsons only (CUDA C++
Programming Guide, binary compatibility: not between desktop and Tegra)."""
_CURE = "install edge-llm again; in a checkout, python3 -m tools kernels makes them"


@dataclass(frozen=True)
class Cubin:
    """A compiled kernel.

    Attributes:
        image: bytes for ``cuModuleLoadData``.
        entry: name of the kernel's function in the image.
        threads: threads per program.
        shared_bytes: dynamic shared memory of a program.
    """

    image: bytes
    entry: str
    threads: int
    shared_bytes: int


@dataclass(frozen=True)
class Ptx:
    """A kernel as PTX for compute capability 8.0, which every later GPU compiles for itself.

    Its parameters are exactly those of its variant, since an ahead-of-time plugin of TensorRT
    passes no others.

    Attributes:
        text: the PTX module.
        entry: name of the only function in the module.
        threads: threads per program.
        shared_bytes: dynamic shared memory of a program.
    """

    text: str
    entry: str
    threads: int
    shared_bytes: int


def choose_architecture(compute_capability: str, there: list[int]) -> int:
    """Choose the machine code for a GPU: its own, else the nearest older one of its generation.

    Args:
        compute_capability: the GPU's compute capability, e.g. ``8.7``.
        there: compute capabilities that have machine code, times ten.

    Raises:
        DependencyError: the GPU runs none of them.
    """
    major, minor = map(int, compute_capability.split("."))
    wanted = major * 10 + minor
    if wanted in there:
        return wanted
    fitting = [each for each in there if each // 10 == major and each <= wanted]
    fitting = [each for each in fitting if each not in _TEGRA]
    if not fitting or wanted in _TEGRA:
        names = ", ".join(f"{each // 10}.{each % 10}" for each in there)
        raise DependencyError(
            f"edge-llm's own kernels are compiled for compute capabilities {names}; this GPU has "
            f"{compute_capability}, so TensorRT's are taken here"
        )
    return max(fitting)


def load_cubins(compute_capability: str, data: Path = DATA) -> dict[str, Cubin]:
    """Load all kernels for a GPU, by the names of their variants.

    Raises:
        DependencyError: there are none for this GPU.
        IntegrityError: the package's files are missing or damaged.
    """
    everything = _read_records(data)["architectures"]
    architecture = choose_architecture(compute_capability, sorted(map(int, everything)))
    records = everything[str(architecture)]
    return {
        name: Cubin(
            image,
            records[name]["entry"],
            records[name]["threads"],
            records[name]["shared_bytes"],
        )
        for name, image in _read_images(data / f"sm{architecture}.xz", records).items()
    }


def load_ptx(data: Path = DATA) -> dict[str, Ptx]:
    """Load the kernels that TensorRT compiles into an engine, by the names of their variants.

    Raises:
        IntegrityError: the package's files are missing or damaged.
    """
    records = _read_records(data)["ptx"]
    return {
        name: Ptx(
            image.decode("ascii"),
            records[name]["entry"],
            records[name]["threads"],
            records[name]["shared_bytes"],
        )
        for name, image in _read_images(data / "ptx.xz", records).items()
    }


def _read_records(data: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((data / "manifest.json").read_text("utf-8"))
        return {part: manifest[part] for part in ("architectures", "ptx")}
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(data, error) from error


def _read_images(path: Path, records: dict[str, Any]) -> dict[str, bytes]:
    try:
        everything = lzma.decompress(path.read_bytes())
    except (OSError, lzma.LZMAError) as error:
        raise _unreadable(path.parent, error) from error
    images = {}
    for name, record in records.items():
        image = everything[record["offset"] : record["offset"] + record["bytes"]]
        if hashlib.sha256(image).hexdigest() != record["sha256"]:
            raise IntegrityError(
                f"the kernel {name} in {path} is damaged: its hash is not that of the manifest; "
                f"{_CURE}"
            )
        images[name] = image
    return images


def _unreadable(data: Path, error: Exception) -> IntegrityError:
    return IntegrityError(f"the compiled kernels in {data} do not read: {error}; {_CURE}")
