"""From the shapes of an attention to the two kernels that are launched for it."""

from __future__ import annotations

import numpy as np

from edge.backends.tensorrt.launch_rules import JOIN, PARTS, number_of_parts, room
from edge.errors import ConfigError

from .launch import Buffers, Job, Tactic, launch_of
from .variants import (
    ATTENTION_ROWS,
    BY_NAME,
    HEAD_WIDTHS,
    JOIN_ROWS,
    attention_name,
    join_name,
)


def part_tactics(width: int) -> tuple[Tactic, ...]:
    """The ways to compute the parts: few tokens first, then many.

    TensorRT's number of a tactic is its place here plus one, and engines keep it: the order stays.

    Raises:
        ConfigError: a width of heads that no kernel is for.
    """
    _check_width(width)
    return tuple(
        Tactic(BY_NAME[attention_name(rows, width)], rows, width) for rows in ATTENTION_ROWS
    )


def join_tactics(width: int) -> tuple[Tactic, ...]:
    """The ways to join parts: of few tokens with many parts first, then of many.

    For the order see `part_tactics`.

    Raises:
        ConfigError: a width of heads that no kernel is for.
    """
    _check_width(width)
    return tuple(Tactic(BY_NAME[join_name(rows, width)], rows, width) for rows in JOIN_ROWS)


def part_place(rows: int) -> int:
    """Place in `part_tactics` of the one that fits so many heads of tokens of a group."""
    return 0 if rows <= ATTENTION_ROWS[0] else 1


def join_place(rows: int) -> int:
    """Place in `join_tactics` of the one that fits so many heads of tokens of all sequences."""
    return 0 if number_of_parts(rows) > 1 else 1


def _check_width(width: int) -> None:
    if width not in HEAD_WIDTHS:
        raise ConfigError(f"attention takes heads of {HEAD_WIDTHS} values, not {width}")


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
        tile: place in `part_tactics`; None is the first that has a token's heads of all tokens, or
            the last.
        join: place in `join_tactics`; None is the first where parts are several, else the last.

    Raises:
        ConfigError: the kernels do not serve this.
    """
    tiles, joins = part_tactics(width), join_tactics(width)
    if min(batch, groups, heads, tokens, capacity) < 1:
        raise ConfigError(
            "attention takes at least one sequence, group, head, token and cache row, not "
            f"{batch}, {groups}, {heads}, {tokens} and {capacity}"
        )
    rows, pairs = heads * tokens, batch * groups
    if tile is None:
        tile = part_place(rows)
    if join is None:
        join = join_place(rows * pairs)
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
    launches = tuple(
        launch_of(rule, tactic, [buffers[name][0] for name in rule.inputs])
        for rule, tactic in ((PARTS, tiles[tile]), (JOIN, joins[join]))
    )
    return Job(launches, buffers, ("output",))
