"""Wraps CUDA for all of `edge`, through PyCUDA, or else through cuda-bindings (`driver`).

Graphs and the flags of the primary context always use cuda-bindings, since PyCUDA has neither.
Nothing here computes or knows a model. Addresses are plain integers, all copies are asynchronous on
one `Stream`, and every call that fails raises one clear `EdgeError`.

Memory and streams belong to a context, and are freed only in a thread where that context is
current: callers must be inside ``with device.active()``.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge.engine_config import GpuWait
from edge.errors import DependencyError, DeviceError, DeviceMemoryError, EdgeError

from .bindings import BindingsDriver, Calls
from .driver import CurrentContext, load_driver
from .waiting import set_wait

_log = logging.getLogger(__name__)


class Stream:
    """A CUDA stream: its work runs in order, asynchronously to the host.

    Attributes:
        handle: its address, as TensorRT takes it.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._stream = device.call("create a stream", device.driver.Stream)
        self.handle = int(self._stream.handle)

    def synchronize(self) -> None:
        """Wait until all work on it has run.

        Raises:
            DeviceError: some of the work failed.
        """
        self._device.call("run a step", self._stream.synchronize)

    def upload(self, target: int, source: NDArray[Any]) -> None:
        """Copy a contiguous, pinned host array to the device; it must not change until then."""
        copy = self._device.driver.memcpy_htod_async
        self._device.call("copy to the GPU", copy, target, source, self._stream)

    def download(self, target: NDArray[Any], source: int) -> None:
        """Fill a contiguous, pinned host array; its values are valid after `synchronize`."""
        copy = self._device.driver.memcpy_dtoh_async
        self._device.call("copy from the GPU", copy, target, source, self._stream)

    def clear(self, target: int, num_bytes: int) -> None:
        """Fill device memory with zeros."""
        fill = self._device.driver.memset_d8_async
        self._device.call("clear memory", fill, target, 0, num_bytes, self._stream)

    def close(self) -> None:
        """Destroy the stream; the driver waits for its work."""
        self._stream = None


class Box(NamedTuple):
    """One side of a `BoxCopy`: layers of ``rows`` rows, each ``pitch`` bytes after the last.

    Attributes:
        base: a device address, or a contiguous host array.
        pitch: bytes from one row to the next.
        rows: rows from one layer to the next.
    """

    base: int | NDArray[Any]
    pitch: int
    rows: int


class BoxCopy:
    """Copies a box from one strided memory to another by a single ``cuMemcpy3DAsync``.

    The object is made once and run with other addresses, so nothing is allocated in a step.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._copy = device.call("prepare a copy", device.driver.Memcpy3D)

    def run(
        self, target: Box, source: Box, *, width: int, height: int, depth: int, stream: Stream
    ) -> None:
        """Put ``depth`` layers of ``height`` rows of ``width`` bytes on a stream.

        Raises:
            DeviceError: the driver refuses.
        """
        copy = self._copy
        if isinstance(source.base, int):
            copy.set_src_device(source.base)
        else:
            copy.set_src_host(source.base)
        if isinstance(target.base, int):
            copy.set_dst_device(target.base)
        else:
            copy.set_dst_host(target.base)
        copy.src_pitch, copy.src_height = source.pitch, source.rows
        copy.dst_pitch, copy.dst_height = target.pitch, target.rows
        copy.width_in_bytes, copy.height, copy.depth = width, height, depth
        self._device.call("copy rows of the cache", copy, stream._stream)


class DeviceMemory:
    """A block of device memory, made of pieces at consecutive addresses if necessary.

    Attributes:
        address: 256-byte aligned (cuMemAlloc) or better.
        num_bytes: size of the block.
    """

    def __init__(self, device: Device, num_bytes: int, purpose: str) -> None:
        self.num_bytes = num_bytes
        self._block = device.allocate(purpose, num_bytes, device.mem_alloc, num_bytes)
        self.address = int(self._block)

    def close(self) -> None:
        """Free it; calling it twice is harmless."""
        block, self._block, self.address = self._block, None, 0
        if block is not None:
            block.free()


class PinnedMemory:
    """Host memory that the GPU can access directly.

    Attributes:
        array: ``[num_bytes]`` uint8; never use it after `close`.
        address: its address on the device, or 0 if it was not mapped.
    """

    def __init__(self, device: Device, num_bytes: int, purpose: str, *, mapped: bool) -> None:
        driver = device.driver
        flags = driver.host_alloc_flags.DEVICEMAP if mapped else 0
        self.array: NDArray[np.uint8] = device.allocate(
            purpose, num_bytes, driver.pagelocked_empty, num_bytes, np.uint8, mem_flags=flags
        )
        self._block = self.array.base
        self.address = 0
        if mapped:
            try:
                self.address = int(device.call("map memory", self._block.get_device_pointer))
            except EdgeError:
                self.close()
                raise
        self.array[...] = 0

    def close(self) -> None:
        """Free it; calling it twice is harmless."""
        block, self._block, self.address = self._block, None, 0
        self.array = np.empty(0, np.uint8)
        if block is not None:
            block.free()


class GraphExec:
    """A captured CUDA graph, ready to be launched."""

    def __init__(self, device: Device, handle: Any) -> None:
        self._device = device
        self._handle = handle

    def launch(self, stream: Stream) -> None:
        """Put one run of the graph on a stream.

        Raises:
            DeviceError: the driver refuses.
        """
        self._device.graph_call("launch a CUDA graph", "cuGraphLaunch", self._handle, stream.handle)

    def close(self) -> None:
        """Destroy it; calling it twice is harmless."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._device.graph_call("destroy a CUDA graph", "cuGraphExecDestroy", handle)


