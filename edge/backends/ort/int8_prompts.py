"""Rewrites a decoder at load for reading prompts: products of INT8 by INT8 instead of by INT4.

A decode step is bound by reading weights, a prompt by multiplying. ONNX Runtime's product of INT4
blocks (MatMulNBits) unpacks them for every tile of tokens. Its product of two INT8 matrices has no
blocks and is two to three times as fast for hundreds of tokens. So each INT4 or two-plane weight
becomes INT8 with one scale per output, and inputs are rounded to 8 bits with one scale per token:

    y = (round(x / a) @ W8) * b * a,    a = max |x| / 127 of each token,  b = scale of each output

The inputs of ``down`` are products of two activations and spread too wide for 8 bits. So the rest
of the rounding is rounded once more, 254 times as fine, and multiplied, too. The lm_head stays as
it is, since a prompt needs one row of logits.

The first token of a text may hold a few activations a thousand times as large as the others, which
rounding by token then loses. Its own logits are wrong; those of later tokens are measured in
docs/benchmarks.md. So such a step must have `INT8_PREFILL_TOKENS` and a single row of logits.

On x86 without VNNI, ONNX Runtime's kernel for UINT8 by INT8 adds pairs of products in 16 bits,
where they saturate. There the weights are UINT8 around 128, whose kernel is exact.

Only a session's copy of the graph is rewritten; it fills the cache of the other session.
`MatMulIntegerToFloat` is an operator of ONNX Runtime (ContribOperators.md).
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.bundle.manifest import Manifest
from edge.bundle.onnx_file import ExternalTensor, Node, OnnxFile
from edge.bundle.schemes import HIGH_PLANE, PLANES_LEAST
from edge.device.process import read_cpu_flags
from edge.errors import ConfigError

from .cpu_attention import OWN_DOMAIN, expect_node
from .join_planes import drop_high_products

_LARGEST = 127
_FINE = 254  # rounding leaves at most half a step
_CHUNK_BYTES = 1 << 17  # of packed weights; with temporaries it fits the L2 cache
_ONE, _FINE_STEP, _ZERO = "int8.one", "int8.fine", "int8.zero_point"
_WEIGHT_ZERO = "int8.weight_zero_point"
_LEAST, _STEP, _LAST_AXIS = "int8.least", "int8.step", "int8.last_axis"


def int8_linears(manifest: Manifest) -> list[str]:
    """Return the names of the linear layers that get INT8 products for prompts.

    Raises:
        ConfigError: there are none.
    """
    linears = manifest.quantization.linears
    names = [
        name
        for name, linear in linears.items()
        if (linear.scheme.kind == "int4" or linear.scheme.planes)
        and name != "lm_head"
        and linear.shape[1] % 2 == 0  # rows of an odd length end within a byte
    ]
    if not names or any(linear.scheme.kind == "w8a8" for linear in linears.values()):
        raise ConfigError(
            f"prefill int8 is for INT4 weights, and INT8 weights of float inputs; {manifest.name} "
            f"({manifest.quantization.name}) has none, or multiplies INT8 as it is; leave it out"
        )
    return names


def int8_bytes(manifest: Manifest) -> int:
    """Return the bytes of the INT8 weights, which come on top of those that decode reads.

    Raises:
        ConfigError: `int8_linears` finds none.
    """
    linears = manifest.quantization.linears
    shapes = [linears[name].shape for name in int8_linears(manifest)]
    return sum((rows + 4) * columns for rows, columns in shapes)


def widen_products(graph: OnnxFile, bundle: Path, manifest: Manifest) -> list[str]:
    """Replace products with weights in one INT4 plane or two by products of INT8 and INT8.

    Args:
        graph: the decoder, with FP32 scales and planes that are not joined.
        bundle: the bundle's directory.
        manifest: its manifest.

    Returns:
        The names of the layers that were replaced: those of `int8_linears`.

    Raises:
        BundleError: the graph is not one that edge-llm's exporter wrote.
        ConfigError: `int8_linears` finds no layer.
    """
    names, linears = int8_linears(manifest), manifest.quantization.linears
    drop_high_products(graph, [name for name in names if linears[name].scheme.planes])
    stored = graph.external_tensors()
    consumers = {name: node for node in graph.nodes for name in node.inputs}
    values: dict[str, NDArray[Any]] = {
        _ONE: np.array(1, np.float32),
        _FINE_STEP: np.array(1 / _FINE, np.float32),
        _ZERO: np.array(128, np.uint8),
        _LEAST: np.array(1e-30, np.float32),  # a token of zeros
        _STEP: np.array(1 / _LARGEST, np.float32),
        _WEIGHT_ZERO: np.array(0, np.int8) if _signed_weights() else np.array(128, np.uint8),
    }
    graph.add_int64(_LAST_AXIS, [-1])
    rounded: set[str] = set()
    products: dict[str, list[Node]] = {}
    for name in names:
        weight, values[f"{name}.int8_scale"] = _read(bundle, name, stored)
        if not _signed_weights():
            weight = weight.view(np.uint8)
            weight ^= 128
        values[f"{name}.int8"] = weight
        dequantized = expect_node(consumers, f"{name}.weight", "DequantizeLinear")
        product = expect_node(consumers, dequantized.outputs[0], "MatMul")
        tensor, twice = product.inputs[0], name.endswith(".down")
        products[product.name] = [
            *([] if tensor in rounded else _round(tensor, twice)),
            *_multiply(tensor, name, product.outputs, twice),
        ]
        rounded.add(tensor)
    graph.nodes = [new for node in graph.nodes for new in products.get(node.name, [node])]
    graph.use_domain(OWN_DOMAIN, 1)
    graph.put_in_memory(values)
    return names


@functools.cache
def _signed_weights() -> bool:
    """Whether the product of UINT8 by INT8 is exact on this CPU."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    return not read_cpu_flags().isdisjoint(("avx512_vnni", "avx_vnni"))


