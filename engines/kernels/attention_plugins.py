"""Attention as two plugins of TensorRT: what its builder asks about them, answered.

They are compiled ahead of time, see `plugin`; the first hands FP32 sums of parts to the second. All
numbers follow from shapes. The number of parts is an expression of them, so that a prefill has one
part, and a step of few tokens as many as keep the GPU busy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edge.backends.tensorrt.plugins import NAMESPACE

from .attention import BUSY_ROWS, join_tiles, part_tiles
from .package import Ptx
from .plugin import register_compiled
from .variants import MOST_CACHE_PARTS

PARTS, JOIN = "attention_parts", "attention_join"
INPUTS = {
    PARTS: ("query", "keys", "values", "new_keys", "new_values", "positions"),
    JOIN: ("partial", "stats", "positions", "query"),
}
"""Of each plugin, in the types and shapes of the kernels' parameters (`sources.attention`).
``attention_join`` takes the query for its shape: the number of heads would not be known else when
the engine is built."""


def register(trtp: Any, ptx: Mapping[str, Ptx], float32: Any) -> None:
    """Make the plugins known to TensorRT, once per process.

    Args:
        trtp: the module ``tensorrt.plugin``.
        ptx: kernels by variant, from `package.load_ptx`.
        float32: TensorRT's name of that type.
    """
    if hasattr(trtp.op, NAMESPACE) and hasattr(getattr(trtp.op, NAMESPACE), PARTS):
        return
    _register_parts(trtp, ptx, float32)
    _register_join(trtp, ptx)


def _register_parts(trtp: Any, ptx: Mapping[str, Ptx], float32: Any) -> None:
    def describe(
        query: Any, keys: Any, values: Any, new_keys: Any, new_values: Any, positions: Any
    ) -> Any:
        room = trtp.max(_rows(query), BUSY_ROWS)
        return (
            trtp.from_shape_expr((room, query.shape_expr[3]), dtype=float32),
            trtp.from_shape_expr((room, 2), dtype=float32),
        )

    def tune(
        query: Any,
        keys: Any,
        values: Any,
        new_keys: Any,
        new_values: Any,
        positions: Any,
        outputs: Any,
    ) -> Any:
        numbers = [place + 1 for place, _ in enumerate(part_tiles(int(query.shape[3])))]
        types = "FP16, FP16, FP16, FP16, FP16, INT32, FP32, FP32"
        return [trtp.AutoTuneCombination(types, "LINEAR", numbers)]

    def implement(
        query: Any,
        keys: Any,
        values: Any,
        new_keys: Any,
        new_values: Any,
        positions: Any,
        outputs: Any,
        tactic: int,
    ) -> Any:
        tile = part_tiles(int(query.shape[3]))[tactic - 1]
        kernel = ptx[tile.variant.name]
        batch, all_heads, tokens = (query.shape_expr[axis] for axis in range(3))
        groups, rows = keys.shape_expr[1], _rows(query)
        launch = trtp.KernelLaunchParams(
            grid_x=trtp.cdiv(all_heads // groups * tokens, tile.rows),
            grid_y=batch * groups,
            grid_z=trtp.min(trtp.max(rows, BUSY_ROWS) // rows, MOST_CACHE_PARTS),
            block_x=kernel.threads,
            shared_mem=kernel.shared_bytes,
        )
        numbers = (groups, all_heads // groups, tokens, keys.shape_expr[2])
        return kernel.entry, kernel.text, launch, trtp.SymIntExprs.from_tuple(numbers)

    register_compiled(trtp, PARTS, INPUTS[PARTS], 2, describe, tune, implement)


def _register_join(trtp: Any, ptx: Mapping[str, Ptx]) -> None:
    def describe(partial: Any, stats: Any, positions: Any, query: Any) -> Any:
        batch, all_heads, tokens, width = query.shape_expr
        return trtp.from_shape_expr((batch, tokens, all_heads * width), dtype=query.dtype)

    def tune(partial: Any, stats: Any, positions: Any, query: Any, outputs: Any) -> Any:
        numbers = [place + 1 for place, _ in enumerate(join_tiles(int(query.shape[3])))]
        return [trtp.AutoTuneCombination("FP32, FP32, INT32, FP16, FP16", "LINEAR", numbers)]

    def implement(
        partial: Any, stats: Any, positions: Any, query: Any, outputs: Any, tactic: int
    ) -> Any:
        tile = join_tiles(int(query.shape[3]))[tactic - 1]
        kernel = ptx[tile.variant.name]
        rows = _rows(query)
        launch = trtp.KernelLaunchParams(
            grid_x=trtp.cdiv(rows, tile.rows),
            block_x=kernel.threads,
            shared_mem=kernel.shared_bytes,
        )
        parts = trtp.min(partial.shape_expr[0] // rows, MOST_CACHE_PARTS)
        numbers = (rows, query.shape_expr[2], query.shape_expr[1], parts)
        return kernel.entry, kernel.text, launch, trtp.SymIntExprs.from_tuple(numbers)

    register_compiled(trtp, JOIN, INPUTS[JOIN], 1, describe, tune, implement)


def _rows(query: Any) -> Any:
    """Heads of tokens of all sequences."""
    return query.shape_expr[0] * query.shape_expr[1] * query.shape_expr[2]
