"""A stand-in for ``tensorrt`` that keeps its documented rules and computes with ONNX Runtime.

`builder` makes its engines; a run reads and writes the bound addresses of a `FakeGpu`, in
stream order. What TensorRT refuses is refused in its way (False, and an error in the log); what it
documents as undefined is a `RuleError`. Rules are of NvInferRuntime.h, alike from 10.3 to 11.1.

A test on it proves the order of calls, addresses, shapes and lifetimes. It proves nothing about
TensorRT's numbers, speed and memory: the numbers here are ONNX Runtime's, the sizes the product's
own estimates. No CPU computes BF16, so no engine of that type runs here. `tests/gpu` has what
needs a device.
"""

from __future__ import annotations

import enum
import functools
import gc
import json
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings, strategies
from numpy.typing import NDArray

from edge.bundle import io_spec
from edge.bundle.engine_file import (
    ENGINE_SCHEMA_VERSION,
    EngineInfo,
    Flavour,
    ProfileInfo,
    ShapeInfo,
)
from edge.bundle.manifest import Manifest, read_manifest
from edge.bundle.onnx_file import OnnxFile
from edge_make.engine_layers import parse_inspector
from edge_make.progress import silent
from engines.build_plan import BuildPlan, plan_build
from engines.builder.fallbacks import scales_to_try
from engines.builder.store import EngineStore
from engines.builder.variant import parsed_graph
from engines.compiler.compat import Compiler, TensorRT
from engines.config import BuildConfig
from engines.graph.adapt import graph_files, graph_of

from . import network, plugin_v3
from .builder import PLAN_MAGIC, Builder, shape_inputs
from .cuda import POISON, TEXTS, FakeGpu, RuleError, Work
from .inspector import inspector_json, layer_names
from .network import DTYPES, DataType, FirstLogger, ILogger, Planted, Pretended, Severity
from .parser import OnnxParser

ALIGNMENT = 256
# Of device memory, that an execution context keeps. TensorRT for RTX 1.7.1 reports none at build.
CONTEXT_BYTES = 64 << 10
CONTEXT_S = 0.05
GOOD = Planted()
_NUMPY = {
    "fp32": np.float32,
    "fp16": np.float16,
    "bf16": np.uint16,
    "int64": np.int64,
    "int32": np.int32,
    "int8": np.int8,
}


class TensorLocation(enum.Enum):
    DEVICE, HOST = range(2)


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class LayerInformationFormat(enum.Enum):
    ONELINE, JSON = range(2)


class IProfiler:
    def report_layer_time(self, layer_name: str, ms: float) -> None:
        raise NotImplementedError


def fake_plan(
    build: BuildPlan,
    *,
    version: str = "10.16.2.10",
    flavour: Flavour = "tensorrt",
    compute_capability: str = "8.7",
    planted: Planted = GOOD,
    change: Callable[[bytes], bytes] = lambda graph: graph,
) -> bytes:
    """What the stand-in builds, asked past the product's own check of the graph.

    Args:
        build: of what.
        version, flavour, compute_capability: of the TensorRT and the GPU.
        planted: what goes wrong.
        change: makes another graph of it.
    """
    module = make_module(
        FakeGpu(),
        version,
        flavour=flavour,
        compute_capability=compute_capability,
        planted=planted,
    )
    compiler = Compiler(TensorRT(module, flavour, version), lambda _severity, _text: None)
    found = parsed_graph(build, change(graph_of(build)))
    compiler.parse(found.data, found.path, build.kv_read)
    plan, _ = compiler.build(
        build.profiles,
        workspace_bytes=build.config.workspace_bytes,
        opt_level=0,
        timings=None,
        compute_capability=None,
        progress=silent,
    )
    return bytes(memoryview(plan))


