"""Compiles the kernels of `engines.kernels` with Triton, and checks the result against its gates.

``engines/kernels/data`` gets a compressed archive of cubins per architecture, one of the PTX that
TensorRT takes, and ``manifest.json``. The same sources and the same Triton give the same bytes:
paths and line numbers are left out.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import hashlib
import importlib
import itertools
import json
import lzma
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from engines.kernels.variants import ARCHITECTURES, BY_NAME, VARIANTS, Variant

from .sass import find_problems, read_sass, render

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "engines/kernels/data"
INTERPRETER_TESTS = "tests/engines/kernels/test_interpreter.py"
MANIFEST = "manifest.json"
GATED = 87
PTX_TARGET, PTX_VERSION = 80, 80
"""Target and version of the PTX for TensorRT: every GPU from 8.0 on, every CUDA from 12.0 on."""
_UNUSED = 2
PortablePtx = tuple[str, int]
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


def compile_variant(
    variant: Variant, architecture: int, portable: Mapping[str, PortablePtx]
) -> tuple[bytes, dict[str, Any], str]:
    """Compile one kernel.

    Args:
        variant: the kernel's variant.
        architecture: the GPU to compile for.
        portable: results of `compile_portable`, by name.

    Returns:
        Its cubin, its record for the manifest, and its machine code as text.
    """
    ptx, shared_bytes = portable[variant.name]
    # Use the assembler that Triton takes: the older one does not know the PTX of newer GPUs.
    cubin, said = assemble(ptx, f"sm_{architecture}", newer=architecture >= 90)
    sass = _disassemble(cubin) if architecture == GATED else ""
    spills, registers = _SPILLS.search(said), _REGISTERS.search(said)
    assert spills is not None
    assert registers is not None
    record = {
        "sha256": hashlib.sha256(cubin).hexdigest(),
        "bytes": len(cubin),
        "entry": variant.name,
        "threads": variant.warps * 32,
        "shared_bytes": shared_bytes,
        "registers": int(registers[1]),
        "spilled_bytes": int(spills[1]) + int(spills[2]),
    }
    return cubin, record, sass


def compile_portable(variant: Variant) -> PortablePtx:
    """Return the PTX of a kernel, and its shared memory in bytes."""
    compiled = _compile(variant)
    return make_portable(compiled.asm["ptx"], variant), compiled.metadata.shared


def make_portable(ptx: str, variant: Variant) -> str:
    """Keep only the variant's parameters, and name the entry after it.

    Args:
        ptx: PTX from Triton, which adds two pointers for scratch memory.
        variant: the variant that was compiled.

    Raises:
        RuntimeError: the kernel uses the pointers, or the PTX has another version or target.
    """
    names = _parameters(ptx)
    unused = names[len(variant.parameters) :]
    head = (
        f".version {PTX_VERSION // 10}.{PTX_VERSION % 10}\n"
        f".target sm_{PTX_TARGET}\n.address_size 64\n"
    )
    if len(unused) != _UNUSED or head not in ptx:
        raise RuntimeError(f"{variant.name}: other PTX than expected: {ptx[:2000]}")
    for name in unused:
        ptx, dropped = re.subn(rf",\s*\.param [^,()]*\b{name}\b", "", ptx)
        if dropped != 1 or re.search(rf"\b{name}\b", ptx):
            raise RuntimeError(f"{variant.name}: the kernel uses scratch memory, {name}")
    # Comments are useless, and name the function again.
    ptx = re.sub(r"[ \t]*//.*", "", ptx)
    ptx = re.sub(rf"\b{variant.function}(?=\b|_param_)", variant.name, ptx)
    return re.sub(r"\n{2,}", "\n", ptx).strip() + "\n"


def _parameters(ptx: str) -> list[str]:
    """Return the names of the entry's parameters, in order."""
    (head,) = re.findall(r"\.entry \w+\(([^)]*)\)", ptx)
    return re.findall(r"\.param [^,]*?(\w+)\s*(?:,|$)", head)


def assemble(ptx: str, target: str, *, newer: bool) -> tuple[bytes, str]:
    """Assemble PTX, by the older or the newer of the two assemblers that Triton has.

    Returns:
        The cubin, and the assembler's report on registers and spills.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "kernel.ptx")
        path.write_text(ptx)
        tool = _tools() / ("ptxas-blackwell" if newer else "ptxas")
        said = _output(tool, "-v", f"-arch={target}", path, "-o", path.with_suffix(".cubin"))
        return path.with_suffix(".cubin").read_bytes(), said


def _disassemble(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "kernel.cubin")
        path.write_bytes(cubin)
        return _output(_tools() / "nvdisasm", "-c", path)


def _tools() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin"


def _compile(variant: Variant) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = importlib.import_module(f"engines.kernels.sources.{variant.source}")
    names = [*variant.parameters, *variant.constants]
    kinds = dict(variant.parameters) | dict.fromkeys(variant.constants, "constexpr")
    aligned = [
        at
        for at, name in enumerate(names)
        if kinds[name].startswith("*") or name in variant.aligned
    ]
    return triton.compile(
        ASTSource(
            getattr(source, variant.function),
            kinds,
            constexprs={(names.index(name),): value for name, value in variant.constants.items()},
            attrs={(at,): [["tt.divisibility", 16]] for at in aligned},
        ),
        target=GPUTarget("cuda", PTX_TARGET, 32),
        options={
            "num_warps": variant.warps,
            "num_stages": variant.stages,
            "ptx_version": PTX_VERSION,
        },
    )


def _output(*command: Any) -> str:
    done = subprocess.run(
        [str(each) for each in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed: {done.stdout.strip()}")
    return done.stdout


def compile_architecture(
    architecture: int, portable: Mapping[str, PortablePtx]
) -> tuple[int, dict[str, Any], bytes, dict[str, str]]:
    """Compile all kernels: their records, their cubins one after the other, the machine code."""
    records: dict[str, Any] = {}
    images: list[bytes] = []
    sasses: dict[str, str] = {}
    for variant in VARIANTS:
        cubin, record, sass = compile_variant(variant, architecture, portable)
        record["offset"] = sum(len(image) for image in images)
        images.append(cubin)
        records[variant.name] = record
        if sass:
            sasses[variant.name] = sass
    return architecture, records, b"".join(images), sasses


def record_ptx(portable: Mapping[str, PortablePtx]) -> tuple[dict[str, Any], bytes]:
    """Return the manifest's record of the PTX, and all of it, one after the other."""
    records: dict[str, Any] = {}
    everything = b""
    for name, (ptx, shared_bytes) in portable.items():
        text = ptx.encode("ascii")
        records[name] = {
            "sha256": hashlib.sha256(text).hexdigest(),
            "bytes": len(text),
            "offset": len(everything),
            "entry": name,
            "threads": BY_NAME[name].warps * 32,
            "shared_bytes": shared_bytes,
        }
        everything += text
    return records, everything


