"""Turns the shapes of an attention into the two kernel launches that compute it."""

from __future__ import annotations

import numpy as np

from edge.backends.tensorrt.launch_rules import JOIN, PARTS, number_of_parts, room
from edge.errors import ConfigError

from .launch import Buffers, Job, Tactic, launch_of
from .variants import ATTENTION_ROWS, BY_NAME, HEAD_WIDTHS, JOIN_ROWS, attention_name, join_name


def part_tactics(width: int) -> tuple[Tactic, ...]:
    """List the kernels that compute parts: the one for few tokens first, then for many.

    TensorRT numbers a tactic by its place here plus one, and engines keep the number. So the order
    must not change.

    Raises:
        ConfigError: no kernel takes heads of this width.
    """
    _check_width(width)
    return tuple(
        Tactic(BY_NAME[attention_name(rows, width)], rows, width) for rows in ATTENTION_ROWS
    )


def join_tactics(width: int) -> tuple[Tactic, ...]:
    """List the kernels that join parts: few tokens with many parts first, then many tokens.

    Engines depend on the order here, too (`part_tactics`).

    Raises:
        ConfigError: no kernel takes heads of this width.
    """
    _check_width(width)
    return tuple(Tactic(BY_NAME[join_name(rows, width)], rows, width) for rows in JOIN_ROWS)


def part_place(rows: int) -> int:
    """Place in `part_tactics` of the kernel that fits this many (head, token) pairs of a group."""
    return 0 if rows <= ATTENTION_ROWS[0] else 1


def join_place(rows: int) -> int:
    """Place in `join_tactics` of the kernel that fits this many (head, token) pairs in all."""
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
    """Compute attention of a step's tokens over the cache before them and over one another.

    Args:
        batch: number of sequences.
        groups: number of key and value heads.
        heads: query heads per group.
        tokens: tokens per sequence.
        width: values per head, 64 or 128.
        capacity: cache rows per sequence.
        tile: place in `part_tactics`; None takes the first kernel that holds all (head, token)
            pairs of a group, else the last.
        join: place in `join_tactics`; None takes the first if there are several parts, else the
            last.

    Raises:
        ConfigError: the kernels do not support these sizes.
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
