"""Turns the shape of logits into the two kernel launches that find the largest of each row."""

from __future__ import annotations

from typing import Any

import numpy as np

from edge.backends.tensorrt.launch_rules import NUMBERS, PART_LOGITS, TOP_K_MERGE, TOP_K_PARTS
from edge.errors import ConfigError

from .launch import Buffers, Job, Tactic, launch_of
from .variants import BY_NAME, KEPT, MOST_PARTS, merge_name

MOST_COLUMNS = PART_LOGITS * MOST_PARTS
_DTYPES: dict[str, type[Any]] = {"fp16": np.float16, "fp32": np.float32, "int32": np.int32}


def top_k_parts_tactics(keep: int) -> tuple[Tactic, ...]:
    """Return the only kernel that finds the largest of each part.

    Raises:
        ConfigError: `keep` is more than a kernel can keep.
    """
    _check_keep(keep)
    return (Tactic(BY_NAME[TOP_K_PARTS.name], 1, PART_LOGITS),)


def top_k_merge_tactics(keep: int) -> tuple[Tactic, ...]:
    """Return the only kernel that finds the largest among those that all parts kept.

    Raises:
        ConfigError: `keep` is more than a kernel can keep.
    """
    _check_keep(keep)
    variant = BY_NAME[merge_name(keep)]
    return (Tactic(variant, 1, int(variant.constants["MOST"])),)


def _check_keep(keep: int) -> None:
    if not 1 <= keep <= KEPT[-1]:
        raise ConfigError(f"top_k keeps 1 to {KEPT[-1]} logits, not {keep}")


def top_k(rows: int, columns: int, keep: int) -> Job:
    """Find the largest logits of each row, their places, and the mass of all others.

    Args:
        rows: rows of logits.
        columns: size of the vocabulary, up to 262,144.
        keep: number of logits to keep, up to 1,024 and at most `columns`.

    Raises:
        ConfigError: the kernels do not support these sizes.
    """
    if rows < 1 or not keep <= columns <= MOST_COLUMNS:
        raise ConfigError(
            f"top_k takes at least one row of up to {MOST_COLUMNS} logits, and keeps no more than "
            f"a row has, not {rows} of {columns} and {keep}"
        )
    buffers: Buffers = {
        "logits": ((rows, columns), np.dtype(np.float16)),
        "keep": ((keep,), np.dtype(np.float32)),
    }
    launches = []
    for rule, tactics in (
        (TOP_K_PARTS, top_k_parts_tactics(keep)),
        (TOP_K_MERGE, top_k_merge_tactics(keep)),
    ):
        shapes = [buffers[name][0] for name in rule.inputs]
        for (name, kind), shape in zip(
            rule.outputs.items(), rule.output_shapes(shapes, NUMBERS), strict=True
        ):
            buffers[name] = tuple(shape), np.dtype(_DTYPES[kind])
        launches.append(launch_of(rule, tactics[0], shapes))
    return Job(tuple(launches), buffers, tuple(TOP_K_MERGE.outputs))
