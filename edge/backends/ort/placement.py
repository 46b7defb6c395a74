"""Finds which provider of ONNX Runtime really ran which node of a graph.

A node for which a provider has no kernel runs on the CPU, without an error, and costs two copies
and a wait. The profile of one step says what ran where, in every version of ONNX Runtime.
Arithmetic on shapes and indices is placed on the CPU on purpose and does not count.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

_INDEX_TYPES = frozenset({"int64", "int32", "bool"})
_INDEX_ELEMENTS = 4096


def tensor_nodes_elsewhere(events: Iterable[Mapping[str, Any]], provider: str) -> dict[str, int]:
    """Count nodes of a profiled step that worked on tensors, but not on ``provider``.

    Args:
        events: the events that ``InferenceSession.end_profiling`` wrote.
        provider: e.g. ``CUDAExecutionProvider``.

    Returns:
        Number of nodes by operator, most frequent first.
    """
    counts: Counter[str] = Counter()
    for event in events:
        # There is an event per node and phase; only the kernel's names a provider.
        arguments = event.get("args", {})
        where = arguments.get("provider")
        if event.get("cat") != "Node" or not where or where == provider:
            continue
        if not _is_index_arithmetic(arguments.get("output_type_shape", [])):
            counts[str(arguments.get("op_name"))] += 1
    return dict(counts.most_common())


def _is_index_arithmetic(outputs: Iterable[Mapping[str, list[int]]]) -> bool:
    return all(
        element_type in _INDEX_TYPES and math.prod(shape) <= _INDEX_ELEMENTS
        for output in outputs
        for element_type, shape in output.items()
    )
