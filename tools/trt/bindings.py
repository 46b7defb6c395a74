"""Checks that NVIDIA's Python API has, in each version, every name and call that this code uses.

PyPI has the binary bindings of TensorRT without its libraries. They import over libraries of the
same names whose functions all return null, and then show every class, method and signature. The
stub libraries are written here, byte by byte (`stub_library`), so no compiler is needed.

The uses are read from this code's source (`find_uses`): chains that begin at the module, such as
``trt.MemoryPoolType.WORKSPACE``, and attributes and calls whose names are members of some class of
the bindings. A name must be in every version except those that `PRESENCE` takes out, for each of
which the code has a guard.
"""

from __future__ import annotations

import ast
import io
import json
import os
import platform
import re
import struct
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.rules.table import Release

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".venv-trt-bindings" / "wheels"

# Version: requirement, and SHA-256 of its wheels for CPython 3.10 to 3.13 on x86-64, as far as
# there are any.
WHEELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "10.3": (
        "tensorrt-cu12-bindings==10.3.0",
        (
            "1d6e4cf08ef1f54f6fd44a33cf6b253050af2fc6e9a1d92e40e1436a1d858eb0",
            "59ace22d7f2ca1e9dcde2cb0cb5916912cb3cd5a9d72dd7852be0160d9b3a0ee",
            "f5c2582aeaa7f5628d2c4d4148a701ebe97be78f7ff3b46a617f0ee0cb5460f2",
        ),
    ),
    "10.13": (
        "tensorrt-cu13-bindings==10.13.3.9.post1",
        (
            "86c0373766c8fe5e1adf3c825bef415874a959df68a3a6f70da67a753c5218fa",
            "e9ca7fa16dead0d925e7c0ba80d5436dbdd1caf3a6fb53e20d6c87764b538d73",
            "4c50bd67de7eeabc4ade9d7e7a3614b948912aedaec00d53b88e9147aa2163d9",
            "b4297fe61adeb726d33442b6e5b4b192f715ae9902975d46b1c948e2566709ff",
        ),
    ),
    "10.16": (
        "tensorrt-cu13-bindings==10.16.1.11",
        (
            "c8e171511a01a2678cb3e00ca4792bc1d7ea6c48da9781ab127970f6ad1edc4a",
            "f986d47980d042cc126506a9b84586e55ad13737a7a46826fe45457c04d66294",
            "2fb87ac24a5e5f42e43f283c16d1b661dc72ef18568fd847ce2080b7db9ca232",
            "da17c222ba99f46e77e1dab568cd17c4652b0432d4fae074e4c79285356aa0ac",
        ),
    ),
    "11.4": (
        "tensorrt-cu13-bindings==11.4.0.106",
        (
            "1d17853da33a186c4d4d39995c1186bb59f643689aabac9c3e33ae5f0ba402f5",
            "d072ac2a095e2be749fefc847adfb25d5ebe70303401df62ede8fe67a59f27fc",
            "5fc7a6c412881f7212030893bd5531b1a0ff415c72c7678dfe4ead7a7765b38d",
            "bac9a362c9189b5f5dd0444213913846e4b46003237834958e890eff57d86ed5",
        ),
    ),
}

PLUGINS_SINCE: Release = (10, 13)
"""The first release that is to compile our plugin, as in `engines.compiler.compat.plugins_of`."""

SOURCES = ("edge/backends/tensorrt/bound_context.py",)
"""Files that use TensorRT's objects without its module; all others are found."""

