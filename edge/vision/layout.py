"""Plans how a picture is cut into tiles and which text replaces it in a prompt, from its size.

No pixel is decoded for this, so the number of a picture's rows of ``inputs_embeds`` is known before
it is encoded. The arithmetic is that of transformers' processors, to the last rounding of a float:
Idefics3 and SmolVLM in ``image_processing_pil_idefics3.py`` and ``processing_idefics3.py``,
InternVL in ``image_processing_pil_got_ocr2.py`` and ``processing_internvl.py``.

A limit on the tiles gives what the same processors give with other settings:

- Idefics3: the longer edge shrinks to the most tiles whose grid stays within the limit,
  ``size={"longest_edge": n * tile_px}``. A grid has two tiles or more. With a lower limit there is
  no grid: ``do_image_splitting=False``.
- InternVL: ``max_patches`` is the limit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .section import VisionSection

Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True)
class Layout:
    """How a picture becomes tiles; the last tile shows the whole picture.

    Attributes:
        steps: sizes to which it is resized, one after the other; the last one is cut into tiles.
        rows, cols: the grid of tiles, without the tile of the whole picture; both may be 0.
        whole_of_steps: whether the tile of the whole picture is resized from the last of the steps,
            as in Idefics3, and not from the picture.
    """

    steps: tuple[Size, ...]
    rows: int
    cols: int
    whole_of_steps: bool

    @property
    def tiles(self) -> int:
        """Return the number of tiles, with the one that shows the whole picture."""
        return self.rows * self.cols + 1

    def image_rows(self, section: VisionSection) -> int:
        """Return how many rows of ``inputs_embeds`` the picture becomes."""
        return self.tiles * section.rows_per_tile

    def placeholder_text(self, section: VisionSection) -> str:
        """Return the text that replaces the chat template's ``image_token``.

        It has `image_rows` image tokens, in the order of the tiles, and the family's tokens around
        them.
        """
        rows = section.image_token * section.rows_per_tile
        if section.family == "internvl":
            return section.begin_token + rows * self.tiles + section.end_token
        text = "".join(
            "".join(
                section.begin_token + section.tile_text(row + 1, col + 1) + rows
                for col in range(self.cols)
            )
            + "\n"
            for row in range(self.rows)
        )
        if text:
            text += "\n"
        return text + section.begin_token + section.whole_token + rows + section.end_token


def plan_layout(width: int, height: int, section: VisionSection, tiles: int | None) -> Layout:
    """Plan the tiles of a picture.

    Args:
        width: the picture's width as it is shown, in pixels, at least 1.
        height: its height in pixels, at least 1.
        section: the bundle's section ``vision``.
        tiles: most tiles, not counting the one of the whole picture; None is the family's own
            limit.
    """
    most = section.max_tiles - 1 if tiles is None else min(tiles, section.max_tiles - 1)
    if section.family == "internvl":
        rows, cols = _nearest_grid(width, height, section.tile_px, max(most, 1))
        if rows * cols == 1:
            return Layout((), 0, 0, whole_of_steps=False)
        size = (cols * section.tile_px, rows * section.tile_px)
        return Layout((size,), rows, cols, whole_of_steps=False)
    edge = section.longest_edge_px
    first = _fit(width, height, edge)
    fitted = first
    while edge > section.tile_px:
        size = _whole_tiles(*fitted, section.tile_px)
        cols, rows = size[0] // section.tile_px, size[1] // section.tile_px
        if 1 < rows * cols <= most:
            return Layout((fitted, size), rows, cols, whole_of_steps=True)
        edge = (math.ceil(edge / section.tile_px) - 1) * section.tile_px
        fitted = _fit(width, height, edge)
    return Layout((first,), 0, 0, whole_of_steps=True)


def _fit(width: int, height: int, edge: int) -> Size:
    """Return the size whose longer side is ``edge`` pixels and whose other side is even."""
    aspect = width / height
    if width >= height:
        width, height = edge, int(edge / aspect)
        height += height % 2
    else:
        width, height = int(edge * aspect), edge
        width += width % 2
    return max(width, 1), max(height, 1)


def _whole_tiles(width: int, height: int, tile_px: int) -> Size:
    """Return the size, in whole tiles, to which a picture is stretched before it is cut."""
    aspect = width / height
    if width >= height:
        width = math.ceil(width / tile_px) * tile_px
        height = math.ceil(int(width / aspect) / tile_px) * tile_px
    else:
        height = math.ceil(height / tile_px) * tile_px
        width = math.ceil(int(height * aspect) / tile_px) * tile_px
    return max(width, tile_px), max(height, tile_px)


def _nearest_grid(width: int, height: int, tile_px: int, most: int) -> tuple[int, int]:
    """Return rows and columns of the grid whose shape is nearest to the picture's.

    Of two grids of equal shape it takes the larger one if that has less than twice the picture's
    area.
    """
    aspect = width / height
    grids = [
        (cols, rows)
        for cols in range(1, most + 1)
        for rows in range(1, most + 1)
        if cols * rows <= most
    ]
    best, best_cols, best_rows = math.inf, 1, 1
    for cols, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        difference = abs(aspect - cols / rows)
        if difference < best or (
            difference == best and width * height > 0.5 * tile_px * tile_px * cols * rows
        ):
            best, best_cols, best_rows = difference, cols, rows
    return best_rows, best_cols
