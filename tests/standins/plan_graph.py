"""What a plan of the stand-in computes: its network as ONNX, plugins in operators."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edge.backends.tensorrt.launch_rules import BLOCK
from edge.bundle.onnx_file import ELEMENT_NUMBERS, Message, Node, OnnxFile, attribute
from edge.bundle.onnx_values import Constant, read_constant
from edge_make.graph_edits import add_floats

from .network import Attention11, CausalMaskKind, DataType, Network


def query_heads(network: Network) -> int:
    """Query heads, by the exporter's constants."""
    prefix = "shape.heads."
    return max(int(name.removeprefix(prefix)) for name in network.shapes if name.startswith(prefix))


def make_model(network: Network) -> bytes:
    """The network's live part as ONNX, with its weights in it."""
    assert network.graph is not None
    graph = network.graph
    for attention in network.attentions:
        if isinstance(attention, Attention11):
            _mask_by_lengths(network, attention)
    graph.nodes = [part for node in graph.nodes for part in _without_plugin(network, node)]
    graph.nodes = list(_in_order(graph))
    model = Message.parse(graph.serialize())
    content = model.child(7)
    used = {name for node in graph.nodes for name in node.inputs}
    # TensorRT drops an input that nothing reads.
    content.replace(11, [i for i in content.all_bytes(11) if Message.parse(i).text(1) in used])
    content.replace(5, [_embed(data, network.directory) for data in content.all_bytes(5)])
    model.replace(7, [content.serialize()])
    return model.serialize()


def _without_plugin(network: Network, node: Node) -> list[Node]:
    """What a plugin computes, in operators."""
    if not node.domain:
        return [node]
    if node.op_type in ("attention_parts", "top_k_parts"):
        return []
    if node.op_type == "attention_join":
        return _attended(network, node)
    if node.op_type == "top_k_merge":
        return _best(network, node)
    return _product(network, node)


