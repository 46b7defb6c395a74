"""Puts edge-llm's own kernels into a graph: a low-bit product becomes one plugin node.

The plugin `w4_linear` computes a product with INT4 weights, or INT8 in two planes, and adds the
bias. It replaces up to six nodes of the graph (`export.graph.decoder`) and the weights as ONNX
stores them. The weights become inputs of the engine, in the kernels' order (`external_weights`). So
does everything else that only these plugins read, and so do the tables of positions.

Attention is replaced by `own_attention`, the search for the best logits by `own_top_k`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge.adapters.graph_inputs import ADAPTER
from edge.backends.tensorrt.launch_rules import (
    BLOCK,
    JOIN,
    NAMESPACE,
    PARTS,
    PRODUCT,
    TOP_K_MERGE,
    TOP_K_PARTS,
)
from edge.bundle import io_spec
from edge.bundle.engine_file import Plugins
from edge.bundle.manifest import LinearInfo, Manifest
from edge.bundle.onnx_file import Node, OnnxFile
from edge.bundle.onnx_values import Constant, Constants, node_attributes
from edge.bundle.schemes import HIGH_PLANE
from edge.errors import BuildError
from engines.kernels.launch import GROUPS

from .external_weights import Outside, lay_out, make_inputs
from .own_attention import use_own_attention
from .own_top_k import TOP_K, use_own_top_k
from .plugin_nodes import MisfitError, makers_and_readers, plugin_node, strange

_NO_BIAS = "own_kernels.no_bias"
LARGE_BYTES = 64 << 10
"""Size from which on a table is worth an input of its own."""
_Sources = dict[str, tuple[Constant, ...]]  # as in `Outside`


@dataclass(frozen=True)
class OwnGraph:
    """A graph with own kernels, and the path that it is parsed at.

    Attributes:
        data: the ONNX file.
        path: path to tell the parser; the weights that stay in the graph are beside it.
        linears: linear layers that own kernels compute, in the graph's order.
        left: linear layers that TensorRT computes, each with the reason; attentions, too, if own
            ones were asked for, and `own_top_k.TOP_K`, if the graph puts out best logits.
        attentions: attentions that own kernels compute (`own_attention.attention_name`).
        plugins: plugins in the graph, each by its name and the value of its rule's attribute.
        top_k: whether own kernels find the best logits.
        outside: weights that became inputs of the graph; None if there are none.
    """

    data: bytes
    path: Path
    linears: tuple[str, ...]
    left: dict[str, str]
    attentions: tuple[str, ...] = ()
    plugins: frozenset[tuple[str, int]] = frozenset()
    top_k: bool = False
    outside: Outside | None = None


@dataclass(frozen=True)
class _Product:
    """Nodes that one plugin replaces.

    Attributes:
        name: name of the linear layer.
        nodes: all nodes; the last one makes the output.
        x: name of the input.
        planes: constants of the weights ``[depth, columns]``, the low one first.
        scales: name of the low plane's scales.
        bias: name of the bias; None without one.
    """

    name: str
    nodes: tuple[Node, ...]
    x: str
    planes: tuple[Constant, ...]
    scales: str
    bias: str | None


def use_own_kernels(
    graph: bytes,
    manifest: Manifest,
    bundle: Path,
    plugins: Plugins = "compiled",
    *,
    attention: bool = False,
) -> OwnGraph:
    """Replace the products that the kernels compute, and turn their weights into inputs.

    Args:
        graph: bytes from `engines.graph.adapt.graph_of`.
        manifest: the bundle's manifest.
        bundle: directory of the graph's weights; the caller has hashed them.
        plugins: kind of plugin that the engine has (`edge.bundle.engine_file.EngineInfo`).
        attention: whether to replace attentions, too.

    Raises:
        BuildError: the kernels can compute nothing in this graph, or no attention if asked to.
        BundleError: the graph is not valid, or its weights cannot be read.
    """
    onnx = OnnxFile(graph)
    _put_adapters_last(onnx)
    finder = _Finder(onnx, manifest, bundle)
    products, left = [], {}
    for name, linear in manifest.quantization.linears.items():
        try:
            products.append(finder.find(name, linear))
        except MisfitError as reason:
            left[name] = str(reason)
    attentions: dict[str, int] = {}
    if attention:
        attentions, others = use_own_attention(onnx, manifest, plugins)
        if not attentions:
            raise BuildError(
                f"own kernels compute no attention of {bundle} ({next(iter(others.values()))}); "
                "leave --attention own out"
            )
        left |= others
    if not products and not attentions:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:3])
        raise BuildError(
            f"own kernels compute no layer of {bundle} ({reasons}); build without --kernels own, "
            "or export with --quant int4 or int8 and floats of 16 bits that are not bf16"
        )
    has_best = any(each.name == io_spec.BEST_VALUES for each in onnx.outputs)
    keep, why_not = use_own_top_k(onnx, manifest, plugins) if has_best else (0, "")
    if why_not:
        left[TOP_K] = why_not
    packed = _replace_products(onnx, products, plugins)
    sources = _find_outside(onnx, Constants(onnx), packed)
    outside = lay_out(bundle, sources) if sources else None
    if outside is not None:
        make_inputs(onnx, outside)
    onnx.use_domain(NAMESPACE, 1)
    path = bundle.resolve() / manifest.graphs.decoder
    linears = tuple(each.name for each in products)
    used = {(PRODUCT.name, len(each.planes)) for each in products}
    used |= {(rule.name, width) for rule in (PARTS, JOIN) for width in attentions.values()}
    if keep:
        used |= {(rule.name, keep) for rule in (TOP_K_PARTS, TOP_K_MERGE)}
    return OwnGraph(
        onnx.serialize(),
        path,
        linears,
        left,
        tuple(attentions),
        frozenset(used),
        top_k=keep > 0,
        outside=outside,
    )


def _put_adapters_last(onnx: OnnxFile) -> None:
    """Add biases before adapters, so that a plugin finds the bias right after its product."""
    _, readers = makers_and_readers(onnx)
    for node in onnx.nodes:
        if node.op_type == "Add" and node.inputs[1].endswith(ADAPTER):
            for reader in readers.get(node.outputs[0], []):
                # No sum of the linear follows a bias; here none follows that of a plane either.
                if reader.op_type == "Add" and reader.inputs[0] == node.outputs[0]:
                    node.inputs[1], reader.inputs[1] = reader.inputs[1], node.inputs[1]


def _replace_products(onnx: OnnxFile, products: list[_Product], plugins: Plugins) -> _Sources:
    """Replace products by plugins; return the constants that their weights are made of."""
    replaced: dict[int, Node] = {}
    packed: _Sources = {_NO_BIAS: (Constant(_NO_BIAS, "fp16", (1,), bytes(2)),)}
    for product in products:
        name = f"{product.name}.own_weights"
        packed[name] = product.planes
        replaced[id(product.nodes[-1])] = plugin_node(
            PRODUCT,
            [product.x, name, product.scales, product.bias or _NO_BIAS],
            product.nodes[-1].outputs,
            product.name,
            plugins,
            len(product.planes),
        )
    gone = {id(node) for product in products for node in product.nodes}
    onnx.nodes = [
        replaced.get(id(node), node)
        for node in onnx.nodes
        if id(node) not in gone or id(node) in replaced
    ]
    return packed


def _find_outside(onnx: OnnxFile, constants: Constants, packed: _Sources) -> _Sources:
    """Find constants of any size that only own products read, and large tables of rows."""
    onnx.prune()
    _, readers = makers_and_readers(onnx)
    found: _Sources = {}
    for name, nodes in readers.items():
        constant = constants.get(name)
        sources: tuple[Constant, ...]
        if constant is not None and name in constants.initializers:
            sources = (constant,)
        elif name in packed:
            sources = packed[name]
        else:
            continue
        only_rows = all(
            (node.op_type, node.inputs.index(name), node.inputs.count(name)) == ("Gather", 0, 1)
            for node in nodes
        )
        large = sources[0].num_bytes >= LARGE_BYTES
        if all(node.op_type == PRODUCT.name for node in nodes) or (large and only_rows):
            found[name] = sources
    return found


class _Finder:
    """Finds the nodes of linear layers in a decoder."""

    def __init__(self, graph: OnnxFile, manifest: Manifest, bundle: Path) -> None:
        self._constants = Constants(graph, bundle)
        self._dtype = manifest.dtype
        self._data = f"{manifest.graphs.decoder}.data"
        self._makers, self._readers = makers_and_readers(graph)
        self._outputs = {info.name for info in graph.outputs}

    def find(self, name: str, linear: LinearInfo) -> _Product:
        """Find the nodes of a linear layer.

        Raises:
            MisfitError: the kernels cannot compute it.
        """
        scheme = linear.scheme
        if scheme.kind == "float":
            raise MisfitError("its weights are floats")
        if scheme.kind == "w8a8":
            raise MisfitError("its inputs are rounded to INT8, and the kernels take FP16")
        if self._dtype != "fp16":
            raise MisfitError(f"its floats are {self._dtype}, and the kernels take FP16")
        if scheme.group_size not in GROUPS:
            found = f"groups of {scheme.group_size}" if scheme.group_size else "a scale per channel"
            raise MisfitError(f"it has {found}, and the kernels take {_listed(GROUPS)}")
        low, plane, scales = self._product(f"{name}.dequantized", scheme.group_size)
        nodes, planes = [low], [plane]
        if f"{name}.high_dequantized" in self._makers:
            high, plane, high_scales = self._product(f"{name}.high_dequantized", scheme.group_size)
            if _input(high, 0) != _input(low, 0) or plane.shape != planes[0].shape:
                raise strange(name)
            if not self._is_multiple(high_scales, scales):
                raise MisfitError("its high plane's scales are not 16 times the low one's")
            total = self._only_reader(low.outputs[0])
            if (
                total is None
                or total.op_type != "Add"
                or total is not self._only_reader(high.outputs[0])
            ):
                raise strange(name)
            nodes += [high, total]
            planes.append(plane)
        elif scheme.planes:
            raise strange(name)
        bias = self._bias(nodes[-1].outputs[0], planes[0].shape[1])
        if bias is not None:
            nodes.append(bias[0])
        return _Product(
            name,
            tuple(nodes),
            _input(low, 0),
            tuple(planes),
            scales,
            None if bias is None else bias[1],
        )

    def _product(self, weight: str, group: int) -> tuple[Node, Constant, str]:
        """Find the product with a dequantized weight, the weight, and its scales' name."""
        maker, product = self._makers.get(weight), self._only_reader(weight)
        if maker is None or maker.op_type != "DequantizeLinear" or product is None:
            raise strange(weight)
        stored, scale = (self._constants.get(_input(maker, place)) for place in (0, 1))
        if stored is None or scale is None or stored.location != self._data:
            raise strange(weight)
        if stored.dtype != "int4":
            raise MisfitError(f"its weights are {stored.dtype}, not INT4 or two planes of it")
        attributes = node_attributes(maker)
        blocked = (attributes.get("axis"), attributes.get("block_size")) == (0, group)
        if len(stored.shape) != 2 or not blocked:
            raise strange(weight)
        depth, columns = stored.shape
        if depth % BLOCK or depth % group:
            raise MisfitError(f"its depth {depth} is no multiple of {max(BLOCK, group)}")
        if scale.dtype != "fp16" or scale.shape != (depth // group, columns):
            raise strange(weight)
        if product.op_type != "MatMul" or _input(product, 1) != weight:
            raise strange(weight)
        return product, stored, scale.name

    def _only_reader(self, name: str) -> Node | None:
        readers = self._readers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self._outputs else None

    def _bias(self, output: str, columns: int) -> tuple[Node, str] | None:
        """Find the sum of a product and a bias, and the bias's name."""
        node = self._only_reader(output)
        if node is None or node.op_type != "Add":
            return None
        other = _input(node, 1 if _input(node, 0) == output else 0)
        constant = self._constants.get(other)
        if constant is None or (constant.dtype, constant.shape) != ("fp16", (columns,)):
            return None
        return node, other

    def _is_multiple(self, high: str, low: str) -> bool:
        values = [self._constants.values(name) for name in (high, low)]
        if values[0] is None or values[1] is None:
            return False
        return np.array_equal(values[0], values[1].astype(np.float32) * HIGH_PLANE)


def _input(node: Node, place: int) -> str:
    """Name an input of a node; empty if the node has no such input."""
    return node.inputs[place] if place < len(node.inputs) else ""


def _listed(groups: tuple[int, ...]) -> str:
    return "groups of " + ", ".join(map(str, groups))
