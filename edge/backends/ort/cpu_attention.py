"""Rewrites attention at load for ONNX Runtime on the CPU.

The plain graph writes the cache (TensorScatter), slices the valid rows, and attends over the slice.
ONNX Runtime copies that slice every step and repeats it for every query head: at 4,000 tokens of
context a step of the 1.5B takes 3.9 times as long as at 128. Its own operator GroupQueryAttention
does all three in place (1.7 times). The file on disk stays plain ONNX. Only the session's copy is
rewritten, and a parity test compares both.

GroupQueryAttention (``com.microsoft``, onnxruntime ContribOperators.md) has these inputs: queries,
keys and values as ``[B, S, heads * D]``, or the fused projection, which it splits and rotates
itself; the cache; ``seqlens_k`` = valid rows after this step minus one; and the largest number of
valid rows. It masks and rotates by cache row, which equals the position here. With a cache in 8
bits (``k_quant_type``, ``v_quant_type``, ``kv_cache_bit_width``) it takes the scales, rounds the
rows that it writes, and multiplies the integers that it reads.
"""

from __future__ import annotations

from edge.bundle import io_spec
from edge.bundle.causal_mask import mask_fault
from edge.bundle.manifest import Manifest
from edge.bundle.onnx_file import Node, OnnxFile, attribute
from edge.errors import BundleError
from edge.model.parts import AnyPart, Attention, Norm, Rope, only
from edge.model.spec import ModelSpec

OWN_DOMAIN = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""
_KEY_SCALE_INPUT = 12
_ROWS = "cpu.rows"


def can_fuse(manifest: Manifest) -> bool:
    """Whether GroupQueryAttention takes a decoder's attention.

    It refuses heads whose size is not a multiple of 8, or of 16 if it rotates them
    (onnxruntime group_query_attention_helper.h).
    """
    return io_spec.DIALECTS[manifest.dialect].one_attention_operator and all(
        part.dim % (8 if _is_apart(run.parts) or not only(run.parts, Rope) else 16) == 0
        for run in manifest.model.layers
        for part in only(run.parts, Attention)
    )


def _is_apart(layer: tuple[AnyPart, ...]) -> bool:
    """Whether something that the operator does not do lies between projection and attention."""
    (attention,) = only(layer, Attention)
    turns_a_part = any(rope.dims != attention.dim for rope in only(layer, Rope))
    return turns_a_part or any(norm.of for norm in only(layer, Norm))


def fuse_cache_attention(graph: OnnxFile, model: ModelSpec) -> None:
    """Replace every TensorScatter + Slice + Attention of a ``native`` decoder.

    Raises:
        BundleError: the graph is not one that edge-llm's exporter wrote, or masks more than the
            rows after each token's own.
    """
    producers = {output: node for node in graph.nodes for output in node.outputs}
    consumers = {name: node for node in graph.nodes for name in node.inputs}
    layers = [parts for _, parts in model.each_layer() if only(parts, Attention)]
    found = [node for node in graph.nodes if node.op_type == "Attention"]
    if len(found) != len(layers):
        raise BundleError(
            f"the decoder graph has {len(found)} Attention nodes for {len(layers)} layers; "
            "export the bundle again"
        )
    graph.add_int64(_ROWS, [0, 0, -1])
    fused: dict[str, list[Node]] = {}  # an Attention's output: the nodes that replace it
    taken: set[str] = set()  # tensors that the replacements produce
    for node, layer in zip(found, layers, strict=True):
        (attention,) = only(layer, Attention)
        if fault := mask_fault(node, producers):  # the operator takes lengths instead of it
            raise BundleError(
                f"{node.outputs[0]} {fault}; export the bundle again with this edge-llm"
            )
        turns = bool(only(layer, Rope))
        keys, key_rows, key_scale = _written(producers, node.inputs[1])
        values, value_rows, value_scale = _written(producers, node.inputs[2])
        # Transpose and Reshape merged the heads to [B, S, H * D], which the operator returns
        # itself.
        transposed = expect_node(consumers, node.outputs[0], "Transpose")
        merged = expect_node(consumers, transposed.outputs[0], "Reshape")
        outputs = [merged.outputs[0], keys.outputs[0], values.outputs[0]]
        new: list[Node] = []
        v = _rows(producers, value_rows, new)
        attributes = [
            attribute("num_heads", attention.heads),
            attribute("kv_num_heads", attention.kv_heads),
            attribute("scale", attention.factor),
        ]
        tables: list[str] = []
        if _is_apart(layer):
            q_and_k = (node.inputs[0], attention.heads), (key_rows, attention.kv_heads)
            inputs = [
                _rope_on_rows(producers, name, heads, new) if turns else _rows(producers, name, new)
                for name, heads in q_and_k
            ]
            inputs.append(v)
        else:
            # The operator splits the fused projection and rotates by itself, by cache row, which
            # equals the position here.
            inputs = [expect_node(producers, v, "Split").inputs[0], "", ""]
            if turns:
                tables = expect_node(producers, node.inputs[0], "RotaryEmbedding").inputs[1:3]
                attributes.append(attribute("do_rotary", 1))
            else:
                expect_node(producers, node.inputs[0], "Transpose")
        inputs += [keys.inputs[0], values.inputs[0], "cpu.seqlens", "cpu.total", *tables]
        if key_scale is not None and value_scale is not None:
            # The inputs before them are cos, sin, position_ids, attention_bias and head_sink.
            inputs += [""] * (_KEY_SCALE_INPUT - len(inputs)) + [key_scale, value_scale]
            attributes += [
                attribute("k_quant_type", "PER_CHANNEL"),
                attribute("v_quant_type", "PER_CHANNEL"),
                attribute("kv_cache_bit_width", 8),
            ]
        new.append(
            Node(
                "GroupQueryAttention", inputs, outputs, f"{node.name}/fused", OWN_DOMAIN, attributes
            )
        )
        fused[node.outputs[0]] = new
        taken.update(outputs)
    nodes = _sequence_lengths(graph)
    for node in graph.nodes:
        if not taken.intersection(node.outputs):
            nodes += fused.get(node.outputs[0], [node])
    graph.nodes = nodes
    graph.use_domain(OWN_DOMAIN, 1)


