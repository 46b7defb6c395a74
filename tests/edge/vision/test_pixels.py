"""Pixels are those of transformers' processors on their Pillow backend, bit for bit."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from numpy.typing import NDArray
from PIL import Image

from edge.vision.decode import decode_picture, picture_size
from edge.vision.layout import plan_layout
from edge.vision.picture import as_picture

from . import judge
from .pictures import (
    GOLDEN_PATH,
    INTERNVL,
    LIMITS,
    LOSSLESS,
    LOSSY,
    SECTIONS,
    SMOLVLM,
    TINY_INTERNVL,
    TINY_SMOLVLM,
    digest,
    drawn,
    encode,
    grey16,
    picture,
    turned,
    with_alpha,
)

GOLDEN = json.loads(GOLDEN_PATH.read_text())["tiles"][PIL.__version__.partition(".")[0]]
SMALL = [name for name in SECTIONS if name.startswith("tiny")]
sections = pytest.mark.parametrize("section", SMALL)


def pixels(data: object, section: str = "tiny-smolvlm", limit: int | None = None) -> NDArray[Any]:
    return decode_picture(as_picture(data), SECTIONS[section], tiles=limit).normalised()


@sections
@pytest.mark.parametrize("name", LOSSLESS)
def test_tiles_are_those_that_transformers_made(name: str, section: str):
    data = LOSSLESS[name]()
    for limit in LIMITS:
        golden = GOLDEN[f"{name}, {section}, {limit}"]
        assert digest(pixels(data, section, limit)) == golden, limit


@pytest.mark.slow
@pytest.mark.parametrize("section", ["smolvlm", "internvl"])
def test_tiles_of_published_models_are_those_that_transformers_made(section: str):
    for name in ("photo", "tall", "large"):
        golden = GOLDEN[f"{name}, {section}, None"]
        assert digest(pixels(LOSSLESS[name](), section)) == golden, name


@pytest.mark.parity
@pytest.mark.usefixtures("installed_transformers")
@pytest.mark.parametrize("name", [*LOSSLESS, *LOSSY])
def test_tiles_are_those_of_the_installed_transformers(name: str):
    data = (LOSSLESS | LOSSY)[name]()
    for section in SMALL:
        for limit in LIMITS:
            found = pixels(data, section, limit)
            wanted = judge.pixel_values(data, SECTIONS[section], limit)
            assert found.dtype == wanted.dtype
            np.testing.assert_array_equal(found, wanted, f"{section}, {limit}")
            key = f"{name}, {section}, {limit}"
            assert name not in LOSSLESS or GOLDEN[key] == digest(wanted), key


@pytest.mark.parity
@pytest.mark.usefixtures("installed_transformers")
@pytest.mark.parametrize("section", ["smolvlm", "internvl"])
def test_tiles_of_published_models_are_those_of_the_installed_transformers(section: str):
    for name in ("photo", "tall", "large", "a line"):
        data = LOSSLESS[name]()
        wanted = judge.pixel_values(data, SECTIONS[section], None)
        np.testing.assert_array_equal(pixels(data, section), wanted, name)


@pytest.mark.parametrize("name", [*LOSSLESS, *LOSSY])
def test_the_header_tells_the_size_of_what_is_decoded(name: str):
    data = (LOSSLESS | LOSSY)[name]()
    tiles = decode_picture(data, TINY_SMOLVLM)
    assert picture_size(data) == (tiles.width, tiles.height)
    assert tiles.layout == plan_layout(*picture_size(data), TINY_SMOLVLM, None)
    assert tiles.pixels.shape == (tiles.layout.tiles, 32, 32, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP"])
def test_a_picture_is_turned_as_it_is_shown(name: str, orientation: int):
    """A black corner at the left on top, as a camera that was turned wrote it."""
    shown = np.full((60, 90, 3), 255, np.uint8)
    shown[:20, :30] = 0
    # By the Exif standard, from which side the file's rows and columns begin; from 5 on its rows
    # are columns of what is shown.
    begins = ((1, 1), (1, -1), (-1, -1), (-1, 1), (1, 1), (-1, 1), (-1, -1), (1, -1))
    rows, cols = begins[orientation - 1]
    stored = (shown.swapaxes(0, 1) if orientation > 4 else shown)[::rows, ::cols]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(np.ascontiguousarray(stored)), name, exif=exif.tobytes())
    tiles = decode_picture(data, TINY_INTERNVL, tiles=0)
    assert (tiles.width, tiles.height) == picture_size(data) == (90, 60)
    whole = tiles.pixels[-1].astype(int)
    assert whole[:6, :6].max() < 40
    assert min(whole[-6:, :6].min(), whole[-6:, -6:].min(), whole[:6, -6:].min()) > 215


@pytest.mark.parametrize(("name", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_exif_that_cannot_be_read_does_not_refuse_a_picture(name: str, options: Any):
    """Pillow raises a SyntaxError for these."""
    wanted = pixels(encode(picture(60, 40)))
    for exif in (b"II", b"\xff" * 80):
        data = encode(picture(60, 40), name, exif=exif, **options)
        np.testing.assert_array_equal(pixels(data), wanted)
        assert picture_size(data) == (60, 40)


def test_an_orientation_that_does_not_exist_turns_nothing():
    data = turned("JPEG", 9)  # there are eight
    assert picture_size(data) == (93, 41)


def test_16_bits_of_grey_become_8_and_are_not_cut_off():
    """Pillow's own conversion makes them white, as nearly all values are above 255."""
    data, values = grey16(60, 40)
    grey = np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=-1)
    np.testing.assert_array_equal(pixels(data), pixels(grey))
    image = Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(pixels(image), pixels(grey))


