"""A stand-in for ``tensorrt`` that keeps its documented rules and computes with ONNX Runtime.

An engine is the bundle's own graph; a run reads and writes the bound addresses of a `FakeGpu`, in
stream order. What TensorRT refuses is refused in its way (False, and an error in the log); what it
documents as undefined is a `RuleError`.
"""

from __future__ import annotations

import enum
import functools
import json
import types
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.backends.ort.session import session_options
from edge.bundle import io_spec
from edge.bundle.engine_file import (
    ENGINE_SCHEMA_VERSION,
    EngineInfo,
    Flavour,
    ProfileInfo,
    ShapeInfo,
)
from edge.bundle.engine_layers import parse_inspector
from edge.bundle.manifest import read_manifest
from engines.build_plan import BuildPlan, plan_build
from engines.config import BuildConfig
from engines.graph import graph_files, prepare_graph
from engines.store import EngineStore
from tests.fake_cuda import POISON, FakeGpu, RuleError, Work
from tests.fake_inspector import inspector_json, layer_names

ALIGNMENT = 256
_MAGIC = b"FAKE PLAN "
_NUMPY = {"fp16": np.float16, "bf16": np.uint16, "int64": np.int64}


class DataType(enum.Enum):
    FLOAT, HALF, BF16, INT8, INT32, INT64 = range(6)


class TensorLocation(enum.Enum):
    DEVICE, HOST = range(2)


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class LayerInformationFormat(enum.Enum):
    ONELINE, JSON = range(2)


class IProfiler:
    def report_layer_time(self, layer_name: str, ms: float) -> None:
        raise NotImplementedError


class ILogger:
    Severity = Severity

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError


_DTYPES = {"fp16": DataType.HALF, "bf16": DataType.BF16, "int64": DataType.INT64}


def fake_plan(build: BuildPlan, device_memory: int = 4096) -> bytes:
    """What a build leaves, for the stand-in to load."""
    shapes = build.shapes
    return (
        _MAGIC
        + json.dumps(
            {
                "bundle": str(build.config.bundle),
                "max_batch": shapes.max_batch,
                "max_prefill": shapes.max_prefill,
                "kv_capacity": shapes.capacity,
                "kv_buckets": list(build.config.kv_buckets),
                "kv_read": build.kv_read,
                "device_memory": device_memory,
            }
        ).encode()
    )


def write_engine(
    bundle: Path,
    *,
    name: str = "engine",
    version: str = "10.16.2.10",
    flavour: Flavour = "tensorrt",
    compute_capability: str = "8.7",
    device_memory: int = 4096,
    created: str = "2026-01-01",
    **options: Any,
) -> Path:
    """Put a stand-in engine into a bundle, with an ``engine.json`` as a build writes it.

    Args:
        bundle: its directory.
        name: of the engine's directory.
        version, flavour, compute_capability, created: as recorded.
        device_memory: bytes of activations.
        options: of `BuildConfig`.
    """
    manifest = read_manifest(bundle)
    config = BuildConfig(bundle=bundle, **options)
    build = plan_build(config, manifest)
    shapes, profiles = build.shapes, build.profiles
    plan = fake_plan(build, device_memory)

    def describe(plan_name: str, num_bytes: int, sha256: str) -> EngineInfo:
        return EngineInfo(
            schema_version=ENGINE_SCHEMA_VERSION,
            producer="edge-llm test",
            created=created,
            key=f"{name}-{sha256}",
            plan=plan_name,
            plan_bytes=num_bytes,
            plan_sha256=sha256,
            flavour=flavour,
            tensorrt_version=version,
            compute_capability=compute_capability,
            device=None,
            jetpack=None,
            l4t=None,
            sources={n: manifest.files[n].sha256 for n in graph_files(manifest)},
            max_batch=shapes.max_batch,
            max_prefill=shapes.max_prefill,
            kv_capacity=shapes.capacity,
            kv_buckets=shapes.kv_buckets,
            kv_read=build.kv_read,
            options={"max_batch": shapes.max_batch, "kv_capacity": shapes.capacity},
            profiles=tuple(
                ProfileInfo(
                    profile.name,
                    {n: ShapeInfo(r.min, r.opt, r.max) for n, r in profile.inputs.items()},
                )
                for profile in profiles
            ),
            builder="api",
            build_s=1.0,
            peak_memory_bytes=None,
            weights=(),
            layers=(),
        )

    names = [profile.name for profile in profiles]
    table = parse_inspector([inspector_json(manifest, profiles=range(len(names)))], names)
    store = EngineStore(bundle, name)
    store.add_layers(store.commit(plan, describe), table, None)
    return store.directory


