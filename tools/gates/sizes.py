"""Holds each package, and what a chat loads, to a budget of code lines.

usage: python3 -m tools sizes            measures and compares; exit code 1 if a budget is passed
       python3 -m tools sizes --static   packages and files alone, which loads nothing

A code line has something on it that is neither a comment nor part of a docstring. A budget is the
size at the last review: a change that needs more edits the figure here, where a reader sees it, and
says why in its commit. A budget that is more than 2 % too wide fails, too.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

PACKAGES = {
    "edge": 16_947,
    "edge_make": 1_459,
    "edge_lab": 11_108,
    "edge_serve": 11_316,
    "edge_fleet": 4_854,
    "engines": 7_349,
    "export": 8_841,
}
"""Code lines of each package, without what an allowance covers."""

FILES = {"edge/bundle/manifest.py": 273}
"""Code lines of files that may only shrink: optional rooms own a section of ``extras`` instead."""


@dataclass(frozen=True)
class Loaded:
    """Content of ``sys.modules`` after one chat with default settings.

    Attributes:
        modules: modules of the product.
        lines: their code lines.
    """

    modules: int
    lines: int


LOADED = {"tensorrt": Loaded(modules=76, lines=8_710), "ort-cpu": Loaded(modules=79, lines=8_462)}

CLOSURE, CLOSURE_LINES = "edge.runtime.llm", 18_848
"""A module, and the code lines of all that it may ever load; 18,914 before `edge.model`."""


@dataclass(frozen=True)
class Allowance:
    """Code lines that a coming capability may add, once.

    Attributes:
        lines: at most this many.
        modules: its modules, whose lines then count here and not for their package; ``edge.vision``
            stands for all that is in that room. No text bundle that does not use the capability
            loads one of them.
    """

    lines: int
    modules: tuple[str, ...] = field(default=())


ALLOWANCES = {
    "pictures": Allowance(
        2_500,
        (
            "edge.vision",
            "edge.runtime.scheduler.picturing",
            "edge_lab.cli.pictures",
            "edge_lab.measure.picture_bench",
            "edge_lab.measure.pictures",
            "edge_make.picture_models",
            "edge_lab.planner.vision",
            "edge_serve.pictures",
            "engines.builder.encoder",
            "export.encoder_files",
            "export.graph.encoder",
            "export.sources.idefics3",
            "export.sources.internvl",
            "export.sources.picture_encoder",
        ),
    ),
    "adapters": Allowance(
        1_500,
        (
            "edge.adapters",
            "edge.backends.tensorrt.adapter_memory",
            "edge_fleet.cli.adapter",
            "edge_fleet.registry.adapter",
            "edge_fleet.rollout.adapter",
            "edge_lab.cli.adapter",
            "edge_make.adapter_library",
            "edge_serve.models.adapters",
            "export.graph.adapters",
        ),
    ),
    "stop and vote": Allowance(
        1_170,
        (
            "edge.votes",
            "edge.cli.vote_options",
            "edge.runtime.best_of",
            "edge.runtime.stop_when_sure",
            "edge.runtime.vote",
            "edge_lab.cli.planned_strategies",
            "edge_lab.cli.strategies",
            "edge_lab.measure.strategies",
            "edge_lab.planner.strategies",
            "edge_serve.api.voting",
        ),
    ),
    "EAGLE-3 on the engine": Allowance(400),
}

_SLACK = 0.02
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
    return len(lines)


def package_lines(root: Path = ROOT) -> dict[str, int]:
    """Count the code lines of each package, and of each allowance that has modules."""
    covered = {path for each in ALLOWANCES.values() for path in _paths(each.modules, root)}
    found = {
        package: _lines(path for path in (root / package).rglob("*.py") if path not in covered)
        for package in PACKAGES
    }
    return found | {name: _lines(_paths(each.modules, root)) for name, each in ALLOWANCES.items()}


def _paths(modules: Iterable[str], root: Path) -> list[Path]:
    found: list[Path] = []
    for module in modules:
        path = root / module.replace(".", "/")
        file = path.with_suffix(".py")
        found += [file] if file.exists() else sorted(path.rglob("*.py"))
    return found


def _is_within(name: str, rooms: Iterable[str]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


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


def judge(what: str, found: int, budget: int) -> str | None:
    """Say what is wrong with a figure; None if it keeps its budget and the budget is not wide."""
    if found > budget:
        return (
            f"{what} has {found}, its budget in tools/gates/sizes.py is {budget}; "
            "delete something, or raise it there and say why"
        )
    if found < budget * (1 - _SLACK):
        return (
            f"{what} has {found}, far below its budget of {budget}; write {found} into "
            "tools/gates/sizes.py"
        )
    return None


def main() -> int:
    """Print what was measured and what passes its budget."""
    if sys.argv[1:2] == ["--chat"]:
        print(json.dumps(_chat(sys.argv[2], Path(sys.argv[3]))))
        return 0
    complaints: list[str | None] = []
    found = package_lines()
    for package, budget in PACKAGES.items():
        print(f"{package:28} {found[package]:6} code lines of {budget}")
        complaints.append(judge(package, found[package], budget))
    for name, budget in FILES.items():
        lines = _lines([ROOT / name])
        print(f"{name:28} {lines:6} code lines of {budget}")
        complaints.append(judge(name, lines, budget))
    lines = module_lines(closure())
    print(f"{'all of ' + CLOSURE:28} {lines:6} code lines of {CLOSURE_LINES}")
    complaints.append(judge(f"all that {CLOSURE} may load", lines, CLOSURE_LINES))
    for name, each in ALLOWANCES.items():
        if found[name] > each.lines:
            complaints.append(f"{name} has {found[name]} code lines, its allowance is {each.lines}")
    for backend, names in measure_loaded().items() if "--static" not in sys.argv else ():
        most, lines = LOADED[backend], module_lines(names)
        print(f"a chat on {backend:18} {lines:6} code lines of {most.lines}, ", end="")
        print(f"{len(names)} modules of {most.modules}")
        complaints.append(judge(f"a chat on {backend}: code lines", lines, most.lines))
        complaints.append(judge(f"a chat on {backend}: modules", len(names), most.modules))
        for name, each in ALLOWANCES.items():
            extra = [name for name in names if _is_within(name, each.modules)]
            if extra:
                complaints.append(f"a chat on {backend} loads {', '.join(extra)} of {name}")
    wrong = [complaint for complaint in complaints if complaint]
    for complaint in wrong:
        print(f"error: {complaint}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
