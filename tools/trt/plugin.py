"""Checks whether NVIDIA's own code takes our plugins, and which launches it makes of them.

``tensorrt.plugin`` is plain Python in the bindings of TensorRT: it checks the signatures of a
plugin, and asks it as the builder does. It needs only the registry of plugins and arithmetic on
sizes from the libraries; stand-ins here replace both, and every rule is NVIDIA's. `bindings`
runs this once per version, over an unpacked wheel and stub libraries.
"""

from __future__ import annotations

import importlib
import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import tensorrt_bindings as trt

from edge.backends.tensorrt.launch_rules import NAMESPACE, PluginRule
from engines.kernels import plugin
from engines.kernels.launch import Launch as WantedLaunch
from engines.kernels.own_plugins import element_types, fitting_tactics
from engines.kernels.package import Ptx
from engines.kernels.variants import BY_NAME

from .plugin_cases import MOVING, Case, make_cases


class Registry:
    """Stands in for the registry of plugins, which is in the library."""

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
        """Return all creators."""
        return list(self._creators.values())

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        """Find a creator."""
        return self._creators[name, version, namespace]


class Size:
    """Stands in for ``IDimensionExpr``: a number that may or may not be known at build."""

    def __init__(self, value: int, *, constant: bool) -> None:
        self.value, self._constant = value, constant

    def is_constant(self) -> bool:
        """Return whether it is known when the engine is built."""
        return self._constant

    def get_constant_value(self) -> int:
        """Return the number, if it is known."""
        assert self._constant
        return self.value


class Sizes:
    """Stands in for ``IExprBuilder``."""

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
        """Make a number that is known."""
        return Size(value, constant=True)

    def operation(self, kind: Any, first: Size, second: Size) -> Size:
        """Compute a number from two."""
        known = first.is_constant() and second.is_constant()
        return Size(self._operations[kind](first.value, second.value), constant=known)


class Launch:
    """Stands in for ``IKernelLaunchParams``: takes whatever is set."""


class Numbers(dict[int, Any]):
    """Stands in for ``ISymExprs``."""

    nbSymExprs = 0  # noqa: N815 - NVIDIA's name


def load_module() -> Any:
    """Import the module ``tensorrt.plugin`` over the stand-ins."""
    registry = Registry()
    trt.get_plugin_registry = lambda: registry
    sys.modules["tensorrt"] = trt
    module = importlib.import_module("tensorrt_bindings.plugin")
    trt.IDimensionExpr, trt.DimsExprs = Size, lambda length: [None] * length
    tensor = importlib.import_module("tensorrt_bindings.plugin._tensor")
    # In the library these can only be written.
    tensor.SymExprImpl.expr = tensor.SymExprImpl.dtype = tensor.SymExprImpl.type = None
    return module


def make(rule: PluginRule) -> Any:
    """Make a new plugin of a rule, by the creator that is registered."""
    creator = trt.get_plugin_registry().get_creator(rule.name, "1", NAMESPACE)
    return creator.create_plugin(
        rule.name,
        NAMESPACE,
        trt.PluginFieldCollection([]),
        trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.STRICT_AOT,
    )


def types_of(case: Case, names: Iterable[str]) -> list[Any]:
    """Return TensorRT's names for the types of tensors."""
    kinds = {"float16": "HALF", "float32": "FLOAT", "int32": "INT32"}
    return [getattr(trt.DataType, kinds[case.tensors[name][1].name]) for name in names]


def sizes_of(case: Case) -> list[list[Size]]:
    """Return the shapes of the inputs."""
    moving = MOVING[case.rule]
    return [
        [
            Size(size, constant=axis not in moving.get(name, ()))
            for axis, size in enumerate(case.tensors[name][0])
        ]
        for name in case.rule.inputs
    ]


def describe(sizes: Sequence[Size], dtype: Any) -> Any:
    """Make a ``DynamicPluginTensorDesc``."""
    found = trt.DynamicPluginTensorDesc()
    found.desc.dims = [size.value if size.is_constant() else -1 for size in sizes]
    found.desc.type, found.desc.format = dtype, trt.TensorFormat.LINEAR
    found.min = [size.value if size.is_constant() else 1 for size in sizes]
    found.opt = found.max = [size.value for size in sizes]
    return found


def problems_of_shapes(case: Case, outputs: Iterable[Sequence[Size]]) -> Iterator[str]:
    """Yield what is wrong with the shapes that a plugin gave its outputs."""
    given = [tuple(size.value for size in output) for output in outputs]
    if given != [case.tensors[name][0] for name in case.rule.outputs]:
        yield f"the outputs' shapes are {given}"
    if not all(output[-1].is_constant() for output in outputs):
        yield "the last size of an output is not known when the engine is built"


def fitting(case: Case) -> list[int]:
    """Return the tactics of a profile whose usual and largest step is a case's."""
    shapes = [case.tensors[name][0] for name in case.rule.inputs]
    return list(fitting_tactics(case.rule, shapes, shapes))


def compare_launch(
    wanted: WantedLaunch, code: Ptx, launch: Any, numbers: Numbers, kernel: tuple[str, bytes]
) -> Iterator[str]:
    """Yield what is wrong with the launch that a plugin gave TensorRT."""
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


def problems_of(case: Case, ptx: dict[str, Ptx]) -> Iterator[str]:
    """Ask a new plugin about a case; yield what is wrong with its answers."""
    made = make(case.rule)
    reads, writes = types_of(case, case.rule.inputs), types_of(case, case.rule.outputs)
    inputs = sizes_of(case)
    found = list(made.get_output_data_types(reads, [len(sizes) for sizes in inputs]))
    if found != writes:
        yield f"the outputs are {found}"
    outputs = made.get_output_shapes(inputs, [], Sizes())
    yield from problems_of_shapes(case, outputs)
    ports = list(map(describe, [*inputs, *outputs], [*reads, *writes]))
    combinations = made.get_supported_format_combinations(ports, len(reads))
    taken = [(each.type, each.format) for each in combinations]
    if taken != [(each, trt.TensorFormat.LINEAR) for each in (*reads, *writes)]:
        yield f"the formats are {taken}"
        return
    made.configure_plugin(ports[: len(reads)], ports[len(reads) :])
    if sorted(made.get_valid_tactics()) != fitting(case):
        yield f"the tactics are {made.get_valid_tactics()}, not {fitting(case)}"
    descriptions = [port.desc for port in ports]
    for number, wanted in enumerate(case.launches, 1):
        made.set_tactic(number)
        launch, numbers = Launch(), Numbers()
        made.get_launch_params(inputs, ports, len(reads), launch, numbers, Sizes())
        kernel = made.get_kernel(descriptions[: len(reads)], descriptions[len(reads) :])
        yield from compare_launch(wanted, ptx[wanted.variant.name], launch, numbers, kernel)


def main() -> int:
    """Register the plugins twice and ask them about every case; return 1 if an answer is wrong."""
    module = load_module()
    ptx = {
        name: Ptx(f"PTX of {name}", f"entry{place}", 128, 512 * place)
        for place, name in enumerate(BY_NAME)
    }
    for _ in range(2):
        plugin.register(module, ptx, element_types(trt))
    cases = list(make_cases())
    failed = False
    for case in cases:
        for problem in problems_of(case, ptx):
            failed = True
            print(f"{case}: {problem}", file=sys.stderr)
    asked = sum(len(case.launches) for case in cases)
    print(f"TensorRT {trt.__version__}: the plugins in the engine are taken, {asked} launches")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
