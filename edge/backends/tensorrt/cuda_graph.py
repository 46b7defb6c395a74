"""CUDA graphs of decode steps: the launches of a whole step become one.

TensorRT's rules (developer guide, "CUDA Graphs"): after a change of shapes, one ordinary run comes
before the capture; and a graph is valid only while the context that it was captured from stays as
it was. So every graph has an execution context of its own, bound once; activations are shared,
which makes a context cheap. A shape gets one when it comes for the second time, runs once on it,
and is captured the third time. That several contexts share a profile is allowed since TensorRT 10.0
(PreviewFeature.PROFILE_SHARING_0806 is always on).

Whether there can be graphs is tried once, at load: cuda-bindings may be missing, or the driver's
library may lack one of its calls. Without graphs decode goes on, one launch after the other.
"""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from edge.backends import cuda
from edge.errors import BackendError, DependencyError, DeviceError, DeviceMemoryError

from .bound_context import BoundContext, StepShape

_logger = logging.getLogger(__name__)

_MAX_SEEN = 1024
_PROBE_BYTES = 256


@dataclass
class _Entry:
    context: BoundContext
    graph: cuda.GraphExec | None = None


class DecodeGraphs:
    """Graphs by `StepShape`, the least recently used one dropped when there are too many.

    Args:
        device, stream: where; the device's context is current.
        make_context: a fresh context of the decode profile.
        max_graphs: graphs that are kept; 0 turns them off.

    Attributes:
        captured: captures so far.
        disabled: why there are no graphs any more, or None.

    Raises:
        DeviceError, DeviceMemoryError: the GPU failed while graphs were tried.
    """

    def __init__(
        self,
        device: cuda.Device,
        stream: cuda.Stream,
        make_context: Callable[[], BoundContext],
        max_graphs: int,
    ) -> None:
        self._device, self._stream = device, stream
        self._make_context, self._max_graphs = make_context, max_graphs
        self._entries: OrderedDict[StepShape, _Entry] = OrderedDict()
        self._seen: set[StepShape] = set()
        self.captured = 0
        self.disabled: str | None = None if max_graphs else "switched off"
        if max_graphs:
            self._probe()

    def _probe(self) -> None:
        """Capture, launch and destroy a graph, so that no token finds out that it fails."""
        memory = cuda.DeviceMemory(self._device, _PROBE_BYTES, "a trial of CUDA graphs")
        try:
            graph = self._record(lambda: self._stream.clear(memory.address, _PROBE_BYTES))
            try:
                graph.launch(self._stream)
                self._stream.synchronize()
            finally:
                graph.close()
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
        except BaseException:  # an interrupt, too, must not leave the stream recording
            self._device.abandon_capture(self._stream)
            raise
        return self._device.end_capture(self._stream)

    def __len__(self) -> int:
        return sum(entry.graph is not None for entry in self._entries.values())

    def run(self, shape: StepShape, put: Callable[[BoundContext, StepShape], None]) -> bool:
        """Put a step on the stream, as a graph if there is one.

        Args:
            shape: of the step.
            put: puts the step's copies and its run on the stream; what it reads later must lie in
                fixed buffers.

        Returns:
            False if nothing was put on the stream: run the step in the ordinary way.

        Raises:
            BackendError: the step failed.
        """
        entry = self._entries.get(shape)
        if entry is None:
            return self._warm_up(shape, put)
        self._entries.move_to_end(shape)
        if entry.graph is None:
            self._capture(entry, shape, put)
            if entry.graph is None:
                return False
        entry.graph.launch(self._stream)
        return True

    def _warm_up(self, shape: StepShape, put: Callable[[BoundContext, StepShape], None]) -> bool:
        if self.disabled is not None:
            return False
        if shape not in self._seen:
            if len(self._seen) >= _MAX_SEEN:
                self._seen.clear()
            self._seen.add(shape)
            return False
        while len(self._entries) >= self._max_graphs:
            self._close_entry(*self._entries.popitem(last=False))
        try:
            context = self._make_context()
        except (BackendError, DeviceMemoryError) as error:
            if isinstance(error, DeviceError) and error.fatal:
                raise
            self._disable(f"no execution context for a graph: {error}")
            return False
        try:
            context.bind(shape)
            put(context, shape)
        except BackendError:
            # Its run may be on the stream, with the copy behind it refused.
            with contextlib.suppress(DeviceError):  # the first error is the one to tell
                self._stream.synchronize()
            context.close()
            raise
        self._entries[shape] = _Entry(context)
        return True

    def _capture(
        self, entry: _Entry, shape: StepShape, put: Callable[[BoundContext, StepShape], None]
    ) -> None:
        try:
            entry.graph = self._record(lambda: put(entry.context, shape))
            self.captured += 1
        except (BackendError, DependencyError) as error:
            if isinstance(error, DeviceError) and error.fatal:
                raise
            self._disable(str(error))

    def switch_off(self, reason: str) -> None:
        """Destroy all graphs and make no more; the stream must be idle."""
        self.close()
        self.disabled = reason

    def _disable(self, reason: str) -> None:
        """Go on without graphs."""
        self.switch_off(reason)
        _logger.warning("decode goes on without CUDA graphs: %s", reason)

    def _close_entry(self, shape: StepShape, entry: _Entry) -> None:
        self._seen.discard(shape)
        graph, entry.graph = entry.graph, None
        entry.context.close()
        try:
            if graph is not None:
                graph.close()
        except DeviceError as error:  # on a lost device nothing can be destroyed
            _logger.warning("a CUDA graph could not be freed: %s", error)

    def close(self) -> None:
        """Destroy all graphs and their contexts; the stream must be idle."""
        while self._entries:
            self._close_entry(*self._entries.popitem())
