"""Packs INT4 and INT8 weights at load for ONNX Runtime: planes are joined, and packed by output.

In the file such a weight is ``16 * high + low``: two matrix products and their sum, which TensorRT
keeps packed. If activations are rounded to int8, ONNX Runtime has one kernel for 8-bit weights
(MatMulNBits), while two planes would take two passes over the activations. So each pair becomes one
8-bit weight with the low plane's scales, held in memory. Only the session's copy of the graph is
rewritten, and a parity test compares both.

Integers of others' checkpoints reach down to -136 (`PLANES_LEAST`), in layers with offsets. Those
are joined around 136; where the kernel takes 128 for granted, the layer's offsets correct it.

The joined weights are UINT8 with a zero point of 128, since INT8 constants in groups do not run
under ONNX Runtime's option for exact INT8 products (`session.session_options`).

MatMulNBits (``com.microsoft``, onnxruntime ContribOperators.md) takes weights as
``[out, groups, group size]``, around 128 or, two to a byte, around 8, and scales as
``[out, groups]``. ONNX Runtime can make it of `DequantizeLinear` and `MatMul` by itself, but on one
core and with one more copy of all weights; here layers are packed in parallel.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Container
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge.bundle.manifest import Manifest
from edge.bundle.onnx_file import ExternalTensor, Node, OnnxFile, attribute
from edge.bundle.schemes import HIGH_PLANE, PLANES_LEAST
from edge.device.process import count_usable_cpus

from .cpu_attention import OWN_DOMAIN, expect_node
from .mapped_weights import has_room, map_file

if TYPE_CHECKING:
    import onnxruntime

_ZERO_POINT = np.uint8(128)
_SIGNS = np.uint8(0x88)  # flips two weights in a byte from two's complement to around 8
_BEYOND = np.uint8(-128 - PLANES_LEAST)
_ROOM = 2  # times the weights, since the bundle's scales are half as wide
_CHUNK_BYTES = 1 << 19  # of a plane; with temporaries it fits the L2 cache


def join_planes(
    graph: OnnxFile,
    bundle: Path,
    manifest: Manifest,
    *,
    accuracy_level: int | None = None,
    without: Container[str] = (),
) -> None:
    """Replace every pair of planes, and INT4 in products of MatMulNBits, in `OnnxFile.in_memory`.

    Only the new weights take memory. On a CPU they are in files (`mapped_weights`) if there is room
    for such files; else INT4 stays as it is. ONNX Runtime packs and releases files one layer after
    the other, but would keep weights that it is handed until the last one is packed.

    Args:
        graph: the decoder.
        bundle: the bundle's directory.
        manifest: its manifest.
        accuracy_level: write the products as MatMulNBits with this level
            (`session.accuracy_level`), for a graph whose scales are FP32. None leaves
            `DequantizeLinear` and `MatMul`, and INT4 as it is.
        without: layers that are not changed.

    Raises:
        BundleError: the graph is not one that edge-llm's exporter wrote.
    """
    linears = {n: each for n, each in manifest.quantization.linears.items() if n not in without}
    names = planes = [name for name, linear in linears.items() if linear.scheme.planes]
    num_bytes = sum(linear.num_bytes for linear in linears.values())
    in_files = accuracy_level is not None and has_room(_ROOM * num_bytes)
    if in_files:
        names = [*planes, *(n for n, linear in linears.items() if linear.scheme.kind == "int4")]
    if not names:
        return
    drop_high_products(graph, planes)
    stored = graph.external_tensors()
    consumers = {name: node for node in graph.nodes for name in node.inputs}
    bits = {name: 8 if linears[name].scheme.planes else 4 for name in names}
    joined: dict[str, NDArray[Any]] = {}
    products: dict[str, Node] = {}

    def allocate(name: str, shape: tuple[int, ...], dtype: type = np.uint8) -> NDArray[Any]:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        memory = map_file(size) if in_files and dtype is np.uint8 else None
        if memory is None:
            # Small pages, unlike numpy's: making room for huge ones costs the kernel more time than
            # they save.
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        joined[name] = np.frombuffer(memory, dtype).reshape(shape)
        return joined[name]

    def replace(name: str) -> None:
        weight, scale = f"{name}.weight", f"{name}.scale"
        low, high = stored[weight], stored.get(f"{name}.high_weight")
        rows, columns = low.shape
        group_size = linears[name].scheme.group_size
        groups = rows // group_size
        beyond = _BEYOND if high and linears[name].offsets else np.uint8(0)
        dequantized = expect_node(consumers, weight, "DequantizeLinear")
        if accuracy_level is None or columns % 2:  # rows of an odd length end within a byte
            if high is None:
                return
            part = allocate(weight, low.shape)
            _read_joined(bundle, low, high, part.reshape(-1))
            zero = _ZERO_POINT + beyond
            zero_point = f"zero_point.{zero}.{groups}x{columns}"
            joined.setdefault(zero_point, np.full((groups, columns), zero))
            dequantized.inputs = [*dequantized.inputs[:2], zero_point]
        else:
            part = allocate(weight, (columns, groups, group_size * bits[name] // 8))
            _read_transposed(bundle, low, high, part)
            scales = stored[scale].read(bundle)
            allocate(scale, (columns, groups), np.float32)[:] = scales.T
            if beyond:
                offset = f"{name}.offset"
                moved = stored[offset].read(bundle) - scales * np.float32(beyond)
                allocate(offset, moved.shape, np.float32)[:] = moved
            product = expect_node(consumers, dequantized.outputs[0], "MatMul")
            attributes = {
                "K": rows,
                "N": columns,
                "bits": bits[name],
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
        if beyond:
            part += beyond  # modulo 256, as `join` does

    with ThreadPoolExecutor(count_usable_cpus()) as pool:
        list(pool.map(replace, names))
    graph.nodes = [products.get(node.name, node) for node in graph.nodes]
    if products:
        graph.use_domain(OWN_DOMAIN, 1)
    graph.put_in_memory(joined)


def join(low: NDArray[np.uint8], high: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """Write ``16 * high + low + 128`` of packed INT4 planes, two weights per byte of a plane.

    Args:
        low: plane ``[..., n]``.
        high: plane ``[..., n]``.
        out: ``[..., 2 * n]``, in any layout.
    """
    sign = np.uint8(HIGH_PLANE // 2)
    # Bytes wrap around, so the sum of nibble and plane is right in two's complement.
    for column, (below, above) in enumerate(
        ((low & 15, high << 4), (low >> 4, high & 0xF0)),
    ):
        below ^= sign
        below -= sign
        above ^= _ZERO_POINT
        np.add(below, above, out=out[..., column::2])


def hand_over(graph: OnnxFile, ort: ModuleType, options: onnxruntime.SessionOptions) -> None:
    """Pass the weights in memory to a session; nothing is copied."""
    values = [ort.OrtValue.ortvalue_from_numpy(array) for array in graph.in_memory.values()]
    options.add_external_initializers(list(graph.in_memory), values)


def drop_high_products(graph: OnnxFile, names: list[str]) -> None:
    """Replace the sum by the low plane's product; nodes only for the high plane become unused."""
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
    planes = _map(bundle, low), _map(bundle, high)
    for start in range(0, low.num_bytes, _CHUNK_BYTES):
        end = min(start + _CHUNK_BYTES, low.num_bytes)
        join(planes[0][start:end], planes[1][start:end], out[2 * start : 2 * end])


