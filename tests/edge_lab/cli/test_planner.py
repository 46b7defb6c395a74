"""The verbs ``plan`` and ``recommend``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edge.bundle.manifest import read_manifest
from edge.errors import EXIT_GATE_MISSED, ConfigError
from edge_lab.cli.eval import evaluate
from edge_lab.cli.plan import plan
from edge_lab.cli.recommend import parse_size, recommend
from edge_lab.prove.checkpoint import CONFIG
from tests.conftest import Bundles


def run_verb(verb: Any, *arguments: str, columns: int = 200) -> Any:
    environ = {"COLUMNS": str(columns)}
    return CliRunner().invoke(verb, list(arguments), catch_exceptions=False, env=environ)


def test_a_config_is_enough(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    given = ("--kv-capacity", "4096", "--json")
    from_file = json.loads(run_verb(plan, str(tmp_path), *given).stdout)
    built_in = json.loads(run_verb(plan, "deepseek-r1:1.5b", *given).stdout)
    assert from_file["options"] == built_in["options"]
    assert (built_in["device"], built_in["power_mode"]) == ("agx-orin-64", "MAXN")


def test_the_default_capacity_is_what_an_export_takes(tmp_path: Path):
    """R1 reasons, so its answers get more room; of a config.json alone nobody can tell."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    found = [
        json.loads(run_verb(plan, model, "--json").stdout)["kv_capacity"]
        for model in ("deepseek-r1:1.5b", str(tmp_path))
    ]
    assert found == [8192, 4096]


def test_a_bundle_is_planned_exactly(tiny_bundles: Bundles):
    bundle = tiny_bundles("qwen2", quant="int4")
    manifest = read_manifest(bundle)
    found = json.loads(run_verb(plan, str(bundle), "--batch", "2", "--json").stdout)
    (option,) = found["options"]
    weights = option["memory"]["weights"]
    linears = sum(info.num_bytes for info in manifest.quantization.linears.values())
    assert weights["attention"] + weights["mlp"] + weights["lm_head"] + weights["scales"] == linears
    assert found["kv_capacity"] == manifest.kv_capacity
    model = manifest.model
    attention = model.attentions()[0]
    per_token = 2 * model.num_layers * attention.kv_heads * attention.dim * 2
    slots = 2 + 1  # and the one in which an engine reads prompts
    assert option["memory"]["cache_bytes"] == slots * manifest.kv_capacity * per_token


def test_the_table_names_what_the_numbers_stand_on(tmp_path: Path):
    picture = tmp_path / "plan.svg"
    done = run_verb(plan, "deepseek-r1:7b", "--device", "orin-nano-8", "--svg", str(picture))
    assert done.exit_code == 0
    for words in (
        *("102.4 GB/s", "fitted to published", "NO", "orin-nano-8 leaves about"),
        *("decode max", "max: the ceiling, computed", "* nobody published this case"),
    ):
        assert words in done.stdout
    assert picture.read_text().startswith("<svg xmlns=")


def test_a_draft_is_planned_beside_the_model(tiny_bundles: Bundles):
    given = ("deepseek-r1:7b", "--quant", "int4", "--draft", "deepseek-r1:1.5b")
    shown = run_verb(plan, *given).stdout
    assert "Drafts by deepseek-r1:1.5b (int4)" in shown
    assert "pays from" in shown
    found = json.loads(run_verb(plan, *given, "--json").stdout)
    alone = json.loads(run_verb(plan, *given[:3], "--json").stdout)
    assert alone["draft"] is None
    (option,), (before,) = found["options"], alone["options"]
    assert option["speeds"] == before["speeds"]
    added = option["memory"]["device_bytes"] - before["memory"]["device_bytes"]
    assert added == found["draft"]["device_bytes"] > 1e9
    bundle, other = tiny_bundles("qwen2"), tiny_bundles("llama", quant="int4")
    (option,) = json.loads(run_verb(plan, str(bundle), "--draft", str(other), "--json").stdout)[
        "options"
    ]
    assert option["drafts"]
    with pytest.raises(ConfigError, match="one is a qwen2, the other a llama"):
        run_verb(plan, "deepseek-r1:7b", "--draft", "deepseek-r1:8b")


def test_a_cpu_says_what_is_missing():
    done = run_verb(plan, "deepseek-r1:1.5b", "--device", "cpu")
    assert "the bandwidth of this CPU is not known" in done.stdout
    assert "ort-cpu" in done.stdout


