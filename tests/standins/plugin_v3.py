"""A stand-in for ``IPluginV3`` of ``tensorrt``, and for what asks a plugin in a build and a run.

NVIDIA's own bindings hold our plugin in ``tools/trt-bindings``; this one lets it be built and run
by `builder` and `tensorrt`, through a file as a plan is one. What a plugin raises is
printed, and becomes a failure without a reason, as NVIDIA's bindings have it (pyPlugin.cpp).
"""

from __future__ import annotations

import enum
import math
import operator
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from edge.backends.tensorrt.launch_rules import room

Shape = tuple[int, ...]
INPUTS, OUTPUTS = range(0x1000, 0x9000, 0x1000), range(0x9000, 0xF000, 0x1000)
"""Addresses that plugins get: what they compute is computed elsewhere."""


class IPluginV3:
    """Has, as all of these classes, nothing before its own ``__init__`` ran."""

    def __init__(self) -> None:
        self._plugin = True


class IPluginV3OneCore:
    def __init__(self) -> None:
        self._core = True


class IPluginV3OneBuild:
    timing_cache_id: str | None = None

    def __init__(self) -> None:
        self._build = True


class IPluginV3OneRuntime:
    def __init__(self) -> None:
        self._runtime = True


class IPluginCreatorV3One:
    def __init__(self) -> None:
        self._creator = True


class PluginFieldType(enum.Enum):
    FLOAT32, INT8, INT32, CHAR, UNKNOWN, INT64 = range(6)


class TensorRTPhase(enum.Enum):
    BUILD, RUNTIME = range(2)


class TensorFormat(enum.Enum):
    LINEAR, HWC = range(2)


class DimensionOperation(enum.Enum):
    SUM, PROD, MAX, MIN, SUB, EQUAL, LESS, FLOOR_DIV, CEIL_DIV = range(9)


@dataclass(frozen=True)
class Size:
    """``IDimensionExpr``, which has no operators."""

    value: int


