"""Keeps the cache rows of prompt beginnings on disk, by name: system prompts, documents.

A file holds rows from `Backend.read_slot`, what they belong to and a hash of each part; rows of an
8-bit cache stay in 8 bits. It is used only for the same bundle, engine, float type, scales of an
8-bit cache and tokens. A file that is damaged, truncated or from elsewhere is ignored with one
line in the log, and the prompt is computed as usual.

The layout of a file: `_MAGIC`, the header's length (8 bytes, little-endian), the header (JSON), its
SHA-256 (32 bytes), the rows in C order.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge.backends import Backend
from edge.bundle.kv_scales import Scales, pack_rows, scales_sha256, unpack_rows
from edge.bundle.manifest import Manifest
from edge.bundle.update import fsync, replace_durably, sweep_temp, temp_path
from edge.errors import ConfigError, ResourceError
from edge.files import MALFORMED, open_file
from edge.model.cache import ElementType, Rows
from edge.model.slot_rows import SlotRows

from .scheduler import StoredPrefix

_log = logging.getLogger(__name__)

_MAGIC = b"edge-llm prefix 2\n"
_DIGEST_BYTES = 32
_MAX_HEADER_BYTES = 1 << 22
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
DEFAULT_MAX_BYTES = 4 << 30


class Layout(msgspec.Struct, frozen=True):
    """Origin and shape of stored rows: rows of another engine or type cannot be used.

    Attributes:
        engine: the backend's name.
        tensors: the cache tensors as they are stored, by name in graph order; empty in what an
            older edge-llm wrote.
        rounds_activations: whether the backend rounds activations, as in `Backend`.
        scales_sha256: SHA-256 of the scales of tensors in INT8; empty if there are none.
    """

    engine: str
    tensors: Annotated[dict[str, Rows], msgspec.Meta(max_length=1 << 16)] = {}
    rounds_activations: bool = False
    scales_sha256: str = ""

    @classmethod
    def of(cls, backend: Backend) -> Layout:
        """Read the layout of a backend's rows; nothing else may use the backend meanwhile."""
        return cls.of_rows(backend, backend.read_slot(0, 1))

    @classmethod
    def of_rows(cls, backend: Backend, rows: SlotRows) -> Layout:
        """Return the layout of rows that a backend returned."""
        tensors = {}
        for name, array in rows.items():
            stored: ElementType = "fp16" if array.dtype == np.float16 else "fp32"
            kind: ElementType = "int8" if name in backend.kv_scales else stored
            tensors[name] = Rows(array.shape[0], array.shape[2], kind)
        return cls("", tensors).on(backend)

    def on(self, backend: Backend) -> Layout:
        """Return the layout of the same tensors on a backend."""
        digest = scales_sha256(backend.kv_scales)
        return Layout(backend.name, self.tensors, backend.rounds_activations, digest)

    def __str__(self) -> str:
        kinds = Counter(rows.type for rows in self.tensors.values())
        text = f"{self.engine} in {' and '.join(sorted(kinds)) or 'rows of an older edge-llm'}"
        if self.rounds_activations:
            text += " with int8 activations"
        if self.scales_sha256:
            text += f", {kinds['int8']} of {len(self.tensors)} cache tensors in int8"
            text += f" (scales {self.scales_sha256[:8]})"
        return text

    def num_bytes(self, length: int) -> int:
        """Return the bytes of ``length`` rows in a file."""
        return length * sum(rows.row_bytes for rows in self.tensors.values())


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    bundle: str
    layout: Layout
    ids: list[int]
    rows_sha256: str


@dataclass(frozen=True)
class PrefixInfo:
    """One file of the store.

    Attributes:
        name: the prefix's name.
        num_tokens: tokens that it covers; 0 if it cannot be read.
        num_bytes: size of the file.
        problem: why the file is not used; None if it is used.
    """

    name: str
    num_tokens: int
    num_bytes: int
    problem: str | None = None


