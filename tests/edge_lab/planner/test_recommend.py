"""The decision tree as a table."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, get_args

import pytest

from edge.bundle.model_names import bundle_name
from edge.cli.options import BundlePath
from edge.errors import ConfigError
from edge_lab.planner.memory import Deployment
from edge_lab.planner.models import BUILT_IN
from edge_lab.planner.plan import find_device
from edge_lab.planner.recommend import (
    QUALITY,
    Benchmark,
    Recommendation,
    Wish,
    recommend,
    score,
    tutorial_leaf,
)
from edge_lab.planner.speed import FITTED

GB = 10**9
DISTILLS = ("deepseek-r1:1.5b", "deepseek-r1:7b", "deepseek-r1:8b")


def choose(
    wish: Wish,
    device: str = "agx-orin-64",
    models: tuple[str, ...] = tuple(BUILT_IN),
    **deployment: Any,
) -> Recommendation:
    return recommend(wish, find_device(device), Deployment(**deployment), FITTED, models)


@pytest.mark.parametrize(
    ("wish", "leaf"),
    [
        (Wish(memory_bytes=GB, tpot_s=0.1), "1.5B quantized"),
        (Wish(memory_bytes=GB // 2), "1.5B quantized"),
        (Wish(memory_bytes=8 * GB, tpot_s=0.1), "7B quantized"),
        (Wish(tpot_s=0.05), "7B quantized"),
        (Wish(memory_bytes=8 * GB, tpot_s=0.2), "8B"),
        (Wish(), "8B"),
    ],
)
def test_the_leaves_of_the_drawing(wish: Wish, leaf: str):
    assert tutorial_leaf(wish)[0] == leaf


@pytest.mark.parametrize(
    ("wish", "device", "models", "taken", "holds"),
    [
        # Its first leaf holds for the weights alone ...
        (
            Wish(memory_bytes=GB, memory_of="weights", tpot_s=0.1),
            "agx-orin-64",
            tuple(BUILT_IN),
            "deepseek-r1:1.5b int4",
            True,
        ),
        # ... and not for a process, which takes 1.8 GB.
        (Wish(memory_bytes=GB, tpot_s=0.1), "agx-orin-64", tuple(BUILT_IN), None, False),
        # The second: of the three distills, 7B scores best and is far below 100 ms.
        (
            Wish(memory_bytes=16 * GB, tpot_s=0.1),
            "agx-orin-64",
            DISTILLS,
            "deepseek-r1:7b int8-w8a8",
            True,
        ),
        (Wish(tpot_s=0.1), "orin-nano-8", DISTILLS, "deepseek-r1:7b int4", True),
        # The third: without a limit in time, the 8B of 0528 is the best.
        (Wish(), "agx-orin-64", tuple(BUILT_IN), "deepseek-r1:8b-0528 int8-w8a8", True),
        # The same model meets 100 ms too: the drawing's 7B is not the best there is.
        (Wish(tpot_s=0.1), "agx-orin-64", tuple(BUILT_IN), "deepseek-r1:8b-0528 int8-w8a8", True),
        (Wish(tpot_s=0.01), "agx-orin-64", tuple(BUILT_IN), "deepseek-r1:1.5b int4", False),
        (Wish(tpot_s=0.001), "agx-orin-64", tuple(BUILT_IN), None, False),
        (Wish(quality=90), "agx-orin-64", tuple(BUILT_IN), None, False),
        (
            Wish(quality=90, benchmark="math-500"),
            "agx-orin-64",
            tuple(BUILT_IN),
            "deepseek-r1:7b int8-w8a8",
            False,
        ),
        (Wish(ttft_s=0.07), "agx-orin-64", tuple(BUILT_IN), "deepseek-r1:1.5b int8-w8a8", False),
    ],
)
def test_the_tree(wish: Wish, device: str, models: tuple[str, ...], taken: str | None, holds: bool):
    found = choose(wish, device, models)
    assert (None if found.taken is None else found.taken.name) == taken
    assert found.verdict.startswith("holds") == holds
    assert bool(found.commands) == (taken is not None)


def test_every_candidate_has_a_reason_or_meets_every_wish():
    wish = Wish(memory_bytes=6 * GB, tpot_s=0.03, ttft_s=0.4, quality=25)
    found = choose(wish)
    assert len(found.candidates) == 4 * 4
    for candidate in found.candidates:
        meets = (
            candidate.memory_bytes <= 6 * GB
            and candidate.tpot_s <= 0.03
            and candidate.ttft_s <= 0.4
            and candidate.score is not None
            and candidate.score >= 25
        )
        assert meets == (not candidate.reasons), candidate.name
    kept = [c for c in found.candidates if not c.reasons]
    assert found.taken is kept[0]
    assert all((kept[0].score or 0) >= (c.score or 0) for c in kept)


def test_the_drawings_figures_are_compared_with_ours():
    found = choose(Wish(memory_bytes=GB, tpot_s=0.1))
    assert "1.8 GB is not under 1 GB" in found.verdict
    assert "MMLU was measured as 41.0 %" in found.verdict
    assert "even deepseek-r1:1.5b int4 is dropped" in found.verdict


def test_a_module_without_the_memory_drops_what_does_not_fit():
    found = choose(Wish(), "orin-nano-8")
    (dropped,) = [c for c in found.candidates if c.name == "deepseek-r1:7b fp16"]
    assert "do not fit orin-nano-8" in dropped.reasons[0]
    assert found.remark is not None
    assert "swap" in found.remark
    assert "not the GPU" in found.remark
    assert choose(Wish()).remark is None


@pytest.mark.parametrize("tpot_s", [0.2, 0.03, 0.01])
def test_commands_are_those_of_this_command_line(tpot_s: float, monkeypatch: pytest.MonkeyPatch):
    """W8A8, INT4 of a large and of a small model."""
    from engines.cli import build
    from export.cli import export

    found = choose(Wish(tpot_s=tpot_s), batch=2, kv_capacity=2048)
    assert found.taken is not None
    assert found.taken.option.recipe is not None
    monkeypatch.setattr(BundlePath, "convert", lambda _, value, *rest: Path(value))
    assert list(found.commands) == ["jetpack6", "jetpack7"]
    for target, lines in found.commands.items():
        exporting, building = map(shlex.split, lines)
        assert (exporting[:2], building[:2]) == (["edge-llm", "export"], ["edge-llm", "build"])
        made = export.make_context("export", exporting[2:]).params
        assert (made["target"], made["kv_capacity"]) == (target, 2048)
        assert made["quant"] == found.taken.option.recipe.quant
        assert made["output"].name == bundle_name(made["source"], found.taken.option.name)
        built = build.make_context("build", building[2:]).params
        assert (built["bundle"], built["max_batch"]) == (made["output"], 2)


@pytest.mark.parametrize("benchmark", get_args(Benchmark))
def test_scores_never_rise_by_quantization(benchmark: Any):
    for model in QUALITY:
        floating = score(model, "fp16", benchmark)
        for quant in ("int8", "int8-w8a8", "int4"):
            quantized = score(model, quant, benchmark)
            assert (quantized is None) == (floating is None)
            assert quantized is None or floating is None or quantized <= floating


def test_small_models_lose_more():
    assert score("deepseek-r1:1.5b", "int4", "math-500") == pytest.approx(83.9 * 0.94)
    assert score("deepseek-r1:7b", "int4", "math-500") == pytest.approx(92.8 * 0.97)


def test_wrong_wishes_are_refused():
    with pytest.raises(ConfigError, match="--model gpt is unknown"):
        choose(Wish(), models=("gpt",))
    with pytest.raises(ConfigError, match="--prompt-tokens 5000 exceeds"):
        choose(Wish(prompt_tokens=5000))
    with pytest.raises(ConfigError, match="has no known bandwidth"):
        recommend(Wish(), find_device("cpu"), Deployment("ort-cpu"), FITTED)
