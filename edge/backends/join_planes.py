"""The load-time join of INT8 weights that are stored as two INT4 planes, for ONNX Runtime.

In the file such a weight is ``16 * high + low``: two matrix products and their sum, which is what
TensorRT keeps packed. ONNX Runtime has one kernel for 8-bit weights (MatMulNBits) and takes two
passes over the activations for two planes. So each pair becomes one INT8 weight of the low plane's
scales, held in memory; only the session's copy of the graph is rewritten, and a parity test holds
both against each other.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge.bundle.manifest import Manifest
from edge.bundle.onnx_file import ExternalTensor, OnnxFile
from edge.bundle.schemes import HIGH_PLANE

from .cpu_attention import expect_node

if TYPE_CHECKING:
    import onnxruntime

_CHUNK_BYTES = 1 << 17  # of a plane; with its temporaries it stays in the L2 cache


def join_planes(graph: OnnxFile, bundle: Path, manifest: Manifest) -> None:
    """Replace every pair of planes by one INT8 weight in `OnnxFile.in_memory`.

    One by one, so that the planes of one weight at most are held beside the joined ones.

    Raises:
        BundleError: the graph is not one that edge-llm's exporter wrote.
    """
    linears = manifest.quantization.linears
    names = [name for name, linear in linears.items() if linear.scheme.planes]
    if not names:
        return
    producers = {output: node for node in graph.nodes for output in node.outputs}
    consumers = {name: node for node in graph.nodes for name in node.inputs}
    stored = graph.external_tensors()
    joined: dict[str, NDArray[np.int8]] = {}
    sums = set()
    for name in names:
        low, high = f"{name}.weight", f"{name}.high_weight"
        dequantized = expect_node(consumers, high, "DequantizeLinear")
        product = expect_node(consumers, dequantized.outputs[0], "MatMul")
        total = expect_node(consumers, product.outputs[0], "Add")
        # What only the high plane needed is left out when the graph is serialized.
        expect_node(producers, total.inputs[0], "MatMul").outputs = total.outputs
        sums.add(total.name)
        planes = [_read(bundle, stored[each]) for each in (low, high)]
        joined[low] = join(*planes).reshape(stored[low].shape)
    graph.nodes = [node for node in graph.nodes if node.name not in sums]
    graph.put_in_memory(joined)


def join(low: NDArray[np.uint8], high: NDArray[np.uint8]) -> NDArray[np.int8]:
    """``16 * high + low`` of packed INT4 planes, int8 with two weights per byte of a plane."""
    result = np.empty((low.size, 2), dtype=np.uint8)
    sign = np.uint8(HIGH_PLANE // 2)
    for start in range(0, low.size, _CHUNK_BYTES):
        chunk = slice(start, start + _CHUNK_BYTES)
        # Bytes wrap around: the sum of nibble and plane is what two's complement makes of it.
        for column, (below, above) in enumerate(
            ((low[chunk] & 15, high[chunk] << 4), (low[chunk] >> 4, high[chunk] & 0xF0))
        ):
            below ^= sign
            below -= sign
            np.add(below, above, out=result[chunk, column])
    return result.view(np.int8)


def hand_over(graph: OnnxFile, ort: ModuleType, options: onnxruntime.SessionOptions) -> None:
    """Let a session take the weights that are in memory; nothing is copied."""
    values = [ort.OrtValue.ortvalue_from_numpy(array) for array in graph.in_memory.values()]
    options.add_external_initializers(list(graph.in_memory), values)


def _read(bundle: Path, tensor: ExternalTensor) -> NDArray[np.uint8]:
    with (bundle / tensor.file).open("rb") as file:
        return np.fromfile(file, np.uint8, tensor.num_bytes, offset=tensor.offset)
