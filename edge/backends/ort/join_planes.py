"""The load-time join of INT8 weights that are stored as two INT4 planes, for ONNX Runtime.

In the file such a weight is ``16 * high + low``: two matrix products and their sum, which is what
TensorRT keeps packed. Where activations are rounded to int8, ONNX Runtime has one kernel for 8-bit
weights (MatMulNBits) and takes two passes over the activations for two planes. So each pair becomes
one 8-bit weight of the low plane's scales, held in memory; only the session's copy of the graph is
rewritten, and a parity test holds both against each other.

Integers of others' checkpoints reach down to -136 (`PLANES_LEAST`), in layers with offsets. Those
are joined around 136; where the kernel takes 128 for granted, the layer's offsets make up for it.

The joined weights are UINT8 with a zero point of 128: what ONNX Runtime's option for exact products
of INT8 (`session.session_options`) makes of an INT8 constant in groups does not run.

MatMulNBits (``com.microsoft``, onnxruntime ContribOperators.md) takes weights as
``[out, groups, group size]``, around 128, and scales as ``[out, groups]``. ONNX Runtime makes it of
`DequantizeLinear` and `MatMul` by itself, with one more copy of all weights.
"""

from __future__ import annotations

import math
from collections.abc import Container
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge.bundle.manifest import Manifest
from edge.bundle.onnx_file import ExternalTensor, Node, OnnxFile, attribute
from edge.bundle.schemes import HIGH_PLANE, PLANES_LEAST

from .cpu_attention import OWN_DOMAIN, expect_node

if TYPE_CHECKING:
    import onnxruntime

_ZERO_POINT = np.uint8(128)
_BEYOND = np.uint8(-128 - PLANES_LEAST)
_CHUNK_BYTES = 1 << 17  # of a plane; with its temporaries it stays in the L2 cache


def join_planes(
    graph: OnnxFile,
    bundle: Path,
    manifest: Manifest,
    *,
    accuracy_level: int | None = None,
    without: Container[str] = (),
) -> None:
    """Replace every pair of planes by one UINT8 weight in `OnnxFile.in_memory`.

    Planes are read in chunks, so nothing but the joined weights takes memory: one block, which goes
    back to the system as a whole.

    Args:
        graph: of the decoder.
        bundle: the bundle's directory.
        manifest: its manifest.
        accuracy_level: write the products as MatMulNBits with this level (see
            `session.accuracy_level`), for a graph whose scales are FP32; None leaves
            `DequantizeLinear` and `MatMul`.
        without: layers that are left alone.

    Raises:
        BundleError: the graph is not one that edge-llm's exporter wrote.
    """
    linears = manifest.quantization.linears
    names = [
        name for name, linear in linears.items() if linear.scheme.planes and name not in without
    ]
    if not names:
        return
    drop_high_products(graph, names)
    stored = graph.external_tensors()
    consumers = {name: node for node in graph.nodes for name in node.inputs}
    sizes = [math.prod(linears[name].shape) for name in names]
    block = np.empty(sum(sizes), dtype=np.uint8)
    parts = np.split(block, np.cumsum(sizes)[:-1])
    joined: dict[str, NDArray[Any]] = {}
    products: dict[str, Node] = {}
    for name, part in zip(names, parts, strict=True):
        weight, scale = f"{name}.weight", f"{name}.scale"
        low, high = stored[weight], stored[f"{name}.high_weight"]
        rows, columns = low.shape
        group_size = linears[name].scheme.group_size
        groups = rows // group_size
        beyond = _BEYOND if linears[name].offsets else np.uint8(0)
        dequantized = expect_node(consumers, weight, "DequantizeLinear")
        if accuracy_level is None or columns % 2:  # rows end within a byte of odd ones
            _read_joined(bundle, low, high, part)
            joined[weight] = part.reshape(low.shape)
            zero = _ZERO_POINT + beyond
            zero_point = f"zero_point.{zero}.{groups}x{columns}"
            joined.setdefault(zero_point, np.full((groups, columns), zero))
            dequantized.inputs = [*dequantized.inputs[:2], zero_point]
        else:
            joined[weight] = part.reshape(columns, groups, group_size)
            _read_transposed(bundle, low, high, joined[weight])
            scales = _read_floats(bundle, stored[scale])
            joined[scale] = scales.T.copy()
            if beyond:
                offset = f"{name}.offset"
                joined[offset] = _read_floats(bundle, stored[offset]) - scales * np.float32(beyond)
            product = expect_node(consumers, dequantized.outputs[0], "MatMul")
            attributes = {
                "K": rows,
                "N": columns,
                "bits": 8,
                "block_size": group_size,
                "accuracy_level": accuracy_level,
            }
            products[product.name] = Node(
                "MatMulNBits",
                [product.inputs[0], weight, scale],
                product.outputs,
                product.name,
                OWN_DOMAIN,
                [attribute(key, value) for key, value in attributes.items()],
            )
        part += beyond  # modulo 256, as `join` does
    graph.nodes = [products.get(node.name, node) for node in graph.nodes]
    if products:
        graph.use_domain(OWN_DOMAIN, 1)
    graph.put_in_memory(joined)


