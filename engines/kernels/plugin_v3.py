"""Adds to the plugins of `edge.backends.tensorrt.plugins` what builds before 10.13 need.

Their tactics are those of the plugins that are compiled into engines (`plugin`), in the same order.
An attribute in the graph says which variants of a kernel a plugin has, because everything about a
plugin must be known when it is created: what it serializes, and how TensorRT finds its timings
again (NvInferRuntime.h of 10.3, ``getTimingCacheID``).
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from edge.backends.tensorrt import plugins
from edge.backends.tensorrt.launch_rules import Arithmetic, PluginRule
from edge.backends.tensorrt.plugin_kernels import OwnKernels, PluginKernel, pack, unpack
from edge.backends.tensorrt.plugins import plugin_class, told
from edge.errors import DeviceError

from .own_plugins import TACTICS, element_types, fitting_tactics
from .package import Cubin, Ptx

_log = logging.getLogger(__name__)

Kernels = Mapping[str, Ptx] | Mapping[str, Cubin]
_packs: WeakKeyDictionary[OwnKernels, Callable[[str, int], bytes]] = WeakKeyDictionary()
_TACTICS = {rule.name: tactics for rule, tactics in TACTICS.items()}


def register(trt: Any, kernels: Kernels, ptx: Mapping[str, Ptx]) -> None:
    """Register the plugins with TensorRT, for builds as well as for running.

    Args:
        trt: the module ``tensorrt``.
        kernels: machine code by variant, from `package.load_cubins`; empty if the GPU has none.
        ptx: code to use if the driver loads none of these, from `package.load_ptx`.

    Raises:
        DependencyError: this TensorRT cannot use such plugins, or cuda-bindings is missing.
    """
    own_kernels = plugins.register(trt)

    @functools.cache
    def pack_of(name: str, value: int) -> bytes:
        packed = _pack(name, value, kernels)
        if own_kernels.in_context:
            try:
                own_kernels.load(packed)
            except DeviceError as error:
                _log.warning("%s is compiled by the driver at each start instead: %s", name, error)
                packed = _pack(name, value, ptx)
        own_kernels.add(packed)
        return packed

    def make(rule: PluginRule, value: int) -> Any:
        return _build_class(trt, rule)(pack_of(rule.name, value), own_kernels)

    own_kernels.for_build = make
    _packs[own_kernels] = pack_of


def registered_kernels(trt: Any, used: Iterable[tuple[str, int]]) -> tuple[bytes, ...]:
    """Return the kernels of plugins as they were built.

    Args:
        trt: the module ``tensorrt``, after `register`.
        used: name and attribute value of each plugin.
    """
    pack_of = _packs[plugins.register(trt)]
    return tuple(pack_of(name, value) for name, value in sorted(used))


def pack_kernels(used: Iterable[tuple[str, int]], kernels: Kernels) -> tuple[bytes, ...]:
    """Pack the kernels of plugins; a tactic's number is its place plus one.

    Args:
        used: name and attribute value of each plugin.
        kernels: kernels by variant.
    """
    return tuple(_pack(name, value, kernels) for name, value in sorted(used))


def _pack(name: str, value: int, kernels: Kernels) -> bytes:
    found = []
    for tactic in _TACTICS[name](value):
        kernel = kernels[tactic.variant.name]
        found.append(
            PluginKernel(
                kernel.text if isinstance(kernel, Ptx) else "",
                kernel.entry,
                kernel.threads,
                kernel.shared_bytes,
                tactic.rows,
                tactic.columns,
                kernel.image if isinstance(kernel, Cubin) else b"",
            )
        )
    return pack(found)


class _Size:
    """An ``IDimensionExpr`` with operators; TensorRT has only ``IExprBuilder`` for them."""

    def __init__(self, trt: Any, builder: Any, expression: Any) -> None:
        self._trt, self._builder, self.expression = trt, builder, expression

    def with_(self, operation: Any, other: _Size | int) -> _Size:
        """Apply a ``DimensionOperation`` to this size and another."""
        second = other.expression if isinstance(other, _Size) else self._builder.constant(other)
        made = self._builder.operation(operation, self.expression, second)
        return _Size(self._trt, self._builder, made)

    def __mul__(self, other: _Size | int) -> _Size:
        return self.with_(self._trt.DimensionOperation.PROD, other)


def _symbols(trt: Any) -> Arithmetic:
    kinds = trt.DimensionOperation
    return Arithmetic(
        lambda first, second: first.with_(kinds.CEIL_DIV, second),
        lambda first, second: first.with_(kinds.MAX, second),
        lambda first, second: first.with_(kinds.MIN, second),
    )


@functools.cache
def _build_class(trt: Any, rule: PluginRule) -> Any:
    types, symbols = element_types(trt), _symbols(trt)
    kinds = [types[kind] for kind in (*rule.inputs.values(), *rule.outputs.values())]

    class BuildPlugin(plugin_class(trt, rule), trt.IPluginV3OneBuild):  # type: ignore[misc]
        def __init__(self, packed: bytes, own_kernels: OwnKernels) -> None:
            super().__init__(packed, own_kernels)
            trt.IPluginV3OneBuild.__init__(self)
            self.num_outputs = len(rule.outputs)
            self.tactics = tuple(place + 1 for place, _ in enumerate(unpack(packed)))
            # Without it TensorRT would time every layer, even those of the same shapes.
            self.timing_cache_id = hashlib.sha256(packed).hexdigest()

        @told
        def clone(self) -> Any:
            copy = super().clone()
            copy.tactics = self.tactics
            return copy

        @told
        def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
            return kinds[len(rule.inputs) :]

        @told
        def get_output_shapes(self, inputs: Any, shape_inputs: Any, builder: Any) -> list[Any]:
            shapes = [
                tuple(_Size(trt, builder, each[axis]) for axis in range(len(each)))
                for each in inputs
            ]
            return [
                trt.DimsExprs(
                    [
                        size.expression if isinstance(size, _Size) else builder.constant(size)
                        for size in shape
                    ]
                )
                for shape in rule.output_shapes(shapes, symbols)
            ]

        @told
        def supports_format_combination(
            self, pos: int, in_out: Sequence[Any], num_inputs: int
        ) -> bool:
            found = in_out[pos].desc
            return bool(found.type == kinds[pos] and found.format == trt.TensorFormat.LINEAR)

        @told
        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            # The next calls may be captured: TensorRT 10.10 was seen to time plugins in a CUDA
            # graph (autowarefoundation/autoware_universe#13158), where the driver loads nothing.
            if self.own_kernels.in_context:
                self.load()
            usual, largest = (
                [tuple(getattr(each, of)) for each in inputs] for of in ("opt", "max")
            )
            self.tactics = fitting_tactics(rule, usual, largest)

        @told
        def get_valid_tactics(self) -> list[int]:
            return list(self.tactics)

    return BuildPlugin
