"""Checks that an attention masks nothing but the rows after each token's own."""

from __future__ import annotations

from collections.abc import Mapping

from . import io_spec
from .onnx_file import Node
from .onnx_values import node_attributes


def mask_fault(attention: Node, makers: Mapping[str, Node]) -> str | None:
    """Say what a ``native`` Attention does besides scaling and masking later rows.

    Whoever replaces the operator by one that takes lengths asks first: those drop the mask.

    Args:
        attention: the node.
        makers: the nodes of its graph by the tensors that they make.

    Returns:
        What is more or other, as the end of a sentence about the attention; None if nothing is.
    """
    if node_attributes(attention).keys() - {"scale"} or len(attention.inputs) != 4:
        return "has more to it than a scale and a mask"
    mask = makers.get(attention.inputs[3])
    if mask is not None and mask.op_type == "LessOrEqual" and len(mask.inputs) == 2:
        rows, column = mask.inputs
        positions = makers.get(column)
        if (
            rows == io_spec.KV_POSITIONS
            and positions is not None
            and positions.op_type == "Unsqueeze"
            and positions.inputs[0] == io_spec.POSITION_IDS
        ):
            return None
    return f"has a mask, {attention.inputs[3]!r}, that is not the causal one"