_NEVER: Release = (99, 0)
PRESENCE: dict[str, tuple[Release, Release]] = {
    "IAttention": ((10, 14), _NEVER),
    "IAttentionOutputLayer": ((10, 14), _NEVER),
    "ATTENTION_OUTPUT": ((10, 14), _NEVER),
    "AttentionNormalizationOp": ((10, 14), _NEVER),
    "attention": ((10, 14), _NEVER),
    "decomposable": ((10, 14), _NEVER),
    "mask": ((10, 14), _NEVER),
    "get_aliased_input_tensor": ((10, 15), _NEVER),
    "causal": ((10, 14), (11, 0)),
    "add_attention_v2": ((11, 0), _NEVER),
    "CausalMaskKind": ((11, 0), _NEVER),
    "causal_kind": ((11, 0), _NEVER),
    "key_value_lengths": ((11, 0), _NEVER),
    # Only in TensorRT for RTX.
    "ComputeCapability": (_NEVER, _NEVER),
    "num_compute_capabilities": (_NEVER, _NEVER),
    "set_compute_capability": (_NEVER, _NEVER),
}
"""Names that not every version has: the first release with them, and the first without again."""


_PYTHON = {
    name
    for kind in (str, bytes, dict, list, set, tuple, int, Path, threading.Event, io.BufferedReader)
    for name in dir(kind)
}
_USES_TENSORRT = re.compile(r"\btrt\.[A-Z]|\b_?module\.[A-Z]")
_CUDA = ROOT / "edge" / "backends" / "cuda"  # its modules are those of CUDA
_ELSEWHERE = {
    *("get_available_providers", "get_providers", "preload_dlls", "InferenceSession"),
    *("reshape", "astype", "tobytes", "nbytes", "decompress", "hexdigest", "callback"),
    *("VERSION_TEXT", "CUresult", "CUDA_SUCCESS"),
}
"""Names of other libraries and of Python, in the files that use TensorRT too."""


# The stub libraries.

FUNCTIONS = (
    *("createInferBuilder_INTERNAL", "createInferRuntime_INTERNAL", "createInferRefitter_INTERNAL"),
    *("createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL"),
    *("getNvOnnxParserVersion", "getBuilderPluginRegistry", "getPluginRegistry"),
    "initLibNvInferPlugins",
)
LIBRARIES = ("libnvinfer", "libnvonnxparser", "libnvinfer_plugin")
# ELF's number of the machine, and the code of a function that returns 0.
_MACHINES = {
    "x86_64": (62, bytes.fromhex("31c0c3")),
    "aarch64": (183, bytes.fromhex("000080d2c0035fd6")),
}
_PAGE = 0x10000  # no machine has larger pages
_HEADER, _SEGMENT = 64, 56
_LOAD, _DYNAMIC, _GNU_STACK = 1, 2, 0x6474E551
_READ, _WRITE, _EXECUTE = 4, 2, 1
_DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_STRSZ, _DT_SYMENT, _DT_SONAME = 4, 5, 6, 10, 11, 14


def stub_library(soname: str, functions: Iterable[str], machine: str) -> bytes:
    """Make a shared library whose functions all return 0 (ELF, System V ABI).

    Args:
        soname: its name for programs that link to it.
        functions: names of its functions.
        machine: value of `platform.machine`: ``x86_64`` or ``aarch64``.
    """
    number, code = _MACHINES[machine]
    strings = b"\0" + soname.encode() + b"\0"
    names = []
    for function in functions:
        names.append(len(strings))
        strings += function.encode() + b"\0"
    text = _HEADER + 4 * _SEGMENT
    # One bucket: a chain from the last symbol to the first.
    table = struct.pack("<4I", 1, len(names) + 1, len(names), 0)
    table += struct.pack(f"<{len(names)}I", *range(len(names)))
    hashes = _aligned(text + len(code))
    symbols_at = _aligned(hashes + len(table))
    symbols = bytes(24) + b"".join(
        struct.pack("<IBBHQQ", name, 0x12, 0, 1, text, len(code)) for name in names
    )
    strings_at = symbols_at + len(symbols)
    end = strings_at + len(strings)
    entries = (
        *((_DT_SONAME, 1), (_DT_HASH, hashes), (_DT_STRTAB, strings_at), (_DT_SYMTAB, symbols_at)),
        *((_DT_STRSZ, len(strings)), (_DT_SYMENT, 24), (0, 0)),
    )
    dynamic = b"".join(struct.pack("<QQ", *entry) for entry in entries)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack(
        "<HHIQQQIHHHHHH", 3, number, 1, 0, _HEADER, 0, 0, _HEADER, _SEGMENT, 4, 64, 0, 0
    )
    header += _segment(_LOAD, _READ | _EXECUTE, 0, end, _PAGE)
    header += _segment(_LOAD, _READ | _WRITE, _PAGE, len(dynamic), _PAGE)
    header += _segment(_DYNAMIC, _READ | _WRITE, _PAGE, len(dynamic), 8)
    header += _segment(_GNU_STACK, _READ | _WRITE, 0, 0, 16)
    body = bytearray(_PAGE)
    for at, part in (
        *((0, header), (text, code), (hashes, table)),
        *((symbols_at, symbols), (strings_at, strings)),
    ):
        body[at : at + len(part)] = part
    return bytes(body) + dynamic