def find_ptx_problems(name: str, ptx: str) -> list[str]:
    """List an assembler's complaints about a kernel that made none of the package's cubins.

    A driver has its own assembler, older or newer: CUDA 12 on JetPack 6, CUDA 13 on JetPack 7.
    """
    problems = []
    for architecture, newer in ((87, True), (90, False)):
        _, said = assemble(ptx, f"sm_{architecture}", newer=newer)
        spills = _SPILLS.search(said)
        assert spills is not None
        if architecture == GATED and spills.groups() != ("0", "0"):
            problems.append(f"sm_{architecture} {name}: the newer assembler spills, {spills[0]}")
    return problems


def compile_all(
    architectures: Iterable[int], processes: int
) -> tuple[dict[str, Any], dict[str, bytes], dict[str, str], list[str]]:
    """Return the manifest, the content of each archive, the gated machine code, and problems."""
    import triton

    manifest: dict[str, Any] = {"triton": triton.__version__, "architectures": {}}
    images: dict[str, bytes] = {}
    sasses: dict[str, str] = {}
    names = [variant.name for variant in VARIANTS]
    # The compiler holds the process, so threads would wait for one another.
    with concurrent.futures.ProcessPoolExecutor(processes) as pool:
        made = pool.map(compile_portable, (BY_NAME[name] for name in names))
        portable = dict(zip(names, made, strict=True))
        manifest["ptx"], images["ptx"] = record_ptx(portable)
        compile_one = functools.partial(compile_architecture, portable=portable)
        for architecture, records, image, sass in pool.map(compile_one, architectures):
            manifest["architectures"][str(architecture)] = records
            images[f"sm{architecture}"] = image
            sasses.update(sass)
            print(f"sm_{architecture}: {len(records)} kernels, {len(image)} bytes", file=sys.stderr)
        problems = pool.map(find_ptx_problems, names, (portable[name][0] for name in names))
        return manifest, images, sasses, list(itertools.chain(*problems))


def compare(manifest: dict[str, Any], images: dict[str, bytes], data: Path) -> list[str]:
    """Say in a sentence each how the compiled files differ from the package data."""
    try:
        kept = json.loads((data / MANIFEST).read_text("utf-8"))
    except OSError as error:
        return [f"there is no manifest: {error}"]
    problems = []
    if kept["triton"] != manifest["triton"]:
        problems.append(f"made by Triton {kept['triton']}, and this is {manifest['triton']}")
    before, now = _records(kept), _records(manifest)
    problems += [
        f"{' '.join(place)}: the manifest says {before.get(place)}, this is {now.get(place)}"
        for place in sorted(before.keys() | now.keys())
        if before.get(place) != now.get(place)
    ]
    for name, image in images.items():
        path = data / f"{name}.xz"
        if not path.is_file() or lzma.decompress(path.read_bytes()) != image:
            problems.append(f"{path.name}: other bytes")
    return problems


def _records(manifest: dict[str, Any]) -> dict[tuple[str, str], Any]:
    """Return the records by archive and kernel."""
    archives = {f"sm{name}": records for name, records in manifest["architectures"].items()}
    archives["ptx"] = manifest.get("ptx", {})
    return {
        (archive, kernel): record
        for archive, records in archives.items()
        for kernel, record in records.items()
    }


def main(arguments: list[str] | None = None) -> int:
    """Compile, and write or compare; return 1 if a gate or the comparison fails."""
    parser = argparse.ArgumentParser("python3 -m tools kernels", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    options = parser.parse_args(arguments)
    if options.check:
        os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # and take nothing from the cache
    manifest, images, sasses, problems = compile_all(ARCHITECTURES, os.cpu_count() or 1)
    gated = manifest["architectures"][str(GATED)]
    found = {name: read_sass(sass) for name, sass in sasses.items()}
    print(render(gated, found))
    problems += find_problems(manifest, found)
    if options.check:
        problems += compare(manifest, images, DATA)
    elif not problems:
        DATA.mkdir(exist_ok=True)
        for old in DATA.glob("*.xz"):
            old.unlink()
        for name, image in images.items():
            (DATA / f"{name}.xz").write_bytes(lzma.compress(image, preset=9))
        (DATA / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems or not options.check:
        return int(bool(problems))
    # Without conftest.py, which needs all of the product's libraries.
    pytest = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-q"]
    return subprocess.run([*pytest, INTERPRETER_TESTS], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