def write_engine(
    bundle: Path,
    *,
    name: str = "engine",
    version: str = "10.16.2.10",
    flavour: Flavour = "tensorrt",
    compute_capability: str = "8.7",
    planted: Planted = GOOD,
    created: str = "2026-01-01",
    plan: bytes | None = None,
    plugins: Literal["python"] | None = None,
    **options: Any,
) -> Path:
    """Put a stand-in engine into a bundle, with an ``engine.json`` as a build writes it.

    Args:
        bundle: its directory.
        name: of the engine's directory.
        version, flavour, compute_capability, created: as recorded.
        planted: see `fake_plan`.
        plan: instead of the bundle's own.
        plugins: the kind of own kernels that it says it has.
        options: of `BuildConfig`.
    """
    manifest = read_manifest(bundle)
    config = BuildConfig(bundle=bundle, **options)
    build = plan_build(config, manifest)
    if manifest.kv_cache is not None:  # the rung that every version takes
        build = replace(build, scales=scales_to_try(build)[-1])
    shapes, profiles = build.shapes, build.profiles
    if plan is None:
        plan = fake_plan(
            build,
            version=version,
            flavour=flavour,
            compute_capability=compute_capability,
            planted=planted,
        )

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
            best_logits=shapes.best_logits,
            plugins=plugins,
        )

    names = [profile.name for profile in profiles]
    table = parse_inspector([inspector_json(manifest, profiles=range(len(names)))], names)
    store = EngineStore(bundle, name)
    store.add_layers(store.commit(plan, describe), table, None)
    return store.directory


@functools.lru_cache(maxsize=16)
def _session(model: bytes) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    # By default ONNX Runtime rounds the inputs of INT4 products to INT8, which TensorRT does not.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if b"QuantizeLinear" in model.replace(b"DequantizeLinear", b""):
        # See edge.backends.ort.session: sums of INT8 products in 16 bits are not exact.
        options.add_session_config_entry("session.x64quantprecision", "1")
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class FakeEngine:
    """``ICudaEngine``."""

    _detailed = True  # built with details of its layers
    _per_context = False  # the inspector tells of later profiles only in a context

    def __init__(
        self, gpu: FakeGpu, logger: FirstLogger, head: dict[str, Any], model: bytes
    ) -> None:
        self._gpu, self._logger, self._head = gpu, logger, head
        graph = OnnxFile(model)
        self._inputs = {info.name: info for info in graph.inputs}
        self._outputs = {info.name: info for info in graph.outputs}
        self._hosts = shape_inputs(graph)
        self._model = model
        self._aliases = {
            node.outputs[0]: node.inputs[0]
            for node in graph.nodes
            if node.op_type == "TensorScatter"
        }
        self._profiles: list[dict[str, Any]] = head["profiles"]
        self.device_memory_size_v2 = max(head["scratch"])
        self.num_optimization_profiles = len(self._profiles)
        self.plugins: list[tuple[Any, dict[str, Any]]] = []  # of Python
        self._weights_bytes = len(model)  # which the runtime has reserved
        gpu.born("engine")

    def __del__(self) -> None:
        if "_weights_bytes" in self.__dict__:
            self._gpu.reserve(-self._weights_bytes)
            self._gpu.dead("engine")

    @property
    def _manifest(self) -> Manifest:
        return read_manifest(Path(self._head["bundle"]))

    @property
    def num_io_tensors(self) -> int:
        return len(self._inputs) + len(self._outputs)

    def get_tensor_name(self, index: int) -> str:
        return [*self._inputs, *self._outputs][index]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DTYPES[{**self._inputs, **self._outputs}[name].dtype]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        shape = {**self._inputs, **self._outputs}[name].shape
        return tuple(size if isinstance(size, int) else -1 for size in shape)

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.HOST if name in self._hosts else TensorLocation.DEVICE

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return int(self._head["scratch"][profile_index])

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self._aliases.get(name)

    @property
    def _capacity(self) -> int:
        (rows,) = {self._inputs[name].shape[2] for name in self._inputs if "past_key" in name}
        return int(rows)

    def create_engine_inspector(self) -> FakeInspector:
        return FakeInspector(self)

    def create_execution_context(
        self,
        strategy: ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy.STATIC,
    ) -> FakeContext | None:
        if strategy is not ExecutionContextAllocationStrategy.USER_MANAGED:
            raise RuleError("every context would allocate its own activations")
        failed = self._gpu.code("create_execution_context")
        if failed or not self._gpu.reserve(CONTEXT_BYTES):
            self._logger.log(Severity.ERROR, "createExecutionContext: out of memory")
            return None
        self._gpu.spend("create_execution_context", CONTEXT_S)
        context = FakeContext(self._gpu, self, self._logger)
        try:
            context.attached = plugin_v3.Attached(self.plugins)
        except plugin_v3.FailedError as error:
            text = f"createExecutionContext: {error}"
            self._logger.log(Severity.ERROR, text)
            return None
        return context


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
        if self._engine._head["bundle"] is None:
            return json.dumps({"Layers": []})
        head = self._engine._head
        return inspector_json(
            self._engine._manifest,
            detailed=self._engine._detailed,
            fused=head["fused"],
            unpacked=tuple(head["unpacks"]),
            own=tuple(head["own"]),
            profiles=profiles,
        )


