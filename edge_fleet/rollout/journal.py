"""Keeps a journal of a roll-out on disk: however one ends, the next knows where it was.

A service's settings name a link, ``r1``, which leads to the directory of a bundle beside it. A
roll-out moves this link. Its journal is ``.r1.edge-llm-rollout/journal.json``.

A roll-out with a staging directory must not move the link. Then the journal and the new bundle are
in that directory, and root's `switch` moves the link by orders.

While a new bundle is on trial (`Journal.on_trial`), the link leads to it, but it is not accepted
yet. `take_back` ends a trial: the link leads to the old bundle again.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from edge.bundle.update import fsync, replace_durably
from edge.errors import BackendError, ConfigError, EdgeError
from edge.files import MALFORMED, read_file
from edge_make.target import beside, locked

from .orders import send

Step = Literal["idle", "pulled", "built", "judged", "trial", "done"]
ROLLED_BACK = "it was rolled back"
"""Why a bundle is rejected that the device went back from."""
MAX_TRIALS = 3
"""How many trials of a bundle may be cut off before it is not tried again."""
_MAX_BYTES = 1 << 22
_MAX_REJECTED = 50
_RELOAD_TIMEOUT_S = 120.0


class Journal(msgspec.Struct, forbid_unknown_fields=True):
    """The state of a roll-out.

    Attributes:
        digest: digest of the bundle that is rolled out; empty if there was none yet.
        step: the last finished step.
        new: name of the new bundle's directory.
        old: name of the directory that the link led to before; None if there was no link.
        trials: how often it has been on trial without a result.
        rejected: digests of rejected bundles, and why, the latest last.
        judged: measurements of the accepted bundle, an `edge_fleet.rollout.judge.Measure`; stored
            as plain data, so that the guard can read it without importing models.
        judged_new: measurements of the new bundle.
        first: measurements of the first bundle that was accepted; every later one is compared with
            it, too.
        wanted: number of the newest wanted state that was here; 0 if the device asks for none.
        release: number of the release that was kept last, which no lower one may follow; 0 if it
            had none.
    """

    digest: str = ""
    step: Step = "idle"
    new: str = ""
    old: str | None = None
    trials: int = 0
    rejected: dict[str, str] = {}
    judged: dict[str, Any] | None = None
    judged_new: dict[str, Any] | None = None
    first: dict[str, Any] | None = None
    release: int = 0
    wanted: int = 0

    @property
    def on_trial(self) -> bool:
        """Whether the link may lead to a bundle that nobody has accepted."""
        return self.step == "trial"

    def reject(self, reason: str) -> None:
        """Note that this bundle is not to be tried again, and why."""
        self.rejected.pop(self.digest, None)
        self.rejected[self.digest] = reason
        self.rejected = dict(list(self.rejected.items())[-_MAX_REJECTED:])
        self.step, self.judged_new, self.trials = "idle", None, 0


class Place:
    """A link that leads to a bundle, and the directory of its journal.

    Args:
        link: the link; it need not exist yet.
        staging: directory of bundles not accepted yet, for users who may not move the link.

    Raises:
        ConfigError: the path is a real directory or file.
    """

    def __init__(self, link: Path, staging: Path | None = None) -> None:
        self.link = link.parent.resolve() / link.name  # the link itself is not followed
        self.staging = staging
        self.work = self.link.parent if staging is None else staging.resolve()
        self.folder = beside(self.work / self.link.name, "rollout")
        if self.link.exists() and not self.link.is_symlink():
            raise ConfigError(
                f"{link} is no link, and a roll-out moves a link that leads to the bundle; make it "
                f"one: mv {link} {link}-first && ln -s {link.name}-first {link}"
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the place; the kernel releases it however the process ends.

        Raises:
            ConfigError: another process holds it, or it cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cannot keep a journal at {self.folder}: {error.strerror}"
            ) from error
        with locked(self.folder / "roll-out", "roll-out"):
            yield

    @property
    def current(self) -> str | None:
        """Return the name of the directory that the link leads to; None without a link.

        Raises:
            ConfigError: it leads out of the link's own directory.
        """
        if not self.link.is_symlink():
            return None
        target = self.link.readlink()
        if target.parent not in (Path(), self.link.parent):
            raise ConfigError(
                f"{self.link} leads to {target}; a roll-out keeps bundles beside their link"
            )
        return target.name

    def path(self, name: str) -> Path:
        """Return the path of a bundle beside the link."""
        return self.link.with_name(name)

    def new_path(self, name: str) -> Path:
        """Return the path of a bundle that is not accepted yet."""
        return self.work / name

    def begin(self, name: str, reload: str | None) -> None:
        """Point the link to a new bundle, and make the service look.

        Raises:
            EdgeError: the bundle is refused, or the command fails (`reload_service`).
        """
        if self.staging is not None:
            send(self.link, self.staging, "try", name)
        else:
            self.point(name)
            reload_service(reload)

    def keep(self, name: str) -> None:
        """Accept the bundle on trial."""
        if self.staging is not None:
            send(self.link, self.staging, "keep", name)

    def go_back(self, name: str | None, reload: str | None) -> None:
        """Point the link to the old bundle, or remove it, and make the service look.

        Raises:
            EdgeError: the service does not look at the link (`reload_service`).
        """
        if self.staging is not None:
            send(self.link, self.staging, "back")
            return
        self.point(name)
        if name is not None:
            reload_service(reload)

    def point(self, name: str | None) -> None:
        """Point the link to a bundle, atomically, or remove it."""
        temp = beside(self.link, "link")
        with contextlib.suppress(FileNotFoundError):
            temp.unlink()
        if name is None:
            self.link.unlink(missing_ok=True)
        else:
            temp.symlink_to(name)
            temp.replace(self.link)
        fsync(self.link.parent)

    def sweep(self, keep: Collection[str | None]) -> None:
        """Remove the bundles that roll-outs have left in `work`, except these."""
        pattern = re.compile(re.escape(self.link.name) + r"-[0-9a-f]{12}")
        for path in self.work.iterdir():
            if pattern.fullmatch(path.name) and path.name not in keep and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
        fsync(self.work)

    def read(self) -> Journal:
        """Read the journal; return a new one if there is none.

        Raises:
            ConfigError: it cannot be read.
        """
        path = self.folder / "journal.json"
        try:
            return msgspec.json.decode(read_file(path, _MAX_BYTES), type=Journal)
        except FileNotFoundError:
            return Journal()
        except (OSError, *MALFORMED) as error:
            raise ConfigError(
                f"{path} is no journal of a roll-out ({error}); look where {self.link} leads, then "
                "remove the file"
            ) from error

    def write(self, journal: Journal) -> None:
        """Write the journal, whole or not at all.

        Raises:
            ConfigError: it cannot be written.
        """
        data = msgspec.json.format(msgspec.json.encode(journal), indent=1) + b"\n"
        path = self.folder / "journal.json"
        try:
            replace_durably(path, lambda file: file.write(data), mode=0o644)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def take_back(
    place: Place,
    journal: Journal,
    reload: str | None,
    *,
    cut_off: bool = True,
    fault: str | None = None,
) -> bool:
    """End a trial: the link leads to the old bundle again, and the service is told.

    Call it with the place locked. It does nothing if nothing is on trial.

    Args:
        place: the link.
        journal: the journal on disk; it is written again.
        reload: command that makes the service look at the link.
        cut_off: whether the trial ended without a verdict; too many such trials reject a bundle.
        fault: why the bundle is rejected; None if it may be tried again.

    Returns:
        Whether something was on trial.

    Raises:
        ConfigError: the journal cannot be written; the link is back.
        BackendError: the command fails; link and journal are as they should be.
    """
    if not journal.on_trial:
        return False
    failed: EdgeError | None = None
    try:
        # Before the journal says that the trial is over: if this is cut off, the next does both.
        place.go_back(journal.old, reload)
    except EdgeError as error:
        if place.current == journal.new != journal.old:
            raise  # still on trial
        failed = error
    journal.trials += cut_off
    journal.step = "judged"
    if journal.trials >= MAX_TRIALS and fault is None:
        fault = f"{journal.trials} trials were cut off before their end"
    if fault is not None:
        journal.reject(fault)
    place.write(journal)
    if failed is not None:
        raise failed
    return True


def undo(place: Place, journal: Journal, reload: str | None) -> str:
    """Point the link to the bundle before the one that was kept; return its name.

    Call it with the place locked, and nothing on trial. The bundle that is left is not tried again.

    Raises:
        ConfigError: no earlier bundle is on the disk.
        BackendError: the command fails (`reload_service`); the link is back.
    """
    old, current = journal.old, place.current
    if journal.step != "done" or old is None or current not in (journal.new, old):
        raise ConfigError(f"{place.link} has had no other version since it was last rolled back")
    if not place.path(old).is_dir():
        raise ConfigError(f"{old}, the version before {current}, is not on the disk any more")
    place.point(old)
    journal.reject(ROLLED_BACK)
    place.write(journal)
    reload_service(reload)
    return old


def reload_service(command: str | None) -> None:
    """Run the command that makes the service look at the link.

    Raises:
        ConfigError: it is not a command.
        BackendError: it fails.
    """
    if command is None:
        return
    try:
        arguments = shlex.split(command)
        if not arguments:
            raise ValueError("it is empty")
    except ValueError as error:
        raise ConfigError(f"the command {command!r} cannot be read: {error}") from error
    try:
        done = subprocess.run(
            arguments, capture_output=True, check=False, timeout=_RELOAD_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendError(f"the command {command!r} fails: {error}") from error
    if done.returncode:
        said = (done.stderr or done.stdout).decode("utf-8", "replace").strip()[:300]
        raise BackendError(f"the command {command!r} fails with {done.returncode}: {said}")
