"""Lines and points as SVG text, for the pages of an evaluation and the picture of a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 12, 44
# Okabe and Ito's colours, which stay apart for colour-blind eyes.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


@dataclass(frozen=True)
class Series:
    """One line or one set of points of a plot.

    Attributes:
        name: shown in the key.
        points: ``(x, y)``.
        colour: index of a colour.
        dashed: draw the line dashed.
        line: join the points.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    dashed: bool = False
    line: bool = True


def plot(series: Sequence[Series], x_label: str, y_label: str, *, log_y: bool = False) -> str:
    """An SVG plot with its key; a logarithmic axis leaves out points that are not positive."""
    drawn = [
        Series(s.name, [p for p in s.points if not log_y or p[1] > 0], s.colour, s.dashed, s.line)
        for s in series
    ]
    points = [point for s in drawn for point in s.points]
    if not points:
        return "<p>Nothing to draw: every value is 0.</p>"
    x_ticks = linear_ticks(*_bounds([x for x, _ in points]))
    ys = [y for _, y in points]
    y_ticks = log_ticks(min(ys), max(ys)) if log_y else linear_ticks(0.0, max(ys))
    place_x = _scale(x_ticks[0], x_ticks[-1], _LEFT, _WIDTH - _RIGHT, log=False)
    place_y = _scale(y_ticks[0], y_ticks[-1], _HEIGHT - _BOTTOM, _TOP, log=log_y)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img" '
        f'aria-label="{escape(y_label)} by {escape(x_label)}">'
    ]
    for tick in y_ticks:
        y = place_y(tick)
        parts += [
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>',
            f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>',
        ]
    for tick in x_ticks:
        parts.append(
            f'<text x="{place_x(tick):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">'
            f"{tick:.6g}</text>"
        )
    parts += [
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2:.0f}" y="{_HEIGHT - 6}" text-anchor="middle">'
        f"{escape(x_label)}</text>",
        f'<text transform="translate(14 {(_HEIGHT - _BOTTOM) / 2:.0f}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>',
    ]
    for s in drawn:
        parts += _draw(s, place_x, place_y)
    return "".join(parts) + "</svg>" + _key(drawn)


def _draw(
    series: Series, place_x: Callable[[float], float], place_y: Callable[[float], float]
) -> list[str]:
    colour = COLOURS[series.colour % len(COLOURS)]
    placed = [(place_x(x), place_y(y)) for x, y in series.points]
    parts = []
    if series.line and len(placed) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        dash = ' stroke-dasharray="5 4"' if series.dashed else ""
        parts.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="2"{dash} points="{path}"/>'
        )
    radius = 2.5 if series.line else 5
    parts += [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}">'
        f"<title>{escape(series.name)}: {value_x:.6g}, {value_y:.4g}</title></circle>"
        for (x, y), (value_x, value_y) in zip(placed, series.points, strict=True)
    ]
    return parts


def _key(series: Sequence[Series]) -> str:
    entries = (
        f'<b style="color:{COLOURS[s.colour % len(COLOURS)]}">'
        f"{'╍╍' if s.dashed else '━━' if s.line else '●'}</b> {escape(s.name)}"
        for s in series
    )
    return f'<p class="key">{" &nbsp; ".join(entries)}</p>'


def linear_ticks(low: float, high: float) -> list[float]:
    """Round numbers that cover ``low..high`` in four to nine steps of 1, 2 or 5 times 10^n."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= max(factor for factor in (1, 2, 5) if factor * step <= (high - low) / 4)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that cover ``low..high``, at least two."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0**i for i in range(first, max(last, first + 1) + 1)]


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _scale(
    low: float, high: float, start: float, end: float, *, log: bool
) -> Callable[[float], float]:
    def place(value: float) -> float:
        if log:
            share = math.log(value / low) / math.log(high / low)
        else:
            share = (value - low) / (high - low)
        return start + share * (end - start)

    return place