class FakeContext:
    """``IExecutionContext``."""

    profiler: IProfiler | None = None
    attached: plugin_v3.Attached

    def __init__(self, gpu: FakeGpu, engine: FakeEngine, logger: FirstLogger) -> None:
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
        self._gpu.reserve(-CONTEXT_BYTES)
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
        done = self._changes("set_optimization_profile_async")
        if done and not 0 <= profile_index < self._engine.num_optimization_profiles:
            done = self._refuse(f"profile {profile_index} does not exist")
        if not done:  # of the bindings (pyCore.cpp)
            raise RuntimeError("Error in set optimization profile async.")
        self._profile = profile_index
        self._shapes.clear()
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        self._changes("set_device_memory")
        if memory % ALIGNMENT:
            raise RuleError(f"activations at {memory:#x}, not aligned to {ALIGNMENT} bytes")
        self._memory = memory, size

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if not self._changes("set_input_shape"):
            return False
        if self._profile is None or name not in self._engine._inputs:
            return self._refuse(f"setInputShape: {name} in profile {self._profile}")
        least, _, most = self._engine._profiles[self._profile][name]
        inside = len(shape) == len(least) and all(
            low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
        )
        if not inside:
            return self._refuse(f"setInputShape: {name} {shape} is not within {least} and {most}")
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if not self._changes("set_tensor_address"):
            return False
        if name not in self._engine._inputs and name not in self._engine._outputs:
            return self._refuse(f"setTensorAddress: no tensor {name}")
        if memory % ALIGNMENT:
            return self._refuse(f"setTensorAddress: {name} is not aligned to {ALIGNMENT} bytes")
        if name in self._engine._hosts and self._gpu.holds(memory):
            raise RuleError(f"{name} is read on the host, and this is an address of the GPU")
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
        needed = engine.get_device_memory_size_for_profile_v2(self._profile or 0)
        if self._memory[1] < needed:
            raise RuleError(f"{self._memory[1]} bytes of activations, {needed} are written")
        for name in [*engine._inputs, *engine._outputs]:
            if not self._addresses.get(name):
                return self._refuse(f"enqueueV3: the address of {name} is not set")
        missing = [
            name
            for name in engine._inputs
            if name not in self._shapes and -1 in engine.get_tensor_shape(name)
        ]
        if missing:
            return self._refuse(f"enqueueV3: the shape of {missing[0]} is not set")
        capturing = gpu.streams[stream_handle].capturing is not None
        if capturing and self._flushed != self.version:
            raise RuleError("captured without a run in advance after a change of shapes")
        batch, seq = self._shapes.get(io_spec.POSITION_IDS, (1, 1))  # an encoder has no tokens
        try:
            self.attached.run(batch, seq, stream_handle, self.version)
        except plugin_v3.FailedError as error:
            return self._refuse(f"enqueueV3: {error}")
        work = self._make_work()
        gpu.put(stream_handle, work)
        self._last_work = work
        if not capturing:
            self._flushed = self.version
        if self.profiler is not None:
            if capturing:
                raise RuleError("a profiler waits for the run, which a capture cannot")
            gpu.streams[stream_handle].synchronize()
            own = tuple(engine._head["own"])
            names = layer_names(engine._manifest, self._profile or 0, own)
            for place, name in enumerate(names):
                self.profiler.report_layer_time(name, 0.001 * (place + 1))
        return True

    def _dimensions(self) -> dict[str, int]:
        """The symbols of `io_spec` by value; inputs must agree."""
        found: dict[str, int] = {}
        for name, spec in self._engine._inputs.items():
            shape = self._shapes.get(name, spec.shape)
            for symbol, size in zip(spec.shape, shape, strict=True):
                if isinstance(symbol, str) and found.setdefault(symbol, int(size)) != size:
                    raise RuleError(f"{name} has {size} of {symbol}, others {found[symbol]}")
        return found

    def _make_work(self) -> Work:
        engine, gpu = self._engine, self._gpu
        sizes = self._dimensions()
        views: dict[str, NDArray[Any]] = {}
        for spec in [*engine._inputs.values(), *engine._outputs.values()]:
            shape = tuple(sizes[d] if isinstance(d, str) else d for d in spec.shape)
            dtype = np.dtype(_NUMPY[spec.dtype])
            num_bytes = int(np.prod(shape)) * dtype.itemsize
            memory = gpu.memory(self._addresses[spec.name], num_bytes)
            views[spec.name] = memory.view(dtype).reshape(shape)
            alias = engine._aliases.get(spec.name)
            if alias and self._addresses[alias] != self._addresses[spec.name]:
                raise RuleError(f"{spec.name} is not at the address of {alias}")
        assert self._memory is not None
        needed = engine.get_device_memory_size_for_profile_v2(self._profile or 0)
        scratch = gpu.memory(self._memory[0], needed)
        held = {address: gpu.memory(address, 1) for address in self._addresses.values()}
        plain = [views[name] for name in engine._outputs if name not in engine._aliases]
        version, owner = self.version, weakref.ref(self)  # a stream keeps no context alive
        activations = self._memory[0]

        def poison() -> None:
            for view in plain:
                view.view(np.uint8)[...] = POISON

        def valid() -> None:
            context = owner()
            if context is None:
                raise RuleError("the context of a graph is destroyed")
            if context.version != version:
                raise RuleError("the context of a graph was changed after the capture")
            for address, before in {**held, activations: scratch[:1]}.items():
                gpu.still(address, before)

        def run() -> None:
            scratch.fill(0xAB)
            _compute(engine, views, sizes)

        return Work(run, poison, valid, (activations, needed))


