"""Adapters of slots in the GPU's memory, of which a TensorRT engine binds the part of its slots.

All of it is there from the load on, since CUDA graphs hold addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.bundle.manifest import Manifest, ModelSpec

from .graph_inputs import Basis, read_basis, read_section, slot_values
from .slots import AdapterSlots

Copy = Callable[[int, "int | NDArray[Any]", int], None]
"""Copies bytes to an address, from another or from an array, which is read when it returns."""


class DeviceSlots(AdapterSlots):
    """See `AdapterSlots`.

    Args:
        address: of memory of `slots_bytes`, which is zeros.
        store: floats as the engine has them, two bytes each.
        copy: see `Copy`.
        clear: fills bytes at an address with zeros.
    """

    def __init__(
        self,
        model: ModelSpec,
        rank: int,
        basis: Basis,
        num_slots: int,
        *,
        address: int,
        store: Callable[[NDArray[Any]], NDArray[Any]],
        copy: Copy,
        clear: Callable[[int, int], None],
    ) -> None:
        super().__init__(model, rank, basis, num_slots, np.uint16)
        self._store, self._copy, self._clear = store, copy, clear
        self._base = address
        self._places: dict[str, tuple[int, int]] = {}  # the first slot's address, bytes of a slot
        for name, shape in self._shapes(1, rank):
            size = 2 * int(np.prod(shape))
            self._places[name] = address, size
            address += num_slots * size

    def bring(self, source: int, target: int) -> None:
        """Let one slot have what another has; nothing is copied where it has it."""
        self._active[target] = self._active[source]
        if self._held[target] != self._held[source]:
            self._held[target] = "?"
            for name, (_, size) in self._places.items():
                self._copy(self._address(name, target), self._address(name, source), size)
            self._held[target] = self._held[source]

    def _allocate(self) -> None:
        """It is there."""

    def _write(self, name: str, slot: int, values: NDArray[Any] | None) -> None:
        address, size = self._address(name, slot), self._places[name][1]
        if values is None:
            self._clear(address, size)
        else:
            self._copy(address, np.ascontiguousarray(self._store(values)), size)

    def _address(self, name: str, first: int) -> int:
        address, size = self._places[name]
        return address + first * size

    def _empty(self) -> int:
        return self._base


def slots_bytes(manifest: Manifest, num_slots: int) -> int:
    """The GPU's memory for the adapters of slots."""
    section = read_section(manifest)
    return 0 if section is None else 2 * num_slots * slot_values(manifest.model, section.rank)


def open_device_slots(
    bundle: Path, manifest: Manifest, num_slots: int, **memory: Any
) -> DeviceSlots:
    """Make the slots of a bundle that takes adapters; for ``memory`` see `DeviceSlots`."""
    section = read_section(manifest)
    assert section is not None, "the bundle takes no adapters"
    basis = read_basis(bundle, manifest)
    return DeviceSlots(manifest.model, section.rank, basis, num_slots, **memory)
