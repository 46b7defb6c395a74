"""Mirrors the slots' adapters on a device to which only whole tensors can be copied."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.bundle.manifest import Manifest

from .slots import AdapterSlots, adapt

Store = Callable[[NDArray[Any]], NDArray[Any]]


class MirroredSlots(AdapterSlots):
    """`AdapterSlots` with a copy on the device; a step first copies what it needs and has changed.

    Args:
        cache: an `edge.backends.ort.device_cache.OrtDeviceCache`, which uploads arrays.
        store: converts floats to the device's type.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        num_slots: int,
        *,
        cache: Any,
        store: Store,
        idle_rank: int,
    ) -> None:
        dtype = store(np.zeros(1, np.float32)).dtype
        super().__init__(bundle, manifest, num_slots, dtype, idle_rank=idle_rank)
        self._store, self._upload = store, cache.upload
        self._there: dict[str, Any] = {}
        self._nowhere = cache.upload(self._nothing)
        self._stale = False

    def settle(self, slots: Iterable[int]) -> None:
        """Zero slots without an adapter as the base class does, and copy changes to the device."""
        super().settle(slots)
        if self._stale:
            for name, block in self._blocks.items():
                if name in self._there:
                    self._there[name].owner.update_inplace(block)
                else:
                    self._there[name] = self._upload(block)
            self._stale = False

    def _write(self, name: str, slot: int, values: NDArray[Any] | None) -> None:
        super()._write(name, slot, None if values is None else self._store(values))
        self._stale = True

    def _address(self, name: str, first: int) -> int:
        address: int = self._there[name].address
        return address + first * self._blocks[name].strides[0]

    def _empty(self) -> int:
        address: int = self._nowhere.address
        return address


def adapt_device(
    backend: Any, runner: Any, bundle: Path, manifest: Manifest, cache: Any, store: Store
) -> None:
    """Let an ONNX Runtime backend on a device take adapters, by `adapt` with `MirroredSlots`."""
    element = 16 if manifest.dtype == "bf16" else cache.dtype.type  # as `device_step` has them
    place = (cache.device.name, cache.device.index, element)
    kind = partial(MirroredSlots, cache=cache, store=store)
    adapt(backend, runner, bundle, manifest, place=place, kind=kind)