def _node(op_type: str, inputs: list[str], output: str, domain: str = "") -> Node:
    return Node(op_type, inputs, [output], output, domain)


def _round(name: str, twice: bool) -> list[Node]:
    """Round a tensor ``[..., n]`` to ``{name}.int8``, with a step ``{name}.step`` per row.

    Args:
        name: name of the tensor.
        twice: whether the rest of the rounding becomes ``{name}.int8_rest``.
    """
    nodes = [
        _node("Abs", [name], f"{name}.size"),
        _node("ReduceMax", [f"{name}.size", _LAST_AXIS], f"{name}.largest"),
        _node("Max", [f"{name}.largest", _LEAST], f"{name}.not_zero"),
        _node("Mul", [f"{name}.not_zero", _STEP], f"{name}.step"),
        _node("Div", [name, f"{name}.step"], f"{name}.steps"),
        _node("QuantizeLinear", [f"{name}.steps", _ONE, _ZERO], f"{name}.int8"),
    ]
    if twice:
        nodes += [
            _node("DequantizeLinear", [f"{name}.int8", _ONE, _ZERO], f"{name}.whole"),
            _node("Sub", [f"{name}.steps", f"{name}.whole"], f"{name}.rest"),
            _node("QuantizeLinear", [f"{name}.rest", _FINE_STEP, _ZERO], f"{name}.int8_rest"),
        ]
    return nodes


def _multiply(tensor: str, name: str, outputs: list[str], twice: bool) -> list[Node]:
    """Multiply a tensor rounded by `_round` with the INT8 weight of a layer."""

    def multiply(inputs: str, step: str, output: str) -> Node:
        operands = [inputs, f"{name}.int8", step, f"{name}.int8_scale", _ZERO, _WEIGHT_ZERO]
        return _node("MatMulIntegerToFloat", operands, output, OWN_DOMAIN)

    nodes = [multiply(f"{tensor}.int8", _ONE, f"{name}.steps")]
    total = f"{name}.steps"
    if twice:
        total = f"{name}.all_steps"
        nodes += [
            multiply(f"{tensor}.int8_rest", _FINE_STEP, f"{name}.fine_steps"),
            _node("Add", [f"{name}.steps", f"{name}.fine_steps"], total),
        ]
    return [*nodes, Node("Mul", [total, f"{tensor}.step"], outputs, f"{name}.int8_product")]


def _read(
    bundle: Path, name: str, stored: dict[str, ExternalTensor]
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Read a weight ``[in, out]`` in INT8, and its scale ``[out]``."""
    low, high = stored[f"{name}.weight"], stored.get(f"{name}.high_weight")
    scales = stored[f"{name}.scale"].read(bundle)
    rows, columns = low.shape
    group_size = rows // len(scales)
    # The most that one plane, or two, can hold; by using it, each weight is read only once.
    largest = HIGH_PLANE // 2 if high is None else HIGH_PLANE**2 // 2
    if high is not None and f"{name}.offset" in stored:
        largest = -PLANES_LEAST
    column_scales = scales.max(axis=0) * np.float32(largest / _LARGEST)
    ratios = scales / np.maximum(column_scales, np.finfo(np.float32).tiny)
    planes = [
        np.fromfile(bundle / plane.file, np.uint8, plane.num_bytes, offset=plane.offset)
        for plane in (low, high)
        if plane
    ]
    out = np.empty((rows, columns), np.int8)
    height = min(max(_CHUNK_BYTES // columns, 1), group_size)
    part = np.empty((height, columns), np.float32)
    for group in range(len(scales)):
        for start in range(group * group_size, (group + 1) * group_size, height):
            end = min(start + height, (group + 1) * group_size)
            values = part[: end - start]
            unpack([plane.reshape(rows, -1)[start:end] for plane in planes], values)
            values *= ratios[group]
            np.rint(values, out=values)
            out[start:end] = values
    return out, column_scales


def unpack(planes: list[NDArray[np.uint8]], out: NDArray[np.float32]) -> None:
    """Write the values of packed INT4 planes.

    Args:
        planes: ``[..., n]``, the low one and, if there are two, the high one.
        out: ``[..., 2 * n]``.
    """
    signed = [plane.view(np.int8) for plane in planes]
    for column in (0, 1):
        # A shift to the left drops the other nibble, one to the right restores the sign.
        values = [(plane if column else plane << 4) >> 4 for plane in signed]
        out[..., column::2] = values[0]
        if len(values) > 1:
            out[..., column::2] += np.float32(HIGH_PLANE) * values[1]
