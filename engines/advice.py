"""What TensorRT's errors come down to, and what to do about them."""

from __future__ import annotations

import re
from typing import Any


def parser_cause(problems: list[Any]) -> str:
    """The check that failed first: operator, error code, and the line of the parser's source."""
    if not problems:
        return ""
    first = problems[0]
    code = getattr(first.code(), "name", first.code())
    return f"{first.node_operator()} {code} {first.file()}:{first.line()}"


def builder_cause(error: str) -> str:
    """A message of the builder without names, numbers and lists of nodes."""
    return re.sub(r"\{.*\}|\[.*?\]|'[^']*'|\"[^\"]*\"|\d+", "", error).strip()


def build_advice(error: str, workspace_bytes: int) -> str:
    """What to do where the builder has made no engine."""
    asked = re.search(r"Requested size was (\d+) bytes", error)
    if asked and int(asked[1]) > workspace_bytes:
        # The workspace is short, not the machine's memory: INT8 weights may be unpacked into it.
        return f"give --workspace {(int(asked[1]) >> 20) + 1}M or more"
    return (
        "the build log has more. If it ran out of memory, give a smaller --max-batch, "
        "--max-prefill or --workspace"
    )


def parser_advice(operator: str) -> str:
    """What to do about a graph whose operator the parser refuses; empty is the graph as a whole."""
    if operator in ("Attention", "RotaryEmbedding", "RMSNormalization", "TensorScatter"):
        return "this operator needs TensorRT >= 10.15: export with --dialect portable"
    if not operator:
        return "export the bundle again"
    return "export the bundle again with this edge-llm, or with the other --dialect"
