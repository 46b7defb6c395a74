"""Rows of a slot as one array, where all cache tensors of a test have one shape."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.model.cache import Rows
from edge.model.slot_rows import SlotRows
from edge.runtime.prefix_store import Layout


def stacked(rows: SlotRows | None) -> NDArray[Any]:
    """``[tensors, kv_heads, length, dim]``, keys and values of layer after layer."""
    assert rows is not None
    return np.stack(list(rows.values()))


def tensor_name(index: int) -> str:
    """The name of a place in `stacked`."""
    return f"{index // 2}.{('key', 'value')[index % 2]}"


def by_name(rows: NDArray[Any]) -> SlotRows:
    """The inverse of `stacked`."""
    return SlotRows((tensor_name(index), each) for index, each in enumerate(rows))


def layout_of(tensors: int, rows: Rows, engine: str = "ort-cpu") -> Layout:
    """A layout of tensors that are all alike."""
    return Layout(engine, {tensor_name(index): rows for index in range(tensors)})


LAYOUT = layout_of(4, Rows(2, 8, "fp32"))


def random_rows(length: int, seed: int = 0) -> SlotRows:
    """Rows of `LAYOUT`."""
    rows = np.random.default_rng(seed).standard_normal((4, 2, length, 8))
    return by_name(rows.astype(np.float32))


def filled_rows(length: int, value: float = 1) -> SlotRows:
    """Rows of `LAYOUT` that hold one number."""
    return by_name(np.full((4, 2, length, 8), value, np.float32))
