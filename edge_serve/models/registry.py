"""Holds the models of a server: chooses one for a request and watches their engines.

An entry is what a name stands for, loaded or not; a served model is an open bundle.
`edge_serve.models.loader` opens and closes them.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from edge.bundle.manifest import Manifest, fingerprint
from edge.errors import ResourceError
from edge.runtime.scheduler.request import SchedulerStats
from edge_lab.measure.drift import WATCH_USER
from edge_make.engine_verdict import describe_slowness
from edge_make.manifest_text import describe_kv_cache
from edge_serve.http.errors import APIError, draining, invalid, stalled
from edge_serve.http.threads import while_there
from edge_serve.observe.metric_families import EngineInfo

from .adapters import ChosenAdapter, ServedAdapters
from .bundle_text import BundleText, read_bundle_text
from .route import AUTO, Facts, Rule, Split

if TYPE_CHECKING:
    from edge.bundle.engine_file import EngineInfo as BuiltEngine
    from edge.runtime.llm import LLM
    from edge.text.tokenizer import Tokenizer

    from .flight import Flight

_log = logging.getLogger("edge_serve")
_SWITCH_WAIT_S = 60.0
LEAST_STALL_S, MOST_STALL_S = 5.0, 120.0
"""Bounds of the time after which a silent engine counts as hung, if none is set."""
_STALL_STEPS = 10
_MOST_NAMED = 5  # models in the error about one that is not served
TAG = ":latest"
"""Tag that Ollama's clients expect at the end of a name without a colon, and may add to one."""
OpenLLM = Callable[[Path], "LLM"]
ModelStatus = Literal["loaded", "loading", "unloaded", "failed"]


@dataclass(eq=False)
class ServedModel:
    """An open bundle under the name that clients use.

    Attributes:
        name: the name that requests use.
        bundle: the bundle's directory.
        llm: the open bundle.
        created: Unix seconds at which it was opened.
        flights: requests that run on it now.
        leases: number of requests that hold it and do not run yet.
        scoring: prompts that are scored or wait for it; a failed future ends the wait for one.
        keep_alive_s: seconds without a request after which it is unloaded; infinite for never.
        used_s: monotonic seconds at which a request last came or ended.
        on_rest: called when the last request that held it has ended, or ``keep_alive_s`` changed.
        heartbeat: watches the model's engine.
        fingerprint: identifies the model in answers, from the hash of the manifest.
    """

    name: str
    bundle: Path
    llm: LLM
    created: int = field(default_factory=lambda: int(time.time()))
    flights: set[Flight] = field(default_factory=set)
    leases: int = 0
    scoring: set[asyncio.Future[None]] = field(default_factory=set)
    keep_alive_s: float = math.inf
    used_s: float = field(default_factory=time.monotonic)
    on_rest: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.heartbeat = Heartbeat(self.llm.scheduler.stats)
        self.fingerprint = fingerprint(self.llm.manifest)

    @contextmanager
    def lease(self, *, counts: bool = True) -> Iterator[None]:
        """Keep the model open while a request is prepared.

        Args:
            counts: whether its end counts as use of the model; irrelevant if a flight follows.
        """
        self.leases += 1
        try:
            yield
        finally:
            self.leases -= 1
            self.touch(counts=counts)

    def leave(self, flight: Flight, *, counts: bool) -> None:
        """Remove a request that has ended; ``counts`` is that of `lease`."""
        self.flights.discard(flight)
        self.touch(counts=counts)

    def touch(self, *, counts: bool = True) -> None:
        """Note that it is used now, if that counts."""
        if counts:
            self.used_s = time.monotonic()
        if not self.is_used:
            self.on_rest()

    @property
    def expires_s(self) -> float:
        """Monotonic seconds at which it is unloaded if no request comes; infinite for never."""
        return (time.monotonic() if self.is_used else self.used_s) + self.keep_alive_s

    def engine_info(self) -> EngineInfo:
        """Describe the engine that runs the model."""
        manifest, backend = self.llm.manifest, self.llm.backend
        engine_dir: Path | None = getattr(backend, "engine_dir", None)  # TensorRT's
        labels = {
            "backend": backend.name,
            "engine": "" if engine_dir is None else engine_dir.name,
            "gpu_wait": getattr(backend, "gpu_wait", None) or "",  # TensorRT's, too
            "gpu_unused": "true" if self.llm.warning and backend.name == "ort-cpu" else "false",
            "bundle": manifest.name,
            "architecture": manifest.model.architecture,
            "quantization": manifest.quantization.name,
            "dtype": manifest.dtype,
            "kv_capacity": str(backend.capacity),
            "kv_cache": describe_kv_cache(manifest),
            "kv_cache_bytes": str(backend.cache_bytes),
            "slots": str(backend.num_slots),
            "fingerprint": self.fingerprint,
        }
        info: BuiltEngine | None = getattr(backend, "info", None)  # TensorRT's
        warnings = (self.llm.warning, describe_slowness(info) if info is not None else None)
        warning = ". ".join(filter(None, warnings)) or None
        counts = dict(self.llm.stop_counts)
        if "too_expensive" in counts:
            counts["too_dear"] = counts["too_expensive"]  # its old name, for this release
        return EngineInfo(labels, warning, counts)

    @property
    def is_used(self) -> bool:
        """Whether a request holds the model or runs on it."""
        return bool(self.leases or self.flights)