def _read_transposed(
    bundle: Path, low: ExternalTensor, high: ExternalTensor | None, out: NDArray[np.uint8]
) -> None:
    """Pack the one or two planes ``[in, out]`` of a weight as MatMulNBits takes them."""
    rows, columns = low.shape
    planes = [_map(bundle, plane).reshape(rows, -1) for plane in (low, high) if plane]
    width = max(_CHUNK_BYTES // rows, 1)  # bytes of a row of a plane in one chunk
    packed = out.reshape(columns // 2, 2, -1)
    values = np.empty((rows, 2 * width), np.uint8)
    for start in range(0, columns // 2, width):
        chunks = [plane[:, start : start + width] for plane in planes]
        part = packed[start : start + width]
        if high is None:
            pairs = chunks[0].reshape(rows // 2, 2, -1)
            even, odd = pairs[:, 0], pairs[:, 1]
            for column, both in enumerate(((even & 15) | (odd << 4), (even >> 4) | (odd & 0xF0))):
                both ^= _SIGNS
                part[:, column] = both.T
        else:
            joined = values[:, : 2 * len(part)]
            join(chunks[0], chunks[1], joined)
            part.reshape(-1, rows)[:] = joined.T


def _map(bundle: Path, tensor: ExternalTensor) -> NDArray[np.uint8]:
    """Map a tensor's bytes, and make the kernel read them ahead in their order."""
    start = tensor.offset % mmap.ALLOCATIONGRANULARITY
    size, place = start + tensor.num_bytes, tensor.offset - start
    with (bundle / tensor.file).open("rb") as file:
        pages = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ, offset=place)
    pages.madvise(mmap.MADV_WILLNEED)
    return np.frombuffer(pages, np.uint8, tensor.num_bytes, start)
