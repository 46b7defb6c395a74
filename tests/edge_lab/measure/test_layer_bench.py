"""``edge-llm bench --layers`` on a stand-in engine: every layer's time, beside what it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edge.backends.tensorrt.layer_times import LayerTimes
from edge.bundle.engine_file import find_engines, read_engine_info
from edge.errors import ConfigError
from edge_lab.cli.bench import bench
from edge_make.engine_layers import layers_path, read_layers
from tests.conftest import Bundles, require_kernels
from tests.edge.backends.tensorrt.gpu_runner import GpuRunner
from tests.standins.cuda import FakeGpu
from tests.standins.tensorrt import write_engine

SMALL = ["--prompt-tokens", "40", "--output-tokens", "6", "--repeats", "1"]


@pytest.fixture(params=["native", "portable"])
def bundle(request: pytest.FixtureRequest, tiny_bundles: Bundles, tmp_path: Path) -> Path:
    require_kernels(request.param)
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundles("qwen2", request.param, "int4"), copy)
    write_engine(copy, max_prefill=24)
    return copy


def run(bundle: Path, *arguments: str) -> Any:
    result = CliRunner().invoke(bench, [str(bundle), *SMALL, *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result


def test_a_batch_that_the_engine_computes_in_turns_is_refused(bundle: Path, gpu: FakeGpu) -> None:
    most = max(read_engine_info(directory).max_batch for directory in find_engines(bundle))
    with pytest.raises(ConfigError, match=f"--batch {most + 1}: .*build BUNDLE --max-batch"):
        run(bundle, "--batch", str(most + 1))


def test_every_layer_has_a_time_and_what_it_is(bundle: Path, gpu: FakeGpu) -> None:
    printed = json.loads(run(bundle, "--layers", "--json").stdout)
    found, engine = printed["layers"], printed["work"]["engine"]
    (directory,) = find_engines(bundle)
    table = read_layers(directory / read_engine_info(directory).plan)
    assert table is not None
    assert {kind: engine[kind]["launches"] for kind in ("prefill", "decode")} == {
        kind: len(table.of(kind)) for kind in ("prefill", "decode")
    }
    for profile, runs in (("prefill", 3 * 2), ("decode", 3 * 5)):
        times = found[profile]
        assert times["runs"] == runs
        layers = {layer["name"]: layer for layer in times["layers"]}
        assert set(layers) == {layer.name for layer in table.of(profile)}
        down = layers["layers.1.down_myl0"]
        assert (down["kind"], down["dtype"]) == ("gemm", "int4")
        assert sum(layer["share"] for layer in times["layers"]) == pytest.approx(1)
        milliseconds = [layer["ms"] for layer in times["layers"]]
        assert milliseconds == sorted(milliseconds, reverse=True)
        assert sum(milliseconds) == pytest.approx(times["total_ms"])


def test_the_tables_name_kinds_and_the_slowest(bundle: Path, gpu: FakeGpu) -> None:
    text = run(bundle, "--layers").stdout
    assert "decode: 14 layers" in text
    assert "gemm int4" in text
    assert "gemv_w4a16_sm80" in text
    assert "layers" not in json.loads(run(bundle, "--json").stdout)


def test_without_a_table_there_are_still_times(bundle: Path, gpu: FakeGpu) -> None:
    (directory,) = find_engines(bundle)
    layers_path(directory / read_engine_info(directory).plan).unlink()
    found = json.loads(run(bundle, "--layers", "--json").stdout)["layers"]["decode"]
    assert len(found["layers"]) == 14
    assert {layer["kind"] for layer in found["layers"]} == {None}


def test_the_cpu_has_no_such_layers(tiny_bundles: Bundles) -> None:
    with pytest.raises(ConfigError, match=r"--layers times .* another backend .* edge-llm build"):
        CliRunner().invoke(
            bench, [str(tiny_bundles("qwen2")), *SMALL, "--layers"], catch_exceptions=False
        )


def test_timed_steps_answer_alike_and_capture_no_graphs(bundle: Path, gpu: FakeGpu) -> None:
    ids = [[3, 1, 4, 1, 5]]

    def generate(runner: GpuRunner) -> list[Any]:
        return [runner.step(ids).tolist(), *(runner.step([[7]]).tolist() for _ in range(5))]

    with GpuRunner(bundle, gpu) as runner:
        untimed = generate(runner)
    with GpuRunner(bundle, gpu) as runner:
        times = runner.engine.time_layers()
        assert generate(runner) == untimed
        assert runner.engine.graphs_disabled == "the layers are timed"
    assert {len(runs) for runs in times["decode"].runs_ms.values()} == {5}


def test_a_layer_that_is_reported_twice_counts_once_per_run() -> None:
    times = LayerTimes()
    for ms in (1.0, 2.0):
        times.report("a [profile 1]", ms)
        times.report("a [profile 1]", ms)
        times.end_run()
    assert times.runs_ms == {"a": [2.0, 4.0]}
