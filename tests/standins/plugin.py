"""A stand-in for ``tensorrt.plugin``: what the builder asks a plugin, with sizes that are numbers.

NVIDIA's own module holds our plugin against its rules in ``tools/trt-bindings``; this one keeps
no more of them than a build needs, and lets a plugin be built and run by `builder`.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

_NAMES = {"HALF": "FP16", "FLOAT": "FP32", "INT32": "INT32"}


class Shape(tuple[int, ...]):
    """Sizes of which some move in a profile: these are -1."""

    opt: tuple[int, ...]
    max: tuple[int, ...]

    @property
    def is_dynamic(self) -> bool:
        return -1 in self

    @classmethod
    def of(cls, sizes: Sequence[tuple[int, ...]]) -> Shape:
        """Of the least, usual and largest sizes; what does not move has those only."""
        made = cls(size[0] if len(set(size)) == 1 else -1 for size in zip(*sizes, strict=True))
        if made.is_dynamic:
            _, made.opt, made.max = sizes
        return made


class TensorDesc:
    """A tensor; its sizes are known. Its type is a ``DataType``."""

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self.shape_expr = shape
        self.shape = Shape.of([shape])
        self.dtype = dtype

    @property
    def ndim(self) -> int:
        return len(self.shape_expr)


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
    """All plugins of a process, by ``namespace::name``, and the module that they come through.

    Attributes:
        tactics: what was timed, by plugin and the shape of its first input.
    """

    known: dict[str, Registered] = field(default_factory=dict)
    tactics: dict[tuple[str, Shape], tuple[int, ...]] = field(default_factory=dict)

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

    def ask(
        self, plugin_id: str, inputs: Sequence[list[TensorDesc]]
    ) -> list[tuple[TensorDesc, ...]]:
        """Ask for the launches of all tactics of a profile.

        Args:
            plugin_id: namespace and name.
            inputs: tensors of the least, the usual and the largest step.

        Returns:
            The outputs of these steps.
        """
        found = self.known[plugin_id]
        assert found.describe is not None
        assert found.tune is not None
        assert found.implement is not None
        described = [found.describe(*each) for each in inputs]
        outputs = [each if isinstance(each, tuple) else (each,) for each in described]
        asked = [TensorDesc(each.shape_expr, each.dtype) for each in inputs[1]]
        for place, each in enumerate(asked):
            each.shape = Shape.of([step[place].shape_expr for step in inputs])
        (combination,) = found.tune(*asked, outputs[1])
        types = ", ".join(_NAMES[each.dtype.name] for each in (*asked, *outputs[1]))
        assert combination.io_types == types
        for tactic in combination.tactics:
            for reads, writes in zip(inputs, outputs, strict=True):
                entry, text, launch, _ = found.implement(*reads, writes, tactic)
                assert f".entry {entry}" in text, "the PTX has no such function"
                assert min(launch.grid_x, launch.grid_y, launch.grid_z, launch.block_x) >= 1
        self.tactics[plugin_id, asked[0].shape] = tuple(combination.tactics)
        return outputs


PLUGINS = Plugins()
"""Those of this process; a test empties it."""
