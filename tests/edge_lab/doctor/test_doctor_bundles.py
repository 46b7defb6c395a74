"""What doctor says of a bundle: its memory, files and engines."""

from __future__ import annotations

import hashlib
import math
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge.bundle.engine_file import EngineInfo
from edge.bundle.engine_records import RECORDS_VARIABLE
from edge.bundle.manifest import FileInfo, LinearInfo, Quantization, read_manifest
from edge.bundle.trust import KEYS_VARIABLE
from edge_lab.doctor import exit_code, run_checks
from edge_lab.doctor.check import MachineFacts
from edge_lab.doctor.machine import Library
from edge_lab.doctor.software import check_memory
from edge_lab.planner.models import BUILT_IN
from edge_make.engine_record import record_engine
from edge_make.recipe import Recipe, recipe_linears
from tests.conftest import Bundles
from tests.edge.device import jetson_trees as trees
from tests.edge_lab.doctor.fake_machine import CPU, MISSING, FakeMachine, cuda, find, statuses
from tests.makers.keys import make_key
from tests.makers.manifests import make_manifest


def test_memory(orin: FakeMachine, tiny_bundles: Bundles):
    bundle = tiny_bundles("qwen2", "portable")
    orin.memory = 100 << 20
    checks = run_checks(orin, bundle)
    assert find(checks, "memory").status == "fail"
    assert "fewer bits" in find(checks, "memory").cure
    assert exit_code(checks) == 71
    assert find(run_checks(orin), "memory").status == "ok"  # nothing to hold it against
    (orin.root / "proc/meminfo").unlink()
    orin.memory = None
    assert find(run_checks(orin), "memory").status == "warn"


def test_the_cpu_needs_more_than_a_gpu(laptop: FakeMachine, orin: FakeMachine):
    """Of a float model twice as much: ONNX Runtime on the CPU computes in fp32."""
    model = BUILT_IN["deepseek-r1:7b"].spec
    linears = {
        linear.name: LinearInfo(linear.scheme, linear.shape, 2 * math.prod(linear.shape))
        for linear in recipe_linears(model, Recipe("fp16"))
    }
    stored = sum(linear.num_bytes for linear in linears.values())
    manifest = make_manifest(
        model=model,
        kv_capacity=32768,
        rope_positions=32768,
        quantization=Quantization(name="fp16", method="rtn", clip="mse", linears=linears),
        files={"decoder.onnx.data": FileInfo(stored, "0" * 64)},
    )
    statuses = {
        (name, gigabytes): check_memory(ask(machine, gigabytes), manifest).status
        for name, machine in (("laptop", laptop), ("orin", orin))
        for gigabytes in (14, 20, 32)  # a cache of 32,768 tokens would take 3.8 of fp32 more
    }
    assert statuses == {
        ("laptop", 14): "fail",
        ("laptop", 20): "fail",
        ("laptop", 32): "ok",
        ("orin", 14): "fail",
        ("orin", 20): "ok",
        ("orin", 32): "ok",
    }


def ask(machine: FakeMachine, gigabytes: int) -> MachineFacts:
    machine.memory = gigabytes * 10**9
    return MachineFacts(machine, machine.snapshot(), machine.nodes(), machine.cuda(), False)


@pytest.mark.parametrize(
    ("l4t", "total_gb", "free_mb", "status"),
    [
        ("36.4.7", 8, 100, "warn"),
        ("36.5.0", 8, 100, "warn"),
        ("36.4.7", 8, 600, "ok"),  # it is free at once
        ("36.4.4", 8, 100, "ok"),
        ("39.2.0", 8, 100, "ok"),
        ("36.4.7", 64, 100, "ok"),
        (None, 8, 100, "ok"),
    ],
)
def test_a_block_that_is_reported_to_be_refused_is_a_warning(
    l4t: str | None, total_gb: int, free_mb: int, status: str, orin: FakeMachine
):
    (orin.root / "proc/meminfo").write_text(
        f"MemTotal: {total_gb << 20} kB\nMemFree: {(free_mb + 200) * 1000000 // 1024} kB\n"
        "MemAvailable: 7000000 kB\nCmaTotal: 262144 kB\nCmaFree: 195313 kB\n"
    )
    model = BUILT_IN["deepseek-r1:1.5b"].spec
    head = LinearInfo(recipe_linears(model, Recipe("int8"))[-1].scheme, (151936, 1536), 233_373_696)
    manifest = make_manifest(
        model=model,
        quantization=Quantization(name="int8", method="rtn", clip="mse", linears={"lm_head": head}),
        files={"decoder.onnx.data": FileInfo(10**9, "0" * 64)},
    )
    snapshot = msgspec.structs.replace(orin.snapshot(), l4t=l4t, memory_room_bytes=7 * 10**9)
    facts = MachineFacts(orin, snapshot, orin.nodes(), orin.cuda(), False)
    found = check_memory(facts, manifest)
    assert found.status == status
    at_once = f"{free_mb / 1e3:.1f} of them without giving up page cache"
    assert f"GB free, {at_once}, CMA 200 of 268 MB free" in found.detail
    if status == "warn":
        assert "the largest block, of 233 MB" in found.cause
        assert "drop_caches" in found.cure


