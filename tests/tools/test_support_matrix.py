"""The page's table of recipes and TensorRT versions is what the rules say of this code's graphs."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge.bundle.manifest import read_manifest
from engines.rules.table import VERSIONS
from tools.pages import support_matrix

pytest.importorskip("onnx", reason="the exporter needs it")
# The table is made once.
pytestmark = [pytest.mark.xdist_group("support-matrix"), pytest.mark.once]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


@pytest.fixture(scope="module")
def table(bundles: Path) -> str:
    return support_matrix.table(bundles)


def test_the_page_has_the_table_of_this_code(table: str) -> None:
    page = support_matrix.PAGE.read_text("utf-8")
    wanted = support_matrix.with_table(page, table)
    assert page == wanted, "out of date: run python3 -m tools support-matrix"


def test_every_recipe_is_checked_against_every_version(table: str, bundles: Path) -> None:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert lines[0][2:] == [version.name for version in VERSIONS]
    rows = [(recipe, *row[:1], *row[2:]) for row in lines[2:] for recipe in row[1].split(", ")]
    assert {row[0].strip("`") for row in rows} == {r.options for r in support_matrix.RECIPES}
    checks = [(recipe, graph) for recipe, graph, *_ in rows]
    expected = [
        (f"`{recipe.options}`", f"`{graph.options}`")
        for recipe in support_matrix.RECIPES
        for graph in support_matrix.GRAPHS
        if "target" not in graph.config or support_matrix._rounds_inputs(recipe)
    ]
    assert sorted(checks) == sorted(expected)
    written = {
        str(path.name): read_manifest(path)
        for path in bundles.iterdir()
        if path.is_dir()
        if (path / "manifest.json").exists()
    }
    recipes = [recipe.options for recipe in support_matrix.RECIPES]
    for recipe, graph, *cells in rows:
        name = f"{recipes.index(recipe.strip('`'))}{graph.strip('`')}"
        if name not in written:
            assert set(cells) == {"not written"}
            continue
        legal = written[name].tensorrt
        assert legal is not None
        yes = [v.name for v, cell in zip(VERSIONS, cells, strict=True) if cell.startswith("yes")]
        assert yes == list(legal)


def test_a_float_model_has_a_graph_for_every_version(table: str) -> None:
    (row,) = [
        line
        for line in table.splitlines()
        if line.startswith("| `--dialect p") and "`--quant fp16`" in line
    ]
    assert row.count("yes") == len(VERSIONS)


def test_a_page_without_marks_is_not_written_over() -> None:
    with pytest.raises(ValueError, match="lacks the line"):
        support_matrix.with_table("nothing here", "| table |")
