"""Defines how own kernels are launched: one rule per plugin, on numbers or symbols.

TensorRT before 10.13 launches through `plugins`, with numbers. From 10.13 on the engine contains
the rule itself, made of TensorRT's symbols (`engines.kernels.plugin`). Shapes of outputs are
symbols in both. So a launch uses only ``*``, ``//``, ``==`` and `Arithmetic`. Outputs use only
``*`` and `Arithmetic`, which `engines.kernels.plugin_v3` supports for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from edge.bundle.io_spec import ElementType

NAMESPACE = "edge_llm"
BLOCK = 32
"""Neighbouring weights of a column, in 16 bytes; a group is a multiple of it."""
BUSY_ROWS = 8192
"""(Token, head) pairs, counted in each part, that keep a GPU busy: 128 programs of 64, eight for
each of an Orin's multiprocessors. A step with as many has one part. It is also the least size of
the buffer for partial sums. So the buffer never shrinks when a step grows, and TensorRT, which
knows the largest step, reserves enough for all."""
MOST_CACHE_PARTS = 64
"""Most programs that share a sequence's rows."""
PART_LOGITS = 4096
"""Logits of a row that one program reads."""

Shape = Sequence[Any]


@dataclass(frozen=True)
class Arithmetic:
    """The operations of a rule that are not operators.

    Attributes:
        divide_up: returns a quotient, rounded up.
        maximum: returns the larger of two sizes.
        minimum: returns the smaller of two sizes.
    """

    divide_up: Callable[[Any, Any], Any]
    maximum: Callable[[Any, Any], Any]
    minimum: Callable[[Any, Any], Any]


