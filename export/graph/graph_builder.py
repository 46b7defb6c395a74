"""Wraps ``onnx.helper`` thinly: named nodes, constants, external initializers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edge.bundle.io_spec import TensorSpec
from edge.bundle.manifest import FloatType

from .data_file import StoredTensor

ONNX_TYPE: dict[str, int] = {
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
    "fp32": TensorProto.FLOAT,
    "int64": TensorProto.INT64,
    "int8": TensorProto.INT8,
}
NUMPY_TYPE: dict[str, np.dtype[np.generic]] = {
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp32": np.dtype(np.float32),
}


class GraphBuilder:
    """Collects nodes and initializers in order; values are plain tensor names.

    Args:
        float_type: the type of the graph's float tensors.
    """

    def __init__(self, float_type: FloatType) -> None:
        self.float_type = float_type
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}

    def node(
        self,
        op_type: str,
        inputs: Sequence[str],
        name: str,
        *,
        outputs: Sequence[str] | None = None,
        **attributes: Any,
    ) -> str:
        """Add a node; return its first output, by default named like the node."""
        names = list(outputs) if outputs is not None else [name]
        self._nodes.append(
            helper.make_node(op_type, list(inputs), names, name=f"{name}/{op_type}", **attributes)
        )
        return names[0]

    def constant(self, name: str, values: NDArray[np.generic] | Sequence[int]) -> str:
        """Add a small integer or bool constant, stored in the model file."""
        array = np.asarray(values, dtype=None if isinstance(values, np.ndarray) else np.int64)
        return self._small(onnx.numpy_helper.from_array(array, name))

    def scalar(self, name: str, value: float, float_type: FloatType | None = None) -> str:
        """Add a float scalar in the graph's float type, or in the one given."""
        kind = ONNX_TYPE[float_type or self.float_type]
        return self._small(helper.make_tensor(name, kind, [], [value]))

    def _small(self, tensor: TensorProto) -> str:
        """Add a constant once; one that layers have in several values is numbered."""
        name, number = str(tensor.name), 0
        while self._initializers.setdefault(tensor.name, tensor) != tensor:
            number += 1
            tensor.name = f"{name}.{number}"
        return str(tensor.name)

    def small_floats(self, name: str, values: NDArray[np.floating]) -> str:
        """Add a small constant in the graph's float type, stored in the model file."""
        if name not in self._initializers:
            data = np.ascontiguousarray(values, NUMPY_TYPE[self.float_type]).tobytes()
            self._initializers[name] = helper.make_tensor(
                name, ONNX_TYPE[self.float_type], values.shape, data, raw=True
            )
        return name

    def int8_zero(self, name: str) -> str:
        """Add the INT8 scalar 0."""
        if name not in self._initializers:
            self._initializers[name] = onnx.numpy_helper.from_array(np.int8(0), name)
        return name

    def external(self, tensor: StoredTensor) -> str:
        """Add an initializer whose bytes are in a data file."""
        if tensor.name not in self._initializers:
            proto = TensorProto(
                name=tensor.name,
                data_type=tensor.onnx_type,
                dims=tensor.dims,
                data_location=TensorProto.EXTERNAL,
            )
            for key, value in (
                ("location", tensor.file),
                ("offset", str(tensor.offset)),
                ("length", str(tensor.num_bytes)),
            ):
                proto.external_data.add(key=key, value=value)
            self._initializers[tensor.name] = proto
        return tensor.name

    def floats(self, tensor: StoredTensor) -> str:
        """Add an external float tensor, cast to the graph's float type if it is stored in another.

        The FP32 twin reads the engine's float weights this way, so no second copy is on disk.
        """
        name = self.external(tensor)
        wanted = ONNX_TYPE[self.float_type]
        if tensor.onnx_type == wanted:
            return name
        return self.node("Cast", [name], f"{name}.{self.float_type}", to=wanted)

    def model(
        self,
        name: str,
        opset: int,
        inputs: Iterable[TensorSpec],
        outputs: Iterable[TensorSpec],
        producer_version: str,
    ) -> onnx.ModelProto:
        """Make the finished model; the IR version is the oldest that the opset allows."""
        graph = helper.make_graph(
            self._nodes,
            name,
            [_value_info(spec) for spec in inputs],
            [_value_info(spec) for spec in outputs],
            initializer=list(self._initializers.values()),
        )
        opsets = [helper.make_opsetid("", opset)]
        return helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=helper.find_min_ir_version_for(opsets),
            producer_name="edge-llm",
            producer_version=producer_version,
        )


def _value_info(spec: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(spec.name, ONNX_TYPE[spec.dtype], spec.shape)
