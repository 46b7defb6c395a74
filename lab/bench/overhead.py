"""Measure the TensorRT runner's own time per decode step: the real runner on calls that do nothing.

Run it from the checkout; it needs no GPU and no TensorRT:

    python3 -m lab bench-overhead
    python3 -m lab bench-overhead --batch 4 --slots 0,2 --dialect portable

The shape is that of DeepSeek-R1-Distill-Qwen-1.5B: 28 layers, hidden size 1536, 151,936 logits.
The calls of PyCUDA, cuda-bindings and TensorRT are Python functions that return at once. So their
own cost (about a microsecond each) is not in the figure. The conversion of the logits to float32
is, and is printed separately, too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import numpy as np

from edge.backends.step import step_after
from edge.backends.tensorrt import engine as tensorrt_engine
from edge.backends.tensorrt import runner
from edge.backends.tensorrt.step_buffers import widen_fp16
from edge.bundle import io_spec
from edge.bundle.engine_file import EngineInfo, ProfileInfo, ShapeInfo
from edge.bundle.manifest import Manifest
from edge.bundle.sizes import StepLimits
from edge_make.engine_profiles import profile_limits
from tests.makers.manifests import make_manifest

CAPACITY, VOCAB = 4096, 151_936
BUCKETS = (256, 512, 1024, 2048, 4096)


class IdleContext:
    """An execution context that does nothing."""

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        return None

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        return True


class IdleEngine:
    """Stands in for `edge.backends.tensorrt.engine.Engine`, without a plan."""

    activations_bytes = 1 << 20
    listener = contextlib.nullcontext()

    def __init__(self, chosen: Any, manifest: Manifest) -> None:
        self.info = chosen.info
        spec = (manifest.model, manifest.dialect, manifest.dtype, chosen.info.kv_capacity)
        tensors = [*io_spec.decoder_inputs(*spec), *io_spec.decoder_outputs(*spec)]
        self.tensors = frozenset(tensor.name for tensor in tensors)

    def profile(self, name: str) -> int:
        return 0

    def create_context(self) -> IdleContext:
        return IdleContext()

    def last_error(self) -> str:
        return ""

    def close(self) -> None:
        return None


def idle_modules() -> dict[str, Any]:
    """Make PyCUDA and cuda-bindings without a GPU: addresses from a counter, calls that return."""
    driver: Any = types.ModuleType("pycuda.driver")
    driver.Error = driver.MemoryError = type("Error", (Exception,), {})
    driver.host_alloc_flags = types.SimpleNamespace(DEVICEMAP=2)
    driver.device_attribute = types.SimpleNamespace(INTEGRATED=0, MULTIPROCESSOR_COUNT=0)
    driver.init = lambda: None
    free = [1 << 40]

    class Block:
        def __init__(self, num_bytes: int) -> None:
            self._address = free[0]
            free[0] += -(-num_bytes // 4096) * 4096

        def __int__(self) -> int:
            return self._address

        def free(self) -> None:
            return None

    class Host:
        def __init__(self, count: int) -> None:
            self._array = np.zeros(count, np.uint8)

        @property
        def __array_interface__(self) -> dict[str, Any]:
            return self._array.__array_interface__

        def free(self) -> None:
            return None

    class Stream:
        handle = 1

        def synchronize(self) -> None:
            return None

    class Copy:
        def set_src_device(self, address: int) -> None:
            return None

        set_dst_device = set_src_device

        def __call__(self, stream: Any) -> None:
            return None

    class Context:
        def push(self) -> None:
            return None

        def pop(self) -> None:
            return None

    class Device:
        def __init__(self, ordinal: int) -> None:
            return None

        @staticmethod
        def count() -> int:
            return 1

        def name(self) -> str:
            return "none"

        def compute_capability(self) -> tuple[int, int]:
            return 8, 7

        def get_attribute(self, attribute: int) -> int:
            return 0

        def retain_primary_context(self) -> Context:
            return Context()

    def ignore(*_args: Any) -> None:
        return None

    driver.Device, driver.Stream, driver.Memcpy3D, driver.mem_alloc = Device, Stream, Copy, Block
    driver.pagelocked_empty = lambda shape, dtype, mem_flags=0: np.asarray(Host(shape))
    driver.mem_get_info = lambda: (1 << 40, 1 << 40)
    driver.memcpy_htod_async = driver.memcpy_dtoh_async = driver.memset_d8_async = ignore
    graphs: Any = types.ModuleType("cuda.bindings.driver")
    graphs.CUresult = types.SimpleNamespace(CUDA_SUCCESS=0)
    graphs.CUstreamCaptureMode = types.SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
    for name in ("Destroy", "ExecDestroy", "Upload", "Launch"):
        setattr(graphs, f"cuGraph{name}", lambda *_args: (0,))
    graphs.cuStreamBeginCapture = lambda *_args: (0,)
    graphs.cuDeviceGet = graphs.cuDevicePrimaryCtxSetFlags = lambda *_args: (0, 0)
    graphs.cuDevicePrimaryCtxGetState = lambda *_args: (0, 1, 1)
    graphs.cuStreamEndCapture = graphs.cuGraphInstantiate = lambda *_args: (0, 1)
    return {"pycuda.driver": driver, "cuda.bindings.driver": graphs}


def describe(limits: StepLimits) -> ProfileInfo:
    """Make a profile with these limits, as ``engine.json`` has it."""
    shapes = {
        io_spec.POSITION_IDS: (limits.batch, limits.seq),
        io_spec.LOGITS_INDICES: (limits.batch, limits.num_logits),
    }
    inputs = {name: ShapeInfo((1, 1), shape, shape) for name, shape in shapes.items()}
    return ProfileInfo(limits.profile, inputs)


def make_backend(batch: int, dialect: str, graphs: bool) -> runner.TensorRTBackend:
    """Make the runner, on an engine of the 1.5B shape that does nothing."""
    import msgspec

    sys.modules.update(idle_modules())
    base = make_manifest()
    model = msgspec.structs.replace(
        base.model, hidden_size=1536, num_layers=28, num_heads=12, num_kv_heads=2, head_dim=128,
        intermediate_size=8960, vocab_size=VOCAB,
    )  # fmt: skip
    manifest = msgspec.structs.replace(base, model=model, dialect=dialect, kv_capacity=CAPACITY)
    info = EngineInfo(
        schema_version=1, producer="", created="", key="", plan="p", plan_bytes=0, plan_sha256="",
        flavour="tensorrt", tensorrt_version="10.16.2", compute_capability="8.7", device=None,
        jetpack=None, l4t=None, sources={}, max_batch=batch, max_prefill=512, kv_capacity=CAPACITY,
        kv_buckets=BUCKETS, kv_read="slice", options={},
        profiles=tuple(map(describe, profile_limits(batch, 512))), builder="api", build_s=0,
        peak_memory_bytes=None, weights=(), layers=(),
    )  # fmt: skip
    chosen = tensorrt_engine.ChosenEngine(Path(), info, None)
    vars(runner).update(choose_engine=lambda *_args, **_options: chosen, Engine=IdleEngine)
    with tempfile.TemporaryDirectory() as nowhere:
        return runner.TensorRTBackend(Path(nowhere), manifest, use_cuda_graphs=graphs)


def measure(backend: runner.TensorRTBackend, slots: list[int], steps: int) -> dict[str, float]:
    """Return the medians of a step, of its logits' conversion, and of the rest, in milliseconds."""
    batch = len(slots)
    embeds = np.zeros((batch, 1, 1536), np.float16)
    indices = np.zeros((batch, 1), np.int64)
    half = np.zeros((batch, VOCAB), np.uint16)
    whole = np.zeros((batch, VOCAB), np.float32)
    steps_ms, conversions_ms = [], []
    for position in range(16 + steps):
        past = [position % CAPACITY // 2] * batch
        started = time.perf_counter()
        backend.forward(step_after(slots, past, embeds, indices))
        middle = time.perf_counter()
        widen_fp16(half.reshape(-1), whole.reshape(-1))
        ended = time.perf_counter()
        if position >= 16:
            steps_ms.append(1e3 * (middle - started))
            conversions_ms.append(1e3 * (ended - middle))
    step, conversion = statistics.median(steps_ms), statistics.median(conversions_ms)
    return {"step_ms": step, "conversion_ms": conversion, "python_ms": step - conversion}


def main() -> None:
    """Measure with and without CUDA graphs and print the medians."""
    parser = argparse.ArgumentParser(
        "python3 -m lab bench-overhead", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--batch", type=int, default=1, help="batch of the engine")
    parser.add_argument("--slots", default="0", help="slots of a step, such as 0,2")
    parser.add_argument("--dialect", choices=("native", "portable"), default="native")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    slots = [int(slot) for slot in options.slots.split(",")]
    results = {
        name: measure(make_backend(options.batch, options.dialect, graphs), slots, options.steps)
        for name, graphs in (("graphs", True), ("no graphs", False))
    }
    if options.json:
        print(json.dumps(results))
        return
    print(f"decode of slots {slots}, engine batch {options.batch}, {options.dialect}; median, ms")
    for name, result in results.items():
        print(
            f"  {name:>9}: step {result['step_ms']:.3f}, of it logits to float32 "
            f"{result['conversion_ms']:.3f}, the rest {result['python_ms']:.3f}"
        )


if __name__ == "__main__":
    main()
