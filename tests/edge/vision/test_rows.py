"""Rows of pictures: whose ids they have, when they are computed, and how long they are kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.bundle.embeddings import EMBEDDINGS_NAME, PICTURE_IDS, EmbeddingTable
from edge.bundle.manifest import read_manifest
from edge.errors import BackendError, OverloadError, RequestError
from edge.vision import rows as vision_rows
from edge.vision.decode import Tiles
from edge.vision.layout import Layout
from edge.vision.rows import PictureRows, PictureTable
from edge.vision.section import VisionSection, read_vision

ROWS = 4


class CountingEncoder:
    """Makes rows of a tile's mean, and counts the tiles."""

    def __init__(self, hidden: int) -> None:
        self.hidden, self.seen, self.closed = hidden, 0, False
        self.factor = 1.0

    def encode(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        self.seen += 1
        rows = np.arange(ROWS, dtype=np.float32)[:, None] + np.zeros(self.hidden, np.float32)
        found: NDArray[np.float32] = (rows + pixels.mean()) * np.float32(self.factor)
        return found

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def section(vision_bundle: Path) -> VisionSection:
    found = read_vision(read_manifest(vision_bundle))
    assert found is not None
    return found


@pytest.fixture
def plain(vision_bundle: Path) -> Iterator[EmbeddingTable]:
    table = EmbeddingTable(vision_bundle / EMBEDDINGS_NAME)
    yield table
    table.close()


@pytest.fixture
def encoder(plain: EmbeddingTable) -> CountingEncoder:
    return CountingEncoder(plain.hidden_size)


@pytest.fixture
def table(vision_bundle: Path, encoder: CountingEncoder) -> Iterator[PictureTable]:
    table = PictureTable(vision_bundle / EMBEDDINGS_NAME, None, encoder, ROWS)
    yield table
    table.close()


def make_tiles(
    section: VisionSection, value: int, count: int = 3, edge: int | None = None
) -> Tiles:
    edge = edge or section.tile_px
    pixels = np.full((count, edge, edge, 3), value, np.uint8)
    pixels += np.arange(count, dtype=np.uint8)[:, None, None, None]
    layout = Layout((), 1, count - 1, whole_of_steps=True)
    return Tiles(pixels, layout, edge, edge, section)


def add(table: PictureTable, section: VisionSection, value: int, count: int = 3) -> PictureRows:
    return table.add(hashlib.sha256(bytes([value])).hexdigest(), make_tiles(section, value, count))


def row_of(tiles: Tiles, tile: int, row: int) -> float:
    return float(np.float16(row + tiles.normalised(slice(tile, tile + 1)).mean()))


def test_rows_stand_among_those_of_tokens(
    table: PictureTable, plain: EmbeddingTable, section: VisionSection
) -> None:
    first, second = add(table, section, 10), add(table, section, 90)
    ids = np.array([[5, first.ids[0], first.ids[11]], [second.ids[5], 7, first.ids[4]]], np.int64)
    found = table[ids]
    assert found.dtype == np.float16
    assert np.array_equal(found[0, 0], plain[np.array([5])][0])
    assert np.array_equal(found[1, 1], plain[np.array([7])][0])
    ten, ninety = make_tiles(section, 10), make_tiles(section, 90)
    wanted = {(0, 1): (ten, 0, 0), (0, 2): (ten, 2, 3), (1, 0): (ninety, 1, 1), (1, 2): (ten, 1, 0)}
    for place, (tiles, tile, row) in wanted.items():
        assert np.allclose(found[place], row_of(tiles, tile, row), atol=2e-3), place
    assert np.array_equal(table[np.array([3, 4])], plain[np.array([3, 4])])


def test_each_tile_is_encoded_once_and_only_where_its_rows_are_needed(
    table: PictureTable, encoder: CountingEncoder, section: VisionSection
) -> None:
    picture = add(table, section, 10)
    assert picture.pixel_bytes == 3 * 3 * section.tile_px**2
    needed = [1, 2, *picture.ids[ROWS:], 3]  # all but the first tile
    assert table.prepare(needed)
    assert encoder.seen == 1
    assert table.prepare(needed)
    assert not table.prepare(needed)
    assert encoder.seen == table.encoded_tiles == 2
    assert picture.is_ready.tolist() == [False, True, True]
    assert picture.pixel_bytes, "the first tile's pixels are still needed"
    assert table.prepare(picture.ids)
    assert not table.prepare(picture.ids)
    assert picture.pixel_bytes == 0
    assert not table.prepare([1, 2, 3])
    assert encoder.seen == 3


def test_a_digest_is_one_picture_and_no_other(table: PictureTable, section: VisionSection) -> None:
    with ThreadPoolExecutor(8) as pool:
        same = list(pool.map(lambda _: add(table, section, 10), range(16)))
    assert all(picture is same[0] for picture in same)
    other = add(table, section, 11)
    assert not set(same[0].ids) & set(other.ids)
    assert min(same[0].ids) >= PICTURE_IDS
    assert max(*same[0].ids, *other.ids) < 2**63
    assert table.find(same[0].digest) is same[0]
    assert table.find("another") is None


def test_the_oldest_is_forgotten_unless_a_prompt_holds_it(
    table: PictureTable, section: VisionSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make_tiles(section, 0).pixels.nbytes + 3 * ROWS * 2 * table.hidden_size
    monkeypatch.setattr(vision_rows, "KEPT_BYTES", 2 * one)
    held, digests, ids = add(table, section, 0), [], []
    for value in range(1, 5):
        picture = add(table, section, value)
        digests.append(picture.digest)
        ids.append(picture.ids)
        del picture
    assert [table.find(digest) is not None for digest in digests] == [False, False, True, True]
    assert table.find(held.digest) is held
    table.check(np.array(held.ids))
    with pytest.raises(RequestError, match="not here any more"):
        table.check(np.array(ids[0]))
    with pytest.raises(RequestError, match="not here any more"):
        table.prepare(ids[0])


def test_a_picture_that_was_used_again_is_not_the_oldest(
    table: PictureTable, section: VisionSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make_tiles(section, 0).pixels.nbytes + 3 * ROWS * 2 * table.hidden_size
    monkeypatch.setattr(vision_rows, "KEPT_BYTES", 2 * one)
    digests = [add(table, section, value).digest for value in (1, 2)]
    assert table.find(digests[0]) is not None
    add(table, section, 3)
    assert [table.find(digest) is not None for digest in digests] == [True, False]


def test_a_forgotten_picture_gets_new_ids(table: PictureTable, section: VisionSection) -> None:
    first = add(table, section, 1)
    table.forget()
    again = add(table, section, 1)
    assert not set(first.ids) & set(again.ids)
    assert table[np.array(first.ids[:2])].tolist() == table[np.array(again.ids[:2])].tolist()


def test_pixels_that_wait_are_bounded(
    table: PictureTable, section: VisionSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = make_tiles(section, 0).pixels.nbytes
    monkeypatch.setattr(vision_rows, "MOST_PIXEL_BYTES", 2 * size)
    held = [add(table, section, value) for value in (1, 2)]
    with pytest.raises(OverloadError, match="wait for the encoder"):
        add(table, section, 3)
    while table.prepare(held[0].ids):
        pass
    add(table, section, 3)


def test_pixels_wait_even_where_no_room_keeps_their_picture(
    table: PictureTable, section: VisionSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Far fewer bytes are kept for later prompts than may wait, so most that wait are not kept."""
    size = make_tiles(section, 0).pixels.nbytes
    monkeypatch.setattr(vision_rows, "MOST_PIXEL_BYTES", 3 * size)
    monkeypatch.setattr(vision_rows, "KEPT_BYTES", size)
    held = [add(table, section, value) for value in (1, 2, 3)]
    with pytest.raises(OverloadError, match="wait for the encoder"):
        add(table, section, 4)
    table.forget()  # by which no request lets go of its picture
    with pytest.raises(OverloadError, match="wait for the encoder"):
        add(table, section, 4)
    del held[0]  # its request has ended
    held.append(add(table, section, 4))
    with pytest.raises(OverloadError, match="wait for the encoder"):
        add(table, section, 5)


def test_ids_that_are_nobodys_are_refused(table: PictureTable, section: VisionSection) -> None:
    picture, other = add(table, section, 1), add(table, section, 2)
    table.check(np.array([1, *picture.ids]))
    table.check_held([1, 2], [])
    table.check_held([1, *picture.ids], [other, picture])
    with pytest.raises(RequestError, match="give its messages"):
        table.check_held([1, *picture.ids], [other])
    with pytest.raises(RequestError, match="is no row"):
        table.check(np.array([picture.ids[-1] + 1]))
    with pytest.raises(RequestError, match="outside 0"):
        table.check(np.array([table.vocab_size]))
    with pytest.raises(RequestError, match="not here"):
        table.check(np.array([1, 2**70]))


def test_rows_that_are_not_finite_in_fp16_are_refused(
    table: PictureTable, encoder: CountingEncoder, section: VisionSection
) -> None:
    picture = add(table, section, 1)
    encoder.factor = 1e6
    with pytest.raises(BackendError, match="not finite"):
        table.prepare(picture.ids)
    encoder.factor = 1.0
    assert table.prepare(picture.ids), "nothing of it was kept"


def test_closing_it_closes_the_encoder(table: PictureTable, encoder: CountingEncoder) -> None:
    table.close()
    table.close()
    assert encoder.closed
