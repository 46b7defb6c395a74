"""Do NVIDIA's bindings take the plugin whose kernels Python launches, and what does it launch?

The classes and fields are NVIDIA's, and what passes through them is read back in C++. What asks a
plugin is in TensorRT's library, which is not here: this asks in its place, and a driver that keeps
what it is given stands in for CUDA. `trt_bindings.py` runs this once per version, over an unpacked
wheel and stub libraries.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorrt_bindings as trt

from edge.backends.tensorrt import plugins
from edge.errors import DeviceError
from engines.kernels import plugin_v3
from engines.kernels.launch import product, w4_tactics
from engines.kernels.package import Ptx, load_ptx

from .trt_plugin import CASES, Registry, Size, Sizes, describe

_STREAM, _ADDRESSES, _OUTPUT = 0x5000, [0x1000, 0x2000, 0x3000, 0x4000], 0x6000


class Driver:
    """``cuda.bindings.driver``, which keeps modules and launches.

    Attributes:
        modules: PTX of each, with its zero byte.
        launches: arguments of ``cuLaunchKernel``; the function is its module and its name.
    """

    def __init__(self) -> None:
        self.modules: list[bytes] = []
        self.launches: list[tuple[Any, ...]] = []
        self.result = 0

    def module(self) -> Any:
        """For ``sys.modules``."""
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


def create(fields: Any, phase: Any) -> Any:
    """A plugin by NVIDIA's code, which hands our creator the fields as TensorRT has them."""
    creator = trt.get_plugin_registry().get_creator(
        plugins.NAME, plugins.VERSION, plugins.NAMESPACE
    )
    made = trt.IPluginCreatorV3One.create_plugin(creator, "layers.0.qkv", fields, phase)
    return owned(made)


