"""Does NVIDIA's own code take our plugin, and what launches does it make of it?

``tensorrt.plugin`` is plain Python in the bindings of TensorRT: it checks the signatures of a
plugin, and asks it as the builder does. What it needs of the libraries is the registry of plugins
and arithmetic on sizes, which are stood in for here; every rule is NVIDIA's. `trt_bindings.py`
runs this once per version, over an unpacked wheel and stub libraries.
"""

from __future__ import annotations

import importlib
import operator
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorrt_bindings as trt

from edge.backends.tensorrt.launch_rules import NAMESPACE, PRODUCT, PluginRule
from engines.kernels import plugin
from engines.kernels.launch import Launch as WantedLaunch
from engines.kernels.launch import product, w4_tactics
from engines.kernels.own_plugins import element_types
from engines.kernels.package import Ptx

# Sequences, tokens, depth, columns, group, planes, bias.
CASES = (
    (1, 1, 1536, 2048, 32, 1, True),
    (1, 1, 8960, 1536, 128, 1, False),
    (2, 3, 128, 200, 64, 2, True),
    (8, 1, 64, 1, 32, 2, False),
    (1, 512, 256, 151936, 32, 2, False),
    (4, 128, 64, 65, 64, 1, True),
)
# Sequences, tokens and what follows from them are not known when the engine is built: the axes.
MOVING = {
    "x": (0, 1),
    **dict.fromkeys(("keys", "values", "partial", "stats"), (0,)),
    **dict.fromkeys(("query", "new_keys", "new_values"), (0, 2)),
    "positions": (0, 1),
    "logits": (0, 1),
}


class Registry:
    """The registry of plugins, which is in the library."""

    def __init__(self) -> None:
        self._creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        """Keep a creator."""
        key = creator.name, creator.plugin_version, namespace
        assert key not in self._creators, "registered twice"
        self._creators[key] = creator
        return True

    @property
    def creators(self) -> list[Any]:
        """All of them."""
        return list(self._creators.values())

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        """Find a creator."""
        return self._creators[name, version, namespace]


class Size:
    """``IDimensionExpr``: a number, which is known at build or not."""

    def __init__(self, value: int, *, constant: bool) -> None:
        self.value, self._constant = value, constant

    def is_constant(self) -> bool:
        """Whether it is known when the engine is built."""
        return self._constant

    def get_constant_value(self) -> int:
        """The number, if it is."""
        assert self._constant
        return self.value


