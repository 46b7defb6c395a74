"""Reduce TensorRT's errors to their causes, and say what to do about each."""

from __future__ import annotations

import re
from typing import Any

from edge.bundle.manifest import Manifest

_BUILD_MINUTES, _MINUTES_PER_GB, _COMPARE_MINUTES = 1.0, 1.5, 1.0


def parser_cause(problems: list[Any]) -> str:
    """Name the check that failed first: operator, error code, and line of the parser's source."""
    if not problems:
        return ""
    first = problems[0]
    code = getattr(first.code(), "name", first.code())
    return f"{first.node_operator()} {code} {first.file()}:{first.line()}"


def builder_cause(error: str) -> str:
    """Strip names, numbers and lists of nodes from a message of the builder."""
    return re.sub(r"\{.*\}|\[.*?\]|'[^']*'|\"[^\"]*\"|\d+", "", error).strip()


def what_auto_takes(manifest: Manifest) -> str:
    """Say what ``--kernels auto`` is about to do, and how long it takes.

    The minutes are predicted, not measured: the builder's start, the tactics of a model, and the
    part that grows with the weights, which are written, read and laid out anew.

    Args:
        manifest: the bundle's manifest.
    """
    file = manifest.files.get(f"{manifest.graphs.decoder}.data")
    weights_bytes = file.num_bytes if file else 0
    minutes = 2 * (_BUILD_MINUTES + _MINUTES_PER_GB * weights_bytes / 1e9 + _COMPARE_MINUTES)
    return (
        "building two engines, with TensorRT's kernels and with edge-llm's own; both are compared "
        f"with the CPU's answers and timed, and the faster is kept: some {minutes:.0f} minutes "
        "(predicted); --kernels own, or tensorrt, builds one"
    )


def build_advice(error: str, workspace_bytes: int) -> str:
    """Say what to do when the builder has made no engine."""
    asked = re.search(r"Requested size was (\d+) bytes", error)
    if asked and int(asked[1]) > workspace_bytes:
        # The workspace is short, not the machine's memory: INT8 weights may be unpacked into it.
        return f"give --workspace {(int(asked[1]) >> 20) + 1}M or more"
    return (
        "the build log has more. If it ran out of memory, give a smaller --max-batch, "
        "--max-prefill or --workspace"
    )


def parser_advice(operator: str) -> str:
    """Say what to do when the parser refuses an operator; an empty name is the whole graph."""
    if operator in ("Attention", "RotaryEmbedding", "RMSNormalization", "TensorScatter"):
        return "this operator needs TensorRT >= 10.15: export with --dialect portable"
    if not operator:
        return "export the bundle again"
    return "export the bundle again with this edge-llm, or with the other --dialect"
