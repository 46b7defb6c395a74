"""Checks whether NVIDIA's bindings take the plugins whose kernels Python launches, and how.

The classes and fields are NVIDIA's, and what passes through them is read back in C++. TensorRT's
library, which asks a plugin, is not here. This script asks in its place, and a driver that only
records stands in for CUDA. `bindings` runs this once per version, over an unpacked wheel and
stub libraries.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import types
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import tensorrt_bindings as trt

from edge.backends.tensorrt import plugins
from edge.backends.tensorrt.launch_rules import NAMESPACE, PluginRule
from edge.errors import DeviceError
from engines.kernels import plugin_v3
from engines.kernels.own_plugins import TACTICS, element_types
from engines.kernels.package import Ptx, load_ptx

from .plugin import Registry, Sizes, describe, fitting, problems_of_shapes, sizes_of, types_of
from .plugin_cases import Case, make_cases

_STREAM, _READ, _WRITTEN = 0x5000, range(0x1000, 0x5000, 0x800), range(0x6000, 0x8000, 0x800)


class Driver:
    """Stands in for ``cuda.bindings.driver``; it keeps modules and launches.

    Attributes:
        modules: PTX of each module, with its zero byte.
        launches: arguments of ``cuLaunchKernel``; the function is its module and its name.
    """

    def __init__(self) -> None:
        self.modules: list[bytes] = []
        self.launches: list[tuple[Any, ...]] = []
        self.result = 0

    def module(self) -> Any:
        """The module for ``sys.modules``."""
        module: Any = types.ModuleType("cuda.bindings.driver")
        module.CUresult = types.SimpleNamespace(CUDA_SUCCESS=0)
        modes = types.SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
        module.CUstreamCaptureMode = modes
        module.cuCtxGetCurrent = lambda: (0, 0x77)
        module.cuGetErrorString = lambda _code: (0, b"invalid argument")
        module.cuModuleLoadData = self._load
        module.cuModuleGetFunction = lambda image, name: (0, (image, name))
        module.cuLaunchKernel = self._launch
        return module

    def _load(self, image: bytes) -> tuple[int, bytes]:
        self.modules.append(image)
        return 0, image

    def _launch(self, *arguments: Any) -> tuple[int]:
        self.launches.append(arguments)
        return (self.result,)


def create(rule: PluginRule, fields: Any, phase: Any) -> Any:
    """Make a plugin by NVIDIA's code, which hands our creator the fields as TensorRT has them."""
    registry = trt.get_plugin_registry()
    creator = registry.get_creator(rule.name, plugins.VERSION, NAMESPACE)
    made = trt.IPluginCreatorV3One.create_plugin(creator, "layers.0.qkv", fields, phase)
    return owned(made)


def owned(made: Any) -> Any:
    """Keep a plugin for good: TensorRT destroys it, and one that Python drops crashes."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(made))
    return made


def problems_of_build(case: Case, made: Any) -> Iterator[str]:
    """Ask a plugin as a builder does; yield what is wrong."""
    rule = case.rule
    reads, writes = types_of(case, rule.inputs), types_of(case, rule.outputs)
    core = made.plugin_name, made.plugin_version, made.plugin_namespace, made.num_outputs
    if core != (rule.name, plugins.VERSION, NAMESPACE, len(writes)):
        yield f"the core is {core}"
    for part in (trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
        if not isinstance(made.get_capability_interface(trt.PluginCapabilityType.CORE), part):
            yield f"it is no {part}"
    if len(made.timing_cache_id) != 64:
        yield f"the timing cache's ID is {made.timing_cache_id}"
    if made.get_output_data_types(reads) != writes:
        yield "the outputs' types are other ones"
    inputs = sizes_of(case)
    outputs = made.get_output_shapes(inputs, [], Sizes())
    yield from problems_of_shapes(case, outputs)
    kinds = [*reads, *writes]
    for place in range(len(kinds)):
        for dtype in element_types(trt).values():
            for form in (trt.TensorFormat.LINEAR, trt.TensorFormat.HWC):
                ports = list(map(describe, [*inputs, *outputs], kinds))
                ports[place].desc.type, ports[place].desc.format = dtype, form
                wanted = (dtype, form) == (kinds[place], trt.TensorFormat.LINEAR)
                if made.supports_format_combination(place, ports, len(reads)) != wanted:
                    yield f"port {place} of {dtype} and {form} is not judged right"
    ports = list(map(describe, [*inputs, *outputs], kinds))
    if made.get_valid_tactics() != list(range(1, len(case.launches) + 1)):
        yield f"before a profile the tactics are {made.get_valid_tactics()}"
    made.configure_plugin(ports[: len(reads)], ports[len(reads) :])
    if made.get_valid_tactics() != fitting(case) or owned(made.clone()).tactics != made.tactics:
        yield f"the tactics are {made.get_valid_tactics()}, not {fitting(case)}"


def problems_of_run(case: Case, fields: Any, ptx: dict[str, Ptx], cuda: Driver) -> Iterator[str]:
    """Make a plugin from a plan's fields, and run it by each tactic; yield what is wrong."""
    made = create(case.rule, fields, trt.TensorRTPhase.RUNTIME)
    if isinstance(made, trt.IPluginV3OneBuild):
        yield "a plugin of a plan can build"
    reads, writes = _ports(case, case.rule.inputs), _ports(case, case.rule.outputs)
    given, taken = list(_READ[: len(reads)]), list(_WRITTEN[: len(writes)])
    for number, launch in enumerate(case.launches, 1):
        attached = owned(made.attach_to_context(None))
        attached.set_tactic(number)
        attached.on_shape_change(reads, writes)
        loaded = len(cuda.modules)
        attached.enqueue(reads, writes, given, taken, 0, _STREAM)
        if len(cuda.modules) != loaded:
            yield "a kernel is loaded where a CUDA graph may be captured"
        kernel = ptx[launch.variant.name]
        numbers = launch.arguments[len(reads) : -len(writes)]
        values = (*given, *numbers, *taken)
        function, *found = cuda.launches.pop()
        wanted = [*launch.grid, kernel.threads, 1, 1, kernel.shared_bytes, _STREAM]
        if found[:8] != wanted or found[8][0] != values or found[9] != 0:
            yield f"the launch is {found}, not {wanted} with {values}"
        kinds = [("c_void_p", given), ("c_int", numbers), ("c_void_p", taken)]
        passed = [kind for kind, some in kinds for _ in some]
        if [each.__name__ for each in found[8][1]] != passed:
            yield f"the parameters are {found[8][1]}"
        if function != (kernel.text.encode() + b"\0", kernel.entry.encode()):
            yield f"the kernel is {function[1]} of {len(function[0])} bytes"


