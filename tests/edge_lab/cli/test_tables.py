"""Tables of figures, however narrow the terminal is."""

from __future__ import annotations

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from edge_lab.cli.plan import plan
from edge_lab.cli.recommend import recommend
from edge_lab.cli.tables import FigureTable, make_table
from tests.edge_lab.cli.test_planner import run_verb


def lines_of(table: FigureTable, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, markup=False, highlight=False)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_headings_are_broken_before_the_table_is():
    table = make_table("T", "scheme", "load peak", "fits")
    table.add_row("int4-head-fp16", "1,234", "yes")
    assert [line.rstrip() for line in lines_of(table, 40)] == [
        "T",
        "scheme          load peak  fits",
        "int4-head-fp16      1,234   yes",
    ]
    assert [line.rstrip() for line in lines_of(table, 29)] == [
        "T",
        "                 load",
        "scheme           peak  fits",
        "int4-head-fp16  1,234   yes",
    ]
    assert [line.rstrip() for line in lines_of(table, 28)] == [
        "T",
        "scheme          load peak",
        "int4-head-fp16      1,234",
        "",
        "scheme          fits",
        "int4-head-fp16   yes",
    ]


def test_a_cell_wider_than_the_terminal_is_broken_but_complete():
    table = make_table("T", "layer", "ms", "kernel")
    table.add_row("l" * 70, "1.5", "k" * 90)
    lines = lines_of(table, 60)
    assert all(len(line) <= 60 for line in lines)
    text = "".join(lines)
    assert (text.count("l") - 2, text.count("k") - 1, "1.5" in text) == (70 + 70 + 1, 90, True)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 2),
    st.lists(st.lists(st.from_regex(r"[a-z0-9]{1,12}", fullmatch=True), min_size=5, max_size=5),
             min_size=1, max_size=4),
    st.integers(44, 120),
)  # fmt: skip
def test_every_cell_is_there_whole(keys: int, rows: list[list[str]], width: int):
    table = make_table("T", "a key", "b", "c d", "e", "f", keys=keys)
    for row in rows:
        table.add_row(*row)
    lines = lines_of(table, width)
    assert all(len(line) <= width for line in lines)
    words = [word for line in lines for word in line.split()]
    for row in rows:
        for cell in row:
            assert cell in words
    # Every table of the several begins with the keys.
    starts = sum(line.split()[:2] == ["a", "key"] for line in lines)
    for key in {row[0] for row in rows}:
        assert sum(line.split()[:1] == [key] for line in lines) >= starts


@pytest.mark.parametrize("columns", [80, 60, 40])
def test_no_scheme_loses_its_name(columns: int):
    found = run_verb(plan, "deepseek-r1:1.5b", columns=columns).stdout
    for name in ("int4-head-fp16", "int4-head-int4", "int8-w8a8"):
        assert name in found
    assert "…" not in found
    candidates = run_verb(recommend, "--memory", "4GB", columns=columns).stdout
    assert "deepseek-r1:1.5b int8-w8a8" in candidates
    assert "…" not in candidates


def test_the_verdict_and_its_commands_come_first_and_reasons_on_demand():
    short = run_verb(recommend, "--memory", "4GB", columns=80).stdout
    assert short.startswith(
        "Taken: deepseek-r1:1.5b int8-w8a8.\nTo make it for JetPack 6:\n  edge-llm export"
    )
    table = short.partition("Candidates on")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(table) == 16  # four models in four precisions, a line each
    assert {line.split()[-1] for line in table} == {"taken", "fits", "dropped"}
    assert "exceed" not in short.partition("Tutorials")[0]
    assert "Why the others were not taken: -v." in short
    long = run_verb(recommend, "--memory", "4GB", "-v", columns=200).stdout
    assert "deepseek-r1:7b int4: dropped: " in long
    assert long.count(": dropped: ") == sum(line.endswith("dropped") for line in table)
