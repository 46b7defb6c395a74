from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.errors import DependencyError
from edge_lab import plot
from edge_lab.plot import Row, Series

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg).iter(f"{SVG}text")]


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2."""
    shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colour", plot.COLOURS)
def test_colours_can_be_read_as_text_in_both_themes(colour: str):
    page = "#ffffff"
    assert contrast(colour, page) >= 4.5
    assert contrast(plot.DARK[colour], plot.DARK[page]) >= 4.5


def test_every_colour_of_a_chart_has_a_dark_one():
    series = [Series(str(i), [(0, 1.0 + i), (5, 2.0 + i)]) for i in range(8)]
    chart = plot.ranges([Row("a", 1, 2, "1 to 2")], "t", "s", "x", limit=(3, "limit"))
    for svg in (plot.draw(plot.lines(series, "x", "y")), plot.draw(chart)):
        body = svg.partition("</style>")[2]
        used = set(re.findall(r'(?:fill|stroke)="(#\w+)"', body))
        assert used <= plot.DARK.keys()
        assert "prefers-color-scheme: dark" in svg


def test_the_same_numbers_give_the_same_text():
    chart = plot.lines([Series("a", [(0, 0.1), (1, 0.2)])], "x", "y")
    assert plot.draw(chart) == plot.draw(chart)


def test_series_of_one_name_stay_apart():
    twins = [Series("a", [(0, 1), (9, 2)]), Series("a", [(0, 5), (9, 5)])]
    svg = plot.draw(plot.lines(twins, "x", "y"))
    strokes = re.findall(r'<path d="M[^"]*L[^"]*" stroke="(#\w+)" stroke-width="2"', svg)
    assert strokes == list(plot.COLOURS[:2])
    assert texts(svg).count("a") == 2


@pytest.mark.parametrize("points", [[(1.0, 0.5)], [(0.0, 1e-9), (1.0, 1e3)], [(0, 2), (3, 2)]])
def test_one_value_and_many_decades_can_be_drawn(points: list[tuple[float, float]]):
    svg = plot.draw(plot.lines([Series("<a>", points)], "x", "y"))
    assert "<a>" in texts(svg)
    assert "NaN" not in svg
    assert "Infinity" not in svg


def test_axes_end_where_the_data_end():
    chart = plot.points([Series("a", [(3, 0.5)]), Series("b", [(7, 2)])], "x", "y")
    assert "with values from 3 to 7" in plot.draw(chart)
    assert "with values from 0.5 to 2" in plot.draw(chart)


def test_marks_tell_their_values_to_mouse_and_screen_reader():
    charts = (
        plot.lines([Series("<a>", [(3, 0.5), (4, 0.25)])], "x", "y"),
        plot.ranges([Row("b", 1, 2, "1 to 2")], "t", "s", "x"),
    )
    root, other = (ET.fromstring(plot.draw(chart)) for chart in charts)
    assert [title.text for title in root.iter(f"{SVG}title")] == ["<a>: 3, 0.5", "<a>: 4, 0.25"]
    assert [title.text for title in other.iter(f"{SVG}title")] == ["b: 1 to 2"]


@settings(max_examples=200)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.01, 0.2))
def test_labels_are_apart_in_the_order_of_their_lines(heights: list[float], gap: float):
    placed = plot._apart(heights, gap)
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    steps = [placed[b] - placed[a] for a, b in pairwise(order)]
    assert all(step >= gap - 1e-9 for step in steps)
    if all(heights[b] - heights[a] > gap for a, b in pairwise(order)):
        assert placed == pytest.approx(heights)


@settings(max_examples=200)
@given(st.floats(1e-9, 1e3), st.floats(1.001, 1e9))
def test_log_ticks_have_both_ends_and_room(low: float, ratio: float):
    ticks = plot._log_ticks(low, low * ratio)
    assert (ticks[0], ticks[-1]) == (low, low * ratio)
    assert ticks == sorted(set(ticks))
    assert len(ticks) <= 2 + 12


def test_a_missing_renderer_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(DependencyError, match="drawing charts needs vl-convert-python; run: "):
        plot.draw({})
