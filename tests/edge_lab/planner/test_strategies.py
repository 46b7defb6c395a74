"""What measured ways to answer are predicted to cost on a module."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge.errors import ConfigError
from edge_lab.planner.devices import MODULES
from edge_lab.planner.plan import find_device
from edge_lab.planner.strategies import best_within, plan_ways, power_limit_watts, read_ways


def result(**fields: Any) -> dict[str, Any]:
    ways = [
        {"way": "one", "correct": 60, "steps": 30_000.0, "joules": 2000.0},
        {"way": "stop", "correct": 58, "steps": 20_000.0, "joules": 1400.0},
        {"way": "vote", "correct": 72, "steps": 50_000.0, "joules": 3600.0},
        {"way": "both", "correct": 72, "steps": 35_000.0, "joules": 2500.0},
    ]
    for way in ways:
        way |= {"questions": 100, "accuracy": way["correct"] / 100}  # type: ignore[operator]
    return {
        "bundle": "bundles/mine", "device": None, "power_mode": None, "stop_when_sure": 0.9,
        "vote": 8, "ways": ways, **fields,
    }  # fmt: skip


def test_steps_take_the_time_and_the_power_of_the_module():
    one, stop, vote, both = plan_ways([result()], find_device("agx-orin-64", "30W"), 0.01)
    assert one.seconds == pytest.approx(300 * 0.01)
    assert one.joules == pytest.approx(3 * 30)
    assert one.right_per_minute == pytest.approx(0.6 * 20)
    assert one.right_per_kj == pytest.approx(0.6 * 1000 / 90)
    assert {way.joules_are for way in (one, stop, vote, both)} == {"predicted"}
    assert (one.options, vote.options) == ((), ("--vote", "8"))
    assert stop.options == ("--stop-when-sure", "0.9")
    assert both.options == ("--stop-when-sure", "0.9", "--vote", "8")


def test_rails_count_on_the_module_and_in_the_mode_where_they_were_read():
    rails = result(device="agx-orin-64", power_mode="MODE_30W")
    for device, mode, measured in (
        ("agx-orin-64", "30W", True),
        ("agx-orin-64", "50W", False),
        ("agx-orin-32", "30W", False),
    ):
        found = plan_ways([rails], find_device(device, mode), 0.01)[0]
        assert found.joules_are == ("measured" if measured else "predicted")
        assert (found.joules == pytest.approx(20)) is measured


def test_the_best_way_within_the_energy_is_chosen():
    ways = plan_ways([result()], find_device("agx-orin-64", "30W"), 0.01)
    chosen = {limit: best_within(ways, limit) for limit in (50, 60, 90, 105, 1000)}
    assert chosen.pop(50) is None
    names = {limit: way.way for limit, way in chosen.items() if way is not None}
    # Both has as many right as the vote, with less.
    assert names == {60: "stop", 90: "one", 105: "both", 1000: "both"}


def test_every_mode_of_every_module_has_its_power():
    for module in MODULES.values():
        watts = [power_limit_watts(find_device(module.name, mode.name)) for mode in module.modes]
        assert None not in watts
        assert watts == sorted(watts, reverse=True)  # type: ignore[type-var]
    assert power_limit_watts(find_device("cpu", None, 5e10)) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("no", "is not what edge-llm eval --ways --json prints"),
        ("[]", "is not what"),
        (json.dumps({"bundle": "a", "ways": []}), "is not what"),
        (json.dumps(result(ways=[{"way": "guess"}])), "is not what"),
        (json.dumps(result(ways=[{**result()["ways"][0], "questions": 0}])), "without questions"),
        (json.dumps(result(ways=[{**result()["ways"][0], "steps": -1}])), "below 0"),
        (json.dumps(result(ways=[{**result()["ways"][0], "steps": "1"}])), "is not what"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, text: str, message: str):
    path = tmp_path / "ways.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_ways(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_ways(tmp_path)
