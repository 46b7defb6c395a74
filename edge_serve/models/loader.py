"""Loads models when requests ask for them, and unloads those that are idle.

One model is opened or closed at a time. A model is unloaded `ServedModel.keep_alive_s` after its
last request; and if another needs its memory, the longest idle goes first. No model is unloaded
while a request holds it. A request for a model that is being unloaded loads it again.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edge.backends.ort.int8_prompts import int8_bytes
from edge.bundle.io_spec import kv_bytes_per_token
from edge.bundle.manifest import HeadManifest, Manifest, head_manifest, read_manifest
from edge.bundle.trust import open_manifest
from edge.engine_config import EAGLE3, Prefill
from edge.errors import EdgeError, OverloadError
from edge_serve.http.errors import APIError, draining
from edge_serve.http.memory import give_back
from edge_serve.http.threads import in_daemon
from edge_serve.settings import ServerSettings

from .bundle_text import read_bundle_text
from .limits import opening_bytes
from .registry import ModelEntry, ModelRegistry, ServedModel

if TYPE_CHECKING:
    from edge_serve.observe.metrics import Metrics

_log = logging.getLogger("edge_serve")
_FIRST_RETRY_S, _LAST_RETRY_S = 1.0, 60.0
_BUSY_S = 5.0  # seconds after which to ask again if busy models leave no room
_FAILED_S = 600.0  # how long no request unloads others for a model that has failed
_MIB = 2**20
Reason = Literal["idle", "room", "asked"]
"""Why a model is unloaded: it was idle, another needs its memory, or somebody asked for it."""


def need_bytes(
    manifest: Manifest,
    num_slots: int,
    kv_capacity: int | None,
    prefill: Prefill = "plain",
    draft: Manifest | None = None,
) -> int:
    """Compute the most memory of a bundle: its files, the KV cache, prompts' weights.

    Args:
        manifest: the bundle's manifest.
        num_slots: slots of its cache.
        kv_capacity: tokens of a slot; None is the bundle's own.
        prefill: how prompts are multiplied.
        draft: manifest of the bundle or head that drafts for it, whose cache is as long.

    Raises:
        ConfigError: the bundle has no weights for this ``prefill``.
    """
    capacity = kv_capacity or manifest.kv_capacity
    prompts = int8_bytes(manifest) if prefill == "int8" else 0
    files = sum(file.num_bytes for file in manifest.files.values())
    cache = (
        num_slots
        * capacity
        * kv_bytes_per_token(manifest.model, manifest.dtype, manifest.int8_layers)
    )
    own = prompts + files + cache
    if isinstance(draft, HeadManifest):  # its files are among the bundle's
        return own + num_slots * capacity * kv_bytes_per_token(draft.model, draft.dtype)
    return own if draft is None else own + need_bytes(draft, num_slots, capacity)


class Loader:
    """Loads and unloads the models of a registry; only the event loop's thread may call it.

    Args:
        models: the registry.
        settings: how models are opened, how long they stay, and their memory.
        room_bytes: returns the memory that this process can still have; None if it is unknown.
        metrics: counts loads and unloads.

    Attributes:
        lock: held while a model is opened, closed or replaced.
    """

    def __init__(
        self,
        models: ModelRegistry,
        settings: ServerSettings,
        room_bytes: Callable[[], int | None],
        metrics: Metrics,
    ) -> None:
        self._models = models
        self._settings = settings
        self._room_bytes = room_bytes
        self._metrics = metrics
        self.lock = asyncio.Lock()
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._waiting: Counter[str] = Counter()  # requests that wait for a model, by its name
        self._pressing: set[str] = set()  # models that are loaded in place of idle ones
        self._unloads: set[asyncio.Task[None]] = set()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._stopping: asyncio.Future[None] | None = None
        models.load_for = self.load_for

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Hold `lock`, unless the server is about to stop by the time it is free.

        Raises:
            APIError: 503, the server is about to stop.
        """
        async with self.lock:
            if self._models.is_draining:
                raise draining()
            yield

    # ------------------------------------------------------------------------------- memory

    def need_bytes(self, manifest: Manifest) -> int:
        """Compute the most memory of a bundle and its draft model; reads files.

        Raises:
            EdgeError: the draft's bundle cannot be read, or the bundle lacks weights.
        """
        settings = self._settings
        draft: Manifest | None = None
        if settings.draft == EAGLE3:
            draft = head_manifest(manifest)
        elif settings.draft is not None:
            draft = read_manifest(settings.draft)
        sizes = settings.num_slots, settings.kv_capacity, settings.prefill
        return need_bytes(manifest, *sizes, draft)

    def peak_bytes(self, bundle: Path, manifest: Manifest) -> int:
        """Compute the most memory of a bundle; without a memory budget also while it is opened.

        Raises:
            EdgeError: the draft's bundle cannot be read, or the bundle lacks weights.
        """
        need = self.need_bytes(manifest)
        if self._settings.memory_budget_mb is None:
            return max(need, opening_bytes(self._settings, bundle))
        return need

    def free_bytes(self) -> int | None:
        """Return the memory for a model beside the open ones; None if it is unknown."""
        if self._settings.memory_budget_mb is None:
            return self._room_bytes()
        taken = sum(map(self._taken_bytes, self._models.open_models()))
        return self._settings.memory_budget_mb * _MIB - taken

    def _taken_bytes(self, model: ServedModel) -> int:
        settings = self._settings
        sizes = settings.num_slots, settings.kv_capacity, settings.prefill
        return need_bytes(model.llm.manifest, *sizes, model.llm.draft_manifest)

    def later(self, name: str, bundle: Path) -> ModelEntry | None:
        """Return the entry of a model that does not fit beside the open ones; None if it does.

        Raises:
            EdgeError: its manifest cannot be read, or is not to be trusted.
        """
        settings = self._settings
        manifest = open_manifest(bundle, settings.trusted_keys)
        need, free = self.peak_bytes(bundle, manifest), self.free_bytes()
        if free is None or need <= free:
            return None
        _log.warning(
            "model %s starts unloaded: it needs %d MiB, and %d MiB are left beside the others (%s);"
            " the first request for it loads it in the place of one that is idle",
            name,
            need / _MIB,
            max(0, free) / _MIB,
            "the free memory" if settings.memory_budget_mb is None else "memory_budget_mb",
        )
        capacity = settings.kv_capacity or manifest.kv_capacity
        reasons = read_bundle_text(bundle, manifest, capacity).reasons
        return ModelEntry(name, bundle, manifest, int(time.time()), capacity, reasons)

    async def make_room(self, entry: ModelEntry, need: int, *, unloads: bool = True) -> None:
        """Unload idle models, the longest idle first, until another fits; `lock` is held.

        Args:
            entry: the model to make room for, which is not loaded.
            need: bytes that it takes.
            unloads: whether models may be unloaded for it.

        Raises:
            APIError: 503, busy models leave no room for it, or one would have to be unloaded and
                must not be.
        """
        free = await in_daemon(self.free_bytes)
        while free is not None and need > free:  # a request may come while a model is closed
            loaded = self._models.models()
            idle = sorted(
                (model for model in loaded if not self._is_used(model)), key=lambda m: m.used_s
            )
            busy = [model.name for model in self._models.open_models() if model not in idle]
            most = free + sum(map(self._taken_bytes, idle))
            if need > most and busy:
                raise APIError(
                    503,
                    "no_room",
                    f"the model {entry.name!r} needs {need / _MIB:.0f} MiB, and "
                    f"{max(0, most) / _MIB:.0f} MiB can be had beside the models that answer now "
                    f"({', '.join(busy)}); try again when they are done, or have the operator "
                    "raise memory_budget_mb",
                    retry_after_s=_BUSY_S,
                )
            if not idle:
                return
            if not unloads:
                raise self._failed(
                    entry,
                    _LAST_RETRY_S,
                    f"for {_FAILED_S / 60:.0f} minutes no other model is unloaded for it, unless "
                    "the operator loads it by hand",
                )
            await self._close(self._models.entry(idle[0].name), "room")
            free = await in_daemon(self.free_bytes)

    # ------------------------------------------------------------------------------- loading

    async def load_for(self, entry: ModelEntry, asked_s: float) -> None:
        """Load a model for a request, which waits at most as long as it may take.

        A model that has just failed gets no other's memory, since it may well fail again.

        Args:
            entry: the model's entry.
            asked_s: monotonic seconds at which the request came.

        Raises:
            APIError: 503, it cannot be loaded now; or 504, it takes too long.
            OverloadError: too many requests wait for it.
        """
        if (wait_s := entry.retry_s - time.monotonic()) > 0:
            raise self._failed(entry, wait_s)
        await self.load(entry, asked_s, unloads=not entry.failures or wait_s < -_FAILED_S)

    async def load(
        self, entry: ModelEntry, asked_s: float | None = None, *, unloads: bool = True
    ) -> None:
        """Load a model if it is not loaded, even if that has just failed.

        Args:
            entry: the model's entry.
            asked_s: monotonic seconds at which the request came; None is now.
            unloads: whether idle models make room for it.

        Raises:
            APIError: 503, it cannot be loaded now; or 504, it takes too long.
            OverloadError: too many requests wait for it.
        """
        if entry.served is not None:
            return None
        if self._models.is_draining:
            raise draining()
        if self._waiting[entry.name] >= max(1, self._settings.queue_capacity):
            raise OverloadError(
                f"too many requests wait for the model {entry.name!r} to be loaded; try again "
                "later",
                _BUSY_S,
            )
        if self._stopping is None:
            self._stopping = asyncio.get_running_loop().create_future()
        most_s = self._settings.request_timeout_s
        if most_s is not None and asked_s is not None:
            most_s = max(0.0, asked_s + most_s - time.monotonic())
        if unloads:
            self._pressing.add(entry.name)
        self._waiting[entry.name] += 1
        try:
            return await self._join(entry, self._stopping, most_s)
        finally:
            self._waiting[entry.name] -= 1

    async def _join(
        self, entry: ModelEntry, stopping: asyncio.Future[None], most_s: float | None
    ) -> None:
        """Wait for the load of a model; start it unless it is already in progress."""
        task = self._loads.get(entry.name)
        if task is None:
            task = self._loads[entry.name] = asyncio.create_task(self._load(entry))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        waiting: set[asyncio.Future[Any]] = {task, stopping}
        await asyncio.wait(waiting, timeout=most_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if stopping.done():
            raise draining()
        raise APIError(
            504,
            "deadline_exceeded",
            f"the model {entry.name!r} was not loaded in the time that a request may take; try "
            "again later",
            retry_after_s=5,
            should_retry=False,
        )

    async def _load(self, entry: ModelEntry) -> None:
        try:
            async with self.turn():
                if entry.served is None:  # a reload may have opened it meanwhile
                    await self._open(entry)
        finally:
            del self._loads[entry.name]
            self._pressing.discard(entry.name)

    async def _open(self, entry: ModelEntry) -> None:
        started = time.monotonic()
        entry.is_loading = True
        try:
            peak = await in_daemon(partial(self.peak_bytes, entry.bundle, entry.manifest))
            await self.make_room(entry, peak, unloads=entry.name in self._pressing)
            llm = await in_daemon(lambda: self._models.open(entry.bundle))
        except APIError:
            raise
        except Exception as error:
            log = _log.error if isinstance(error, EdgeError) else _log.exception
            log("model %s cannot be loaded: %s", entry.name, error)
            self._metrics.observe_load(entry.name, None)
            wait_s = min(_FIRST_RETRY_S * 2**entry.failures, _LAST_RETRY_S)
            entry.retry_s = time.monotonic() + wait_s
            entry.failures += 1
            entry.failed = str(error) if isinstance(error, EdgeError) else "see the server's log"
            raise self._failed(entry, wait_s) from error
        finally:
            entry.is_loading = False
        if self._models.is_draining:
            await in_daemon(llm.close)
            raise draining()
        self.put(ServedModel(entry.name, entry.bundle, llm))
        took_s = time.monotonic() - started
        self._metrics.observe_load(entry.name, took_s)
        _log.info("model %s is loaded after %.1f s", entry.name, took_s)

    def put(self, model: ServedModel) -> None:
        """Serve an open model, and unload it once it has been idle for long enough."""
        self._models.add(model)
        self.watch(model)

    def watch(self, model: ServedModel) -> None:
        """Unload a model once it has been idle for long enough."""
        model.keep_alive_s = self._settings.keep_alive_s
        model.on_rest = partial(self._rests, model)
        model.touch()

    @staticmethod
    def _failed(entry: ModelEntry, wait_s: float, then: str = "it is tried again") -> APIError:
        return APIError(
            503,
            "load_failed",
            f"the model {entry.name!r} could not be loaded: {entry.failed}; {then}",
            retry_after_s=wait_s,
        )

    # ------------------------------------------------------------------------------- unloading

    def _is_used(self, model: ServedModel) -> bool:
        """Whether a request holds a model, or has waited for it and is about to."""
        return model.is_used or self._waiting[model.name] > 0

    def _rests(self, model: ServedModel) -> None:
        """Start the timer of a model that no request holds."""
        if self._models.entry(model.name).served is not model:
            return  # it was replaced; the new model has its own timer
        timer = self._timers.pop(model.name, None)
        if timer is not None:
            timer.cancel()
        if math.isfinite(model.keep_alive_s) and not self._models.is_draining:
            loop = asyncio.get_running_loop()
            left_s = max(0.0, model.expires_s - time.monotonic())
            self._timers[model.name] = loop.call_later(left_s, self._expire, model)

    def _expire(self, model: ServedModel) -> None:
        self._timers.pop(model.name, None)
        if not self._is_used(model):  # otherwise its last request starts the timer
            task = asyncio.create_task(self._unload_idle(model))
            self._unloads.add(task)  # the loop itself keeps only a weak reference
            task.add_done_callback(self._unloads.discard)

    async def unload(self, entry: ModelEntry) -> bool:
        """Unload a model after pending loads and closes; return False if a request holds it.

        Raises:
            APIError: 503, the server is about to stop.
        """
        async with self.turn():
            if entry.served is None:
                return True
            if self._is_used(entry.served):
                return False
            await self._close(entry, "asked")
            return True

    async def _unload_idle(self, model: ServedModel) -> None:
        async with self.lock:
            entry = self._models.entry(model.name)
            if self._models.is_draining or entry.served is not model or self._is_used(model):
                return
            if model.expires_s > time.monotonic():
                self._rests(model)  # a request came while this waited
            else:
                await self._close(entry, "idle")

    async def _close(self, entry: ModelEntry, reason: Reason) -> None:
        """Close the open bundle of an entry; `lock` is held."""
        model = self._models.retire(entry)
        assert model is not None
        timer = self._timers.pop(entry.name, None)
        if timer is not None:
            timer.cancel()
        try:
            await in_daemon(model.llm.close)
        except Exception:  # noqa: BLE001 - logged; it takes no requests any more
            _log.exception("model %s was not closed", entry.name)
        self._models.forget(model)
        self._metrics.observe_unload(entry.name, reason)
        _log.info("model %s is unloaded (%s)", entry.name, reason)
        del model
        await in_daemon(give_back)

    # ------------------------------------------------------------------------------- the end

    def drain(self) -> None:
        """Load and unload nothing from now on; refuse requests that wait for a model."""
        if self._stopping is not None and not self._stopping.done():
            self._stopping.set_result(None)
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