class Sizes:
    """``IExprBuilder``."""

    _operations: ClassVar[dict[DimensionOperation, Callable[[int, int], int]]] = {
        DimensionOperation.PROD: operator.mul,
        DimensionOperation.MAX: max,
        DimensionOperation.MIN: min,
        DimensionOperation.CEIL_DIV: lambda first, second: -(-first // second),
    }

    def constant(self, value: int) -> Size:
        return Size(value)

    def operation(self, kind: DimensionOperation, first: Size, second: Size) -> Size:
        return Size(self._operations[kind](first.value, second.value))


class PluginField:
    """Reads as the bindings before 10.16 do with NumPy 2: the first element, over and over."""

    def __init__(self, name: str, data: NDArray[Any], type: PluginFieldType) -> None:
        self.name, self.raw, self.type, self.size = name, data, type, data.size

    @property
    def data(self) -> NDArray[Any]:
        found: NDArray[Any] = np.repeat(self.raw[:1], self.raw.size)
        return found


class PluginFieldCollection(list[PluginField]):
    pass


@dataclass
class Desc:
    """``PluginTensorDesc``."""

    dims: Shape
    type: Any
    format: TensorFormat = TensorFormat.LINEAR


@dataclass
class DynamicDesc:
    """``DynamicPluginTensorDesc``."""

    desc: Desc
    min: Shape
    opt: Shape
    max: Shape


@dataclass
class Registry:
    """``IPluginRegistry``, of the process; a test empties it. It keeps no creator alive.

    Attributes:
        refuses: names of plugins whose creators it does not take.
    """

    creators: WeakValueDictionary[tuple[str, str, str], Any] = field(
        default_factory=WeakValueDictionary
    )
    refuses: tuple[str, ...] = ()

    def register_creator(self, creator: Any, plugin_namespace: str) -> bool:
        assert creator._creator
        assert creator.plugin_namespace == plugin_namespace
        key = creator.name, creator.plugin_version, plugin_namespace
        if creator.name in self.refuses or key in self.creators:
            return False
        self.creators[key] = creator
        return True


TIMED: dict[tuple[str, Shape, Shape], tuple[int, ...]] = {}
"""Tactics by plugin, and by the usual and the largest shape of its first input; a test empties it.
"""
REGISTRY = Registry()
NAMES: dict[str, Any] = {
    each.__name__: each
    for each in (
        *(IPluginV3, IPluginV3OneCore, IPluginV3OneBuild, IPluginV3OneRuntime),
        *(IPluginCreatorV3One, PluginField, PluginFieldCollection, PluginFieldType),
        *(TensorRTPhase, TensorFormat, DimensionOperation),
    )
}
"""What a module of every version has."""
NAMES |= {"DimsExprs": list, "get_plugin_registry": lambda: REGISTRY}


@contextmanager
def printed(doing: str) -> Iterator[None]:
    """What a plugin raises is printed, and `FailedError` is all that is left."""
    try:
        yield
    except AssertionError:  # of a stand-in
        raise
    except BaseException as error:  # noqa: BLE001 - as C++ catches it
        print(f"[ERROR] Exception thrown from {doing}() {error}", file=sys.stderr)  # noqa: T201
        raise FailedError(f"{doing} returned -1") from None


class FailedError(Exception):
    """A plugin failed."""


def create(node_type: str, version: str, namespace: str, attributes: dict[str, Any]) -> Any:
    """A plugin as the parser makes it (loadFields of onnx-tensorrt); None without a creator."""
    creator = REGISTRY.creators.get((node_type, version, namespace))
    if creator is None:
        return None
    fields = [
        PluginField(each.name, np.array([attributes[each.name]], np.int32), each.type)
        for each in creator.field_names
        if each.name in attributes
    ]
    with printed("create_plugin"):
        return creator.create_plugin("node", PluginFieldCollection(fields), TensorRTPhase.BUILD)


def ask(plugin: Any, steps: Sequence[Sequence[Shape]], types: Sequence[Any]) -> list[list[Desc]]:
    """Ask and time a plugin, as a builder does for one profile.

    Args:
        plugin: of the network.
        steps: shapes of the inputs in the least, the usual and the largest step.
        types: of the inputs.

    Returns:
        The outputs of these steps.
    """
    made = plugin.clone()
    assert made._plugin
    assert made._core
    assert made._build
    assert made._runtime
    assert made.timing_cache_id
    with printed("get_output_data_types"):
        output_types = made.get_output_data_types(list(types))
    shapes = [[*step, *_output_shapes(made, step)] for step in steps]
    assert len(shapes[0]) - len(types) == len(output_types) == made.num_outputs
    ports = [
        DynamicDesc(Desc(each[1], kind), *each)
        for each, kind in zip(zip(*shapes, strict=True), [*types, *output_types], strict=True)
    ]
    num_inputs = len(types)
    for place, port in enumerate(ports):
        assert made.supports_format_combination(place, ports, num_inputs)
        port.desc.format = TensorFormat.HWC
        assert not made.supports_format_combination(place, ports, num_inputs)
        port.desc.format = TensorFormat.LINEAR
    with printed("configure_plugin"):
        made.configure_plugin(ports[:num_inputs], ports[num_inputs:])
    tactics = made.get_valid_tactics()
    assert len(set(tactics)) == len(tactics)
    assert min(tactics) > 0
    TIMED[plugin.plugin_name, steps[1][0], steps[2][0]] = tuple(tactics)
    driver = sys.modules["cuda.bindings.driver"]
    _, stream = driver.cuStreamCreate(0)
    descs = [port.desc for port in ports]
    reads, writes = descs[:num_inputs], descs[num_inputs:]
    try:
        for tactic in tactics:
            mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
            driver.cuStreamBeginCapture(stream, mode)
            captured = made.clone()
            captured.set_tactic(tactic)
            run(captured, reads, writes, stream, changed=True)
            code, graph = driver.cuStreamEndCapture(stream)
            assert code == 0, "a plugin cannot be timed in a CUDA graph"
            driver.cuGraphDestroy(graph)
            timed = made.clone()
            timed.set_tactic(tactic)
            run(timed, reads, writes, stream, changed=True)
    finally:
        driver.cuStreamSynchronize(stream)
        driver.cuStreamDestroy(stream)
    return [
        [Desc(shape, kind) for shape, kind in zip(step[num_inputs:], output_types, strict=True)]
        for step in shapes
    ]


def _output_shapes(plugin: Any, inputs: Sequence[Shape]) -> list[Shape]:
    with printed("get_output_shapes"):
        sizes = [[Size(size) for size in shape] for shape in inputs]
        outputs = plugin.get_output_shapes(sizes, [], Sizes())
    return [tuple(size.value for size in output) for output in outputs]


def run(
    plugin: Any, inputs: Sequence[Desc], outputs: Sequence[Desc], stream: int, *, changed: bool
) -> None:
    """Put a plugin's work on a stream."""
    if changed:
        with printed("on_shape_change"):
            plugin.on_shape_change(list(inputs), list(outputs))
    with printed("enqueue"):
        plugin.enqueue(
            *(list(inputs), list(outputs)),
            *(list(INPUTS[: len(inputs)]), list(OUTPUTS[: len(outputs)])),
            *(0, stream),
        )


def serialize(plugin: Any, shapes: Sequence[Sequence[int | str]]) -> dict[str, Any]:
    """What a plan has of a plugin: its fields, and the shapes of its inputs.

    A size is a number, ``batch`` or ``seq``, or ``room``: that of an attention's partial sums.
    """
    fields = plugin.clone().get_fields_to_serialize()
    assert isinstance(fields, PluginFieldCollection)
    return {
        "key": [plugin.plugin_name, plugin.plugin_version, plugin.plugin_namespace],
        "fields": [[each.name, each.type.name, each.raw.tolist()] for each in fields],
        "shapes": [list(shape) for shape in shapes],
        "outputs": plugin.num_outputs,
        "tactics": len(plugin.clone().get_valid_tactics()),
    }


def deserialize(record: dict[str, Any]) -> Any:
    """A plugin of a plan; None without a creator."""
    creator = REGISTRY.creators.get(tuple(record["key"]))
    if creator is None:
        return None
    kinds = {"INT32": np.dtype(np.int32)}
    fields = [
        PluginField(name, np.array(data, kinds[kind]), PluginFieldType[kind])
        for name, kind, data in record["fields"]
    ]
    with printed("create_plugin"):
        made = creator.create_plugin("", PluginFieldCollection(fields), TensorRTPhase.RUNTIME)
    assert not isinstance(made, IPluginV3OneBuild)
    return made


class Attached:
    """The plugins of an execution context.

    Args:
        plugins: of the engine, each with its record.
    """

    def __init__(self, plugins: Sequence[tuple[Any, dict[str, Any]]]) -> None:
        with printed("attach_to_context"):
            self._plugins = [
                (each.attach_to_context(types.SimpleNamespace()), record)
                for each, record in plugins
            ]
        for place, (each, record) in enumerate(self._plugins):
            each.set_tactic(place % record["tactics"] + 1)
        self._version = -1

    def run(self, batch: int, seq: int, stream: int, version: int) -> None:
        """Put all of them on a stream; ``version`` is of the context's shapes and addresses."""
        changed, self._version = self._version != version, version
        for each, record in self._plugins:
            sizes: dict[Any, int] = {"batch": batch, "seq": seq}
            shapes = [tuple(sizes.get(size, size) for size in shape) for shape in record["shapes"]]
            if "room" in shapes[0]:
                sizes["room"] = room(math.prod(shapes[-1][:3]))  # of the query
                shapes = [tuple(sizes.get(size, size) for size in shape) for shape in shapes]
            outputs = [Desc((), None)] * record["outputs"]  # nothing depends on their shapes
            run(each, [Desc(shape, None) for shape in shapes], outputs, stream, changed=changed)
