"""Puts edge-llm's own attention into a graph: two plugin nodes replace the attention of a layer.

In the graph of an export an attention is one operator, or about twenty with a mask
(`export.graph.decoder`). The plugins take its queries, keys and values, the whole cache, and the
positions instead of the mask. In dialect ``native`` the step's rows are in the cache already; the
plugins still read them from beside it, so that both dialects share one kernel.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from edge.backends.tensorrt.launch_rules import JOIN, PARTS
from edge.bundle import io_spec
from edge.bundle.causal_mask import mask_fault
from edge.bundle.engine_file import Plugins
from edge.bundle.manifest import Manifest
from edge.bundle.onnx_file import ELEMENT_NUMBERS, Node, OnnxFile, attribute
from edge.bundle.onnx_values import Constants, node_attributes
from edge.model.parts import Attention, only
from engines.kernels.variants import HEAD_WIDTHS

from .plugin_nodes import MisfitError, makers_and_readers, plugin_node, strange

_POSITIONS = "own_attention.positions"


@dataclass(frozen=True)
class _Attention:
    """Tensors that the plugins of a layer read and write.

    Attributes:
        query: ``[B, H, S, D]``.
        rows: keys and values of the cache ``[B, G, C, D]``, and of the step ``[B, G, S, D]``.
        output: ``[B, S, H * D]``.
        width: D.
    """

    query: str
    rows: tuple[str, str, str, str]
    output: str
    width: int


def attention_name(layer: int) -> str:
    """Name the attention of a layer, for people and for its nodes."""
    return f"layers.{layer}.attention"


def use_own_attention(
    graph: OnnxFile, manifest: Manifest, plugins: Plugins = "compiled"
) -> tuple[dict[str, int], dict[str, str]]:
    """Replace the attentions that the kernels compute; unused nodes go on serialization.

    Args:
        graph: graph from `engines.graph.adapt.graph_of`; it is changed.
        manifest: the bundle's manifest.
        plugins: kind of plugin that the engine has (`edge.bundle.engine_file.EngineInfo`).

    Returns:
        Names of the attentions that own kernels compute, each with the width of its heads; and of
        the others, each with the reason.

    Raises:
        BundleError: the graph is not valid.
    """
    finder = _Finder(graph, manifest)
    found: dict[str, _Attention] = {}
    left: dict[str, str] = {}
    for layer, parts in manifest.model.each_layer():
        for attention in only(parts, Attention):
            try:
                found[attention_name(layer)] = finder.find(layer, attention)
            except MisfitError as reason:
                left[attention_name(layer)] = str(reason)
    if not found:
        return {}, left
    to = [attribute("to", ELEMENT_NUMBERS["int32"])]
    cast = Node("Cast", [io_spec.POSITION_IDS], [_POSITIONS], f"{_POSITIONS}/Cast", attributes=to)
    replaced = {each.output: _plugin_nodes(name, each, plugins) for name, each in found.items()}
    nodes = [cast]
    for node in graph.nodes:
        nodes += replaced.get(node.outputs[0], [node])
    graph.nodes = nodes
    return {name: each.width for name, each in found.items()}, left


def _plugin_nodes(name: str, found: _Attention, plugins: Plugins) -> list[Node]:
    sums = [f"{name}.partial", f"{name}.stats"]
    inputs = [found.query, *found.rows, _POSITIONS]
    joined = [*sums, _POSITIONS, found.query]
    return [
        plugin_node(PARTS, inputs, sums, name, plugins, found.width),
        plugin_node(JOIN, joined, [found.output], name, plugins, found.width),
    ]


class _Finder:
    """Finds the attention of a layer in a decoder, backwards from its output."""

    def __init__(self, graph: OnnxFile, manifest: Manifest) -> None:
        self._constants = Constants(graph)
        self._manifest = manifest
        self._makers, self._readers = makers_and_readers(graph)

    def find(self, layer: int, attention: Attention) -> _Attention:
        """Find the attention of a layer.

        Raises:
            MisfitError: the kernels cannot compute it.
        """
        manifest = self._manifest
        if manifest.dtype != "fp16":
            raise MisfitError(f"its floats are {manifest.dtype}, and the kernels take FP16")
        if layer in manifest.int8_layers:
            raise MisfitError("its cache is INT8, and the kernels take FP16")
        if attention.dim not in HEAD_WIDTHS:
            widths = " or ".join(map(str, HEAD_WIDTHS))
            raise MisfitError(
                f"its heads have {attention.dim} values, and the kernels take {widths}"
            )
        attended = f"layers.{layer}.attended"
        output = self._merged(attended, attention)
        find = self._of_operator if manifest.dialect == "native" else self._of_primitives
        query, rows = find(layer, attended, attention)
        return _Attention(query, rows, output, attention.dim)

    def _merged(self, attended: str, attention: Attention) -> str:
        """Follow ``[B, H, S, D]`` to the tensor in which each token's heads are adjacent."""
        (transposed,) = self._only_reader(attended, "Transpose").outputs
        if self._perm(transposed) != (0, 2, 1, 3):
            raise strange(transposed)
        (merged,) = self._only_reader(transposed, "Reshape").outputs
        width = attention.heads * attention.dim
        if self._numbers(self._input(merged, 1)) != [0, 0, width]:
            raise strange(merged)
        return merged

    def _of_operator(
        self, layer: int, attended: str, attention: Attention
    ) -> tuple[str, tuple[str, str, str, str]]:
        """Find the query and the rows in dialect ``native``."""
        node = self._maker(attended, "Attention")
        self._check_scale(attended, node_attributes(node).get("scale"), attention)
        if fault := mask_fault(node, self._makers):
            raise MisfitError(f"it {fault}")
        new = []
        for read, past, present in (
            (node.inputs[1], io_spec.past_key(layer), io_spec.present_key(layer)),
            (node.inputs[2], io_spec.past_value(layer), io_spec.present_value(layer)),
        ):
            self._check_read(read, present)
            scatter = self._maker(present, "TensorScatter")
            same = [scatter.inputs[0], *scatter.inputs[2:]] == [past, io_spec.WRITE_INDICES]
            if not same or node_attributes(scatter) != {"axis": 2}:
                raise strange(present)
            new.append(scatter.inputs[1])
        cache = io_spec.present_key(layer), io_spec.present_value(layer)
        return node.inputs[0], (*cache, new[0], new[1])

    def _of_primitives(
        self, layer: int, attended: str, attention: Attention
    ) -> tuple[str, tuple[str, str, str, str]]:
        """Find the query and the rows in dialect ``portable``."""
        total = self._maker(self._maker(attended, "Reshape").inputs[0], "Add")
        products = [self._maker(name, "MatMul") for name in total.inputs]
        split = self._maker(products[0].inputs[0], "Split")
        if split.outputs != [product.inputs[0] for product in products]:
            raise strange(attended)
        softmax = self._maker(self._maker(split.inputs[0], "Cast").inputs[0], "Softmax")
        joined = self._maker(softmax.inputs[0], "Concat")
        if len(joined.inputs) != 2 or node_attributes(joined) != {"axis": -1}:
            raise strange(joined.outputs[0])
        if node_attributes(softmax) != {"axis": -1}:
            raise strange(softmax.outputs[0])
        past = io_spec.past_key(layer), io_spec.past_value(layer)
        new = io_spec.new_key(layer), io_spec.new_value(layer)
        queries = set()
        for score, product, rows, part in zip(
            joined.inputs, products, (past, new), ("past", "new"), strict=True
        ):
            masked = self._maker(score, "Add")
            self._check_mask(masked.inputs[1], part)
            scores = self._maker(self._maker(masked.inputs[0], "Cast").inputs[0], "MatMul")
            queries.add(scores.inputs[0])
            turned = self._maker(scores.inputs[1], "Transpose")
            if self._perm(scores.inputs[1]) != (0, 1, 2, 4, 3):
                raise strange(scores.inputs[1])
            for grouped, row in zip((turned.inputs[0], product.inputs[1]), rows, strict=True):
                self._check_read(self._unsqueezed(grouped, [2]), row)
        if len(queries) != 1:
            raise strange(attended)
        scaled = self._maker(queries.pop(), "Mul")
        self._check_scale(attended, self._scalar(scaled.inputs[1]), attention)
        grouped_query = self._maker(scaled.inputs[0], "Reshape")
        heads = attention.heads // attention.kv_heads
        shape = [0, attention.kv_heads, heads, -1, attention.dim]
        if self._numbers(grouped_query.inputs[1]) != shape:
            raise strange(scaled.inputs[0])
        return grouped_query.inputs[0], (*past, *new)

    def _check_read(self, read: str, rows: str) -> None:
        """Check that attention reads all rows of a tensor, or its first ones."""
        if read == rows:
            return
        node = self._maker(read, "Slice")
        if node.inputs[0] != rows or len(node.inputs) != 4:
            raise strange(read)
        if self._numbers(node.inputs[1]) != [0] or self._numbers(node.inputs[3]) != [2]:
            raise strange(read)

    def _check_mask(self, mask: str, part: str) -> None:
        """Check that a mask is the one for the cache's rows, or for the step's."""
        axes = [1, 2, 3] if part == "past" else [1, 2]
        where = self._maker(self._unsqueezed(mask, axes), "Where")
        keep, drop = map(self._scalar, where.inputs[1:])
        if keep != 0 or drop is None or drop > -1e9:
            raise strange(mask)
        if part == "past":
            node = self._maker(where.inputs[0], "Less")
            ends = [node.inputs[0], self._unsqueezed(node.inputs[1], [-1])]
            wanted = [io_spec.KV_POSITIONS, io_spec.PAST_LENGTHS]
        else:
            node = self._maker(where.inputs[0], "LessOrEqual")
            ends = [self._unsqueezed(node.inputs[0], [1]), self._unsqueezed(node.inputs[1], [-1])]
            wanted = [io_spec.POSITION_IDS] * 2
        if ends != wanted:
            raise strange(mask)

    def _check_scale(self, attended: str, scale: float | None, attention: Attention) -> None:
        wanted = attention.dim**-0.5  # what the kernels multiply by
        if scale is None or abs(scale - wanted) > wanted * 2**-10:  # it may be in FP16
            raise MisfitError(f"its scores are not divided by the root of the width: {attended}")

    def _unsqueezed(self, name: str, axes: list[int]) -> str:
        node = self._maker(name, "Unsqueeze")
        if self._numbers(node.inputs[1]) != axes:
            raise strange(name)
        return node.inputs[0]

    def _maker(self, name: str, op_type: str) -> Node:
        node = self._makers.get(name)
        if node is None or node.op_type != op_type or node.domain:
            raise strange(name)
        return node

    def _only_reader(self, name: str, op_type: str) -> Node:
        readers = self._readers.get(name, [])
        if len(readers) != 1 or readers[0].op_type != op_type:
            raise strange(name)
        return readers[0]

    def _input(self, name: str, place: int) -> str:
        return self._makers[name].inputs[place]

    def _perm(self, name: str) -> Iterable[int] | None:
        perm: tuple[int, ...] | None = node_attributes(self._makers[name]).get("perm")
        return perm

    def _numbers(self, name: str) -> list[int] | None:
        if self._constants.get(name) is None:
            return None
        values = self._constants.values(name)
        return None if values is None else [int(value) for value in values]

    def _scalar(self, name: str) -> float | None:
        constant = self._constants.get(name)
        if constant is None or constant.volume != 1:
            return None
        values = self._constants.values(name)
        return None if values is None else float(values[0])
