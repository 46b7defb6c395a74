"""Own kernels in an engine of TensorRT before 10.13: plugins whose kernels Python launches.

From 10.13 on TensorRT puts own kernels into an engine by itself (`engines.kernels.plugin`). Before,
a plugin (``IPluginV3``) launches its kernel. The kernels are PTX in ``engine.json``, which a field
of each plugin in the plan names by a number, and here is what TensorRT calls to run them;
`engines.kernels.plugin_v3` adds what it asks while it builds. Decode steps are replayed as CUDA
graphs, so their launches pass through Python when they are captured and never again; those of a
prefill do, each time.

The PTX itself cannot be in the fields: with NumPy 2 the data of a field read as its first element
again and again, as the bindings are compiled for NumPy 1 (``PluginField.data``; seen with the
wheels of 10.3 and 10.13, not of 10.16). That single numbers come through holds
`scripts/trt_plugin_v3.py`.

This relies on what TensorRT 10.3 says of itself:

- NvInferRuntime.h: a plugin of the runtime phase has a core and a runtime part and no more; each
  execution context attaches a clone of it; ``onShapeChange`` comes before an ``enqueue`` with other
  shapes; tactic 0 is none of the plugin's own.
- pyPlugin.cpp: functions are called with the GIL, which ``execute_async_v3`` has given up
  (pyCore.cpp). What they raise is printed and becomes -1, so it is kept here to be raised again. A
  collection of fields has bare addresses of their data, and the registry one of the creator. A
  plugin is TensorRT's to destroy: one that Python drops is freed twice.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import threading
import traceback
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import numpy as np

from edge.backends.cuda.kernels import CurrentContext, ForeignStream, Kernel
from edge.errors import BackendError, BundleError, DependencyError, EdgeError

_logger = logging.getLogger(__name__)

NAMESPACE, NAME = "edge_llm", "w4_linear"
VERSION = "v3"
"""Of this plugin; the one that is compiled into engines has another (`engines.kernels.plugin`)."""
INPUTS = ("x", "weights", "scales", "bias")
"""FP16 ``[.., depth]``, INT32 of `engines.kernels.layout.pack_weights`, FP16 ``[groups, columns]``,
and FP16 ``[columns]``, or ``[1]`` where none is added. The output is FP16 ``[.., columns]``."""
PLANES_FIELD, KERNELS_FIELD = "planes", "kernels"
"""Fields of a plugin, an INT32 each: in the graph, planes of its weights; in the plan, `number_of`
its kernels."""

_MOST_BYTES = 1 << 24  # of kernels that are unpacked; what is longer is cut, so does not read
T = TypeVar("T")


@dataclass(frozen=True)
class ProductKernel:
    """A kernel that computes a product of any number of rows and columns.

    Its parameters are the addresses of `INPUTS`, five INT32 (`product_launch`), and the output's
    address.

    Attributes:
        text: PTX.
        entry: name of the function in it.
        threads: of a program.
        shared_bytes: dynamic shared memory of a program.
        rows, columns: of the output, that a program computes.
    """

    text: str
    entry: str
    threads: int
    shared_bytes: int
    rows: int
    columns: int


def pack(kernels: Sequence[ProductKernel]) -> bytes:
    """The kernels of a plugin, in the order of their tactics, as ``engine.json`` has them."""
    return zlib.compress(msgspec.json.encode(kernels), 9)


@functools.lru_cache(maxsize=16)
def unpack(packed: bytes) -> tuple[ProductKernel, ...]:
    """The kernels of `pack`; hundreds of plugins of an engine have the same ones.

    Raises:
        BundleError: they are damaged.
    """
    try:
        text = zlib.decompressobj().decompress(packed, _MOST_BYTES)
        return msgspec.json.decode(text, type=tuple[ProductKernel, ...])
    except (zlib.error, msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BundleError(
            f"the own kernels in engine.json are damaged ({error}); build the engine again"
        ) from error


def number_of(packed: bytes) -> int:
    """The number by which a plugin in a plan names its kernels: of their SHA-256."""
    return int.from_bytes(hashlib.sha256(packed).digest()[:4], "little", signed=True)


def product_launch(
    shapes: Sequence[Sequence[Any]],
    rows: int,
    columns: int,
    divide_up: Callable[[Any, Any], Any],
) -> tuple[tuple[Any, Any], tuple[Any, ...]]:
    """How a kernel is launched, of sizes that are numbers or symbols of TensorRT.

    Args:
        shapes: of `INPUTS`.
        rows: that a program computes.
        columns: that a program computes.
        divide_up: a quotient, rounded up.

    Returns:
        Programs along x and y, and the numbers: all rows and columns, the depth, the binary
        logarithm of the blocks of 32 weights in a group, and whether there is a bias.
    """
    x, weights, scales, bias = shapes
    all_rows = x[0]
    for size in x[1:-1]:
        all_rows = all_rows * size
    blocks, all_columns = weights[0], weights[2]
    # A group is one, two or four blocks. A layer of one column without a bias has a zero.
    shift = blocks // scales[0] // 2
    grid = divide_up(all_columns, columns), divide_up(all_rows, rows)
    return grid, (all_rows, all_columns, x[-1], shift, bias[0] == all_columns)


class OwnKernels:
    """What all plugins of a process share.

    Attributes:
        creator: TensorRT has its bare address, so it stays as long as the process.
        for_build: makes a plugin that TensorRT can build with, of the number of planes; what builds
            engines sets it.
    """

    def __init__(self) -> None:
        self.creator: Any = None
        self.for_build: Callable[[int], Any] = _cannot_build
        self._known: dict[int, bytes] = {}
        self._failure: BaseException | None = None
        self._context = CurrentContext(
            "an engine with own kernels for TensorRT < 10.13 needs cuda-bindings"
        )
        self._loaded: dict[tuple[int, ProductKernel], Kernel] = {}
        self._lock = threading.Lock()

    def check(self) -> None:
        """Look for what launches kernels.

        Raises:
            DependencyError: cuda-bindings is missing.
        """
        self._context.check()

    def add(self, packed: bytes) -> None:
        """Let plugins have these kernels of `pack`.

        Raises:
            BundleError: they are damaged.
        """
        unpack(packed)
        self._known[number_of(packed)] = packed

    def find(self, number: int) -> bytes:
        """The kernels that `number_of` gives this number.

        Raises:
            BundleError: nobody added them.
        """
        if number not in self._known:
            raise BundleError(
                f"a plugin in the plan has own kernels of number {number}, which engine.json does "
                "not have; build the engine again"
            )
        return self._known[number]

    @property
    def in_context(self) -> bool:
        """Whether a CUDA context is current."""
        return self._context.handle != 0

    def load(self, packed: bytes) -> tuple[Kernel, ...]:
        """Kernels of `pack` in the current context, where each stays until the process ends.

        Raises:
            DependencyError: cuda-bindings is missing.
            DeviceError: the driver does not compile them, or fails.
        """
        context, found = self._context.handle, []
        with self._lock:
            for each in unpack(packed):
                kernel = self._loaded.get((context, each))
                if kernel is None:
                    image = each.text.encode("ascii") + b"\0"
                    kernel = Kernel(
                        self._context,
                        image,
                        each.entry,
                        threads=each.threads,
                        shared_bytes=each.shared_bytes,
                    )
                    self._loaded[context, each] = kernel
                found.append(kernel)
        return tuple(found)

    def keep(self, error: BaseException) -> None:
        """Keep an error for `raise_failure`; the first one, which the others follow from."""
        if self._failure is not None:
            return
        _logger.debug("a plugin raised: %s", "".join(traceback.format_exception(error)))
        failure = error
        if isinstance(error, Exception) and not isinstance(error, EdgeError):
            failure = BackendError(
                f"a plugin with own kernels failed: {type(error).__name__}: {error}; build with "
                "--kernels tensorrt, and please report this"
            )
            failure.__cause__ = error
        self._failure = failure
        # Its frames have the plugin, which Python must not hold longer than TensorRT does.
        while error is not None:
            error.__traceback__ = None
            error = error.__cause__ or error.__context__  # type: ignore[assignment]

    def raise_failure(self) -> None:
        """See `raise_failure` of this module."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


