"""The manifest's section of pictures is read whole, or refused by what is wrong with it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from edge.bundle.manifest import FileInfo, Manifest
from edge.errors import BundleError
from edge.vision.section import SECTION, VisionSection, read_vision
from tests.makers.manifests import make_manifest

WRITTEN = VisionSection(
    family="idefics3",
    tile_px=32,
    rows_per_tile=4,
    longest_edge_px=128,
    max_tiles=17,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    resample=1,
    rescale=1 / 255,
    image_token="<image>",
    begin_token="<fake_token_around_image>",
    end_token="<fake_token_around_image>",
    whole_token="<global-img>",
    tile_token="<row_{row}_col_{col}>",
    quant="fp16",
)


def manifest_with(**changes: Any) -> Manifest:
    section = msgspec.to_builtins(msgspec.structs.replace(WRITTEN, **changes))
    files = {name: FileInfo(1, "0" * 64) for name in ("vision.onnx", "vision.cpu.onnx")}
    return make_manifest(extras={SECTION: section}, files=files)


def test_the_section_is_read_as_it_was_written():
    assert read_vision(manifest_with()) == WRITTEN
    assert read_vision(make_manifest()) is None


def test_a_tile_is_named_by_its_place():
    assert WRITTEN.tile_text(2, 3) == "<row_2_col_3>"
    # Nothing else of a hostile manifest's text is looked up.
    hostile = msgspec.structs.replace(WRITTEN, tile_token="{row.__class__}{col}")
    assert hostile.tile_text(2, 3) == "{row.__class__}3"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"graph": "other.onnx"}, "'other.onnx', which is no file of the bundle"),
        ({"cpu_graph": "../vision.cpu.onnx"}, "'../vision.cpu.onnx', which is no file"),
        ({"max_tiles": 200, "rows_per_tile": 400}, "fewer than 65,536 rows"),
        ({"std": (0.5, 0.0, 0.5)}, "no std of 0"),
        ({"tile_px": 0}, r"section vision does not fit"),
        ({"family": "other"}, r"section vision does not fit"),
    ],
)
def test_a_section_that_cannot_be_used_is_refused(changes: dict[str, Any], said: str):
    with pytest.raises(BundleError, match=said):
        read_vision(manifest_with(**changes))