def _product(network: Network, product: Node) -> list[Node]:
    """A product, whose weights may be inputs: what `unpack_weights` does, in operators."""
    made = product.name
    x, packed, scales, bias = product.inputs
    blocks, planes, columns, _ = network.shapes[packed]
    groups, depth = network.shapes[scales][0], blocks * BLOCK
    numbers: tuple[tuple[str, str, Any], ...] = (
        ("places", "uint32", np.arange(0, 32, 4, dtype=np.uint32)),
        ("mask", "uint32", np.array([15], np.uint32)),
        ("eight", "fp32", np.array([8], np.float32)),
        ("planes", "fp32", np.array([1, 16][:planes], np.float32).reshape(planes, 1, 1)),
        ("one", "int64", np.array([1])),
        ("four", "int64", np.array([4])),
        ("zero", "int64", np.array([0])),
        ("whole", "int64", np.array([planes, depth, columns])),
        ("grouped", "int64", np.array([groups, depth // groups, columns])),
        ("flat", "int64", np.array([depth, columns])),
    )
    for name, dtype, values in numbers:
        network._constant(f"{made}.{name}", dtype, values.shape, values.tobytes())
    wide, half, unsigned = (
        [attribute("to", ELEMENT_NUMBERS[dtype])] for dtype in ("fp32", "fp16", "uint32")
    )
    steps: list[tuple[str, list[str], str, list[bytes]]] = [
        ("Cast", [packed], ".words", unsigned),
        ("Unsqueeze", [".words", ".four"], ".columns", []),
        ("BitShift", [".columns", ".places"], ".shifted", [attribute("direction", "RIGHT")]),
        ("BitwiseAnd", [".shifted", ".mask"], ".nibbles", []),
        ("Cast", [".nibbles"], ".numbers", wide),
        ("Sub", [".numbers", ".eight"], ".signed", []),
        ("Transpose", [".signed"], ".rows", [attribute("perm", [1, 0, 4, 3, 2])]),
        ("Reshape", [".rows", ".whole"], ".each", []),
        ("Mul", [".each", ".planes"], ".parts", []),
        ("ReduceSum", [".parts", ".zero"], ".integers", [attribute("keepdims", 0)]),
        ("Reshape", [".integers", ".grouped"], ".groups", []),
        ("Cast", [scales], ".scales", wide),
        ("Unsqueeze", [".scales", ".one"], ".factors", []),
        ("Mul", [".groups", ".factors"], ".scaled", []),
        ("Reshape", [".scaled", ".flat"], ".weights", []),
        ("Cast", [x], ".x", wide),
        ("MatMul", [".x", ".weights"], ".product", []),
        ("Cast", [bias], ".bias", wide),
        ("Add", [".product", ".bias"], ".sum", []),
        ("Cast", [".sum"], product.outputs[0], half),
    ]

    def full(name: str) -> str:
        return f"{made}{name}" if name.startswith(".") else name

    return [
        Node(op, [full(each) for each in inputs], [full(out)], full(out), attributes=more)
        for op, inputs, out, more in steps
    ]


def _attended(network: Network, join: Node) -> list[Node]:
    """The attention of two plugins in operators: all rows in FP32, under a mask of positions."""
    graph = network.graph
    assert graph is not None
    (parts,) = (node for node in graph.nodes if node.outputs[:1] == join.inputs[:1])
    _, groups, capacity, width = network.shapes["past_key_values.0.key"]
    query, keys, values, new_keys, new_values, positions = parts.inputs
    heads, made = query_heads(network), join.name
    for name, numbers in (
        ("rows", range(capacity)),
        ("never", [1 << 30]),
        ("zero", [0]),
        ("one", [1]),
        ("two", [2]),
        ("row_axes", [1, 2, 3]),
        ("token_axes", [1, 2, 4]),
        ("grouped", [0, groups, heads // groups, -1, width]),
        ("ungrouped", [0, heads, -1, width]),
        ("merged", [0, 0, heads * width]),
    ):
        graph.add_int64(f"{made}.{name}", list(numbers))
    add_floats(graph, f"{made}.scale", [], np.array(1 / math.sqrt(width), np.float32))
    add_floats(graph, f"{made}.keep", [], np.array(0, np.float32))
    add_floats(graph, f"{made}.drop", [], np.array(-1e30, np.float32))
    wide, whole, half = (
        attribute("to", ELEMENT_NUMBERS[dtype]) for dtype in ("fp32", "int64", "fp16")
    )
    steps: list[tuple[str, list[str], str, list[bytes]]] = [
        ("Cast", [positions], ".positions", [whole]),
        ("Slice", [".positions", ".zero", ".one", ".one"], ".past", []),
        ("Less", [".rows", ".past"], ".valid", []),
        ("Where", [".valid", ".rows", ".never"], ".old", []),
        ("Concat", [".old", ".positions"], ".all", [attribute("axis", 1)]),
        ("Unsqueeze", [".all", ".row_axes"], ".all_rows", []),
        ("Unsqueeze", [".positions", ".token_axes"], ".tokens", []),
        ("LessOrEqual", [".all_rows", ".tokens"], ".seen", []),
        ("Where", [".seen", ".keep", ".drop"], ".mask", []),
        ("Concat", [keys, new_keys], ".keys.half", [attribute("axis", 2)]),
        ("Concat", [values, new_values], ".values.half", [attribute("axis", 2)]),
        ("Cast", [".keys.half"], ".keys.wide", [wide]),
        ("Cast", [".values.half"], ".values.wide", [wide]),
        ("Unsqueeze", [".keys.wide", ".two"], ".keys", []),
        ("Unsqueeze", [".values.wide", ".two"], ".values", []),
        ("Transpose", [".keys"], ".keys.t", [attribute("perm", [0, 1, 2, 4, 3])]),
        ("Cast", [query], ".query.wide", [wide]),
        ("Reshape", [".query.wide", ".grouped"], ".query", []),
        ("MatMul", [".query", ".keys.t"], ".products", []),
        ("Mul", [".products", ".scale"], ".scores", []),
        ("Add", [".scores", ".mask"], ".masked", []),
        ("Softmax", [".masked"], ".weights", [attribute("axis", -1)]),
        ("MatMul", [".weights", ".values"], ".mixed", []),
        ("Reshape", [".mixed", ".ungrouped"], ".heads", []),
        ("Transpose", [".heads"], ".turned", [attribute("perm", [0, 2, 1, 3])]),
        ("Reshape", [".turned", ".merged"], ".wide", []),
        ("Cast", [".wide"], join.outputs[0], [half]),
    ]

    def full(name: str) -> str:
        return f"{made}{name}" if name.startswith(".") else name

    return [
        Node(op, [full(each) for each in inputs], [full(out)], full(out), attributes=more)
        for op, inputs, out, more in steps
    ]


def _best(network: Network, merge: Node) -> list[Node]:
    """The search of two plugins in operators."""
    graph, made = network.graph, merge.name
    assert graph is not None
    (parts,) = (node for node in graph.nodes if node.outputs[:1] == merge.inputs[:1])
    logits, keep = parts.inputs
    values, places, rest = merge.outputs
    for name, number in (("zero", 0), ("one", 1), ("last", -1), ("k", network.shapes[keep][0])):
        graph.add_int64(f"{made}.{name}", [number])
    wide, whole, half = (
        [attribute("to", ELEMENT_NUMBERS[dtype])] for dtype in ("fp32", "int32", "fp16")
    )
    steps: list[tuple[str, list[str], list[str], list[bytes]]] = [
        ("Cast", [logits], [".row"], wide),
        ("TopK", [".row", ".k"], [".best", ".places"], []),
        ("Cast", [".best"], [values], half),
        ("Cast", [".places"], [places], whole),
        ("Slice", [".best", ".zero", ".one", ".last"], [".greatest"], []),
    ]
    for name in (".row", ".best"):
        steps += [
            ("Sub", [name, ".greatest"], [f"{name}.shifted"], []),
            ("Exp", [f"{name}.shifted"], [f"{name}.exp"], []),
            ("ReduceSum", [f"{name}.exp", ".last"], [f"{name}.sum"], []),
        ]
    steps.append(("Sub", [".row.sum", ".best.sum"], [rest], []))

    def full(names: list[str]) -> list[str]:
        return [f"{made}{name}" if name.startswith(".") else name for name in names]

    return [
        Node(op, full(inputs), full(outs), full(outs)[0], attributes=more)
        for op, inputs, outs, more in steps
    ]


def _in_order(graph: OnnxFile) -> Iterator[Node]:
    """The nodes, each after those that it reads."""
    makers = {name: node for node in graph.nodes for name in node.outputs}
    done: set[int] = set()

    def visit(node: Node) -> Iterator[Node]:
        if id(node) in done:
            return
        done.add(id(node))
        for name in node.inputs:
            if name in makers:
                yield from visit(makers[name])
        yield node

    for node in graph.nodes:
        yield from visit(node)


def _mask_by_lengths(network: Network, attention: Attention11) -> None:
    """Query ``i`` of ``S`` sees the rows before ``length - S + i + 1``."""
    if attention.key_value_lengths is None:
        return
    assert attention.causal_kind is CausalMaskKind.LOWER_RIGHT
    assert attention.key_value_lengths.dtype is DataType.INT32
    assert network.graph is not None
    made = f"{attention.name}.made"
    numbers = {"zero": 0, "one": 1, "two": 2}
    for name, value in numbers.items():
        network._constant(f"{made}.{name}", "int64", (), struct.pack("<q", value))
    network._constant(f"{made}.axis", "int64", (1,), struct.pack("<q", 1))
    network._constant(f"{made}.axes", "int64", (2,), struct.pack("<2q", 1, 3))
    int64 = attribute("to", ELEMENT_NUMBERS["int64"])
    first, last = attribute("axis", 0), attribute("axis", 0)
    query, key = attention._node.inputs[:2]
    steps: list[tuple[str, list[str], str, list[bytes]]] = [
        ("Shape", [query], "q.shape", []),
        ("Gather", ["q.shape", "two"], "seq", [first]),
        ("Shape", [key], "k.shape", []),
        ("Gather", ["k.shape", "two"], "rows", [last]),
        ("Range", ["zero", "rows", "one"], "row", []),
        ("Range", ["zero", "seq", "one"], "place", []),
        ("Cast", [attention.key_value_lengths.name], "lengths", [int64]),
        ("Sub", ["lengths", "seq"], "starts", []),
        ("Unsqueeze", ["starts", "axis"], "column", []),
        ("Add", ["column", "place"], "ends", []),
        ("Unsqueeze", ["ends", "axes"], "last", []),
        ("LessOrEqual", ["row", "last"], "mask", []),
    ]
    own = {f"{output}" for _, _, output, _ in steps} | {*numbers, "axis", "axes"}
    for op, inputs, output, attributes in steps:
        names = [f"{made}.{name}" if name in own else name for name in inputs]
        node = Node(op, names, [f"{made}.{output}"], f"{made}.{output}", attributes=attributes)
        network.graph.nodes.append(node)
        network.types[f"{made}.{output}"] = "bool" if output == "mask" else "int64"
    attention._node.inputs.append(f"{made}.mask")


def _embed(data: bytes, directory: Path | None) -> bytes:
    """A TensorProto with its bytes in it."""
    constant: Constant = read_constant(data)
    if constant.location is None:
        return data
    assert directory is not None
    with (directory / constant.location).open("rb") as file:
        file.seek(constant.offset)
        raw = file.read(constant.num_bytes)
    tensor = Message.parse(data)
    tensor.fields = [each for each in tensor.fields if each[0] not in (9, 13, 14)]
    return tensor.add(9, raw).serialize()
