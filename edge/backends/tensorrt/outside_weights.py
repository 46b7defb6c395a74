"""Weights that an engine takes as inputs: a block of device memory, filled from their file."""

from __future__ import annotations

from contextlib import ExitStack, closing

from edge.backends import cuda
from edge.bundle.engine_file import OutsideWeights, read_outside

from .engine import ChosenEngine

_PIECES_BYTES = 32 << 20
"""Host memory that the file passes through, in two halves."""


def load_weights(
    chosen: ChosenEngine,
    outside: OutsideWeights,
    device: cuda.Device,
    stream: cuda.Stream,
    resources: ExitStack,
) -> dict[str, int]:
    """Copy the weights of an engine to the device; all its contexts share them.

    Args:
        chosen: the engine.
        outside: of its ``engine.json``.
        device: where.
        stream: on which the copies run.
        resources: the block is pushed here.

    Returns:
        The address of each by name.

    Raises:
        IntegrityError: the file is not what ``engine.json`` says.
        DeviceMemoryError: it does not fit.
        DeviceError: a copy failed.
    """
    directory, info, _ = chosen
    block = cuda.DeviceMemory(device, outside.num_bytes, "the weights")
    resources.callback(block.close)
    size = min(_PIECES_BYTES, 2 * outside.num_bytes)
    with closing(cuda.PinnedMemory(device, size, "pieces of the weights", mapped=False)) as pieces:
        try:
            for at, piece in read_outside(directory, info, outside, pieces.array):
                stream.synchronize()  # of the piece before; this one is copied while it is hashed
                stream.upload(block.address + at, piece)
        finally:
            stream.synchronize()
    return {name: block.address + tensor.offset for name, tensor in outside.tensors.items()}
