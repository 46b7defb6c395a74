"""The compiled kernels that come with the package, for the GPU that is here."""

from __future__ import annotations

import hashlib
import json
import lzma
from dataclasses import dataclass
from pathlib import Path

from edge.errors import DependencyError, IntegrityError

DATA = Path(__file__).parent / "data"
_TEGRA = (87, 110)
"""Of Jetsons, whose machine code runs there only (CUDA C++ Programming Guide, binary
compatibility: not between desktop and Tegra)."""
_EXACT = 90
"""From here on Triton compiles for one compute capability alone, ``sm_90a`` and so on, which no
other GPU runs (CUDA C++ Programming Guide, architecture-specific features)."""
_CURE = "install edge-llm again; in a checkout, scripts/kernels makes them"


@dataclass(frozen=True)
class Cubin:
    """A compiled kernel.

    Attributes:
        image: for ``cuModuleLoadData``.
        entry: name of the function in it.
        threads: of a program.
        shared_bytes: dynamic shared memory of a program.
        unused_parameters: pointers behind the kernel's own that must be passed, null.
    """

    image: bytes
    entry: str
    threads: int
    shared_bytes: int
    unused_parameters: int


def choose_architecture(compute_capability: str, there: list[int]) -> int:
    """Whose machine code a GPU runs: its own, or that of the nearest older one of its generation.

    Args:
        compute_capability: e.g. ``8.7``.
        there: compute capabilities times ten.

    Raises:
        DependencyError: none of them.
    """
    major, minor = map(int, compute_capability.split("."))
    wanted = major * 10 + minor
    if wanted in there:
        return wanted
    fitting = [each for each in there if each // 10 == major and each <= wanted < _EXACT]
    fitting = [each for each in fitting if each not in _TEGRA]
    if not fitting or wanted in _TEGRA:
        names = ", ".join(f"{each // 10}.{each % 10}" for each in there)
        raise DependencyError(
            f"edge-llm's own kernels are compiled for compute capabilities {names}; this GPU has "
            f"{compute_capability}, so TensorRT's are taken here"
        )
    return max(fitting)


def load_cubins(compute_capability: str, data: Path = DATA) -> dict[str, Cubin]:
    """All kernels for a GPU, by the names of their variants.

    Raises:
        DependencyError: there are none for this GPU.
        IntegrityError: the package's files are missing or damaged.
    """
    try:
        records = json.loads((data / "manifest.json").read_text("utf-8"))["architectures"]
        architecture = choose_architecture(compute_capability, sorted(map(int, records)))
        images = lzma.decompress((data / f"sm{architecture}.xz").read_bytes())
    except (OSError, ValueError, KeyError, lzma.LZMAError) as error:
        raise IntegrityError(
            f"the compiled kernels in {data} do not read: {error}; {_CURE}"
        ) from error
    found = {}
    for name, record in records[str(architecture)].items():
        image = images[record["offset"] : record["offset"] + record["bytes"]]
        if hashlib.sha256(image).hexdigest() != record["sha256"]:
            raise IntegrityError(
                f"the kernel {name} in {data / f'sm{architecture}.xz'} is damaged: its hash is not "
                f"that of the manifest; {_CURE}"
            )
        found[name] = Cubin(
            image,
            record["entry"],
            record["threads"],
            record["shared_bytes"],
            record["unused_parameters"],
        )
    return found
