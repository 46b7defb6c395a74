"""Files of a bundle, held against the hashes of its manifest before any parser sees them."""

from __future__ import annotations

import hashlib
import itertools
import os
import stat
from collections.abc import Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from edge.errors import IntegrityError
from edge.files import read_chunks

from .manifest import MANIFEST_NAME, FileInfo, Manifest

_NICENESS = 5  # beside a busy machine's work this thread still ends while the engine is opened


class VerifiedFiles:
    """Files of a bundle, opened once, hashed side by side, and read by the same descriptors.

    What `read` returns, and what is read by a `descriptor`, is of the file that was hashed,
    whatever is put at its path meanwhile. After a library that opens files by their paths comes
    `check_unchanged`. Use it as a context manager.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        names: Iterable[str] | None = None,
        later: Collection[str] = (),
    ) -> None:
        """Open and hash; see `verify_files`. Only `finish` waits for the hashes of ``later``."""
        self._bundle = bundle
        self._manifest = manifest
        self._files: dict[str, tuple[int, os.stat_result]] = {}
        self._hashes: dict[str, Future[FileInfo]] = {}
        # The engine, which is opened meanwhile, goes first: of two cores one is its own, and
        # on Linux a thread has a niceness of its own (nice(2)).
        threads = max(len(os.sched_getaffinity(0)) - 1, 1)
        self._pool = ThreadPoolExecutor(threads, initializer=os.nice, initargs=(_NICENESS,))
        self._closed = False
        try:
            self._placed_ns = self._stat(bundle).st_mtime_ns
            for name in manifest.files if names is None else names:
                self._open(name)
            sizes = {name: found.st_size for name, (_, found) in self._files.items()}
            for name in sorted(sizes, key=lambda name: (name in later, -sizes[name])):
                self._hashes[name] = self._pool.submit(self._hash, name)
            self._wait(name for name in sizes if name not in later)
        except BaseException:
            self.close()
            raise

    def finish(self) -> None:
        """Wait for all hashes.

        Raises:
            IntegrityError: see `verify_files`.
        """
        self._wait(self._files)

    def read(self, name: str) -> bytes:
        """Read a whole file that was hashed.

        Raises:
            IntegrityError: it was changed since.
        """
        data = b"".join(read_chunks(self._files[name][0]))
        self._check_hash(name, FileInfo(len(data), hashlib.sha256(data).hexdigest()))
        return data

    def descriptor(self, name: str) -> int:
        """A descriptor of a file that was hashed; it ends with this object.

        Raises:
            IntegrityError: see `verify_files`, for one of ``later``.
        """
        self._wait([name])
        return self._files[name][0]

    def check_unchanged(self) -> None:
        """`finish`; then check that the paths still lead to these files, and nobody wrote to them.

        Whatever happens to a file changes its time of change (ctime). Where nothing else differs it
        is hashed again: a hard link that a backup made, or other rights, left its bytes as they
        were. One that was swapped and put back would pass then, but its directory was written to.

        Raises:
            IntegrityError: one is another, or was changed; it is named.
        """
        self.finish()
        for name, (descriptor, before) in self._files.items():
            path = self._bundle / name
            now, placed_ns = self._stat(path), self._stat(self._bundle).st_mtime_ns
            is_touched = now.st_ctime_ns != before.st_ctime_ns
            if is_touched and placed_ns == self._placed_ns:
                self._check_hash(name, sha256_descriptor(descriptor))
                is_touched = False
            if is_touched or _identity(now) != _identity(before):
                raise IntegrityError(
                    f"{path} was changed while the bundle was opened; open it again when nobody "
                    "writes to it"
                )

    def close(self) -> None:
        """Close the files, hashed or not; calling it twice is harmless."""
        self._closed = True
        self._pool.shutdown(cancel_futures=True)  # another file may get a descriptor's number
        while self._files:
            os.close(self._files.popitem()[1][0])

    def __enter__(self) -> VerifiedFiles:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _open(self, name: str) -> None:
        path = self._bundle / name
        check_listed(self._bundle, self._manifest, name)
        expected = self._manifest.files[name]
        try:
            # A pipe would be waited for.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            found = os.fstat(descriptor)
            self._files[name] = descriptor, found
            if not stat.S_ISREG(found.st_mode):
                raise IntegrityError(f"{path} is no plain file; copy or export the bundle again")
            # The size first: it is free, and a cut-off copy is the most common fault.
            if found.st_size != expected.num_bytes:
                raise IntegrityError(
                    f"{path} has {found.st_size} bytes, the manifest says {expected.num_bytes}; "
                    "copy or export the bundle again"
                )
        except OSError as error:
            raise self._cannot_read(path, error) from error

    def _hash(self, name: str) -> FileInfo:
        chunks = read_chunks(self._files[name][0])
        return _sha256(itertools.takewhile(lambda _: not self._closed, chunks))

    def _wait(self, names: Iterable[str]) -> None:
        for name in names:
            try:
                self._check_hash(name, self._hashes[name].result())
            except OSError as error:
                raise self._cannot_read(self._bundle / name, error) from error

    def _check_hash(self, name: str, found: FileInfo) -> None:
        expected = self._manifest.files[name]
        if found != expected:
            raise IntegrityError(
                f"{self._bundle / name} is damaged: its SHA-256 is {found.sha256[:16]}…, the "
                f"manifest says {expected.sha256[:16]}…; copy or export the bundle again"
            )

    def _stat(self, path: Path) -> os.stat_result:
        try:
            return path.stat()
        except OSError as error:
            raise self._cannot_read(path, error) from error

    @staticmethod
    def _cannot_read(path: Path, error: OSError) -> IntegrityError:
        return IntegrityError(
            f"{path} cannot be read ({error.strerror}); copy or export the bundle again"
        )


def check_listed(bundle: Path, manifest: Manifest, name: str) -> None:
    """Refuse a file that is to be read, and that the manifest does not list.

    Raises:
        IntegrityError: nothing vouches for it.
    """
    if name not in manifest.files:
        raise IntegrityError(
            f"{bundle / name} is not listed in {MANIFEST_NAME}, so nothing vouches for it; "
            "export the bundle again"
        )


def verify_files(bundle: Path, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Hash files of a bundle against its manifest, before any parser sees them.

    Args:
        bundle: the bundle's directory.
        manifest: its manifest.
        names: files to check; all by default.

    Raises:
        IntegrityError: a file is missing, no plain file, has another size or another hash, or the
            manifest does not list it; the file is named.
    """
    VerifiedFiles(bundle, manifest, names).close()


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def sha256_file(path: Path) -> FileInfo:
    """Hash a file in chunks; memory stays constant."""
    with path.open("rb") as file:
        return sha256_descriptor(file.fileno())


def sha256_descriptor(descriptor: int) -> FileInfo:
    """Hash an open file from its start, as `sha256_file`."""
    return _sha256(read_chunks(descriptor))


def _sha256(chunks: Iterable[bytes]) -> FileInfo:
    digest, num_bytes = hashlib.sha256(), 0
    for chunk in chunks:
        digest.update(chunk)
        num_bytes += len(chunk)
    return FileInfo(num_bytes=num_bytes, sha256=digest.hexdigest())