class Sizes:
    """``IExprBuilder``."""

    def __init__(self) -> None:
        kinds = trt.DimensionOperation
        self._operations: dict[Any, Callable[[int, int], int]] = {
            kinds.SUM: operator.add,
            kinds.SUB: operator.sub,
            kinds.PROD: operator.mul,
            kinds.FLOOR_DIV: operator.floordiv,
            kinds.CEIL_DIV: lambda a, b: -(-a // b),
            kinds.EQUAL: lambda a, b: int(a == b),
            kinds.MAX: max,
            kinds.MIN: min,
        }

    def constant(self, value: int) -> Size:
        """A number that is known."""
        return Size(value, constant=True)

    def operation(self, kind: Any, first: Size, second: Size) -> Size:
        """A number of two."""
        known = first.is_constant() and second.is_constant()
        return Size(self._operations[kind](first.value, second.value), constant=known)


class Launch:
    """``IKernelLaunchParams``: takes whatever is set."""


class Numbers(dict[int, Any]):
    """``ISymExprs``."""

    nbSymExprs = 0  # noqa: N815 - NVIDIA's name


def load_module() -> Any:
    """The module ``tensorrt.plugin`` over the stand-ins."""
    registry = Registry()
    trt.get_plugin_registry = lambda: registry
    sys.modules["tensorrt"] = trt
    module = importlib.import_module("tensorrt_bindings.plugin")
    trt.IDimensionExpr, trt.DimsExprs = Size, lambda length: [None] * length
    tensor = importlib.import_module("tensorrt_bindings.plugin._tensor")
    # Of the library they can be written only.
    tensor.SymExprImpl.expr = tensor.SymExprImpl.dtype = tensor.SymExprImpl.type = None
    return module


def make(rule: PluginRule) -> Any:
    """A new plugin of a rule, by the creator that is registered."""
    creator = trt.get_plugin_registry().get_creator(rule.name, "1", NAMESPACE)
    return creator.create_plugin(
        rule.name,
        NAMESPACE,
        trt.PluginFieldCollection([]),
        trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.STRICT_AOT,
    )


def type_of(dtype: np.dtype[Any]) -> Any:
    """TensorRT's name for the type of a buffer."""
    kinds = {"float16": "HALF", "float32": "FLOAT", "int32": "INT32"}
    return getattr(trt.DataType, kinds[dtype.name])


def describe(shape: tuple[int, ...], dtype: Any, *, dynamic: int = 0) -> Any:
    """``DynamicPluginTensorDesc`` whose first sizes are not known at build."""
    found = trt.DynamicPluginTensorDesc()
    found.desc.dims = (*[-1] * dynamic, *shape[dynamic:])
    found.desc.type, found.desc.format = dtype, trt.TensorFormat.LINEAR
    found.min = found.opt = found.max = shape
    return found


def compare_launch(
    wanted: WantedLaunch, code: Ptx, launch: Any, numbers: Numbers, kernel: tuple[str, bytes]
) -> Iterator[str]:
    """What is wrong with the launch that a plugin gave TensorRT."""
    expected = {
        **dict(zip(("grid_x", "grid_y", "grid_z"), wanted.grid, strict=True)),
        "block_x": code.threads,
        "shared_mem": code.shared_bytes,
        **dict.fromkeys(("block_y", "block_z"), 1),
    }
    found = {key: each.expr.value for key, each in vars(launch).items()}
    if found != expected:
        yield f"the launch is {found}, not {expected}"
    given = [numbers[place].expr.value for place in range(numbers.nbSymExprs)]
    counts = [each for each in wanted.arguments if isinstance(each, int)]
    if given != counts:
        yield f"the numbers are {given}, not {counts}"
    if any(numbers[place].dtype != trt.PluginArgDataType.INT32 for place in numbers):
        yield "not all numbers are INT32"
    if kernel != (code.entry, code.text.encode()):
        yield f"the kernel is {kernel}"


def problems_of(case: tuple[int, int, int, int, int, int, bool], ptx: dict[str, Ptx]) -> list[str]:
    """Ask a new plugin about one product; what is wrong with its answers."""
    batch, seq, depth, columns, group, planes, bias = case
    made = make(PRODUCT)
    half, word = trt.DataType.HALF, trt.DataType.INT32
    shapes = (
        (batch, seq, depth),
        (depth // 32, planes, columns, 4),
        (depth // group, columns),
        (columns if bias else 1,),
    )
    types = (half, word, half, half)
    sizes = Sizes()
    found = list(made.get_output_data_types(list(types), [len(shape) for shape in shapes]))
    if found != [half]:
        return [f"the output is {found}"]
    # The weights' sizes are known when the engine is built, those of the step are not.
    inputs = [
        [Size(size, constant=place > 0 or axis > 1) for axis, size in enumerate(shape)]
        for place, shape in enumerate(shapes)
    ]
    (output,) = made.get_output_shapes(inputs, [], sizes)
    if [size.value for size in output] != [batch, seq, columns]:
        return [f"the output's shape is {[size.value for size in output]}"]
    ports = [
        describe(shape, dtype, dynamic=0 if place else 2)
        for place, (shape, dtype) in enumerate(zip(shapes, types, strict=True))
    ]
    ports.append(describe((batch, seq, columns), half, dynamic=2))
    combinations = made.get_supported_format_combinations(ports, 4)
    taken = [(each.type, each.format) for each in combinations]
    if taken != [(each, trt.TensorFormat.LINEAR) for each in (*types, half)]:
        return [f"the formats are {taken}"]
    made.configure_plugin(ports[:4], ports[4:])
    tactics = w4_tactics(planes)
    if sorted(made.get_valid_tactics()) != list(range(1, len(tactics) + 1)):
        return [f"the tactics are {made.get_valid_tactics()}"]
    problems: list[str] = []
    for number, tactic in enumerate(tactics, 1):
        made.set_tactic(number)
        launch, numbers = Launch(), Numbers()
        made.get_launch_params(inputs, ports, 4, launch, numbers, sizes)
        kernel = made.get_kernel([port.desc for port in ports[:4]], [ports[4].desc])
        # Of one column without a bias the plugin adds a zero.
        job = product(tactic, batch * seq, columns, depth, group=group, bias=bias or columns == 1)
        code = ptx[tactic.variant.name]
        problems += compare_launch(job.launches[0], code, launch, numbers, kernel)
    return problems


def main() -> int:
    """Register the plugin twice and ask it about every case; 1 if an answer is wrong."""
    module = load_module()
    ptx = {
        tactic.variant.name: Ptx(f"PTX of {tactic.variant.name}", f"entry{place}", 128, 512 * place)
        for planes in (1, 2)
        for place, tactic in enumerate(w4_tactics(planes))
    }
    for _ in range(2):
        plugin.register(module, ptx, element_types(trt))
    failed = False
    for case in CASES:
        for problem in problems_of(case, ptx):
            failed = True
            print(f"{case}: {problem}", file=sys.stderr)
    asked = sum(len(w4_tactics(case[5])) for case in CASES)
    print(f"TensorRT {trt.__version__}: the plugin is taken, {asked} launches")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
