"""Defines the manifest's section ``vision``: how pictures become rows of ``inputs_embeds``.

The encoder is a second graph of the bundle. It takes `PIXEL_VALUES` ``[tiles, 3, tile_px,
tile_px]`` in the graph's float type: fp16 or bf16 in ``graph``, fp32 in ``cpu_graph``. It puts out
`IMAGE_ROWS` ``[tiles, rows_per_tile, hidden]``, after the projector. The number of tiles is
dynamic.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from edge.bundle.extras import read_extra
from edge.bundle.manifest import Count, Manifest, is_file_name
from edge.errors import BundleError

SECTION = "vision"
"""Names the manifest's section, which `read_vision` reads."""
PIXEL_VALUES = "pixel_values"
IMAGE_ROWS = "image_rows"

Family = Literal["idefics3", "internvl"]
VisionQuant = Literal["fp16", "bf16", "int8"]
_Pixels = Annotated[int, msgspec.Meta(ge=1, le=1 << 14)]
_Tiles = Annotated[int, msgspec.Meta(ge=1, le=256)]
_Channels = tuple[float, float, float]
_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
_Loss = Annotated[float, msgspec.Meta(ge=0, le=1e12)]


class VisionSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A vision encoder, and the pictures that it takes.

    Attributes:
        family: family whose rules cut a picture into tiles and write its placeholder text.
        tile_px: edge of a tile in pixels.
        rows_per_tile: rows of ``inputs_embeds`` that a tile becomes, at most 2**16 in all tiles.
        longest_edge_px: length to which a picture's longer edge is resized before it is split.
        max_tiles: most tiles of a picture, with the one that shows it whole.
        mean, std: mean and deviation of each channel, red first: a value becomes
            ``(value * rescale - mean) / std``.
        resample: Pillow's number of the filter that resizes, e.g. 1 for Lanczos.
        rescale: factor on each byte of a pixel.
        image_token: token that stands for one row of a picture; the chat template writes it once
            for a whole picture.
        begin_token: token before each tile.
        end_token: token after the last tile.
        whole_token: token after ``begin_token`` and before the tile of the whole picture.
        tile_token: token after ``begin_token`` and before any other tile; ``{row}`` and ``{col}``
            are replaced by its place, which counts from 1 (`tile_text`).
        quant: how the encoder's weights are stored. The floats of ``cpu_graph`` are fp32; with
            ``int8`` weights ONNX Runtime rounds inputs of products to INT8 as well.
        loss: relative error of the rows of ``cpu_graph`` on ONNX Runtime, measured on a random
            tile: the root of the summed squared difference from the rows with the source's weights,
            over the root of the latter's sum of squares; None if not measured.
        graph, cpu_graph: names of the two graphs' files.
        weight_bytes: size of the weights of ``graph``.
    """

    family: Family
    tile_px: _Pixels
    rows_per_tile: _Pixels
    longest_edge_px: _Pixels
    max_tiles: _Tiles
    mean: _Channels
    std: _Channels
    resample: Annotated[int, msgspec.Meta(ge=0, le=5)]
    rescale: Annotated[float, msgspec.Meta(gt=0, le=1)]
    image_token: _Text
    begin_token: _Text
    end_token: _Text
    whole_token: str
    tile_token: str
    quant: VisionQuant
    loss: _Loss | None = None
    graph: str = "vision.onnx"
    cpu_graph: str = "vision.cpu.onnx"
    weight_bytes: Count = 0

    def tile_text(self, row: int, col: int) -> str:
        """Return the token of a tile by its place, counted from 1."""
        return self.tile_token.replace("{row}", str(row)).replace("{col}", str(col))


def read_vision(manifest: Manifest) -> VisionSection | None:
    """Read a bundle's vision section; None if the bundle reads text only.

    Raises:
        BundleError: the section is malformed, or names a file that the bundle does not have.
    """
    section = read_extra(manifest, SECTION, VisionSection)
    if section is None:
        return None
    for name in (section.graph, section.cpu_graph):
        if not is_file_name(name) or name not in manifest.files:
            raise BundleError(
                f"{manifest.name}: the manifest's section {SECTION} names the graph {name!r}, "
                "which is no file of the bundle; export the bundle again"
            )
    if section.max_tiles * section.rows_per_tile >= 1 << 16 or not all(section.std):
        raise BundleError(
            f"{manifest.name}: the manifest's section {SECTION} has {section.max_tiles} tiles of "
            f"{section.rows_per_tile} rows and std {section.std}; expected fewer than 65,536 rows "
            "and no std of 0; export the bundle again"
        )
    return section
