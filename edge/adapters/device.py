"""Keeps each slot's adapter in GPU memory; a TensorRT step binds the part of its slots.

All memory is allocated when the engine is loaded, since CUDA graphs hold addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.bundle.manifest import Manifest

from .graph_inputs import read_section, slot_values
from .slots import AdapterSlots

Copy = Callable[[int, "int | NDArray[Any]", int], None]
"""Copies bytes to an address, from an address or an array; the array is read before it returns."""


class DeviceSlots(AdapterSlots):
    """`AdapterSlots` in the memory of a GPU.

    Args:
        address: address of `slots_bytes` bytes of zeroed memory.
        store: converts floats to the engine's type, two bytes each.
        copy: copies bytes as `Copy` says.
        clear: fills bytes at an address with zeros.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        num_slots: int,
        *,
        address: int,
        store: Callable[[NDArray[Any]], NDArray[Any]],
        copy: Copy,
        clear: Callable[[int, int], None],
    ) -> None:
        super().__init__(bundle, manifest, num_slots, np.uint16)
        self._store, self._copy, self._clear = store, copy, clear
        self._base = address
        self._places: dict[str, tuple[int, int]] = {}  # address of the first slot, bytes per slot
        for name, shape in self._shapes(1, self.rank):
            size = 2 * int(np.prod(shape))
            self._places[name] = address, size
            address += num_slots * size

    def bring(self, source: int, target: int) -> None:
        """Copy one slot's adapter to another slot, unless it is there already."""
        self._active[target] = self._active[source]
        if self._held[target] != self._held[source]:
            self._held[target] = "?"
            for name, (_, size) in self._places.items():
                self._copy(self._address(name, target), self._address(name, source), size)
            self._held[target] = self._held[source]

    def _allocate(self) -> None:
        """Do nothing: the memory was allocated at load."""

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
    """Return how many bytes of GPU memory the adapters of all slots need."""
    section = read_section(manifest)
    return 0 if section is None else 2 * num_slots * slot_values(manifest.model, section.rank)
