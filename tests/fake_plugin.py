"""A stand-in for ``tensorrt.plugin``: what the builder asks a plugin, with sizes that are numbers.

NVIDIA's own module holds our plugin against its rules in ``scripts/trt-bindings``; this one keeps
no more of them than a build needs, and lets a plugin be built and run by `fake_builder`.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_NAMES = {"HALF": "FP16", "FLOAT": "FP32", "INT32": "INT32"}


class TensorDesc:
    """A tensor; its sizes are known. Its type is a ``DataType``."""

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self.shape_expr = self.shape = shape
        self.dtype = dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)


@dataclass(frozen=True)
class AutoTuneCombination:
    io_types: str
    layouts: str
    tactics: list[int]


@dataclass(frozen=True)
class KernelLaunchParams:
    grid_x: int = 1
    grid_y: int = 1
    grid_z: int = 1
    block_x: int = 1
    block_y: int = 1
    block_z: int = 1
    shared_mem: int = 0


class SymExprs(tuple[int, ...]):
    @classmethod
    def from_tuple(cls, numbers: tuple[int, ...]) -> SymExprs:
        return cls(map(int, numbers))


@dataclass
class Registered:
    """The functions of a plugin."""

    describe: Callable[..., Any] | None = None
    tune: Callable[..., list[AutoTuneCombination]] | None = None
    implement: Callable[..., Any] | None = None


@dataclass
class Plugins:
    """All plugins of a process, by ``namespace::name``, and the module that they come through."""

    known: dict[str, Registered] = field(default_factory=dict)

    def module(self) -> Any:
        """``tensorrt.plugin``, for ``sys.modules``."""
        module: Any = types.ModuleType("tensorrt.plugin")
        for each in (TensorDesc, AutoTuneCombination, KernelLaunchParams, SymExprs):
            setattr(module, each.__name__, each)
        module.SymIntExprs = SymExprs
        module.cdiv = lambda first, second: -(-first // second)
        module.min, module.max = min, max
        module.from_shape_expr = lambda shape, dtype: TensorDesc(tuple(shape), dtype)
        module.op = types.SimpleNamespace()
        module.register = self._decorator("describe", module.op)
        module.autotune = self._decorator("tune", module.op)
        module.aot_impl = self._decorator("implement", module.op)
        return module

    def _decorator(self, part: str, op: Any) -> Callable[[str], Callable[[Any], Any]]:
        def decorator(plugin_id: str) -> Callable[[Any], Any]:
            def keep(function: Any) -> Any:
                namespace, name = plugin_id.split("::")
                if part == "describe":
                    assert plugin_id not in self.known, "registered twice"
                    self.known[plugin_id] = Registered()
                    if not hasattr(op, namespace):
                        setattr(op, namespace, types.SimpleNamespace())
                    setattr(getattr(op, namespace), name, True)
                setattr(self.known[plugin_id], part, function)
                return function

            return keep

        return decorator

    def ask(self, plugin_id: str, inputs: list[TensorDesc]) -> tuple[TensorDesc, ...]:
        """Ask for the launches of all tactics for tensors of these shapes; returns the outputs."""
        found = self.known[plugin_id]
        assert found.describe is not None
        assert found.tune is not None
        assert found.implement is not None
        described = found.describe(*inputs)
        outputs = described if isinstance(described, tuple) else (described,)
        (combination,) = found.tune(*inputs, outputs)
        types = ", ".join(_NAMES[each.dtype.name] for each in (*inputs, *outputs))
        assert combination.io_types == types
        for tactic in combination.tactics:
            entry, text, launch, _ = found.implement(*inputs, outputs, tactic)
            assert f".entry {entry}" in text, "the PTX has no such function"
            assert min(launch.grid_x, launch.grid_y, launch.grid_z, launch.block_x) >= 1
        return outputs


PLUGINS = Plugins()
"""Those of this process; a test empties it."""