class Device(CurrentContext):
    """One GPU, through its primary context, which TensorRT's own runtime calls use too.

    Args:
        ordinal: number of the GPU.
        wait: how threads wait for it, as `EngineConfig.gpu_wait`.

    Attributes:
        driver: PyCUDA, or its replacement.
        name: name of the GPU.
        compute_capability: e.g. ``8.7``.
        num_sms: streaming multiprocessors that are on.
        integrated: whether it shares the host's memory, as on a Jetson.
        wait: how threads wait for it now: ``spin``, ``yield``, ``block``, or ``driver`` if the
            driver chooses; None if it is unknown.

    Raises:
        DependencyError: both PyCUDA and cuda-bindings are missing; cuda-bindings is missing and
            ``wait`` is not auto; or the driver does not start. The message has the cure.
        DeviceError: a ``wait`` other than auto cannot be set, or the GPU is lost.
    """

    def __init__(self, ordinal: int = 0, wait: GpuWait = "auto") -> None:
        super().__init__("CUDA graphs and gpu_wait need cuda-bindings")
        self.driver: BindingsDriver = load_driver()
        driver = self.driver
        self._ordinal = ordinal
        try:
            driver.init()
            gpu = driver.Device(ordinal)
            self.name = str(gpu.name())
            self.compute_capability = "{}.{}".format(*gpu.compute_capability())
            attributes = driver.device_attribute
            self.num_sms = int(gpu.get_attribute(attributes.MULTIPROCESSOR_COUNT))
            self.integrated = bool(gpu.get_attribute(attributes.INTEGRATED))
            self.wait = self._set_wait(ordinal, wait)
            self._context = _primary_context(driver, ordinal)
        except driver.Error as error:
            from .errors import explain_init_failure, reason_of

            raise DependencyError(explain_init_failure(reason_of(error))) from error

    def _set_wait(self, ordinal: int, wish: GpuWait) -> str | None:
        """Set the mode by `set_wait`; with auto, a failure does not keep the GPU from use."""
        found: str | None = None
        try:
            found = set_wait(self._calls, ordinal, wish)
            problem = f"it stays at {found}"
        except DependencyError as error:
            if wish != "auto":
                raise
            problem = str(error)
        except Calls.Error as error:
            from .errors import is_fatal, reason_of

            problem = reason_of(error)
            if is_fatal(problem):
                raise self.error("change how threads wait for it", error) from error
        if wish not in ("auto", found):
            raise DeviceError(
                f"gpu_wait is {wish}, but how threads wait for the GPU cannot be changed: "
                f"{problem}; leave gpu_wait out, or open the GPU before the other libraries of "
                "this process do"
            )
        if found is None:
            _log.info("the driver chooses how threads wait for the GPU: %s", problem)
        else:
            _log.info("how threads wait for the GPU: %s", found)
        return found

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Make its context current in this thread while the block runs."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def enter(self) -> None:
        """Make its context current; `leave` must follow in the same thread."""
        self.call("enter the context", self._context.push)

    def leave(self) -> None:
        """Undo `enter`. A context that stays current would abort the process at its end."""
        self.call("leave the context", self._context.pop)

    def memory_info(self) -> tuple[int, int]:
        """Return free and total device memory, in bytes.

        On an integrated GPU the driver counts the page cache as used, though the kernel drops it on
        demand (NVIDIA, CUDA for Tegra). There the free bytes are ``MemAvailable``.
        """
        free, total = self.call("ask for free memory", self.driver.mem_get_info)
        if self.integrated:
            from edge.device.memory import read_mem_available_bytes

            free = read_mem_available_bytes() or free
        return int(free), int(total)

    def make_room(self, purpose: str, num_bytes: int) -> None:
        """Refuse early what does not fit: on a Jetson the kernel would kill the process instead.

        On an integrated GPU, memory that is available but not free is made free (`make_free`).

        Raises:
            DeviceMemoryError: it does not fit.
        """
        if num_bytes > self.memory_info()[0]:
            raise self._no_room(purpose, num_bytes)
        if self.integrated:
            from edge.device.memory import make_free

            make_free(num_bytes)

    def _no_room(self, purpose: str, num_bytes: int) -> DeviceMemoryError:
        from .errors import cure_for_memory

        free, total = self.memory_info()
        cure = "stop other programs, or build the engine with a smaller --kv-capacity or "
        cure = cure_for_memory(num_bytes, f"{cure}--max-batch")
        return DeviceMemoryError(
            f"{purpose} needs {num_bytes / 1e6:,.0f} MB of GPU memory, but {free / 1e6:,.0f} of "
            f"{total / 1e6:,.0f} MB are free; {cure}"
        )

    def allocate(self, purpose: str, num_bytes: int, function: Any, *args: Any, **kw: Any) -> Any:
        """Call an allocator of the driver.

        Raises:
            DeviceMemoryError: the memory does not suffice.
            DeviceError: the driver failed in another way.
        """
        try:
            return function(*args, **kw)
        except (self.driver.Error, MemoryError) as error:
            if not isinstance(error, (self.driver.MemoryError, MemoryError)):
                raise self.error(f"allocate {purpose}", error) from error
            raise self._no_room(purpose, num_bytes) from error

    def mem_alloc(self, num_bytes: int) -> Any:
        """Allocate as ``driver.mem_alloc``; if there is no such block, it is made of `Pieces`."""
        try:
            return self.driver.mem_alloc(num_bytes)
        except self.driver.MemoryError as refused:
            from .pieces import PIECE_BYTES, Pieces

            if num_bytes <= PIECE_BYTES:
                raise
            try:
                block = Pieces(self._calls, self._ordinal, num_bytes)
            except (DependencyError, Calls.Error) as error:
                _log.info("a block of %d bytes cannot be made of pieces: %s", num_bytes, error)
                raise refused from error
            _log.info("a block of %d bytes is made of %d pieces", num_bytes, len(block))
            return block

    def call(self, doing: str, function: Any, *args: Any) -> Any:
        """Call the driver.

        Raises:
            DeviceError: it failed.
        """
        try:
            return function(*args)
        except self.driver.Error as error:
            raise self.error(doing, error) from error

    def error(self, doing: str, error: BaseException) -> DeviceError:
        """Convert the driver's exception to one of ours."""
        from .errors import device_error

        return device_error(doing, error)

    def begin_capture(self, stream: Stream) -> None:
        """Record work that is put on the stream from now on instead of running it.

        Other threads may still do what a capture forbids (mode THREAD_LOCAL).
        """
        doing, name = "begin a capture", "cuStreamBeginCapture"
        self.graph_call(doing, name, stream.handle, self._calls.capture_mode)

    def end_capture(self, stream: Stream) -> GraphExec:
        """End the recording, make it runnable and upload it, so that no launch has to.

        Raises:
            DeviceError: the recording cannot be a graph; the stream is usable again.
        """
        graph = self.graph_call("end a capture", "cuStreamEndCapture", stream.handle)
        try:
            handle = self.graph_call("instantiate a CUDA graph", "cuGraphInstantiate", graph, 0)
        except DeviceError:
            with contextlib.suppress(DeviceError):  # the first error is the one to report
                self._destroy_captured(graph)
            raise
        ready = GraphExec(self, handle)
        try:
            self._destroy_captured(graph)
            self.graph_call("upload a CUDA graph", "cuGraphUpload", handle, stream.handle)
        except DeviceError:
            with contextlib.suppress(DeviceError):
                ready.close()
            raise
        return ready

    def abandon_capture(self, stream: Stream) -> None:
        """End a failed recording, whatever it holds; harmless if none is open."""
        try:
            graph = self.graph_call("end a capture", "cuStreamEndCapture", stream.handle)
        except DeviceError:
            return  # none is open, or its failure has been reported
        self._destroy_captured(graph)

    def _destroy_captured(self, graph: Any) -> None:
        self.graph_call("destroy a captured graph", "cuGraphDestroy", graph)


@functools.cache
def _primary_context(driver: Any, ordinal: int) -> Any:
    """Return the context of a GPU, kept until the process ends, as CUDA's own runtime does.

    PyCUDA releases it only in the thread that retained it, which may have ended by then.
    """
    return driver.Device(ordinal).retain_primary_context()
