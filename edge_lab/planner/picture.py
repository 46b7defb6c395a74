"""Draws a plan as one SVG file: tokens per second and memory of each quantization."""

from __future__ import annotations

from edge_lab import plot

from .plan import ModelPlan
from .speed import predict


def draw_plan(plan: ModelPlan) -> str:
    """Draw an SVG of a plan; without speeds (a CPU of unknown bandwidth) it shows memory only.

    The time of a token grows linearly between two contexts, so a bar between them shows every speed
    in between.

    Raises:
        DependencyError: vl-convert-python is not installed.
    """
    device, deployment = plan.device, plan.deployment
    place = device.name if device.mode is None else f"{device.name}, {device.mode.name}"
    charts = [_memory(plan)] if device.mode is None else [_speed(plan), _memory(plan)]
    return plot.draw(
        {
            "title": {
                "text": f"{plan.model.name} on {place}, {deployment.backend}",
                "subtitle": f"batch {deployment.batch}, {deployment.kv_capacity:,} tokens of cache "
                "per slot",
                "fontSize": 16,
                "offset": 20,
            },
            "vconcat": charts,
            "spacing": 32,
        }
    )


def _speed(plan: ModelPlan) -> dict[str, object]:
    mode, batch, capacity = plan.device.mode, plan.deployment.batch, plan.deployment.kv_capacity
    assert mode is not None
    rows = []
    for option in plan.options:
        slow, fast = (
            predict(option.work, mode, plan.efficiency, batch, context).decode_tps
            for context in (capacity, 1)
        )
        rows.append(plot.Row(option.name, slow, fast, f"{slow:.1f} to {fast:.1f}"))
    return plot.ranges(
        rows,
        "How fast does it decode?",
        f"from a full context of {capacity:,} tokens to the first token",
        "tokens per second",
    )


def _memory(plan: ModelPlan) -> dict[str, object]:
    sizes = [(option.name, option.memory.process_bytes / 1e9) for option in plan.options]
    rows = [plot.Row(name, 0, size, f"{size:.2f}") for name, size in sizes]
    cache = plan.options[0].memory.cache / 1e9  # no quantization changes it
    usable = plan.device.usable_bytes
    limit = None
    # A limit far to the right of all bars would press them together.
    if usable is not None and usable / 1e9 <= 2 * max(row.high for row in rows):
        limit = (usable / 1e9, f"{usable / 1e9:.1f} GB left to programs")
    return plot.ranges(
        rows,
        "How much memory does the process take?",
        f"{cache:.2f} GB of it are the cache",
        "GB",
        limit=limit,
    )
