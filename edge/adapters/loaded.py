"""Holds the adapters of one open bundle: those kept beside it, and those loaded by path."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np

from edge.bundle.manifest import Manifest
from edge.errors import ConfigError, RequestError

from .graph_inputs import read_section
from .library import check_name, stored_adapters, unknown_adapter
from .peft_file import adapter_files, read_adapter
from .weights import AdapterWeights

MOST_BYTES = 1 << 30
"""Limits the memory of adapters from beside the bundle; the least recently used are dropped."""


class Adapters:
    """Adapters by name; one that is kept beside the bundle is read when it is first asked for.

    Any thread may call. An answer holds the weights that it began with, so replacing or removing an
    adapter changes no answer that runs.

    Args:
        bundle: directory of the bundle.
        manifest: manifest of the bundle.
        backend: name of the engine; its floats decide in which type adapters stay in memory.
        trusted_keys: file of trusted keys, for `edge.adapters.trust`.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        backend: str = "ort-cpu",
        trusted_keys: Path | None = None,
    ) -> None:
        self._bundle, self._manifest, self._keys = bundle, manifest, trusted_keys
        is_half = backend != "ort-cpu" and manifest.dtype == "fp16"
        self._dtype = np.float16 if is_half else np.float32
        self._lock = threading.Lock()
        self._given: dict[str, AdapterWeights] = {}
        self._stored: dict[str, tuple[object, AdapterWeights]] = {}

    @property
    def names(self) -> list[str]:
        """Return the names that an answer may ask for, in order."""
        return sorted({*self._given, *stored_adapters(self._bundle)})

    def read(self, path: Path, name: str) -> AdapterWeights:
        """Read an adapter and check it against the bundle, without keeping it.

        Raises:
            ConfigError: the bundle takes no adapters.
            CheckpointError: `read_adapter` refuses the adapter.
        """
        section = read_section(self._manifest)
        if section is None:
            raise ConfigError(
                f"{self._bundle} takes no adapters; export it with --adapters RANK, or merge this "
                "one with --lora"
            )
        keys, known = self._keys, (self._manifest, section.rank)
        return read_adapter(
            path, name, *known, bundle=self._bundle, trusted_keys=keys, dtype=self._dtype
        )

    def load(self, path: Path, name: str | None = None) -> str:
        """Load an adapter into memory; it replaces a loaded one of the same name.

        Args:
            path: the directory that ``peft`` saved, or the file of its weights.
            name: name by which answers ask for it; None takes the directory's.

        Returns:
            The adapter's name.

        Raises:
            ConfigError: the bundle takes no adapters, or the name is invalid.
            CheckpointError: the adapter does not fit the bundle.
        """
        name = check_name(own_name(path) if name is None else name)
        weights = self.read(path, name)
        with self._lock:
            self._given[name] = weights
        return name

    def unload(self, name: str) -> None:
        """Drop an adapter that `load` loaded.

        Raises:
            RequestError: there is no loaded adapter of this name.
        """
        with self._lock:
            if self._given.pop(name, None) is None:
                raise RequestError(f"no adapter {name!r:.80} was loaded; see LLM.adapters.names")

    def is_loaded(self, name: str) -> bool:
        """Whether `load` has loaded this adapter."""
        return name in self._given

    def find(self, name: str) -> AdapterWeights:
        """Return an adapter by its name.

        Raises:
            RequestError: there is no adapter of this name.
            ConfigError, CheckpointError: the adapter beside the bundle cannot be read.
        """
        with self._lock:
            if (given := self._given.get(name)) is not None:
                return given
            known = stored_adapters(self._bundle)
            if name not in known:
                self._stored.pop(name, None)
                raise unknown_adapter(name, [*known, *self._given])
            path = known[name].resolve()  # both files of one version, where a link moves meanwhile
            found = map(Path.stat, adapter_files(path))
            stamp = [(each.st_ino, each.st_mtime_ns, each.st_size) for each in found]
            kept, weights = self._stored.pop(name, (None, None))
            if weights is None or kept != stamp:
                weights = self.read(path, name)
            self._stored[name] = stamp, weights  # at the end: the most recently used
            while len(self._stored) > 1 and self._stored_bytes() > MOST_BYTES:
                del self._stored[next(iter(self._stored))]
            return weights

    def _stored_bytes(self) -> int:
        return sum(each.num_bytes for _, each in self._stored.values())

    def take(self, name_or_path: str) -> str:
        """Return the name of an adapter; a path is loaded first.

        Raises:
            RequestError: it is neither a known name nor a path.
            ConfigError, CheckpointError: `load` refuses the path.
        """
        if name_or_path in self.names:
            return name_or_path
        path = Path(name_or_path)
        if "/" not in name_or_path and not path.exists():
            raise unknown_adapter(name_or_path, self.names)
        return self.load(path)


def own_name(path: Path) -> str:
    """Return the default name of an adapter: that of its directory."""
    path = path.absolute()
    return path.parent.name if path.suffix == ".safetensors" else path.name
