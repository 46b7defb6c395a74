"""A picture's tiles, rows and text are known from its size, and are what transformers' are."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge.vision.layout import plan_layout
from edge.vision.section import VisionSection

from . import judge
from .pictures import GOLDEN_PATH, INTERNVL, LIMITS, SECTIONS, SIZES, SMOLVLM

edges = st.integers(1, 10_000)
limits = st.sampled_from([*LIMITS, 3, 12, 16, 100])
names = st.sampled_from(sorted(SECTIONS))


def test_the_grids_of_many_sizes_are_those_of_transformers():
    golden = json.loads(GOLDEN_PATH.read_text())["grids"]
    for name, section in SECTIONS.items():
        for size in SIZES:
            for limit in LIMITS:
                layout = plan_layout(*size, section, limit)
                tiles, rows, cols = golden[f"{size}, {name}, {limit}"]
                assert layout.tiles == tiles, (size, name, limit)
                if section.family == "idefics3":
                    assert (layout.rows, layout.cols) == (rows, cols), (size, name, limit)


@given(edges, edges, limits, names)
@settings(max_examples=200, deadline=None)
def test_a_layout_keeps_to_its_limit_and_its_text_has_its_rows(
    width: int, height: int, limit: int | None, name: str
):
    section = SECTIONS[name]
    layout = plan_layout(width, height, section, limit)
    assert layout.rows * layout.cols <= min(16 if limit is None else limit, section.max_tiles - 1)
    assert layout.rows * layout.cols != 1
    assert (layout.rows == 0) == (layout.cols == 0)
    if layout.rows:
        edge = section.tile_px
        assert layout.steps[-1] == (layout.cols * edge, layout.rows * edge)
        assert plan_layout(width, height, section, layout.rows * layout.cols) == layout
    text = layout.placeholder_text(section)
    assert text.count(section.image_token) == layout.image_rows(section)
    assert layout.image_rows(section) == layout.tiles * section.rows_per_tile


@pytest.mark.parity
@pytest.mark.usefixtures("installed_transformers")
@given(edges, edges, limits, names)
@settings(max_examples=150, deadline=None)
@example(10_000, 1, None, "smolvlm")
@example(1, 10_000, 16, "tiny-smolvlm")
def test_layout_and_text_are_those_of_the_installed_transformers(
    width: int, height: int, limit: int | None, name: str
):
    section = SECTIONS[name]
    options = judge.settings((width, height), section, limit)
    found = judge.grid((width, height), section, options)
    layout = plan_layout(width, height, section, limit)
    assert layout.tiles == found[0]
    assert layout.placeholder_text(section) == judge.text(section, *found)


@pytest.mark.parametrize(
    ("section", "size", "limit", "rows", "cols"),
    [
        (SMOLVLM, (640, 480), None, 3, 4),  # 2048 x 1536
        (SMOLVLM, (640, 480), 11, 3, 3),  # 1536 x 1152
        (SMOLVLM, (640, 480), 4, 2, 2),  # 1024 x 768
        (SMOLVLM, (640, 480), 3, 0, 0),
        (SMOLVLM, (640, 480), 1, 0, 0),
        (SMOLVLM, (800, 400), 2, 1, 2),
        (SMOLVLM, (10_000, 10_000), None, 4, 4),
        (INTERNVL, (640, 480), None, 3, 4),
        (INTERNVL, (640, 480), 2, 0, 0),
        (INTERNVL, (800, 400), 2, 1, 2),
    ],
)
def test_a_lower_limit_gives_a_smaller_grid_or_none(
    section: VisionSection, size: tuple[int, int], limit: int | None, rows: int, cols: int
):
    layout = plan_layout(*size, section, limit)
    assert (layout.rows, layout.cols) == (rows, cols)
