"""Draws charts as SVG text with Vega-Lite, for the page of an evaluation and a plan's picture.

A chart is a Vega-Lite specification. vl-convert renders it without a browser, a script or the
network, and the same numbers give the same text. Colours are written for a light page; a style
sheet in each SVG replaces them where the reader prefers a dark one, and viewers that know no style
sheets still show the light chart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from edge.errors import DependencyError, install_command

_WIDTH, _HEIGHT, _ROW_HEIGHT = 560, 240, 26
_LABEL_HEIGHT = 15
_PAGE, _INK, _SOFT, _GRID = "#ffffff", "#1b1f24", "#56616c", "#dde1e6"
_SERIES = {
    "#0062a8": "#6db9ff",
    "#b34700": "#ff9d5c",
    "#00735a": "#4fd1a5",
    "#9b3d7a": "#e59ac8",
    "#7a5c00": "#e3c04b",
    "#4b5b6b": "#b0bec5",
}
COLOURS = tuple(_SERIES)
"""The colours of the series, in order; each can be read as text on white."""
DARK = {_PAGE: "#16191d", _INK: "#e6e8eb", _SOFT: "#a3acb6", _GRID: "#353c44", **_SERIES}
"""For each colour on a light page, the colour on a dark one."""
_RULES = " ".join(
    f'.marks [{name}="{light}"] {{ {name}: {dark}; }}'
    for light, dark in DARK.items()
    for name in ("fill", "stroke")
)
_STYLE = f"@media (prefers-color-scheme: dark) {{ {_RULES} }}"
_CONFIG: dict[str, Any] = {
    "background": _PAGE,
    "padding": {"left": 24, "right": 32, "top": 8, "bottom": 8},  # a reader's font may be wider
    "font": "Arial, sans-serif",  # as wide as Liberation Sans, which vl-convert brings
    "axis": {
        "domainColor": _SOFT,
        "tickColor": _SOFT,
        "gridColor": _GRID,
        "labelColor": _SOFT,
        "titleColor": _SOFT,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "titlePadding": 8,
        "offset": 6,
        "labelFlush": False,
    },
    "axisX": {"tickCount": 6},
    "title": {"color": _INK, "subtitleColor": _SOFT, "subtitleFontSize": 12, "anchor": "start"},
    "view": {"stroke": None},
    "text": {"fontSize": 12},
}


@dataclass(frozen=True)
class Series:
    """One line, or one set of points, and the label at its end.

    Attributes:
        name: the label.
        points: ``(x, y)``, in the order of x.
    """

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Row:
    """One row of a chart of ranges.

    Attributes:
        name: the label to the left of the row.
        low: where the bar begins.
        high: where the bar ends.
        text: the text in a column to the right of all bars.
    """

    name: str
    low: float
    high: float
    text: str


def load_renderer() -> Any:
    """Import the module ``vl_convert``.

    Raises:
        DependencyError: vl-convert-python is not installed.
    """
    try:
        import vl_convert
    except ImportError as error:
        raise DependencyError(
            f"drawing charts needs vl-convert-python; run: {install_command('report')}"
        ) from error
    return vl_convert


def draw(chart: dict[str, Any]) -> str:
    """Render a Vega-Lite specification as a self-contained SVG.

    Raises:
        DependencyError: vl-convert-python is not installed.
    """
    svg: str = load_renderer().vegalite_to_svg({**chart, "config": _CONFIG})
    # The description of a mark is for screen readers; as a title it also shows under the mouse.
    mark = r'(<path aria-label="([^"]*)" role="graphics-symbol"[^>]*)/>'
    svg = re.sub(mark, r"\1><title>\2</title></path>", svg)
    return svg.replace(">", f"><style>{_STYLE}</style>", 1)


def lines(series: Sequence[Series], x_label: str, y_label: str) -> dict[str, Any]:
    """Make a chart with a line per series, its name at the end; x is whole, y logarithmic.

    Args:
        series: at least one, each with a point; every y is positive.
        x_label: title of the x axis.
        y_label: title of the y axis.
    """
    chart = _labelled(series, x_label, y_label, point_size=24)
    line = {"mark": {"type": "line", "strokeWidth": 2, "aria": False}}
    chart["layer"].insert(0, {"data": chart["layer"][0]["data"], **line})
    chart["encoding"]["x"]["axis"]["tickMinStep"] = 1
    return chart


def points(series: Sequence[Series], x_label: str, y_label: str) -> dict[str, Any]:
    """Make a chart of points with their names beside them; y is logarithmic.

    Args:
        series: at least one, each with a point; every y is positive.
        x_label: title of the x axis.
        y_label: title of the y axis.
    """
    return _labelled(series, x_label, y_label, point_size=90)


def ranges(
    rows: Sequence[Row],
    title: str,
    subtitle: str,
    x_label: str,
    limit: tuple[float, str] | None = None,
) -> dict[str, Any]:
    """Make a chart with a row per thing and a bar from its low to its high value; x begins at 0.

    Args:
        rows: the rows, from top to bottom.
        title: the question that the chart answers.
        subtitle: meaning of a bar's ends.
        x_label: title of the x axis.
        limit: a value to mark with a line across all rows, and the line's label.
    """
    end = max([row.high for row in rows] + ([] if limit is None else [limit[0]]))
    bars = [{**asdict(row), "told": f"{row.name}: {row.text}"} for row in rows]
    layer: list[dict[str, Any]] = [
        {
            "mark": {"type": "bar", "height": 10, "color": COLOURS[0], "stroke": COLOURS[0]},
            "encoding": {"x2": {"field": "high"}, "description": {"field": "told"}},
        },
        {
            "mark": {"type": "text", "align": "left", "dx": 16, "color": _INK},
            "encoding": {"x": {"value": "width"}, "text": {"field": "text"}},
        },
    ]
    if limit is not None:
        at, label = limit
        once = {"values": [{"at": at, "label": label}]}
        place = {"field": "at", "type": "quantitative"}
        layer += [
            {
                "data": once,
                "mark": {"type": "rule", "color": COLOURS[1], "strokeWidth": 2},
                "encoding": {"x": place, "y": {"value": 0}, "y2": {"value": "height"}},
            },
            {
                "data": once,
                "mark": {"type": "text", "color": COLOURS[1], "baseline": "bottom"},
                "encoding": {"x": place, "y": {"value": -4}, "text": {"field": "label"}},
            },
        ]
    return {
        "title": {"text": title, "subtitle": subtitle, "offset": 24 if limit else 8},
        "width": _WIDTH,
        "height": {"step": _ROW_HEIGHT},
        "data": {"values": bars},
        "encoding": {
            "x": {
                "field": "low",
                "type": "quantitative",
                "title": x_label,
                "scale": {"domain": [0, end], "nice": False},
                "axis": {"offset": 0},
            },
            "y": {
                "field": "name",
                "type": "nominal",
                "sort": None,
                "title": None,
                "axis": {"ticks": False, "domain": False, "labelColor": _INK, "labelLimit": 0},
            },
        },
        "layer": layer,
    }


def _labelled(
    series: Sequence[Series], x_label: str, y_label: str, point_size: int
) -> dict[str, Any]:
    """Make a chart of points and labels; both axes end where the data do."""
    xs = _domain([x for s in series for x, _ in s.points])
    ys = _domain([y for s in series for _, y in s.points])
    # A number tells the series apart: two bundles may have the same name.
    rows = [
        {"x": x, "y": y, "series": index, "told": f"{s.name}: {x:.6g}, {y:.4g}"}
        for index, s in enumerate(series)
        for x, y in s.points
    ]
    decades = math.log10(ys[1] / ys[0])
    ends = [s.points[-1] for s in series]
    heights = _apart([math.log10(y / ys[0]) / decades for _, y in ends], _LABEL_HEIGHT / _HEIGHT)
    labels = [
        {"x": x, "y": ys[0] * 10 ** (height * decades), "series": index, "name": s.name}
        for index, (s, (x, _), height) in enumerate(zip(series, ends, heights, strict=True))
    ]
    count = len(series)
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "encoding": {
            "x": {
                "field": "x",
                "type": "quantitative",
                "title": x_label,
                "scale": {"domain": xs, "nice": False, "zero": False},
                "axis": {"grid": False},
            },
            "y": {
                "field": "y",
                "type": "quantitative",
                "title": y_label,
                "scale": {"type": "log", "domain": ys, "nice": False},
                "axis": {"format": ".2~g", "values": _log_ticks(*ys), "labelOverlap": False},
            },
            "color": {
                "field": "series",
                "type": "ordinal",
                "legend": None,
                "scale": {
                    "domain": list(range(count)),
                    "range": [COLOURS[i % len(COLOURS)] for i in range(count)],
                },
            },
        },
        "layer": [
            {
                "data": {"values": rows},
                "mark": {"type": "circle", "size": point_size, "opacity": 1},
                "encoding": {"description": {"field": "told"}},
            },
            {
                "data": {"values": labels},
                "mark": {"type": "text", "align": "left", "dx": 10, "aria": False},
                "encoding": {"text": {"field": "name"}},
            },
        ],
    }


def _domain(values: Sequence[float]) -> tuple[float, float]:
    """Return the lowest and the highest; a single value is widened, as an axis needs a length."""
    low, high = min(values), max(values)
    slack = 0.0 if low < high else abs(low) / 10 or 1.0
    return low - slack, high + slack


def _log_ticks(low: float, high: float) -> list[float]:
    """Return both ends and the powers of ten between them; 1, 2 and 5 of each if these are few."""
    decades = math.log10(high / low)
    factors = (1,) if decades > 3 else (1, 2, 5)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    inside = [factor * 10.0**power for power in range(first, last) for factor in factors]
    gap = 10 ** (decades * _LABEL_HEIGHT / _HEIGHT)  # below it, labels touch
    return [low, *(tick for tick in inside if low * gap < tick < high / gap), high]


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Move the heights as little as possible until neighbours are ``gap`` apart."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    # Labels that would touch form a block around the mean of what they want.
    blocks: list[list[float]] = []
    for rank, index in enumerate(order):
        block = [heights[index] - rank * gap]
        while blocks and mean(blocks[-1]) >= mean(block):
            block = blocks.pop() + block
        blocks.append(block)
    placed = [mean(block) for block in blocks for _ in block]
    found = {index: placed[rank] + rank * gap for rank, index in enumerate(order)}
    return [found[index] for index in range(len(heights))]
