"""A report: whole or refused, and a table that no stranger's text breaks."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from edge.errors import ConfigError, IntegrityError
from edge_lab.prove.report import COLUMNS, canonical, markdown, read_report, seal, table

BENCH = {
    "verdict": "passed",
    "result": {
        "decode_tps": 412.345,
        "prefill_tps": 18000.0,
        "decode_joules_per_token": 0.0813,
        "roofline": {"reached": 0.71},
    },
}
CONTENT: dict[str, Any] = {
    "schema": 1,
    "started": "2026-11-30T20:00:00Z",
    "edge_llm": "0.1.0",
    "gpu": True,
    "tensorrt": "10.3.0",
    "machine": {
        "module": "NVIDIA Jetson AGX Orin Developer Kit",
        "processor": "Cortex-A78AE",
        "jetpack": "6.2",
        "l4t": "36.4.3",
        "power_mode": "MAXN",
    },
    "measured": "own",
    "engines": {
        "own": {
            "build": {"verdict": "passed"},
            "verify": {"verdict": "passed"},
            "bench": BENCH,
            "layers": {"verdict": "passed", "skipped_tactics": 3},
            "soak": {"verdict": "passed", "result": {"growth": {"grows": False}}},
        },
        "tensorrt": {
            "build": {"verdict": "failed", "reason": "no kernel"},
            "verify": {"verdict": "skipped", "reason": "the build failed"},
            "bench": {"verdict": "skipped", "reason": "the build failed"},
            "layers": {"verdict": "skipped", "reason": "the build failed"},
            "soak": {"verdict": "skipped", "reason": "the build failed"},
        },
    },
    "power_modes": {"30W": BENCH},
    "problems": ["tensorrt build failed: no kernel"],
}


def write(path: Path, report: object) -> Path:
    path.write_text(json.dumps(report, indent=3, ensure_ascii=False))
    return path


def test_a_report_survives_any_way_of_writing_its_json(tmp_path: Path):
    content = {**CONTENT, "started": "früh", "small": 1e-7, "large": 12345678901234567890}
    assert read_report(write(tmp_path / "r.json", seal(content))) == content


def test_the_hash_can_be_checked_without_this_program():
    sealed = seal(CONTENT)
    text = json.dumps(sealed["content"], sort_keys=True, separators=(",", ":"))
    assert sealed["sha256"] == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("at", ["decode_tps", "module", "problems"])
def test_one_changed_figure_is_noticed(tmp_path: Path, at: str):
    sealed = copy.deepcopy(seal(CONTENT))
    text = json.dumps(sealed)
    changed = {
        "decode_tps": text.replace("412.345", "512.345", 1),
        "module": text.replace("AGX Orin", "Orin NX", 1),
        "problems": text.replace('["tensorrt build failed: no kernel"]', "[]", 1),
    }[at]
    assert changed != text
    path = tmp_path / "r.json"
    path.write_text(changed)
    with pytest.raises(IntegrityError, match="is not as edge-llm prove wrote it"):
        read_report(path)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "null", '{"content": 1, "sha256": "x"}', '{"content": {}, "sha256": 1}',
     "\udcff", "[" * 100_000, '{"content": {}, "sha256": "x", "more": 1}'],
    ids=range(9),
)  # fmt: skip
def test_other_files_than_reports_are_refused(tmp_path: Path, text: str):
    path = tmp_path / "r.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match="it is no report of edge-llm prove"):
        read_report(path)


def test_another_schema_and_a_missing_file_say_what_to_do(tmp_path: Path):
    path = write(tmp_path / "r.json", seal({**CONTENT, "schema": 2}))
    with pytest.raises(ConfigError, match="schema 2, and this edge-llm reads 1; read it with the"):
        read_report(path)
    with pytest.raises(ConfigError, match="cannot read the report"):
        read_report(tmp_path / "none")


def test_the_table_has_a_row_per_engine_and_power_mode():
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in table([CONTENT])]
    assert [(row["engine"], row["power mode"]) for row in rows] == [
        ("own", "MAXN"),
        ("tensorrt", "MAXN"),
        ("own", "30W"),
    ]
    own, refused, _ = rows
    assert own["decode tok/s"] == "412.3"
    assert own["of the ceiling"] == "71%"
    assert own["J/token"] == "0.0813"
    assert (own["equals the CPU"], own["memory kept"], own["tactics skipped"]) == (
        "yes",
        "yes",
        "3",
    )
    assert (refused["decode tok/s"], refused["equals the CPU"]) == ("-", "-")
    digest = hashlib.sha256(canonical(CONTENT)).hexdigest()[:12]
    assert own["report"] == digest


def test_a_leak_and_a_wrong_answer_stand_out():
    content = copy.deepcopy(CONTENT)
    content["engines"]["own"]["verify"]["verdict"] = "failed"
    content["engines"]["own"]["soak"]["result"]["growth"]["grows"] = True
    row = dict(zip(COLUMNS, table([content])[0], strict=True))
    assert (row["equals the CPU"], row["memory kept"]) == ("NO", "NO")


def test_a_strangers_text_breaks_no_page():
    content = copy.deepcopy(CONTENT)
    content["machine"]["module"] = "x | y\n<script>alert(1)</script>\x1b[31m" + "long" * 100
    content["problems"] = ["[click](https://evil) | `rm`\n# title"]
    page = markdown([content])
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 3
    assert {line.count("|") for line in rows} == {len(COLUMNS) + 1}
    assert not set("<>`[]\x1b") & set(page)
    assert "\n# title" not in page


def test_a_report_that_lacks_something_is_an_error():
    with pytest.raises(ConfigError, match="lacks what every report has"):
        table([{key: value for key, value in CONTENT.items() if key != "engines"}])
    spoilt = copy.deepcopy(CONTENT)
    spoilt["engines"]["own"]["bench"]["result"]["roofline"]["reached"] = "fast"
    with pytest.raises(ConfigError, match="lacks what every report has"):
        table([spoilt])
