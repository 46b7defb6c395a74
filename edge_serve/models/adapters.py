"""Finds the adapters of the served models by ``MODEL:ADAPTER``, and loads and unloads them.

A name is looked up beside the bundle each time, so that ``edge-llm adapter add`` takes effect at
once. An adapter loaded by path stays while its model is replaced, unloaded and loaded again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from edge.errors import CheckpointError, ConfigError, EdgeError, RequestError
from edge_serve.http.errors import APIError, invalid
from edge_serve.settings import ServerSettings

if TYPE_CHECKING:
    from edge.adapters.loaded import Adapters
    from edge.adapters.weights import AdapterWeights
    from edge.bundle.manifest import Manifest

_log = logging.getLogger("edge_serve")


class Entry(Protocol):
    """The part of a `edge_serve.models.registry.ModelEntry` that this module uses."""

    name: str
    bundle: Path
    manifest: Manifest
    served: Any


class ChosenAdapter(NamedTuple):
    """The adapter of a request.

    Attributes:
        name: name of the adapter.
        read: returns its weights; blocks if they are not in memory.
    """

    name: str
    read: Callable[[], AdapterWeights]


class ServedAdapters:
    """The adapters of all models of a registry.

    Args:
        entries: returns the registry's models.
        trusted_keys: file of keys that must have signed adapters (`edge.adapters.trust`).
    """

    def __init__(
        self, entries: Callable[[], Sequence[Entry]], trusted_keys: Path | None = None
    ) -> None:
        self._entries, self._keys = entries, trusted_keys
        self._open: dict[str, tuple[Manifest, Adapters]] = {}
        self._given: dict[tuple[str, str], Path] = {}
        self._lock = threading.RLock()

    def names(self, entry: Entry) -> list[str]:
        """Return the names of a model's adapters, in order."""
        if "adapters" not in entry.manifest.extras:
            return []
        given = [name for model, name in self._given if model == entry.name]
        return sorted({*self._of(entry).names, *given})

    def split(self, name: str) -> tuple[str, ChosenAdapter | None]:
        """Split a request's name into the model that it stands for, and the adapter.

        It is ``MODEL:ADAPTER``, or as in vLLM an adapter's own name, if one model has it. Any other
        name comes back as it is.
        """
        entries = self._entries()
        if any(entry.name == name for entry in entries):
            return name, None
        found = [
            (entry, adapter)
            for entry in entries
            for adapter in self.names(entry)
            if name in (adapter, f"{entry.name}:{adapter}")
        ]
        if len(found) != 1:
            return name, None
        [(entry, adapter)] = found
        return entry.name, ChosenAdapter(adapter, lambda: self._find(entry, adapter))

    def load(self, entry: Entry, name: str, path: Path, *, replace: bool) -> None:
        """Take an adapter into memory; blocks.

        Args:
            entry: the adapter's model.
            name: name by which requests choose it.
            path: the adapter, from `allowed_path`.
            replace: whether it may replace one of that name.

        Raises:
            APIError: 400, it does not fit the model, or there is one of that name.
        """
        with self._lock:
            if not replace and name in self.names(entry):
                raise invalid(
                    f"lora_name: the adapter {name!r:.80} is loaded already; say load_inplace, or "
                    "unload it first",
                    "lora_name",
                )
            try:
                self._of(entry).load(path, name)
            except (CheckpointError, ConfigError) as error:
                raise invalid(f"lora_path: {error}", "lora_path") from error
            self._given[entry.name, name] = path
        _log.info("model %s has the adapter %s", entry.name, name)

    def unload(self, entry: Entry, name: str) -> None:
        """Forget an adapter that was loaded by path; answers in progress end with it.

        Raises:
            APIError: 404, there is no such adapter; or 409, it is kept beside the bundle.
        """
        with self._lock:
            if self._given.pop((entry.name, name), None) is not None:
                self._open.pop(entry.name, None)
                _log.info("model %s lost the adapter %s", entry.name, name)
                return
        if name in self.names(entry):
            raise APIError(
                409,
                "adapter_kept",
                f"the adapter {name!r} is kept beside the bundle; the operator removes it with "
                "edge-llm adapter rm",
            )
        raise APIError(404, "adapter_not_found", f"no adapter {name!r:.80} is loaded")

    def _of(self, entry: Entry) -> Adapters:
        from edge.adapters.loaded import Adapters

        with self._lock:
            known = self._open.get(entry.name)
            if known is None or known[0] is not entry.manifest:
                backend = entry.served.llm.backend.name if entry.served else "ort-cpu"
                adapters = Adapters(entry.bundle, entry.manifest, backend, self._keys)
                known = entry.manifest, adapters
                self._open[entry.name] = known
            return known[1]

    def _find(self, entry: Entry, name: str) -> AdapterWeights:
        adapters = self._of(entry)
        path = self._given.get((entry.name, name))
        try:
            if path is not None and not adapters.is_loaded(name):
                adapters.load(path, name)
            return adapters.find(name)
        except RequestError:
            raise
        except EdgeError as error:
            _log.error("the adapter %s of the model %s: %s", name, entry.name, error)
            raise APIError(
                503, "adapter_failed", f"the adapter {name!r} cannot be read; the log has the cause"
            ) from error


def may_use(settings: ServerSettings, client: str, adapter: str) -> bool:
    """Whether a client, named by its key, may use an adapter."""
    given = settings.key_adapters.get(client)
    return given is None or adapter in map(str.strip, given.split(","))


def allowed_path(settings: ServerSettings, given: str) -> Path:
    """Return the adapter that a request names, which must be below ``adapter_dir``.

    Raises:
        APIError: 403, it is not, or no directory is set; or 400, there is no adapter.
    """
    from edge.adapters.peft_file import adapter_files

    if settings.adapter_dir is None:
        raise APIError(
            403,
            "no_adapter_dir",
            "adapters are loaded by path only where the operator has set adapter_dir",
        )
    root = settings.adapter_dir.resolve()
    try:
        path = (root / given).resolve()
        paths = [path] if not path.is_relative_to(root) else adapter_files(path)
        is_below = all(each.resolve().is_relative_to(root) for each in paths)
    except (CheckpointError, OSError, ValueError) as error:  # a null character is a ValueError
        raise invalid(f"lora_path: {error}", "lora_path") from error
    if not is_below:
        raise APIError(403, "outside_adapter_dir", "lora_path: it leads out of adapter_dir")
    return path
