"""Adds inputs, outputs and constants to an ONNX graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from edge.bundle.onnx_file import ELEMENT_NUMBERS, Message, OnnxFile, tensor_elsewhere
from edge.errors import BundleError


def add_floats(
    graph: OnnxFile, name: str, shape: Sequence[int], values: NDArray[np.float32]
) -> str:
    """Add an FP32 constant."""
    tensor = Message()
    for size in shape:
        tensor.add(1, size)
    tensor.add(2, ELEMENT_NUMBERS["fp32"]).add(8, name).add(9, values.astype("<f4").tobytes())
    graph.proto.add(5, tensor)
    return name


def add_output(graph: OnnxFile, info: Message) -> None:
    """Make a tensor of the graph one more output; ``info`` is made by `tensor_info`.

    Raises:
        BundleError: no node computes it.
    """
    name = info.text(1)
    if not any(name in node.outputs for node in graph.nodes):
        raise BundleError(
            f"the decoder graph has no tensor {name!r}; export the bundle again with this edge-llm"
        )
    graph.proto.add(12, info)


def add_inputs(graph: OnnxFile, infos: Iterable[Message]) -> None:
    """Make tensors inputs, and drop constants of their names; `tensor_info` makes ``infos``."""
    new = {info.text(1): info for info in infos}
    tensors = graph.proto.all_bytes(5)
    graph.proto.replace(5, [data for data in tensors if Message.parse(data).text(8) not in new])
    for info in new.values():
        graph.proto.add(11, info)


def put_in_file(
    graph: OnnxFile, name: str, dtype: str, shape: Sequence[int], place: tuple[str, int, int]
) -> None:
    """Make a tensor, old or new, a constant whose bytes are in a file.

    Args:
        graph: the graph.
        name: name of the tensor.
        dtype: its element type (in `ELEMENT_TYPES`).
        shape: its dimensions.
        place: the file beside the model's, its first byte there, and its number of bytes.
    """
    tensors = graph.proto.all_bytes(5)
    kept = [data for data in tensors if Message.parse(data).text(8) != name]
    graph.proto.replace(5, [*kept, tensor_elsewhere(name, dtype, shape, place).serialize()])
