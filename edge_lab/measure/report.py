"""Writes the report of `evaluate.measure` as one HTML file: inline CSS and SVG, no links."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Any

from edge_lab import plot

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #667; --line: #d6dae0; --page: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa3ad; --line: #3a4149; --page: #16191d; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
h3 { font-size: 1rem; margin-bottom: 0; }
p { color: var(--soft); } code { font-size: .85em; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem 0 .3rem 2rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; vertical-align: top; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td small, th small { display: block; color: var(--soft); font-weight: normal; }
.missed { color: #c62828; } .met { color: #2e7d32; }
svg { max-width: max(100%, 40rem); height: auto; }
"""


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
ALONE = ("kl_mean", "top1_agreement", "perplexity_ratio")
"""Keys also shown for the bundle alone, if it loses more as it is served."""


def activations(result: dict[str, Any]) -> str:
    """Say in which activations a result was computed."""
    return "int8, as the CPU serves it" if result["int8_activations"] else "float"


def figure_rows(results: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield each row's heading, and per result the figure and its interval, empty if none."""
    for key, heading, form in FIGURES:
        cells = []
        for result in results:
            interval = result["confidence"].get(key, ())
            ends = " to ".join(form.format(end) for end in interval)
            cells.append((format_figure(result[key], form), ends))
        yield heading, cells
    yield "activations", [(activations(result), "") for result in results]
    alone = [result.get("bundle_alone") or {} for result in results]
    for key, heading, form in FIGURES:
        if key in ALONE and any(alone):
            cells = [(format_figure(figures.get(key), form), "") for figures in alone]
            yield f"{heading}: the bundle alone", cells


def format_figure(value: float | None, form: str) -> str:
    """Write a figure, or a dash where it was not measured."""
    return "–" if value is None else form.format(value)


def html_report(results: Sequence[dict[str, Any]]) -> str:
    """Make a whole HTML document.

    Args:
        results: results of `evaluate.measure` on one text, each with its ``bundle``
            and perhaps with ``gate`` (``{"name", "missed": [...]}``).

    Raises:
        DependencyError: there are charts to draw, and vl-convert-python is not installed.
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
        body += _charts(results, labels)
    body += [
        "<h2>What was measured</h2>",
        f"<p>Text: SHA-256 <code>{escape(first['text']['sha256'])}</code>. "
        f"Bootstrap seed {first['seed']}. Engine {escape(first['engine'])}; the bundle alone is "
        "computed with float activations, as a TensorRT engine does. Bits per weight are "
        "those of the linear layers without the lm_head, scales included. KL is "
        "KL(reference || bundle) in nats over the whole vocabulary.</p>",
    ]
    return _page(f"Quality of {first['name']}", body)


def _label(result: dict[str, Any]) -> str:
    return str(result["bundle"]).rstrip("/").rsplit("/", maxsplit=1)[-1]


def _table(results: Sequence[dict[str, Any]], labels: Sequence[str]) -> str:
    """Make a row per figure and a column per bundle, as on a terminal."""
    head = "".join(
        f"<th>{escape(label)}<small>{escape(result['quantization'])}, "
        f"{result['num_bytes'] / 1e6:,.0f} MB</small></th>"
        for result, label in zip(results, labels, strict=True)
    )
    rows = []
    for heading, cells in figure_rows(results):
        listed = "".join(
            f"<td>{escape(figure)}{interval and f'<small>{interval}</small>'}</td>"
            for figure, interval in cells
        )
        rows.append(f"<tr><td>{escape(heading)}</td>{listed}</tr>")
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


def _charts(results: Sequence[dict[str, Any]], labels: Sequence[str]) -> list[str]:
    by_position = [
        [(row["position"], row["kl_mean"]) for row in result["kl_by_position"]]
        for result in results
    ]
    keys, values = (
        [[(row["layer"], row[key]) for row in result["layers"]] for result in results]
        for key in ("key_error", "value_error")
    )
    by_bytes = [[(result["num_bytes"] / 1e6, result["kl_mean"])] for result in results]
    kl, error = "mean KL, nats", "relative error"
    kl_by_position = _chart(plot.lines, labels, by_position, "position in the window", kl)
    kl_by_bytes = _chart(plot.points, labels, by_bytes, "linear layers with the lm_head, MB", kl)
    value_error = _chart(plot.lines, labels, values, "layer", error)
    return [
        f"<h2>Does the loss grow along the window?</h2>{kl_by_position}",
        "<h2>Which layer loses most?</h2>",
        "<p>Relative error of the keys and values that each layer writes into its cache: what "
        "all layers before it and its own projections have lost.</p>",
        f"<h3>Keys</h3>{_chart(plot.lines, labels, keys, 'layer', error)}",
        f"<h3>Values</h3>{value_error}" if value_error else "",  # rotated ones have none
        f"<h2>What does a byte buy?</h2>{kl_by_bytes}",
    ]


def _chart(
    kind: Callable[[Sequence[plot.Series], str, str], dict[str, Any]],
    labels: Sequence[str],
    curves: Sequence[Sequence[tuple[float, float | None]]],
    x_label: str,
    y_label: str,
) -> str:
    """Draw a chart with a logarithmic axis, and name the curves that have zeros."""
    series, zero = [], []
    for label, curve in zip(labels, curves, strict=True):
        measured = [(x, y) for x, y in curve if y is not None]
        positive = [(x, y) for x, y in measured if y > 0]
        if positive:
            series.append(plot.Series(label, positive))
        if len(positive) < len(measured):
            zero.append(label)
    words = (
        f"<p>Zeros have no place on the logarithmic axis: {escape(', '.join(zero))}.</p>"
        if zero
        else ""
    )
    chart = plot.draw(kind(series, x_label, y_label)) if series else ""
    return (chart and f'<div class="wide">{chart}</div>') + words


def html_task_report(results: Sequence[dict[str, Any]]) -> str:
    """Make a whole HTML document of task results, as the verb ``eval --task`` prints them."""
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


def way_cells(result: dict[str, Any]) -> list[list[str]]:
    """Make the table of `measure_ways`, here and on a terminal: headings, then a row per way."""
    energy = result["energy"] is not None
    headings = ["way", "right", "tokens", "steps", "seconds", "right per minute"]
    headings += [
        "right per 1,000 steps",
        "right per kJ" if energy else "",
        "points over one answer",
    ]
    rows = [headings]
    for way in result["ways"]:
        low, high = way["gain_interval"]
        rows.append(
            [
                way["way"],
                f"{way['correct']} of {way['questions']}",
                f"{way['tokens']:,}",
                f"{way['steps']:,.0f}",
                f"{way['seconds']:.1f}",
                f"{way['right_per_minute']:.2f}",
                f"{way['right_per_1000_steps']:.2f}",
                f"{way['right_per_kj']:.2f}" if energy else "",
                f"{100 * way['gain']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})",
            ]
        )
    return rows if energy else [row[:7] + row[8:] for row in rows]


def html_ways_report(results: Sequence[dict[str, Any]]) -> str:
    """Make a whole HTML document of ways to answer, with the frontier of each bundle.

    Raises:
        DependencyError: vl-convert-python is not installed.
    """
    task = results[0]["task"]
    body = [
        f"<h1>Ways to answer {escape(task['name'])}</h1>",
        "<p>A step is a call of the engine; one of n rows counts 1 + 0.1 (n - 1). Intervals are "
        "95 %, by a bootstrap over the questions, against one answer to the same ones. "
        f"Temperature {results[0]['temperature']:g}.</p>",
    ]
    for result in results:
        ways = result["ways"]
        table = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
            for row in way_cells(result)
        )
        points = [[(way["steps"] / way["questions"], way["accuracy"])] for way in ways]
        labels = [way["way"] for way in ways]
        body += [
            f'<h2>{escape(_label(result))}</h2><div class="wide"><table>{table}</table></div>',
            _chart(plot.points, labels, points, "steps per question", "share of right answers"),
        ]
        if result["energy"] is None:
            body.append("<p>No rail of the module can be read here, so steps stand for energy.</p>")
    body.append(f"<p>Task file: SHA-256 <code>{escape(task['sha256'])}</code>.</p>")
    return _page(f"Ways to answer {task['name']}", body)


def _page(title: str, body: Sequence[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body></html>\n"
    )
