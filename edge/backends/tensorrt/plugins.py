"""Provides own kernels to an engine as plugins whose kernels Python launches.

From 10.13 on TensorRT compiles own kernels into an engine by itself (`engines.kernels.plugin`).
Before that, and if a build asks for it (``--plugins python``), a plugin (``IPluginV3``) launches
its kernel. The kernels come from ``engine.json`` (`plugin_kernels`), and their launches are in
`launch_rules`. This module has the methods that TensorRT calls to run them;
`engines.kernels.plugin_v3` adds those that it calls while it builds. Steps are replayed as CUDA
graphs, so their launches pass through Python only when they are captured.

This relies on facts about TensorRT 10.3:

- NvInferRuntime.h: a plugin of the runtime phase has only a core and a runtime part. Each execution
  context attaches a clone of it. ``onShapeChange`` comes before an ``enqueue`` with other shapes.
  Tactic 0 is none of the plugin's own.
- pyPlugin.cpp: functions are called with the GIL, which ``execute_async_v3`` has released
  (pyCore.cpp). Their exceptions are printed and become -1, so they are kept here to be raised
  again. A collection of fields has bare addresses of their data, and the registry has one of the
  creator. TensorRT destroys plugins: one that Python drops is freed twice. ``enqueue`` gets as many
  inputs and outputs as ``onShapeChange`` of the same plugin had (``mNbOutputs``).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from edge.backends.cuda.kernels import ForeignStream, Kernel
from edge.bundle.engine_file import EngineInfo
from edge.errors import DependencyError

from .launch_rules import NAMESPACE, NUMBERS, PLUGINS, PluginRule
from .plugin_kernels import OwnKernels, number_of, unpack

VERSION = "v3"
"""Version of these plugins; those compiled into engines have another (`engines.kernels.plugin`).
"""
KERNELS_FIELD = "kernels"
"""Names the field of a plugin in a plan, an INT32: `number_of` its kernels. In a graph the rule's
attribute takes its place."""
_SWITCH_S = 0.0005
"""Longest time for which another thread may hold the interpreter while a step calls it for every
plugin. Python's own 5 ms are as long as a decode step."""
T = TypeVar("T")


class KeptError(Exception):
    """Stands for an error that `raise_failure` raises; TensorRT's bindings see and print this."""


def told(function: Callable[..., T]) -> Callable[..., T]:
    """Keep exceptions of a function that TensorRT calls; its object has the `OwnKernels`."""

    @functools.wraps(function)
    def call(plugin: Any, *args: Any) -> T:
        try:
            return function(plugin, *args)
        except BaseException as error:  # noqa: BLE001 - C++ would only print it
            plugin.own_kernels.keep(error)
            raise KeptError(str(error)) from None

    return call


