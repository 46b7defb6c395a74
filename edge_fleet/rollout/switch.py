"""Moves the link that a service's settings name, as root, for a roll-out that may not.

``python -m edge_fleet.rollout.switch LINK STAGING RELOAD`` does the order in STAGING (`orders`) and
ends. It opens no model and reads nothing from the service. It points the link to its own copy of
the bundle, whose bytes were hashed while they were copied: the owner of STAGING may change files
there, keep them open or put links in their places, at any time.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from edge.bundle.engine_file import ENGINE_JSON, find_engines, read_engine_bytes
from edge.bundle.manifest import ENGINES_DIR, MANIFEST_NAME, FileInfo, decode_manifest, is_file_name
from edge.bundle.release import read_release
from edge.bundle.trust import SIGNATURE_NAME, check_manifest, trusted_keys_file
from edge.bundle.update import fsync, replace_durably
from edge.errors import BundleError, ConfigError, EdgeError, IntegrityError, ResourceError
from edge.files import MALFORMED
from edge_fleet.registry.release import check_release, release_at
from edge_make.atomic_swap import ORIGIN_NAME, check_free_space
from edge_make.engine_record import record_engine
from edge_make.target import beside, write_durably

from .journal import Journal, Place, reload_service, take_back, undo
from .orders import ANSWER_NAME, MAX_BYTES, ORDER_NAME, Answer, Order, read_answer

_MAX_ABOUT_BYTES = 1 << 26  # for each of manifest, signature and the registry's manifest
_MAX_ENGINE_FILES = 256
_CHUNK_BYTES = 1 << 22
_ID = re.compile(r"[0-9a-f]{32}")


def main(link: str, staging: str, reload: str) -> int:
    """Do the order in a staging directory; return an exit code."""
    place, folder = Place(Path(link)), StagedFolder.open(Path(staging))
    with folder:
        try:
            order = read_order(folder)
        except FileNotFoundError:
            return 0
        except EdgeError:
            folder.remove(ORDER_NAME)  # nobody waits for its answer
            raise
        if read_answer(place.link) == Answer(order.id, True):
            folder.remove(ORDER_NAME)
            return 0
        place.folder.mkdir(exist_ok=True)
        _answer(place, Answer(order.id))
        answer = Answer(order.id, True)
        try:
            with place.locked():
                _do(order, place, folder, reload)
        except EdgeError as error:
            answer.code, answer.said = error.exit_code, str(error)
        except FileNotFoundError as error:
            answer.code, answer.said = BundleError.exit_code, f"{error.filename} is missing"
        except OSError as error:
            answer.code = ResourceError.exit_code
            answer.said = f"{error.filename or place.link}: {error.strerror}"
        _answer(place, answer)
        folder.remove(ORDER_NAME)
    if answer.code:
        print(f"edge-llm: error: {answer.said}", file=sys.stderr)  # noqa: T201 - the unit's log
    return answer.code


def _answer(place: Place, answer: Answer) -> None:
    answer.said = answer.said[: MAX_BYTES // 8]
    data = msgspec.json.encode(answer)
    replace_durably(place.folder / ANSWER_NAME, lambda file: file.write(data), mode=0o644)


def _do(order: Order, place: Place, folder: StagedFolder, reload: str) -> None:
    journal = place.read()
    if order.do == "try":
        take_back(place, journal, reload, cut_off=False)
        _begin(order.bundle, place, journal, folder)
        if journal.old is not None:
            reload_service(reload)
    elif order.do == "keep":
        if journal.new != order.bundle or journal.step not in ("trial", "done"):
            raise ConfigError(f"{order.bundle} is not on trial, so it cannot be kept")
        kept = release_at(place.path(journal.new))
        journal.step, journal.release = "done", 0 if kept is None else kept.number
        place.write(journal)
        place.sweep({journal.new, journal.old})
    elif order.do == "undo":
        if not take_back(place, journal, reload, cut_off=False):
            undo(place, journal, reload)
    elif not take_back(place, journal, reload, cut_off=False):
        if place.current is not None:
            reload_service(reload)
    elif journal.new != place.current:
        shutil.rmtree(place.path(journal.new), ignore_errors=True)


def _begin(name: str, place: Place, journal: Journal, folder: StagedFolder) -> None:
    if re.fullmatch(re.escape(place.link.name) + r"-[0-9a-f]{12}", name) is None:
        raise ConfigError(f"{name!r:.80} is no name of a bundle that is rolled out here")
    current = place.current
    if name == current:
        raise ConfigError(f"{place.link} leads to {name} already")
    digest = adopt(folder, name, place)
    journal.digest, journal.new, journal.old = digest, name, current
    journal.step, journal.trials, journal.judged_new = "trial", 0, None
    place.write(journal)
    place.point(name)


# ------------------------------------------------------------------------------- taking over


def adopt(folder: StagedFolder, name: str, place: Place) -> str:
    """Copy a bundle of the staging directory beside the link, checked.

    Engines were built there, and only their form and place are checked.

    Returns:
        The digest under which the registry had it, which its name has to begin with.

    Raises:
        BundleError: it is no bundle, not signed although this machine demands it, expired, or an
            older release than the link had.
        IntegrityError: a file differs from the manifest, is no plain file, or does not belong to
            the staging directory's owner alone.
        ConfigError: `check_manifest` fails; or keys are trusted, and engines cannot be recorded.
        ResourceError: the disk has no room for it.
    """
    target = beside(place.link, "adopt")
    shutil.rmtree(target, ignore_errors=True)
    try:
        with folder.inside(name) as source:
            digest = _copy_bundle(source, name, target, place)
        shutil.rmtree(place.path(name), ignore_errors=True)  # from an earlier trial
        target.rename(place.path(name))
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    fsync(target.parent)
    _record_engines(place.path(name))
    return digest


def _record_engines(bundle: Path) -> None:
    """Record the engines built for this bundle: the server cannot read their builder's records."""
    try:
        for engine in find_engines(bundle):
            record_engine(engine / ENGINE_JSON, read_engine_bytes(engine))
    except ConfigError as error:
        if trusted_keys_file() is not None:
            raise
        print(f"edge-llm: warning: {error}", file=sys.stderr)  # noqa: T201 - the unit's log


