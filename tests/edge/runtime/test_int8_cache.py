"""What stands above a backend with an 8-bit cache: slides, stored prefixes, drafts, failures."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from edge.bundle.io_spec import kv_bytes_per_token
from edge.bundle.kv_scales import scales_sha256
from edge.bundle.manifest import read_manifest
from edge.runtime.llm import LLM
from edge.runtime.overflow import SlidingWindow
from edge.runtime.prefix_store import Layout, PrefixStore
from edge.runtime.sampling_params import SamplingParams
from tests.conftest import RUNNABLE, Bundles, require_int8_cache
from tests.edge.backends.runner import Runner, random_ids
from tests.standins.slot_rows import stacked

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


@pytest.fixture
def bundle(tiny_bundles: Bundles) -> Path:
    require_int8_cache(RUNNABLE)
    return tiny_bundles("qwen2", RUNNABLE, "fp16", "int8")


def test_a_slide_turns_keys_and_rounds_them_again(bundle: Path) -> None:
    """A key no longer than those of the calibration errs by half a step, and values by none."""
    with Runner(bundle) as runner:
        runner.step(random_ids(1, 60), [0])
        rows, ids = runner.backend.read_slot(0, 60), list(range(60))
        slid, kept = SlidingWindow(runner.manifest.model).slide(rows, ids)
        runner.backend.write_slot(0, slid)
        found = runner.backend.read_slot(0, len(kept))
        for plane, scale in runner.backend.kv_scales.items():
            wrong = np.abs(found[plane] - slid[plane])
            if plane.endswith("value"):
                assert not wrong.any()
                assert_array_equal(found[plane], rows[plane][:, kept])
                continue
            first, second = np.split(slid[plane] / scale, 2, axis=-1)
            inside = np.tile(np.hypot(first, second) <= 127, 2)  # as calibration saw them
            assert inside.mean() > 0.9
            assert (wrong <= 0.5001 * scale)[inside].all()
            assert (wrong <= 55 * scale).all()  # a corner of the square, turned onto an axis
        runner.lengths[0] = len(kept)
        assert np.isfinite(runner.step(random_ids(1, 1), [0])).all()


def test_an_answer_outgrows_its_slot(bundle: Path) -> None:
    with LLM(bundle, kv_capacity=48, overflow="slide") as llm:
        long = SamplingParams(temperature=0.0, max_tokens=120, ignore_eos=True)
        assert len(list(llm.generate_ids([1, 2, 3], long))) == 120


def test_prefixes_are_stored_in_eight_bits(bundle: Path, tmp_path: Path) -> None:
    ids = [int(each) for each in random_ids(40)]
    manifest = read_manifest(bundle)
    with Runner(bundle) as runner:
        runner.step([ids], [0])
        rows, scales = runner.backend.read_slot(0, 40), runner.backend.kv_scales
        layout = Layout.of(runner.backend)
    path = PrefixStore(tmp_path, manifest, layout, scales=scales).save("p", ids, rows)
    per_token = kv_bytes_per_token(manifest.model, "fp32", manifest.int8_layers)
    assert 0 < path.stat().st_size - 40 * per_token < 2000
    store = PrefixStore(tmp_path, manifest, layout, scales=scales)
    found = store.lookup([*ids, 1])
    assert found is not None
    loaded = found.load()
    assert loaded is not None
    assert_array_equal(stacked(loaded), stacked(rows))
    (info,) = PrefixStore(tmp_path, manifest).list()
    assert (info.name, info.num_tokens, info.problem) == ("p", 40, None)
    with Runner(bundle) as other:
        other.backend.write_slot(2, loaded)
        other.lengths[2] = 40
        theirs = other.step(random_ids(1, 1), [2])
        other.step([ids], [0])
        assert_array_equal(other.step(random_ids(1, 1), [0]), theirs)


@pytest.mark.parametrize("change", ["scales", "float"])
def test_a_prefix_of_another_cache_is_left_alone(
    change: str, bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Even if the bundle were the same: another type, or other scales, are another cache."""
    ids = [int(each) for each in random_ids(10)]
    manifest = read_manifest(bundle)
    with Runner(bundle) as runner:
        runner.step([ids], [0])
        rows, scales = runner.backend.read_slot(0, 10), dict(runner.backend.kv_scales)
        layout = Layout.of(runner.backend)
    PrefixStore(tmp_path, manifest, layout, scales=scales).save("p", ids, rows)
    if change == "scales":
        scales["0.key"] = scales["0.key"] * np.float32(2)
    else:
        scales = {}
    other = msgspec.structs.replace(layout, scales_sha256=scales_sha256(scales))
    with caplog.at_level(logging.WARNING):
        store = PrefixStore(tmp_path, manifest, other, scales=scales)
    assert store.lookup([*ids, 1]) is None
    assert "cache tensors in int8 (scales" in caplog.text


def test_a_shared_prompt_gives_the_same_answer(bundle: Path) -> None:
    """Rows that are kept, copied and swapped between slots are those that a prefill gives."""
    shared = [int(each) for each in random_ids(50)]
    prompts = [[*shared, 5, 6], [*shared, 7], [9, *shared[:30]]]
    with LLM(bundle, num_slots=1) as llm:
        wanted = [list(llm.generate_ids(prompt, GREEDY)) for prompt in prompts]
    with LLM(bundle, num_slots=3) as llm:
        for _ in range(2):
            assert [list(llm.generate_ids(prompt, GREEDY)) for prompt in prompts] == wanted
        together = [llm.generate_ids(prompt, GREEDY) for prompt in prompts]
        assert list(map(list, together)) == wanted
