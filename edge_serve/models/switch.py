"""Replaces a model under load: beside the old one if memory allows, else in its place.

A new bundle has to open and to answer before it gets a request. If it does not, the old one
continues, or is opened again. No request fails because of a switch: running requests finish on the
old model, and if there is a gap, new ones wait. If the model is not loaded, its new bundle is
loaded, since only that shows that it can be served.
"""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from edge.bundle.manifest import read_manifest
from edge.errors import BackendError, EdgeError
from edge.runtime.sampling_params import SamplingParams
from edge_serve.http.errors import APIError
from edge_serve.http.threads import in_daemon, in_thread

from .loader import Loader
from .registry import ModelEntry, ModelRegistry, ServedModel

if TYPE_CHECKING:
    from edge.runtime.llm import LLM

_log = logging.getLogger("edge_serve")
_POLL_S = 0.02
_LOST = "is not loaded any more, and the next request tries its old bundle again"


class Switcher:
    """Replaces the models of a registry, one at a time.

    Args:
        models: the registry.
        loader: knows the memory that a second model may take.
        drain_timeout_s: seconds that requests may run on a model that must be closed first.
    """

    def __init__(
        self, models: ModelRegistry, loader: Loader, *, drain_timeout_s: float = 30.0
    ) -> None:
        self._models = models
        self._loader = loader
        self._drain_timeout_s = drain_timeout_s
        self._retiring: set[asyncio.Task[None]] = set()

    async def switch(self, name: str, bundle: Path) -> None:
        """Serve ``bundle`` under ``name`` from now on.

        Raises:
            APIError: 503, the server is about to stop, or there is no room; nothing has changed.
            EdgeError: the bundle cannot be served; nothing has changed, except that the model is
                not loaded if the old bundle cannot be opened again.
            Exception: opening it raised another error, e.g. MemoryError; the same holds.
        """
        async with self._loader.turn():
            entry = self._models.entry(name)
            old = entry.served
            started = time.monotonic()
            try:
                manifest = await in_thread(lambda: read_manifest(bundle))
                need = await in_thread(lambda: self._loader.peak_bytes(bundle, manifest))
                if old is None:
                    await self._loader.make_room(entry, need)
                free = await in_thread(self._loader.free_bytes)
                beside = old is None or free is None or need <= free
                if old is not None and not beside:
                    await self._replace(entry, old, bundle)
                else:
                    llm = await in_daemon(lambda: self._open(bundle))
                    self._loader.put(ServedModel(name, bundle, llm))
                    if old is not None:
                        self._retire(old)
            except Exception as error:
                log = _log.error if isinstance(error, EdgeError | APIError) else _log.exception
                is_lost = old is not None and entry.served is None
                log("model %s %s: %s", name, _LOST if is_lost else "stays as it is", error)
                raise
            _log.info(
                "model %s is another bundle after %.1f s, opened %s",
                name,
                time.monotonic() - started,
                "beside the old one" if beside else "in its place",
            )

    async def _replace(self, entry: ModelEntry, old: ServedModel, bundle: Path) -> None:
        with self._models.held(old.name):
            await self._until_unused(old)
            await in_thread(old.llm.close)
            self._models.retire(entry)
            self._models.forget(old)
            try:
                llm = await in_daemon(lambda: self._open(bundle))
            except Exception as error:
                _log.warning("model %s opens its old bundle again: %s", old.name, error)
                again = await in_daemon(lambda: self._open(old.bundle))
                self._loader.put(ServedModel(old.name, old.bundle, again))
                raise
            self._loader.put(ServedModel(old.name, bundle, llm))

    def _open(self, bundle: Path) -> LLM:
        """Open a bundle and generate two tokens: a model whose logits are NaN is not served."""
        llm = self._models.open(bundle)
        try:
            first = llm.manifest.tokens.bos
            prompt = [0 if first is None else first]
            if not list(llm.generate_ids(prompt, SamplingParams(max_tokens=2, ignore_eos=True))):
                raise BackendError("the new model did not answer")
        except BaseException:
            llm.close()
            raise
        return llm

    def _retire(self, old: ServedModel) -> None:
        async def close() -> None:
            while old.is_used:
                await asyncio.sleep(_POLL_S)
            try:
                await in_thread(old.llm.close)
            except Exception:  # noqa: BLE001 - logged; nobody awaits this task
                _log.exception("the bundle that model %s had before was not closed", old.name)
            else:
                _log.info("the bundle that model %s had before is closed", old.name)
            self._models.forget(old)

        task = asyncio.create_task(close())
        self._retiring.add(task)  # the loop itself keeps only a weak reference
        task.add_done_callback(self._retiring.discard)

    async def _until_unused(self, model: ServedModel) -> None:
        deadline = time.monotonic() + self._drain_timeout_s
        while model.is_used:
            if time.monotonic() > deadline:
                raise BackendError(
                    f"requests still ran after {self._drain_timeout_s:g} s; try again later"
                )
            await asyncio.sleep(_POLL_S)