def join(low: NDArray[np.uint8], high: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """Write ``16 * high + low + 128`` of packed INT4 planes, two weights per byte of a plane.

    Args:
        low: plane ``[..., n]``.
        high: plane likewise.
        out: ``[..., 2 * n]``, in any layout.
    """
    sign = np.uint8(HIGH_PLANE // 2)
    # Bytes wrap around: the sum of nibble and plane is what two's complement makes of it.
    for column, (below, above) in enumerate(
        ((low & 15, high << 4), (low >> 4, high & 0xF0)),
    ):
        below ^= sign
        below -= sign
        above ^= _ZERO_POINT
        np.add(below, above, out=out[..., column::2])


def hand_over(graph: OnnxFile, ort: ModuleType, options: onnxruntime.SessionOptions) -> None:
    """Let a session take the weights that are in memory; nothing is copied."""
    values = [ort.OrtValue.ortvalue_from_numpy(array) for array in graph.in_memory.values()]
    options.add_external_initializers(list(graph.in_memory), values)


def drop_high_products(graph: OnnxFile, names: list[str]) -> None:
    """Let the low plane's product be the sum; what only the high plane needs is then unused."""
    producers = {output: node for node in graph.nodes for output in node.outputs}
    consumers = {name: node for node in graph.nodes for name in node.inputs}
    sums = set()
    for name in names:
        dequantized = expect_node(consumers, f"{name}.high_weight", "DequantizeLinear")
        product = expect_node(consumers, dequantized.outputs[0], "MatMul")
        total = expect_node(consumers, product.outputs[0], "Add")
        expect_node(producers, total.inputs[0], "MatMul").outputs = total.outputs
        sums.add(total.name)
    graph.nodes = [node for node in graph.nodes if node.name not in sums]


def _read_joined(
    bundle: Path, low: ExternalTensor, high: ExternalTensor, out: NDArray[np.uint8]
) -> None:
    with (bundle / low.file).open("rb") as file:
        for start in range(0, low.num_bytes, _CHUNK_BYTES):
            count = min(_CHUNK_BYTES, low.num_bytes - start)
            planes = []
            for plane in (low, high):
                file.seek(plane.offset + start)
                planes.append(np.frombuffer(file.read(count), np.uint8))
            join(planes[0], planes[1], out[2 * start : 2 * (start + count)])


def _read_transposed(
    bundle: Path, low: ExternalTensor, high: ExternalTensor, out: NDArray[np.uint8]
) -> None:
    """Join the planes ``[in, out]`` of a weight to ``[out, groups, group size]``."""
    columns, groups, group_size = out.shape
    width = max(_CHUNK_BYTES // group_size, 1)  # bytes of a row of a plane in one chunk
    both = np.empty((group_size, 2 * width), np.uint8)
    row_bytes = columns // 2
    with (bundle / low.file).open("rb") as file:
        for group in range(groups):
            planes = []
            for plane in (low, high):
                file.seek(plane.offset + group * group_size * row_bytes)
                values = np.frombuffer(file.read(group_size * row_bytes), np.uint8)
                planes.append(values.reshape(group_size, row_bytes))
            for start in range(0, row_bytes, width):
                chunks = [plane[:, start : start + width] for plane in planes]
                part = both[:, : 2 * chunks[0].shape[1]]
                join(chunks[0], chunks[1], part)
                out[2 * start : 2 * start + part.shape[1], group] = part.T


def _read_floats(bundle: Path, tensor: ExternalTensor) -> NDArray[np.float32]:
    with (bundle / tensor.file).open("rb") as file:
        file.seek(tensor.offset)
        return np.frombuffer(file.read(tensor.num_bytes), np.float32).reshape(tensor.shape)
