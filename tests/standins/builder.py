"""A stand-in for the builder of ``tensorrt``.

It builds a parsed network (`network`, `parser`) as the version does that it stands for:
what is illegal there is refused here, whether or not the product asked the project's own table
(`engines.rules`) first. A plan holds the graph with its weights, so it runs wherever the bundle has
gone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from edge.bundle.manifest import MANIFEST_NAME
from edge.bundle.onnx_file import Node, OnnxFile

from . import plugin_v3
from .cuda import RuleError
from .network import (
    DTYPES,
    ILogger,
    MemoryPoolType,
    Network,
    NetworkDefinitionCreationFlag,
    Pretended,
    ProfilingVerbosity,
    Severity,
    Shape,
)
from .plan_graph import make_model, query_heads
from .plugin import PLUGINS, TensorDesc
from .scratch import live_bytes

PLAN_MAGIC = b"FAKE PLAN "
# Operands whose values say how large a tensor is.
_SHAPE_OPERANDS = {
    "Reshape": (1,), "Expand": (1,), "Tile": (1,), "ConstantOfShape": (0,), "TopK": (1,),
    "Slice": (1, 2, 3, 4), "Range": (0, 1, 2), "Pad": (1,), "Split": (1,),
}  # fmt: skip
# Operators of one type, in a strongly typed network.
_ONE_TYPE = ("MatMul", "Add", "Sub", "Mul", "Div", "Less", "LessOrEqual", "Greater", "Equal")


class OptimizationProfile:
    """``IOptimizationProfile``."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[Shape, Shape, Shape]] = {}
        self.values: dict[str, tuple[Shape, Shape, Shape]] = {}

    def set_shape(self, input: str, min: Shape, opt: Shape, max: Shape) -> None:
        self.shapes[input] = self._checked(min, opt, max)

    def set_shape_input(self, input: str, min: Shape, opt: Shape, max: Shape) -> None:
        self.values[input] = self._checked(min, opt, max)

    @staticmethod
    def _checked(*three: Sequence[int]) -> tuple[Shape, Shape, Shape]:
        least, usual, most = (tuple(each) for each in three)
        ordered = all(a <= b <= c for a, b, c in zip(least, usual, most, strict=True))
        if not ordered or min(least, default=1) < 0:
            raise ValueError("Shape provided is inconsistent with other shapes.")
        return least, usual, most


class TimingCache:
    """``ITimingCache``: of one TensorRT on one GPU."""

    _MAGIC = b"FAKE TIMINGS "

    def __init__(self, owner: str, entries: int = 0) -> None:
        self.owner, self.entries = owner, entries

    def serialize(self) -> bytes:
        return self._MAGIC + json.dumps([self.owner, self.entries]).encode()

    @classmethod
    def read(cls, data: bytes) -> TimingCache | None:
        if not data.startswith(cls._MAGIC):
            return None
        return cls(*json.loads(data[len(cls._MAGIC) :]))


