"""The tables of docs/measured.md: made of the records, and as their figures say."""

from __future__ import annotations

import copy
from typing import Any

from . import table as quality_table
from .score import FORMER_TEXTS, OWN_ANSWERS, TEXTS


def a_record() -> dict[str, Any]:
    texts: dict[str, dict[str, float]] = {
        name: {
            "kl_mean": 0.01 * number,
            "kl_p99": 0.1,
            "perplexity_ratio": 1.5 if number == 1 else 1.0,
            "top1_agreement": 0.9,
            "tokens": 1533,
        }
        for number, name in enumerate(TEXTS, 1)
    }
    row: dict[str, Any] = {
        "name": "int4",
        "commit": "abc",
        "recipe": "--quant int4",
        "cpu_s": 90,
        "peak_bytes": 1,
        "bits_per_weight": 4.5,
        "bits_per_weight_with_lm_head": 5.34,
        "texts": texts,
    }
    partial = {**copy.deepcopy(row), "name": "half"}
    del partial["texts"]["chess"]
    return {"model": "mine", "rows": [row, partial]}


def test_the_page_is_made_of_what_was_recorded():
    page = quality_table.PAGE.read_text("utf-8")
    assert page.count(quality_table.BEGIN) == page.count(quality_table.END) == 1
    assert quality_table.page(page, quality_table.records()) == page, (
        "run: python3 -m lab quality-table"
    )


def cells(found: dict[str, Any], row: str) -> dict[str, str]:
    """A row's cells by the heads of their columns."""
    lines = [line for line in quality_table.tables([found]).splitlines() if line.startswith("|")]
    [heads], [ours] = (
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith(of)]
        for of in ("| Format", f"| `{row}`")
    )
    return dict(zip(heads, ours, strict=True))


def test_means_by_hand():
    found = a_record()
    assert cells(found, "int4") == {
        "Format": "`int4`",
        "Bits per weight (with lm_head)": "4.50 (5.34)",
        "CPU minutes": "1.5",
        "KL, ten texts": "0.0550",
        "KL, five known kinds": "0.0300",
        "KL, five unknown kinds": "0.0800",
        "KL, p99": "0.10",
        "Top-1, %": "90.0",
        "Perplexity over float's": f"{1.5**0.1:.3f}",
    }
    found["rows"][0]["texts"][OWN_ANSWERS] = {"kl_mean": 0.125}
    assert cells(found, "int4")["KL, own answers"] == "0.1250"
    assert cells(found, "half")["KL, own answers"] == ""


def test_a_mean_needs_all_of_its_texts():
    found = a_record()
    assert {head: cell for head, cell in cells(found, "half").items() if cell} == {
        "Format": "`half`",
        "Bits per weight (with lm_head)": "4.50 (5.34)",
        "CPU minutes": "1.5",
        "KL, five known kinds": "0.0300",
    }
    # Where no row has it, there is no column of it either.
    found["rows"] = found["rows"][1:]
    assert "KL, ten texts" not in cells(found, "half")


def test_a_former_text_counts_in_no_mean_of_the_ten():
    found = a_record()
    before = cells(found, "int4")
    for name in FORMER_TEXTS:
        assert "KL, former five" not in cells(found, "int4")
        figures = {"kl_mean": 0.5, "kl_p99": 5, "perplexity_ratio": 2, "top1_agreement": 0.1}
        found["rows"][0]["texts"][name] = figures
    assert cells(found, "int4") == {**before, "KL, former five": "0.5000"}


def test_served_figures_are_a_column_if_all_texts_have_them():
    found = a_record()
    texts = found["rows"][0]["texts"]
    for name in TEXTS:
        assert "KL, as the CPU serves it" not in cells(found, "int4")
        texts[name]["kl_served"] = 0.25
    assert cells(found, "int4")["KL, as the CPU serves it"] == "0.2500"


def test_the_page_explains_a_model_off_its_grid():
    about = {"steps": 129, "loss_before": 3.0, "loss_after": 2.5, "moved_steps": 0.4}
    text = quality_table.tables([{**a_record(), "off_grid": about}])
    for part in ("129 steps", "3.00 before, 2.50 after", "0.40 steps of the grid"):
        assert part in text


def test_new_tables_replace_old_ones_and_nothing_else():
    begin, end = quality_table.BEGIN, quality_table.END
    before = f"# Page\n\n{begin}\n\nold\n\n{end}\n\nafter\n"
    once = quality_table.page(before, [a_record()])
    assert once.startswith(f"# Page\n\n{begin}")
    assert once.endswith(f"{end}\n\nafter\n")
    assert "old" not in once
    assert quality_table.page(once, [a_record()]) == once


def test_records_are_whole():
    for row in (row for found in quality_table.records() for row in found["rows"]):
        assert row["bits_per_weight"] > 0
        assert row["cpu_s"] > 0
        assert row["commit"]
        for figures in row["texts"].values():
            assert figures["tokens"] > 700
            assert figures["kl_mean"] >= 0
            assert 0 < figures["top1_agreement"] <= 1