def _cannot_build(planes: int) -> Any:
    raise BackendError("a plugin with own kernels is built by edge-llm build only")


class KeptError(Exception):
    """What TensorRT's bindings see and print of an error that `raise_failure` raises."""


def told(function: Callable[..., T]) -> Callable[..., T]:
    """Keep what a function that TensorRT calls raises; its object has the `OwnKernels`."""

    @functools.wraps(function)
    def call(plugin: Any, *args: Any) -> T:
        try:
            return function(plugin, *args)
        except BaseException as error:  # noqa: BLE001 - C++ would only print it
            plugin.own_kernels.keep(error)
            raise KeptError(str(error)) from None

    return call


@functools.cache
def product_class(trt: Any) -> Any:
    """The plugin's class, of ``packed`` kernels and the process's `OwnKernels`.

    Args:
        trt: the module ``tensorrt``.
    """

    class Product(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneRuntime):  # type: ignore[misc]
        def __init__(self, packed: bytes, own_kernels: OwnKernels) -> None:
            trt.IPluginV3.__init__(self)
            trt.IPluginV3OneCore.__init__(self)
            trt.IPluginV3OneRuntime.__init__(self)
            self.plugin_name, self.plugin_version = NAME, VERSION
            self.plugin_namespace = NAMESPACE
            self.packed, self.own_kernels = packed, own_kernels
            self.chosen_tactic = 1  # any is right for any product
            self.loaded: tuple[Kernel, ...] = ()
            # Of each tactic for the shapes that were told last: programs and numbers.
            self.launches: list[tuple[tuple[int, int, int], tuple[tuple[int, bool], ...]]] = []
            # Whose address the fields have.
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
            self.load()  # the driver loads nothing while a CUDA graph is captured
            return self.clone()

        @told
        def set_tactic(self, tactic: int) -> None:
            self.chosen_tactic = max(tactic, 1)

        @told
        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            self.load()  # a builder attaches nothing
            shapes = [tuple(each.dims) for each in inputs]
            self.launches = []
            for each in unpack(self.packed):
                grid, numbers = product_launch(shapes, each.rows, each.columns, _divide_up)
                values = tuple((int(number), False) for number in numbers)
                self.launches.append(((*grid, 1), values))

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
            x, weights, scales, bias = inputs
            values = (
                *((x, True), (weights, True), (scales, True), (bias, True)),
                *numbers,
                (outputs[0], True),
            )
            self.loaded[self.chosen_tactic - 1].launch(ForeignStream(stream), grid, values)

    return Product


