"""Rolls out an adapter: fetches it, judges it against the one that serves, and puts it in place.

This is the roll-out of a bundle without build, reload and trial. ``BUNDLE.adapters/NAME`` is a link
to ``NAME@`` and the beginning of a digest, and moves in one step. A server looks there for each
answer, so it uses the new version at once, and a worse one must be refused before.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from edge.adapters.library import check_name, library
from edge.adapters.loaded import Adapters
from edge.bundle.manifest import read_manifest
from edge.bundle.update import fsync
from edge.engine_config import EngineConfig
from edge.errors import GateError, ResourceError
from edge_fleet.registry.adapter import fetch, look
from edge_fleet.registry.client import Registry
from edge_fleet.registry.reference import Reference
from edge_make.atomic_swap import exchange
from edge_make.progress import Progress, silent
from edge_make.target import beside, locked

from .journal import Place, undo
from .judge import Candidate, Gate, Judge, Measure, WorseError
from .steps import Outcome, has_room


def roll_out(
    reference: Reference,
    registry: Registry,
    bundle: Path,
    name: str,
    gate: Gate | None,
    engine: EngineConfig,
    *,
    retry: bool = False,
    progress: Progress = silent,
) -> Outcome:
    """Bring a bundle's adapter to what a reference means now; the one before it is kept.

    Args:
        reference: the adapter in the registry.
        registry: the registry of that reference.
        bundle: directory of the bundle, or a link to it that the server's settings name.
        name: the adapter's name.
        gate: how it is compared with the adapter that serves under this name, or the model alone if
            there is none, and with the first one that was accepted; None takes it unjudged.
        engine: options for opening the bundle to judge; its trusted keys count for both.
        retry: also try one that was rejected before.
        progress: called with the texts read and the questions asked.

    Raises:
        GateError: it is worse, or was rejected before; the old one still serves.
        CheckpointError: it is no adapter, or does not fit the bundle, or is not signed where it
            must be.
        ConfigError: the bundle takes no adapters, or the name cannot be one.
        ResourceError: it cannot be written, or memory does not hold what judges it.
        IntegrityError, RegistryError: the registry fails, as `Registry` says.
    """
    manifest, link = read_manifest(bundle), library(bundle) / check_name(name)
    digest, layers = look(reference, registry)
    with _held(link) as place:
        journal, new, old = place.read(), f"{name}@{digest[7:19]}", place.current
        path = place.path(new)
        if new == old and path.is_dir():
            return Outcome(digest, path, False)
        if gate is not None and digest in journal.rejected and not retry:
            reason = f"{journal.rejected[digest]}; --retry tries it again"
            raise _gate_error(reference, digest, reason, "was rejected before")
        if gate is not None and not has_room(manifest, engine):
            raise ResourceError(
                f"memory does not hold a second {bundle.name}, which judges the adapter; stop what "
                "uses it, or take the adapter as it is: edge-llm adapter pull"
            )
        is_kept = path.is_dir() and (journal.step, journal.old) == ("done", new)
        try:
            if not is_kept:
                shutil.rmtree(path, ignore_errors=True)  # of a run that was ended
                fetch(layers, registry, path)
            Adapters(bundle, manifest, trusted_keys=engine.trusted_keys).read(path, name)
            first = None
            if gate is not None:
                now = Candidate(bundle, engine, None, None if old is None else place.path(old))
                after = Candidate(bundle, engine, None, path)
                found = _judge(Judge(gate, progress), now, after, journal.first)
                first = journal.first or msgspec.to_builtins(found)
        except BaseException as error:
            if not is_kept:
                shutil.rmtree(path, ignore_errors=True)
            if not isinstance(error, WorseError):
                raise
            worse = msgspec.structs.replace(journal, digest=digest)
            worse.reject(str(error))  # while the one before what serves stays to go back to
            journal.rejected = worse.rejected
            place.write(journal)
            raise _gate_error(reference, digest, str(error), "is rejected") from error
        journal.digest, journal.new, journal.old, journal.first = digest, new, old, first
        journal.step = "done"
        journal.rejected.pop(digest, None)
        fsync(path)
        place.write(journal)
        place.point(new)
        for version in link.parent.glob(f"{name}@*"):
            if version.name not in (new, old):
                shutil.rmtree(version, ignore_errors=True)
        return Outcome(digest, path, True)


def roll_back(bundle: Path, name: str) -> str:
    """Go back at once to the adapter before this one; return its version.

    Raises:
        ConfigError: there is none.
        ResourceError: it cannot be written.
    """
    with _held(library(bundle) / check_name(name)) as place:
        return undo(place, place.read(), None)


def _judge(judge: Judge, now: Candidate, after: Candidate, first: dict[str, Any] | None) -> Measure:
    """Measure both, the quick measurements first.

    Raises:
        WorseError: the new one is worse.
        EdgeError: one of them fails, or the golden set would not tell.
    """
    old, new = judge.read(None, now), judge.read(None, after)
    judge.compare_text(new, old)
    old = judge.ask(old, now)
    judge.check_set(old)
    new = judge.ask(new, after)
    judge.compare(new, *judge.accepted(old, first))
    return new


def _gate_error(reference: Reference, digest: str, reason: str, when: str) -> GateError:
    return GateError(
        f"{reference} {when}, and the old one stays in use: {reason}",
        {"reason": reason, "digest": digest},
    )


@contextmanager
def _held(link: Path) -> Iterator[Place]:
    """Hold an adapter's link, with a journal beside it."""
    try:
        with locked(link, "roll-out"):
            _put_behind_link(link)
            place = Place(link)
            place.folder.mkdir(exist_ok=True)
            yield place
    except OSError as error:
        raise ResourceError(
            f"cannot write {error.filename or link}: {error.strerror}; free disk space, or do it "
            "as a user who may"
        ) from error


def _put_behind_link(link: Path) -> None:
    """Turn the copy that ``adapter add`` made into a version, without a moment between."""
    if link.is_symlink() or not link.is_dir():
        return
    kept, temp = link.with_name(f"{link.name}@added"), beside(link, "link")
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(link, kept)
    temp.unlink(missing_ok=True)
    temp.symlink_to(kept.name)
    exchange(temp, link)
    shutil.rmtree(temp)
