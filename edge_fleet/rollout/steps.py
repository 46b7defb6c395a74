"""Does the steps of a roll-out: look, pull, build, judge, try, keep or take back."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from edge.bundle.engine_file import find_engines, read_engine_info
from edge.bundle.manifest import Manifest, fingerprint, read_manifest
from edge.bundle.trust import KEYS_VARIABLE, trusted_keys_file
from edge.engine_config import EngineConfig
from edge.errors import (
    BackendError,
    BuildError,
    BundleError,
    ConfigError,
    DependencyError,
    GateError,
    ResourceError,
)
from edge_fleet.registry.client import Registry
from edge_fleet.registry.pull import Offer, look, origin_digest, pull
from edge_fleet.registry.reference import Reference
from edge_fleet.registry.release import check_release, release_at
from edge_fleet.unsigned_files import find_uncovered
from edge_lab.measure.watch import GoldenItem, read_golden
from edge_make.progress import Progress, silent

from . import SWITCH_TIMEOUT_S, WATCH_S
from .guard import guarded
from .journal import ROLLED_BACK, Journal, Place, Step, take_back, undo
from .judge import Candidate, Gate, Judge, Measure, WorseError
from .orders import send
from .service import LoadingError, Service, Sight, UnknownModelError

_RELOAD_AGAIN_S = 30.0
_WORKING_BYTES = 1 << 29  # of a process that opens a bundle, besides weights and cache


@dataclass(frozen=True)
class Plan:
    """The bundle to roll out, and the conditions.

    Attributes:
        reference: reference to ask the registry for.
        link: the link that the service's settings name.
        service: the running service; None if none runs.
        reload: command that makes it look at the link.
        watch_s: seconds to watch the new bundle.
        gate: measure that the new bundle is judged by; None does not judge it.
        build: whether to build the engine; None builds it if TensorRT runs here.
        engine: options for opening a bundle to judge it; its trusted keys hold for all steps.
        plain_http: whether to speak HTTP without TLS (`Registry`).
        retry: whether to try a bundle again that was rejected before.
        switch_timeout_s: seconds that the service may take to open a bundle.
        staging: directory for users who may not move the link (`Place`); root then does ``reload``.
        allow_older: whether to take a release that has expired or is older than the last kept one.
    """

    reference: Reference
    link: Path
    service: Service | None = None
    reload: str | None = None
    watch_s: float = WATCH_S
    gate: Gate | None = field(default_factory=Gate)
    build: bool | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)
    plain_http: bool | None = None
    retry: bool = False
    switch_timeout_s: float = SWITCH_TIMEOUT_S
    staging: Path | None = None
    allow_older: bool = False


@dataclass(frozen=True)
class Outcome:
    """The result of a successful roll-out.

    Attributes:
        digest: digest of the bundle that the link leads to.
        bundle: directory of that bundle.
        changed: whether the bundle differs from the one before.
        notes: messages for people.
    """

    digest: str
    bundle: Path
    changed: bool
    notes: tuple[str, ...] = ()


def roll_out(plan: Plan, progress: Progress = silent) -> Outcome:
    """Bring a device to what a reference means now, as the plan says.

    Every step is in the journal. A run that was cut off before the trial continues where it was. A
    trial that was cut off is first taken back, by the guard or by the next run, and tried again.

    Raises:
        GateError: the bundle is worse than the old one, or was rejected before; the old one serves.
        BundleError: it is not signed by a trusted key, has expired, or is an older release than the
            one that was kept; the old one serves.
        RegistryError: the registry cannot be reached; the old one serves.
        EdgeError: another step fails; the old one serves.
    """
    place = Place(plan.link, plan.staging)
    with place.locked():
        journal = place.read()
        if take_back(place, journal, plan.reload):
            progress("taken back", 1, 1, "", "a trial that was cut off")
        return _Run(plan, place, journal, progress).run()


def recover(link: Path, reload: str | None, staging: Path | None = None) -> bool:
    """Take back a trial that was cut off; return whether there was one.

    Raises:
        ConfigError, BackendError: `take_back` fails; or a roll-out is running.
    """
    place = Place(link, staging)
    with place.locked():
        return take_back(place, place.read(), reload)


def roll_back(link: Path, reload: str | None, staging: Path | None = None) -> str:
    """Go back at once to the bundle before the one that was kept; return its name.

    It is on the disk and was accepted once, so nothing is fetched or judged. The bundle that the
    link led to is not tried again.

    Raises:
        ConfigError: there is none, or a roll-out is running.
        BackendError: the service could not be told; the link is back.
    """
    place = Place(link, staging)
    with place.locked():
        journal = place.read()
        if take_back(place, journal, reload) and journal.old is not None:
            journal.reject(ROLLED_BACK)
            place.write(journal)
            return journal.old
        if staging is None:
            return undo(place, journal, reload)
        if journal.step != "done" or journal.old is None:
            raise ConfigError(f"{link} has had no other version since it was last rolled back")
        send(link, staging, "undo")  # root has its own journal of what was kept
        journal.reject(ROLLED_BACK)
        place.write(journal)
        return journal.old


class _Run:
    def __init__(self, plan: Plan, place: Place, journal: Journal, progress: Progress) -> None:
        self.plan = plan
        self.place = place
        self.journal = journal
        self.progress = progress
        self.notes: list[str] = []
        self._release = 0

    def run(self) -> Outcome:
        plan, journal = self.plan, self.journal
        with Registry(plan.reference, plain_http=plan.plain_http) as registry:
            offer = look(plan.reference, registry, plan.engine.trusted_keys)
            current = self.place.current
            here = None if current is None else self.place.path(current)
            is_new = here is None or origin_digest(here) != offer.digest
            self._check_release(offer, is_new)
            if here is not None and not is_new:
                return Outcome(offer.digest, here, False, tuple(self.notes))
            if offer.digest in journal.rejected and not plan.retry:
                reason = f"{journal.rejected[offer.digest]}; --retry tries it again"
                raise self._gate_error(offer.digest, reason, "was rejected before")
            self._check_size(offer.manifest)
            if journal.digest != offer.digest or journal.step == "done":
                unfinished = None if journal.step == "done" else journal.new
                journal.digest, journal.trials = offer.digest, 0
                journal.new = f"{self.place.link.name}-{offer.digest[7:19]}"
                journal.step, journal.judged_new = "idle", None
                self._drop_unfinished(unfinished, current)
            journal.old = current
            # Check before gigabytes are fetched in vain.
            if current is None:
                # Nothing serves yet, so there is nothing to compare with and nothing to watch.
                self._check_unserved()
                self.plan = plan = replace(plan, service=None, reload=None)
            elif plan.service is not None:
                plan.service.look()
            self._pull(offer, registry)
        manifest = offer.manifest
        self._release = 0 if offer.release is None else offer.release.number
        self._build()
        self._confirm_old()  # a trial that was taken back may not have reached the service yet
        self._judge_before(manifest)
        sight = self._try(manifest)
        self._sweep()
        bundle = self.place.path(journal.new)
        if sight is None:
            self.notes.append("no service was asked; name --server to have the bundle watched")
        return Outcome(journal.digest, bundle, True, tuple(self.notes))

    # ------------------------------------------------------------------------------- before

    def _check_unserved(self) -> None:
        """Refuse a first bundle if a service runs: it has another, and would never see the link.

        Raises:
            ConfigError: a service serves a bundle.
            LoadingError: a service is opening its bundles.
        """
        link = self.place.link
        if self.plan.service is None:
            return
        try:
            self.plan.service.look()
        except LoadingError:
            raise
        except UnknownModelError as error:
            self.notes.append(f"{error}; name {link} in its settings and restart it")
            return
        except BackendError:
            return
        first = link.with_name(f"{link.name}-first")
        move = "" if first.exists() else f"mv -T BUNDLE {first} && "
        raise ConfigError(
            f"the service's settings do not name {link}: it serves a bundle, and that link does "
            f"not exist yet; let it lead to that bundle: {move}ln -s {first.name} {link}, then "
            f"name {link} in the settings and restart the service"
        )

    def _check_release(self, offer: Offer, is_new: bool) -> None:
        """Refuse an expired release, even the serving one, so that a tag that never moves shows.

        Raises:
            BundleError: it has expired, or is older than the release that was kept.
        """
        if self.plan.allow_older:
            return
        # Whoever moves the link notes what was kept, even if it was moved by hand.
        link = self.place.link
        journal = self.journal if self.place.staging is None else Place(link).read()
        highest = journal.release if is_new else 0
        note = check_release(offer.release, str(self.plan.reference), release_at(link), highest)
        if note is not None:
            self.notes.append(note)

    def _check_size(self, manifest: Manifest) -> None:
        """Refuse a bundle that this machine could not hold even if nothing else ran on it.

        Raises:
            ResourceError: it does not fit.
        """
        from edge_lab.telemetry import read_snapshot

        total = read_snapshot().memory_total_bytes
        need = need_bytes(manifest, self.plan.engine)
        if total is not None and need > total:
            raise ResourceError(
                f"{self.plan.reference} takes {need / 1e9:.1f} GB, and this device has "
                f"{total / 1e9:.1f} GB; the old bundle serves"
            )

    def _drop_unfinished(self, bundle: str | None, current: str | None) -> None:
        """Remove downloads of other bundles' unfinished roll-outs: they may fill the disk."""
        place, new = self.place, self.journal.new
        name = re.escape(place.link.name)
        staging = re.compile(rf"\.({name}-[0-9a-f]{{12}})\.edge-llm-(pull|gone-[0-9a-f]{{6}})")
        for path in place.work.iterdir():
            half = staging.fullmatch(path.name)
            whole = path.name == bundle and bundle not in (current, new)
            if whole or (half is not None and half[1] != new):
                shutil.rmtree(path, ignore_errors=True)

    def _pull(self, offer: Offer, registry: Registry) -> None:
        target, near = self.place.new_path(self.journal.new), self.place.link.parent
        pull(offer, registry, target, overwrite=True, near=near, progress=self.progress)
        if self.journal.step == "idle":
            self._note("pulled")

    def _build(self) -> None:
        bundle, old = self.place.new_path(self.journal.new), self.journal.old
        policy = trusted_keys_file(self.plan.engine.trusted_keys)
        if self.plan.build is False or find_uncovered(bundle, policy).engines:
            return
        engines = [] if old is None else find_engines(self.place.path(old))
        if self.plan.build is None:
            from edge_lab.doctor.machine import Machine

            error = Machine().tensorrt().error
            if error is not None and engines:
                raise DependencyError(
                    f"TensorRT does not start ({error}), so the new bundle would be served by the "
                    "CPU, and the old one, which serves, has an engine; run edge-llm doctor as "
                    "this user with this Python, or give --no-build"
                )
            if error is not None:
                return
        self.progress("build", 0, 1)
        command = [sys.executable, "-m", "edge.cli", "build", str(bundle), *_size(engines, policy)]
        keys = {} if policy is None else {KEYS_VARIABLE: str(policy)}
        done = subprocess.run(command, stdout=sys.stderr, check=False, env={**os.environ, **keys})
        if code := done.returncode:
            raise BuildError(
                f"edge-llm build {bundle} ended with {code}; the old bundle serves, and the next "
                "roll-out tries again"
            )
        self.progress("build", 1, 1)
        self._note("built")

    def _judge_before(self, manifest: Manifest) -> None:
        """Measure both bundles if memory holds a second one; otherwise the trial does."""
        journal, plan = self.journal, self.plan
        if plan.gate is None or journal.old is None:
            return
        judge = Judge(plan.gate, self.progress)
        before = Candidate(self.place.path(journal.old), plan.engine, plan.service)
        after = Candidate(self.place.new_path(journal.new), plan.engine, None)
        old, new = judge.read(journal.judged, before), judge.known(journal.judged_new, journal.new)
        fits = self._fits(manifest)
        try:
            if fits:
                new = new or judge.read(None, after)
                judge.compare_text(new, *judge.accepted(old, journal.first))
            old = judge.ask(old, before)
            journal.judged = msgspec.to_builtins(old)
            accepted = judge.accepted(old, journal.first)
            journal.first = msgspec.to_builtins(accepted[-1])
            self.place.write(journal)
            judge.check_set(old)
            if new is None or not fits:
                self.notes.append("memory holds one bundle only: it was judged on trial")
                return
            new = judge.ask(new, after)
            judge.compare(new, *accepted)
        except WorseError as error:
            raise self._reject(str(error)) from error
        journal.judged_new = msgspec.to_builtins(new)
        self._note("judged")

    def _fits(self, manifest: Manifest) -> bool:
        return self.plan.service is None or has_room(manifest, self.plan.engine)

    # ------------------------------------------------------------------------------- trial

    def _try(self, manifest: Manifest) -> Sight | None:
        """Point the link to the new bundle, and keep it, or take it back.

        Raises:
            GateError: it was taken back, and is rejected.
            EdgeError: it was taken back; the next run tries it again.
        """
        plan, place, journal = self.plan, self.place, self.journal
        service = plan.service
        before = None if service is None else service.look()
        items = read_golden(plan.gate.golden)[0] if plan.gate and plan.gate.golden else []
        paces = []
        if service is not None and plan.watch_s and items:
            paces = service.pace(items) + service.pace(items)
        with guarded(place, plan.reload):
            self._note("trial")
            reloaded = False
            try:
                place.begin(journal.new, plan.reload)
                reloaded = True
                fault = self._watch(fingerprint(manifest), before, paces, items)
                if fault is None:
                    self._keep()
            except BaseException as error:
                # A service that crashed may do so each time; a command or a person is not the
                # bundle's fault.
                broke = reloaded and isinstance(error, BackendError)
                if not broke:
                    take_back(place, journal, plan.reload, cut_off=False)
                    raise
                with suppress(BackendError):  # see below
                    take_back(place, journal, plan.reload)
                self._confirm_old()
                raise
            if fault is not None:
                # A service that has ended cannot be reloaded; it opens the link when it starts.
                with suppress(BackendError):
                    take_back(place, journal, plan.reload, cut_off=False, fault=fault)
                self._confirm_old()
                raise self._reject(fault)
        return before

    def _watch(
        self, name: str, before: Sight | None, paces: list[float], items: list[GoldenItem]
    ) -> str | None:
        """Say what is wrong with the new bundle on trial; None if nothing is."""
        plan, service = self.plan, self.plan.service
        if service is None or before is None:
            return None
        self.progress("switch", 0, 1)
        if not service.wait_for(name, plan.switch_timeout_s):
            return f"the service did not open it within {plan.switch_timeout_s:g} s; see its log"
        self.progress("switch", 1, 1)
        if self.journal.judged_new is None and plan.gate is not None:
            judge = Judge(plan.gate, self.progress)
            new = Candidate(self.place.path(self.journal.new), plan.engine, service)
            old = msgspec.convert(self.journal.judged, Measure)
            accepted = judge.accepted(old, self.journal.first)
            try:
                found = judge.read(None, new)
                judge.compare_text(found, *accepted)
                found = judge.ask(found, new)
                judge.compare(found, *accepted)
            except WorseError as error:
                return str(error)
            self.journal.judged_new = msgspec.to_builtins(found)
        if not plan.watch_s:
            return None

        def report(passed_s: float) -> None:
            self.progress("watch", passed_s, plan.watch_s, "s")

        return service.watch(name, before, paces, items, plan.watch_s, report)

    def _keep(self) -> None:
        self.place.keep(self.journal.new)
        self.journal.judged = self.journal.judged_new
        if self.journal.judged is None:  # accepted unmeasured: later bundles are compared with it
            self.journal.first = None
        self.journal.judged_new, self.journal.trials = None, 0
        self.journal.release = self._release
        self.journal.rejected.pop(self.journal.digest, None)  # it was tried again, and is good
        self._note("done")

    def _confirm_old(self) -> None:
        """Wait until the service serves the old bundle.

        Raises:
            ResourceError: it does not in time.
        """
        plan, link = self.plan, self.place.link
        if plan.service is None or not link.exists():
            return
        # Not the bundle served before the trial: that may have been one about to be replaced.
        old = fingerprint(read_manifest(link))
        deadline = time.monotonic() + plan.switch_timeout_s
        while not plan.service.wait_for(old, _RELOAD_AGAIN_S):
            if time.monotonic() > deadline:
                raise ResourceError(
                    "the link leads to the old bundle, and the service has not opened it within "
                    f"{plan.switch_timeout_s:g} s; look at its log"
                )
            # The command of the take-back may have met a service that was ending. One that is
            # opening its bundles follows the link later, unless a command restarts it first.
            if not plan.service.is_loading():
                with suppress(BackendError):
                    self.place.go_back(self.journal.old, plan.reload)

    # ------------------------------------------------------------------------------- after

    def _sweep(self) -> None:
        """Remove bundles of earlier roll-outs; the one before this stays, to go back to."""
        # An accepted bundle is beside the link by now, where root sweeps.
        keep = {self.journal.new, self.journal.old} if self.place.staging is None else set()
        self.place.sweep(keep)

    def _note(self, step: Step) -> None:
        before, self.journal.step = self.journal.step, step
        try:
            self.place.write(self.journal)
        except ConfigError:
            self.journal.step = before  # as on disk, so that a trial stays one
            raise

    def _reject(self, reason: str) -> GateError:
        bundle = self.place.new_path(self.journal.new)
        self.journal.reject(reason)
        self.place.write(self.journal)
        if bundle.name != self.place.current:
            shutil.rmtree(bundle, ignore_errors=True)
        return self._gate_error(self.journal.digest, reason, "is rejected")

    def _gate_error(self, digest: str, reason: str, when: str) -> GateError:
        return GateError(
            f"{self.plan.reference} {when}, and the old bundle serves: {reason}",
            {"reason": reason, "digest": digest},
        )


def need_bytes(manifest: Manifest, engine: EngineConfig) -> int:
    """Compute the memory that a bundle takes at most, opened with these options."""
    from edge_serve.models import loader

    return loader.need_bytes(manifest, engine.num_slots, engine.kv_capacity)


def has_room(manifest: Manifest, engine: EngineConfig) -> bool:
    """Whether memory holds one more process that opens a bundle."""
    from edge_lab.telemetry import read_snapshot

    room = read_snapshot().memory_room_bytes
    return room is None or need_bytes(manifest, engine) + _WORKING_BYTES <= room


def _size(engines: list[Path], policy: Path | None) -> list[str]:
    """Return options for as many sequences at once as the old engines have, so that none waits."""
    most = 1
    for engine in engines:
        with suppress(BundleError):  # the new bundle replaces a damaged engine
            most = max(most, read_engine_info(engine, policy).max_batch)
    return ["--max-batch", str(most)] if most > 1 else []