def _check_step(engine: FakeEngine, inputs: dict[str, NDArray[Any]], sizes: dict[str, int]) -> None:
    if io_spec.WRITE_INDICES in inputs:
        last = inputs[io_spec.WRITE_INDICES] + sizes[io_spec.SEQ]
        if inputs[io_spec.WRITE_INDICES].min() < 0 or last.max() > engine._capacity:
            raise RuleError(f"rows up to {last.max()} of {engine._capacity} are written")
    elif io_spec.PAST_LENGTHS not in inputs:
        # Own attention, to which a sequence's first position is what it has in the cache.
        if inputs[io_spec.POSITION_IDS].max() >= engine._capacity:
            raise RuleError("rows that no cache has are read")
    elif inputs[io_spec.PAST_LENGTHS].max() > len(inputs[io_spec.KV_POSITIONS]):
        raise RuleError("more rows are valid than are read")
    rows = inputs.get(io_spec.KV_POSITIONS)
    if rows is not None and not np.array_equal(rows, np.arange(len(rows))):
        raise RuleError("kv_positions are not 0, 1, 2, ...")
    if inputs[io_spec.POSITION_IDS].max() >= engine._capacity:
        raise RuleError("a position lies outside of the cache")


def _compute(engine: FakeEngine, views: dict[str, NDArray[Any]], sizes: dict[str, int]) -> None:
    inputs = {name: views[name] for name in engine._inputs}
    if io_spec.POSITION_IDS in inputs:
        _check_step(engine, inputs, sizes)
    copies = {name: np.array(array) for name, array in inputs.items()}
    results = _session(engine._model).run(list(engine._outputs), copies)
    for name, result in zip(engine._outputs, results, strict=True):
        views[name][...] = result


class OldEngine(FakeEngine):
    """``ICudaEngine`` before 10.15."""

    @property
    def get_aliased_input_tensor(self) -> Any:
        raise AttributeError("get_aliased_input_tensor comes with TensorRT 10.15")


