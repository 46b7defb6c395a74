"""How far a calibration says it is agrees with what its parts took."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

import pytest

from edge_lab.cli.progress import ProgressLines
from edge_lab.planner.models import BUILT_IN
from export.quantize.effort import layer_effort
from export.recipes import RECIPES

# CPU seconds of the first layer of Qwen2.5-Coder-1.5B on a loaded machine by the default: look
# without the embeddings, then the parts of each linear.
RECORDED: dict[str, tuple[tuple[float, ...], ...]] = {
    "deepseek-r1:1.5b": (
        (8.2,),
        (2.52, 0.34, 0.16, 0.17, 0.35),
        (1.04, 0.66, 0.16, 0.13, 0.22),
        (0.58, 1.0, 0.15, 1.1, 2.44),
        (4.12, 3.04, 4.34, 5.56, 4.87),
    ),
}
SEQUENCES = 16


def reports(model: str) -> Iterator[tuple[float, float]]:
    """Seconds at which layers are reported as done, and how many."""
    spec, recipe = BUILT_IN[model].spec, RECIPES["default"]
    effort = layer_effort(spec.layer(0), recipe.calibration_tokens)
    (look,), *linears = RECORDED[model]
    now = 0.0
    for layer in range(spec.num_layers):
        for number in range(1, SEQUENCES + 1):
            now += look / SEQUENCES
            yield now, layer + effort.look / effort.total * number / SEQUENCES
        for parts, name in zip(linears, effort.plan, strict=True):
            for number, seconds in enumerate(parts, 1):
                now += seconds
                yield now, layer + effort.done(name, number)


@pytest.mark.parametrize("model", RECORDED)
def test_after_a_minute_the_time_that_is_left_is_right_within_a_fifth(model: str):
    clock, found = 0.0, []
    lines = ProgressLines(lambda line: found.append((clock, line)), lambda: clock)
    marks = [(0.0, 0.0), *reports(model)]
    layers, end = round(marks[-1][1]), marks[-1][0]
    assert marks[-1][1] == pytest.approx(layers)
    lines("calibrate", 0, layers)
    for (_, done), (until, after) in pairwise(marks):
        while clock < until - 1:
            clock += 1
            lines.tick()
        clock = until
        lines("calibrate", min(after, layers), layers)
        assert after > done
    told = 0
    for at, line in found:
        if at < 60 or end - at < 60 or "left" not in line:
            continue
        *hours, minutes, seconds = map(int, re.findall(r"\d+", line.split("about ")[1]))
        left = 3600 * sum(hours) + 60 * minutes + seconds
        assert left == pytest.approx(end - at, rel=0.2), line
        told += 1
    assert told > 5


def test_more_tokens_and_larger_linears_take_longer():
    spec = BUILT_IN["deepseek-r1:1.5b"].spec
    few, many = (layer_effort(spec.layer(0), tokens) for tokens in (2048, 8192))
    assert many.look == 4 * few.look
    assert all(sum(p) < sum(many.plan[name]) < 4 * sum(p) for name, p in few.plan.items())
    assert list(few.plan) == ["qkv", "o", "gate_up", "down"]
    assert sum(few.plan["down"]) > sum(few.plan["gate_up"]) > sum(few.plan["o"])
    assert few.done("qkv", 0) == few.look / few.total
    assert few.done("down", 5) == pytest.approx(1)