class BuilderConfig:
    """``IBuilderConfig``."""

    builder_optimization_level = 3
    profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
    progress_monitor: Any = None

    def __init__(self, pretended: Pretended) -> None:
        self._logger = pretended.logger
        self._owner = f"{pretended.version} {pretended.compute_capability}"
        self.profiles: list[OptimizationProfile] = []
        self.workspace_bytes = 0
        self.timings: TimingCache | None = None

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        assert pool is MemoryPoolType.WORKSPACE
        self.workspace_bytes = pool_size

    def add_optimization_profile(self, profile: OptimizationProfile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache | None:
        if not serialized_timing_cache:
            return TimingCache(self._owner)
        found = TimingCache.read(bytes(serialized_timing_cache))
        if found is None:  # TensorRT for RTX 1.7.1 returns an empty one; NVIDIA's tools expect None
            self._logger.log(Severity.WARNING, "Failed to deserialize timing cache.")
        return found

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        if not isinstance(cache, TimingCache):
            raise TypeError("set_timing_cache(): incompatible function arguments")  # of pybind11
        if cache.owner != self._owner and not ignore_mismatch:
            return False
        self.timings = cache
        return True

    def get_timing_cache(self) -> TimingCache | None:
        return self.timings


class Builder:
    """``Builder``."""

    def __init__(self, pretended: Pretended, logger: ILogger) -> None:
        self._pretended, self._logger = pretended, pretended.logger
        self._logger.give(self, logger)

    def create_network(self, flags: int = 0) -> Network:
        typed = flags >> NetworkDefinitionCreationFlag.STRONGLY_TYPED & 1
        if self._pretended.release < (11, 0) and not typed:
            raise RuleError("INT4 and BF16 need a strongly typed network")
        return Network(self._pretended)

    def create_builder_config(self) -> BuilderConfig:
        return BuilderConfig(self._pretended)

    def create_optimization_profile(self) -> OptimizationProfile:
        return OptimizationProfile()

    def build_serialized_network(self, network: Network, config: BuilderConfig) -> Any:
        monitor, phase = config.progress_monitor, "Building engine"
        if monitor is not None:
            monitor.phase_start(phase, None, 2)
            if not monitor.step_complete(phase, 0):
                return None
        try:
            plan = self._build(network, config)
        except _RefusedError as reason:
            self._logger.log(Severity.ERROR, str(reason))
            return None
        if config.timings is not None:
            config.timings.entries += 1
        if monitor is not None:
            if not monitor.step_complete(phase, 1):
                return None
            monitor.phase_finish(phase)
        return np.frombuffer(plan, np.uint8)

    def _build(self, network: Network, config: BuilderConfig) -> bytes:
        planted, pretended = self._pretended.planted, self._pretended
        if network.refused:
            found = "; ".join(map(str, network.refused))
            raise _RefusedError(f"Error Code 4: API Usage Error ({found})")
        _check_types(network)
        no_fused = planted.no_fused
        for attention in network.attentions:
            if no_fused is not None and not attention.decomposable:
                raise _RefusedError(f"Error Code 10: Internal Error ({attention.name}: {no_fused})")
        try:
            own, plugins = _ask_plugins(network, config.profiles)
        except plugin_v3.FailedError as error:
            raise _RefusedError(f"Error Code 2: Internal Error ({error})") from None
        model = make_model(network)
        hosts = shape_inputs(OnnxFile(model))
        ranges = [_check_profile(OnnxFile(model), profile, hosts) for profile in config.profiles]
        if not ranges:
            raise _RefusedError(
                "Error Code 4: Network has dynamic inputs, but no optimization profile"
            )
        unpacked = sum(
            math.prod(network.shapes[node.inputs[0]])
            for node in OnnxFile(model).nodes
            if node.op_type == "DequantizeLinear"
            and node.outputs[0].removesuffix(".dequantized") in planted.unpacks
        )
        scratch = []
        for each, profile in zip(ranges, config.profiles, strict=True):
            largest = tuple((name, shapes[2]) for name, shapes in each.items())
            values = tuple((name, profile.values[name][2]) for name in sorted(hosts))
            size = live_bytes(model, largest, values) + 2 * unpacked
            scratch.append(size if planted.scratch_bytes is None else planted.scratch_bytes)
            if size > config.workspace_bytes > 0:
                raise _RefusedError(f"Error Code 2: OutOfMemory (Requested size was {size} bytes.)")
            text = f"Max Scratch Memory: {scratch[-1]} bytes"
            self._logger.log(Severity.INFO, text)
        directory = network.directory
        has_bundle = directory is not None and (directory / MANIFEST_NAME).is_file()
        head = {
            "version": pretended.version,
            "flavour": pretended.flavour,
            "compute_capability": pretended.compute_capability,
            "profiles": ranges,
            "scratch": scratch,
            "fused": planted.no_fused is None,
            "unpacks": planted.unpacks,
            "bundle": str(directory) if has_bundle else None,
            "own": own,
            "plugins": plugins,
        }
        return PLAN_MAGIC + json.dumps(head).encode() + b"\n" + model


def _ask_plugins(
    network: Network, profiles: list[OptimizationProfile]
) -> tuple[list[str], list[dict[str, Any]]]:
    """Every plugin, as the builder asks it for each profile.

    Returns:
        Their layers, and what a plan has of those of Python.
    """
    assert network.graph is not None
    own: dict[str, None] = {}
    serialized: dict[str, dict[str, Any]] = {}
    if not any(node.domain for node in network.graph.nodes):
        return [], []
    for profile in profiles:
        found = profile.shapes.get("position_ids") or next(iter(profile.shapes.values()))
        steps = [(shape[0], shape[1]) for shape in found]
        made: list[dict[str, TensorDesc]] = [{} for _ in steps]
        for node in network.graph.nodes:
            if not node.domain:
                continue
            own[node.name.removesuffix(f"/{node.op_type}")] = None
            inputs = [
                [known.get(name) or _described(network, node, name, *step) for name in node.inputs]
                for known, step in zip(made, steps, strict=True)
            ]
            python = network.plugins.get(node.name)
            if python is None:
                outputs = PLUGINS.ask(f"{node.domain}::{node.op_type}", inputs)
            else:
                if node.name not in serialized:
                    shapes = [_symbols(network, node, name, made[0]) for name in node.inputs]
                    serialized[node.name] = plugin_v3.serialize(python, shapes)
                sizes = [[each.shape_expr for each in step] for step in inputs]
                kinds = [each.dtype for each in inputs[0]]
                asked = plugin_v3.ask(python, sizes, kinds)
                outputs = [tuple(TensorDesc(e.dims, e.type) for e in step) for step in asked]
            for known, step_outputs in zip(made, outputs, strict=True):
                known.update(zip(node.outputs, step_outputs, strict=True))
    return list(own), list(serialized.values())


def _symbols(
    network: Network, node: Node, name: str, made: dict[str, TensorDesc]
) -> tuple[int | str, ...]:
    """The shape of a plugin's input in steps of any size, see `plugin_v3.serialize`."""
    if name in made:
        moving = ("room",) if node.op_type == "attention_join" else ("batch", "seq")
        return (*moving, *made[name].shape_expr[len(moving) :])
    symbols: Any = _described(network, node, name, *("batch", "seq"))  # type: ignore[arg-type]
    shape: tuple[int | str, ...] = symbols.shape_expr
    return shape


def _described(network: Network, node: Node, name: str, batch: int, seq: int) -> TensorDesc:
    """A plugin's input that no plugin makes, in a step of so many sequences and tokens."""
    dtype = DTYPES[network.types[name]]
    shape = network.shapes.get(name, ())
    if node.op_type == "w4_linear":
        depth = network.shapes[node.inputs[1]][0] * 32
        return TensorDesc((batch, seq, depth) if name == node.inputs[0] else shape, dtype)
    if node.op_type == "top_k_parts":
        return TensorDesc((batch, seq, shape[-1]) if name == node.inputs[0] else shape, dtype)
    if name == node.inputs[-1] and node.op_type == "attention_parts":
        return TensorDesc((batch, seq), dtype)
    if name == node.inputs[2] and node.op_type == "attention_join":
        return TensorDesc((batch, seq), dtype)
    cache = network.shapes["past_key_values.0.key"]
    rows = (batch, cache[1], seq, cache[3])
    if node.op_type == "attention_parts" and name in node.inputs[1:5]:
        return TensorDesc((batch, *cache[1:]) if name in node.inputs[1:3] else rows, dtype)
    return TensorDesc((batch, query_heads(network), seq, cache[3]), dtype)


class _RefusedError(Exception):
    """An error of the builder."""


def _check_types(network: Network) -> None:
    """A strongly typed network converts nothing by itself."""
    assert network.graph is not None
    for node in network.graph.nodes:
        types = [network.types[name] for name in node.inputs if name]
        if node.op_type in _ONE_TYPE and len(set(types)) > 1:
            raise _RefusedError(
                f"Error Code 4: API Usage Error ({node.name}: {node.op_type} must have same input "
                f"types. But they are of types {' and '.join(types)})"
            )


def _check_profile(
    graph: OnnxFile, profile: OptimizationProfile, hosts: frozenset[str]
) -> dict[str, tuple[Shape, Shape, Shape]]:
    """Shapes of all inputs; those of a static input may be left out."""
    found = {}
    for info in graph.inputs:
        if info.name in hosts and info.name not in profile.values:
            raise _RefusedError(
                f"Error Code 4: {info.name} is a shape tensor without values in profile"
            )
        static = tuple(size for size in info.shape if isinstance(size, int))
        if info.name not in profile.shapes:
            if len(static) != len(info.shape):
                raise _RefusedError(
                    f"Error Code 4: {info.name}: dynamic input is missing dimensions in profile"
                )
            found[info.name] = (static, static, static)
            continue
        ranges = profile.shapes[info.name]
        for shape in ranges:
            fits = len(shape) == len(info.shape) and all(
                not isinstance(wanted, int) or wanted == size
                for wanted, size in zip(info.shape, shape, strict=True)
            )
            if not fits:
                raise _RefusedError(
                    f"Error Code 4: for input {info.name}, profile has {shape} for {info.shape}"
                )
        found[info.name] = ranges
    return found


def shape_inputs(graph: OnnxFile) -> frozenset[str]:
    """Inputs whose values say how large a tensor is, which TensorRT wants on the host."""
    inputs = {info.name: info for info in graph.inputs}
    makers = {name: node for node in graph.nodes for name in node.outputs}
    todo = [
        node.inputs[place]
        for node in graph.nodes
        for place in _SHAPE_OPERANDS.get(node.op_type, ())
        if place < len(node.inputs)
    ]
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        maker = makers.get(name)
        if name in seen:
            continue
        seen.add(name)
        if maker is not None and maker.op_type not in ("Shape", "Size"):
            todo += maker.inputs
    return frozenset(seen & set(inputs))
