"""Attention over a cache of fixed size and a step's own rows, in two kernels (flash attention).

``attention_parts`` takes some rows of the cache per program, so that one sequence with few groups
of heads still keeps a whole GPU busy; ``attention_join`` adds up their results.

Imports Triton: use it to compile or interpret kernels, never to run them.
"""

import triton
import triton.language as tl


@triton.jit
def rows_of_part(past, tokens, parts, LEAST: tl.constexpr):
    """Return the rows per part of a sequence: the same for all, and a multiple of `LEAST`."""
    each = tl.cdiv(past + tokens, parts)
    return tl.maximum(tl.cdiv(each, LEAST) * LEAST, LEAST)


@triton.jit
def attention_parts(
    query_ptr,
    keys_ptr,
    values_ptr,
    new_keys_ptr,
    new_values_ptr,
    positions_ptr,
    groups,
    heads,
    tokens,
    capacity,
    partial_ptr,
    stats_ptr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    LEAST: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Compute one part of a sequence's rows, for some tokens and all heads of one group.

    The (token, head) pairs of a group are the rows of one matrix product, so each key and each
    value is read once for all of them; the heads of a token are adjacent. A sequence's rows are
    those of the cache before its first token, then the step's own. Token ``t`` sees as many as its
    position says, itself included. Blocks that none of a program's tokens sees are not read; a
    program with only such blocks returns at once and writes nothing.

    Args:
        query_ptr: [batch, groups * heads, tokens, WIDTH] FP16.
        keys_ptr: [batch, groups, capacity, WIDTH] FP16, the cache as it is in memory.
        values_ptr: [batch, groups, capacity, WIDTH] FP16.
        new_keys_ptr: [batch, groups, tokens, WIDTH] FP16, the step's own.
        new_values_ptr: [batch, groups, tokens, WIDTH] FP16.
        positions_ptr: [batch, tokens] INT32, rising by one; only the first of a sequence is read.
        groups: key and value heads.
        heads: query heads per group.
        tokens: tokens per sequence in this step.
        capacity: cache rows per sequence.
        partial_ptr: [parts, batch, tokens, groups * heads, WIDTH] FP32: sums of weighted values.
        stats_ptr: [parts, batch, tokens, groups * heads, 2] FP32: greatest score times log2(e), and
            the sum of weights.
        ROWS: (token, head) pairs per program; a power of two of at least 16.
        WIDTH: values per head, 64 or 128.
        BLOCK: rows of a sequence that are read at once.
        LEAST: fewest rows of a part (`rows_of_part`); a multiple of `BLOCK`.
        SCALE: factor on scores, times log2(e).
    """
    # The last tokens see the most rows, so start with them.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    pair = tl.program_id(1)
    part, parts = tl.program_id(2), tl.num_programs(2)
    # While TensorRT tunes, positions may be any numbers.
    past = tl.load(positions_ptr + (pair // groups).to(tl.int64) * tokens)
    past = tl.minimum(tl.maximum(past, 0), capacity)
    rows = heads * tokens
    last = tl.minimum(tile * ROWS + ROWS, rows) - 1
    start = part * rows_of_part(past, tokens, parts, LEAST)
    end = tl.minimum(start + rows_of_part(past, tokens, parts, LEAST), past + last // heads + 1)
    if start >= end:
        return
    row = tile * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, WIDTH)
    at = tl.arange(0, BLOCK)
    mine = row < rows
    token = row // heads
    query_line = (pair.to(tl.int64) * heads + row % heads) * tokens + token
    query = tl.load(
        query_ptr + query_line[:, None] * WIDTH + lane[None, :], mask=mine[:, None], other=0.0
    )
    seen = past + 1 + token
    in_cache = pair.to(tl.int64) * capacity
    in_step = pair.to(tl.int64) * tokens - past
    greatest = tl.full((ROWS,), float("-inf"), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    summed = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(start, end, BLOCK):
        position = first + at
        there = position < end
        old = position < past
        line = (tl.where(old, in_cache, in_step) + position) * WIDTH
        # With a choice of two pointers the compiler would not see that rows are contiguous.
        keys_at = tl.where(old, keys_ptr, new_keys_ptr) + line
        keys_at = tl.multiple_of(keys_at[:, None] + lane[None, :], (1, 16))
        keys_at = tl.max_contiguous(keys_at, (1, WIDTH))
        values_at = tl.where(old, values_ptr, new_values_ptr) + line
        values_at = tl.multiple_of(values_at[:, None] + lane[None, :], (1, 16))
        values_at = tl.max_contiguous(values_at, (1, WIDTH))
        keys = tl.load(keys_at, mask=there[:, None], other=0.0)
        values = tl.load(values_at, mask=there[:, None], other=0.0)
        scores = tl.dot(query, tl.trans(keys)) * SCALE
        visible = there[None, :] & (position[None, :] < seen[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        new = tl.maximum(greatest, tl.max(scores, 1))
        # A row that has seen nothing yet is still -inf, and a difference of two would be NaN.
        base_score = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(scores - base_score[:, None])
        fade = tl.exp2(greatest - base_score)
        weight = weight * fade + tl.sum(weights, 1)
        summed = tl.dot(weights.to(tl.float16), values, summed * fade[:, None])
        greatest = new
    batch = tl.num_programs(1) // groups
    out = (part * batch + pair // groups).to(tl.int64) * tokens + token
    out = (out * groups + pair % groups) * heads + row % heads
    tl.store(partial_ptr + out[:, None] * WIDTH + lane[None, :], summed, mask=mine[:, None])
    tl.store(stats_ptr + out * 2, greatest, mask=mine)
    tl.store(stats_ptr + out * 2 + 1, weight, mask=mine)


@triton.jit
def attention_join(
    partial_ptr,
    stats_ptr,
    positions_ptr,
    query_ptr,
    rows,
    tokens,
    heads,
    parts,
    output_ptr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    PARTS: tl.constexpr,
    LEAST: tl.constexpr,
):
    """Join the results of `attention_parts` over all parts that a token sees.

    Args:
        partial_ptr: [parts, rows, WIDTH] FP32 from `attention_parts`.
        stats_ptr: [parts, rows, 2] FP32 from `attention_parts`.
        positions_ptr: [batch, tokens] INT32, as in `attention_parts`.
        query_ptr: not read; a plugin knows the number of heads by its shape.
        rows: number of (token, head) pairs of all sequences.
        tokens: tokens per sequence in this step.
        heads: query heads of all groups.
        parts: parts of a sequence, at most `PARTS`.
        output_ptr: [batch, tokens, heads, WIDTH] FP16.
        ROWS: (token, head) pairs per program.
        WIDTH: values per head.
        STEP: parts that are read at once.
        PARTS: a power of two.
        LEAST: fewest rows of a part (`rows_of_part`).
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mine = row < rows
    token = row // heads
    first_token = token // tokens * tokens
    past = tl.load(positions_ptr + first_token, mask=mine, other=0)
    past = tl.minimum(tl.maximum(past, 0), 1 << 30)
    seen = past + 1 + token - first_token
    used = tl.minimum(tl.cdiv(seen, rows_of_part(past, tokens, parts, LEAST)), parts)
    used = tl.where(mine, used, 0)
    part = tl.arange(0, PARTS)[:, None]
    line = part.to(tl.int64) * rows + row[None, :]
    found = tl.load(stats_ptr + line * 2, mask=part < used[None, :], other=float("-inf"))
    weight = tl.load(stats_ptr + line * 2 + 1, mask=part < used[None, :], other=0.0)
    # Every token sees the first part, so only missing rows have no greatest score.
    greatest = tl.where(mine, tl.max(found, 0), 0.0)
    total = tl.sum(weight * tl.exp2(found - greatest[None, :]), 0)
    lane = tl.arange(0, WIDTH)
    summed = tl.zeros((STEP, ROWS, WIDTH), tl.float32)
    for first in range(0, tl.max(used, 0), STEP):
        some = first + tl.arange(0, STEP)[:, None]
        there = some < used[None, :]
        at = some.to(tl.int64) * rows + row[None, :]
        score = tl.load(stats_ptr + at * 2, mask=there, other=float("-inf"))
        share = tl.exp2(score - greatest[None, :])
        values_at = partial_ptr + at[:, :, None] * WIDTH + lane[None, None, :]
        values = tl.load(values_at, mask=there[:, :, None], other=0.0)
        summed += values * share[:, :, None]
    output = tl.sum(summed, 0) / tl.where(mine, total, 1.0)[:, None]
    output_at = output_ptr + row.to(tl.int64)[:, None] * WIDTH + lane[None, :]
    tl.store(output_at, output.to(tl.float16), mask=mine[:, None])
