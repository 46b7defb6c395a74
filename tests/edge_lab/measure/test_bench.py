"""The benchmark on a scripted backend, on a real one, and what it makes of its samples."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from edge.backends import Rows, Step
from edge.bundle.embeddings import EMBEDDINGS_NAME, EmbeddingTable
from edge.bundle.manifest import Manifest, read_manifest
from edge.errors import EXIT_GATE_MISSED, BackendError, ConfigError
from edge_lab.cli import bench as bench_verb
from edge_lab.cli.bench import bench
from edge_lab.measure import bench_report
from edge_lab.measure.bench import BenchConfig, Samples, run_bench
from edge_lab.measure.bench_report import (
    Change,
    compare,
    find_bench_device,
    measure_bandwidth,
    report,
    roofline,
    spread,
    summarize,
    work_of_bundle,
)
from edge_lab.planner.calibration import calibrated
from edge_lab.planner.plan import CPU, PlanDevice, find_device
from edge_lab.telemetry import EnergyMeter, Snapshot
from lab.quality.best_logits import best_of
from tests.conftest import Bundles
from tests.standins.scripted_backend import ScriptedBackend, random_logits

SMALL = ["--prompt-tokens", "40", "--output-tokens", "6", "--repeats", "5"]


@pytest.fixture
def tiny(tiny_bundles: Bundles) -> tuple[EmbeddingTable, Manifest]:
    bundle = tiny_bundles("qwen2")
    return EmbeddingTable(bundle / EMBEDDINGS_NAME), read_manifest(bundle)


class Recorder(ScriptedBackend):
    """Also remembers the slots of every step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.slots: list[list[int]] = []

    def forward(self, step: Step) -> Any:
        self.slots.append(list(step.slots))
        return super().forward(step)


def test_a_repeat_is_a_prefill_of_each_slot_and_a_decode_of_all(tiny: Any):
    table, manifest = tiny
    backend = Recorder(table, random_logits(table.vocab_size), num_slots=2, max_step_tokens=8)
    config = BenchConfig(prompt_tokens=20, output_tokens=5, repeats=2, warmup=1, batch=2)
    samples = run_bench(backend, table, manifest, config)
    one_prompt = [(0, 8), (8, 8), (16, 4)]
    one_repeat = 2 * one_prompt + [(20, 1), (21, 1), (22, 1), (23, 1)]
    assert backend.steps == 3 * one_repeat
    assert backend.slots == 3 * (3 * [[0]] + 3 * [[1]] + 4 * [[0, 1]])
    assert (len(samples.prefill_s), len(samples.ttft_s)) == (4, 4)  # the warm-up does not count
    assert [len(steps) for steps in samples.itl_s] == [4, 4]
    assert all(t >= p > 0 for t, p in zip(samples.ttft_s, samples.prefill_s, strict=True))
    for steps, model_s in zip(samples.itl_s, samples.decode_model_s, strict=True):
        assert 0 < model_s < sum(steps)


def test_the_same_seed_runs_the_same_tokens(tiny: Any):
    """Only then do two runs compare; sampled tokens decide what is embedded next."""
    table, manifest = tiny
    seen = []
    for seed in (3, 3, 4):
        tokens: list[tuple[int, ...]] = []

        def script(so_far: tuple[int, ...], tokens: list[tuple[int, ...]] = tokens) -> Any:
            tokens.append(so_far)
            return random_logits(table.vocab_size)(so_far)

        config = BenchConfig(prompt_tokens=6, output_tokens=4, repeats=1, warmup=0, seed=seed)
        run_bench(ScriptedBackend(table, script), table, manifest, config)
        seen.append(tokens[-1])
    assert seen[0] == seen[1] != seen[2]