def problems_of_errors(case: Case, cuda: Driver) -> Iterator[str]:
    """Check that a function's exception, which TensorRT would at most print, comes back."""
    made = owned(plugins.register(trt).for_build(case.rule, case.value))
    ports = _ports(case, case.rule.inputs)
    cuda.result = 1
    try:
        made.on_shape_change(ports, [])
        made.enqueue(ports, [], list(_READ[: len(ports)]), [_WRITTEN[0]], 0, _STREAM)
        yield "a launch that fails is no error"
    except plugins.KeptError:
        cuda.result = 0
    try:
        plugins.raise_failure(trt)
        yield "an error of a plugin is lost"
    except DeviceError:
        plugins.raise_failure(trt)


def _ports(case: Case, names: Collection[str]) -> list[Any]:
    """Make the ``PluginTensorDesc`` of tensors."""
    found = [trt.PluginTensorDesc() for _ in names]
    for port, name in zip(found, names, strict=True):
        port.dims, port.format = case.tensors[name][0], trt.TensorFormat.LINEAR
    return found


def main() -> int:
    """Register the plugins twice and ask them about every case; return 1 if an answer is wrong."""
    registry, cuda = Registry(), Driver()
    trt.get_plugin_registry = lambda: registry
    sys.modules["cuda.bindings.driver"] = cuda.module()
    dims_exprs, trt.DimsExprs = trt.DimsExprs, list  # only the library makes its sizes
    ptx = load_ptx()
    for _ in range(2):
        plugin_v3.register(trt, ptx, ptx)
    problems: list[str] = []
    for creator, rule in zip(registry.creators, TACTICS, strict=True):
        if [field.name for field in creator.field_names] != [rule.attribute]:
            problems.append(f"of {rule.name} the parser looks for other attributes")
    cases = list(make_cases())
    for case in cases:
        value = np.array([case.value], np.int32)
        field = trt.PluginField(case.rule.attribute, value, trt.PluginFieldType.INT32)
        fields = trt.PluginFieldCollection([field])
        made = create(case.rule, fields, trt.TensorRTPhase.BUILD)
        problems += [f"{case}: {each}" for each in problems_of_build(case, made)]
        fields = owned(made.clone()).get_fields_to_serialize()
        gc.collect()
        _churn = [np.zeros(1, np.int32) for _ in range(4096)]  # overwrite what nothing keeps alive
        problems += [f"{case}: {each}" for each in problems_of_run(case, fields, ptx, cuda)]
    problems += problems_of_errors(cases[0], cuda)
    if len(cuda.modules) != len(set(cuda.modules)):
        problems.append("a kernel is loaded twice")
    trt.DimsExprs = dims_exprs
    asked = sum(len(case.launches) for case in cases)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"TensorRT {trt.__version__}: the plugins of Python are taken, {asked} launches")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