NUMBERS = Arithmetic(lambda first, second: -(-first // second), max, min)


class Tile(Protocol):
    """Rows and columns of the output that one program of a kernel computes."""

    @property
    def rows(self) -> int: ...  # noqa: D102
    @property
    def columns(self) -> int: ...  # noqa: D102


class Launch(NamedTuple):
    """Programs along x, y and z, and the INT32 arguments between input and output addresses."""

    grid: tuple[Any, Any, Any]
    numbers: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class PluginRule:
    """All that TensorRT asks about a plugin of one kernel, which has several variants.

    The kernel's parameters are the addresses of the inputs, INT32 numbers, and the addresses of the
    outputs.

    Attributes:
        name: name of the plugin.
        inputs: names and types, in order.
        outputs: names and types, in order.
        attribute: name of the INT32 attribute that says which variants there are.
        value_of: returns the attribute's value, a constant in the shapes of the inputs.
        output_shapes: returns the shapes of the outputs, given those of the inputs.
        launch: returns the launch of a variant, given the shapes of the inputs.
    """

    name: str
    inputs: Mapping[str, ElementType]
    outputs: Mapping[str, ElementType]
    attribute: str
    value_of: Callable[[Sequence[Shape]], Any]
    output_shapes: Callable[[Sequence[Shape], Arithmetic], tuple[Shape, ...]]
    launch: Callable[[Sequence[Shape], Tile, Arithmetic], Launch]


def product_launch(shapes: Sequence[Shape], tile: Tile, arithmetic: Arithmetic) -> Launch:
    """Launch a product.

    The numbers are all rows and columns, the depth, the binary logarithm of the blocks of 32
    weights in a group, and whether there is a bias.

    Args:
        shapes: shapes of the inputs of `PRODUCT`.
        tile: rows and columns of a program.
        arithmetic: operations on these sizes.
    """
    x, weights, scales, bias = shapes
    all_rows = _product(x[:-1])
    blocks, all_columns = weights[0], weights[2]
    # A group is one, two or four blocks. A layer of one column without a bias has a zero.
    shift = blocks // scales[0] // 2
    programs = arithmetic.divide_up
    grid = programs(all_columns, tile.columns), programs(all_rows, tile.rows), 1
    return Launch(grid, (all_rows, all_columns, blocks * BLOCK, shift, bias[0] == all_columns))


def _product_outputs(shapes: Sequence[Shape], arithmetic: Arithmetic) -> tuple[Shape, ...]:
    x, weights, *_ = shapes
    return ((*x[:-1], weights[2]),)


def room(rows: Any, arithmetic: Arithmetic = NUMBERS) -> Any:
    """Return how many (token, head) pairs the buffer for partial sums holds.

    Args:
        rows: (token, head) pairs of all sequences.
        arithmetic: operations on such a size.
    """
    return arithmetic.maximum(rows, BUSY_ROWS)


def number_of_parts(rows: Any, arithmetic: Arithmetic = NUMBERS) -> Any:
    """Return the number of programs that share a sequence's rows.

    Args:
        rows: (token, head) pairs of all sequences.
        arithmetic: operations on such a size.
    """
    return arithmetic.minimum(room(rows, arithmetic) // rows, MOST_CACHE_PARTS)


def parts_launch(shapes: Sequence[Shape], tile: Tile, arithmetic: Arithmetic) -> Launch:
    """Launch the first half of an attention.

    The numbers are groups, heads of a group, tokens, and rows of the cache.

    Args:
        shapes: shapes of the inputs of `PARTS`.
        tile: rows and columns of a program.
        arithmetic: operations on these sizes.
    """
    (batch, all_heads, tokens, _), keys, *_ = shapes
    groups = keys[1]
    heads = all_heads // groups
    grid = (
        arithmetic.divide_up(heads * tokens, tile.rows),
        batch * groups,
        number_of_parts(batch * all_heads * tokens, arithmetic),
    )
    return Launch(grid, (groups, heads, tokens, keys[2]))


def _parts_outputs(shapes: Sequence[Shape], arithmetic: Arithmetic) -> tuple[Shape, ...]:
    batch, all_heads, tokens, width = shapes[0]
    lines = room(batch * all_heads * tokens, arithmetic)
    return (lines, width), (lines, 2)


def join_launch(shapes: Sequence[Shape], tile: Tile, arithmetic: Arithmetic) -> Launch:
    """Launch the second half of an attention.

    The numbers are (token, head) pairs of all sequences, tokens, heads, and parts.

    Args:
        shapes: shapes of the inputs of `JOIN`.
        tile: rows and columns of a program.
        arithmetic: operations on these sizes.
    """
    batch, all_heads, tokens, _ = shapes[3]
    rows = batch * all_heads * tokens
    parts = number_of_parts(rows, arithmetic)
    grid = arithmetic.divide_up(rows, tile.rows), 1, 1
    return Launch(grid, (rows, tokens, all_heads, parts))


def _join_outputs(shapes: Sequence[Shape], arithmetic: Arithmetic) -> tuple[Shape, ...]:
    batch, all_heads, tokens, width = shapes[3]
    return ((batch, tokens, all_heads * width),)


def top_k_parts_launch(shapes: Sequence[Shape], tile: Tile, arithmetic: Arithmetic) -> Launch:
    """Launch the first half of the search for the best logits.

    The numbers are columns, and how many logits are kept.

    Args:
        shapes: shapes of the inputs of `TOP_K_PARTS`.
        tile: rows and columns of a program.
        arithmetic: operations on these sizes.
    """
    (*leading, columns), (keep,) = shapes
    grid = arithmetic.divide_up(columns, tile.columns), _product(leading), 1
    return Launch(grid, (columns, keep))


def _top_k_parts_outputs(shapes: Sequence[Shape], arithmetic: Arithmetic) -> tuple[Shape, ...]:
    (*leading, columns), (keep,) = shapes
    parts = arithmetic.divide_up(columns, PART_LOGITS)
    return (*leading, parts, keep), (*leading, parts, 2)


def top_k_merge_launch(shapes: Sequence[Shape], tile: Tile, arithmetic: Arithmetic) -> Launch:
    """Launch the second half of the search, a program for each row.

    The numbers are parts, and how many logits are kept.

    Args:
        shapes: shapes of the inputs of `TOP_K_MERGE`.
        tile: rows and columns of a program.
        arithmetic: operations on these sizes.
    """
    (*leading, parts, keep), _ = shapes
    return Launch((_product(leading), 1, 1), (parts, keep))


def _top_k_merge_outputs(shapes: Sequence[Shape], arithmetic: Arithmetic) -> tuple[Shape, ...]:
    (*leading, _, keep), _ = shapes
    return (*leading, keep), (*leading, keep), (*leading, 1)


def _product(sizes: Shape) -> Any:
    first, *others = sizes
    for size in others:
        first = first * size
    return first


PRODUCT = PluginRule(
    "w4_linear",
    {"x": "fp16", "weights": "int32", "scales": "fp16", "bias": "fp16"},
    {"y": "fp16"},
    "planes",
    lambda shapes: shapes[1][1],
    _product_outputs,
    product_launch,
)
"""Inputs: ``[.., depth]``, those of `engines.kernels.layout.pack_weights`, ``[groups, columns]``,
and ``[columns]``, or ``[1]`` without a bias. Output: ``[.., columns]``."""
PARTS = PluginRule(
    "attention_parts",
    {
        **dict.fromkeys(("query", "keys", "values", "new_keys", "new_values"), "fp16"),
        "positions": "int32",
    },
    {"partial": "fp32", "stats": "fp32"},
    "width",
    lambda shapes: shapes[0][3],
    _parts_outputs,
    parts_launch,
)
"""Inputs: ``[batch, heads, tokens, width]``, twice ``[batch, groups, capacity, width]``, twice
``[batch, groups, tokens, width]``, and ``[batch, tokens]``. Outputs: ``[room, width]`` and
``[room, 2]``."""
JOIN = PluginRule(
    "attention_join",
    {"partial": "fp32", "stats": "fp32", "positions": "int32", "query": "fp16"},
    {"output": "fp16"},
    "width",
    lambda shapes: shapes[3][3],
    _join_outputs,
    join_launch,
)
"""Inputs: the outputs of `PARTS`, and two of its inputs. Output:
``[batch, tokens, heads * width]``. It takes the query only for its shape, since an engine's build
knows the number of heads from it."""
TOP_K_PARTS = PluginRule(
    "top_k_parts",
    {"logits": "fp16", "keep": "fp32"},
    {"keys": "int32", "stats": "fp32"},
    "keep",
    lambda shapes: shapes[1][0],
    _top_k_parts_outputs,
    top_k_parts_launch,
)
"""Inputs: ``[.., columns]``, and any tensor with as many values as logits are kept, so that a shape
says how many. Outputs: ``[.., parts, keep]`` and ``[.., parts, 2]``, which
`engines.kernels.sources.top_k` explains."""
TOP_K_MERGE = PluginRule(
    "top_k_merge",
    {"keys": "int32", "stats": "fp32"},
    {"values": "fp16", "places": "int32", "rest": "fp32"},
    "keep",
    lambda shapes: shapes[0][-1],
    _top_k_merge_outputs,
    top_k_merge_launch,
)
"""Inputs: the outputs of `TOP_K_PARTS`. Outputs: twice ``[.., keep]``, and ``[.., 1]``."""
PLUGINS = (PRODUCT, PARTS, JOIN, TOP_K_PARTS, TOP_K_MERGE)