def _aligned(at: int) -> int:
    return (at + 7) // 8 * 8


def _segment(kind: int, flags: int, at: int, size: int, alignment: int) -> bytes:
    return struct.pack("<IIQQQQQQ", kind, flags, at, at, at, size, size, alignment)


# What the code uses.


@dataclass
class Uses:
    """Uses of TensorRT in some source files, each with its place: ``file:line``.

    Attributes:
        chains: names after the module, e.g. ``("MemoryPoolType", "WORKSPACE")``.
        members: names of attributes of any object.
        calls: such a name, the number of positional arguments and the keywords; the name has a
            dot in front if a class is called.
    """

    chains: dict[tuple[str, ...], str] = field(default_factory=dict)
    members: dict[str, str] = field(default_factory=dict)
    calls: dict[tuple[str, int, tuple[str, ...]], str] = field(default_factory=dict)


def find_uses(files: Iterable[Path]) -> Uses:
    """Read source files; members are all attributes, TensorRT's or not."""
    uses = Uses()
    for path in files:
        where = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        _Finder(uses, str(where)).visit(ast.parse(path.read_text("utf-8")))
    return uses


def source_files() -> list[Path]:
    """Return every file of the product that names TensorRT's module, and `SOURCES`."""
    found = {ROOT / name for name in SOURCES}
    for package in ("edge", "edge_make", "edge_lab", "edge_fleet", "engines"):
        for path in (ROOT / package).rglob("*.py"):
            if path.parent != _CUDA and _USES_TENSORRT.search(path.read_text("utf-8")):
                found.add(path)
    return sorted(found)


class _Finder(ast.NodeVisitor):
    def __init__(self, uses: Uses, where: str) -> None:
        self.uses, self.where = uses, where
        self.aliases: dict[str, tuple[str, ...]] = {}
        self.modules = {"self", "cls", "_log"}  # whose attributes are not TensorRT's

    def visit_Import(self, node: ast.Import) -> None:
        self.modules.update((each.asname or each.name).split(".")[0] for each in node.names)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self.modules.update(each.asname or each.name for each in node.names)

    def visit_Assign(self, node: ast.Assign) -> None:
        chain = self._chain(node.value)
        for target in node.targets:
            if chain and isinstance(target, ast.Name):
                self.aliases[target.id] = chain
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        at = f"{self.where}:{node.lineno}"
        chain = self._chain(node)
        if chain:
            self.uses.chains.setdefault(chain, at)
            return
        if not self._is_other(node.value) and not node.attr.startswith("__"):
            self.uses.members.setdefault(node.attr, at)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        at = f"{self.where}:{node.lineno}"
        shape = len(node.args), tuple(word.arg or "**" for word in node.keywords)
        starred = any(isinstance(arg, ast.Starred) for arg in node.args) or "**" in shape[1]
        if isinstance(node.func, ast.Attribute) and not starred:
            chain = self._chain(node.func)
            if chain and not chain[-1].startswith("__"):
                self.uses.calls.setdefault((f".{chain[-1]}", *shape), at)
            elif not chain and not self._is_other(node.func.value):
                self.uses.calls.setdefault((node.func.attr, *shape), at)
        self._visit_lookup(node, at)
        self.generic_visit(node)

    def _visit_lookup(self, node: ast.Call, at: str) -> None:
        """Count names in ``getattr`` and ``hasattr`` as uses, too."""
        if not isinstance(node.func, ast.Name) or node.func.id not in ("getattr", "hasattr"):
            return
        name = node.args[1]
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            chain = self._chain(node.args[0])
            if chain is not None:
                self.uses.chains.setdefault((*chain, name.value), at)
            else:
                self.uses.members.setdefault(name.value, at)

    def _is_other(self, node: ast.expr) -> bool:
        """Return whether an object is surely none of TensorRT's: ours, or an imported module's."""
        while isinstance(node, ast.Attribute):
            node = node.value
            if isinstance(node, ast.Name) and node.id in ("self", "cls"):
                return False  # a field may hold anything
        return isinstance(node, ast.Name) and node.id in self.modules

    def _chain(self, node: ast.expr) -> tuple[str, ...] | None:
        """Return the names after the module; () is the module itself, None something else."""
        if isinstance(node, ast.Name):
            return () if node.id == "trt" else self.aliases.get(node.id)
        if not isinstance(node, ast.Attribute):
            return None
        if node.attr in ("module", "_module") or (node.attr == "_trt"):
            return ()
        before = self._chain(node.value)
        return None if before is None else (*before, node.attr)


