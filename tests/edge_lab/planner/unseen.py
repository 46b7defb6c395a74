"""Published figures that neither the fit nor whoever wrote the planner had seen: its judge.

They are the benchmark table of NVIDIA's jetson-ai-lab (github.com/NVIDIA-AI-IOT/jetson-ai-lab,
``src/data/benchmarks.json``): vLLM, W4A16, prompts of 2,048 tokens and answers of 128, one and
eight requests at once; all rows on Orin of models that the planner can describe. Of a vision model
the language part is predicted. No row was left out for its error, and nothing may be fitted to
them.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from edge_lab.planner.published import Figure
from tests.edge_lab.planner.fit import error

DECEMBER = "jetson-ai-lab 8710133, December 2025"
NEWEST = "jetson-ai-lab 0d6baca, 2026"
_AGX, _NX = "agx-orin-64", "orin-nx-16"
_CONTEXT = 2048 + 128 // 2  # in the cache, on average, while the answer is made

# Device, published model, the model that is predicted, tokens per second of one request and of 8.
_ROWS: dict[str, tuple[tuple[str, str, str, float, float], ...]] = {
    DECEMBER: (
        (_AGX, "Llama 3.2 3B", "Llama-3.2-3B", 52.58, 240.68),
        (_AGX, "Llama 3.1 8B", "Llama-3-8B", 28.14, 112.33),
        (_AGX, "Llama 3.3 70B", "Llama-3.3-70B", 2.93, 7.38),
        (_AGX, "Qwen 3 8B", "Qwen3-8B", 26.53, 142.99),
        (_AGX, "Qwen 3 32B", "Qwen3-32B", 6.22, 16.84),
    ),
    NEWEST: (
        (_AGX, "Qwen 3 4B", "Qwen3-4B", 50, 222),
        (_NX, "Qwen 3 4B", "Qwen3-4B", 17, 35),
        (_AGX, "Qwen 3 8B", "Qwen3-8B", 30, 157),
        (_NX, "Qwen 3 8B", "Qwen3-8B", 9, 22),
        (_AGX, "Qwen3-32B", "Qwen3-32B", 7, 17),
        (_AGX, "Qwen3-VL-2B", "Qwen3-1.7B", 60, 91),
        (_NX, "Qwen3-VL-2B", "Qwen3-1.7B", 21, 28),
        (_AGX, "Qwen3-VL-4B", "Qwen3-4B", 47, 214),
        (_NX, "Qwen3-VL-4B", "Qwen3-4B", 16, 35),
        (_AGX, "Qwen3-VL-8B", "Qwen3-8B", 28, 149),
        (_NX, "Qwen3-VL-8B", "Qwen3-8B", 9, 20),
        (_AGX, "Cosmos Reasoning 2 2B", "Qwen3-1.7B", 59, 273),
        (_NX, "Cosmos Reasoning 2 2B", "Qwen3-1.7B", 25, 65),
        (_AGX, "Cosmos Reasoning 2 8B", "Qwen3-8B", 19, 108),
        (_NX, "Cosmos Reasoning 2 8B", "Qwen3-8B", 6, 12),
    ),
}

UNSEEN: tuple[tuple[str, Figure], ...] = tuple(
    (name, Figure(source, device, None, model, "int4", "decode", value, _CONTEXT, batch))
    for source, rows in _ROWS.items()
    for device, name, model, *values in rows
    for batch, value in zip((1, 8), values, strict=True)
)
"""Each figure with the name under which it was published."""


def medians() -> list[dict[str, Any]]:
    """Return the median error by device and batch, then over all, and the median of its size."""
    return [
        {
            "device": device,
            "batch": batch,
            "rows": len(found),
            "median_error": round(statistics.median(found), 2),
            "median_size": round(statistics.median(map(abs, found)), 2),
        }
        for device in (_AGX, _NX, None)
        for batch in ((1, 8) if device else (None,))
        if (found := errors(device, batch))
    ]


def errors(device: str | None = None, batch: int | None = None) -> Sequence[float]:
    """Relative errors of the rows of a device and a batch; None is any."""
    return [
        error(figure)
        for _, figure in UNSEEN
        if device in (None, figure.device) and batch in (None, figure.batch)
    ]
