"""Checks files of a bundle against the hashes of its manifest before any parser sees them."""

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

_NICENESS = 5  # even on a busy machine this thread ends while the engine is opened


class VerifiedFiles:
    """Files of a bundle, opened once, hashed in parallel, and read by the same descriptors.

    Everything that `read` or a `descriptor` returns is from the file that was hashed, whatever is
    put at its path meanwhile. Call `check_unchanged` after a library has opened files by their
    paths. Use it as a context manager.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        names: Iterable[str] | None = None,
        later: Collection[str] = (),
    ) -> None:
        """Open and hash as `verify_files` does; only `finish` waits for the hashes of ``later``."""
        self._bundle = bundle
        self._manifest = manifest
        self._files: dict[str, tuple[int, os.stat_result]] = {}
        self._hashes: dict[str, Future[FileInfo]] = {}
        # The engine is opened meanwhile and goes first: it gets one core to itself, and on Linux a
        # thread has its own niceness (nice(2)).
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
            IntegrityError: a file does not match, as in `verify_files`.
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
        """Return a descriptor of a file that was hashed; it is closed with this object.

        Raises:
            IntegrityError: a file of ``later`` does not match, as in `verify_files`.
        """
        self._wait([name])
        return self._files[name][0]

    def check_unchanged(self) -> None:
        """`finish`; then check that the paths still lead to these files, and nobody wrote to them.

        Every change of a file changes its ctime. If nothing else differs, the file is hashed again:
        a hard link of a backup, or other permissions, left its bytes unchanged. A file that was
        swapped and put back would pass then, but its directory was written to.

        Raises:
            IntegrityError: a file was replaced or changed; the message names it.
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
        self._pool.shutdown(cancel_futures=True)  # a closed descriptor's number may be used again
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
            # Opening a pipe would block.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            found = os.fstat(descriptor)
            self._files[name] = descriptor, found
            if not stat.S_ISREG(found.st_mode):
                raise IntegrityError(f"{path} is no plain file; copy or export the bundle again")
            # The size comes first: it is free, and a truncated copy is the most common fault.
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
    """Refuse a file that is to be read but is not listed in the manifest.

    Raises:
        IntegrityError: it is not listed, so nothing vouches for it.
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
        IntegrityError: a file is missing, is not a plain file, has another size or hash, or is not
            listed in the manifest; the message names the file.
    """
    VerifiedFiles(bundle, manifest, names).close()


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def sha256_descriptor(descriptor: int) -> FileInfo:
    """Hash an open file from its start, in chunks; memory stays constant."""
    return _sha256(read_chunks(descriptor))


def _sha256(chunks: Iterable[bytes]) -> FileInfo:
    digest, num_bytes = hashlib.sha256(), 0
    for chunk in chunks:
        digest.update(chunk)
        num_bytes += len(chunk)
    return FileInfo(num_bytes=num_bytes, sha256=digest.hexdigest())
