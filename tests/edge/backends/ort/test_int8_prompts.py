"""Prompts read by INT8 products, against the same bundle read as in decode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from edge import LLM
from edge.backends.ort import cpu as ort
from edge.backends.ort import int8_prompts
from edge.backends.ort.int8_prompts import int8_bytes, unpack, widen_products
from edge.backends.step import step_after
from edge.bundle.manifest import read_manifest
from edge.bundle.onnx_file import OnnxFile
from edge.bundle.schemes import PLANES_RANGE
from edge.engine_config import INT8_PREFILL_TOKENS
from edge.errors import BundleError, ConfigError, ResourceError
from export.quantize.packing import pack_int4, split_planes
from tests.conftest import Bundles
from tests.edge.backends.runner import Runner, random_ids
from tests.makers.tiny_models import KINDS, Kind

QUANTS = ("int4", "int8")


def values(low: int, high: int) -> Any:
    return hnp.arrays(
        np.int8, st.integers(1, 20).map(lambda n: 2 * n), elements=st.integers(low, high)
    )


def unpacked(*planes: NDArray[np.uint8]) -> NDArray[np.float32]:
    result = np.empty(2 * planes[0].size, np.float32)
    unpack(list(planes), result)
    return result


@given(values(-8, 7))
def test_a_plane_unpacks_to_what_was_packed(weights: NDArray[np.int8]):
    assert_array_equal(unpacked(pack_int4(weights)), weights)


@given(values(*PLANES_RANGE))
def test_two_planes_unpack_to_their_sum(weights: NDArray[np.int8]):
    assert_array_equal(unpacked(*split_planes(weights)), weights)


def last_logits(runner: Runner, ids: NDArray[np.int64], slot: int = 0) -> NDArray[np.float32]:
    """A step of a prompt as the scheduler makes it: one row of logits, at the end."""
    start, indices = runner.lengths[slot], np.array([[ids.shape[1] - 1]])
    logits = runner.backend.forward(step_after([slot], [start], runner.table[ids], indices))
    runner.lengths[slot] += ids.shape[1]
    return np.array(logits[0, 0])


def cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_gives_the_same_answer_and_cache(kind: Kind, quant: str, tiny_bundles: Bundles):
    """8 bits for a token of each input and for each output's weights: measured cosine 0.9995."""
    bundle = tiny_bundles(kind, quant=quant)
    chunks = random_ids(1, 40, seed=1), random_ids(1, INT8_PREFILL_TOKENS, seed=2)
    with Runner(bundle) as plain, Runner(bundle, int8_prompts=True) as fast:
        for ids in chunks:
            found, expected = last_logits(fast, ids), last_logits(plain, ids)
            assert not np.array_equal(found, expected)  # the other products ran
            assert cosine(found, expected) > 0.998
        assert cosine(fast.cache(0), plain.cache(0)) > 0.998
        # Decode goes on upon the rows that the other session wrote.
        assert cosine(fast.step([[5]]), plain.step([[5]])) > 0.998


@pytest.mark.parametrize("quant", QUANTS)
def test_decode_short_steps_and_scores_are_the_plain_ones(quant: str, tiny_bundles: Bundles):
    bundle = tiny_bundles("qwen2", quant=quant)
    with Runner(bundle) as plain, Runner(bundle, int8_prompts=True) as fast:
        ids = random_ids(1, INT8_PREFILL_TOKENS - 1)
        assert_array_equal(last_logits(fast, ids), last_logits(plain, ids))
        assert_array_equal(fast.step([[7]]), plain.step([[7]]))
        ids = random_ids(1, 2 * INT8_PREFILL_TOKENS, seed=3)
        assert_array_equal(fast.step(ids), plain.step(ids))  # logits of every token
        assert_array_equal(fast.cache(0), plain.cache(0))


def test_weights_of_a_cpu_without_vnni_give_the_same_integers(
    tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    bundle = tiny_bundles("qwen2", quant="int4")
    found = []
    # Without VNNI the kernel for signed weights saturates, so nobody asks for it there.
    for signed in (int8_prompts._signed_weights(), False):
        monkeypatch.setattr(int8_prompts, "_signed_weights", lambda signed=signed: signed)
        with Runner(bundle, int8_prompts=True) as runner:
            found.append(last_logits(runner, random_ids(1, 40)))
    assert_array_equal(found[0], found[1])


def test_a_token_of_zeros_is_no_division_by_zero(tiny_bundles: Bundles):
    with Runner(tiny_bundles("qwen2", quant="int4"), int8_prompts=True) as runner:
        embeds = np.zeros((1, INT8_PREFILL_TOKENS, runner.manifest.model.hidden_size), np.float32)
        step = step_after([0], [0], embeds, np.array([[INT8_PREFILL_TOKENS - 1]]))
        assert np.isfinite(runner.backend.forward(step)).all()


@pytest.mark.parametrize("quant", ["fp16", "bf16", "int8-w8a8"])
def test_int8_prompts_are_refused_if_they_change_nothing(quant: str, tiny_bundles: Bundles):
    with pytest.raises(ConfigError, match=rf"prefill int8 is for .*\({quant}\)"):
        LLM(tiny_bundles("qwen2", quant=quant), backend="ort-cpu", prefill="int8")


def test_without_memory_it_is_refused_with_the_figures(
    tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    bundle = tiny_bundles("qwen2", quant="int4")
    size = int8_bytes(read_manifest(bundle))
    monkeypatch.setattr(ort, "read_available_memory_bytes", lambda: 2 * size - 1)
    with pytest.raises(ResourceError, match=r"--prefill int8 takes 0\.\d GB .* and 0\.\d GB are"):
        LLM(bundle, kv_capacity=64, prefill="int8")
    monkeypatch.setattr(ort, "read_available_memory_bytes", lambda: 2 * size)
    LLM(bundle, kv_capacity=64, prefill="int8").close()


def test_the_bytes_are_those_of_the_weights_that_are_held(tiny_bundles: Bundles):
    bundle = tiny_bundles("qwen2", quant="int4")
    manifest = read_manifest(bundle)
    graph = OnnxFile((bundle / manifest.graphs.cpu).read_bytes())
    names = widen_products(graph, bundle, manifest)
    held = [graph.in_memory[f"{name}.int8{end}"].nbytes for name in names for end in ("", "_scale")]
    assert sum(held) == int8_bytes(manifest)
    assert "lm_head" not in names


def test_a_foreign_graph_is_refused(tiny_bundles: Bundles):
    bundle = tiny_bundles("qwen2", quant="int4")
    manifest = read_manifest(bundle)
    graph = OnnxFile((bundle / manifest.graphs.cpu).read_bytes())
    graph.nodes = [node for node in graph.nodes if node.op_type != "DequantizeLinear"]
    with pytest.raises(BundleError, match="export the bundle again"):
        widen_products(graph, bundle, manifest)


def test_a_long_prompt_is_read_in_chunks_and_answered(tiny_bundles: Bundles, tmp_path: Path):
    bundle = tiny_bundles("llama", quant="int4")
    ids = random_ids(1, 70)[0].tolist()
    with LLM(bundle, backend="ort-cpu", prefill="int8", prefill_chunk=32) as llm:
        assert len(llm.generate(ids).tokens) > 0
