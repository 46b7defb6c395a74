"""From the shapes of an operation to the kernels that are launched for it, and their buffers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge.backends.tensorrt.launch_rules import BLOCK, NUMBERS, PRODUCT, PluginRule, Shape
from edge.errors import ConfigError

from .variants import (
    BY_NAME,
    MAX_ROWS,
    Variant,
    gemm_name,
    gemv_name,
)

GROUPS = (32, 64, 128)
_COLUMNS = 64  # of a program of w4_gemv: 32 lanes, two each


@dataclass(frozen=True)
class Launch:
    """One kernel on the grid.

    Attributes:
        variant: what is launched.
        grid: programs along x, y and z.
        arguments: by position: the name of a buffer of the `Job`, or a number.
    """

    variant: Variant
    grid: tuple[int, int, int]
    arguments: tuple[str | int, ...]


Buffers = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]


@dataclass(frozen=True)
class Job:
    """An operation: kernels in order, on one stream, and the device memory that they take.

    Attributes:
        launches: in order.
        buffers: shape and type by name; inputs, scratch and outputs, each 16 bytes aligned.
        outputs: which of them are.
    """

    launches: tuple[Launch, ...]
    buffers: Buffers
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Tactic:
    """One way to compute what a plugin does, right for any size.

    Attributes:
        variant: what is launched.
        rows: of the output, that a program computes; of an attention, heads of tokens.
        columns: of the output, that a program computes.
    """

    variant: Variant
    rows: int
    columns: int


def w4_tactics(planes: int) -> tuple[Tactic, ...]:
    """The ways to compute a product, each right for any number of rows: few first, then many.

    TensorRT's number of a tactic is its place here plus one, and engines keep it: the order stays.

    Args:
        planes: 1 or 2.

    Raises:
        ConfigError: another number of planes.
    """
    if planes not in (1, 2):
        raise ConfigError(f"w4_gemv takes one or two planes of weights, not {planes}")
    gemm = BY_NAME[gemm_name(planes)]
    return (
        *(Tactic(BY_NAME[gemv_name(rows, planes)], rows, _COLUMNS) for rows in (1, 2, 4, 8)),
        Tactic(gemm, int(gemm.constants["ROWS"]), int(gemm.constants["COLUMNS"])),
    )


def w4_places(usual: int, largest: int) -> tuple[int, ...]:
    """Places in `w4_tactics` that are worth timing for so many rows.

    Of few rows it is the product that reads the weights once for all of them. Where one row is
    usual and more may come, as of logits, which drafts want several of, that is the one for these
    too: a timing by one row alone would read the weights of the lm_head anew for each.

    Args:
        usual: rows that an engine is tuned for.
        largest: rows of its largest step.
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
        columns: of the weights.
        depth: a multiple of the group.
        group: weights that share a scale: 32, 64 or 128.
        planes: 1 for INT4, 2 for INT8 in two planes, whose high scale is 16 times the low one.
        bias: whether one is added; without, buffer ``bias`` is one element that nobody reads.

    Raises:
        ConfigError: the kernel does not serve this.
    """
    if not 1 <= rows <= MAX_ROWS:
        raise ConfigError(f"w4_gemv takes 1 to {MAX_ROWS} rows, not {rows}")
    (place, *_) = w4_places(rows, rows)
    return product(w4_tactics(planes)[place], rows, columns, depth, group=group, bias=bias)


def w4_gemm(
    rows: int, columns: int, depth: int, *, group: int, planes: int = 1, bias: bool = False
) -> Job:
    """`w4_gemv` for many rows, on tensor cores.

    Args:
        rows: any number.
        columns: see `w4_gemv`.
        depth: see `w4_gemv`.
        group: see `w4_gemv`.
        planes: see `w4_gemv`.
        bias: see `w4_gemv`.

    Raises:
        ConfigError: the kernel does not serve this.
    """
    return product(w4_tactics(planes)[-1], rows, columns, depth, group=group, bias=bias)


def product(
    tactic: Tactic, rows: int, columns: int, depth: int, *, group: int, bias: bool = False
) -> Job:
    """A product by one of `w4_tactics`.

    Args:
        tactic: which also says how many planes the weights have.
        rows: any number.
        columns: see `w4_gemv`.
        depth: see `w4_gemv`.
        group: see `w4_gemv`.
        bias: see `w4_gemv`.

    Raises:
        ConfigError: the kernel does not serve this.
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
    # A plugin of one column reads its bias in any case; here nobody does where there is none.
    shapes = [buffers[name][0] if name != "bias" or bias else (0,) for name in PRODUCT.inputs]
    return Job((launch_of(PRODUCT, tactic, shapes),), buffers, ("y",))


def launch_of(rule: PluginRule, tactic: Tactic, shapes: Sequence[Shape]) -> Launch:
    """The launch of a plugin's kernel.

    Args:
        rule: of the plugin.
        tactic: one of its kernels.
        shapes: of its inputs.
    """
    grid, numbers = rule.launch(shapes, tactic, NUMBERS)
    counts: list[str | int] = [int(number) for number in numbers]
    return Launch(tactic.variant, grid, (*rule.inputs, *counts, *rule.outputs))
