"""Plans, their picture, and calibration from a benchmark's file."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from edge.errors import ConfigError
from edge_lab.planner.calibration import calibrated, read_runs
from edge_lab.planner.memory import Deployment
from edge_lab.planner.models import BUILT_IN, PlannedModel, decoder_spec, find_model
from edge_lab.planner.picture import draw_plan
from edge_lab.planner.plan import CPU, ModelPlan, find_device, make_plan
from edge_lab.planner.speed import FITTED
from edge_make.recipe import VARIANTS
from tests.conftest import Bundles

SVG = "{http://www.w3.org/2000/svg}"
BENCH: dict[str, Any] = {
    "schema": 1,
    "device": {"name": "agx-orin-64", "power_mode": "MAXN", "bytes_per_s": 204.8e9},
    "work": {
        "step_bytes": 912_000_000,
        "num_layers": 28,
        "kv_bytes_per_token": 28672,
        "linear_ops": 2_620_000_000,
        "head_ops": 466_000_000,
        "attention_ops": 172_032,
        "int8_share": 0.0,
    },
    "batch": 1,
    "context": 576.0,
    "prompt_tokens": 512,
    "max_prefill": 512,
    "tpot_s": {"median": 0.0070, "mad": 0.0001},
    "prefill_s": {"median": 0.060},
}


def make(name: str = "deepseek-r1:1.5b", device: str = "agx-orin-64", **options: Any) -> ModelPlan:
    deployment = Deployment("ort-cpu" if device == CPU else "tensorrt")
    return make_plan(BUILT_IN[name], find_device(device), deployment, FITTED, **options)


@pytest.mark.parametrize("name", list(BUILT_IN))
def test_every_quantization_stands_side_by_side(name: str):
    plan = make(name)
    assert [option.name for option in plan.options] == list(VARIANTS)
    process = {option.name: option.memory.process_bytes for option in plan.options}
    assert process["int4-head-int4"] < process["int4"] < process["int8"] < process["fp16"]
    decode = {option.name: option.speeds[0].decode_tps for option in plan.options}
    assert decode["int4-head-int4"] > decode["int4"] > decode["int8"] > decode["fp16"]


def test_memory_decides_what_fits():
    fits = {option.name: option.fits for option in make("deepseek-r1:7b", "orin-nano-8").options}
    assert fits["int4"]
    assert not fits["fp16"]
    assert all(option.fits is None for option in make(device=CPU).options)


def test_a_prediction_says_what_it_rests_on():
    def basis(
        device: str = "agx-orin-64", mode: str | None = None, batch: int = 1
    ) -> dict[str, Any]:
        plan = make_plan(
            BUILT_IN["deepseek-r1:1.5b"], find_device(device, mode), Deployment(batch=batch), FITTED
        )
        return {o.name: (o.basis["decode"], o.basis["prefill"]) for o in plan.options}

    fitted, carried = "fitted", "carried over"
    assert basis() == {
        "fp16": (fitted, carried),
        "int8": (fitted, carried),
        "int8-w8a8": (carried, carried),
        **{name: (fitted, fitted) for name in VARIANTS if name.startswith("int4")},
    }
    of_eight = basis(batch=8)
    assert of_eight["int4"] == (fitted, fitted)
    assert of_eight["fp16"] == (carried, carried)
    assert basis(batch=9)["int4"] == (carried, fitted)
    for elsewhere in (basis("orin-nx-16"), basis("agx-orin-64", "30W")):
        assert set(elsewhere.values()) == {(carried, carried)}


def test_context_slows_decode_and_the_first_token():
    short, long = make(quants=["int4"], contexts=[128, 4096]).options[0].speeds
    assert short.tpot_s < long.tpot_s
    assert short.ttft_s < long.ttft_s


def test_a_bundle_has_its_own_quantization_alone(tiny_bundles: Bundles):
    model = find_model(str(tiny_bundles("qwen2", quant="int4")))
    assert model.manifest is not None
    deployment = Deployment(kv_capacity=128)
    (option,) = make_plan(model, find_device(None), deployment, FITTED).options
    assert (option.name, option.recipe) == ("int4", None)
    with pytest.raises(ConfigError, match="is a bundle"):
        make_plan(model, find_device(None), deployment, FITTED, quants=["int8"])


def test_widths_without_a_group_size_are_left_out():
    odd = PlannedModel("odd", decoder_spec("llama", 72, 2, (3, 3, 24), 200, 300))
    plan = make_plan(odd, find_device(None), Deployment(), FITTED)
    assert [option.name for option in plan.options] == ["fp16"]
    narrow = PlannedModel("narrow", decoder_spec("llama", 576, 2, (9, 3, 64), 1536, 300))
    names = [o.name for o in make_plan(narrow, find_device(None), Deployment(), FITTED).options]
    assert "int4" in names
    assert "int4-g128" not in names  # 576 is a multiple of 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contexts": [5000]}, "--context 5000 must lie in 1 to the KV capacity 4096"),
        ({"contexts": [0]}, "--context 0"),
        ({"quants": ["int2"]}, "--quant int2 is unknown"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        make(**options)


def test_devices_are_known_or_refused():
    with pytest.raises(ConfigError, match="--device tx2 is unknown; known: agx-orin-64"):
        find_device("tx2")
    with pytest.raises(ConfigError, match="--power-mode 10W is not known for agx-orin-64"):
        find_device("agx-orin-64", "10W")
    with pytest.raises(ConfigError, match="for Orin modules"):
        find_device(CPU, "MAXN")
    assert find_device(CPU).mode is None


@pytest.mark.parametrize("device", ["agx-orin-64", CPU])
def test_the_picture_stands_alone_and_draws_every_option(device: str):
    plan = make(device=device)
    root = ET.fromstring(draw_plan(plan))
    panels = 1 if device == CPU else 2
    assert root.tag == f"{SVG}svg"
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert all(texts.count(option.name) == panels for option in plan.options)
    assert not any("href" in key for element in root.iter() for key in element.attrib)
    titles = [title.text or "" for title in root.iter(f"{SVG}title")]
    for option in plan.options:
        assert f"{option.name}: {option.memory.process_bytes / 1e9:.2f}" in titles
        assert option.memory.cache == plan.options[0].memory.cache  # it is told once
    speeds = [found for title in titles if (found := re.search(r": ([\d.]+) to ([\d.]+)", title))]
    assert len(speeds) == (panels - 1) * len(plan.options)
    assert all(0 < float(low) < float(high) for low, high in (r.groups() for r in speeds))


def test_the_picture_shows_a_limit_that_matters():
    """On the small module some lines cross it; on the large one it would flatten all others."""
    assert "left to programs" in draw_plan(make("deepseek-r1:7b", "orin-nano-8"))
    assert "left to programs" not in draw_plan(make("deepseek-r1:1.5b", "agx-orin-64"))


NO_NAME = {"name": None, "power_mode": None, "bytes_per_s": None}


def write(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps({**BENCH, **changes}))
    return path


def test_a_benchmark_calibrates(tmp_path: Path):
    device, efficiency = calibrated(write(tmp_path / "b.json"), None, None)
    assert device == find_device("agx-orin-64")
    assert efficiency.source == "measured: b.json"
    assert efficiency.weights > FITTED.weights  # 7.0 ms are less than the fit says
    found = make_plan(
        BUILT_IN["deepseek-r1:1.5b"],
        device,
        Deployment(),
        efficiency,
        quants=["int4-g128"],  # what was measured
        contexts=[576],
    )
    assert found.options[0].speeds[0].tpot_s == pytest.approx(0.0070, rel=0.01)
    assert set(found.options[0].basis.values()) == {"measured"}


def report(path: Path, **rows: dict[str, Any]) -> Path:
    """What ``scripts/gpu-check`` writes, as far as it counts here."""
    matrix = {name: {"build": {"verdict": "passed"}, "bench": cell} for name, cell in rows.items()}
    path.write_text(json.dumps({"started": "2026-01-01T00:00:00Z", "matrix": matrix}))
    return path


def test_a_report_of_gpu_check_calibrates_by_all_that_passed(tmp_path: Path):
    failed = {"verdict": "failed", "reason": "the build failed"}
    int4 = {"verdict": "passed", "result": BENCH}
    slow = {**BENCH, "tpot_s": {"median": 2 * BENCH["tpot_s"]["median"]}}
    one = calibrated(report(tmp_path / "r.json", int4=int4, fp16=failed), None, None)
    assert one == calibrated(write(tmp_path / "r.json"), None, None)
    both = report(tmp_path / "r.json", int4=int4, other={"verdict": "passed", "result": slow})
    assert calibrated(both, None, None)[1].weights < one[1].weights


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ({"verdict": "failed", "reason": "no GPU"}, "no benchmark in this report has passed"),
        ({"verdict": "passed", "result": {**BENCH, "schema": 9}}, "bench of int8, has schema 9"),
        (
            {"verdict": "passed", "result": {**BENCH, "device": {**BENCH["device"], "name": "x"}}},
            "of several devices",
        ),
    ],
)
def test_a_wrong_report_is_refused(cell: dict[str, Any], message: str, tmp_path: Path):
    rows = {"int8": cell}
    if "several" in message:
        rows["int4"] = {"verdict": "passed", "result": BENCH}
    with pytest.raises(ConfigError, match=message):
        calibrated(report(tmp_path / "r.json", **rows), None, None)


def test_a_cpus_benchmark_brings_its_bandwidth(tmp_path: Path):
    path = write(
        tmp_path / "b.json",
        device={"name": CPU, "power_mode": None, "bytes_per_s": 35e9},
        tpot_s={"median": 0.04},
        prefill_s={"median": 4.0},
    )
    device, efficiency = calibrated(path, CPU, None)
    assert device.mode is not None
    assert device.mode.bytes_per_s == 35e9
    assert 0 < efficiency.weights < 1


@pytest.mark.parametrize(
    ("device", "mode", "message"),
    [
        ("orin-nx-16", None, "--device agx-orin-64, not orin-nx-16"),
        (None, "30W", "--power-mode MAXN, not 30W"),  # an older file, without nvpmodel
    ],
)
def test_another_device_is_refused(
    device: str | None, mode: str | None, message: str, tmp_path: Path
):
    with pytest.raises(ConfigError, match=message):
        calibrated(write(tmp_path / "b.json"), device, mode)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "has schema 2"),
        ({"work": {"step_bytes": 1}}, "its work does not fit"),
        ({"tpot_s": 0.007}, "is not what edge-llm bench --json prints"),
        ({"device": {**NO_NAME, "module": "Jetson Thor"}}, "on Jetson Thor, which no table"),
        ({"device": NO_NAME}, "on a GPU of no Jetson, which no table"),
        ({"device": {**NO_NAME, "l4t": "36.4.3"}}, "on which module .* give --device"),
        ({"device": {"name": CPU, "power_mode": None, "bytes_per_s": None}}, "has no bandwidth"),
    ],
)
def test_a_wrong_file_is_refused(changes: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        calibrated(write(tmp_path / "b.json", **changes), None, None)


def test_text_that_is_no_json_is_refused(tmp_path: Path):
    (tmp_path / "b.json").write_bytes(b"\xff{")
    with pytest.raises(ConfigError, match="run it again"):
        read_runs(tmp_path / "b.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_runs(tmp_path / "none.json")


def test_the_largest_block_is_that_of_the_cache_or_of_one_weight():
    model = find_model("deepseek-r1:7b")
    found = {}
    for capacity in (1024, 32768):
        deployment = Deployment("tensorrt", kv_capacity=capacity)
        plan = make_plan(model, find_device(None), deployment, FITTED, quants=["int8"])
        (option,) = plan.as_dict()["options"]
        found[capacity] = option["largest_block"]["what"], option["largest_block"]["bytes"]
    assert found[1024] == ("the lm_head", 152064 * 3584)
    assert found[32768] == ("the KV cache", 32768 * 2 * 28 * 4 * 128 * 2)
