"""Puts an engine into its bundle so that a killed build leaves the old one intact.

A plan is written under a name that contains its hash; ``engine.json`` names it and is replaced by
one ``rename(2)``. So a directory holds the whole old engine or the whole new one, on any file
system. A build that takes the lock deletes whatever else a killed one has left there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from edge.bundle.engine_file import ENGINE_JSON, EngineInfo, read_engine_bytes, read_engine_info
from edge.bundle.engine_records import ENGINE_SIGNATURE, built_here, why_unrecorded
from edge.bundle.manifest import ENGINES_DIR
from edge.bundle.trust import trusted_keys_file
from edge.bundle.update import fsync, try_lock
from edge.errors import BundleError, ConfigError, ResourceError
from edge.vision.plan import VisionPlan, vision_plan
from edge.vision.section import SECTION
from edge_make.engine_layers import LayerTable, is_layers_file, layers_path
from edge_make.engine_record import forget_engine, record_engine, verify_plan
from edge_make.file_hash import sha256_file
from edge_make.target import write_durably
from engines.graph.external_weights import SUFFIX, Outside, place

_log = logging.getLogger(__name__)

BUILD_LOG = "build.log"
TIMING_CACHE = "timing.cache"
TUNE_SCRATCH, TRTEXEC_SCRATCH = ".tune-", ".trtexec-"
"""How a build's temporary directories begin, beside those of the engines."""
_LOCK = ".lock"


@dataclass(frozen=True)
class EncoderPlan:
    """An encoder's plan that is not yet in a file.

    Attributes:
        plan: the plan, a buffer.
        num_bytes: its size.
        max_tiles: the most tiles per run.
        build_s: seconds of parsing and compiling.
        problems: one sentence for each fault of the parsed network; ``trtexec`` shows none.
    """

    plan: Any
    num_bytes: int
    max_tiles: int
    build_s: float
    problems: tuple[str, ...] = ()


