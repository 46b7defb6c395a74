"""What counts as a node that a device did not run."""

from __future__ import annotations

from typing import Any

from edge.backends.ort.placement import tensor_nodes_elsewhere


def event(op: str, provider: str, *outputs: dict[str, list[int]], cat: str = "Node") -> Any:
    arguments = {"op_name": op, "provider": provider, "output_type_shape": list(outputs)}
    return {"cat": cat, "name": f"{op}_kernel_time", "args": arguments}


def test_only_nodes_on_tensors_count_as_elsewhere():
    cpu, gpu = "CPUExecutionProvider", "CUDAExecutionProvider"
    events = [
        event("MatMul", gpu, {"float16": [1, 1, 64]}),
        event("Shape", cpu, {"int64": [1]}),
        event("Cast", cpu, {"int32": []}),
        event("LessOrEqual", cpu, {"bool": [1, 1, 64, 65]}),  # 4160 elements are no index
        event("DequantizeLinear", cpu, {"bfloat16": [64, 64]}),
        event("DequantizeLinear", cpu, {"bfloat16": [64, 64]}),
        event("QuantizeLinear", cpu, {"int8": [4]}),
        event("MatMul", cpu, {"float": [1]}, cat="Session"),
        {"cat": "Node", "name": "fence_before", "args": {"op_name": "Add"}},
    ]
    assert tensor_nodes_elsewhere(events, gpu) == {
        "DequantizeLinear": 2,
        "LessOrEqual": 1,
        "QuantizeLinear": 1,
    }
    assert tensor_nodes_elsewhere(events, cpu) == {"MatMul": 1}
    assert tensor_nodes_elsewhere([], gpu) == {}
