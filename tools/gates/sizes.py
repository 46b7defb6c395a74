"""Prints the code lines of the product, its tests and its tools beside those of the last landing.

usage: python3 -m tools sizes           counts files; exit code 1 if a package grows too fast
       python3 -m tools sizes --loaded  also what a chat loads, and what it may ever load

A code line has something on it that is neither a comment nor part of a docstring. Beside today's
figures stand those of ``origin/main``, or of the checked-out commit in a clone without one. A
package that grew by more than a twentieth since ``origin/main``, and by more than 200 lines, fails:
land it in pieces, or delete something. Nothing else fails, and no figure is kept in a file.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

PACKAGES = ("edge", "edge_make", "edge_lab", "edge_serve", "edge_fleet", "engines", "export")
OTHERS = ("tests", "tools", "lab")
LANDED = "origin/main"
"""What growth is counted from, where a clone has it."""
MOST_GROWTH, FEW_LINES = 0.05, 200
"""Share by which a package may grow at once, and lines that may come to a package of any size."""

LOADED = ("tensorrt", "ort-cpu")
CLOSURE = "edge.runtime.llm"
"""A module, for all that it may ever load."""

_ENGINE = {"max_batch": 4, "max_prefill": 24, "kv_capacity": 128, "kv_buckets": (16, 64, 128)}
_NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


@functools.cache  # most files of two commits are the same
def code_lines(source: str) -> int:
    """Count the lines that hold code: no blanks, no comments, no docstrings."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        # A text alone in a line is a docstring: of a module, class, function, or of the name above.
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
            case _:
                pass
    return len(lines)


def count(root: Path = ROOT) -> dict[str, int]:
    """Count the code lines of each package, and of what is beside them."""
    return {name: _lines((root / name).rglob("*.py")) for name in (*PACKAGES, *OTHERS)}


def count_commit(commit: str, root: Path = ROOT) -> dict[str, int] | None:
    """Count those of a commit; None where git does not know it."""
    command = ["git", "archive", "--format=tar", commit]
    done = subprocess.run(command, cwd=root, capture_output=True, check=False)
    if done.returncode:
        return None
    with (
        tempfile.TemporaryDirectory() as folder,
        tarfile.open(fileobj=io.BytesIO(done.stdout)) as files,
    ):
        code = [file for file in files.getmembers() if file.isdir() or file.name.endswith(".py")]
        files.extractall(folder, code, filter="data")
        return count(Path(folder))


def faults(found: dict[str, int], landed: dict[str, int]) -> list[str]:
    """Name each package that grew too fast since the last landing."""
    return [
        f"{name} has {found[name]:,} code lines and had {landed[name]:,}: it may grow by "
        f"{MOST_GROWTH:.0%} at once; land it in pieces, or delete something"
        for name in PACKAGES
        if landed[name] and found[name] - landed[name] > max(FEW_LINES, MOST_GROWTH * landed[name])
    ]


def _lines(paths: Iterable[Path]) -> int:
    return sum(code_lines(path.read_text("utf-8")) for path in paths)


def loaded_modules(backend: str, bundle: Path) -> list[str]:
    """List the product's modules that one chat loads, in a process of its own."""
    command = [sys.executable, "-m", "tools.gates.sizes", "--chat", backend, str(bundle)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    names: list[str] = json.loads(done.stdout.splitlines()[-1])
    return names


def _chat(backend: str, bundle: Path) -> list[str]:
    """Answer a chat and return the product's modules that are loaded then."""
    if backend == "tensorrt":
        import pytest

        from tests.standins.cuda import FakeGpu
        from tests.standins.tensorrt import install

        install(pytest.MonkeyPatch(), FakeGpu())
        # The stand-in keeps what it has imported; the product loads its own from here on.
        for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
            del sys.modules[name]
    from edge import LLM
    from edge.text.known_templates import KNOWN_TEMPLATES

    # It stands for R1's own; a template that is not known loads what runs it in a child, too.
    template = (bundle / "chat_template.jinja").read_bytes().rstrip()
    KNOWN_TEMPLATES[hashlib.sha256(template).hexdigest()] = "the tiny model's"
    options: Any = {"backend": backend}
    with LLM(bundle, **options) as llm:
        answer = llm.generate([{"role": "user", "content": "hello"}])
        if not answer.tokens:
            raise AssertionError("the chat has no answer")
    return sorted(name for name in sys.modules if name.split(".")[0] in PACKAGES)


def measure_loaded() -> dict[str, list[str]]:
    """Export a tiny bundle, build its engine for the stand-in, and chat with both."""
    from export.pipeline import ExportConfig, export_checkpoint
    from tests.makers.tiny_models import write_checkpoint
    from tests.standins.tensorrt import write_engine

    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        source = write_checkpoint(Path(folder) / "checkpoint", "qwen2")
        config = ExportConfig(source=str(source), output=bundle, quant="fp16", kv_capacity=128)
        export_checkpoint(config)
        write_engine(bundle, **_ENGINE)  # type: ignore[arg-type]
        return {backend: loaded_modules(backend, bundle) for backend in LOADED}


def module_lines(names: Iterable[str]) -> int:
    """Count the code lines of modules by name."""
    paths = []
    for name in names:
        path = ROOT / name.replace(".", "/")
        paths.append(path / "__init__.py" if path.is_dir() else path.with_suffix(".py"))
    return _lines(paths)


def closure(start: str = CLOSURE, root: Path = ROOT) -> list[str]:
    """List the product's modules that a module may ever load: its imports, and theirs in turn.

    Imports within functions count, those for a type checker alone do not.
    """
    found: set[str] = set()
    left = [start]
    while left:
        name = left.pop()
        path = root / name.replace(".", "/")
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if name in found or name.split(".")[0] not in PACKAGES or not file.exists():
            continue
        found.add(name)
        left.append(name.rpartition(".")[0])
        package = name if path.is_dir() else name.rpartition(".")[0]
        for node in _imports(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                left += [each.name for each in node.names]
                continue
            parts = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(parts if node.level else []), *filter(None, [node.module])])
            left += [base, *(f"{base}.{each.name}" for each in node.names)]
    return sorted(found)


def _imports(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Import() | ast.ImportFrom():
                yield child
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                yield from (each for part in child.orelse for each in _imports(part))
            case _:
                yield from _imports(child)


def _sum(found: dict[str, int], names: Iterable[str]) -> int:
    return sum(found[name] for name in names)


def _print(what: str, now: int, before: int | None) -> None:
    change = "" if before is None else f"{now - before:+8,}"
    print(f"{what:28} {now:8,}{change}")


def main() -> int:
    """Print what was counted, beside what was landed; fail where a package grew too fast."""
    if sys.argv[1:2] == ["--chat"]:
        print(json.dumps(_chat(sys.argv[2], Path(sys.argv[3]))))
        return 0
    found, landed = count(), count_commit(LANDED)
    before = landed or count_commit("HEAD")
    print(f"code lines, and the change since {LANDED if landed else 'HEAD'}")
    for name in found:
        _print(name, found[name], before[name] if before else None)
    _print("all packages", _sum(found, PACKAGES), _sum(before, PACKAGES) if before else None)
    if "--loaded" in sys.argv:
        _print(f"all of {CLOSURE}", module_lines(closure()), None)
        for backend, names in measure_loaded().items():
            _print(f"a chat on {backend}", module_lines(names), None)
            _print("  its modules", len(names), None)
    wrong = faults(found, landed) if landed else []
    for fault in wrong:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