def test_transparent_pixels_are_white():
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    assert (decode_picture(encode(clear), TINY_SMOLVLM).pixels == 255).all()


@pytest.mark.parametrize("section", [SMOLVLM, TINY_SMOLVLM, INTERNVL])
def test_arrays_paths_and_pil_images_are_resized_as_bytes_are(section: Any, tmp_path: Path):
    image = picture(200, 150)
    wanted = decode_picture(encode(image), section, tiles=2)
    path = tmp_path / "a picture"
    path.write_bytes(encode(image))
    wide = np.zeros((150, 400, 3), np.uint8)
    wide[:, ::2] = drawn(200, 150)
    encoded = bytearray(encode(image))
    for value in (image, np.asarray(image), wide[:, ::2], path, str(path), encoded):
        found = decode_picture(as_picture(value), section, tiles=2)
        np.testing.assert_array_equal(found.pixels, wanted.pixels)
        assert (found.layout, found.width, found.height) == (wanted.layout, 200, 150)


def test_a_pil_image_is_turned_and_put_on_white_as_its_file_is():
    for data in (turned("JPEG", 6), encode(with_alpha(60, 40, "RGBA")), LOSSLESS["clear gif"]()):
        np.testing.assert_array_equal(pixels(Image.open(io.BytesIO(data))), pixels(data))


def test_a_slice_of_the_tiles_is_normalised_alone():
    tiles = decode_picture(encode(picture(200, 150)), TINY_SMOLVLM)
    whole = tiles.normalised()
    assert whole.shape == (13, 3, 32, 32)
    for index in range(len(whole)):
        one = tiles.normalised(slice(index, index + 1))
        np.testing.assert_array_equal(one, whole[index : index + 1])


def test_the_hash_tells_pictures_apart():
    array = drawn(6, 4)
    hashes = {
        as_picture(value).sha256
        for value in (array, array.reshape(6, 4, 3), array + 1, encode(picture(6, 4)))
    }
    assert len(hashes) == 4
    assert as_picture(array).sha256 == as_picture(array.copy()).sha256