@functools.cache
def _session(bundle: Path, prepared: bytes) -> Any:
    import onnxruntime as ort

    options = session_options(ort, bundle, read_manifest(bundle))
    options.intra_op_num_threads = 1
    return ort.InferenceSession(prepared, options, providers=["CPUExecutionProvider"])


class FakeEngine:
    """``ICudaEngine``."""

    _detailed = True  # built with details of its layers
    _per_context = False  # the inspector tells of later profiles only in a context

    def __init__(self, gpu: FakeGpu, logger: ILogger, plan: dict[str, Any]) -> None:
        self._gpu, self._logger = gpu, logger
        bundle = Path(plan["bundle"])
        self.manifest = manifest = read_manifest(bundle)
        config = BuildConfig(
            bundle=bundle,
            max_batch=plan["max_batch"],
            max_prefill=plan["max_prefill"],
            kv_capacity=plan["kv_capacity"],
            kv_buckets=tuple(plan["kv_buckets"]),
            kv_read=plan["kv_read"],
        )
        build = plan_build(config, manifest)
        shapes = build.shapes
        self.capacity = shapes.capacity
        self.profiles = build.profiles
        spec = (manifest.model, manifest.dialect, manifest.dtype, shapes.capacity)
        self.inputs = {t.name: t for t in io_spec.decoder_inputs(*spec)}
        self.outputs = {t.name: t for t in io_spec.decoder_outputs(*spec)}
        graph = (bundle / manifest.graphs.decoder).read_bytes()
        self.session = _session(bundle, prepare_graph(graph, shapes, build.kv_read))
        self.device_memory_size_v2 = plan["device_memory"]
        self.num_optimization_profiles = len(self.profiles)
        gpu.born("engine")

    def __del__(self) -> None:
        if "device_memory_size_v2" in self.__dict__:
            self._gpu.dead("engine")

    @property
    def num_io_tensors(self) -> int:
        return len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_dtype(self, name: str) -> DataType:
        return _DTYPES[{**self.inputs, **self.outputs}[name].dtype]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return name.replace("present.", "past_key_values.") if "present." in name else None

    def create_engine_inspector(self) -> FakeInspector:
        return FakeInspector(self)

    def create_execution_context(
        self,
        strategy: ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy.STATIC,
    ) -> FakeContext | None:
        if strategy is not ExecutionContextAllocationStrategy.USER_MANAGED:
            raise RuleError("every context would allocate its own activations")
        if self._gpu.code("create_execution_context"):
            self._logger.log(Severity.ERROR, "createExecutionContext: out of memory")
            return None
        return FakeContext(self._gpu, self, self._logger)


