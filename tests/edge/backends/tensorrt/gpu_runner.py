"""The TensorRT runner on the stand-ins, and the engines that tests run with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge.backends import cuda
from edge.backends.tensorrt.runner import TensorRTBackend
from edge.bundle import io_spec
from edge.bundle.embeddings import EmbeddingTable
from edge.bundle.manifest import read_manifest
from edge.errors import EdgeError
from tests.edge.backends.runner import Runner
from tests.makers.goldens import FP16_KERNELS
from tests.standins.cuda import DRIVERS, FakeGpu

# The engine's graph is typed fp16, the reference fp32: logits of size 10 differ in the third digit.
ATOL = 0.3 if FP16_KERNELS else 0.15
CACHE_ATOL = 0.12 if FP16_KERNELS else 0.06
SHAPES_ATOL = 0.05 if FP16_KERNELS else 0.02  # the same engine, in steps of other shapes
DIALECTS = ("native", "portable")
CAPACITY = 128
BUCKETS = (16, 64, CAPACITY)
ENGINE = {"max_batch": 4, "max_prefill": 24, "kv_capacity": CAPACITY, "kv_buckets": BUCKETS}
EngineBundles = Callable[..., Path]


class GpuRunner(Runner):
    """A `Runner` on the stand-in."""

    def __init__(self, bundle: Path, gpu: FakeGpu, **options: Any) -> None:
        self.gpu = gpu
        self.manifest = read_manifest(bundle)
        self.engine: TensorRTBackend = TensorRTBackend(bundle, self.manifest, **options)
        self.backend = self.engine  # type: ignore[assignment]
        self.table = EmbeddingTable(bundle / io_spec.EMBEDDINGS_NAME)
        self.lengths = [0] * self.engine.num_slots

    def __enter__(self) -> GpuRunner:
        return self


both_drivers = pytest.mark.parametrize("gpu", DRIVERS, indirect=True)
"""Where the driver may matter: memory, copies, streams, graphs, threads, errors. Above the door to
CUDA (`edge.backends.cuda`) all is the same, and one is enough."""


def allocate(device: cuda.Device) -> None:
    """And wait, and free: what any other user of the GPU does in its own thread."""
    with device.active():
        memory, stream = cuda.DeviceMemory(device, 256, "a test"), cuda.Stream(device)
        stream.synchronize()
        memory.close()


def attempt(work: Callable[[], Any]) -> EdgeError | None:
    """The error of the product; anything else that is raised fails the test."""
    try:
        work()
    except EdgeError as error:
        return error
    return None
