"""Captures CUDA graphs of steps, so that the launches of a whole step become one.

TensorRT's rules (developer guide, "CUDA Graphs"): after a change of shapes, one ordinary run comes
before the capture, and a graph is valid only while its context does not change. So every graph has
an execution context of its own, bound once. Activations are shared, which makes a context cheap.
Several contexts may share a profile since TensorRT 10.0 (PreviewFeature.PROFILE_SHARING_0806 is
always on).

All graphs are captured at load, within limits on time and memory: between two tokens no context is
built, and none changes its shape. So there are graphs of few windows and lengths only, and a step
runs in the smallest that has room.

Whether graphs work is tried once, at load: cuda-bindings may be missing, or the driver's library
may lack one of its calls. Without graphs a step is launched kernel by kernel.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from edge.backends import cuda
from edge.bundle.sizes import CAPTURE_BYTES
from edge.errors import BackendError, DependencyError, DeviceError, DeviceMemoryError

from .bound_context import BoundContext, StepShape

_log = logging.getLogger(__name__)

CAPTURE_S = 15.0
"""Limits the time of a load that is spent on capturing."""
_PROBE_BYTES = 256


@dataclass(frozen=True)
class _Entry:
    context: BoundContext
    graph: cuda.GraphExec


class StepGraphs:
    """Graphs by `StepShape`.

    Args:
        device, stream: device and stream of the steps; the device's context is current.
        make_context: makes a new context for steps of a shape.
        max_graphs: most graphs that are captured; 0 turns them off.

    Attributes:
        disabled: why there are no graphs, or None.

    Raises:
        DeviceError, DeviceMemoryError: the GPU failed while graphs were tried.
    """

    def __init__(
        self,
        device: cuda.Device,
        stream: cuda.Stream,
        make_context: Callable[[StepShape], BoundContext],
        max_graphs: int,
    ) -> None:
        self._device, self._stream = device, stream
        self._make_context, self._max_graphs = make_context, max_graphs
        self._entries: dict[StepShape, _Entry] = {}
        self._covers: dict[StepShape, StepShape | None] = {}  # searched once, not for each token
        self.disabled: str | None = None if max_graphs else "switched off"
        if max_graphs:
            self._probe()

    def _probe(self) -> None:
        """Capture, launch and destroy a graph, so that a failure shows before the first token."""
        memory = cuda.DeviceMemory(self._device, _PROBE_BYTES, "a trial of CUDA graphs")
        try:
            graph = self._record(lambda: self._stream.clear(memory.address, _PROBE_BYTES))
            with contextlib.closing(graph):
                graph.launch(self._stream)
                self._stream.synchronize()
        except (BackendError, DependencyError) as error:
            if isinstance(error, DeviceError) and error.fatal:
                raise
            self._disable(str(error))
        finally:
            memory.close()

    def _record(self, put: Callable[[], None]) -> cuda.GraphExec:
        self._device.begin_capture(self._stream)
        try:
            put()
        except BaseException:  # also after an interrupt the stream must not stay in recording
            self._device.abandon_capture(self._stream)
            raise
        return self._device.end_capture(self._stream)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, shape: StepShape) -> bool:
        return shape in self._entries

    def capture(
        self, shapes: Iterable[StepShape], put: Callable[[BoundContext, StepShape], None]
    ) -> None:
        """Capture steps, the most useful first, until a limit is reached.

        Args:
            shapes: shapes of the steps.
            put: puts a step's copies and its run on the stream. It must read only fixed buffers;
                the results of the run are lost.

        Raises:
            DeviceError: the GPU is lost.
        """
        started, free = time.perf_counter(), self._device.memory_info()[0]
        bound = ""
        for shape in shapes if self.disabled is None else ():
            if len(self) >= self._max_graphs:
                bound = f"max_graphs is {self._max_graphs}"
            elif time.perf_counter() - started > CAPTURE_S:
                bound = f"{CAPTURE_S:g} s are over"
            elif free - self._device.memory_info()[0] > CAPTURE_BYTES:
                bound = f"they take {CAPTURE_BYTES / 1e6:,.0f} MB"
            if bound or not self._capture(shape, put):
                break
        _log.info(
            "%d CUDA graphs of steps in %.1f s%s",
            len(self),
            time.perf_counter() - started,
            bound and f", and no more: {bound}",
        )

    def _capture(self, shape: StepShape, put: Callable[[BoundContext, StepShape], None]) -> bool:
        """Capture one graph; returns whether to continue."""
        context: BoundContext | None = None
        try:
            context = self._make_context(shape)
            context.bind(shape)
            put(context, shape)
            self._stream.synchronize()
            graph = self._record(lambda: put(context, shape))
        except BaseException as error:  # also after an interrupt nothing must be left behind
            with contextlib.suppress(DeviceError):  # the first error is the one to report
                self._stream.synchronize()
            if context is not None:
                context.close()
            harmless = (BackendError, DependencyError, DeviceMemoryError)
            if not isinstance(error, harmless) or (isinstance(error, DeviceError) and error.fatal):
                raise
            if self._entries:
                _log.warning("%d CUDA graphs were captured, then: %s", len(self), str(error))
            else:
                self._disable(str(error))
            return False
        self._entries[shape] = _Entry(context, graph)
        return True

    def cover(self, wanted: StepShape) -> StepShape | None:
        """Return the captured step with the fewest tokens that has room for this one, or None."""
        if wanted not in self._covers:
            end = wanted.first + wanted.batch
            self._covers[wanted] = min(
                (
                    shape
                    for shape in self._entries
                    if shape.first <= wanted.first
                    and shape.first + shape.batch >= end
                    and shape.seq >= wanted.seq
                    and shape.num_logits >= wanted.num_logits
                    and shape.kv >= wanted.kv
                    and shape.rank == wanted.rank
                ),
                key=lambda shape: (shape.seq, shape.kv, shape.batch, shape.num_logits, shape.first),
                default=None,
            )
        return self._covers[wanted]

    def longest(self, slots: Sequence[int], takes: Callable[[StepShape], bool]) -> StepShape | None:
        """Return the longest captured step of one of these slots alone that ``takes`` accepts."""
        found = [each for each in self._entries if each.batch == 1 and each.first in slots]
        return max(filter(takes, found), key=lambda each: (each.seq, -each.kv), default=None)

    def launch(self, shape: StepShape) -> bool:
        """Put a step on the stream as a graph.

        Returns:
            False if there is no graph: run the step in the ordinary way.

        Raises:
            BackendError: the step failed.
        """
        entry = self._entries.get(shape)
        if entry is not None:
            entry.graph.launch(self._stream)
        return entry is not None

    def switch_off(self, reason: str) -> None:
        """Destroy all graphs; the stream must be idle."""
        self.close()
        self.disabled = reason

    def _disable(self, reason: str) -> None:
        """Continue without graphs."""
        self.switch_off(reason)
        _log.warning("steps go on without CUDA graphs: %s", reason)

    def _close_entry(self, entry: _Entry) -> None:
        entry.context.close()
        try:
            entry.graph.close()
        except DeviceError as error:  # on a lost device nothing can be destroyed
            # Logged as text, since a record with the error's traceback would keep the engine alive.
            _log.warning("a CUDA graph could not be freed: %s", str(error))

    def close(self) -> None:
        """Destroy all graphs and their contexts; the stream must be idle."""
        self._covers.clear()
        while self._entries:
            self._close_entry(self._entries.popitem()[1])