def _copy_bundle(source: StagedFolder, name: str, target: Path, place: Place) -> str:
    about = {MANIFEST_NAME: source.read(MANIFEST_NAME), ORIGIN_NAME: source.read(ORIGIN_NAME)}
    with suppress(FileNotFoundError):  # the policy decides whether it may be missing
        about[SIGNATURE_NAME] = source.read(SIGNATURE_NAME)
    keys = trusted_keys_file()
    if keys is not None:
        check_manifest(about[MANIFEST_NAME], about.get(SIGNATURE_NAME), keys, name)
    manifest = decode_manifest(about[MANIFEST_NAME], f"{name}: {MANIFEST_NAME}")
    check_release(read_release(manifest), name, release_at(place.link), place.read().release)
    digest = hashlib.sha256(about[ORIGIN_NAME]).hexdigest()
    if not name.endswith(f"-{digest[:12]}"):
        raise IntegrityError(f"{name} is {digest[:12]} by its {ORIGIN_NAME}; pull it again")
    check_free_space(target.parent, sum(each.num_bytes for each in manifest.files.values()))
    target.mkdir(mode=0o755)
    for file, expected in manifest.files.items():
        found = source.copy(file, target, expected.num_bytes)
        if found != expected:
            raise IntegrityError(
                f"{name}/{file} has {found.num_bytes} bytes with SHA-256 {found.sha256[:16]}…, "
                f"the manifest says {expected.num_bytes} with {expected.sha256[:16]}…"
            )
    _copy_engines(source, target)
    for file, text in about.items():
        write_durably(target / file, text)
    fsync(target)
    return f"sha256:{digest}"


def _copy_engines(source: StagedFolder, target: Path) -> None:
    try:
        engines = source.inside(ENGINES_DIR)
    except FileNotFoundError:
        return
    count = 0
    with engines:
        (target / ENGINES_DIR).mkdir(mode=0o755)
        for engine in engines.names():
            to = target / ENGINES_DIR / engine
            to.mkdir(mode=0o755)
            with engines.inside(engine) as each:
                for file in each.names():
                    count += 1
                    if count > _MAX_ENGINE_FILES:
                        raise BundleError(f"{ENGINES_DIR} has more than {_MAX_ENGINE_FILES} files")
                    each.copy(file, to, None)
            fsync(to)
        fsync(target / ENGINES_DIR)