class PrefixStore:
    """The stored prefixes of one bundle, as an `edge.runtime.scheduler.PrefixSource`.

    Args:
        directory: directory of all bundles' prefixes; made when the first is saved.
        manifest: the bundle's manifest.
        layout: layout of the backend's rows; None only lists the files.
        max_bytes: most bytes that this bundle's prefixes may take together.
        scales: scales of the backend (`Backend.kv_scales`), whose hash is in ``layout``.
    """

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        layout: Layout | None = None,
        max_bytes: int = DEFAULT_MAX_BYTES,
        scales: Scales | None = None,
    ) -> None:
        self._scales: Scales = scales or {}
        if layout is not None:
            assert layout.scales_sha256 == scales_sha256(self._scales), "scales are the layout's"
        self._bundle = bundle_key(manifest)
        self.directory = directory / self._bundle[:16]
        self._layout = layout
        self._max_bytes = max_bytes
        self._entries: dict[str, tuple[list[int], Path]] = {}
        for path in self._files() if layout is not None else ():
            try:
                header, _ = self._read(path)
            except (OSError, _UnusableError) as error:
                _log.warning("stored prefix %s is ignored: %s", path, error)
            else:
                self._entries[path.stem] = header.ids, path

    def lookup(self, ids: Sequence[int]) -> StoredPrefix | None:
        """Find the longest stored prefix that ``ids`` begin with.

        The engine's owner made the prefixes, so every salt may use them: the time of an answer
        tells a tenant only whether its own prompt begins with one of them.
        """
        best: tuple[list[int], Path] | None = None
        for stored, path in self._entries.values():
            length = len(stored)
            if (best is None or length > len(best[0])) and list(ids[:length]) == stored:
                best = stored, path
        if best is None:
            return None
        stored, path = best
        return StoredPrefix(len(stored), lambda: self._load(path, stored))

    def save(self, name: str, ids: Sequence[int], rows: SlotRows) -> Path:
        """Write a prefix; an old one of this name stays until the new one is whole on disk.

        Args:
            name: 1 to 64 letters, digits, ``-`` and ``_``.
            ids: the prefix's tokens.
            rows: the cache rows of these tokens, from `Backend.read_slot`.

        Raises:
            ConfigError: the name has other characters, or another process writes the same prefix.
            ResourceError: the disk is full, or the store would exceed ``max_bytes``.
        """
        _check_name(name)
        layout = self._layout
        assert layout is not None, "a store without a layout only lists and drops"
        assert rows.length == len(ids), "rows are those of the ids"
        assert rows.keys() == layout.tensors.keys(), "rows are the backend's"
        data = pack_rows(rows, self._scales)
        digest = hashlib.sha256(data.data).hexdigest()
        header = msgspec.json.encode(_Header(self._bundle, layout, list(ids), digest))
        head = _MAGIC + len(header).to_bytes(8, "little") + header + hashlib.sha256(header).digest()
        path = self.directory / f"{name}.kv"
        others = sum(other.stat().st_size for other in self._files() if other != path)
        if others + len(head) + data.nbytes > self._max_bytes:
            raise ResourceError(
                f"the prefix {name!r} takes {data.nbytes >> 20} MiB and the others of this bundle "
                f"{others >> 20} MiB, more than the {self._max_bytes >> 20} MiB allowed; "
                "drop one with: edge-llm cache drop"
            )

        def write(file: BinaryIO) -> None:
            file.write(head)
            file.write(data.data)

        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            for temp in self.directory.glob(".*.kv.tmp"):
                if temp != temp_path(path):
                    sweep_temp(temp)
            # Only the owner may read it, since its content was computed from a prompt.
            replace_durably(path, write, mode=0o600)
        except OSError as error:
            raise ResourceError(
                f"cannot write {path}: {error.strerror}; free disk space, or name another directory"
            ) from error
        self._entries[name] = list(ids), path
        return path

    def list(self) -> list[PrefixInfo]:
        """List every file of this bundle, including those that are not used."""
        found = []
        for path in self._files():
            size = path.stat().st_size
            try:
                header, start = self._read(path)
                self._read_bytes(path, header, start)
            except (OSError, _UnusableError) as error:
                found.append(PrefixInfo(path.stem, 0, size, str(error)))
            else:
                found.append(PrefixInfo(path.stem, len(header.ids), size))
        return found

    def drop(self, name: str) -> bool:
        """Remove a prefix, whatever its state; false if there is none."""
        _check_name(name)
        self._entries.pop(name, None)
        path = self.directory / f"{name}.kv"
        sweep_temp(temp_path(path))
        if not path.exists():
            return False
        path.unlink()
        fsync(self.directory)
        return True

    def _files(self) -> Sequence[Path]:
        return sorted(self.directory.glob("*.kv"))

    def _load(self, path: Path, ids: Sequence[int]) -> SlotRows | None:
        """Return the rows of a file, which may have changed since it was found."""
        try:
            header, start = self._read(path)
            if header.ids != ids:
                raise _UnusableError("it was replaced; restart to use the new one")
            data = self._read_bytes(path, header, start)
            return unpack_rows(data, header.layout.tensors, len(header.ids), self._scales)
        except (OSError, _UnusableError) as error:
            _log.warning("stored prefix %s is ignored from now on: %s", path, error)
            self._entries.pop(path.stem, None)
            return None

    def _read(self, path: Path) -> tuple[_Header, int]:
        """Return the checked header, and the offset of the rows."""
        with open_file(path) as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise _UnusableError("it is no prefix file of this version")
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= _MAX_HEADER_BYTES:
                raise _UnusableError("it is damaged (its header's length)")
            data, digest = file.read(length), file.read(_DIGEST_BYTES)
            start = file.tell()
            size = os.fstat(file.fileno()).st_size
        if hashlib.sha256(data).digest() != digest:
            raise _UnusableError("it is damaged (its header)")
        try:
            header = msgspec.json.decode(data, type=_Header)
        except MALFORMED as error:
            raise _UnusableError(f"it is of another version ({error})") from error
        if header.bundle != self._bundle:
            raise _UnusableError("it belongs to another bundle; build it again")
        if self._layout is not None and header.layout != self._layout:
            raise _UnusableError(
                f"it was made by {header.layout}, this is {self._layout}; build it again"
            )
        expected = start + header.layout.num_bytes(len(header.ids))
        if not header.ids or size != expected:
            raise _UnusableError(f"it has {size} bytes, its header describes {expected}")
        return header, start

    def _read_bytes(self, path: Path, header: _Header, start: int) -> NDArray[np.uint8]:
        data = np.fromfile(path, dtype=np.uint8, offset=start)
        if hashlib.sha256(data.data).hexdigest() != header.rows_sha256:
            raise _UnusableError("it is damaged (its rows)")
        return data


class _UnusableError(Exception):
    """The file cannot be used; this error never leaves the module."""


def bundle_key(manifest: Manifest) -> str:
    """Compute the SHA-256 of the dialect and all files' hashes, on which a prompt's rows depend.

    The manifest's own hash would not work: a quality report changes it.
    """
    parts = [manifest.dialect, *(f"{n} {f.sha256}" for n, f in sorted(manifest.files.items()))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _check_name(name: str) -> None:
    if not _NAME.match(name):
        raise ConfigError(
            f"{name!r:.80} cannot be a prefix's name; use 1 to 64 letters, digits, '-' and '_'"
        )