def own_names() -> set[str]:
    """Return every name that the product itself defines: functions, classes, fields, variables."""
    found: set[str] = set()
    for package in ("edge", "edge_make", "edge_lab", "edge_fleet", "engines"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                    found.add(node.name)
                elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    found.add(node.id)
                elif isinstance(node, ast.Attribute) and _is_own_field(node):
                    found.add(node.attr)
    return found


def _is_own_field(node: ast.Attribute) -> bool:
    stored = isinstance(node.ctx, ast.Store)
    return stored and isinstance(node.value, ast.Name) and node.value.id == "self"


# The API of a version.

Surface = Mapping[str, Any]
"""``names`` lists the module's names. ``members`` has by class each member with its docstring, or
null if it cannot be called."""

_DESCRIBE = """
import json, sys
import tensorrt_bindings as trt
members = {}
for name in dir(trt):
    value = getattr(trt, name)
    if not isinstance(value, type):
        continue
    own = members[name] = {}
    for member in dir(value):
        if member.startswith('__') and member not in ('__init__', '__members__'):
            continue
        found = getattr(value, member, None)
        own[member] = (found.__doc__ or '') if callable(found) else None
        if isinstance(found, type):
            inner = members[f'{name}.{member}'] = {}
            for each in dir(found):
                inner[each] = None
json.dump({'version': trt.__version__, 'names': dir(trt), 'members': members}, sys.stdout)
"""


def read_surface(wheel: Path, stubs: Path) -> Surface:
    """Import the bindings of an unpacked wheel over stub libraries, and list what they have.

    Raises:
        RuntimeError: they do not import.
    """
    environment = {**os.environ, "LD_LIBRARY_PATH": str(stubs), "PYTHONPATH": str(wheel)}
    done = subprocess.run(
        [sys.executable, "-c", _DESCRIBE],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the bindings in {wheel} do not import: {done.stderr.strip()}")
    surface: Surface = json.loads(done.stdout)
    return surface


def check_plugin(wheel: Path, stubs: Path, script: str) -> bool:
    """Let the bindings of an unpacked wheel ask our plugins.

    Args:
        wheel: the unpacked wheel.
        stubs: directory of the stub libraries.
        script: ``plugin``, or ``plugin_v3`` for those whose kernels Python launches.
    """
    paths = os.pathsep.join(map(str, (wheel, ROOT)))
    environment = {**os.environ, "LD_LIBRARY_PATH": str(stubs), "PYTHONPATH": paths}
    command = [sys.executable, "-m", f"tools.trt.{script}"]
    return subprocess.run(command, env=environment, check=False).returncode == 0


def find_strangers(uses: Uses, universe: Iterable[str], own: Iterable[str]) -> Iterator[str]:
    """Yield members that are no name of any version, of this code or of Python: misspelt, perhaps.

    Args:
        uses: uses by the code.
        universe: members of any class of any version.
        own: names that the code defines.
    """
    known = {*universe, *own, *PRESENCE, *_PYTHON, *_ELSEWHERE}
    for name, at in uses.members.items():
        if name not in known and not name.startswith("cu"):  # CUDA's driver, by ctypes
            yield f"{at}: nobody has {name}"


def find_problems(
    uses: Uses, surface: Surface, release: Release, universe: Iterable[str]
) -> Iterator[str]:
    """Yield the used names and calls that a version lacks.

    Args:
        uses: uses by the code.
        surface: API of the version.
        release: the version.
        universe: members of any class of any version: another name is not TensorRT's.
    """
    known = set(universe)
    classes = surface["members"]
    members = {name for own in classes.values() for name in own}
    for chain, at in uses.chains.items():
        absent = _absent(chain, surface)
        if absent is not None and _is_expected(absent, release):
            yield f"{at}: there is no {'.'.join(chain)}"
    for name, at in uses.members.items():
        if name in known and name not in members and _is_expected(name, release):
            yield f"{at}: no class has {name}"
    for (name, count, keywords), at in uses.calls.items():
        docs = list(_documents(name, classes))
        if not docs or (not name.startswith(".") and name not in known):
            continue
        signatures = [each for doc in docs for each in parse_signatures(doc)]
        if signatures and not any(each.takes(count, keywords) for each in signatures):
            shown = "; ".join(map(str, signatures))
            yield f"{at}: {name}() with {count} arguments and {list(keywords)} fits none of {shown}"


def _absent(chain: tuple[str, ...], surface: Surface) -> str | None:
    """Return the first name of a chain that is missing."""
    if chain and chain[0] not in surface["names"]:
        return chain[0]
    for at in range(1, len(chain)):
        own = surface["members"].get(".".join(chain[:at]))
        if own is None or chain[at].startswith("__"):
            return None  # not a class: nothing to look into
        if chain[at] not in own:
            return chain[at]
    return None


def _is_expected(name: str, release: Release) -> bool:
    since, until = PRESENCE.get(name, ((0, 0), _NEVER))
    return since <= release < until


def _documents(name: str, classes: Mapping[str, Mapping[str, str | None]]) -> Iterator[str]:
    if name.startswith("."):
        doc = classes.get(name[1:], {}).get("__init__")
        if doc:
            yield doc
        return
    for own in classes.values():
        doc = own.get(name)
        if doc:
            yield doc


@dataclass(frozen=True)
class Signature:
    """One way to call something, as pybind11 documents it.

    Attributes:
        names: parameters without ``self``.
        required: how many of them have no default.
        anything: whether it takes further arguments.
    """

    names: tuple[str, ...]
    required: int
    anything: bool

    def takes(self, count: int, keywords: tuple[str, ...]) -> bool:
        """Return whether this many positional arguments and these keywords fit."""
        if self.anything:
            return True
        given = {*self.names[:count], *keywords}
        return (
            count <= len(self.names)
            and set(keywords) <= set(self.names[count:])
            and set(self.names[: self.required]) <= given
        )

    def __str__(self) -> str:
        return f"({', '.join(self.names)})"


def parse_signatures(doc: str) -> list[Signature]:
    """Read the signatures of a docstring by pybind11, one for each overload."""
    lines = [re.sub(r"^\d+\. ", "", line.strip()) for line in doc.splitlines()]
    overloaded = any(line == "Overloaded function." for line in lines)
    found = []
    for line in lines:
        if re.match(r"\w+\(.*\)( -> .*)?$", line) and not (overloaded and "*args" in line):
            found.append(_parse_signature(line[line.index("(") + 1 : line.rindex(")")]))
            if not overloaded:
                break
    return found


def _parse_signature(inside: str) -> Signature:
    # The return type may hold brackets: cut at the one that closes the parameters.
    parts, depth, part = [], 0, ""
    for character in inside:
        depth += (character in "([{<") - (character in ")]}>")
        if depth < 0:
            break
        if character == "," and depth == 0:
            parts.append(part)
            part = ""
        else:
            part += character
    parts = [each.strip() for each in [*parts, part] if each.strip()]
    anything = any(each.startswith("*") and each not in ("*", "/") for each in parts)
    named = [each for each in parts if each[0] not in "*/" and not each.startswith("self")]
    names = tuple(re.split(r"[:=\s]", each)[0] for each in named)
    return Signature(names, sum(" = " not in each for each in named), anything)


# The wheels.


def fetch_wheel(version: str) -> Path:
    """Download a wheel, if it is not here yet, and unpack it.

    Raises:
        RuntimeError: no wheel for this Python and machine, or another hash.
    """
    requirement, hashes = WHEELS[version]
    directory = CACHE / f"{requirement}-cp{sys.version_info[0]}{sys.version_info[1]}"
    if directory.is_dir():
        return directory
    lock = CACHE / f"{requirement}.txt"
    lock.write_text(" \\\n".join([requirement, *(f"    --hash=sha256:{h}" for h in hashes)]) + "\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "-r", str(lock)]
    done = subprocess.run([*pip, *options, "-d", str(CACHE)], check=False)
    name = requirement.replace("-", "_").replace("==", "-")
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    wheels = list(CACHE.glob(f"{name}-{tag}-*.whl"))
    if done.returncode != 0 or not wheels:
        raise RuntimeError(
            f"{requirement} has no wheel for Python {sys.version_info[0]}.{sys.version_info[1]} on "
            f"{platform.machine()} here; take PYTHON=python3.12 on x86-64"
        )
    partial = CACHE / f".{directory.name}"
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extractall(partial)
    partial.rename(directory)
    return directory


def write_stubs(directory: Path) -> Path:
    """Write the stub libraries of TensorRT 10 and 11 for this machine."""
    directory.mkdir(parents=True, exist_ok=True)
    for major in (10, 11):
        for library in LIBRARIES:
            name = f"{library}.so.{major}"
            data = stub_library(name, FUNCTIONS, platform.machine())
            (directory / name).write_bytes(data)
    return directory


def main() -> int:
    """Check all versions; return 1 if one of them lacks something."""
    CACHE.mkdir(parents=True, exist_ok=True)
    stubs = write_stubs(CACHE / "stubs")
    try:
        surfaces = {version: read_surface(fetch_wheel(version), stubs) for version in WHEELS}
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    uses = find_uses(source_files())
    universe = {
        name for surface in surfaces.values() for own in surface["members"].values() for name in own
    }
    members = sorted(set(uses.members) & universe)
    calls = sum(1 for name, *_ in uses.calls if name.lstrip(".") in universe or name[0] == ".")
    strangers = list(find_strangers(uses, universe, own_names()))
    for stranger in strangers:
        print(f"no TensorRT: {stranger}", file=sys.stderr)
    failed = bool(strangers)
    for version, surface in surfaces.items():
        major, minor = map(int, version.split("."))
        problems = list(find_problems(uses, surface, (major, minor), universe))
        failed |= bool(problems)
        for problem in problems:
            print(f"TensorRT {surface['version']}: {problem}", file=sys.stderr)
        print(
            f"TensorRT {surface['version']}: {len(uses.chains)} names of the module, "
            f"{len(members)} members, {calls} calls: "
            f"{f'{len(problems)} problems' if problems else 'all there'}",
            flush=True,
        )
        failed |= not check_plugin(fetch_wheel(version), stubs, "plugin_v3")
        if (major, minor) >= PLUGINS_SINCE:
            failed |= not check_plugin(fetch_wheel(version), stubs, "plugin")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
