"""By which measure a roll-out rejects: bounds, what they are held to, and real damaged weights."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge.bundle.manifest import read_manifest
from edge.engine_config import EngineConfig
from edge.errors import ConfigError, NonFiniteError
from edge_fleet.rollout.judge import Candidate, Gate, Judge, Measure, WorseError
from edge_lab.measure.watch import Baseline, ItemResult
from edge_make.manifest_bytes import encode_manifest
from edge_make.progress import silent
from tests.makers.manifests import replace_file

TOKENS = 2000
HAS = math.log(20) * TOKENS
"""Nats of a text with the perplexity 20."""


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    text, other, golden = (tmp_path / name for name in ("text.txt", "other.txt", "golden.jsonl"))
    text.write_text("The cat sat on the mat. " * 40)
    other.write_text("Two and two are four. " * 40)
    rows = [{"id": str(n), "prompt": f"{n}?", "answer": str(n)} for n in range(12)]
    golden.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Gate((text, other), golden=golden)


@pytest.fixture
def judge(gate: Gate) -> Judge:
    return Judge(gate, silent)


def nats(*ratios: float) -> tuple[float, ...]:
    """Of two texts, where the perplexity has changed as the ratios say: each, or both alike."""
    found = tuple(HAS + math.log(ratio) * TOKENS for ratio in ratios)
    return found * (2 // len(found))


def measured(name: str, ratio: float = 1.0, right: int = 8, **changes: Any) -> Measure:
    items = tuple(ItemResult(str(n), n < right, False, False, 9) for n in range(12))
    run = Baseline(name, "golden", 256, items)
    found = Measure(name, "text", nats(ratio), (TOKENS, TOKENS), 1.0, run)
    return msgspec.structs.replace(found, **changes)


def test_a_text_that_is_predicted_8_percent_worse_is_the_bound(judge: Judge):
    judge.compare(measured("new", 1.079), measured("old"))
    with pytest.raises(WorseError, match=r"1\.081 times that of old on .*, at most 1\.08"):
        judge.compare(measured("new", 1.081), measured("old"))
    with pytest.raises(WorseError, match="of old"):
        judge.compare(measured("new", nats=(HAS, math.inf)), measured("old"))


@pytest.mark.parametrize("worse", ["text.txt", "other.txt"])
def test_a_damage_that_one_kind_of_text_hardly_shows_is_rejected_by_the_other(
    judge: Judge, worse: str
):
    """As a real one did: 1.053 times the perplexity of one text, 1.108 times that of another."""
    ratios = (1.108, 1.053) if worse == "text.txt" else (1.053, 1.108)
    with pytest.raises(WorseError, match=rf"1\.108 times that of old on {worse}, at most 1\.08"):
        judge.compare_text(measured("new", nats=nats(*ratios)), measured("old"))
    # What an export has lost by its manifest is allowed on either text.
    judge.compare_text(measured("int4", nats=nats(*ratios), own_loss=1.09), measured("old"))


def test_what_was_lost_in_three_roll_outs_is_lost_to_the_first_one(judge: Judge):
    first, second, third = (measured(f"r{n}", 1.05**n) for n in range(3))
    judge.compare(second, first, first)
    with pytest.raises(WorseError, match=r"1\.103 times that of r0"):
        judge.compare(third, second, first)
    # Likewise right answers, of which each time too few are lost to be no chance.
    judge.compare(measured("c", right=5), measured("b", right=8), measured("b", right=8))
    with pytest.raises(WorseError, match=r"golden set: wrong_rate 0\.75, was 0\.25 with r0"):
        judge.compare(measured("c", right=3), measured("b", right=5), measured("r0", right=9))


def test_what_quantization_lost_by_the_manifest_is_allowed_besides_up_to_a_quarter(judge: Judge):
    judge.compare(measured("int4", 1.15, own_loss=1.07), measured("int8"))
    with pytest.raises(WorseError, match=r"at most 1\.156"):
        judge.compare(measured("int4", 1.16, own_loss=1.07), measured("int8"))
    # Nothing is allowed twice, and nobody writes a licence for noise into a manifest.
    with pytest.raises(WorseError, match=r"at most 1\.08"):
        judge.compare(measured("new", 1.1, own_loss=1.07), measured("old", own_loss=1.07))
    with pytest.raises(WorseError, match=r"at most 1\.35"):
        judge.compare(measured("new", 1.36, own_loss=1e9), measured("old"))


def test_tokenizers_that_cut_the_text_otherwise_are_compared_by_the_whole_text(judge: Judge):
    judge.compare(measured("new", tokens=(TOKENS // 2, TOKENS)), measured("old"))
    with pytest.raises(WorseError):
        judge.compare(
            measured("new", nats=(HAS, 1.1 * HAS), tokens=(TOKENS, 2 * TOKENS)), measured("old")
        )


def test_a_golden_set_too_weak_to_tell_noise_is_refused(judge: Judge):
    judge.check_set(measured("old", right=6))
    with pytest.raises(WorseError):  # six are enough: all of them flip
        judge.compare(measured("new", right=0), measured("old", right=6))
    judge.compare(measured("new", right=0), measured("old", right=5))  # and five are not
    with pytest.raises(ConfigError, match=r"cannot reject anything: old.* has 5 right .*--gate"):
        judge.check_set(measured("old", right=5))


def test_a_measure_of_another_text_bundle_or_version_is_none(judge: Judge, gate: Gate):
    class Who(Candidate):
        def read(self, *_: Any) -> list[tuple[float, int]]:
            return [(5.0, 3), (4.0, 2)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edge_fleet.rollout.judge.read_manifest", lambda _: read_nothing)
        found = judge.read(None, Who(Path("r1-1"), EngineConfig(), None))
    plain = json.loads(json.dumps(msgspec.to_builtins(found)))
    assert judge.known(plain, "r1-1") == found
    assert judge.known(plain) == found
    assert judge.known(plain, "r1-2") is None
    assert judge.known({"bundle": "r1-1", "golden_sha256": "", "items": []}, "r1-1") is None
    one_text = {**plain, "text_sha256": plain["texts_sha256"], "nats": 5.0, "tokens": 3}
    assert judge.known(one_text, "r1-1") is None  # as journals were before there were two
    gate.texts[1].write_text("Another text.")
    assert Judge(gate, silent).known(plain, "r1-1") is None


class _NoQuality:
    quality = None


read_nothing = _NoQuality()


def test_values_that_are_not_finite_are_worse_and_no_failed_step(
    judge: Judge, tiny_bundles: Any, monkeypatch: pytest.MonkeyPatch
):
    who = Candidate(tiny_bundles("qwen2"), EngineConfig(backend="ort-cpu", kv_capacity=64), None)
    good = judge.read(None, who)
    assert len(good.nats) == 2
    assert all(0 < nats < math.inf for nats in good.nats)

    def noise(*_: object) -> float:
        raise NonFiniteError("the logits hold NaN")

    monkeypatch.setattr("edge_fleet.rollout.judge.perplexity", noise)
    with pytest.raises(WorseError):
        judge.compare_text(judge.read(None, who), good)
    monkeypatch.setattr("edge_fleet.rollout.judge.perplexity", _too_much)
    with pytest.raises(WorseError):
        judge.compare_text(judge.read(None, who), good)


def test_the_manifest_says_what_an_export_has_lost(judge: Judge, tiny_bundles: Any, tmp_path: Path):
    bundle = tmp_path / "b"
    shutil.copytree(tiny_bundles("qwen2"), bundle)
    config = EngineConfig(backend="ort-cpu", kv_capacity=64)
    assert judge.read(None, Candidate(bundle, config, None)).own_loss == 1.0
    for found, own in ((1.07, 1.07), (0.9, 1.0), (None, 1.0)):
        quality = {"text": {"perplexity_ratio": found}}
        changed = msgspec.structs.replace(read_manifest(bundle), quality=quality)
        (bundle / "manifest.json").write_bytes(encode_manifest(changed))
        assert judge.read(None, Candidate(bundle, config, None)).own_loss == own


def _too_much(*_: object) -> float:
    return math.exp(1e4)


@pytest.mark.slow
def test_a_real_model_of_which_a_third_of_the_bytes_is_noise_is_rejected(
    smollm2_bundle: Path, tmp_path: Path
):
    """A small version of python3 -m lab planted-bundles."""
    text = tmp_path / "text.txt"
    text.write_text("Rivers carry water from the mountains down to the sea, and sand with it. " * 4)
    judge = Judge(Gate((text,), golden=None), silent)
    config = EngineConfig(backend="ort-cpu", num_slots=1, kv_capacity=512)
    old = judge.read(None, Candidate(smollm2_bundle, config, None))
    bad = tmp_path / "bad"
    shutil.copytree(smollm2_bundle, bad)
    name = "decoder.onnx.data"
    data = np.frombuffer((bad / name).read_bytes(), np.uint8).copy()
    random = np.random.default_rng(0)
    third = random.random(len(data)) < 1 / 3
    data[third] ^= random.integers(1, 256, int(third.sum()), np.uint8)
    replace_file(bad, name, data.tobytes())
    with pytest.raises(WorseError, match="perplexity"):
        judge.compare_text(judge.read(None, Candidate(bad, config, None)), old)
    judge.compare_text(judge.read(None, Candidate(smollm2_bundle, config, None)), old)