def _divide_up(first: int, second: int) -> int:
    return -(-first // second)


_registered: dict[Any, OwnKernels] = {}


def raise_failure(trt: Any) -> None:
    """Raise what a plugin raised since the last time, of which TensorRT itself tells nothing.

    Args:
        trt: the module ``tensorrt``; without `register` nothing can have failed.

    Raises:
        EdgeError: the GPU or a plugin failed.
    """
    if trt in _registered:
        _registered[trt].raise_failure()


def register(trt: Any) -> OwnKernels:
    """Make the plugin known to TensorRT, once per process.

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

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = NAME, VERSION, NAMESPACE
            self.own_kernels = own_kernels
            field = trt.PluginField(PLANES_FIELD, np.empty(0, np.int32), trt.PluginFieldType.INT32)
            self.field_names = trt.PluginFieldCollection([field])

        @told
        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            values = {field.name: field.data for field in fields}
            if phase == trt.TensorRTPhase.BUILD:
                return own_kernels.for_build(int(values[PLANES_FIELD][0]))
            packed = own_kernels.find(int(values[KERNELS_FIELD][0]))
            return product_class(trt)(packed, own_kernels)

    own_kernels.creator = Creator()
    if not trt.get_plugin_registry().register_creator(own_kernels.creator, NAMESPACE):
        raise DependencyError(
            f"TensorRT {trt.__version__} did not register the plugin of own kernels; {cure}"
        )
    _registered[trt] = own_kernels
    return own_kernels
