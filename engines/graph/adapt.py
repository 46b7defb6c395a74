"""Adapts the bundle's graph to the engine: its capacity, how it reads the cache, scale types.

Only the small ``decoder.onnx`` is edited, in memory; its weights stay where they are.
"""

from __future__ import annotations

import os
from pathlib import Path

from edge.bundle import io_spec
from edge.bundle.causal_mask import mask_fault
from edge.bundle.engine_file import KvRead
from edge.bundle.manifest import FloatType, Manifest
from edge.bundle.onnx_file import ELEMENT_NUMBERS, Node, OnnxFile, attribute, tensor_info
from edge.bundle.onnx_values import Constants
from edge.errors import BundleError
from edge_make.graph_edits import add_floats, add_output
from engines.build_plan import BuildPlan
from engines.config import BuildShapes
from engines.rules.facts import QUANTIZING

from .plugin_nodes import makers_and_readers


def graph_of(build: BuildPlan) -> bytes:
    """Read a bundle's graph and adapt it to the build.

    Raises:
        BundleError: the graph is not one that `prepare_graph` or `widen_scales` can edit.
    """
    bundle = build.config.bundle
    data = (bundle / build.manifest.graphs.decoder).read_bytes()
    graph = prepare_graph(data, build.shapes, build.kv_read)
    return graph if build.scales == "stored" else widen_scales(graph, bundle)


def prepare_graph(data: bytes, shapes: BuildShapes, kv_read: KvRead) -> bytes:
    """Change a decoder's shapes to those of an engine.

    Args:
        data: bytes of ``decoder.onnx``.
        shapes: the capacity wanted, and how many best logits to put out by themselves.
        kv_read: ``slice`` keeps the graph; ``full`` and ``lengths`` let attention read the cache
            itself instead of a slice of it.

    Raises:
        BundleError: the graph has no slices of the cache to remove, or ``lengths`` would drop a
            mask that is not the causal one.
    """
    graph = OnnxFile(data)
    graph.remove_values([io_spec.HIDDEN_STATES])  # nothing that runs engines binds it
    names = [value.name for value in [*graph.inputs, *graph.outputs]]
    prefixes = (io_spec.PAST_PREFIX, io_spec.PRESENT_PREFIX)
    caches = [name for name in names if name.startswith(prefixes)]
    graph.set_dimension(caches, 2, shapes.capacity)
    if kv_read == "lengths":
        _check_masks(graph)
    if kv_read != "slice":
        _remove_slices(graph, set(caches))
        graph.set_dimension([io_spec.KV_POSITIONS], 0, shapes.capacity)
    if shapes.best_logits:
        _add_best_logits(graph, shapes.best_logits)
    return graph.serialize()


def write_graph(build: BuildPlan, directory: Path) -> Path:
    """Write the graph of a build to a file, for a reader that takes nothing else.

    Readers look for the weights beside the graph, so this puts a symbolic link to them there. A
    hard link would save nothing, and the ``onnx`` package takes weights with several hard links
    for an attack.

    Args:
        build: the plan of the build; the caller has verified the bundle's files.
        directory: directory to write to; made if missing. Files of the same names are replaced.

    Returns:
        The path of the graph.
    """
    graph, weights = graph_files(build.manifest)
    bundle = build.config.bundle.resolve()
    data = graph_of(build)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / graph
    path.write_bytes(data)
    link = directory / weights
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(bundle / weights, directory.resolve()))
    return path


def graph_files(manifest: Manifest) -> tuple[str, str]:
    """Name the files that an engine is built from: the graph and its weights."""
    return manifest.graphs.decoder, f"{manifest.graphs.decoder}.data"


def _check_masks(graph: OnnxFile) -> None:
    makers, _ = makers_and_readers(graph)
    for node in graph.nodes:
        if node.op_type == "Attention" and (fault := mask_fault(node, makers)):
            raise BundleError(
                f"{node.outputs[0]} {fault}, and --kv-read lengths would drop it; "
                "leave --kv-read out"
            )


def has_half_scales(data: bytes) -> bool:
    """Whether inputs are rounded to INT8 with 16-bit scales."""
    graph = OnnxFile(data)
    constants = Constants(graph)
    rounding = (node for node in graph.nodes if node.op_type == "QuantizeLinear")
    return any(_has_half_scale(constants, node) for node in rounding)


