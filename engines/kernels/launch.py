"""Turns the shapes of an operation into kernel launches and their buffers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge.backends.tensorrt.launch_rules import BLOCK, NUMBERS, PRODUCT, PluginRule, Shape
from edge.errors import ConfigError

from .variants import BY_NAME, MAX_ROWS, Variant, gemm_name, gemv_name

GROUPS = (32, 64, 128)
_COLUMNS = 64  # per program of w4_gemv: 32 lanes with two columns each


@dataclass(frozen=True)
class Launch:
    """One kernel on the grid.

    Attributes:
        variant: kernel to launch.
        grid: number of programs along x, y and z.
        arguments: the arguments in order, each the name of a buffer of the `Job` or a number.
    """

    variant: Variant
    grid: tuple[int, int, int]
    arguments: tuple[str | int, ...]


Buffers = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]


@dataclass(frozen=True)
class Job:
    """An operation: kernels in order, on one stream, and the device memory that they take.

    Attributes:
        launches: the kernels in the order they run.
        buffers: shape and type by name; inputs, scratch and outputs, each 16 bytes aligned.
        outputs: names of the buffers that are outputs.
    """

    launches: tuple[Launch, ...]
    buffers: Buffers
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Tactic:
    """One way to run a plugin; each is correct for any size.

    Attributes:
        variant: kernel to launch.
        rows: output rows that a program computes; for attention, (head, token) pairs.
        columns: output columns that a program computes.
    """

    variant: Variant
    rows: int
    columns: int


def w4_tactics(planes: int) -> tuple[Tactic, ...]:
    """List the kernels that compute a product, each right for any number of rows: few rows first.

    TensorRT numbers a tactic by its place here plus one, and engines keep the number. So the order
    must not change.

    Args:
        planes: planes of the weights, 1 or 2.

    Raises:
        ConfigError: there are no kernels for this number of planes.
    """
    if planes not in (1, 2):
        raise ConfigError(f"w4_gemv takes one or two planes of weights, not {planes}")
    gemm = BY_NAME[gemm_name(planes)]
    return (
        *(Tactic(BY_NAME[gemv_name(rows, planes)], rows, _COLUMNS) for rows in (1, 2, 4, 8)),
        Tactic(gemm, int(gemm.constants["ROWS"]), int(gemm.constants["COLUMNS"])),
    )


def w4_places(usual: int, largest: int) -> tuple[int, ...]:
    """Choose the places in `w4_tactics` that are worth timing for this many rows.

    For few rows that is the kernel that reads the weights once for all of them. An lm_head usually
    has one row, but drafts want several: timing it with one row alone would choose a kernel that
    reads the weights again for each further row.

    Args:
        usual: rows that the profile is tuned for.
        largest: rows of the profile's largest step.
    """
    few = (1, 2, 4, MAX_ROWS)
    if usual > MAX_ROWS:
        return (len(few),)
    place = next(place for place, rows in enumerate(few) if rows >= min(largest, MAX_ROWS))
    return (place,) if usual == 1 else (place, len(few))


def w4_gemv(
    rows: int, columns: int, depth: int, *, group: int, planes: int = 1, bias: bool = False
) -> Job:
    """``y[rows, columns] = x[rows, depth] @ weights + bias``, weights from `layout.pack_weights`.

    Args:
        rows: 1 to 8.
        columns: columns of the weights.
        depth: rows of the weights, a multiple of the group.
        group: weights that share a scale: 32, 64 or 128.
        planes: 1 for INT4, 2 for INT8 in two planes, whose high scale is 16 times the low one.
        bias: whether to add a bias; without, buffer ``bias`` is one element that nobody reads.

    Raises:
        ConfigError: the kernel does not support these sizes.
    """
    if not 1 <= rows <= MAX_ROWS:
        raise ConfigError(f"w4_gemv takes 1 to {MAX_ROWS} rows, not {rows}")
    (place, *_) = w4_places(rows, rows)
    return product(w4_tactics(planes)[place], rows, columns, depth, group=group, bias=bias)


def w4_gemm(
    rows: int, columns: int, depth: int, *, group: int, planes: int = 1, bias: bool = False
) -> Job:
    """Compute `w4_gemv` for many rows, on tensor cores.

    Args:
        rows: any number.
        columns: columns of the weights.
        depth: rows of the weights, a multiple of the group.
        group: weights that share a scale: 32, 64 or 128.
        planes: 1 for INT4, 2 for INT8 in two planes.
        bias: whether to add a bias.

    Raises:
        ConfigError: the kernel does not support these sizes.
    """
    return product(w4_tactics(planes)[-1], rows, columns, depth, group=group, bias=bias)


def product(
    tactic: Tactic, rows: int, columns: int, depth: int, *, group: int, bias: bool = False
) -> Job:
    """Compute a product by one of `w4_tactics`.

    Args:
        tactic: kernel to use; it determines the number of planes, too.
        rows: any number.
        columns: columns of the weights.
        depth: rows of the weights, a multiple of the group.
        group: weights that share a scale: 32, 64 or 128.
        bias: whether to add a bias.

    Raises:
        ConfigError: the kernel does not support these sizes.
    """
    name, planes = tactic.variant.function, int(tactic.variant.constants["PLANES"])
    if group not in GROUPS:
        raise ConfigError(f"{name} takes groups of {GROUPS}, not {group}")
    if rows < 1 or columns < 1 or depth < 1 or depth % group:
        raise ConfigError(
            f"{name} takes a depth that is a multiple of the group {group}, not {depth}, "
            f"and at least one row and column, not {rows} and {columns}"
        )
    half, word = np.dtype(np.float16), np.dtype(np.int32)
    buffers: Buffers = {
        "x": ((rows, depth), half),
        "weights": ((depth // BLOCK, planes, columns, 4), word),
        "scales": ((depth // group, columns), half),
        "bias": ((columns if bias else 1,), half),
        "y": ((rows, columns), half),
    }
    # A plugin with one column always reads a bias; a product without one reads none here.
    shapes = [buffers[name][0] if name != "bias" or bias else (0,) for name in PRODUCT.inputs]
    return Job((launch_of(PRODUCT, tactic, shapes),), buffers, ("y",))


def launch_of(rule: PluginRule, tactic: Tactic, shapes: Sequence[Shape]) -> Launch:
    """Make the launch of a plugin's kernel.

    Args:
        rule: the plugin's rule.
        tactic: one of the plugin's kernels.
        shapes: shapes of the plugin's inputs.
    """
    grid, numbers = rule.launch(shapes, tactic, NUMBERS)
    counts: list[str | int] = [int(number) for number in numbers]
    return Launch(tactic.variant, grid, (*rule.inputs, *counts, *rule.outputs))