@functools.cache
def plugin_class(trt: Any, rule: PluginRule) -> Any:
    """Make the class of a plugin with ``packed`` kernels and the process's `OwnKernels`.

    Args:
        trt: the module ``tensorrt``.
        rule: rule of the plugin.
    """

    class Plugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneRuntime):  # type: ignore[misc]
        def __init__(self, packed: bytes, own_kernels: OwnKernels) -> None:
            trt.IPluginV3.__init__(self)
            trt.IPluginV3OneCore.__init__(self)
            trt.IPluginV3OneRuntime.__init__(self)
            self.plugin_name, self.plugin_version = rule.name, VERSION
            self.plugin_namespace = NAMESPACE
            self.packed, self.own_kernels = packed, own_kernels
            self.chosen_tactic = 1  # every tactic is right for any shapes
            self.loaded: tuple[Kernel, ...] = ()
            # For each tactic and the shapes of the last call: programs and numbers.
            self.launches: list[tuple[tuple[int, int, int], tuple[tuple[int, bool], ...]]] = []
            # The fields have its address.
            self._number = np.array([number_of(packed)], np.int32)
            field = trt.PluginField(KERNELS_FIELD, self._number, trt.PluginFieldType.INT32)
            self._fields = trt.PluginFieldCollection([field])

        def get_capability_interface(self, type: Any) -> Any:
            return self

        def load(self) -> None:
            if not self.loaded:
                self.loaded = self.own_kernels.load(self.packed)

        @told
        def clone(self) -> Any:
            copy = self.__class__(self.packed, self.own_kernels)
            copy.chosen_tactic, copy.loaded = self.chosen_tactic, self.loaded
            copy.launches = self.launches
            return copy

        @told
        def attach_to_context(self, resource_context: Any) -> Any:
            self.load()  # the driver cannot load while a CUDA graph is captured
            return self.clone()

        @told
        def set_tactic(self, tactic: int) -> None:
            self.chosen_tactic = max(tactic, 1)

        @told
        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            self.load()  # a builder attaches no plugin
            shapes = [tuple(each.dims) for each in inputs]
            self.launches = []
            for each in unpack(self.packed):
                grid, numbers = rule.launch(shapes, each, NUMBERS)
                self.launches.append((grid, tuple((int(number), False) for number in numbers)))

        @told
        def get_fields_to_serialize(self) -> Any:
            return self._fields

        @told
        def enqueue(
            self,
            input_desc: Sequence[Any],
            output_desc: Sequence[Any],
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> None:
            grid, numbers = self.launches[self.chosen_tactic - 1]
            values = (
                *((address, True) for address in inputs),
                *numbers,
                *((address, True) for address in outputs),
            )
            self.loaded[self.chosen_tactic - 1].launch(ForeignStream(stream), grid, values)

    return Plugin


_registered: dict[Any, OwnKernels] = {}
_creators: list[Any] = []  # TensorRT has their bare addresses, so they stay until the process ends


def raise_failure(trt: Any) -> None:
    """Raise an error that a plugin raised since the last call; TensorRT itself does not report it.

    Args:
        trt: the module ``tensorrt``; without `register` nothing can have failed.

    Raises:
        EdgeError: the GPU or a plugin failed.
    """
    if trt in _registered:
        _registered[trt].raise_failure()


def register(trt: Any) -> OwnKernels:
    """Register the plugins with TensorRT, once per process.

    Args:
        trt: the module ``tensorrt``.

    Raises:
        DependencyError: it takes no such plugin, or cuda-bindings is missing.
    """
    if trt in _registered:
        return _registered[trt]
    cure = "take TensorRT of JetPack 6 or newer, or build the engine with --kernels tensorrt"
    if not hasattr(trt, "IPluginV3"):
        raise DependencyError(
            f"own kernels need plugins in Python, which TensorRT {trt.__version__} does not have; "
            f"{cure}"
        )
    own_kernels = OwnKernels()
    own_kernels.check()
    for rule in PLUGINS:
        _creators.append(_creator_class(trt)(rule, own_kernels))
        if not trt.get_plugin_registry().register_creator(_creators[-1], NAMESPACE):
            raise DependencyError(
                f"TensorRT {trt.__version__} did not register the plugin {rule.name} of own "
                f"kernels; {cure}"
            )
    _registered[trt] = own_kernels
    return own_kernels


def register_kernels(trt: Any, info: EngineInfo) -> None:
    """Prepare TensorRT to load an engine: register its kernels if Python launches them.

    Args:
        trt: the module ``tensorrt``.
        info: the engine's ``engine.json``.

    Raises:
        DependencyError: `register` finds that TensorRT or cuda-bindings do not fit.
        BundleError: the kernels are damaged.
    """
    if info.plugins == "python":
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_S))
        own_kernels = register(trt)
        for packed in info.python_kernels:
            own_kernels.add(packed)


@functools.cache
def _creator_class(trt: Any) -> Any:
    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self, rule: PluginRule, own_kernels: OwnKernels) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = rule.name, VERSION, NAMESPACE
            self.rule, self.own_kernels = rule, own_kernels
            none = np.empty(0, np.int32)
            field = trt.PluginField(rule.attribute, none, trt.PluginFieldType.INT32)
            self.field_names = trt.PluginFieldCollection([field])

        @told
        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            values = {field.name: field.data for field in fields}
            if phase == trt.TensorRTPhase.BUILD:
                value = int(values[self.rule.attribute][0])
                return self.own_kernels.for_build(self.rule, value)
            packed = self.own_kernels.find(int(values[KERNELS_FIELD][0]))
            return plugin_class(trt, self.rule)(packed, self.own_kernels)

    return Creator