def owned(made: Any) -> Any:
    """Keep a plugin for good: it is TensorRT's to destroy, and one that Python drops crashes."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(made))
    return made


def problems_of_build(case: tuple[int, int, int, int, int, int, bool], made: Any) -> Iterator[str]:
    """Ask a plugin what a builder asks; yields what is wrong."""
    batch, seq, _, columns, _, planes, _ = case
    half, word = trt.DataType.HALF, trt.DataType.INT32
    shapes = _shapes(case)
    types_ = [half, word, half, half]
    core = made.plugin_name, made.plugin_version, made.plugin_namespace, made.num_outputs
    if core != (plugins.NAME, plugins.VERSION, plugins.NAMESPACE, 1):
        yield f"the core is {core}"
    for part in (trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
        if not isinstance(made.get_capability_interface(trt.PluginCapabilityType.CORE), part):
            yield f"it is no {part}"
    if len(made.timing_cache_id) != 64:
        yield f"the timing cache's ID is {made.timing_cache_id}"
    if made.get_output_data_types(types_) != [half]:
        yield "the output's type is another one"
    sizes = [
        [Size(size, constant=place > 0 or axis > 1) for axis, size in enumerate(shape)]
        for place, shape in enumerate(shapes)
    ]
    (output,) = made.get_output_shapes(sizes, [], Sizes())
    if [size.value for size in output] != [batch, seq, columns]:
        yield f"the output's shape is {[size.value for size in output]}"
    kinds = [*types_, half]
    for place in range(5):
        for dtype in (half, word, trt.DataType.FLOAT):
            for form in (trt.TensorFormat.LINEAR, trt.TensorFormat.HWC):
                ports = _ports(case, kinds)
                ports[place].desc.type, ports[place].desc.format = dtype, form
                wanted = (dtype, form) == (kinds[place], trt.TensorFormat.LINEAR)
                if made.supports_format_combination(place, ports, 4) != wanted:
                    yield f"port {place} of {dtype} and {form} is not judged right"
    ports = _ports(case, kinds)
    made.configure_plugin(ports[:4], ports[4:])
    if made.get_valid_tactics() != list(range(1, len(w4_tactics(planes)) + 1)):
        yield f"the tactics are {made.get_valid_tactics()}"


def problems_of_run(
    case: tuple[int, int, int, int, int, int, bool], fields: Any, ptx: dict[str, Ptx], cuda: Driver
) -> Iterator[str]:
    """Make a plugin of what a plan has, and run it by each tactic; yields what is wrong."""
    batch, seq, depth, columns, group, planes, bias = case
    made = create(fields, trt.TensorRTPhase.RUNTIME)
    if isinstance(made, trt.IPluginV3OneBuild):
        yield "a plugin of a plan can build"
    ports = [_port(shape) for shape in _shapes(case)]
    output = [_port((batch, seq, columns))]
    for number, tactic in enumerate(w4_tactics(planes), 1):
        attached = owned(made.attach_to_context(None))
        attached.set_tactic(number)
        attached.on_shape_change(ports, output)
        loaded = len(cuda.modules)
        attached.enqueue(ports, output, _ADDRESSES, [_OUTPUT], 0, _STREAM)
        if len(cuda.modules) != loaded:
            yield "a kernel is loaded where a CUDA graph may be captured"
        # Of one column without a bias the plugin adds a zero.
        job = product(
            tactic, batch * seq, columns, depth, group=group, bias=bias or columns == 1
        ).launches[0]
        kernel = ptx[tactic.variant.name]
        values = (*_ADDRESSES, *job.arguments[4:9], _OUTPUT)
        function, *found = cuda.launches.pop()
        wanted = [*job.grid, kernel.threads, 1, 1, kernel.shared_bytes, _STREAM]
        if found[:8] != wanted or found[8][0] != values or found[9] != 0:
            yield f"the launch is {found}, not {wanted} with {values}"
        if [each.__name__ for each in found[8][1]] != [
            *["c_void_p"] * 4, *["c_int"] * 5, "c_void_p",
        ]:  # fmt: skip
            yield f"the parameters are {found[8][1]}"
        if function != (kernel.text.encode() + b"\0", kernel.entry.encode()):
            yield f"the kernel is {function[1]} of {len(function[0])} bytes"


def problems_of_errors(cuda: Driver) -> Iterator[str]:
    """What a function raises, which TensorRT prints at most, comes back."""
    made = owned(plugins.register(trt).for_build(1))
    ports = [_port(shape) for shape in _shapes(CASES[0])]
    cuda.result = 1
    try:
        made.on_shape_change(ports, [])
        made.enqueue(ports, [], _ADDRESSES, [_OUTPUT], 0, _STREAM)
        yield "a launch that fails is no error"
    except plugins.KeptError:
        cuda.result = 0
    try:
        plugins.raise_failure(trt)
        yield "an error of a plugin is lost"
    except DeviceError:
        plugins.raise_failure(trt)


def _shapes(case: tuple[int, int, int, int, int, int, bool]) -> tuple[tuple[int, ...], ...]:
    batch, seq, depth, columns, group, planes, bias = case
    return (
        (batch, seq, depth),
        (depth // 32, planes, columns, 4),
        (depth // group, columns),
        (columns if bias else 1,),
    )


def _ports(case: tuple[int, int, int, int, int, int, bool], kinds: list[Any]) -> list[Any]:
    """``DynamicPluginTensorDesc`` of the inputs and the output, where batch and tokens vary."""
    shapes = [*_shapes(case), (case[0], case[1], case[3])]
    return [
        describe(shape, kind, dynamic=2 if len(shape) == 3 else 0)
        for shape, kind in zip(shapes, kinds, strict=True)
    ]


def _port(shape: tuple[int, ...]) -> Any:
    """``PluginTensorDesc``."""
    found = trt.PluginTensorDesc()
    found.dims, found.format = shape, trt.TensorFormat.LINEAR
    return found


def main() -> int:
    """Register the plugin twice and ask it about every case; 1 if an answer is wrong."""
    registry, cuda = Registry(), Driver()
    trt.get_plugin_registry = lambda: registry
    sys.modules["cuda.bindings.driver"] = cuda.module()
    dims_exprs, trt.DimsExprs = trt.DimsExprs, list  # its sizes are made by the library alone
    ptx = load_ptx()
    for _ in range(2):
        plugin_v3.register(trt, ptx)
    (creator,) = registry.creators
    problems: list[str] = []
    if [field.name for field in creator.field_names] != [plugins.PLANES_FIELD]:
        problems.append("the parser looks for other attributes")
    asked = 0
    for case in CASES:
        planes = np.array([case[5]], np.int32)
        field = trt.PluginField(plugins.PLANES_FIELD, planes, trt.PluginFieldType.INT32)
        made = create(trt.PluginFieldCollection([field]), trt.TensorRTPhase.BUILD)
        problems += [f"{case}: {each}" for each in problems_of_build(case, made)]
        fields = owned(made.clone()).get_fields_to_serialize()
        gc.collect()
        _churn = [np.zeros(1, np.int32) for _ in range(4096)]  # over what nothing keeps alive
        problems += [f"{case}: {each}" for each in problems_of_run(case, fields, ptx, cuda)]
        asked += len(w4_tactics(case[5]))
    problems += problems_of_errors(cuda)
    if len(cuda.modules) != len(set(cuda.modules)):
        problems.append("a kernel is loaded twice")
    trt.DimsExprs = dims_exprs
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"TensorRT {trt.__version__}: the plugin of Python is taken, {asked} launches")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
