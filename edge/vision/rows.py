"""Gives the rows of pictures their own token ids, and keeps them while a prompt uses them.

A picture in a prompt is a run of ids above every vocabulary. So everything that compares token ids,
such as the prefix cache and the queue, also tells pictures apart. The encoder runs when the
scheduler asks for it (`PictureTable.prepare`), one tile at a time, and only for rows that no cache
has.
"""

from __future__ import annotations

import itertools
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from edge.bundle.embeddings import PICTURE_IDS, EmbeddingTable
from edge.errors import BackendError, OverloadError, RequestError

if TYPE_CHECKING:
    from .decode import Tiles

KEPT_BYTES = 64 << 20
"""Limits the rows and pixels of pictures that are kept for later prompts."""
MOST_PIXEL_BYTES = 256 << 20
"""Limits the pixels of all pictures that wait for the encoder."""
_ROW_BITS = 16
# Starts at a random number, so that ids of another process, e.g. in a stored answer, match nothing.
_numbers = itertools.count(secrets.randbits(40))


class TileEncoder(Protocol):
    """Turns the pixels of a tile into rows of ``inputs_embeds``; runs in the engine's thread."""

    def encode(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Turn ``[3, height, width]`` into ``[rows, hidden]``.

        Raises:
            BackendError: the encoder failed.
        """

    def close(self) -> None:
        """Free it; calling it twice is harmless."""


class PictureRows:
    """A picture in an open bundle; its rows stay as long as somebody holds it.

    Args:
        digest: hash of everything that its rows depend on.
        tiles: its pixels.
        rows_per_tile: rows that each tile becomes.

    Attributes:
        number: number of this picture, unique in this process.
        layout: how it was cut into tiles.
        is_ready: for each tile, whether its rows have been computed, ``[tiles]``.
        rows: rows of all tiles, ``[tiles * rows_per_tile, hidden]``; empty before the first.
    """

    def __init__(
        self,
        digest: str,
        tiles: Tiles,
        rows_per_tile: int,
    ) -> None:
        self.number = next(_numbers)
        self.digest, self.layout = digest, tiles.layout
        self.num_rows, self._rows_per_tile = len(tiles.pixels) * rows_per_tile, rows_per_tile
        self.is_ready = np.zeros(len(tiles.pixels), np.bool_)
        self.rows = np.empty((0, 0), np.float16)
        self._tiles: Tiles | None = tiles

    @property
    def ids(self) -> range:
        """Return the token ids of its rows."""
        first = PICTURE_IDS + (self.number << _ROW_BITS)
        return range(first, first + self.num_rows)

    @property
    def pixel_bytes(self) -> int:
        """Return the bytes of its pixels, which are dropped after the last tile."""
        tiles = self._tiles
        return 0 if tiles is None else tiles.pixels.nbytes

    def encode_tile(self, rows: NDArray[np.int64], encoder: TileEncoder) -> bool:
        """Compute the first tile that ``rows`` need; returns whether there was one."""
        wanted = rows // self._rows_per_tile
        missing = wanted[~self.is_ready[wanted]]
        if self._tiles is None or not missing.size:
            return False
        tile = int(missing[0])
        found = encoder.encode(self._tiles.normalised(slice(tile, tile + 1))[0])
        with np.errstate(over="ignore"):
            found = found.astype(np.float16)
        if not np.isfinite(found).all():
            raise BackendError(
                "the vision encoder computed a row that is not finite in fp16; send another "
                "picture, and export the bundle again if others fail, too"
            )
        if not self.rows.size:
            self.rows = np.empty((self.num_rows, found.shape[1]), np.float16)
        self.rows[tile * self._rows_per_tile :][: self._rows_per_tile] = found
        self.is_ready[tile] = True
        if self.is_ready.all():
            self._tiles = None
        return True


class PictureTable(EmbeddingTable):
    """The token table, followed by the rows of pictures under the ids that they have here.

    Any thread may add pictures; only the engine's thread reads rows.

    Args:
        path: path of the token table, as `EmbeddingTable` takes it.
        descriptor: the table's open file descriptor.
        encoder: computes rows.
        rows_per_tile: rows per tile that the encoder returns.

    Attributes:
        encoded_tiles: tiles computed so far.
        encoding_s: time that they took, in seconds.
    """

    has_pictures = True

    def __init__(
        self, path: Path, descriptor: int | None, encoder: TileEncoder, rows_per_tile: int
    ) -> None:
        super().__init__(path, descriptor)
        self._encoder, self._rows_per_tile = encoder, rows_per_tile
        self.encoded_tiles, self.encoding_s = 0, 0.0
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, PictureRows] = OrderedDict()  # the newest last
        self._live: WeakValueDictionary[int, PictureRows] = WeakValueDictionary()
        self._by_digest: WeakValueDictionary[str, PictureRows] = WeakValueDictionary()

    def find(self, digest: str) -> PictureRows | None:
        """Return the picture with this digest if it is here."""
        with self._lock:
            found = self._by_digest.get(digest)
            if found is not None:
                self._keep(found)
            return found

    def add(self, digest: str, tiles: Tiles) -> PictureRows:
        """Keep a picture; if one with this digest is here already, that one is returned.

        Args:
            digest: hash of everything that its rows depend on.
            tiles: its pixels.

        Raises:
            OverloadError: too many pictures wait for the encoder.
        """
        with self._lock:
            found = self._by_digest.get(digest)
            if found is None:
                waiting = sum(picture.pixel_bytes for picture in self._live.values())
                if waiting + tiles.pixels.nbytes > MOST_PIXEL_BYTES:
                    raise OverloadError(
                        f"pictures of {waiting / 1e6:.0f} MB wait for the encoder and at most "
                        f"{MOST_PIXEL_BYTES / 1e6:.0f} MB may; try again later, or send fewer"
                    )
                found = PictureRows(digest, tiles, self._rows_per_tile)
                self._live[found.number] = self._by_digest[digest] = found
            self._keep(found)
            return found

    def forget(self) -> None:
        """Drop all pictures; a request that holds one can go on using it."""
        with self._lock:
            self._kept.clear()
            self._by_digest.clear()

    def _keep(self, picture: PictureRows) -> None:
        self._kept[picture.digest] = picture
        self._kept.move_to_end(picture.digest)
        row_bytes = 2 * self.hidden_size
        taken = sum(p.pixel_bytes + p.num_rows * row_bytes for p in self._kept.values())
        while taken > KEPT_BYTES and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            taken -= oldest.pixel_bytes + oldest.num_rows * row_bytes

    def check_held(self, ids: Sequence[int], pictures: Sequence[PictureRows]) -> None:
        """Refuse rows of pictures that a request does not hold: knowing ids gives no access.

        Raises:
            RequestError: an id is of a picture that the request does not hold.
        """
        held = {picture.number for picture in pictures}
        if not held.issuperset(_numbers_of(_rows_of(ids))):
            raise _gone()

    def prepare(self, ids: Sequence[int]) -> bool:
        """Compute the next tile that ``ids`` need; returns whether there was one.

        Raises:
            BackendError: the encoder failed.
            RequestError: a picture is not here.
        """
        rows, started = _rows_of(ids), time.perf_counter()
        for number in _numbers_of(rows):
            own = rows[rows >> _ROW_BITS == number] & ((1 << _ROW_BITS) - 1)
            if self._picture(number).encode_tile(own, self._encoder):
                self.encoded_tiles += 1
                self.encoding_s += time.perf_counter() - started
                return True
        return False

    def __getitem__(self, ids: NDArray[np.int64]) -> NDArray[np.float16]:
        """Read the rows of ``ids`` (any shape) to ``[*ids.shape, hidden]``.

        Raises:
            BackendError: the encoder failed.
        """
        flat = ids.reshape(-1)
        is_row = flat >= PICTURE_IDS
        if not is_row.any():
            return super().__getitem__(ids)
        while self.prepare(flat.tolist()):
            pass
        found = np.empty((flat.size, self.hidden_size), np.float16)
        found[~is_row] = super().__getitem__(flat[~is_row])
        rows = flat - PICTURE_IDS
        for number in np.unique(rows[is_row] >> _ROW_BITS).tolist():
            own = is_row & (rows >> _ROW_BITS == number)
            found[own] = self._picture(number).rows[rows[own] & ((1 << _ROW_BITS) - 1)]
        return found.reshape(*ids.shape, self.hidden_size)

    def check(self, ids: NDArray[np.int64]) -> None:
        """Refuse ids that have no row, as `EmbeddingTable` does."""
        super().check(ids[ids < PICTURE_IDS])
        for id_ in ids[ids >= PICTURE_IDS].tolist():
            number, row = divmod(id_ - PICTURE_IDS, 1 << _ROW_BITS)
            if row >= self._picture(number).num_rows:
                raise RequestError(f"token id {id_} is no row of a picture")

    def _picture(self, number: int) -> PictureRows:
        found = self._live.get(number)
        if found is None:
            raise _gone()
        return found

    def close(self) -> None:
        """Close the file and the encoder; calling it twice is harmless."""
        super().close()
        encoder = self.__dict__.get("_encoder")  # the constructor may have failed
        if encoder is not None:
            encoder.close()


def _gone() -> RequestError:
    return RequestError(
        "the prompt has ids of a picture that is not here any more; give its messages, not its ids"
    )


def _numbers_of(rows: NDArray[np.int64]) -> Iterable[int]:
    """Return the numbers of the pictures that ``rows`` belong to, in order."""
    return dict.fromkeys((rows >> _ROW_BITS).tolist())


def _rows_of(ids: Iterable[int]) -> NDArray[np.int64]:
    """Return those of ``ids`` that are rows of pictures, counted from 0."""
    found: NDArray[np.int64] = np.array([i for i in ids if i >= PICTURE_IDS], np.int64)
    return found - PICTURE_IDS
