"""A plan as one SVG file: tokens per second and memory against context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from edge.plot import COLOURS, Series, plot

from .plan import Option, Plan
from .speed import predict

_WIDTH, _PLOT_HEIGHT = 690, 300
_POINTS = 9
_KEY_COLUMNS = 4
_LIMIT = "left to programs"
_STYLE = (
    "text { font: 12px system-ui, sans-serif; fill: #445; } .grid { stroke: #d6dae0; } "
    ".title { font-size: 16px; font-weight: 600; fill: #1b1f24; } .panel { font-weight: 600; }"
)


def draw_plan(plan: Plan) -> str:
    """A self-contained SVG; without speeds (a CPU of unknown bandwidth) it has the memory alone."""
    mode, batch = plan.device.mode, plan.deployment.batch

    def tokens_per_s(option: Option, context: int) -> float:
        assert mode is not None
        return predict(option.work, mode, plan.efficiency, batch, context).decode_tps

    def gigabytes(option: Option, context: int) -> float:
        """With a cache of so many tokens; the rest of the process stays."""
        memory = option.memory
        cache = memory.cache * context / plan.deployment.kv_capacity
        return (memory.process_bytes - memory.cache + cache) / 1e9

    limit = _limit(plan, [gigabytes(o, plan.deployment.kv_capacity) for o in plan.options])
    panels = [("memory of the process with so large a cache", "GB", gigabytes, limit)]
    if mode is not None:
        panels.insert(0, ("decode, tokens per second", "tok/s", tokens_per_s, None))
    place = plan.device.name if mode is None else f"{plan.device.name}, {mode.name}"
    title = f"{plan.model.name} on {place}, {plan.deployment.backend}, batch {batch}"
    parts, top = [f'<text class="title" x="20" y="26">{escape(title)}</text>'], 44
    for label, unit, value, line in panels:
        parts.append(f'<text class="panel" x="20" y="{top + 10}">{escape(label)}</text>')
        parts.append(_panel(plan, unit, value, line, top + 18))
        top += _PLOT_HEIGHT + 34
    names = [option.name for option in plan.options] + ([] if limit is None else [_LIMIT])
    parts += _key(names, top + 8)
    height = top + 4 + 20 * -(-len(names) // _KEY_COLUMNS)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}"><style>{_STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _limit(plan: Plan, gigabytes: Sequence[float]) -> float | None:
    """What the device leaves to programs, in GB; None if that is far above all lines."""
    usable = plan.device.usable_bytes
    if usable is None or usable / 1e9 > 2 * max(gigabytes):
        return None
    return usable / 1e9


def _panel(
    plan: Plan,
    unit: str,
    value: Callable[[Option, int], float],
    limit: float | None,
    top: int,
) -> str:
    capacity = plan.deployment.kv_capacity
    contexts = sorted({max(capacity * i // (_POINTS - 1), 1) for i in range(_POINTS)})
    series = [
        Series(
            option.name,
            [(float(context), value(option, context)) for context in contexts],
            index,
            dashed=index >= len(COLOURS),
        )
        for index, option in enumerate(plan.options)
    ]
    if limit is not None:
        ends = [(float(contexts[0]), limit), (float(contexts[-1]), limit)]
        series.append(Series(_LIMIT, ends, len(series), dashed=True))
    # `plot` writes for a page: its SVG is nested here, and its key, which is HTML, left out.
    drawing = plot(series, "context, tokens", unit).partition("</svg>")[0] + "</svg>"
    return drawing.replace(
        "<svg ", f'<svg x="10" y="{top}" height="{_PLOT_HEIGHT}" overflow="visible" ', 1
    )


def _key(names: Sequence[str], top: int) -> list[str]:
    parts = []
    for index, name in enumerate(names):
        x = 20 + (index % _KEY_COLUMNS) * (_WIDTH - 40) // _KEY_COLUMNS
        y = top + 20 * (index // _KEY_COLUMNS)
        dashed = index >= len(COLOURS) or name == _LIMIT
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        colour = COLOURS[index % len(COLOURS)]
        parts.append(
            f'<line x1="{x}" x2="{x + 22}" y1="{y - 4}" y2="{y - 4}" stroke="{colour}" '
            f'stroke-width="3"{dash}/><text x="{x + 28}" y="{y}">{escape(name)}</text>'
        )
    return parts