def _written(producers: dict[str, Node], name: str) -> tuple[Node, str, str | None]:
    """Return the node that writes attention's input, the rows before rounding, and their scales."""
    factor = producers.get(name)
    if factor is None or factor.op_type != "Mul":
        scatter = expect_node(
            producers, expect_node(producers, name, "Slice").inputs[0], "TensorScatter"
        )
        return scatter, scatter.inputs[1], None
    integers = expect_node(producers, factor.inputs[0], "DequantizeLinear")
    part = expect_node(producers, integers.inputs[0], "Slice")
    scatter = expect_node(producers, part.inputs[0], "TensorScatter")
    rounded = expect_node(producers, scatter.inputs[1], "QuantizeLinear")
    steps = expect_node(producers, rounded.inputs[0], "Div")
    return scatter, steps.inputs[0], steps.inputs[1]


def expect_node(nodes: dict[str, Node], name: str, *op_types: str) -> Node:
    """Return the node that makes or reads a tensor; refuse a node of another type."""
    node = nodes.get(name)
    if node is None or node.op_type not in op_types:
        found = "nothing" if node is None else node.op_type
        raise BundleError(
            f"the decoder graph has {found} at {name!r}, expected {' or '.join(op_types)}; "
            "export the bundle again with this edge-llm"
        )
    return node


def _rows(producers: dict[str, Node], name: str, nodes: list[Node]) -> str:
    """Return ``[B, S, heads * D]`` of a tensor, which the graph has as ``[B, heads, S, D]``."""
    transpose = expect_node(producers, name, "Transpose")
    reshape_or_norm = expect_node(producers, transpose.inputs[0], "Reshape", "RMSNormalization")
    if reshape_or_norm.op_type == "Reshape":
        return reshape_or_norm.inputs[0]
    source = reshape_or_norm.outputs[0]
    nodes.append(Node("Reshape", [source, _ROWS], [f"{source}.rows"], f"{source}.rows/Reshape"))
    return f"{source}.rows"


def _rope_on_rows(producers: dict[str, Node], name: str, heads: int, nodes: list[Node]) -> str:
    """Add the rotation of ``name`` on ``[B, S, heads * D]``, so that nothing is transposed."""
    rope = expect_node(producers, name, "RotaryEmbedding")
    rows = _rows(producers, rope.inputs[0], nodes)
    nodes.append(
        Node(
            "RotaryEmbedding",
            [rows, *rope.inputs[1:]],
            [f"{name}.rows"],
            f"{rope.name}/rows",
            attributes=[*rope.attributes, attribute("num_heads", heads)],
        )
    )
    return f"{name}.rows"


def _sequence_lengths(graph: OnnxFile) -> list[Node]:
    """Make nodes for ``write_indices + S - 1`` and the largest ``write_indices + S``, as int32."""
    one = graph.add_int64("cpu.one", [1])
    int32 = attribute("to", 6)

    def node(op_type: str, inputs: list[str], output: str, *attributes: bytes) -> Node:
        return Node(op_type, inputs, [output], f"{output}/{op_type}", attributes=list(attributes))

    return [
        node(
            "Shape",
            [io_spec.POSITION_IDS],
            "cpu.seq",
            attribute("start", 1),
            attribute("end", 2),
        ),
        node("Add", [io_spec.WRITE_INDICES, "cpu.seq"], "cpu.lengths"),
        node("Sub", ["cpu.lengths", one], "cpu.last"),
        node("Cast", ["cpu.last"], "cpu.seqlens", int32),
        node("ReduceMax", ["cpu.lengths"], "cpu.longest", attribute("keepdims", 0)),
        node("Cast", ["cpu.longest"], "cpu.total", int32),
    ]