def widen_scales(data: bytes, directory: Path) -> bytes:
    """Convert 16-bit scales of INT8 to FP32, which some TensorRT versions need.

    Inputs are cast to FP32 before they are rounded, and dequantized values are cast back, so all
    other types stay. Both operands of a product get scales of one type (rule ``operand-scales``).

    Args:
        data: bytes of a decoder.
        directory: directory of its weights.

    Raises:
        BundleError: a scale cannot be read.
    """
    graph = OnnxFile(data)
    constants = Constants(graph, directory)
    wide: dict[str, str] = {}

    def widened(name: str) -> str:
        if name not in wide:
            constant, values = constants.get(name), constants.values(name)
            assert constant is not None
            assert values is not None
            wide[name] = add_floats(graph, f"{name}.fp32", constant.shape, values)
        return wide[name]

    nodes: list[Node] = []
    for node in graph.nodes:
        nodes.append(node)
        if node.op_type not in QUANTIZING or not _has_half_scale(constants, node):
            continue
        data_in, scale = node.inputs[:2]
        constant = constants.get(data_in)
        if node.op_type == "QuantizeLinear":
            nodes.insert(-1, _cast(data_in, f"{node.outputs[0]}.fp32", "fp32"))
            node.inputs[0] = f"{node.outputs[0]}.fp32"
        elif constant is None or constant.dtype == "int8":
            constant_scale = constants.get(scale)
            assert constant_scale is not None
            output = node.outputs[0]
            node.outputs[0] = f"{output}.fp32"
            nodes.append(_cast(f"{output}.fp32", output, constant_scale.dtype))
        else:
            continue
        node.inputs[1] = widened(scale)
    graph.nodes = nodes
    return graph.serialize()


def _has_half_scale(constants: Constants, node: Node) -> bool:
    constant = constants.get(node.inputs[1]) if len(node.inputs) > 1 else None
    return constant is not None and constant.dtype in ("fp16", "bf16")


def _cast(source: str, output: str, dtype: str) -> Node:
    to = attribute("to", ELEMENT_NUMBERS[dtype])
    return Node("Cast", [source], [output], f"{output}/Cast", attributes=[to])


def _add_best_logits(graph: OnnxFile, keep: int) -> None:
    """Add the outputs of `io_spec.best_outputs`, in FP32 and standard operators.

    The greatest logit is the first of the best, so the row is read once for ``TopK`` and once for
    the sum, which is made in two levels (`io_spec.sum_parts`). The graph, not the host, subtracts
    the sum of the best: both sums may be of logits that are not yet rounded to the type of the row
    (`edge.backends.best.BestLogits.rest_bound`).
    """
    logits = next(info for info in graph.outputs if info.name == io_spec.LOGITS)
    vocab_size = logits.shape[2]
    dtype: FloatType = "bf16" if logits.dtype == "bf16" else "fp16"
    assert isinstance(vocab_size, int)
    one = graph.add_int64("best.one", [1])
    last = graph.add_int64("best.last", [-1])
    shape = graph.add_int64("best.parts", [0, 0, io_spec.sum_parts(vocab_size), -1])

    def add(op: str, inputs: list[str], *outputs: str, **attributes: int) -> str:
        encoded = [attribute(name, value) for name, value in attributes.items()]
        node = Node(op, inputs, list(outputs), f"{outputs[0]}/{op}", attributes=encoded)
        graph.nodes.append(node)
        return outputs[0]

    row = add("Cast", [io_spec.LOGITS], "best.row", to=ELEMENT_NUMBERS["fp32"])
    number = graph.add_int64("best.k", [keep])
    best = add("TopK", [row, number], "best.fp32", "best.places", axis=-1, largest=1, sorted=1)
    add("Cast", [best], io_spec.BEST_VALUES, to=ELEMENT_NUMBERS[dtype])
    add("Cast", ["best.places"], io_spec.BEST_IDS, to=ELEMENT_NUMBERS["int32"])
    zero = graph.add_int64("best.zero", [0])
    greatest = add("Slice", [best, zero, one, last], "best.greatest")
    shifted = add("Sub", [row, greatest], "best.row_shifted")
    parts = add("Reshape", [add("Exp", [shifted], "best.row_exp"), shape], "best.row_parts")
    sums = add("ReduceSum", [parts, last], "best.row_sums", keepdims=0)
    total = add("ReduceSum", [sums, last], "best.row_sum", keepdims=1)
    shifted = add("Sub", [best, greatest], "best.shifted")
    known = add("ReduceSum", [add("Exp", [shifted], "best.exp"), last], "best.sum", keepdims=1)
    add("Sub", [total, known], io_spec.BEST_REST)
    for spec in io_spec.best_outputs(vocab_size, keep, dtype):
        add_output(graph, tensor_info(spec.name, ELEMENT_NUMBERS[spec.dtype], spec.shape))


def _remove_slices(graph: OnnxFile, caches: set[str]) -> None:
    whole = {
        node.outputs[0]: node.inputs[0]
        for node in graph.nodes
        if node.op_type == "Slice" and node.inputs[0] in caches
    }
    if not whole:
        raise BundleError(
            "the graph reads no slices of its cache, so --kv-read cannot change how it reads; "
            "export the bundle again"
        )
    for node in graph.nodes:
        node.inputs = [whole.get(name, name) for name in node.inputs]