class StagedFolder:
    """A directory that another user may write to, read without following links in it.

    Attributes:
        descriptor: file descriptor of the directory.
        owner: id of the only user whose files are taken.
    """

    def __init__(self, descriptor: int, owner: int, name: str) -> None:
        self.descriptor = descriptor
        self.owner = owner
        self._name = name

    @classmethod
    def open(cls, path: Path) -> StagedFolder:
        """Open the staging directory itself; its owner is the one who gives orders.

        Raises:
            ConfigError: it is not a directory.
        """
        try:
            descriptor = os.open(path, _DIRECTORY)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; it is made by the roll-out") from error
        return cls(descriptor, os.fstat(descriptor).st_uid, str(path))

    def __enter__(self) -> StagedFolder:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self.descriptor)

    def inside(self, name: str) -> StagedFolder:
        """Open a directory in it.

        Raises:
            FileNotFoundError: it is missing.
            IntegrityError: it is not a directory, or another user's.
        """
        descriptor = self._open(name, _DIRECTORY)
        return StagedFolder(descriptor, self.owner, f"{self._name}/{name}")

    def names(self) -> list[str]:
        """List its files, without a build's temporary ones, whose names begin with a dot."""
        return sorted(filter(is_file_name, os.listdir(self.descriptor)))  # noqa: PTH208 - no path

    def read(self, name: str, max_bytes: int = _MAX_ABOUT_BYTES) -> bytes:
        """Read a small file; raise what `inside` does, or `IntegrityError` if it is larger."""
        with self._file(name) as descriptor:
            data = b"".join(_chunks(descriptor, max_bytes + 1))
        if len(data) > max_bytes:
            raise IntegrityError(f"{self._name}/{name} is larger than {max_bytes} bytes")
        return data

    def copy(self, name: str, target: Path, max_bytes: int | None) -> FileInfo:
        """Copy a file into a directory of ours; return size and hash of the written bytes."""
        digest, count = hashlib.sha256(), 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with self._file(name) as descriptor:
            if max_bytes is None:
                max_bytes = os.fstat(descriptor).st_size
                check_free_space(target, max_bytes)
            with os.fdopen(os.open(target / name, flags, 0o644), "wb") as file:
                for chunk in _chunks(descriptor, max_bytes + 1):
                    file.write(chunk)
                    digest.update(chunk)
                    count += len(chunk)
                file.flush()
                os.fsync(file.fileno())
        return FileInfo(count, digest.hexdigest())

    def remove(self, name: str) -> None:
        """Remove a file."""
        os.unlink(name, dir_fd=self.descriptor)

    @contextmanager
    def _file(self, name: str) -> Iterator[int]:
        # Opening a pipe would block.
        descriptor = self._open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(descriptor)
            # It could be a second name for a file elsewhere that only root may read.
            if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
                raise IntegrityError(f"{self._name}/{name} is no plain file with one name")
            yield descriptor
        finally:
            os.close(descriptor)

    def _open(self, name: str, flags: int) -> int:
        try:
            descriptor = os.open(name, flags, dir_fd=self.descriptor)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise IntegrityError(f"{self._name}/{name}: {error.strerror}") from error
        if os.fstat(descriptor).st_uid != self.owner:
            os.close(descriptor)
            raise IntegrityError(f"{self._name}/{name} does not belong to user {self.owner}")
        return descriptor


_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def _chunks(descriptor: int, limit: int) -> Iterator[bytes]:
    """Read an open file from its present place to its end, or this many bytes."""
    while limit and (chunk := os.read(descriptor, min(limit, _CHUNK_BYTES))):
        limit -= len(chunk)
        yield chunk


def read_order(folder: StagedFolder) -> Order:
    """Read the order in a staging directory.

    Raises:
        FileNotFoundError: there is none.
        BundleError: it is no order, or not a plain file of its owner.
    """
    try:
        order = msgspec.json.decode(folder.read(ORDER_NAME, MAX_BYTES), type=Order)
    except MALFORMED as error:
        raise BundleError(f"{ORDER_NAME} is no order ({error}); it is removed") from error
    if _ID.fullmatch(order.id) is None:
        raise BundleError(f"{ORDER_NAME} has no proper id; it is removed")
    return order


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except EdgeError as error:
        print(f"edge-llm: error: {error}", file=sys.stderr)  # noqa: T201 - the unit's log
        sys.exit(error.exit_code)
