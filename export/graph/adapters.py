"""Adds the nodes of an adapter, as `edge.adapters.graph_inputs` defines them, to a linear layer.

The matrices stay transposed: TensorRT reads peft's layouts directly, where it would copy others to
transpose them, and ONNX Runtime has products that read a transposed matrix.
"""

from __future__ import annotations

from edge.adapters.graph_inputs import ADAPTER
from edge.bundle.io_spec import TensorSpec

from .graph_builder import GraphBuilder


def adapter_sum(g: GraphBuilder, x: str, linear: str, a: TensorSpec, b: TensorSpec) -> str:
    """Add ``(x @ a.T) @ b.T`` of each sequence; return its name.

    Args:
        g: the graph.
        x: the linear's input ``[B, S, in]``.
        linear: its name.
        a: the graph's input with A of each sequence.
        b: the graph's input with B of each sequence.
    """
    for each in (a, b):
        g.node("Transpose", [each.name], f"{each.name}.t", perm=[0, 2, 1])
    low = g.node("MatMul", [x, f"{a.name}.t"], f"{linear}{ADAPTER}.low")
    return g.node("MatMul", [low, f"{b.name}.t"], f"{linear}{ADAPTER}")