def test_tokens_are_drawn_from_the_best_logits_as_in_serving(tiny: Any):
    """Or a benchmark would not tell what `edge-llm build --best-logits` is worth."""
    table, manifest = tiny
    backend = ScriptedBackend(table, lambda so_far: len(so_far) % 7, num_slots=2)
    steps: list[Step] = []

    def fetch() -> Any:
        pytest.fail("a row is fetched that its best logits decide")

    def forward_best(step: Step) -> Rows:
        steps.append(step)
        return [[best_of(row, 8, fetch) for row in rows] for rows in backend.forward(step)]

    backend.forward_best = forward_best
    config = BenchConfig(prompt_tokens=4, output_tokens=5, repeats=1, warmup=0, batch=2)
    run_bench(backend, table, manifest, config)
    assert [step.batch for step in steps] == [2] * 4
    assert backend.rows_of(0, 8)[4:] == [4, 5, 6, 0]


def test_energy_is_measured_around_prefill_and_decode(tiny: Any):
    table, manifest = tiny
    clock = itertools.count()

    def meter() -> EnergyMeter:
        """10 W, a second from start to stop, no samples between."""
        return EnergyMeter(
            lambda: 10.0,
            clock=lambda: float(next(clock)),
            wait=lambda event, seconds: event.wait(60),
        )

    config = BenchConfig(prompt_tokens=4, output_tokens=6, repeats=2, warmup=1)
    backend = ScriptedBackend(table, random_logits(table.vocab_size))
    samples = run_bench(backend, table, manifest, config, make_meter=meter)
    assert samples.decode_joules == [10.0, 10.0]
    figures = summarize(samples, config)
    assert figures["decode_joules_per_token"] == pytest.approx(10 / 5)
    assert figures["prefill_joules_per_token"] == pytest.approx(10 / 4)
    assert figures["decode_watts"] == pytest.approx(10.0)


def test_without_rails_there_is_no_energy(tiny: Any):
    table, manifest = tiny
    config = BenchConfig(prompt_tokens=4, output_tokens=3, repeats=1, warmup=0)
    backend = ScriptedBackend(table, random_logits(table.vocab_size))
    samples = run_bench(
        backend, table, manifest, config, make_meter=lambda: EnergyMeter(lambda: None)
    )
    figures = summarize(samples, config)
    assert figures["decode_joules_per_token"] is None
    assert figures["decode_watts"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tokens": 60, "output_tokens": 5}, "exceed the KV capacity of 64 tokens"),
        ({"prompt_tokens": 4, "batch": 2, "output_tokens": 4}, "exceeds the 1 slots"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, int], message: str, tiny: Any):
    table, manifest = tiny
    backend = ScriptedBackend(table, random_logits(table.vocab_size))
    with pytest.raises(ConfigError, match=message):
        run_bench(backend, table, manifest, BenchConfig(**options))
    assert backend.steps == []


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_tokens": 0},
        {"output_tokens": 1},
        {"repeats": 0},
        {"warmup": -1},
        {"batch": 0},
        {"seed": -1},
    ],
    ids=str,
)
def test_senseless_numbers_are_refused(options: dict[str, int]):
    with pytest.raises(ConfigError, match="out of range"):
        BenchConfig(**options)


def test_a_failing_engine_fails_the_benchmark(tiny: Any):
    table, manifest = tiny
    backend = ScriptedBackend(table, random_logits(table.vocab_size))
    backend.fails = True
    with pytest.raises(BackendError):
        run_bench(backend, table, manifest, BenchConfig(prompt_tokens=4, output_tokens=4))


def test_figures_of_known_samples():
    config = BenchConfig(prompt_tokens=100, output_tokens=4, repeats=2, batch=2)
    samples = Samples(
        prefill_s=[0.1, 0.2, 0.2, 0.3],
        ttft_s=[0.11, 0.21, 0.21, 0.31],
        itl_s=[[0.01, 0.02, 0.03], [0.02, 0.02, 0.08]],
        decode_model_s=[0.03, 0.06],
        decode_cpu_s=[0.06, 0.12],
    )
    figures = summarize(samples, config)
    assert figures["prefill_s"]["median"] == pytest.approx(0.2)
    assert figures["prefill_s"]["mad"] == pytest.approx(0.05)
    assert figures["tpot_s"]["values"] == pytest.approx([0.02, 0.04])
    assert figures["itl_s"]["p50"] == pytest.approx(0.02)
    assert figures["itl_s"]["p99"] > 0.07
    assert figures["prefill_tps"] == pytest.approx(500)
    assert figures["decode_tps"] == pytest.approx(2 / 0.03)
    assert figures["own_s_per_step"] == pytest.approx((0.03 / 3 + 0.06 / 3) / 2)
    assert figures["cpu_s_per_step"] == pytest.approx((0.06 / 3 + 0.12 / 3) / 2)