def test_an_engine_needs_its_own_capacity(orin: FakeMachine, bundle: Path):
    long = 10**6  # of 256 bytes each
    orin.memory = 500 << 20
    add_engine(bundle, "short")
    found = find(run_checks(orin, bundle), "memory")
    assert found.status == "ok"
    assert found.detail.endswith(" GB for one sequence")
    add_engine(bundle, "long", kv_capacity=long)
    found = find(run_checks(orin, bundle), "memory")
    assert found.status == "fail"
    assert f"KV cache of {long} tokens" in found.cause
    assert "--kv-capacity" in found.cure


def test_a_gpu_with_its_own_memory_is_asked_for_that(laptop: FakeMachine, tiny_bundles: Bundles):
    bundle = tiny_bundles("qwen2", "portable")
    cuda(memory_free_bytes=1 << 20, integrated=False)(laptop)
    assert find(run_checks(laptop, bundle), "memory").status == "fail"


def test_a_full_page_cache_takes_no_memory_from_a_gpu_that_shares_it(laptop: FakeMachine):
    """Also where nothing but the driver tells that it does."""
    cuda(memory_free_bytes=600 << 20)(laptop)
    laptop.memory = 52 * 10**9
    assert find(run_checks(laptop), "memory").detail == "52.0 GB free"


def test_a_damaged_bundle(laptop: FakeMachine, tiny_bundles: Bundles, tmp_path: Path):
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundles("qwen2", "portable"), bundle)
    assert find(run_checks(laptop, bundle), "bundle").status == "ok"
    data = bytearray((bundle / "tokenizer.json").read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / "tokenizer.json").write_bytes(data)
    checks = run_checks(laptop, bundle)
    assert find(checks, "bundle").status == "fail"
    assert "tokenizer.json" in find(checks, "bundle").cause
    assert exit_code(checks) == 65
    assert "engines" not in statuses(checks)  # nothing of it was parsed
    (bundle / "manifest.json").unlink()
    assert exit_code(run_checks(laptop, bundle)) == 65


def test_a_bundle_that_this_onnxruntime_cannot_run(laptop: FakeMachine, tiny_bundles: Bundles):
    laptop.onnxruntime_answers = {CPU: Library(version="1.23.2", providers=(CPU,))}
    found = find(run_checks(laptop, tiny_bundles("qwen2", "native")), "bundle")
    assert found.status == "warn"
    assert "needs ONNX Runtime 1.26, found 1.23.2" in found.cause
    found = find(run_checks(laptop, tiny_bundles("qwen2", "portable")), "bundle")
    assert found.status == "ok"


def add_engine(bundle: Path, name: str, **changes: Any) -> Path:
    """An engine directory with a plan of eight bytes."""
    manifest = read_manifest(bundle)
    plan = b"not real"
    info = EngineInfo(
        schema_version=1,
        producer="test",
        created="2026-01-01T00:00:00Z",
        key="0" * 64,
        plan="engine.plan",
        plan_bytes=len(plan),
        plan_sha256=hashlib.sha256(plan).hexdigest(),
        flavour="tensorrt",
        tensorrt_version="10.3.0.26",
        compute_capability="8.7",
        device="Orin",
        jetpack="6.2",
        l4t="36.4.3",
        sources={"decoder.onnx": manifest.files["decoder.onnx"].sha256},
        max_batch=1,
        max_prefill=64,
        kv_capacity=128,
        kv_buckets=(128,),
        kv_read="slice",
        options={"max_batch": 1},
        profiles=(),
        builder="api",
        build_s=1.0,
        peak_memory_bytes=None,
        weights=(),
        layers=(),
    )
    info = msgspec.structs.replace(info, **changes)
    directory = bundle / "engines" / name
    trees.write_tree(directory, {"engine.plan": plan, "engine.json": msgspec.json.encode(info)})
    return directory


@pytest.fixture
def bundle(tmp_path: Path, tiny_bundles: Bundles) -> Path:
    target = tmp_path / "with engines"
    shutil.copytree(tiny_bundles("qwen2", "portable"), target)
    return target


def test_engines_against_this_machine(orin: FakeMachine, laptop: FakeMachine, bundle: Path):
    assert find(run_checks(orin, bundle), "engines").status == "warn"  # none there
    add_engine(bundle, "other-trt", tensorrt_version="10.16.2.10")
    checks = run_checks(orin, bundle)
    found = find(checks, "engines")
    assert found.status == "fail"
    assert "another TensorRT (tensorrt 10.16.2.10, here tensorrt 10.3.0)" in found.cause
    assert "edge-llm build" in found.cause
    assert exit_code(checks) == 78
    add_engine(bundle, "other-gpu", compute_capability="8.6")
    assert exit_code(run_checks(orin, bundle)) == 78
    add_engine(bundle, "right")
    found = find(run_checks(orin, bundle), "engines")
    assert (found.status, found.detail) == ("ok", "right fits (2 others do not)")
    # Without a GPU engines of another machine are no fault.
    found = find(run_checks(laptop, bundle), "engines")
    assert (found.status, found.exit_code) == ("skip", 0)


