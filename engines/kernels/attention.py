"""From the shapes of an attention to the two kernels that are launched for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge.errors import ConfigError

from .launch import Buffers, Job, Launch
from .variants import (
    ATTENTION_ROWS,
    BY_NAME,
    HEAD_WIDTHS,
    JOIN_ROWS,
    MOST_CACHE_PARTS,
    Variant,
    attention_name,
    join_name,
)

BUSY_ROWS = 8192
"""Heads of tokens, those of each part counted, that keep a GPU busy: 128 programs of 64, eight for
each of an Orin's multiprocessors. Where a step has as many there is one part. It is also the least
room for partial sums: so the room never shrinks where a step grows, and TensorRT, which knows the
largest step, sets aside enough for all."""


@dataclass(frozen=True)
class Tile:
    """One way to compute either half of an attention, for any number of tokens.

    Attributes:
        variant: what is launched.
        rows: heads of tokens that a program does.
    """

    variant: Variant
    rows: int


def part_tiles(width: int) -> tuple[Tile, ...]:
    """The ways to compute the parts: few tokens first, then many.

    The grid is ``ceil(heads of a group * tokens / rows)``, sequences times groups, parts.
    TensorRT's number of a tactic is its place here plus one, and engines keep it: the order stays.

    Raises:
        ConfigError: a width of heads that no kernel is for.
    """
    _check_width(width)
    return tuple(Tile(BY_NAME[attention_name(rows, width)], rows) for rows in ATTENTION_ROWS)


def join_tiles(width: int) -> tuple[Tile, ...]:
    """The ways to join parts: of few tokens with many parts first, then of many.

    The grid is ``ceil(heads * tokens of all sequences / rows)``, 1, 1; for the order see
    `part_tiles`.

    Raises:
        ConfigError: a width of heads that no kernel is for.
    """
    _check_width(width)
    return tuple(Tile(BY_NAME[join_name(rows, width)], rows) for rows in JOIN_ROWS)


def _check_width(width: int) -> None:
    if width not in HEAD_WIDTHS:
        raise ConfigError(f"attention takes heads of {HEAD_WIDTHS} values, not {width}")


def room(rows: int) -> int:
    """Heads of tokens for whose partial sums there is room.

    Args:
        rows: heads of tokens of all sequences.
    """
    return max(BUSY_ROWS, rows)


def number_of_parts(rows: int) -> int:
    """Programs that share a sequence's rows.

    Args:
        rows: heads of tokens of all sequences.
    """
    return min(MOST_CACHE_PARTS, room(rows) // rows)


def attention(
    batch: int,
    groups: int,
    heads: int,
    tokens: int,
    width: int,
    capacity: int,
    *,
    tile: int | None = None,
    join: int | None = None,
) -> Job:
    """Attention of a step's tokens over the cache before them and over one another.

    Args:
        batch: sequences.
        groups: key and value heads.
        heads: query heads of each.
        tokens: per sequence.
        width: of a head, 64 or 128.
        capacity: rows of the cache.
        tile: place in `part_tiles`; None is the first that has a token's heads of all tokens, or
            the last.
        join: place in `join_tiles`; None is the first where parts are several, else the last.

    Raises:
        ConfigError: the kernels do not serve this.
    """
    tiles, joins = part_tiles(width), join_tiles(width)
    if min(batch, groups, heads, tokens, capacity) < 1:
        raise ConfigError(
            "attention takes at least one sequence, group, head, token and cache row, not "
            f"{batch}, {groups}, {heads}, {tokens} and {capacity}"
        )
    rows, pairs = heads * tokens, batch * groups
    parts = number_of_parts(rows * pairs)
    if tile is None:
        tile = 0 if rows <= tiles[0].rows else 1
    if join is None:
        join = 0 if parts > 1 else 1
    attend = Launch(
        tiles[tile].variant,
        (-(-rows // tiles[tile].rows), pairs, parts),
        (
            *("query", "keys", "values", "new_keys", "new_values", "positions"),
            *(groups, heads, tokens, capacity),
            *("partial", "stats"),
        ),
    )
    combine = Launch(
        joins[join].variant,
        (-(-rows * pairs // joins[join].rows), 1, 1),
        (
            *("partial", "stats", "positions", "query"),
            *(rows * pairs, tokens, groups * heads, parts),
            "output",
        ),
    )
    half, wide, whole = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.int32)
    buffers: Buffers = {
        "query": ((batch, groups * heads, tokens, width), half),
        "keys": ((batch, groups, capacity, width), half),
        "values": ((batch, groups, capacity, width), half),
        "new_keys": ((batch, groups, tokens, width), half),
        "new_values": ((batch, groups, tokens, width), half),
        "positions": ((batch, tokens), whole),
        "partial": ((room(rows * pairs), width), wide),
        "stats": ((room(rows * pairs), 2), wide),
        "output": ((batch, tokens, groups * heads * width), half),
    }
    return Job((attend, combine), buffers, ("output",))
