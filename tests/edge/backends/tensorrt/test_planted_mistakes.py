"""What the stand-ins refuse, so that the other tests of the runner mean something."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from edge.backends import cuda
from edge.backends.tensorrt.bound_context import StepShape
from edge.errors import BackendError
from tests.edge.backends.runner import random_ids
from tests.edge.backends.tensorrt.gpu_runner import (
    CAPACITY,
    EngineBundles,
    GpuRunner,
    allocate,
    attempt,
    both_drivers,
)
from tests.standins.cuda import CaptureMode, FakeGpu, RuleError

_MISTAKES = {
    "cache at two addresses": "is not at the address of",
    "write past the capacity": "rows up to 129 of 128",
    "changed shape under a graph": "changed after the capture",
    "memory freed under a graph": "nothing is allocated at",
    "captured without a run in advance": "captured without a run in advance",
    "unset tensor": "address of logits is not set",
    "shape outside the profile": "not within",
    "no device memory": "no device memory",
    "activations too small": "255 bytes of activations, .* are written",
    "activations of two runs at once": "two runs at once write the same activations",
    "unaligned": "not aligned",
    "upload of a temporary": "freed before the copy of it ran",
    "copy of a temporary": "freed before the copy of it ran",
    "download to a temporary": "freed before the copy of it ran",
    "allocation inside a capture": "not permitted when stream is capturing",
    "allocation beside a global capture": "previous error during capture",
}


@pytest.mark.parametrize(
    ("gpu", "mistake"),
    [
        # cuda-bindings get an address, which says nothing of the life of a temporary.
        *(("pycuda", mistake) for mistake in _MISTAKES),
        *(("cuda-bindings", mistake) for mistake in _MISTAKES if "alloc" in mistake),
    ],
    indirect=["gpu"],
)
def test_the_stand_in_refuses(mistake: str, gpu: FakeGpu, engine_bundles: EngineBundles):
    with GpuRunner(engine_bundles("qwen2", "native"), gpu) as runner:
        backend = runner.engine
        with backend._device.active():
            shape = StepShape(1, 1, 1, 1, 16)
            backend._contexts["decode"].bind(shape)
            backend._put(backend._contexts["decode"], shape, backend._decode_buffers)
            backend._stream.synchronize()
        context = backend._contexts["decode"]._context
        device, stream, positions = backend._device, backend._stream, backend._kv_positions

        def err() -> None:
            if mistake == "cache at two addresses":
                context.set_tensor_address("present.1.key", backend._cache.address("1.key", 3))
            elif mistake == "write past the capacity":
                backend._decode_buffers._inputs.arrays["write_indices"][0] = CAPACITY
            elif mistake == "unset tensor":
                context.set_tensor_address("logits", 0)
            elif mistake == "no device memory":
                context._memory = None
            elif mistake == "activations too small":
                context.set_device_memory(backend._activations.address, 255)
            elif mistake == "activations of two runs at once":
                backend._contexts["decode"].enqueue()
                context.execute_async_v3(other.handle)
            elif mistake == "memory freed under a graph":
                backend._activations.close()
                entry = next(iter(backend._graphs._entries.values()))
                entry.graph.launch(backend._stream)
            elif mistake == "shape outside the profile":
                backend._contexts["decode"].bind(StepShape(0, 1, 2, 1, 16))
            elif mistake == "unaligned":
                backend._contexts["decode"]._call("set_tensor_address", "logits", 128)
            elif mistake == "upload of a temporary":
                stream.upload(positions, np.arange(CAPACITY))
            elif mistake == "copy of a temporary":
                source = cuda.Box(np.arange(CAPACITY), 8 * CAPACITY, 1)
                target = cuda.Box(positions, 8 * CAPACITY, 1)
                copy = cuda.BoxCopy(device)
                copy.run(target, source, width=8, height=1, depth=1, stream=stream)
                del source
            elif mistake == "download to a temporary":
                stream.download(np.empty(CAPACITY, np.int64), positions)
            elif mistake == "allocation inside a capture":
                device.begin_capture(stream)
                cuda.DeviceMemory(device, 256, "a test")
            elif mistake == "allocation beside a global capture":
                mode = CaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL
                device.graph_call("test", "cuStreamBeginCapture", stream.handle, mode)
                with ThreadPoolExecutor(1) as thread:
                    refused = thread.submit(attempt, lambda: allocate(device)).result()
                assert "not permitted when stream is capturing" in str(refused)
                device.end_capture(stream)
            elif mistake == "captured without a run in advance":
                context.set_input_shape("kv_positions", (16,))
                backend._device.begin_capture(backend._stream)
            else:
                entry = next(iter(backend._graphs._entries.values()))
                entry.context._context.set_input_shape("kv_positions", (16,))
                entry.graph.launch(backend._stream)
            backend._decode_buffers.upload(backend._stream, 1, 1, 1)
            backend._contexts["decode"].enqueue()
            backend._stream.synchronize()

        with backend._device.active():
            other = cuda.Stream(device)
            with pytest.raises((RuleError, BackendError), match=_MISTAKES[mistake]):
                err()
            backend._device.abandon_capture(backend._stream)
            other.close()
        gpu.streams[backend._stream.handle].pending.clear()


@both_drivers
def test_the_stand_in_poisons_values_read_too_early(gpu: FakeGpu, engine_bundles: EngineBundles):
    with GpuRunner(engine_bundles("qwen2", "native"), gpu) as runner:
        backend = runner.engine
        backend._stream.synchronize = lambda: None  # type: ignore[method-assign]
        assert np.isnan(runner.step(random_ids(1, 3), [1])).all()
        del backend._stream.synchronize
        with backend._device.active():
            backend._stream.synchronize()
