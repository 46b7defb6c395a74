"""The scratch memory that a graph needs, for the builder of the stand-in."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from .cuda import RuleError
from .network import Shape

_ALIGNMENT = 256


@functools.cache
def live_bytes(
    model: bytes,
    sizes: tuple[tuple[str, Shape], ...],
    values: tuple[tuple[str, Shape], ...] = (),
) -> int:
    """The most bytes of intermediate tensors that a run has at once, each in a place of its own.

    Weights, what is computed of weights alone, and the engine's inputs and outputs are elsewhere.

    Args:
        model: ONNX with its weights in it.
        sizes: the shape of every input.
        values: of shape tensors.
    """
    inferred = _inferred(model, dict(sizes), dict(values))
    found = {
        name: -(-math.prod(shape) * itemsize // _ALIGNMENT) * _ALIGNMENT
        for name, (shape, itemsize) in _known_shapes(inferred).items()
    }
    last = {name: place for place, node in enumerate(inferred.node) for name in node.input}
    elsewhere = {each.name for each in [*inferred.output, *inferred.input]}
    fixed = {each.name for each in inferred.initializer}
    alive: dict[str, int] = {}
    most = 0
    for place, node in enumerate(inferred.node):
        if all(name in fixed for name in node.input if name):
            fixed.update(node.output)
            continue
        alive.update({name: found[name] for name in node.output if name not in elsewhere})
        most = max(most, sum(alive.values()))
        for name in node.input:
            if last[name] == place:
                alive.pop(name, None)
    return most


def _inferred(model: bytes, sizes: dict[str, Shape], values: dict[str, Shape]) -> Any:
    """The GraphProto with the shapes of all tensors; what follows of shapes alone is constant."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    proto = onnx.load_from_string(model)
    graph = proto.graph
    symbols: dict[str, int] = {}
    for value in graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, sizes[value.name], strict=True):
            if dim.dim_param:
                symbols[dim.dim_param] = size
            dim.dim_value = size
    for value in graph.output:
        for dim in value.type.tensor_type.shape.dim:
            dim.dim_value = symbols.get(dim.dim_param, dim.dim_value)
    numbers = {
        each.name: onnx.numpy_helper.to_array(each)
        for each in graph.initializer
        if each.data_type == onnx.TensorProto.INT64
    }
    numbers.update({name: np.array(value, np.int64) for name, value in values.items()})
    graph.initializer.extend(onnx.numpy_helper.from_array(numbers[name], name) for name in values)
    for each in graph.initializer:
        if each.name not in numbers:
            each.ClearField("raw_data")  # shapes do not depend on it
    folded, inferred, shapes = 1, graph, {}
    while folded:
        inferred = onnx.shape_inference.infer_shapes(proto).graph
        shapes, folded = _known_shapes(inferred), 0
        for node in list(graph.node):
            if node.op_type == "Shape" and node.input[0] in shapes:
                window = {each.name: each.i for each in node.attribute}
                dims = shapes[node.input[0]][0][window.get("start", 0) : window.get("end")]
                result = np.array(dims, np.int64)
            elif node.op_type != "Constant" and all(name in numbers for name in node.input):
                (result,) = ReferenceEvaluator(node).run(
                    None, {name: numbers[name] for name in node.input}
                )
            else:
                continue
            numbers[node.output[0]] = result
            graph.initializer.append(onnx.numpy_helper.from_array(result, node.output[0]))
            graph.node.remove(node)
            folded += 1
    for node in graph.node:
        if any(name not in shapes for name in node.output):
            raise RuleError(f"the shape of {node.output[0]} is not known")
    return inferred


def _known_shapes(graph: Any) -> dict[str, tuple[Shape, int]]:
    """Shape and bytes of an element of the tensors of a GraphProto that have both."""
    import onnx

    found = {}
    for value in [*graph.value_info, *graph.input, *graph.output]:
        tensor = value.type.tensor_type
        if all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            shape = tuple(dim.dim_value for dim in tensor.shape.dim)
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
            found[value.name] = shape, dtype.itemsize
    return found