def engine_key(parts: dict[str, Any]) -> str:
    """Hash everything that an engine depends on; the order of ``parts`` does not matter."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class EngineStore:
    """One engine's directory in a bundle.

    Args:
        bundle: the bundle's directory.
        name: the engine's name, e.g. ``sm87-trt10.16-int4-b1-kv4096``.
        timing_cache: file of timings that the user named; None is the one beside the engine.
    """

    def __init__(self, bundle: Path, name: str, timing_cache: Path | None = None) -> None:
        self.directory = bundle / ENGINES_DIR / name
        self._elsewhere = timing_cache
        self._recordable = not name.startswith(".")  # a variant that is only tried has no record

    @contextlib.contextmanager
    def locked(self, waiting: Callable[[], None]) -> Iterator[None]:
        """Hold the lock of all engines of the bundle; a second build waits for the first.

        Also deletes what killed builds left beside the engines, since nobody uses it now.

        Args:
            waiting: called once if another process holds the lock.

        Raises:
            ConfigError: the bundle cannot be written, or its engines are a link to elsewhere.
        """
        root = self.directory.parent
        for directory in (root, self.directory):
            if directory.is_symlink():
                raise ConfigError(
                    f"{directory} is a symbolic link, and a build removes and replaces files "
                    "there; put a directory in its place"
                )
        try:
            root.mkdir(exist_ok=True)
            descriptor = os.open(root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise ConfigError(
                f"cannot write engines into {root}: {error.strerror}; copy the bundle to a place "
                "that you can write to"
            ) from error
        try:
            if not try_lock(descriptor):
                waiting()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            _sweep_scratch(root)
            yield
            _sweep_scratch(root)
        finally:
            os.close(descriptor)

    def find(self, key: str) -> EngineInfo | None:
        """Find the engine in this directory, if it has this key and is whole.

        If this machine trusts keys, the engine must be signed or recorded: anybody can compute an
        engine's key.
        """
        try:
            info = read_engine_info(self.directory, trusted_keys_file())
            if info.key != key:
                return None
            verify_plan(self.directory, info)
            if SECTION in info.extras:
                verify_plan(self.directory, vision_plan(self.directory, info))
        except BundleError as error:
            if (self.directory / ENGINE_JSON).exists():
                _log.warning("the engine that is there is not usable: %s", error)
            return None
        return info

    def is_recorded(self) -> bool:
        """Whether this machine has built the engine in this directory."""
        return why_unrecorded(read_engine_bytes(self.directory)) is None

    def read_timings(self) -> bytes | None:
        """Read the timing cache of the last build here, or of a file that the user named.

        If this machine trusts keys, TensorRT does not get one that came with the bundle.
        """
        path = self._elsewhere or self.directory / TIMING_CACHE
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"cannot read the timing cache {path}: {error.strerror}") from error
        if self._elsewhere is None and trusted_keys_file() is not None:
            return None if why_unrecorded(data) else data
        return data

    def write_timings(self, timings: bytes) -> None:
        """Keep a timing cache for the next build; a failure is only a warning."""
        path = self._elsewhere or self.directory / TIMING_CACHE
        with self._recorded(path, timings) if self._elsewhere is None else contextlib.nullcontext():
            _keep(path, timings)

    def write_log(self, text: str) -> None:
        """Keep TensorRT's log; a failure is only a warning."""
        _keep(self.directory / BUILD_LOG, text.encode())

    def commit(
        self,
        plan: Any,
        describe: Callable[[str, int, str], EngineInfo],
        outside: Outside | None = None,
        encoder: EncoderPlan | None = None,
    ) -> EngineInfo:
        """Put a plan in place.

        Args:
            plan: the plan's bytes, in any buffer.
            describe: makes the record from the plan's file name, size and SHA-256.
            outside: weights to put beside it.
            encoder: a second plan, for the vision encoder.

        Raises:
            BundleError: the graph's weights end too early.
            ResourceError: the disk is full; the old engine stays.
        """
        view = memoryview(plan).cast("B")
        sha256 = hashlib.sha256(view).hexdigest()
        name = f"engine-{sha256[:12]}.plan"
        info = describe(name, view.nbytes, sha256)
        size = view.nbytes + (outside.num_bytes if outside else 0)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.sweep()
            if outside is not None:
                weights = place(outside, self.directory, info.sources)
                info = msgspec.structs.replace(info, outside=weights)
            _replace(self.directory / name, view)
            if encoder is not None:
                info = self._add_encoder(info, encoder)
            self._write_info(info)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ResourceError(
                    f"the disk filled up while {self.directory} was written; free "
                    f"{size / 1e6:,.0f} MB and build again (the old engine is as it was)"
                ) from error
            raise
        self.sweep()
        return info

    def _add_encoder(self, info: EngineInfo, encoder: EncoderPlan) -> EngineInfo:
        """Write the encoder's plan under a name with its hash, and add it to the record."""
        view = memoryview(encoder.plan).cast("B")
        sha256 = hashlib.sha256(view).hexdigest()
        plan = VisionPlan(f"vision-{sha256[:12]}.plan", view.nbytes, sha256, encoder.max_tiles)
        _replace(self.directory / plan.plan, view)
        section = {SECTION: msgspec.to_builtins(plan)}
        return msgspec.structs.replace(info, extras=info.extras | section)

    def add_layers(
        self, info: EngineInfo, layers: LayerTable | None, unknown: str | None
    ) -> EngineInfo:
        """Record the layers of the engine in place; a failure is only a warning.

        Args:
            info: the engine's record.
            layers: table to keep beside the plan; None if the layers are unknown.
            unknown: why they are unknown.
        """
        compiled = layers.summary() if layers is not None else ()
        told = msgspec.structs.replace(info, compiled=compiled, compiled_unknown=unknown)
        try:
            if layers is not None:
                _replace(layers_path(self.directory / info.plan), msgspec.json.encode(layers))
            self._write_info(told)
        except OSError as error:
            reason = f"they could not be written: {error.strerror}"
            _log.warning("the engine's layers are not known: %s", reason)
            return msgspec.structs.replace(info, compiled_unknown=reason)
        return told

    def _write_info(self, info: EngineInfo) -> None:
        data = msgspec.json.format(msgspec.json.encode(info), indent=2) + b"\n"
        with self._recorded(self.directory / ENGINE_JSON, data) as path:
            _replace(path, data)
            (self.directory / ENGINE_SIGNATURE).unlink(missing_ok=True)  # the old engine's

    @contextlib.contextmanager
    def _recorded(self, path: Path, data: bytes) -> Iterator[Path]:
        """Record a file as built here before it is written, and drop the old one's record after."""
        sha256 = hashlib.sha256(data).hexdigest()
        built_here.add(sha256)
        old = sha256_file(path).sha256 if path.is_file() else sha256
        if self._recordable:
            try:
                record_engine(path, data)
            except ConfigError as error:
                self._recordable = False
                _log.warning("the engine will not run once this machine trusts keys: %s", error)
        yield path
        if old != sha256:
            forget_engine(old)

    def sweep(self) -> None:
        """Remove plans that ``engine.json`` does not name, and what a killed build left."""
        try:
            info = read_engine_info(self.directory)
            encoder = {vision_plan(self.directory, info).plan} if SECTION in info.extras else set()
        except BundleError:
            keep = set()
        else:
            keep = {info.plan, layers_path(Path(info.plan)).name}
            keep |= {info.outside.file} if info.outside else set()
            keep |= encoder
        for path in self.directory.iterdir():
            ours = path.name.endswith((".plan", SUFFIX, ".tmp")) or is_layers_file(path.name)
            if ours and path.name not in keep:
                path.unlink()


def _sweep_scratch(root: Path) -> None:
    for prefix in (TUNE_SCRATCH, TRTEXEC_SCRATCH, ".kernels-"):  # the last is of older edge-llm
        for leftover in root.glob(f"{prefix}*"):
            try:
                shutil.rmtree(leftover)
            except OSError as error:  # such as another user's directory
                _log.warning("%s of a killed build stays: %s", leftover, error.strerror)


def _keep(path: Path, data: bytes) -> None:
    """Write a file that an engine can do without; a failure to write it is only a warning."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, data)
    except OSError as error:
        _log.warning("%s is not kept: %s", path, error.strerror)


def _replace(path: Path, data: Any) -> None:
    temp = path.with_name(f".{path.name}.tmp")
    try:
        write_durably(temp, data)
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)
    fsync(path.parent)
