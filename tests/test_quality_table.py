"""The tables of docs/quantization-measured.md: made of the records, and as their figures say."""

from __future__ import annotations

import copy
from typing import Any

from scripts import quality_table
from scripts.quality_score import OWN_ANSWERS, TEXTS


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
    del partial["texts"]["logs"]
    return {"model": "mine", "rows": [row, partial]}


def test_the_page_is_made_of_what_was_recorded():
    page = quality_table.PAGE.read_text("utf-8")
    assert page.count(quality_table.BEGIN) == page.count(quality_table.END) == 1
    assert quality_table.page(page, quality_table.records()) == page, (
        "run: python -m scripts.quality_table"
    )


def test_means_by_hand_and_no_row_that_lacks_a_text():
    found = a_record()
    lines = quality_table.tables([found]).splitlines()
    (summary, by_text) = (line for line in lines if line.startswith("| `int4`"))
    cells = [cell.strip() for cell in summary.split("|")[1:-1]]
    assert cells[1:7] == ["4.50 (5.34)", "1.5", "0.0550", "0.0300", "0.0800", ""]
    assert cells[7:] == ["0.10", "90.0", f"{1.5**0.1:.3f}"]
    assert by_text.count("|") == 2 + len(TEXTS)
    assert not any("half" in line for line in lines)
    found["rows"][0]["texts"][OWN_ANSWERS] = {"kl_mean": 0.125}
    assert "| 0.1250 |" in quality_table.tables([found])


def test_what_is_served_is_a_column_where_all_texts_have_it():
    found = a_record()
    texts = found["rows"][0]["texts"]
    for name in TEXTS:
        assert "serves" not in quality_table.tables([found])
        texts[name]["kl_served"] = 0.25
    [head, _, row, *_] = quality_table.tables([found]).splitlines()[2:]
    assert head.endswith("| KL, as the CPU serves it |")
    assert row.endswith("| 0.2500 |")


def test_what_a_model_off_its_grid_is_is_said():
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
            assert figures["tokens"] > 1000
            assert figures["kl_mean"] >= 0
            assert 0 < figures["top1_agreement"] <= 1