def test_a_wait_that_spins_shows_as_cpu_time_and_one_that_sleeps_does_not(tiny: Any):
    table, manifest = tiny
    wait_s, config = 0.02, BenchConfig(prompt_tokens=4, output_tokens=6, repeats=1, warmup=0)

    def spin() -> None:
        until = time.process_time() + wait_s
        while time.process_time() < until:
            pass

    def measure(wait: Callable[[], None]) -> float:
        script = random_logits(table.vocab_size)

        def step(so_far: tuple[int, ...]) -> Any:
            wait()
            return script(so_far)

        samples = run_bench(ScriptedBackend(table, step), table, manifest, config)
        found: float = summarize(samples, config)["cpu_s_per_step"]
        return found

    assert measure(spin) >= wait_s
    # Other threads of this process, and a busy machine, add to it now and then.
    assert any(measure(lambda: time.sleep(wait_s)) < wait_s / 2 for _ in range(50))


# ----------------------------------------------------------------------------- comparison


def result_of(times_s: list[float], **changes: Any) -> dict[str, Any]:
    return {
        "batch": 1,
        "prompt_tokens": 8,
        "output_tokens": 8,
        "backend": "ort-cpu",
        "work": {"step_bytes": 1},
        "device": {"name": CPU},
        "prefill_s": spread([1.0] * 5),
        "ttft_s": spread([1.0] * 5),
        "tpot_s": spread(times_s),
    } | changes


@pytest.mark.parametrize(
    ("before", "now", "verdict"),
    [
        ([10, 10.1, 10.2, 10.1, 10], [12, 12.1, 12, 12.2, 12.1], "slower"),
        ([12, 12.1, 12, 12.2, 12.1], [10, 10.1, 10.2, 10.1, 10], "faster"),
        ([10, 12, 9, 11, 13], [11, 13, 10, 12, 14], "same"),  # 10 % within such noise is nothing
        ([10] * 5, [10] * 5, "same"),
    ],
)
def test_a_change_counts_beyond_the_noise(before: list[float], now: list[float], verdict: str):
    changes = {c.name: c for c in compare(result_of(before), result_of(now))}
    change = changes["tpot_s"]
    assert change.verdict == verdict
    assert change.low <= change.ratio <= change.high
    assert change.ratio == pytest.approx(np.median(now) / np.median(before))
    assert changes["prefill_s"].verdict == "same"


