"""The report of `edge.measure.evaluate.measure` as one HTML file: inline CSS and SVG, no links."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 12, 44
# Okabe and Ito's colours, which stay apart for colour-blind eyes.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #667; --line: #d6dae0; --page: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa3ad; --line: #3a4149; --page: #16191d; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
p, .key { color: var(--soft); } code { font-size: .85em; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem 0 .3rem 2rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; vertical-align: top; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td small, th small { display: block; color: var(--soft); font-weight: normal; }
.missed { color: #c62828; } .met { color: #2e7d32; }
svg { max-width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 12px; }
.grid { stroke: var(--line); } .key b { font-weight: 600; }
"""


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


# ------------------------------------------------------------------------------- pages

FIGURES = (
    ("bits_per_weight", "bits per weight", "{:.2f}"),
    ("kl_mean", "KL, mean", "{:.4g}"),
    ("kl_p99", "KL, 99th percentile", "{:.4g}"),
    ("top1_agreement", "top-1 agreement", "{:.2%}"),
    ("cosine_mean", "cosine", "{:.5f}"),
    ("perplexity", "perplexity", "{:.3f}"),
    ("perplexity_reference", "reference's perplexity", "{:.3f}"),
    ("perplexity_ratio", "ratio of both", "{:.4f}"),
)
"""Key, heading and format of each figure, here and on a terminal."""


def format_figure(value: float | None, form: str) -> str:
    """A figure, or a dash where it was not measured."""
    return "–" if value is None else form.format(value)


def html_report(results: Sequence[dict[str, Any]]) -> str:
    """A whole HTML document.

    Args:
        results: of `edge.measure.evaluate.measure` on one text, each with its ``bundle`` and
            perhaps with ``gate`` (``{"name", "missed": [...]}``).
    """
    first = results[0]
    labels = [_label(result) for result in results]
    reference = first["reference"]
    against = (
        "without a reference"
        if reference is None
        else f"against {reference['name']} ({reference['quantization']})"
    )
    body = [
        f"<h1>Quality of {escape(first['name'])}</h1>",
        f"<p>Teacher-forced {escape(against)} on {first['tokens']:,} tokens of "
        f"{escape(first['text']['name'])}, windows of {first['window']} tokens. "
        "Small figures are 95 % confidence intervals.</p>",
        _table(results, labels),
        *(_gate(result, label) for result, label in zip(results, labels, strict=True)),
    ]
    if reference is not None:
        body += _plots(results, labels)
    body += [
        "<h2>What was measured</h2>",
        f"<p>Text: SHA-256 <code>{escape(first['text']['sha256'])}</code>. "
        f"Bootstrap seed {first['seed']}. Engine {escape(first['engine'])} with "
        f"{'int8' if first['int8_activations'] else 'float'} activations. Bits per weight are "
        "those of the linear layers without the lm_head, scales included. KL is "
        "KL(reference || bundle) in nats over the whole vocabulary.</p>",
    ]
    return _page(f"Quality of {first['name']}", body)


def _label(result: dict[str, Any]) -> str:
    return str(result["bundle"]).rstrip("/").rsplit("/", maxsplit=1)[-1]


def _table(results: Sequence[dict[str, Any]], labels: Sequence[str]) -> str:
    """A row per figure and a column per bundle, as on a terminal."""
    head = "".join(
        f"<th>{escape(label)}<small>{escape(result['quantization'])}, "
        f"{result['num_bytes'] / 1e6:,.0f} MB</small></th>"
        for result, label in zip(results, labels, strict=True)
    )
    rows = []
    for key, heading, form in FIGURES:
        cells = []
        for result in results:
            cell = escape(format_figure(result[key], form))
            if key in result["confidence"]:
                low, high = result["confidence"][key]
                cell += f"<small>{form.format(low)} to {form.format(high)}</small>"
            cells.append(f"<td>{cell}</td>")
        rows.append(f"<tr><td>{escape(heading)}</td>{''.join(cells)}</tr>")
    return f'<div class="wide"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'


