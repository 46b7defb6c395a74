"""Ways to answer, measured with models whose words a test writes, and with a tiny one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from edge.errors import ConfigError
from edge.runtime.scheduler.request import SchedulerStats
from edge_lab.cli.eval import evaluate
from edge_lab.measure.report import html_ways_report
from edge_lab.measure.strategies import summarize_way, weighed_steps
from tests.edge_lab.measure.test_report import check_html


def test_a_step_of_many_rows_weighs_little_more_than_one():
    before = SchedulerStats(steps=5, prompt_tokens=40, completion_tokens=7, outcomes={"stop": 2})
    # A prompt of 11 rows, 4 of them cached, then two samples of 3 tokens side by side.
    after = SchedulerStats(
        steps=8,
        prompt_tokens=40 + 22,
        cached_tokens=4 + 10,
        completion_tokens=7 + 6,
        outcomes={"stop": 3, "cancelled": 1},
    )
    # Steps of 8 rows (7 of one prompt, 1 of the other), of 2 and of 2.
    assert weighed_steps(before, after) == pytest.approx(1.7 + 1.1 + 1.1)


def test_a_way_is_compared_on_the_same_questions():
    one = np.array([[1, 10, 20, 3.0], [0, 10, 20, 3.0]] * 20)
    way = np.array([[1, 30, 30, 6.0], [1, 30, 30, 6.0]] * 20)
    found = summarize_way(way, one, joules=500.0)
    assert (found["correct"], found["accuracy"], found["tokens"]) == (40, 1.0, 1200)
    assert found["right_per_minute"] == pytest.approx(60 * 40 / 240)
    assert found["right_per_1000_steps"] == pytest.approx(1000 * 40 / 1200)
    assert found["right_per_kj"] == pytest.approx(80)
    assert found["gain"] == 0.5
    low, high = found["gain_interval"]
    assert 0.3 < low < 0.5 < high < 0.7
    # Pairs: every question takes half as many steps again, whichever are drawn.
    assert found["steps_ratio_interval"] == pytest.approx([1.5, 1.5])
    assert summarize_way(one, one, None)["gain_interval"] == [0, 0]
    assert summarize_way(one, one, None)["right_per_kj"] is None


def test_the_report_has_the_frontier():
    one = np.array([[1, 10, 20, 3.0], [0, 10, 20, 3.0]] * 20)
    way = np.array([[1, 30, 30, 6.0], [1, 30, 30, 6.0]] * 20)
    ways = [
        {"way": "one", **summarize_way(one, one, 200.0)},
        {"way": "vote", **summarize_way(way, one, 500.0)},
    ]
    result = {
        "bundle": "bundles/mine",
        "task": {"name": "t.jsonl", "sha256": "0" * 64},
        "temperature": 0.6,
        "energy": "rails",
        "ways": ways,
    }
    page = html_ways_report([result])
    check_html(page)
    assert 'aria-label="one: 20, 0.5"' in page
    assert 'aria-label="vote: 30, 1"' in page
    assert "<td>80.00</td><td>+50.0 (" in page
    without = html_ways_report([{**result, "energy": None}])
    assert "80.00" not in without
    assert "steps stand for energy" in without


@pytest.fixture
def task(tmp_path: Path) -> Path:
    path = tmp_path / "task.jsonl"
    rows = [{"question": word, "answer": "#### 1"} for word in ("hello", "the sea")]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def invoke(*arguments: object) -> Any:
    wide = {"COLUMNS": "200"}
    return CliRunner().invoke(evaluate, [str(each) for each in arguments], env=wide)


@pytest.mark.slow
def test_all_ways_of_a_tiny_bundle(tiny_bundles, task: Path, tmp_path: Path):
    page = tmp_path / "ways.html"
    given = ("--task", task, "--max-tokens", 12, "--vote", 3, "--seed", 3)
    bundle = tiny_bundles("qwen2", "portable")
    result = invoke(bundle, *given, "--ways", "one,stop,vote,both", "--json", "--html", page)
    assert result.exit_code == 0, (result.output, result.exception)
    (found,) = map(json.loads, result.stdout.splitlines())
    one, stop, vote, _ = found["ways"]
    assert [way["way"] for way in found["ways"]] == ["one", "stop", "vote", "both"]
    assert found["energy"] is None
    # So short a thought has no trial, so it is the same answer; the vote has three, side by side.
    assert (stop["tokens"], stop["steps"]) == (one["tokens"], one["steps"])
    assert one["tokens"] < vote["tokens"] <= 2 * 3 * 12
    assert one["steps"] < vote["steps"]
    assert vote["steps"] / one["steps"] < vote["tokens"] / one["tokens"]
    assert one["steps_ratio"] == 1
    check_html(page.read_text())
    printed = invoke(bundle, *given, "--ways", "one,vote", "--limit", 1).stdout
    assert "right per 1,000 steps" in printed
    assert "right per kJ" not in printed


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--ways", "one,three"), "--ways takes some of one,stop,vote,both, with one"),
        (("--ways", "stop"), "with one, not 'stop'"),
        (("--ways", "one,one"), "--ways takes some of"),
        (("--ways", "one,vote", "--temperature", 0), "--temperature 0 makes all samples"),
        (("--ways", "one,vote", "--stop-when-sure", 0.5), "has neither stop nor both"),
        (("--ways", "one,stop", "--vote", 3), "has neither vote nor both"),
        (("--ways", "one", "--save"), "--save does not go with --ways"),
        (("--ways", "one", "--batch", 2), "--batch does not go with --ways"),
        (("--vote", 3), "--vote needs --ways"),
        (("--stop-when-sure", 0.5), "--stop-when-sure needs --ways"),
    ],
)
def test_ignored_options_are_refused(tiny_bundles, task: Path, given, message: str):
    result = invoke(tiny_bundles("qwen2", "portable"), "--task", task, *given)
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


def test_only_numbers_can_be_voted_on(tiny_bundles, tmp_path: Path):
    path = tmp_path / "choices.jsonl"
    path.write_text(json.dumps({"question": "a", "choices": ["b", "c"], "answer": 1}))
    bundle = tiny_bundles("qwen2", "portable")
    result = invoke(bundle, "--task", path, "--ways", "one,vote")
    assert "--ways compares answers that are numbers" in str(result.exception)
    assert "--ways needs --task" in str(invoke(bundle, "--ways", "one").exception)