@given(st.lists(st.floats(0.9, 1.1), min_size=5, max_size=9), st.floats(1.3, 3.0))
def test_a_large_slowdown_is_never_missed(values: list[float], factor: float):
    slower = [value * factor for value in values]
    (change,) = [c for c in compare(result_of(values), result_of(slower)) if c.name == "tpot_s"]
    assert change.verdict == "slower"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 2}, "differs in batch"),
        ({"work": {"step_bytes": 2}}, "differs in work"),
        ({"device": {"name": "orin-nx-8"}}, "differs in device"),
        ({"prefill": "int8"}, "differs in prefill"),
        ({"tpot_s": None}, "not what edge-llm bench"),
        ({"tpot_s": {"values": ["fast"]}}, "not what edge-llm bench"),
        ({"tpot_s": {"values": []}}, "not what edge-llm bench"),
        ({"tpot_s": {"values": [0.0]}}, "not what edge-llm bench"),
    ],
)
def test_only_like_runs_compare(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        compare(result_of([1.0] * 5, **changes), result_of([1.0] * 5))


@pytest.mark.parametrize("name", ["power_mode", "nvpmodel", "num_threads"])
def test_power_mode_and_threads_are_compared_where_both_runs_have_them(name: str):
    def run(**value: Any) -> dict[str, Any]:
        if name == "num_threads":
            return result_of([1.0] * 5, **value)
        return result_of([1.0] * 5, device={"name": CPU, **value})

    with pytest.raises(ConfigError, match=f"differs in {name}"):
        compare(run(**{name: 2}), run(**{name: 4}))
    for old in (run(**{name: 4}), run()):
        assert {change.verdict for change in compare(old, run(**{name: 4}))} == {"same"}


# ----------------------------------------------------------------------------- the machine


def test_the_bandwidth_is_plausible():
    assert 5e8 < measure_bandwidth(repeats=1) < 2e12


@pytest.mark.parametrize("name", ["30W", "MODE_30W"])  # of JetPack 7 and 6
def test_an_orin_is_found_by_its_snapshot(name: str, monkeypatch: pytest.MonkeyPatch):
    snapshot = Snapshot(
        module="NVIDIA Jetson AGX Orin Developer Kit",
        power_mode=name,
        memory_total_bytes=61 << 30,
    )
    device, remark = find_bench_device("tensorrt", snapshot, None)
    assert device == find_device("agx-orin-64", "30W")
    assert remark is None
    custom = Snapshot(module=snapshot.module, power_mode="MINE", memory_total_bytes=61 << 30)
    device, remark = find_bench_device("tensorrt", custom, None)
    assert device == find_device("agx-orin-64")
    assert remark is not None
    assert "MINE" in remark
    # As in a container.
    unknown = Snapshot(module=snapshot.module, memory_total_bytes=snapshot.memory_total_bytes)
    device, remark = find_bench_device("tensorrt", unknown, None)
    assert device == find_device("agx-orin-64")
    assert remark == "the power mode is not known here: compared with the fastest"
    assert find_bench_device("ort-cuda", Snapshot(), None)[0] is None
    # On a Jetson too, a CPU backend is held against the CPU.
    monkeypatch.setattr(bench_report, "measure_bandwidth", lambda threads: 1e10)
    device, _ = find_bench_device("ort-cpu", snapshot, None)
    assert device == find_device(CPU, cpu_bytes_per_s=1e10)


def test_the_roofline_is_bytes_over_bandwidth(tiny: Any):
    table, manifest = tiny
    backend = ScriptedBackend(table, random_logits(table.vocab_size))
    config = BenchConfig(prompt_tokens=10, output_tokens=20, batch=2)
    work = work_of_bundle(manifest, backend, config)
    found = roofline(work, find_device("orin-nx-8"), config, decode_tps=5.0)
    assert found is not None
    read = work.step_bytes + 2 * 20 * work.kv_bytes_per_token
    assert found["bytes_per_step"] == read
    assert found["decode_tps"] == pytest.approx(2 * 102.4e9 / read)
    assert found["reached"] == pytest.approx(5.0 / found["decode_tps"])
    assert 0 < found["predicted_decode_tps"] < found["decode_tps"]
    assert roofline(work, None, config, 5.0) is None


def bench_on(
    tiny: tuple[EmbeddingTable, Manifest], path: Path, board: str | None, gib: int, mode: str | None
) -> Path:
    """What a benchmark on an Orin writes, as if a TensorRT engine had run there."""
    table, manifest = tiny
    backend = ScriptedBackend(table, random_logits(table.vocab_size))
    config = BenchConfig(prompt_tokens=10, output_tokens=4, repeats=2)
    samples = run_bench(backend, table, manifest, config)
    snapshot = Snapshot(
        module=board, power_mode=mode, memory_total_bytes=gib << 30, l4t="39.2.1" if gib else None
    )
    device, _ = find_bench_device("tensorrt", snapshot, None)
    path.write_text(json.dumps(report(manifest, backend, config, samples, device, snapshot)))
    return path


@pytest.mark.parametrize(
    ("board", "gib", "mode", "found"),
    [
        ("NVIDIA Jetson Orin NX", 15, "25W", find_device("orin-nx-16", "25W")),
        ("NVIDIA Jetson AGX Orin", 29, "MODE_30W", find_device("agx-orin-32", "30W")),
        ("NVIDIA Jetson AGX Orin", 29, "MODE_99W", None),
        ("NVIDIA Jetson Orin Nano", 7, "7W", None),
    ],
)
def test_a_benchmark_counts_in_the_mode_that_it_ran_in(
    tiny: Any, tmp_path: Path, board: str, gib: int, mode: str, found: PlanDevice | None
):
    saved = bench_on(tiny, tmp_path / "b.json", board, gib, mode)
    written = json.loads(saved.read_text())["device"]
    assert written["nvpmodel"] == mode
    if found is None:
        assert written["power_mode"] is None
        for asked in (None, mode, "MAXN_SUPER"):
            with pytest.raises(ConfigError, match=f"in power mode {mode}, whose clocks are not"):
                calibrated(saved, None, asked)
        return
    assert found.mode is not None
    assert written["power_mode"] == found.mode.name
    for asked in (None, mode, found.mode.name):
        assert calibrated(saved, None, asked)[0] == found
    with pytest.raises(ConfigError, match=f"measured with --power-mode {mode}, not MAXN"):
        calibrated(saved, None, "MAXN")


def test_a_module_that_a_container_hides_must_be_given(tiny: Any, tmp_path: Path):
    device, remark = find_bench_device("tensorrt", Snapshot(l4t="39.2.1"), None)
    assert device is None
    assert "systempaths=unconfined" in (remark or "")
    saved = bench_on(tiny, tmp_path / "b.json", None, 15, None)
    with pytest.raises(ConfigError, match=r"on which module .* give --device"):
        calibrated(saved, None, "15W")
    with pytest.raises(ConfigError, match="give --power-mode"):
        calibrated(saved, "orin-nx-16", None)
    assert calibrated(saved, "orin-nx-16", "15W")[0] == find_device("orin-nx-16", "15W")
    _, remark = find_bench_device("tensorrt", Snapshot(), None)
    assert "it is not an Orin module" in (remark or "")
    saved = bench_on(tiny, tmp_path / "b.json", None, 0, None)
    with pytest.raises(ConfigError, match="on a GPU of no Jetson, which no table describes"):
        calibrated(saved, "orin-nx-16", "15W")
    saved = bench_on(tiny, tmp_path / "b.json", "NVIDIA Jetson AGX Thor", 122, None)
    with pytest.raises(ConfigError, match="on NVIDIA Jetson AGX Thor, which no table describes"):
        calibrated(saved, "orin-nx-16", "15W")


def test_an_unknown_mode_must_be_given(tiny: Any, tmp_path: Path):
    """In a container nothing names it."""
    saved = bench_on(tiny, tmp_path / "b.json", "NVIDIA Jetson Orin NX", 15, None)
    assert json.loads(saved.read_text())["device"]["power_mode"] is None
    with pytest.raises(ConfigError, match=r"does not say in which power mode .* --power-mode"):
        calibrated(saved, None, None)
    assert calibrated(saved, None, "15W")[0] == find_device("orin-nx-16", "15W")


# ------------------------------------------------------------------------------- the verb


def run_verb(*arguments: str) -> Any:
    return CliRunner().invoke(bench, list(arguments), catch_exceptions=False)


def test_the_verb_measures_compares_and_calibrates(tiny_bundles: Bundles, tmp_path: Path):
    bundle = str(tiny_bundles("qwen2", quant="int4"))
    first = run_verb(bundle, "--json", "--batch", "2", *SMALL)
    assert first.exit_code == 0, first.output
    (line,) = [text for text in first.stdout.splitlines() if text.startswith("{")]
    result = json.loads(line)
    assert result["backend"] == "ort-cpu"
    assert len(result["tpot_s"]["values"]) == 5
    assert len(result["ttft_s"]["values"]) == 10
    assert result["memory"]["rss_bytes"] > 0
    assert result["versions"]["edge_llm"]
    assert result["roofline"]["reached"] > 0
    saved = tmp_path / "bench.json"
    saved.write_text(line)

    with pytest.raises(ConfigError, match="differs in num_threads"):
        run_verb(bundle, "--batch", "2", "--against", str(saved), "--num-threads", "1", *SMALL)
    table = run_verb(bundle, "--batch", "2", "--against", str(saved), *SMALL)
    assert table.exit_code == 0, table.output
    words = ("TPOT, ms", "ITL ms", "roofline", "no power rails here", "against: tpot_s")
    for word in (*words, "the noise within one process only"):
        assert word in table.stdout
    # The device here is a CPU of measured bandwidth, and this tiny model is all overhead.
    device, efficiency = calibrated(saved, None, None)
    assert device.name == CPU
    assert efficiency.weights < 1


def test_the_table_names_the_mode_that_it_ran_in(
    tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    """Also where the modes of the planner do not have it, and it is compared with the fastest."""
    board = "NVIDIA Jetson AGX Orin Developer Kit"
    snapshot = Snapshot(module=board, power_mode="MINE", memory_total_bytes=61 << 30)
    monkeypatch.setattr("edge_lab.telemetry.read_snapshot", lambda: snapshot)
    orin = find_device("agx-orin-64")
    monkeypatch.setattr(bench_report, "find_bench_device", lambda *_: (orin, None))
    done = run_verb(str(tiny_bundles("qwen2")), *SMALL)
    assert f"on {board}, MINE: batch 1" in " ".join(done.stdout.split())


@pytest.mark.slow
def test_a_slowdown_beyond_the_limit_fails(
    tiny_bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bundle = str(tiny_bundles("qwen2", quant="int4"))
    saved = tmp_path / "bench.json"
    saved.write_text(run_verb(bundle, "--json", *SMALL).stdout)
    slowest_s = max(json.loads(saved.read_text())["tpot_s"]["values"])  # of a busy machine, too
    from edge.backends.ort.cpu import OrtBackend

    forward: Callable[..., Any] = OrtBackend.forward

    def slow(self: OrtBackend, *args: Any) -> Any:
        time.sleep(0.05 + 2 * slowest_s)
        return forward(self, *args)

    monkeypatch.setattr(OrtBackend, "forward", slow)
    limits = ["--against", str(saved), "--max-slowdown", "0.5"]
    done = run_verb(bundle, *limits, *SMALL)
    assert done.exit_code == EXIT_GATE_MISSED
    assert "tpot_s is +" in done.stderr
    assert run_verb(bundle, "--against", str(saved), *SMALL).exit_code == 0  # no limit, no gate


@pytest.mark.slow
def test_a_slowdown_within_the_noise_passes_the_limit(
    tiny_bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    saved = tmp_path / "bench.json"
    saved.write_text("{}")
    limits = [str(tiny_bundles("qwen2")), "--against", str(saved), "--max-slowdown", "0.1"]
    for low, code in ((0.9, 0), (1.05, EXIT_GATE_MISSED)):
        change = Change("tpot_s", ratio=1.5, low=low, high=2.0)
        monkeypatch.setattr(bench_report, "compare", lambda *_, change=change: [change])
        assert run_verb(*limits, *SMALL).exit_code == code


@pytest.mark.parametrize(
    ("content", "message"), [("[1]", "not what edge-llm bench"), ("{}", "not what edge-llm bench")]
)
def test_a_wrong_file_to_compare_with_is_refused(
    content: str, message: str, tiny_bundles: Bundles, tmp_path: Path
):
    saved = tmp_path / "bench.json"
    saved.write_text(content)
    with pytest.raises(ConfigError, match=message):
        run_verb(str(tiny_bundles("qwen2", quant="int4")), "--against", str(saved), *SMALL)


@pytest.mark.parametrize("repeats", [1, 2, 4])
def test_too_few_repeats_are_not_compared(repeats: int, tiny_bundles: Bundles, tmp_path: Path):
    saved = tmp_path / "bench.json"
    saved.write_text("{}")
    few = (*SMALL, "--against", str(saved), "--repeats", str(repeats))
    message = f"has --repeats {repeats}; give both 5 or more"
    with pytest.raises(ConfigError, match=message):
        run_verb(str(tiny_bundles("qwen2")), *few)
    for times in ([1.0] * repeats, [1.0] * 5), ([1.0] * 5, [1.0] * repeats):
        with pytest.raises(ConfigError, match=message):
            compare(*map(result_of, times))


def test_a_limit_needs_something_to_compare_with(tiny_bundles: Bundles):
    with pytest.raises(ConfigError, match="give --against"):
        run_verb(str(tiny_bundles("qwen2")), "--max-slowdown", "0.1")


def test_drafts_are_measured_beside_plain_answers(
    tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("COLUMNS", "200")
    # A tiny model drafts at a loss, which is what is tried here.
    monkeypatch.setattr("edge.runtime.scheduler.drafting._SAVED_STEPS", 1e12)
    monkeypatch.setattr("edge.runtime.scheduler.drafting._TRIALS", 1e9)
    draft = str(tiny_bundles("llama", quant="int4"))
    arguments = [
        *(str(tiny_bundles("qwen2")), "--prompt-tokens", "8", "--output-tokens", "10"),
        *("--repeats", "1", "--batch", "2", "--num-threads", "1", "--draft", draft, "--json"),
    ]
    run = CliRunner().invoke(bench, arguments, catch_exceptions=False)
    result = json.loads(run.stdout)
    drafts = result["drafts"]
    assert (drafts["draft"], drafts["speculative"]) == (draft, 5)
    assert {(row["text"], row["temperature"]) for row in drafts["texts"]} == {
        (text, temperature) for text in ("code", "chat", "prose") for temperature in (0.0, 0.6)
    }
    for row in drafts["texts"]:
        assert row["same"] == row["pairs"] == 1
        assert row["ratio"] == row["drafted_tps"] / row["plain_tps"]
        assert 0 <= row["accepted"] <= row["drafted"] <= 5 * 2 * row["steps"]
    assert sum(row["steps"] for row in drafts["texts"]) > 0
    bench_verb._print_drafts(drafts)
    shown = capsys.readouterr().out
    assert "Drafts by" in shown
    assert shown.count("1 of 1") == 6


def test_a_draft_that_fails_leaves_nothing_to_compare(
    tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any) -> Any:
        raise BackendError("the draft is out of order")

    monkeypatch.setattr("edge.runtime.draft_model.ModelDrafter.behind", lambda *_: 0)
    monkeypatch.setattr("edge.runtime.draft_model.ModelDrafter.propose", fail)
    bundle = str(tiny_bundles("qwen2"))
    small = ["--prompt-tokens", "8", "--output-tokens", "6", "--repeats", "1"]
    run = CliRunner().invoke(bench, [bundle, *small, "--num-threads", "1", "--draft", bundle])
    assert isinstance(run.exception, BackendError)
    assert "nothing to compare: the draft is out of order" in str(run.exception)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--prompt-tokens", "5000"), "exceed the KV capacity of 128 tokens"),
        (("--kv-capacity", "24", "--prompt-tokens", "20", "--output-tokens", "5"), "of 24 tokens"),
        ((*SMALL, "--layers", "--backend", "ort-cpu"), "but ort-cpu runs the bundle"),
        ((*SMALL, "--layers"), "build an engine with: edge-llm build"),
        ((*SMALL, "--batch", "3"), "that run differs in batch"),
        ((*SMALL, "--prefill", "int8"), "that run differs in prefill"),
    ],
)
def test_bad_input_is_refused_before_the_model_is_loaded(
    tiny_bundles: Bundles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    words: str,
):
    monkeypatch.setattr("edge.backends.choose.open_backend", None)  # calling it fails otherwise
    earlier = tmp_path / "earlier.json"
    earlier.write_text('{"batch": 1, "prefill": "plain"}')
    with pytest.raises(ConfigError, match=words):
        run_verb(str(tiny_bundles("qwen2", quant="int4")), *options, "--against", str(earlier))