def _gate(result: dict[str, Any], label: str) -> str:
    gate = result.get("gate")
    if gate is None:
        return ""
    if not gate["missed"]:
        return f'<p class="met">{escape(label)} passes the gate {escape(gate["name"])}.</p>'
    missed = escape("; ".join(gate["missed"]))
    return (
        f'<p class="missed">{escape(label)} misses the gate {escape(gate["name"])}: {missed}.</p>'
    )


def _plots(results: Sequence[dict[str, Any]], labels: Sequence[str]) -> list[str]:
    by_position, by_layer, by_bytes = [], [], []
    for colour, (result, label) in enumerate(zip(results, labels, strict=True)):
        curve = [(row["position"], row["kl_mean"]) for row in result["kl_by_position"]]
        by_position.append(Series(label, curve, colour))
        keys = [(row["layer"], row["key_error"]) for row in result["layers"]]
        values = [
            (row["layer"], row["value_error"])
            for row in result["layers"]
            if row["value_error"] is not None
        ]
        by_layer.append(Series(f"{label}, keys", keys, colour))
        if values:
            by_layer.append(Series(f"{label}, values", values, colour, dashed=True))
        by_bytes.append(
            Series(label, [(result["num_bytes"] / 1e6, result["kl_mean"])], colour, line=False)
        )
    return [
        "<h2>KL by position in the window</h2>",
        plot(by_position, "position", "mean KL, nats"),
        "<h2>Error by layer</h2>",
        "<p>Relative error of the keys and values that each layer writes into its cache: what "
        "all layers before it and its own projections have lost.</p>",
        plot(by_layer, "layer", "relative error"),
        "<h2>Bytes against KL</h2>",
        plot(by_bytes, "linear layers with the lm_head, MB", "mean KL, nats", log_y=True),
    ]


def html_task_report(results: Sequence[dict[str, Any]]) -> str:
    """A whole HTML document of task results, as the verb ``eval --task`` prints them."""
    rows, flips = [], []
    for result in results:
        low, high = result["accuracy_interval"]
        paired = result.get("against")
        cells = [
            escape(_label(result)),
            f"{result['correct']} of {result['items']}",
            f"{result['accuracy']:.2%}<small>{low:.2%} to {high:.2%}</small>",
            "–" if paired is None else f"{paired['accuracy']:.2%}",
            "–" if paired is None else f"{paired['accuracy_loss']:+.2%}",
            "–" if paired is None else f"{paired['lost']} lost, {paired['won']} won",
            "–" if paired is None else f"{paired['mcnemar_p']:.3g}",
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        for flip in () if paired is None else paired["flips"]:
            cells = [
                _label(result),
                flip["line"],
                flip["expected"],
                flip["answer"],
                flip["answer_reference"],
            ]
            flips.append(
                "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + "</tr>"
            )
    task = results[0]["task"]
    body = [
        f"<h1>Answers to {escape(task['name'])}</h1>",
        "<p>Small figures are 95 % Wilson intervals; p is McNemar's exact test on the items that "
        "only one of both got right.</p>",
        '<div class="wide"><table><tr><th>bundle</th><th>correct</th><th>accuracy</th>'
        "<th>reference</th><th>loss</th><th>flips</th><th>p</th></tr>"
        f"{''.join(rows)}</table></div>",
        *(_gate(result, _label(result)) for result in results),
    ]
    if flips:
        body.append(
            '<h2>Flips</h2><div class="wide"><table><tr><th>bundle</th><th>line</th>'
            "<th>expected</th><th>answer</th><th>reference</th></tr>"
            f"{''.join(flips)}</table></div>"
        )
    body.append(f"<p>Task file: SHA-256 <code>{escape(task['sha256'])}</code>.</p>")
    return _page(f"Answers to {task['name']}", body)


def _page(title: str, body: Sequence[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body></html>\n"
    )
