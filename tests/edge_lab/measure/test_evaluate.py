from __future__ import annotations

import json
import math
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from hypothesis import strategies as st

from edge.bundle.embeddings import EmbeddingTable
from edge.errors import ConfigError
from edge.runtime.llm import LLM
from edge_lab.measure.compare import (
    CHUNK_TOKENS,
    Positions,
    _run_both,
    cache_sums,
    compare,
    merge,
    run_window,
)
from edge_lab.measure.defaults import EVAL_TEXT
from edge_lab.measure.evaluate import (
    GATES,
    Gate,
    bits_per_weight,
    check_gate,
    confidence_intervals,
    cut_windows,
    kl_by_position,
    load_gate,
    missed_thresholds,
    read_text,
    summarize,
)
from tests.makers.manifests import make_manifest
from tests.standins.scripted_backend import ScriptedBackend, random_logits, write_table
from tests.standins.slot_rows import by_name

LOGITS = st.lists(st.floats(-500, 500, width=32), min_size=6, max_size=6)


def make_positions(num: int = 200, seed: int = 0) -> Positions:
    random = np.random.RandomState(seed)
    kl, nll, reference = random.rand(3, num)
    agrees = (random.rand(num) < 0.9).astype(float)
    rows = np.arange(num)
    return Positions(rows // 10, rows % 50, nll, reference, kl, agrees, np.ones(num))


def test_figures_by_hand():
    log2 = math.log(2)
    positions = Positions(
        np.array([0, 0]),
        np.array([0, 1]),
        np.array([log2, 3 * log2]),
        np.array([log2, log2]),
        np.array([0.0, 0.2]),
        np.array([1.0, 0.0]),
        np.array([1.0, 0.5]),
    )
    assert summarize(positions) == pytest.approx(
        {
            "perplexity": 4,
            "perplexity_reference": 2,
            "perplexity_ratio": 2,
            "kl_mean": 0.1,
            "kl_p99": 0.198,
            "top1_agreement": 0.5,
            "cosine_mean": 0.75,
        }
    )
    assert kl_by_position(positions, 2) == [
        {"position": 0, "kl_mean": 0},
        {"position": 1, "kl_mean": 0.2},
    ]


def test_intervals_hold_the_figure_and_follow_the_seed():
    positions = make_positions()
    found = confidence_intervals(positions, seed=3)
    for name, value in summarize(positions).items():
        low, high = found[name]
        assert value is not None
        assert low <= value <= high
    assert found == confidence_intervals(positions, seed=3)
    assert found != confidence_intervals(positions, seed=4)


def test_blocks_are_resampled_whole():
    # Two blocks, each constant: a resample is all 0, all 1 or half and half.
    positions = make_positions(100)
    ones = (np.arange(100) >= 50).astype(float)
    blocks = ones.astype(np.int64)
    split = Positions(blocks, blocks, ones, ones, ones, ones, ones)
    assert confidence_intervals(split)["kl_mean"] == (0, 1)
    low, high = confidence_intervals(positions)["kl_mean"]
    assert high - low < 0.2


def test_one_block_says_nothing_of_its_spread():
    assert confidence_intervals(make_positions(10)) == {}


def test_windows():
    assert cut_windows([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4]]  # one token alone scores nothing
    assert cut_windows([1, 2, 3], 3, [9]) == [[9, 1, 2], [9, 3]]
    assert cut_windows([1, 2, 3, 4], 4, limit=3) == [[1, 2, 3]]
    with pytest.raises(ConfigError, match="at least 2"):
        cut_windows([1], 4)


@pytest.mark.parametrize("steps", [CHUNK_TOKENS, 7])  # an engine may take fewer than a block
def test_each_token_is_scored_as_the_successor_of_the_one_before(tmp_path: Path, steps: int):
    """A model that gives the next higher of 9 tokens a half, and each other token a sixteenth."""
    table = EmbeddingTable(write_table(tmp_path / "table", 9))

    def count_up(seen: tuple[int, ...]) -> np.ndarray:
        row = np.zeros(9, np.float32)
        row[(seen[-1] + 1) % 9] = math.log(8)
        return row

    size = 2 * CHUNK_TOKENS
    backend = ScriptedBackend(table, count_up, capacity=size, max_step_tokens=steps)
    model = SimpleNamespace(backend=backend, embeddings=table, manifest=make_manifest())
    ids = [at % 9 for at in range(size)]
    unexpected = [5, CHUNK_TOKENS, size - 1]  # the second is the first of the second step
    for at in unexpected:
        ids[at:] = [(each + 1) % 9 for each in ids[at:]]
    wanted = np.full(size - 1, math.log(2))
    wanted[[at - 1 for at in unexpected]] = math.log(16)
    found = compare(model, None, [ids]).positions
    np.testing.assert_allclose(found.nll, wanted, rtol=1e-6)
    perplexity = summarize(found)["perplexity"]
    assert perplexity == pytest.approx(2 * 8 ** (3 / (size - 1)))
    assert np.bincount(found.block).max() == steps


def test_both_models_run_the_same_blocks(tmp_path: Path):
    """Whichever engine takes the shorter steps: the logits of one block are compared."""
    table = EmbeddingTable(write_table(tmp_path / "table", 9))
    models = [
        SimpleNamespace(
            backend=ScriptedBackend(table, random_logits(9), max_step_tokens=steps),
            embeddings=table,
            manifest=make_manifest(),
        )
        for steps in (7, 5)
    ]
    for bundle, reference in (models, models[::-1]):
        ran = list(_run_both(bundle, reference, np.arange(9).repeat(2)))
        assert [(part.start, part.stop) for part, _, _ in ran] == [
            (0, 5),
            (5, 10),
            (10, 15),
            (15, 17),
        ]
        for _, ours, theirs in ran:
            np.testing.assert_array_equal(ours, theirs)


def test_layer_errors_by_hand():
    random = np.random.RandomState(0)
    reference = random.standard_normal((2, 1, 400, 4))
    # Keys 10 % too large; values turned by an invertible map, which the output matrix may undo.
    turned = np.stack([reference[0] * 1.1, reference[1] @ random.standard_normal((4, 4))])
    first, second = (
        cache_sums(by_name(reference[:, :, half]), by_name(turned[:, :, half]))
        for half in (slice(0, 150), slice(150, 400))
    )
    (error,) = (first + second).errors()
    assert error.key_error == pytest.approx(0.1)
    assert error.value_error == pytest.approx(0, abs=1e-5)


def test_value_error_measures_noise():
    random = np.random.RandomState(1)
    reference = random.standard_normal((2, 2, 2000, 8))
    noisy = reference + 0.1 * random.standard_normal(reference.shape)
    (error,) = cache_sums(by_name(noisy), by_name(reference)).errors()
    assert error.value_error == pytest.approx(0.1, rel=0.05)
    # With 3 tokens per dimension a third of the noise is fitted away; the error must not shrink.
    reference = random.standard_normal((80, 4, 24, 8))
    noisy = reference + 0.1 * random.standard_normal(reference.shape)
    found = [
        layer.value_error or 0.0
        for layer in cache_sums(by_name(noisy), by_name(reference)).errors()
    ]
    assert np.mean(found) == pytest.approx(0.1, rel=0.05)
    few = reference[:, :, :12]
    assert cache_sums(by_name(few), by_name(few)).errors()[0].value_error is None


def test_bits_per_weight():
    manifest = make_manifest()
    assert bits_per_weight(manifest, lm_head=False) == 8 * 4608 / (64 * 128)
    both = 8 * (4608 + 19800) / (64 * 128 + 64 * 300)
    assert bits_per_weight(manifest, lm_head=True) == pytest.approx(both)


def test_gates(tmp_path: Path):
    assert load_gate("int4", "int8") is GATES["int4"]
    assert load_gate("recipe", "int8-w8a8") is GATES["int8"]
    assert load_gate("recipe", "bf16") is GATES["fp16"]
    file = tmp_path / "gate.json"
    file.write_text('{"kl_mean": 0.5}')
    assert load_gate(str(file), "fp16") == Gate(kl_mean=0.5)
    file.write_text('{"kl_maen": 0.5}')
    with pytest.raises(ConfigError, match="kl_maen"):
        load_gate(str(file), "fp16")
    file.write_text("{}")
    with pytest.raises(ConfigError, match="no threshold"):
        load_gate(str(file), "fp16")
    for name, message in (("int3", "unknown gate"), (str(tmp_path / "none.json"), "cannot read")):
        with pytest.raises(ConfigError, match=message):
            load_gate(name, "fp16")
    with pytest.raises(ConfigError, match="mixed"):
        load_gate("recipe", "mixed")


def test_toml_gate(tmp_path: Path):
    if sys.version_info < (3, 11):
        pytest.importorskip("tomli")
    file = tmp_path / "gate.toml"
    file.write_text("top1_agreement = 0.9\n")
    assert load_gate(str(file), "fp16") == Gate(top1_agreement=0.9)
    file.write_text("top1_agreement = \n")
    with pytest.raises(ConfigError, match="is not a gate"):
        load_gate(str(file), "fp16")


def test_thresholds():
    figures = dict.fromkeys(Gate.__struct_fields__, 0.5)
    assert not list(missed_thresholds(Gate(kl_mean=0.5, top1_agreement=0.5), figures))
    assert list(missed_thresholds(Gate(kl_mean=0.4, top1_agreement=0.6), figures)) == [
        "kl_mean 0.5 is above 0.4",
        "top1_agreement 0.5 is below 0.6",
    ]


def test_a_built_in_gate_judges_the_bundle_and_ones_own_what_is_served(tmp_path: Path):
    alone = {"cosine_mean": 1.0, "top1_agreement": 0.97, "perplexity_ratio": 1.0}
    served = alone | {"top1_agreement": 0.94, "bundle_alone": alone}
    assert not list(missed_thresholds(load_gate("int8", "int8"), served))
    assert list(missed_thresholds(Gate(top1_agreement=0.95), served))
    (tmp_path / "gate.json").write_bytes(msgspec.json.encode(GATES["int8"]))
    assert list(missed_thresholds(load_gate(str(tmp_path / "gate.json"), "int8"), served))
    assert list(missed_thresholds(load_gate("int8", "int8"), alone | {"top1_agreement": 0.94}))


def test_a_gate_that_cannot_be_decided_is_refused_before_the_run():
    text, task = GATES["int4"], Gate(accuracy_loss=0.02)
    check_gate(text, task=False, reference=True)
    check_gate(task, task=True, reference=True)
    with pytest.raises(ConfigError, match="add --against"):
        check_gate(text, task=False, reference=False)
    with pytest.raises(ConfigError, match="accuracy_loss, which needs --task"):
        check_gate(task, task=False, reference=True)
    with pytest.raises(ConfigError, match="which no task measures"):
        check_gate(text, task=True, reference=True)


def test_text_files(tmp_path: Path):
    assert len(read_text(EVAL_TEXT)) > 10_000
    file = tmp_path / "text"
    file.write_bytes(b"a\xff")
    with pytest.raises(ConfigError, match="byte 1"):
        read_text(file)
    assert json.dumps(read_text(EVAL_TEXT))


@pytest.mark.parametrize("order", ["forwards", "backwards", "twice over two machines"])
def test_windows_merge_to_the_bit_wherever_they_ran(tiny_bundles, order: str):
    ids = np.random.RandomState(3).randint(3, 290, 200).tolist()
    windows = cut_windows(ids, 48)

    def opened(quant: str) -> LLM:
        return LLM(tiny_bundles("qwen2", "portable", quant), kv_capacity=48, num_threads=1)

    with opened("int4") as bundle, opened("fp16") as reference:
        whole = compare(bundle, reference, windows)
        if order == "twice over two machines":
            with opened("int4") as other, opened("fp16") as other_reference:
                pairs = [(bundle, reference), (other, other_reference)]
                parts = [run_window(*pairs[i % 2], each) for i, each in enumerate(windows)]
        else:
            places = range(len(windows))[:: 1 if order == "forwards" else -1]
            found = {i: run_window(bundle, reference, windows[i]) for i in places}
            parts = [found[i] for i in range(len(windows))]
    merged = merge(parts)
    for item in fields(Positions):
        np.testing.assert_array_equal(
            getattr(whole.positions, item.name), getattr(merged.positions, item.name)
        )
    assert whole.layers == merged.layers
    assert whole.positions.block.max() == len(windows) - 1  # a window of 47 is one block
    assert whole.positions.kl.max() > 0
