"""Answers what TensorRT's builder asks about own kernels as plugins, from 10.13 on.

The plugins are compiled ahead of time: TensorRT puts the PTX and the launch rule into the engine,
which then needs neither Python nor a plugin library (NVIDIA's Python API, ``tensorrt.plugin`` and
its ``aot_impl``). They have no attributes: all numbers follow from shapes, so no number has to
survive ONNX, the parser and NumPy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import Parameter, Signature
from types import GenericAlias
from typing import Any
from weakref import WeakKeyDictionary

from edge.backends.tensorrt.launch_rules import NAMESPACE, Arithmetic, PluginRule
from edge.bundle.io_spec import ElementType

from .launch import Tactic
from .own_plugins import TACTICS, fitting_tactics
from .package import Ptx

VERSION = "1"


def register(trtp: Any, ptx: Mapping[str, Ptx], types: Mapping[ElementType, Any]) -> None:
    """Register the plugins with TensorRT, once per process.

    Args:
        trtp: the module ``tensorrt.plugin``.
        ptx: kernels by variant, from `package.load_ptx`.
        types: from `own_plugins.element_types`.
    """
    for rule in TACTICS:
        if not hasattr(getattr(trtp.op, NAMESPACE, None), rule.name):
            _register(trtp, rule, ptx, types)


def _register(
    trtp: Any, rule: PluginRule, ptx: Mapping[str, Ptx], types: Mapping[ElementType, Any]
) -> None:
    symbols = Arithmetic(trtp.cdiv, trtp.max, trtp.min)

    def tactics_of(inputs: Sequence[Any]) -> tuple[Tactic, ...]:
        return TACTICS[rule](int(rule.value_of([each.shape for each in inputs])))

    def describe(*inputs: Any) -> Any:
        shapes = rule.output_shapes([_shape(each) for each in inputs], symbols)
        kinds = rule.outputs.values()
        found = tuple(
            trtp.from_shape_expr(tuple(shape), dtype=types[kind])
            for shape, kind in zip(shapes, kinds, strict=True)
        )
        return found if len(found) > 1 else found[0]

    # Collect the tactics of all profiles: NVIDIA's class keeps only the last answer for a plugin
    # (`_plugin_class.py`), and nothing says in which order it asks about profiles.
    fitting: WeakKeyDictionary[Any, set[int]] = WeakKeyDictionary()

    def tune(*arguments: Any) -> Any:
        *inputs, _ = arguments
        kinds = ", ".join((*rule.inputs.values(), *rule.outputs.values())).upper()
        usual, largest = ([_sizes(each.shape, of) for each in inputs] for of in ("opt", "max"))
        numbers = fitting.setdefault(inputs[0], set())
        numbers.update(fitting_tactics(rule, usual, largest))
        return [trtp.AutoTuneCombination(kinds, "LINEAR", sorted(numbers))]

    def implement(*arguments: Any) -> Any:
        *inputs, _, tactic = arguments
        chosen = tactics_of(inputs)[tactic - 1]
        kernel = ptx[chosen.variant.name]
        (x, y, z), numbers = rule.launch([_shape(each) for each in inputs], chosen, symbols)
        launch = trtp.KernelLaunchParams(
            grid_x=x, grid_y=y, grid_z=z, block_x=kernel.threads, shared_mem=kernel.shared_bytes
        )
        return kernel.entry, kernel.text, launch, trtp.SymIntExprs.from_tuple(numbers)

    # TensorRT reads these signatures and expects its own types in them.
    inputs = dict.fromkeys(rule.inputs, trtp.TensorDesc)
    outputs = GenericAlias(tuple, (trtp.TensorDesc,) * len(rule.outputs))
    text = str | bytes
    combinations = GenericAlias(list, (trtp.AutoTuneCombination,))
    launches = GenericAlias(tuple, (text, text, trtp.KernelLaunchParams, trtp.SymExprs))
    described = outputs if len(rule.outputs) > 1 else trtp.TensorDesc
    _sign(describe, inputs, described)
    _sign(tune, {**inputs, "outputs": outputs}, combinations)
    _sign(implement, {**inputs, "outputs": outputs, "tactic": int}, launches)
    plugin_id = f"{NAMESPACE}::{rule.name}"
    trtp.register(plugin_id)(describe)
    trtp.autotune(plugin_id)(tune)
    trtp.aot_impl(plugin_id)(implement)


def _shape(tensor: Any) -> tuple[Any, ...]:
    return tuple(tensor.shape_expr[axis] for axis in range(tensor.ndim))


def _sizes(shape: Any, of: str) -> tuple[int, ...]:
    return tuple(getattr(shape, of) if shape.is_dynamic else shape)


def _sign(function: Any, arguments: Mapping[str, Any], result: Any) -> None:
    parameters = [
        Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
        for name, kind in arguments.items()
    ]
    function.__signature__ = Signature(parameters, return_annotation=result)
