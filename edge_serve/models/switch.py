"""Replaces a model under load: beside the old one where memory allows, else in its place.

A new bundle has to open and to answer before it gets a request. If it does not, the old one goes
on, or is opened again. No request fails because of a switch: running requests finish on the old
model, and if there is a gap, new ones wait.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from edge.backends.ort.int8_prompts import int8_bytes
from edge.bundle.io_spec import kv_bytes_per_token
from edge.bundle.manifest import HeadManifest, Manifest, head_manifest, read_manifest
from edge.engine_config import EAGLE3, Prefill
from edge.errors import BackendError, EdgeError
from edge.runtime.sampling_params import SamplingParams
from edge_serve.http.threads import in_thread

from .registry import ModelRegistry, ServedModel

if TYPE_CHECKING:
    from edge.runtime.llm import LLM

_log = logging.getLogger("edge_serve")
_POLL_S = 0.02


def need_bytes(
    manifest: Manifest,
    num_slots: int,
    kv_capacity: int | None,
    prefill: Prefill = "plain",
    draft: Manifest | None = None,
) -> int:
    """Compute the memory that a bundle takes at most: its files, the KV cache, prompts' weights.

    Args:
        manifest: of the bundle.
        num_slots: slots of its cache.
        kv_capacity: tokens of a slot; None is the bundle's own.
        prefill: how prompts are multiplied.
        draft: of the bundle or head that drafts for it, whose cache is as long.

    Raises:
        ConfigError: the bundle has no weights for such a ``prefill``.
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


class Switcher:
    """Replaces the models of a registry, one at a time.

    Args:
        models: the registry.
        free_bytes: returns the memory that a second model may take now; None if that is not known.
        num_slots: slots of each cache.
        kv_capacity: tokens of a slot; None is each bundle's own.
        prefill: how prompts are multiplied.
        draft: bundle that drafts for each of them, or `EAGLE3` for their own heads, if any.
        drain_timeout_s: how long requests may run on a model that must be closed first.
    """

    def __init__(
        self,
        models: ModelRegistry,
        free_bytes: Callable[[], int | None],
        *,
        num_slots: int,
        kv_capacity: int | None = None,
        prefill: Prefill = "plain",
        draft: Path | None = None,
        drain_timeout_s: float = 30.0,
    ) -> None:
        self._models = models
        self._free_bytes = free_bytes
        self._num_slots = num_slots
        self._kv_capacity = kv_capacity
        self._prefill = prefill
        self._draft = draft
        self._drain_timeout_s = drain_timeout_s
        self._lock = asyncio.Lock()
        self._retiring: set[asyncio.Task[None]] = set()

    async def switch(self, name: str, bundle: Path) -> None:
        """Serve ``bundle`` under ``name`` from now on.

        Raises:
            EdgeError: the bundle cannot be served; everything is as it was.
            Whatever else the opening raises, e.g. MemoryError; likewise.
        """
        async with self._lock:
            old = self._models.get(name)
            started = time.monotonic()
            try:
                manifest = await in_thread(lambda: read_manifest(bundle))
                need = await in_thread(lambda: self._need_bytes(manifest))
                free = await in_thread(self._free_bytes)
                beside = free is None or need <= free
                if beside:
                    llm = await in_thread(lambda: self._open(bundle))
                    self._models.add(ServedModel(name, bundle, llm))
                    self._retire(old)
                else:
                    await self._replace(old, bundle)
            except EdgeError as error:
                _log.error("model %s stays as it is: %s", name, error)
                raise
            except Exception:
                _log.exception("model %s stays as it is", name)
                raise
            _log.info(
                "model %s is another bundle after %.1f s, opened %s",
                name,
                time.monotonic() - started,
                "beside the old one" if beside else "in its place",
            )

    def _need_bytes(self, manifest: Manifest) -> int:
        draft: Manifest | None = None
        if self._draft == EAGLE3:
            draft = head_manifest(manifest)
        elif self._draft is not None:
            draft = read_manifest(self._draft)
        return need_bytes(manifest, self._num_slots, self._kv_capacity, self._prefill, draft)

    async def _replace(self, old: ServedModel, bundle: Path) -> None:
        with self._models.held(old.name):
            await self._until_unused(old)
            await in_thread(old.llm.close)
            try:
                llm = await in_thread(lambda: self._open(bundle))
            except Exception:
                again = await in_thread(lambda: self._open(old.bundle))
                self._put(ServedModel(old.name, old.bundle, again), old)
                raise
            self._put(ServedModel(old.name, bundle, llm), old)

    def _put(self, new: ServedModel, old: ServedModel) -> None:
        self._models.add(new)
        self._models.forget(old)

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
