"""The expected time is that of the documented exports, and the README says the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge.bundle.quant_rules import Quant
from edge_lab.planner.models import BUILT_IN
from edge_make.recipe import Recipe
from export.config import DEFAULT_METHOD
from export.estimate import describe_s, export_s
from export.quantize.calibrated import Method
from export.recipes import RECIPES
from export.verify import REPORT_TOKENS

MODEL = BUILT_IN["deepseek-r1:1.5b"].spec
ROOT = Path(__file__).parents[2]
README, QUANTIZATION = (
    (ROOT / name).read_text("utf-8") for name in ("README.md", "docs/quantization.md")
)


def expected_s(
    quant: Quant,
    rounding: Method = DEFAULT_METHOD,
    measured_tokens: int = 0,
    tokens: int = RECIPES["default"].calibration_tokens,
) -> float:
    schemes = Recipe(quant).schemes(MODEL)
    return export_s(MODEL, schemes, rounding, measured_tokens, tokens=tokens)


@pytest.mark.parametrize(
    ("quant", "rounding", "tokens", "measured_s"),
    [  # whole exports of Qwen2.5-Coder-1.5B on two cores, beside other work
        ("fp16", "rtn", 0, 22),
        ("int8", "rtn", 0, 36),
        ("int4", "rtn", 0, 28),
        ("int4", "awq", 13_000, 8.8 * 60),
        ("int4", "awq+gptq", 20_000, 38.4 * 60),
        ("int8-w8a8", "rtn", 0, 934),
    ],
)
def test_estimates_match_measured_times(
    quant: Quant, rounding: Method, tokens: int, measured_s: float
):
    # Busy machines differ by half, and nobody plans an afternoon by less.
    assert measured_s / 2 < expected_s(quant, rounding, tokens=tokens) < measured_s * 2


def test_the_readme_says_what_the_export_says():
    minutes = describe_s(expected_s("int4")).removesuffix("min") + "minutes"
    assert f"calibrates (AWQ, then GPTQ, in groups of 32) for {minutes} on two cores" in README
    measuring_s = expected_s("int4", measured_tokens=REPORT_TOKENS) - expected_s("int4")
    assert 60 < measuring_s < 120
    assert "then measures for about two minutes what" in README
    assert "about two minutes for one of 1.5B" in QUANTIZATION
    faster = describe_s(expected_s("int4", "awq")).removesuffix("min") + "minutes"
    assert f"`--method awq` takes {faster} and" in README


def test_a_calibrated_layer_costs_more_than_its_neighbours():
    """Per layer, not per model: what --keep leaves to INT8 is rounded."""
    kept = Recipe("int4", keep=(("layers.*", "int8"),)).schemes(MODEL)
    assert export_s(MODEL, kept, DEFAULT_METHOD, 0) < expected_s("int4") / 5


@pytest.mark.parametrize(
    ("seconds", "text"), [(1, "about 5 s"), (61, "about 65 s"), (101, "about 2 min")]
)
def test_times_are_rough(seconds: float, text: str):
    assert describe_s(seconds) == text
