"""Two backends held against each other, and the verb that does it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner, Result

from edge.backends import Step
from edge.backends.ort.cpu import OrtBackend
from edge.bundle.embeddings import EmbeddingTable
from edge.bundle.io_spec import EMBEDDINGS_NAME
from edge.bundle.manifest import Manifest, read_manifest
from edge.engine_config import EngineConfig
from edge.errors import ConfigError
from edge_lab.cli.verify import verify
from edge_lab.measure.verify import (
    ROUNDED_ACTIVATIONS,
    Agreement,
    Thresholds,
    _misses,
    compare_backends,
    default_thresholds,
)
from tests.conftest import RUNNABLE, Bundles, require_int8_cache
from tests.makers.manifests import make_manifest, make_model

PROMPTS = [[5, 17, 200, 3, 90, 41, 8], [77]]


@pytest.fixture
def bundle(tiny_bundles: Bundles) -> Path:
    return tiny_bundles("qwen2")


def open_backend(bundle: Path, **options) -> OrtBackend:
    return OrtBackend(bundle, read_manifest(bundle), **options)


def table_of(bundle: Path) -> EmbeddingTable:
    return EmbeddingTable(bundle / EMBEDDINGS_NAME)


class Perturbed(OrtBackend):
    """Wrong in one way, from a given position on."""

    fault = ""
    start = 0
    spoilt = False

    def forward(self, step: Step) -> Any:
        positions = step.positions
        if self.fault == "position" and positions[0, 0] >= self.start:
            positions = np.maximum(positions - 1, 0) if step.seq == 1 else positions
        logits = super().forward(replace(step, positions=positions))
        if self.fault == "logits" and positions[0, 0] >= self.start:
            logits = logits + np.random.RandomState(0).standard_normal(logits.shape).astype("f4")
        if self.fault == "cache":
            self._cache.arrays["1.value"][0, 0, positions[0, 0]] *= -1
        if self.fault == "NaN in the first prompt's cache" and not self.spoilt:
            self._cache.arrays["1.value"][0, 0, positions[0, 0]] = np.nan
            self.spoilt = step.kv_len > len(PROMPTS[0])
        if self.fault == "nan":
            logits = np.full_like(logits, np.nan)
        return logits


def test_the_same_engine_agrees_with_itself_whatever_its_chunks(bundle: Path) -> None:
    whole, pieces = open_backend(bundle), open_backend(bundle, max_step_tokens=3)
    report = compare_backends(whole, pieces, PROMPTS, table_of(bundle), decode_steps=8)
    assert report.passed, report.misses
    assert report.prefill.positions == 8
    assert report.decode.positions == 16
    assert report.prefill.top1 == report.decode.top1 == 1.0
    assert report.decode.mean_kl == pytest.approx(0, abs=1e-9)
    assert report.min_cache_cosine == pytest.approx(1)


def test_the_unfused_graph_agrees_with_the_fused_one(bundle: Path) -> None:
    plain = open_backend(bundle, fuse_attention=False)
    report = compare_backends(open_backend(bundle), plain, PROMPTS, table_of(bundle))
    assert report.passed, report.misses
    assert report.decode.positions == 64


@pytest.mark.parametrize(
    ("fault", "phase"),
    [("logits", "decode"), ("position", "decode"), ("cache", "cache"), ("nan", "prefill")],
)
def test_a_fault_is_a_miss_in_the_phase_where_it_shows(
    bundle: Path, fault: str, phase: str
) -> None:
    wrong = Perturbed(bundle, read_manifest(bundle))
    wrong.fault, wrong.start = fault, 7
    report = compare_backends(
        open_backend(bundle), wrong, PROMPTS[:1], table_of(bundle), decode_steps=8
    )
    assert not report.passed
    assert any(miss.startswith(phase) for miss in report.misses)
    if fault in ("logits", "position"):
        assert not any(miss.startswith("prefill") for miss in report.misses)


def test_a_nan_in_the_cache_of_one_prompt_is_a_miss(bundle: Path) -> None:
    wrong = Perturbed(bundle, read_manifest(bundle))
    wrong.fault = "NaN in the first prompt's cache"
    report = compare_backends(
        open_backend(bundle), wrong, PROMPTS, table_of(bundle), decode_steps=1
    )
    assert math.isnan(report.min_cache_cosine)
    assert any(miss.startswith("cache: cosine nan") for miss in report.misses)


@pytest.mark.parametrize("figure", ["min_cosine", "top1", "mean_kl"])
def test_a_nan_figure_is_a_miss(figure: str) -> None:
    wrong: dict[str, Any] = {figure: math.nan}
    perfect = Agreement(positions=4, min_cosine=1.0, top1=1.0, mean_kl=0.0)
    assert _misses("decode", perfect, Thresholds()) == []
    (miss,) = _misses("decode", replace(perfect, **wrong), Thresholds())
    assert "nan" in miss


def test_positions_that_are_no_numbers_leave_no_figure(bundle: Path) -> None:
    wrong = Perturbed(bundle, read_manifest(bundle))
    wrong.fault = "nan"
    report = compare_backends(open_backend(bundle), wrong, PROMPTS, table_of(bundle))
    assert np.isnan([report.prefill.mean_kl, report.prefill.min_cosine]).all()
    assert report.min_cache_cosine == pytest.approx(1)  # the cache itself is sound


def test_the_callers_thresholds_are_used(bundle: Path) -> None:
    wrong = Perturbed(bundle, read_manifest(bundle))
    wrong.fault = "logits"
    loose = Thresholds(cosine=-1, top1=0, kl=100, cache_cosine=-1)
    args = open_backend(bundle), wrong, PROMPTS, table_of(bundle)
    assert not compare_backends(*args, decode_steps=4).passed
    assert compare_backends(*args, decode_steps=4, thresholds=loose).passed


@pytest.mark.parametrize("prompts", [[], [[]], [[1] * 100]])
def test_prompts_that_cannot_be_compared_are_refused(bundle: Path, prompts) -> None:
    backend = open_backend(bundle)
    with pytest.raises(ConfigError, match="prompt"):
        compare_backends(backend, backend, prompts, table_of(bundle))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(verify, [str(argument) for argument in arguments])


def test_the_verb_passes_on_a_good_engine_and_says_what_it_measured(bundle: Path) -> None:
    result = run(bundle, "--decode-steps", 6, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["backend"] == "ort-cpu"
    assert report["passed"] is True
    assert report["decode"]["positions"] == 18
    assert report["prefill"]["min_cosine"] > 0.999
    assert "passed" in run(bundle, "--decode-steps", 2).stdout


@pytest.mark.usefixtures("slow_clock")
def test_the_verb_prints_lines_without_a_terminal(bundle: Path) -> None:
    result = run(bundle, "--decode-steps", 6, "--json")
    assert len(result.stdout.splitlines()) == 1
    lines = result.stderr.splitlines()
    for step in ("hash", "open", "compare"):
        assert any(line.startswith(f"{step}: 100 %") for line in lines), lines
    assert any(" so far, about " in line for line in lines)


@pytest.mark.parametrize("quant", ["fp16", "int4"])
def test_a_bundle_with_an_8_bit_cache_passes_as_it_is(quant: str, tiny_bundles: Bundles) -> None:
    require_int8_cache(RUNNABLE)
    bundle = tiny_bundles("qwen2", RUNNABLE, quant, "int8")
    result = run(bundle, "--decode-steps", 6)
    assert result.exit_code == 0, result.output
    usual = default_thresholds(read_manifest(bundle), rounds=True)
    assert usual == replace(ROUNDED_ACTIVATIONS, cache_cosine=0.85)


def test_thresholds_without_meaning_for_a_task_are_left_out() -> None:
    def usual(task: str) -> Thresholds:
        return default_thresholds(make_manifest(model=make_model(task=task)), rounds=False)

    assert usual("generate") == Thresholds()
    assert usual("embed") == Thresholds(top1=0.0, kl=math.inf)
    assert usual("rerank") == Thresholds(cosine=-1.0)


def test_a_missed_threshold_is_printed_and_is_an_exit_code(tiny_bundles: Bundles) -> None:
    rounded = tiny_bundles("qwen2", quant="int4")  # its activations are rounded: never quite equal
    result = run(rounded, "--decode-steps", 2, "--min-cosine", 1)
    assert result.exit_code == 3
    assert "MISSED: prefill: cosine" in result.stdout


@pytest.mark.parametrize(
    ("option", "value"),
    [("--min-cosine", 1.5), ("--min-top1", -1), ("--max-kl", "nan"), ("--min-cache-cosine", "inf")],
)
def test_thresholds_that_mean_nothing_are_refused(bundle: Path, option: str, value: object) -> None:
    result = run(bundle, option, value)
    assert result.exit_code == 2  # click's own; the command leaves with 64
    assert option in result.stderr


@pytest.mark.slow
def test_prompts_of_ones_own(bundle: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abc\n\nd\x0ce\n", encoding="utf-8")  # two lines
    result = run(bundle, "--prompts", prompts, "--decode-steps", 3, "--json")
    assert json.loads(result.stdout)["decode"]["positions"] == 6
    for text, words in ((b"\n", "no prompt"), (b"\xff", "not UTF-8")):
        prompts.write_bytes(text)
        assert words in str(run(bundle, "--prompts", prompts).exception)
    assert "no plain file" in str(run(bundle, "--prompts", "/dev/null").exception)
    assert "--kv-capacity" in str(run(bundle, "--decode-steps", 128).exception)


def test_a_figure_that_is_nan_is_null_in_json(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON has no NaN, which Python's own reader takes all the same."""

    def spoils_one_row(path: Path, manifest: Manifest, config: EngineConfig) -> Perturbed:
        wrong = Perturbed(path, manifest, max_step_tokens=config.prefill_chunk)
        wrong.fault = "NaN in the first prompt's cache"
        return wrong

    monkeypatch.setattr("edge.backends.choose.open_backend", spoils_one_row)
    result = run(bundle, "--decode-steps", 2, "--json")
    assert result.exit_code == 3
    report = msgspec.json.decode(result.stdout)
    assert report["min_cache_cosine"] is None
    assert report["misses"]


def test_an_engine_with_fewer_rows_gets_shorter_prompts(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int | None] = []

    def fewer_rows(path: Path, manifest: Manifest, config: EngineConfig) -> OrtBackend:
        seen.append(config.num_threads)
        return OrtBackend(path, manifest, kv_capacity=40, max_step_tokens=config.prefill_chunk)

    monkeypatch.setattr("edge.backends.choose.open_backend", fewer_rows)
    options = "--decode-steps", 8, "--num-threads", 1, "--json"
    result = run(bundle, "--backend", "tensorrt", *options)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["passed"] is True
    assert seen == [None]  # they are the reference's; an engine on the GPU refuses them
