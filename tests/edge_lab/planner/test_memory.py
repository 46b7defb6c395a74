"""The planner's memory: exact where it can be, close to a process where it cannot."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge.adapters.graph_inputs import adapted_linears, slot_values
from edge.backends.ort.cpu import OrtBackend
from edge.backends.tensorrt import device_memory
from edge.bundle import io_spec
from edge.bundle.engine_file import read_engine_info
from edge.bundle.manifest import Dialect, Manifest, read_manifest
from edge.bundle.sizes import CAPTURE_BYTES
from edge.bundle.weights import manifest_linears
from edge_lab.planner.memory import (
    BackendKind,
    Deployment,
    ProcessMemory,
    cache_bytes,
    io_bytes,
    plan_bundle_memory,
    plan_process_memory,
    plan_process_pair,
)
from edge_lab.planner.models import BUILT_IN
from edge_make.recipe import find_variant, recipe_linears
from tests.conftest import Bundles, require_kernels
from tests.standins.tensorrt import write_engine


def plan_of(manifest: Manifest, deployment: Deployment) -> ProcessMemory:
    linears = manifest_linears(manifest)
    return plan_process_memory(manifest.model, linears, manifest.rope_positions, deployment)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("backend", ["tensorrt", "ort-cpu"])
def test_the_cache_is_exact(batch: int, backend: BackendKind):
    model = BUILT_IN["deepseek-r1:1.5b"].spec
    per_token = 28 * 2 * 2 * 128 * (2 if backend == "tensorrt" else 4)
    # Beside several slots an engine has one in which prompts are read.
    slots = batch + (backend == "tensorrt" and batch > 1)
    assert cache_bytes(model, Deployment(backend, batch, 1000)) == slots * 1000 * per_token


def test_the_cache_is_what_the_backend_allocates(tiny_bundles: Bundles):
    bundle = tiny_bundles("qwen3")
    manifest = read_manifest(bundle)
    backend = OrtBackend(bundle, manifest, num_slots=3, kv_capacity=96)
    try:
        deployment = Deployment("ort-cpu", batch=3, kv_capacity=96)
        assert plan_of(manifest, deployment).cache == backend.cache_bytes
    finally:
        backend.close()


def test_the_engine_holds_the_bundles_weights(tiny_bundles: Bundles):
    """All tensors of the data file, whose only other bytes are the padding between them."""
    bundle = tiny_bundles("llama", quant="int4")
    manifest = read_manifest(bundle)
    data = manifest.files[f"{manifest.graphs.decoder}.data"].num_bytes
    weights = plan_of(manifest, Deployment()).weights_bytes
    num_tensors = 2 * len(manifest.quantization.linears) + 2 * manifest.model.num_layers + 3
    assert 0 <= data - weights < 4096 * num_tensors


@pytest.mark.parametrize("dialect", ["native", "portable"])
@pytest.mark.parametrize("batch", [1, 4])
def test_the_engines_parts_are_those_that_the_tensorrt_backend_allocates(
    batch: int, dialect: Dialect, tiny_bundles: Bundles, tmp_path: Path
):
    """From dimensions alone what `edge.backends.tensorrt.device_memory` plans from an engine."""
    bundle = shutil.copytree(tiny_bundles("qwen2"), tmp_path / "bundle")
    engine = write_engine(bundle, max_batch=batch, max_prefill=64)
    info = msgspec.structs.replace(read_engine_info(engine), kv_capacity=4096)
    model = BUILT_IN["deepseek-r1:1.5b"].spec
    manifest = msgspec.structs.replace(read_manifest(bundle), model=model, dialect=dialect)
    theirs = device_memory.plan_engine_memory(info, manifest)
    ours = plan_process_memory(
        model,
        recipe_linears(model, find_variant("int4")),
        4096,
        Deployment(batch=batch, dialect=dialect, max_prefill=64),
    )
    assert ours.cache == theirs.cache_bytes
    assert ours.activations == theirs.activations_bytes
    assert ours.pinned == pytest.approx(theirs.pinned_bytes, rel=0.001)  # they align
    assert ours.io == pytest.approx(theirs.io_bytes, rel=0.001)


def test_parts_add_up():
    model = BUILT_IN["deepseek-r1:8b-0528"].spec
    linears = recipe_linears(model, find_variant("int4"))
    plan = plan_process_memory(model, linears, io_spec.rope_positions(model), Deployment(batch=4))
    values = plan.as_dict()
    parts = (
        *("weights_bytes", "cache_bytes", "activations_bytes", "io_bytes", "pinned_bytes"),
        *("graphs_max_bytes", "plan_extra_bytes"),
    )
    around = ("embeddings_bytes", "runtime_bytes", "python_bytes", "tokenizer_bytes")
    assert plan.device_bytes == sum(values[name] for name in parts)  # type: ignore[misc]
    assert plan.process_bytes == plan.device_bytes + sum(values[name] for name in around)  # type: ignore[misc]
    assert plan.load_peak >= plan.process_bytes


def test_captured_graphs_count_at_their_bound_on_a_gpu_alone():
    model = BUILT_IN["deepseek-r1:1.5b"].spec
    linears = recipe_linears(model, find_variant("int4"))
    on_gpu, on_cpu = (
        plan_process_memory(model, linears, 4096, Deployment(backend))
        for backend in ("tensorrt", "ort-cpu")
    )
    assert (on_gpu.graphs, on_cpu.graphs) == (CAPTURE_BYTES, 0)
    without = replace(on_gpu, graphs=0)
    assert on_gpu.process_bytes - without.process_bytes == CAPTURE_BYTES
    assert plan_process_pair(on_gpu, on_gpu).graphs == 2 * CAPTURE_BYTES


def test_portable_attention_needs_its_scores():
    model = BUILT_IN["deepseek-r1:7b"].spec
    linears = recipe_linears(model, find_variant("int4"))
    native, portable = (
        plan_process_memory(model, linears, 4096, Deployment(dialect=dialect)).activations
        for dialect in ("native", "portable")
    )
    assert portable - native == 2 * 2 * 512 * model.attentions()[0].heads * (4096 + 512)


@pytest.mark.parametrize("quant", ["fp16", "int8", "int4", "int4-g128"])
def test_integers_take_less_than_floats_on_the_cpu(quant: str):
    model = BUILT_IN["deepseek-r1:1.5b"].spec
    linears = recipe_linears(model, find_variant(quant))
    on_cpu = plan_process_memory(model, linears, 4096, Deployment("ort-cpu")).weights_bytes
    on_gpu = plan_process_memory(model, linears, 4096, Deployment()).weights_bytes
    # Scales are held in three fp32 copies; INT4 has four times as many.
    factor = {"fp16": 2.0, "int8": 1.16, "int4": 1.46, "int4-g128": 1.16}[quant]
    assert on_cpu / on_gpu == pytest.approx(factor, abs=0.03)


@pytest.mark.slow
def test_a_process_takes_what_was_planned(smollm2_bundle: Path):
    """SmolLM2 in fp16 with a full cache, in a process of its own: within 10 %."""
    require_kernels("native")  # what the plan was fitted to; 1.23 takes 130 MB less
    manifest = read_manifest(smollm2_bundle)
    command = [sys.executable, "-m", "edge.cli", "bench", str(smollm2_bundle), "--json"]
    command += ["--prompt-tokens", "1000", "--output-tokens", "8", "--repeats", "1"]
    command += ["--warmup", "0"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    measured = json.loads(done.stdout)["memory"]
    plan = plan_of(manifest, Deployment("ort-cpu", kv_capacity=1024))
    # The benchmark has no tokenizer.
    assert plan.process_bytes - plan.tokenizer == pytest.approx(measured["run_peak_bytes"], rel=0.1)
    assert plan.load_peak - plan.tokenizer == pytest.approx(measured["load_peak_bytes"], rel=0.15)


@pytest.mark.parametrize("backend", ["tensorrt", "ort-cpu"])
def test_an_8_bit_cache_is_a_half_or_a_quarter(backend: BackendKind):
    model = BUILT_IN["deepseek-r1:1.5b"].spec
    plain = Deployment(backend, 2, 256, 32, "portable")
    whole = replace(plain, int8_layers="all")
    share = 2 if backend == "tensorrt" else 4
    assert cache_bytes(model, plain) == share * cache_bytes(model, whole)
    assert sum(io_bytes(model, plain)) > sum(io_bytes(model, whole))
    # A layer that stays in float takes what it took.
    mixed = replace(plain, int8_layers=tuple(range(1, model.num_layers)))
    layer = cache_bytes(model, plain) // model.num_layers
    assert cache_bytes(model, mixed) == layer + (model.num_layers - 1) * layer // share


def test_the_8_bit_cache_is_what_the_backend_allocates(tiny_bundles: Bundles):
    bundle = tiny_bundles("qwen3", "portable", kv_cache="int8")
    manifest = read_manifest(bundle)
    backend = OrtBackend(bundle, manifest, num_slots=3, kv_capacity=96)
    try:
        layers = manifest.int8_layers
        deployment = Deployment("ort-cpu", 3, 96, dialect="portable", int8_layers=layers)
        assert plan_of(manifest, deployment).cache == backend.cache_bytes
    finally:
        backend.close()


@pytest.mark.parametrize("batch", [1, 4])
def test_the_engines_parts_with_an_8_bit_cache(batch: int, tiny_bundles: Bundles, tmp_path: Path):
    plain = tiny_bundles("qwen2", "portable", kv_cache="int8")
    bundle = shutil.copytree(plain, tmp_path / "bundle")
    engine = write_engine(bundle, max_batch=batch, max_prefill=64)
    info = msgspec.structs.replace(read_engine_info(engine), kv_capacity=4096)
    model, found = BUILT_IN["deepseek-r1:1.5b"].spec, read_manifest(bundle)
    assert found.kv_cache is not None
    errors = (0.1,) * model.num_layers
    kv_cache = msgspec.structs.replace(found.kv_cache, score_errors=errors, float_layers=(0, 27))
    manifest = msgspec.structs.replace(found, model=model, kv_cache=kv_cache)
    theirs = device_memory.plan_engine_memory(info, manifest)
    layers = manifest.int8_layers
    assert len(layers) == 26
    linears = recipe_linears(model, find_variant("int4"))
    deployment = Deployment("tensorrt", batch, 4096, 64, "portable", layers)
    ours = plan_process_memory(model, linears, 4096, deployment)
    assert ours.cache == theirs.cache_bytes
    assert ours.io == pytest.approx(theirs.io_bytes, rel=0.001)


@pytest.mark.parametrize(
    ("backend", "element_bytes", "slots"), [("ort-cpu", 4, 3), ("tensorrt", 2, 4)]
)
def test_adapters_of_all_slots_are_counted(
    backend: Any, element_bytes: int, slots: int, tiny_bundles: Bundles
):
    manifest = read_manifest(tiny_bundles("qwen2"))
    sizes = {"rank": 4, "linears": [each.name for each in adapted_linears(manifest.model)]}
    adapted = msgspec.structs.replace(manifest, extras={**manifest.extras, "adapters": sizes})
    deployment = Deployment(backend, 3, 64, 32, manifest.dialect)
    before, after = (plan_bundle_memory(each, deployment) for each in (manifest, adapted))
    expected = slots * element_bytes * slot_values(manifest.model, 4)
    assert after.process_bytes - before.process_bytes == expected
    assert after.load_peak - before.load_peak == expected