class Heartbeat:
    """Tells a working engine from one that hangs: while there is work, it must finish steps.

    Args:
        stats: asks the scheduler for its state.
        clock: returns monotonic seconds.

    Attributes:
        failed: why the engine can serve no more; None while it can.
    """

    def __init__(
        self, stats: Callable[[], SchedulerStats], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stats = stats
        self._clock = clock
        self._seen = (-1, -1)
        self._since = clock()
        self._full_step_s: float | None = None
        self.failed: str | None = None

    def beat(self) -> None:
        """Check the engine; call it a few times a second."""
        stats = self._stats()
        self.failed = stats.failed
        self._full_step_s = stats.full_step_s
        seen = (stats.steps, stats.completion_tokens)
        if seen != self._seen or not (stats.running or stats.waiting or stats.calls):
            self._seen, self._since = seen, self._clock()

    @property
    def silent_s(self) -> float:
        """Seconds since the engine last did something, while it had work."""
        return self._clock() - self._since

    @property
    def patience_s(self) -> float:
        """Silence after which the engine counts as hung: ten full steps at its slowest pace so far.

        It is between `LEAST_STALL_S` and `MOST_STALL_S`, and `MOST_STALL_S` until the engine has
        finished its first step.
        """
        if self._full_step_s is None:
            return MOST_STALL_S
        return min(max(_STALL_STEPS * self._full_step_s, LEAST_STALL_S), MOST_STALL_S)


@dataclass(eq=False)
class ModelEntry:
    """A name that requests may use, and the bundle that it stands for, loaded or not.

    Attributes:
        name: the name that requests use.
        bundle: the bundle's directory.
        manifest: the bundle's description.
        created: Unix seconds at which it was opened last, or listed.
        kv_capacity: tokens that prompt and answer may take together, as far as known.
        reasons: whether answers to chats may begin with reasoning.
        served: the open bundle; None while it is not loaded.
        is_loading: whether it is being loaded.
        failed: why it could not be loaded; None if it could, or was never tried.
        failures: number of failures to load it in a row.
        retry_s: monotonic seconds before which no request tries it again.
    """

    name: str
    bundle: Path
    manifest: Manifest
    created: int
    kv_capacity: int
    reasons: bool
    served: ServedModel | None = None
    is_loading: bool = False
    failed: str | None = None
    failures: int = 0
    retry_s: float = 0.0
    _text: BundleText | None = None

    @property
    def status(self) -> ModelStatus:
        """Its state, in the words of llama.cpp's router."""
        if self.is_loading:
            return "loading"
        if self.served is not None:
            return "loaded"
        return "unloaded" if self.failed is None else "failed"

    @property
    def size_bytes(self) -> int:
        """Bytes of the bundle's files."""
        return sum(file.num_bytes for file in self.manifest.files.values())

    def put(self, model: ServedModel) -> None:
        """Serve an open bundle."""
        self.served, self.bundle, self.manifest = model, model.bundle, model.llm.manifest
        self.created, self.kv_capacity = model.created, model.llm.kv_capacity
        self.reasons = model.llm.reasons
        self.failed = self._text = None
        self.failures, self.retry_s = 0, 0.0

    def text(self) -> BundleText | LLM:
        """Return the bundle's parts for texts; blocks if it is not loaded.

        Raises:
            EdgeError: the bundle cannot be read.
        """
        if (served := self.served) is not None:
            return served.llm
        return read_bundle_text(self.bundle, self.manifest, self.kv_capacity)

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer, and keep it for the next time; may block, as `text` does."""
        if (served := self.served) is not None:
            return served.llm.tokenizer
        if self._text is None:
            self._text = read_bundle_text(self.bundle, self.manifest, self.kv_capacity)
        return self._text.tokenizer

    def engine_info(self) -> EngineInfo:
        """Describe the engine of the model; if it is not loaded, only its bundle."""
        if (served := self.served) is not None:
            return served.engine_info()
        manifest = self.manifest
        labels = {
            "bundle": manifest.name,
            "quantization": manifest.quantization.name,
            "fingerprint": fingerprint(manifest),
        }
        return EngineInfo(labels, None)


class Choice(NamedTuple):
    """A model, and why it was chosen.

    Attributes:
        model: the model that answers.
        rule: text of the rule of ``auto`` that chose it.
        arm: ``NAME:MODEL`` if an A/B split chose it.
        waited_s: seconds that the request has waited for the model.
        adapter: adapter that the request names besides the model; None is the model alone.
    """

    model: ServedModel
    rule: str | None = None
    arm: str | None = None
    waited_s: float = 0.0
    adapter: ChosenAdapter | None = None

    def headers(self) -> dict[str, str]:
        """Return the headers that tell the client which model answers, and why."""
        headers = {"x-edge-model": self.model.name}
        if self.rule is not None:
            headers["x-edge-route"] = self.rule
        if self.arm is not None:
            headers["x-edge-arm"] = self.arm
        return headers


class ModelRegistry:
    """The served models, and whether the server takes requests at all.

    Only the event loop's thread may call its methods, except `load`, `open_models` and `close`.

    Args:
        open_llm: opens a bundle; runs in a thread.
        default: name for requests without one; None refuses them.
        rules: the rules of the model ``auto``.
        splits: A/B splits by name.
        stall_s: silence after which an engine counts as hung; None is `Heartbeat.patience_s`.
        trusted_keys: file of keys that must have signed adapters (`EngineConfig`).

    Attributes:
        is_draining: whether the server is about to stop.
        is_loading: whether its models are still being opened.
        load_for: loads the model of an entry for a waiting request; None if all are loaded.
        adapters: adapters that requests may name besides a model.
        trouble: why the device should get no requests now, e.g. ``thermal``; None if it should.
    """

    def __init__(
        self,
        open_llm: OpenLLM,
        *,
        default: str | None = None,
        rules: list[Rule] | None = None,
        splits: Mapping[str, Split] | None = None,
        stall_s: float | None = None,
        trusted_keys: Path | None = None,
    ) -> None:
        self._open_llm = open_llm
        self._default = default
        self._rules = rules or []
        self._splits = splits or {}
        self._stall_s = stall_s
        self._entries: dict[str, ModelEntry] = {}
        self._retired: set[ServedModel] = set()
        self._held: dict[str, asyncio.Event] = {}
        self.adapters = ServedAdapters(self.entries, trusted_keys)
        self.is_draining = False
        self.is_loading = True
        self.load_for: Callable[[ModelEntry, float], Awaitable[None]] | None = None
        self.trouble: str | None = None

    # ------------------------------------------------------------------------------- models

    def load(
        self,
        bundles: Mapping[str, Path],
        later: Callable[[str, Path], ModelEntry | None] = lambda name, bundle: None,
    ) -> None:
        """Open bundles one after the other; blocks.

        Args:
            bundles: bundles by name.
            later: called for each bundle after the first; returns the entry of one that is not
                opened now.

        Raises:
            EdgeError: a bundle cannot be opened; earlier ones stay open until `close`.
        """
        for name, bundle in bundles.items():
            started = time.monotonic()
            # Resolved now, since a link may lead elsewhere when this bundle is opened again.
            path = bundle.resolve()
            if self._entries and (entry := later(name, path)) is not None:
                self._entries[name] = entry
                continue
            self.add(ServedModel(name, path, self.open(path)))
            _log.info("model %s is open after %.1f s", name, time.monotonic() - started)
        self.is_loading = False

    def open(self, bundle: Path) -> LLM:
        """Open a bundle; blocks.

        Raises:
            EdgeError: it cannot be opened.
        """
        try:
            return self._open_llm(bundle)
        except OSError as error:  # no file descriptor or memory is left, or a library is gone
            raise ResourceError(
                f"cannot open {bundle}: {error}; look at the limits of this process (ulimit -a, "
                "LimitNOFILE=) and at the file"
            ) from error

    def add(self, model: ServedModel) -> None:
        """Serve a model; the model that had its name before is retired, but still runs."""
        entry = self._entries.get(model.name)
        if entry is None:
            llm = model.llm
            entry = ModelEntry(
                model.name, model.bundle, llm.manifest, model.created, llm.kv_capacity, llm.reasons
            )
            self._entries[model.name] = entry
        self.retire(entry)
        entry.put(model)

    def retire(self, entry: ModelEntry) -> ServedModel | None:
        """Take the open bundle out of an entry, if there is one; it uses memory until `forget`."""
        old, entry.served = entry.served, None
        if old is not None:
            self._retired.add(old)
        return old

    def forget(self, model: ServedModel) -> None:
        """Drop a retired model that has been closed."""
        self._retired.discard(model)

    def entries(self) -> list[ModelEntry]:
        """Return all names of models, loaded or not, in their order."""
        return list(self._entries.values())

    def models(self) -> list[ServedModel]:
        """Return the models that are loaded."""
        return [entry.served for entry in self.entries() if entry.served is not None]

    def open_models(self) -> list[ServedModel]:
        """Return the models that use memory: loaded ones, and retired ones not closed yet."""
        return [*self.models(), *list(self._retired)]

    def aliases(self) -> list[str]:
        """Return the names that stand for one of several models."""
        return [*([AUTO] if self._rules else []), *self._splits]

    def get(self, name: str) -> ServedModel:
        """Return the model of this name, which is loaded.

        Raises:
            APIError: 404, there is no such model; or 503, it is not loaded.
        """
        model = self.entry(name).served
        if model is None:
            raise _unavailable("model_unloaded", f"the model {name!r} is not loaded")
        return model

    def entry(self, name: str) -> ModelEntry:
        """Return the entry that this name stands for.

        Raises:
            APIError: 404, no model has this name.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise self.not_served(name)
        return entry

    def not_served(self, name: str) -> APIError:
        """Make the error for a name that no model has."""
        quoted = repr(name[:80])
        names = [*self._entries, *self.aliases()]
        more = ", ...; GET /v1/models lists all" if names[_MOST_NAMED:] else ""
        return APIError(
            404,
            "model_not_found",
            f"the model {quoted} is not served here; those that are: "
            f"{', '.join(names[:_MOST_NAMED])}{more}",
            param="model",
            quoted=quoted,
        )

    def by_hand(self, name: str) -> ModelEntry:
        """Return the one model that this name loads or unloads.

        Raises:
            APIError: 404, there is no such model; or 400, the name stands for several.
        """
        name = self.without_tag(name)
        if name in self.aliases():
            split = self._splits.get(name)
            several = dict(split.shares if split else [(rule.model, 1) for rule in self._rules])
            raise invalid(
                f"model: {name!r} stands for one of several models; name one of them: "
                f"{', '.join(several)}",
                "model",
            )
        return self.entry(name)

    def find(self, name: str | None) -> ModelEntry:
        """Return the entry that a request's name stands for, without loading it.

        Raises:
            APIError: 400 without a name, 404 for an unknown one, 503 while nothing can be served.
        """
        self._check_open()
        return self._pick(self.adapters.split(self._named(name))[0], Facts({}, "chat", ""))[0]

    @contextmanager
    def held(self, name: str) -> Iterator[None]:
        """Make requests for a model wait instead of failing while it is replaced."""
        event = self._held[name] = asyncio.Event()
        try:
            yield
        finally:
            del self._held[name]
            event.set()

    async def choose(
        self,
        name: str | None,
        facts: Facts | None = None,
        keep_alive_s: float | None = None,
        receive: Callable[[], Awaitable[Any]] | None = None,
    ) -> Choice:
        """Choose the model for a request; if it is not loaded, load it while the request waits.

        Args:
            name: the name in the request, if any.
            facts: facts that decide between models of one name; None stands for an empty chat.
            keep_alive_s: how long the model stays from then on after its last request; None changes
                nothing.
            receive: reads from the client's connection; None if there is none.

        Raises:
            APIError: 400, 404, 504, or 503 while nothing can be served.
            OverloadError: too many requests wait for the model.
            ClientGoneError: the client left while it waited.
        """
        self._check_open()
        facts = facts or Facts({}, "chat", "")
        named, adapter = self.adapters.split(self._named(name))
        is_watch = facts.key == WATCH_USER
        asked_s = time.monotonic()
        waited_s = 0.0
        passed: set[str] = set()
        entry, rule, arm = self._pick(named, facts)
        while (model := entry.served) is None or entry.name in self._held:
            try:
                await while_there(self._wait_for(entry, asked_s, is_watch=is_watch), receive)
            except APIError as error:
                if rule is None or error.code not in ("load_failed", "no_room"):
                    raise
                passed.add(entry.name)
                entry, rule, arm = self._pick(named, facts, passed)
                if entry.name in passed:  # there is no other
                    raise
            self._check_open()
            waited_s = time.monotonic() - asked_s
        reason = self._why_not(model)
        if reason == "engine_stalled":
            raise stalled()
        if reason:
            raise _unavailable(reason, "the engine can serve no more; the log has the cause")
        if keep_alive_s is not None:
            model.keep_alive_s = keep_alive_s
        model.touch(counts=not is_watch)
        return Choice(model, rule, arm, waited_s, adapter)

    async def _wait_for(self, entry: ModelEntry, asked_s: float, *, is_watch: bool) -> None:
        """Wait until a model is replaced or loaded.

        Raises:
            APIError: 503, that fails; or 503 or 504, it takes too long.
            OverloadError: too many requests wait for it.
        """
        if (event := self._held.get(entry.name)) is not None:
            try:
                await asyncio.wait_for(event.wait(), _SWITCH_WAIT_S)
            except asyncio.TimeoutError:
                raise _unavailable("loading", "the model is being replaced") from None
        elif is_watch:
            raise _unavailable(
                "model_unloaded",
                f"the model {entry.name!r} is not loaded, and edge-llm watch loads none; it is "
                "when a client asks for it",
            )
        else:
            assert self.load_for is not None  # without it, all are loaded
            await self.load_for(entry, asked_s)

    def _named(self, name: str | None) -> str:
        """Return the name that a request gives, or the default one.

        Raises:
            APIError: 400, there is neither.
        """
        if name is None:
            if self._default is None:
                raise invalid("model: this field is required", "model", "missing_field")
            name = self._default
        return self.without_tag(name)

    def token_limits(self, name: str | None) -> dict[ModelEntry, int]:
        """Return the models whose rules compare a request's tokens, with the largest number.

        Args:
            name: the name in the request, if any.

        Raises:
            APIError: 404, or 503 while nothing can be served.
        """
        self._check_open()
        limits: dict[ModelEntry, int] = {}
        if (self._default if name is None else self.without_tag(name)) == AUTO:
            for rule in self._rules:
                if rule.most_tokens is not None:
                    entry = self.entry(rule.model)
                    limits[entry] = max(rule.most_tokens, limits.get(entry, 0))
        return limits

    def _check_open(self) -> None:
        if self.is_draining:
            raise draining()
        if self.is_loading:
            raise _unavailable("loading", "the model is loading")

    def without_tag(self, name: str) -> str:
        """Remove the tag that `/api/tags` adds to a name, unless a model is served with it."""
        return name if name in self._entries else name.removesuffix(TAG)

    def _pick(
        self, name: str, facts: Facts, passed: Collection[str] = ()
    ) -> tuple[ModelEntry, str | None, str | None]:
        """Return the entry that a name stands for, and the rule and the arm that chose it, if any.

        Args:
            name: the name.
            facts: facts that decide between models of this name.
            passed: models that rules must not choose, since they cannot be loaded now.
        """
        if name in self._splits:
            arm = self._splits[name].arm(facts.key)
            return self.entry(arm), None, f"{name}:{arm}"
        if name != AUTO or not self._rules:
            return self.entry(name), None, None
        for rule in self._rules:
            entry = self.entry(rule.model)
            model = entry.served
            # A model that cannot serve is skipped, whatever its rule says.
            healthy = rule.model not in passed and (model is None or self._why_not(model) is None)
            stats = SchedulerStats() if model is None else model.llm.scheduler.stats()
            if healthy and rule.holds(facts, stats):
                return entry, rule.text, None
        return self.entry(self._rules[-1].model), "none", None

    def stats(self) -> dict[str, SchedulerStats]:
        """Return the state of the scheduler of every model that is loaded."""
        return {model.name: model.llm.scheduler.stats() for model in self.models()}

    def engines(self) -> dict[str, EngineInfo]:
        """Describe the engine of each model; for those not loaded, only the bundle."""
        return {entry.name: entry.engine_info() for entry in self.entries()}

    # ------------------------------------------------------------------------------- health

    def not_ready(self) -> str | None:
        """Return why the server should get no requests now; None if it should."""
        if self.is_draining:
            return "draining"
        if self.is_loading:
            return "loading"
        reasons = map(self._why_not, self.models())
        return next((reason for reason in reasons if reason), self.trouble)

    def readiness(self) -> dict[str, object]:
        """Return the answer of `/ready`.

        Raises:
            APIError: 503, the server should get no requests now.
        """
        reason = self.not_ready()
        if reason is not None:
            raise APIError(503, reason, f"the server is not ready: {reason}", retry_after_s=5)
        engines = [model.engine_info() for model in self.models()]
        return {
            "status": "ready",  # anybody may ask, so no model is named
            "backends": sorted({engine.labels["backend"] for engine in engines}),
            "warnings": sorted({engine.warning for engine in engines if engine.warning}),
        }

    def _why_not(self, model: ServedModel) -> str | None:
        if model.name in self._held:
            return None  # it is closed on purpose, and requests wait
        if model.heartbeat.failed is not None:
            return "engine_dead"
        limit_s = model.heartbeat.patience_s if self._stall_s is None else self._stall_s
        if model.heartbeat.silent_s > limit_s:
            return "engine_stalled"
        return None

    @property
    def is_alive(self) -> bool:
        """Whether no engine hangs or has failed; otherwise a service manager should restart us."""
        return all(self._why_not(model) is None for model in self.open_models())

    def beat(self) -> None:
        """Check every engine; requests on one that hangs get an error."""
        for model in self.open_models():
            model.heartbeat.beat()
            if self._why_not(model) == "engine_stalled":
                _abort(model, stalled())

    @property
    def num_flights(self) -> int:
        """Number of requests that run now."""
        return sum(len(model.flights) + model.leases for model in self.open_models())

    def abort_all(self, error: APIError) -> None:
        """End every running request with an error."""
        for model in self.open_models():
            _abort(model, error)

    def close(self) -> None:
        """Close every model; blocks until their engines are free."""
        for model in self.open_models():
            model.llm.close()


def _abort(model: ServedModel, error: APIError) -> None:
    for flight in list(model.flights):
        flight.abort(error)
    for scoring in model.scoring:
        if not scoring.done():
            scoring.set_exception(error)


def _unavailable(code: str, message: str) -> APIError:
    return APIError(503, code, f"{message}; try again later", retry_after_s=5)
