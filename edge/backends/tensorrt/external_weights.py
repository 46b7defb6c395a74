"""Loads weights that an engine takes as inputs from their file into a block of device memory."""

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
        outside: the record of the weights in its ``engine.json``.
        device: device to copy to.
        stream: stream that the copies run on.
        resources: gets the block, to free it.

    Returns:
        The address of each weight by name.

    Raises:
        IntegrityError: the file does not match ``engine.json``.
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
                stream.synchronize()  # of the last piece, which was copied while this was hashed
                stream.upload(block.address + at, piece)
        finally:
            stream.synchronize()
    return {name: block.address + tensor.offset for name, tensor in outside.tensors.items()}
