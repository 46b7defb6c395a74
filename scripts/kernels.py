"""Compiles the kernels of `engines.kernels` with Triton, and holds what came out to its gates.

``engines/kernels/data`` gets a compressed archive of cubins per architecture and
``manifest.json``. Same sources, same Triton, same bytes: paths and line numbers are left out.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import importlib
import json
import lzma
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engines.kernels.variants import ARCHITECTURES, VARIANTS, Variant
from scripts.kernel_sass import find_problems, read_sass, render

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "engines/kernels/data"
MANIFEST = "manifest.json"
GATED = 87
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


def compile_variant(variant: Variant, architecture: int) -> tuple[bytes, dict[str, Any], str]:
    """Compile one kernel.

    Returns:
        Its cubin, what the manifest says of it, and its machine code as text.
    """
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
    compiled = triton.compile(
        ASTSource(
            getattr(source, variant.function),
            kinds,
            constexprs={(names.index(name),): value for name, value in variant.constants.items()},
            attrs={(at,): [["tt.divisibility", 16]] for at in aligned},
        ),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": variant.warps, "num_stages": variant.stages},
    )
    cubin: bytes = compiled.asm["cubin"]
    ptx: str = compiled.asm["ptx"]
    parameters = len(re.findall(r"^\s*\.param ", ptx.split(")", 1)[0], re.MULTILINE))
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "kernel")
        path.with_suffix(".ptx").write_text(ptx)
        path.with_suffix(".cubin").write_bytes(cubin)
        # The one that Triton itself takes: the older does not know the PTX of newer GPUs.
        assembler = tools / ("ptxas-blackwell" if architecture >= 90 else "ptxas")
        target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
        assert target is not None
        said = _output(assembler, "-v", f"-arch={target[1]}", f"{path}.ptx", "-o", f"{path}.again")
        sass = _output(tools / "nvdisasm", "-c", f"{path}.cubin") if architecture == GATED else ""
    spills, registers = _SPILLS.search(said), _REGISTERS.search(said)
    assert spills is not None
    assert registers is not None
    record = {
        "sha256": hashlib.sha256(cubin).hexdigest(),
        "bytes": len(cubin),
        "entry": variant.function,
        "threads": variant.warps * 32,
        "shared_bytes": compiled.metadata.shared,
        "registers": int(registers[1]),
        "spilled_bytes": int(spills[1]) + int(spills[2]),
        # Triton adds pointers for scratch memory, which these kernels do not use.
        "unused_parameters": parameters - len(variant.parameters),
    }
    return cubin, record, sass


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


def compile_architecture(architecture: int) -> tuple[int, dict[str, Any], bytes, dict[str, str]]:
    """Compile all kernels: their records, their cubins one behind the other, the machine code."""
    records: dict[str, Any] = {}
    images: list[bytes] = []
    sasses: dict[str, str] = {}
    for variant in VARIANTS:
        cubin, record, sass = compile_variant(variant, architecture)
        record["offset"] = sum(len(image) for image in images)
        images.append(cubin)
        records[variant.name] = record
        if sass:
            sasses[variant.name] = sass
    return architecture, records, b"".join(images), sasses


def compile_all(
    architectures: Iterable[int], processes: int
) -> tuple[dict[str, Any], dict[int, bytes], dict[str, str]]:
    """The manifest, all cubins of each architecture, and the machine code of the gated one."""
    import triton

    manifest: dict[str, Any] = {"triton": triton.__version__, "architectures": {}}
    images: dict[int, bytes] = {}
    sasses: dict[str, str] = {}
    # The compiler lives in the process, so threads would wait for one another.
    with concurrent.futures.ProcessPoolExecutor(processes) as pool:
        for architecture, records, image, sass in pool.map(compile_architecture, architectures):
            manifest["architectures"][str(architecture)] = records
            images[architecture] = image
            sasses.update(sass)
            print(f"sm_{architecture}: {len(records)} kernels, {len(image)} bytes", file=sys.stderr)
    return manifest, images, sasses


def compare(manifest: dict[str, Any], images: dict[int, bytes], data: Path) -> list[str]:
    """How what was compiled differs from the package data, a sentence each."""
    try:
        kept = json.loads((data / MANIFEST).read_text("utf-8"))
    except OSError as error:
        return [f"there is no manifest: {error}"]
    problems = []
    if kept["triton"] != manifest["triton"]:
        problems.append(f"made by Triton {kept['triton']}, and this is {manifest['triton']}")
    if set(kept["architectures"]) != set(manifest["architectures"]):
        problems.append("other architectures")
    for name, image in images.items():
        for kernel, record in manifest["architectures"][str(name)].items():
            before = kept["architectures"].get(str(name), {}).get(kernel)
            if before != record:
                problems.append(f"sm_{name} {kernel}: the manifest says {before}, this is {record}")
        path = data / f"sm{name}.xz"
        if not path.is_file() or lzma.decompress(path.read_bytes()) != image:
            problems.append(f"{path.name}: other bytes")
    return problems


def main(arguments: list[str] | None = None) -> int:
    """Compile, and write or compare; 1 if a gate or the comparison fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    options = parser.parse_args(arguments)
    if options.check:
        os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # and take nothing from the cache
    manifest, images, sasses = compile_all(ARCHITECTURES, os.cpu_count() or 1)
    gated = manifest["architectures"][str(GATED)]
    found = {name: read_sass(sass) for name, sass in sasses.items()}
    print(render(gated, found))
    problems = list(find_problems(manifest, found))
    if options.check:
        problems += compare(manifest, images, DATA)
    elif not problems:
        DATA.mkdir(exist_ok=True)
        for old in DATA.glob("*.xz"):
            old.unlink()
        for architecture, image in images.items():
            (DATA / f"sm{architecture}.xz").write_bytes(lzma.compress(image, preset=9))
        (DATA / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