def test_a_picture_that_cannot_be_written_is_an_error(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be written"):
        run_verb(plan, "deepseek-r1:1.5b", "--svg", str(tmp_path / "no" / "plan.svg"))


def test_options_are_honoured_or_refused():
    done = json.loads(
        run_verb(
            plan,
            *("deepseek-r1:1.5b", "--quant", "int4", "--quant", "fp16", "--context", "900"),
            *("--kv-capacity", "1000", "--max-prefill", "2000", "--power-mode", "30W", "--json"),
        ).stdout
    )
    assert [option["quant"] for option in done["options"]] == ["int4", "fp16"]
    assert [s["context"] for s in done["options"][0]["speeds"]] == [900]
    assert (done["kv_capacity"], done["max_prefill"], done["power_mode"]) == (1000, 1000, "30W")
    with pytest.raises(ConfigError, match="--kv-capacity 1 is out of range"):
        run_verb(plan, "deepseek-r1:1.5b", "--kv-capacity", "1")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1GB", 10**9),
        ("1 gb", 10**9),
        ("1G", 10**9),
        ("1GiB", 1 << 30),
        ("1.5GB", 1_500_000_000),
        ("800M", 800_000_000),
        ("64KiB", 65536),
    ],
)
def test_sizes(text: str, size: int):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "4", "-1GB", "1TB", "GB", "1,5GB", "1GBB", "٣GB"])
def test_a_wrong_size_is_refused(text: str):
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size(text)


def test_the_recommendation_is_printed_with_its_commands():
    done = run_verb(recommend, "--memory", "2.4GB", "--latency-ms", "100")
    assert done.exit_code == 0
    assert "Taken: deepseek-r1:1.5b int4.\nTo make it for JetPack 6:" in done.stdout
    assert "edge-llm export deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B" in done.stdout
    assert "edge-llm build bundles/deepseek-r1-distill-qwen-1.5b-int4" in done.stdout


def test_nothing_found_has_its_own_exit_code_and_says_why():
    done = run_verb(recommend, "--memory", "1GB", "--latency-ms", "100")
    assert done.exit_code == EXIT_GATE_MISSED
    assert "Tutorials' tree: 1.5B quantized. It does not hold" in done.stdout
    assert "Nothing meets every wish" in done.stdout


def test_the_json_has_every_candidate():
    done = run_verb(
        recommend,
        "--json",
        "--model",
        "deepseek-r1:7b",
        "--benchmark",
        "math-500",
        "--quality",
        "92",
    )
    found = json.loads(done.stdout)
    assert {row["model"] for row in found["candidates"]} == {"deepseek-r1:7b"}
    assert found["taken"]["score"] >= 92
    dropped = [row for row in found["candidates"] if row["dropped"]]
    assert {row["quant"] for row in dropped} == {"int4"}
    assert found["tutorial"]["leaf"] == "8B"


@pytest.fixture
def ways(tiny_bundles: Bundles, tmp_path: Path) -> Path:
    """What ``eval --ways`` itself prints."""
    task, path = tmp_path / "task.jsonl", tmp_path / "ways.json"
    task.write_text(json.dumps({"question": "hello", "answer": "#### 1"}))
    given = ("--task", str(task), "--ways", "one,vote", "--vote", "3", "--max-tokens", "4")
    bundle = str(tiny_bundles("qwen2", "portable"))
    path.write_text(run_verb(evaluate, bundle, *given, "--json").stdout)
    return path


def test_ways_that_were_measured_are_planned(tiny_bundles: Bundles, ways: Path):
    given = (str(tiny_bundles("qwen2")), "--power-mode", "30W", "--ways", str(ways))
    found = json.loads(run_verb(plan, *given, "--json").stdout)
    measured = json.loads(ways.read_text())["ways"]
    tpot_s = found["options"][0]["speeds"][0]["tpot_s"]
    for way, of in zip(found["ways"], measured, strict=True):
        assert way["seconds"] == pytest.approx(tpot_s * of["steps"])
        assert way["joules"] == pytest.approx(30 * way["seconds"])
    printed = run_verb(plan, *given).stdout
    assert "Ways to answer" in printed
    assert "0 of 1" in printed
    with pytest.raises(ConfigError, match="give one --quant"):
        run_verb(plan, "deepseek-r1:1.5b", "--ways", str(ways))
    with pytest.raises(ConfigError, match="give --calibrate"):
        run_verb(plan, given[0], "--device", "cpu", "--ways", str(ways))


def test_a_way_is_recommended_by_its_energy(ways: Path):
    given = ("--power-mode", "30W", "--ways", str(ways), "--joules")
    found = json.loads(run_verb(recommend, *given, "1e6", "--json").stdout)
    assert found["way"]["way"] == "one"  # none was right, and it takes least
    assert (
        "Answer with no further option (one): 0 of 1 right"
        in run_verb(recommend, *given, "1e6").stdout
    )
    little = run_verb(recommend, *given, "1e-6")
    assert little.exit_code == EXIT_GATE_MISSED
    assert "No way of --ways answers a question with 1e-06 J" in little.stdout
    for one in (("--joules", "5"), ("--ways", str(ways))):
        with pytest.raises(ConfigError, match="give both"):
            run_verb(recommend, *one)
