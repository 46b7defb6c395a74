"""Scratch memory as compilers reported it: which of it says that weights are unpacked."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from edge.bundle.manifest import LinearInfo, Manifest
from edge.bundle.schemes import Recipe
from edge.planner.weights import recipe_linears
from engines.check import check_bundle
from engines.config import BuildConfig, BuildShapes, resolve
from engines.profiles import make_profiles
from engines.scratch import check_decode_scratch, scratch_by_profile
from tests.conftest import Bundles
from tests.edge.bundle.test_schemes import SMOLLM2
from tests.manifests import make_manifest

# Decode profile of SmolLM2-135M, capacity 4096, TensorRT for RTX 1.7.1 for sm 86, by the batch.
FLOAT = {1: 9_775_104, 8: 25_243_136}
BLOCKED_INT8_HEAD, BLOCKED_INT8 = 66_396_160, 256_395_264


def case(recipe: Recipe, max_batch: int) -> tuple[Manifest, BuildShapes]:
    model = replace(SMOLLM2, num_layers=30)
    linears = {
        each.name: LinearInfo(scheme=each.scheme, shape=each.shape, num_bytes=1)
        for each in recipe_linears(model, recipe)
    }
    manifest = make_manifest(model=model, kv_capacity=4096, rope_positions=8192)
    quantization = replace(manifest.quantization, linears=linears)
    manifest = replace(manifest, quantization=quantization)
    return manifest, resolve(BuildConfig(Path("bundle"), max_batch=max_batch), manifest)


@pytest.mark.parametrize("max_batch", FLOAT)
def test_what_floats_take_is_no_fault(max_batch: int):
    for recipe in (Recipe("fp16"), Recipe("int8"), Recipe("int4")):
        scratch = {"prefill": 1 << 30, "decode": FLOAT[max_batch]}
        assert check_decode_scratch(scratch, *case(recipe, max_batch)) == []


@pytest.mark.parametrize("more", [BLOCKED_INT8_HEAD - FLOAT[1], BLOCKED_INT8 - FLOAT[1]])
@pytest.mark.parametrize("max_batch", FLOAT)
def test_an_unpacked_weight_is_found(max_batch: int, more: int):
    scratch = {"decode": FLOAT[max_batch] + more}
    (problem,) = check_decode_scratch(scratch, *case(Recipe("int4"), max_batch))
    assert f"takes {scratch['decode']:,} bytes of scratch" in problem
    assert "lm_head unpacked takes 56,623,104: weights are unpacked in every step" in problem


def test_floats_cannot_be_unpacked():
    assert check_decode_scratch({"decode": 1 << 40}, *case(Recipe("fp16"), 1)) == []


def test_profiles_are_reported_in_their_order():
    manifest, shapes = case(Recipe("int4"), 1)
    profiles = make_profiles(manifest.model, "native", "fp16", shapes)
    log = [
        "info: Total Activation Memory: 9 bytes",
        "info: Max Scratch Memory: 7 bytes",
        "info: Max Scratch Memory: 5 bytes",
    ]
    assert scratch_by_profile(log, profiles) == {"prefill": 7, "decode": 5}
    assert scratch_by_profile(log[:2], profiles) == {}
    assert check_decode_scratch({}, manifest, shapes) == []


def test_the_compiler_says_it(tiny_bundles: Bundles):
    pytest.importorskip("tensorrt_rtx")
    bundle = tiny_bundles("qwen2", "native", "int4")
    report = check_bundle(BuildConfig(bundle, max_batch=4, max_prefill=64))
    assert report.passed
    assert list(report.scratch_bytes) == ["prefill", "decode", "batch"]
    assert report.scratch_bytes["prefill"] >= report.scratch_bytes["decode"] > 0
