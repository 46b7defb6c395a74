"""A name of a class says which one is meant: no more than two classes of the product share one."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

from tools.gates.sizes import PACKAGES, ROOT


def shared_names(paths: list[Path]) -> dict[str, list[str]]:
    """Find the classes, private and inner ones too, whose name stands three times or more."""
    places: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{path}:{node.lineno}")
    return {name: found for name, found in places.items() if len(found) > 2}


@pytest.mark.slow
def test_no_class_name_stands_three_times():
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(paths) > 100
    found = shared_names(paths)
    assert not found, f"name these classes by what they are: {found}"


def test_a_third_class_is_found(tmp_path: Path):
    for i in range(3):
        (tmp_path / f"{i}.py").write_text(f"class A{i}:\n    class _Plan: ...\n")
    paths = sorted(tmp_path.iterdir())
    assert shared_names(paths[:2]) == {}
    assert shared_names(paths) == {"_Plan": [f"{path}:2" for path in paths]}