def test_schemes_are_probed_at_the_bundles_own_widths(orin: FakeMachine, bundle: Path):
    run_checks(orin, bundle)
    shapes = [
        linear.shape
        for name, linear in read_manifest(bundle).quantization.linears.items()
        if name != "lm_head"
    ]
    depth, columns = max(shapes, key=lambda shape: shape[0] * shape[1])
    assert f"schemes of {depth} x {columns}" in orin.asked


def test_an_engine_that_is_slow_is_told_with_what_to_do(orin: FakeMachine, bundle: Path):
    decode = {"profile": "decode", "layers": 9, "fused": 1, "reformats": 3, "unpacking": 28}
    slow = {**decode, "products": {}, "attention": "decomposed", "cache_copies": 2}
    add_engine(bundle, "right", compiled=[slow])
    checks = run_checks(orin, bundle)
    found = find(checks, "engines")
    assert (found.status, found.exit_code, exit_code(checks)) == ("warn", 0, 0)
    assert "28 layers unpack their weights" in found.cause
    assert "2 layers copy the KV cache" in found.cause
    assert "--kernels auto" in found.cure


def test_an_engine_of_tensorrt_for_rtx_is_none_of_another_tensorrt(orin: FakeMachine, bundle: Path):
    """Its own library loads it, beside TensorRT too."""
    rtx = {"flavour": "tensorrt-rtx", "tensorrt_version": "1.6.1.50"}
    add_engine(bundle, "rtx", **rtx)
    checks = run_checks(orin, bundle)
    found = find(checks, "engines")
    apart = "1 of TensorRT for RTX not compared"
    assert (found.status, found.detail) == ("skip", f"{apart} (0 others do not fit)")
    assert exit_code(checks) == 0
    add_engine(bundle, "other-gpu", compute_capability="8.6")
    found = find(run_checks(orin, bundle), "engines")
    assert (found.status, found.detail) == ("skip", f"{apart} (1 others do not fit)")
    add_engine(bundle, "right")
    found = find(run_checks(orin, bundle), "engines")
    assert (found.status, found.detail) == ("ok", f"right fits (1 others do not); {apart}")
    (bundle / "engines/rtx/engine.plan").write_bytes(b"tampered")
    assert exit_code(run_checks(orin, bundle)) == 65


def test_own_kernels_that_python_launches_need_cuda_bindings(orin: FakeMachine, bundle: Path):
    add_engine(bundle, "own", plugins="python")
    assert find(run_checks(orin, bundle), "engines").status == "ok"
    orin.cuda_bindings_answer = MISSING
    found = find(run_checks(orin, bundle), "engines")
    assert found.status == "fail"
    assert "own has own kernels, which cuda-bindings launch for TensorRT < 10.13" in found.cause


def test_a_damaged_plan(orin: FakeMachine, laptop: FakeMachine, bundle: Path):
    (add_engine(bundle, "right") / "engine.plan").write_bytes(b"tampered")
    for machine in (orin, laptop):
        checks = run_checks(machine, bundle)
        assert "is damaged" in find(checks, "engines").cause
        assert exit_code(checks) == 65


def test_engines_that_nobody_vouches_for(
    orin: FakeMachine, laptop: FakeMachine, bundle: Path, monkeypatch: pytest.MonkeyPatch
):
    """They are passed over, as when the bundle is opened, and the doctor says so."""
    keys, records = bundle.parent / "trusted-keys", bundle.parent / "records"
    keys.write_text(make_key().public_text)
    keys.chmod(0o644)
    monkeypatch.setenv(KEYS_VARIABLE, str(keys))
    monkeypatch.setenv(RECORDS_VARIABLE, str(records))
    add_engine(bundle, "stranger", created="2099-01-01", kv_capacity=10**9)
    found = find(run_checks(orin, bundle), "engines")
    assert (found.status, found.exit_code) == ("fail", 78)
    assert "engines/stranger is passed over: nobody vouches for it" in found.cause
    assert find(run_checks(laptop, bundle), "engines").status == "warn"
    own = add_engine(bundle, "own") / "engine.json"
    record_engine(own, own.read_bytes())
    checks = run_checks(orin, bundle)
    found = find(checks, "engines")
    assert (found.status, found.detail) == (
        "warn",
        "own fits (0 others do not); 1 passed over, since nobody vouches for them",
    )
    assert "edge-llm bundle sign" in found.cause
    assert find(checks, "memory").status == "ok"  # the stranger's cache is not asked for
    keys.write_text("no key")
    found = find(run_checks(orin, bundle), "engines")
    assert (found.status, found.exit_code) == ("fail", 78)
    assert "is no public key" in found.cause