class FakeInspector:
    """``IEngineInspector``."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self.execution_context: FakeContext | None = None

    def get_engine_information(self, format: LayerInformationFormat) -> str:
        assert format is LayerInformationFormat.JSON
        context, profiles = self.execution_context, range(self._engine.num_optimization_profiles)
        if context is not None:
            profiles = range(context._profile or 0, (context._profile or 0) + 1)
        elif self._engine._per_context:
            profiles = range(1)
        manifest, detailed = self._engine.manifest, self._engine._detailed
        return inspector_json(manifest, detailed=detailed, profiles=profiles)


class FakeContext:
    """``IExecutionContext``."""

    profiler: IProfiler | None = None

    def __init__(self, gpu: FakeGpu, engine: FakeEngine, logger: ILogger) -> None:
        self._gpu, self._engine, self._logger = gpu, engine, logger
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory: tuple[int, int] | None = None
        self.version = 0  # of shapes, addresses and profile
        self._flushed = -1  # the version that last ran outside of a capture
        self._last_work: Work | None = None
        gpu.born("execution context")

    def __del__(self) -> None:
        if "_last_work" not in self.__dict__:
            return
        queued = (work for stream in self._gpu.streams.values() for work in stream.pending)
        if any(work is self._last_work for work in queued):
            # An exception would be swallowed here.
            self._gpu.broken.append("an execution context was destroyed before its run")
        self._gpu.dead("execution context")

    def _changes(self, what: str) -> bool:
        if any(stream.capturing is not None for stream in self._gpu.streams.values()):
            raise RuleError(f"{what} inside a capture")
        self.version += 1
        return not self._gpu.code(what) or self._refuse(f"{what}: internal error")

    def _refuse(self, message: str) -> bool:
        self._logger.log(Severity.ERROR, message)
        return False

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not self._changes("set_optimization_profile_async"):
            return False
        if not 0 <= profile_index < self._engine.num_optimization_profiles:
            return self._refuse(f"profile {profile_index} does not exist")
        self._profile = profile_index
        self._shapes.clear()
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        self._changes("set_device_memory")
        if memory % ALIGNMENT or size < self._engine.device_memory_size_v2:
            raise RuleError(f"{size} bytes of activations at {memory:#x}")
        self._memory = memory, size

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if not self._changes("set_input_shape"):
            return False
        if self._profile is None or name not in self._engine.inputs:
            return self._refuse(f"setInputShape: {name} in profile {self._profile}")
        limits = self._engine.profiles[self._profile].inputs[name]
        inside = len(shape) == len(limits.min) and all(
            low <= size <= high
            for low, size, high in zip(limits.min, shape, limits.max, strict=True)
        )
        if not inside:
            return self._refuse(
                f"setInputShape: {name} {shape} is not within {limits.min} and {limits.max}"
            )
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if not self._changes("set_tensor_address"):
            return False
        if name not in self._engine.inputs and name not in self._engine.outputs:
            return self._refuse(f"setTensorAddress: no tensor {name}")
        if memory % ALIGNMENT:
            return self._refuse(f"setTensorAddress: {name} is not aligned to {ALIGNMENT} bytes")
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        gpu, engine = self._gpu, self._engine
        if stream_handle not in gpu.streams:
            raise RuleError(f"{stream_handle} is no stream")
        if gpu.code("execute_async_v3"):
            return self._refuse("enqueueV3: internal error")
        if self._memory is None:
            return self._refuse("enqueueV3: the context has no device memory")
        for name in [*engine.inputs, *engine.outputs]:
            if not self._addresses.get(name):
                return self._refuse(f"enqueueV3: the address of {name} is not set")
        missing = [name for name in engine.inputs if name not in self._shapes]
        if missing:
            return self._refuse(f"enqueueV3: the shape of {missing[0]} is not set")
        capturing = gpu.streams[stream_handle].capturing is not None
        if capturing and self._flushed != self.version:
            raise RuleError("captured without a run in advance after a change of shapes")
        work = self._make_work()
        gpu.put(stream_handle, work)
        self._last_work = work
        if not capturing:
            self._flushed = self.version
        if self.profiler is not None:
            if capturing:
                raise RuleError("a profiler waits for the run, which a capture cannot")
            gpu.streams[stream_handle].synchronize()
            for place, name in enumerate(layer_names(engine.manifest, self._profile or 0)):
                self.profiler.report_layer_time(name, 0.001 * (place + 1))
        return True

    def _dimensions(self) -> dict[str, int]:
        """The symbols of `io_spec` by value; inputs must agree."""
        found: dict[str, int] = {}
        for name, spec in self._engine.inputs.items():
            for symbol, size in zip(spec.shape, self._shapes[name], strict=True):
                if isinstance(symbol, str) and found.setdefault(symbol, size) != size:
                    raise RuleError(f"{name} has {size} of {symbol}, others {found[symbol]}")
        return found

    def _make_work(self) -> Work:
        engine, gpu = self._engine, self._gpu
        sizes = self._dimensions()
        views: dict[str, NDArray[Any]] = {}
        for spec in [*engine.inputs.values(), *engine.outputs.values()]:
            shape = tuple(sizes[d] if isinstance(d, str) else d for d in spec.shape)
            dtype = np.dtype(_NUMPY[spec.dtype])
            num_bytes = int(np.prod(shape)) * dtype.itemsize
            memory = gpu.memory(self._addresses[spec.name], num_bytes)
            views[spec.name] = memory.view(dtype).reshape(shape)
            alias = engine.get_aliased_input_tensor(spec.name)
            if alias and self._addresses[alias] != self._addresses[spec.name]:
                raise RuleError(f"{spec.name} is not at the address of {alias}")
        assert self._memory is not None
        scratch = gpu.memory(*self._memory)
        plain = [
            views[name] for name in engine.outputs if not engine.get_aliased_input_tensor(name)
        ]
        version, owner = self.version, weakref.ref(self)  # a stream keeps no context alive

        def poison() -> None:
            for view in plain:
                view.view(np.uint8)[...] = POISON

        def valid() -> None:
            context = owner()
            if context is None:
                raise RuleError("the context of a graph is destroyed")
            if context.version != version:
                raise RuleError("the context of a graph was changed after the capture")

        def run() -> None:
            scratch.fill(0xAB)
            _compute(engine, views, sizes)

        return Work(run, poison, valid)


def _compute(engine: FakeEngine, views: dict[str, NDArray[Any]], sizes: dict[str, int]) -> None:
    inputs = {name: views[name] for name in engine.inputs}
    if io_spec.WRITE_INDICES in inputs:
        last = inputs[io_spec.WRITE_INDICES] + sizes[io_spec.SEQ]
        if inputs[io_spec.WRITE_INDICES].min() < 0 or last.max() > engine.capacity:
            raise RuleError(f"rows up to {last.max()} of {engine.capacity} are written")
    elif inputs[io_spec.PAST_LENGTHS].max() > sizes[io_spec.KV]:
        raise RuleError("more rows are valid than are read")
    if not np.array_equal(inputs[io_spec.KV_POSITIONS], np.arange(sizes[io_spec.KV])):
        raise RuleError("kv_positions are not 0, 1, 2, ...")
    if inputs[io_spec.POSITION_IDS].max() >= max(engine.capacity, sizes[io_spec.KV]):
        raise RuleError("a position lies outside of the cache")
    copies = {name: np.array(array) for name, array in inputs.items()}
    results = engine.session.run(list(engine.outputs), copies)
    for name, result in zip(engine.outputs, results, strict=True):
        views[name][...] = result


def make_module(gpu: FakeGpu, version: str = "10.16.2.10", name: str = "tensorrt") -> Any:
    """The module ``tensorrt``, for ``sys.modules``."""
    module: Any = types.ModuleType(name)
    module.__version__ = version
    module.ILogger, module.DataType = ILogger, DataType
    module.TensorLocation = TensorLocation
    module.ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
    module.LayerInformationFormat, module.IProfiler = LayerInformationFormat, IProfiler
    module.ICudaEngine, module.IExecutionContext = FakeEngine, FakeContext

    class Runtime:
        def __init__(self, logger: ILogger) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, serialized_engine: Any) -> FakeEngine | None:
            data = bytes(memoryview(serialized_engine))
            if not data.startswith(_MAGIC):
                raise RuleError("TensorRT was given something that is no plan")
            if gpu.code("deserialize_cuda_engine"):
                self._logger.log(Severity.ERROR, "deserializeCudaEngine: internal error")
                return None
            return FakeEngine(gpu, self._logger, json.loads(data[len(_MAGIC) :]))

    module.Runtime = Runtime
    return module