def make_module(
    gpu: FakeGpu,
    version: str = "10.16.2.10",
    name: str = "tensorrt",
    *,
    flavour: Flavour | None = None,
    compute_capability: str | None = None,
    planted: Planted = GOOD,
) -> Any:
    """The module ``tensorrt``, for ``sys.modules``.

    Args:
        gpu: where it runs.
        version: full, e.g. ``10.3.0.30``.
        name: of the module.
        flavour: None is that of the name.
        compute_capability: None is that of the GPU.
        planted: what goes wrong.
    """
    here = compute_capability or ".".join(map(str, gpu.compute_capability))
    flavour = flavour or ("tensorrt-rtx" if name.endswith("_rtx") else "tensorrt")
    pretended = Pretended(version, flavour, here, planted)
    module: Any = types.ModuleType(name)
    module.__version__ = version
    module.ILogger, module.DataType, module.int32 = ILogger, DataType, DataType.INT32
    module.TensorLocation = TensorLocation
    module.ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
    module.LayerInformationFormat, module.IProfiler = LayerInformationFormat, IProfiler
    module.ICudaEngine, module.IExecutionContext = FakeEngine, FakeContext
    module.OnnxParser = OnnxParser
    for each in network.NAMES:
        setattr(module, each, getattr(network, each))
    for plugin_name, thing in plugin_v3.NAMES.items() if flavour == "tensorrt" else ():
        setattr(module, plugin_name, thing)
    if pretended.release >= (10, 14):
        module.IAttention = network.Attention
        module.IAttentionOutputLayer = network.AttentionOutputLayer
        module.AttentionNormalizationOp = network.AttentionNormalizationOp
    if pretended.release >= (11, 0):
        module.CausalMaskKind = network.CausalMaskKind
    module.Builder = functools.partial(Builder, pretended)

    class Runtime:
        def __init__(self, logger: ILogger) -> None:
            self._logger = pretended.logger
            self._logger.give(self, logger)

        def deserialize_cuda_engine(self, serialized_engine: Any) -> FakeEngine | None:
            def refuse(why: str) -> FakeEngine | None:
                text = f"deserializeCudaEngine: {why}"
                self._logger.log(Severity.ERROR, text)
                return None

            data = bytes(memoryview(serialized_engine))
            if not data.startswith(PLAN_MAGIC):
                raise RuleError("TensorRT was given something that is no plan")
            if code := gpu.code("deserialize_cuda_engine"):
                return refuse(f"Error Code 1: Cuda Runtime ({TEXTS[code]})")
            text, _, model = data[len(PLAN_MAGIC) :].partition(b"\n")
            head = json.loads(text)
            if (head["version"], head["flavour"]) != (version, flavour):
                return refuse(
                    "The engine plan file is not compatible with this version of TensorRT, "
                    f"expecting library version {version} got {head['version']}, please rebuild"
                )
            if head["compute_capability"] != here and flavour == "tensorrt":
                return refuse(
                    "The engine plan file is generated on an incompatible device, expecting "
                    f"compute {here} got compute {head['compute_capability']}, please rebuild"
                )
            if not gpu.reserve(len(model)):
                return refuse("out of memory")
            kind = OldEngine if pretended.release < (10, 15) else FakeEngine
            engine = kind(gpu, self._logger, head, model)
            for record in head["plugins"]:
                try:
                    plugin = plugin_v3.deserialize(record)
                except plugin_v3.FailedError as error:
                    return refuse(str(error))
                if plugin is None:
                    return refuse(f"IPluginRegistry::getCreator: Cannot find {record['key']}")
                engine.plugins.append((plugin, record))
            return engine

    module.Runtime = Runtime
    return module


NO_CUDA = "CUDA initialization failure with error: 35"


def start_nothing(logger: ILogger) -> None:
    """Stand in for ``Builder`` or ``Runtime`` where CUDA does not start (NVIDIA/TensorRT#2913)."""
    logger.log(Severity.WARNING, NO_CUDA)
    raise TypeError("pybind11::init(): factory function returned nullptr")


def install(patch: pytest.MonkeyPatch, gpu: FakeGpu, **module: Any) -> None:
    """Make the stand-ins what the product imports; ``module`` is for `make_module`."""
    for name, fake in gpu.modules().items():
        patch.setitem(sys.modules, name, fake)
    patch.setitem(sys.modules, module.get("name", "tensorrt"), make_module(gpu, **module))


@functools.cache
def _register_randoms() -> None:
    """Let Hypothesis look for the owners of its generators while the collector still shows them."""

    @settings(max_examples=1, database=None)
    @given(strategies.none())
    def run(_: None) -> None:
        pass

    run()


@contextmanager
def emptied(gpu: FakeGpu) -> Iterator[FakeGpu]:
    """Whatever is made on the device is gone in the end."""
    _register_randoms()
    # What was there before is not looked through again: that takes 40 ms of every collection.
    gc.freeze()
    try:
        yield gpu
        gc.collect()
        assert not gpu.alive, "left behind"
        assert not gpu.broken
        assert gpu.reserved_bytes == 0
    finally:
        gc.unfreeze()
