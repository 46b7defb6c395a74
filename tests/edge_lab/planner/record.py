"""Every published figure with its prediction, as docs/measured/planner.json has them.

usage: python -m tests.edge_lab.planner.record      writes the file anew
"""

from __future__ import annotations

import json
from typing import Any

from edge_lab.planner.published import SPEED_FIGURES, Figure
from tests.edge_lab.planner.fit import (
    MEMORY_FIGURES,
    NOT_PREDICTED,
    error,
    predicted,
    predicted_memory,
)
from tests.edge_lab.planner.unseen import UNSEEN, medians
from tests.measured import FOLDER

RECORD = FOLDER / "planner.json"


def record() -> dict[str, Any]:
    """Return the content of the file: speeds in tokens per second, prefill in s, memory in GB."""
    return {
        "about": "Published figures of language models on Orin, and what edge-llm plan predicts. "
        "An error above 0 means that the prediction is faster, or larger. Memory is of the whole "
        "process, at a KV capacity of 4,096, with captured CUDA graphs at their most.",
        "speed": [_speed(figure) for figure in SPEED_FIGURES],
        "unseen": [{"name": name, **_speed(figure)} for name, figure in UNSEEN],
        "unseen_medians": medians(),
        "memory": [
            {
                "source": figure.source,
                "model": figure.model,
                "precision": figure.precision,
                "published": figure.value / 1e9,
                "predicted": _rounded(predicted_memory(figure) / 1e9),
                "error": round(predicted_memory(figure) / figure.value - 1, 2),
            }
            for figure in MEMORY_FIGURES
        ],
        "not_predicted": [{"published": what, "why": why} for what, why in NOT_PREDICTED],
    }


def _speed(figure: Figure) -> dict[str, Any]:
    return {
        "source": figure.source,
        "device": figure.device,
        "mode": figure.mode,
        "model": figure.model,
        "precision": figure.precision,
        "kind": figure.kind,
        "tokens": figure.tokens,
        "batch": figure.batch,
        "published": figure.value,
        "predicted": _rounded(predicted(figure)),
        "error": round(error(figure), 2),
        "fitted": figure.fitted,
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def text() -> str:
    """Return the file as text, with one figure on each line."""
    parts = []
    for key, value in record().items():
        lines = ",\n  ".join(json.dumps(item) for item in value) if isinstance(value, list) else ""
        content = f"[\n  {lines}\n ]" if lines else json.dumps(value)
        parts.append(f" {json.dumps(key)}: {content}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    RECORD.write_text(text(), encoding="utf-8")
