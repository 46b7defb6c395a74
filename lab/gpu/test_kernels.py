"""``scripts/gpu-check kernels`` against a stand-in driver, which takes the real cubins."""

from __future__ import annotations

import functools
import json
import sys
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.backends.cuda import Device
from edge.backends.cuda.kernels import Kernel
from edge.errors import DeviceError
from engines.kernels import reference
from engines.kernels.launch import Tactic, w4_tactics
from engines.kernels.layout import unpack_weights
from engines.kernels.package import load_cubins
from tests.standins.cuda import DRIVERS, FakeGpu

from . import kernels as gpu_kernels

COPY = 1 << 12
JOIN, MERGE = "attention_join_rows1_width64", "top_k_merge_most256"
PRODUCTS = ("w4_gemv_rows2_planes2", "w4_gemm_planes2")


def view(gpu: FakeGpu, address: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    found: NDArray[Any] = gpu.memory(address, num_bytes).view(dtype).reshape(shape)
    return found


def run_product(
    tactic: Tactic, gpu: FakeGpu, grid: tuple[int, ...], values: tuple[int, ...]
) -> None:
    x, weights, scales, bias, rows, columns, depth, shift, has_bias, y = values
    assert grid == (-(-columns // tactic.columns), -(-rows // tactic.rows), 1)
    planes = unpack_weights(view(gpu, weights, (depth // 32, 2, columns, 4), np.int32))
    exact, _ = reference.w4_gemv(
        view(gpu, x, (rows, depth), np.float16),
        planes,
        view(gpu, scales, (depth // (32 << shift), columns), np.float16),
        view(gpu, bias, (columns,), np.float16) if has_bias else None,
    )
    view(gpu, y, (rows, columns), np.float16)[...] = exact


def run_attention(gpu: FakeGpu, grid: tuple[int, ...], values: tuple[int, ...]) -> None:
    """Leaves the whole result where the partial sums would be."""
    query, keys, cached, new_keys, new_cached, positions, *numbers, partial, _ = values
    groups, heads, tokens, capacity = numbers
    batch = grid[1] // groups
    assert grid[0] == -(-heads * tokens // 16)
    cache, new = (batch, groups, capacity, 64), (batch, groups, tokens, 64)
    whole = reference.attention(
        view(gpu, query, (batch, groups * heads, tokens, 64), np.float16),
        view(gpu, keys, cache, np.float16),
        view(gpu, cached, cache, np.float16),
        view(gpu, new_keys, new, np.float16),
        view(gpu, new_cached, new, np.float16),
        view(gpu, positions, (batch, tokens), np.int32),
    )
    view(gpu, partial, whole.shape, np.float32)[...] = whole


def run_join(gpu: FakeGpu, grid: tuple[int, ...], values: tuple[int, ...]) -> None:
    partial, _, _, _, rows, _, _, parts, output = values
    assert (grid[0], parts) == (rows, 64)
    shape = (rows, 64)
    view(gpu, output, shape, np.float16)[...] = view(gpu, partial, shape, np.float32)


def run_parts(gpu: FakeGpu, grid: tuple[int, ...], values: tuple[int, ...]) -> None:
    """Leaves the whole result where that of the parts would be."""
    logits, _, columns, keep, keys, stats = values
    assert grid == (2, 1, 1)
    best, places, rest = reference.top_k(view(gpu, logits, (1, columns), np.float16), keep)
    kept = view(gpu, keys, (2, keep), np.int32)
    kept[0], kept[1] = places[0], best[0].view(np.int16)
    view(gpu, stats, (1,), np.float32)[...] = rest


def run_merge(gpu: FakeGpu, grid: tuple[int, ...], values: tuple[int, ...]) -> None:
    keys, stats, parts, keep, best, places, rest = values
    assert (grid, parts) == ((1, 1, 1), 2)
    kept = view(gpu, keys, (2, keep), np.int32)
    view(gpu, places, (keep,), np.int32)[...] = kept[0]
    view(gpu, best, (keep,), np.int16)[...] = kept[1]
    view(gpu, rest, (1,), np.float32)[...] = view(gpu, stats, (1,), np.float32)


@pytest.fixture(params=DRIVERS)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake = FakeGpu(with_pycuda=request.param == "pycuda")
    for name, module in fake.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    fake.kernels = {
        **{tactic.variant.name: functools.partial(run_product, tactic) for tactic in w4_tactics(2)},
        "attention_parts_rows16_width64": run_attention,
        "attention_join_rows1_width64": run_join,
        "top_k_parts": run_parts,
        MERGE: run_merge,
    }
    monkeypatch.setattr(gpu_kernels, "_MOST_COPIES", 2)
    monkeypatch.setattr(gpu_kernels, "_RUNS", 2)
    monkeypatch.setattr(gpu_kernels, "_COPY_BYTES", COPY)
    return fake


def small_cases() -> list[gpu_kernels.Case]:
    return [
        gpu_kernels.product("product", 2, 70, 64, 32, 2, bias=True),
        gpu_kernels.product("many rows", 130, 70, 64, 32, 2),
        gpu_kernels.attention("attention", [20, 3], 1, 2, 3, 64, 130),
        gpu_kernels.logits("logits", 1, 5000, 200),
    ]


def test_each_kernel_is_compared_and_timed(gpu: FakeGpu, capsys: pytest.CaptureFixture[str]):
    assert gpu_kernels.main(["--json"], small_cases()) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["compute_capability"] == "8.7"
    assert [case["fault"] for case in report["cases"]] == [None] * 4
    # The stand-in's clock: half a millisecond for a round of all copies.
    assert report["cases"][0]["us"] == pytest.approx(500 / min(2, max(1, COPY // 4880)))
    assert [case["tflop_s"] > 0 for case in report["cases"]] == [False, True, False, False]
    assert report["copy_gb_s"] > 0
    assert not gpu.alive


@pytest.mark.parametrize("name", [*PRODUCTS, JOIN, MERGE])
@pytest.mark.parametrize("wrong", [np.float16(np.nan), np.float16(0.5)])
def test_a_kernel_that_computes_something_else_fails(
    gpu: FakeGpu, capsys: pytest.CaptureFixture[str], name: str, wrong: np.float16
):
    right = gpu.kernels[name]
    output = {**dict.fromkeys(PRODUCTS, 9), JOIN: 8, MERGE: 4}[name]

    def run(fake: FakeGpu, grid: tuple[int, ...], values: tuple[int, ...]) -> None:
        right(fake, grid, values)
        found = view(fake, values[output], (1,), np.float16)
        found[0] = found[0] + wrong

    gpu.kernels[name] = run
    assert gpu_kernels.main([], small_cases()) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("right") for line in lines) == 3
    assert not gpu.alive


def test_a_gpu_without_kernels_is_refused_and_told_why(
    gpu: FakeGpu, capsys: pytest.CaptureFixture[str]
):
    gpu.compute_capability = (7, 5)
    assert gpu_kernels.main([], small_cases()) == 1
    assert "8.7" in (said := capsys.readouterr().err)
    assert "this GPU has 7.5" in said


def test_whatever_call_fails_nothing_stays_behind(gpu: FakeGpu, capsys: pytest.CaptureFixture[str]):
    case = gpu_kernels.product("product", 1, 3, 32, 32, 2)
    assert gpu_kernels.main([], [case]) == 0
    calls = list(gpu.calls)
    firsts = {name: at for at, name in reversed(list(enumerate(calls)))}
    lasts = {name: at for at, name in enumerate(calls)}
    for at in sorted({*firsts.values(), *lasts.values()}):
        gpu.calls.clear()
        gpu.fail_at, gpu.fail_code = at, 2
        code = gpu_kernels.main([], [case])
        gpu.fail_at = None
        name = gpu.calls[at] if at < len(gpu.calls) else ""
        # What cuda-bindings' objects free on their own is logged, and is no error.
        # How threads wait is no reason not to run. A large block that is refused is made of pieces.
        harmless: tuple[str, ...] = ("cuStreamDestroy", "cuMemFree", "cuMemFreeHost")
        harmless += ("cuDevicePrimaryCtxGetState",)
        if "cuMemCreate" in gpu.calls:
            harmless = (*harmless, "cuMemAlloc")
        assert code == 1 or name in ("", *harmless), name
        assert not gpu.alive, name
        capsys.readouterr()


def test_a_cubin_of_another_gpu_is_refused(gpu: FakeGpu):
    cubin = load_cubins("9.0")["w4_gemv_rows1_planes1"]
    device = Device()
    with device.active(), pytest.raises(DeviceError, match=r"load a kernel: .*no kernel image"):
        Kernel(device, cubin.image, cubin.entry, threads=256, shared_bytes=0)
    ours = load_cubins("8.7")["w4_gemv_rows1_planes1"]
    with device.active(), pytest.raises(DeviceError, match=r"find a kernel: .*symbol not found"):
        Kernel(device, ours.image, "another", threads=256, shared_bytes=0)
    assert not gpu.alive


def test_every_kernel_that_is_compiled_is_among_the_cases():
    """Which shapes lead to which kernel; the cases themselves are large."""
    used = {
        launch.variant.name for case in gpu_kernels.make_cases() for launch in case.job.launches
    }
    assert used == set(load_cubins("8.7"))
