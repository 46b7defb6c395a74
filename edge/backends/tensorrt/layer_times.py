"""Collects times of an engine's layers, as TensorRT's profiler reports them after every run.

With a profiler a run waits for its end and layers do not overlap. So their sum is longer than a
step in ordinary use, and a CUDA graph cannot be captured.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from edge.bundle.profile_layers import plain_name


class LayerTimes:
    """Collects milliseconds by layer of the runs of one execution context.

    Attributes:
        runs_ms: time of each layer in every run, in milliseconds, in the engine's order of layers.
            If one run reports a layer several times, it is their sum.
    """

    def __init__(self) -> None:
        self.runs_ms: dict[str, list[float]] = defaultdict(list)
        self._run_ms: dict[str, float] = {}

    def report(self, layer: str, ms: float) -> None:
        """Add the time of one layer in the current run, in milliseconds."""
        name = plain_name(layer)
        self._run_ms[name] = self._run_ms.get(name, 0.0) + ms

    def end_run(self) -> None:
        """End the current run."""
        for name, ms in self._run_ms.items():
            self.runs_ms[name].append(ms)
        self._run_ms.clear()


def make_profiler(trt: Any, times: LayerTimes) -> Any:
    """Make an ``IProfiler`` that reports to ``times``."""

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times.report(layer_name, ms)

    return Profiler()
