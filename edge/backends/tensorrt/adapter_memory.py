"""Reserves GPU memory for the adapters of all slots; `edge.adapters.device` fills it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge.adapters.device import DeviceSlots, slots_bytes
from edge.backends import cuda
from edge.bundle.manifest import Manifest

from .step_buffers import round_to_bf16


def reserve_adapters(
    bundle: Path,
    manifest: Manifest,
    num_slots: int,
    device: cuda.Device,
    stream: cuda.Stream,
    resources: ExitStack,
) -> DeviceSlots:
    """Allocate the memory, all zeros.

    Args:
        bundle: directory of the bundle, which takes adapters.
        manifest: its manifest.
        num_slots: number of slots of the cache.
        device: device to allocate on.
        stream: stream that copies run on.
        resources: gets the allocation, to free it.

    Raises:
        DeviceMemoryError: it does not fit.
        BundleError: the bundle's factors cannot be read.
    """
    num_bytes = slots_bytes(manifest, num_slots)
    memory = cuda.DeviceMemory(device, num_bytes, f"the adapters of {num_slots} slots")
    resources.callback(memory.close)
    stream.clear(memory.address, num_bytes)
    mover = cuda.BoxCopy(device)

    def copy(target: int, source: int | NDArray[np.uint16], size: int) -> None:
        boxes = cuda.Box(target, size, 1), cuda.Box(source, size, 1)
        mover.run(*boxes, width=size, height=1, depth=1, stream=stream)
        if not isinstance(source, int):
            stream.synchronize()

    bf16 = manifest.dtype == "bf16"
    return DeviceSlots(
        bundle,
        manifest,
        num_slots,
        address=memory.address,
        store=round_to_bf16 if bf16 else lambda values: values.astype(np.float16),
        copy=copy,
        clear=stream.clear,
    )
