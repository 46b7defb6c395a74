"""Attention of a decode step over a cache of fixed size, in two kernels (flash decoding).

``attend_split`` takes a part of a sequence's rows per program, so that one sequence with one group
of heads still keeps all of a GPU busy; ``attend_combine`` joins the parts.

Triton: imported where kernels are compiled or interpreted, never where they run.
"""

import triton
import triton.language as tl


@triton.jit
def attend_split(
    query_ptr,
    keys_ptr,
    values_ptr,
    lengths_ptr,
    groups,
    rows,
    tokens,
    capacity,
    split_rows,
    partial_ptr,
    stats_ptr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE: tl.constexpr,
):
    """The rows ``split_rows * i`` and following of one sequence and group of heads.

    The heads of a group and the tokens of a step are rows of one matrix product, so each key and
    each value is read once for all of them. Blocks past a sequence's length are not read; a
    program with none but such returns at once and writes nothing.

    Args:
        query_ptr: [batch, groups, heads of a group, tokens, WIDTH] FP16.
        keys_ptr: [batch, groups, capacity, WIDTH] FP16, as the cache lies in memory.
        values_ptr: the same.
        lengths_ptr: [batch] INT32: rows of each sequence, those of this step included.
        groups: key and value heads.
        rows: heads of a group times tokens, at most `ROWS`.
        tokens: of a step and sequence; token ``t`` sees ``length - tokens + 1 + t`` rows.
        capacity: rows that the cache has.
        split_rows: of a program; a multiple of `BLOCK`.
        partial_ptr: [batch, groups, splits, rows, WIDTH] FP32: sums of weighted values.
        stats_ptr: [batch, groups, splits, rows, 2] FP32: greatest score times log2(e), and the
            sum of weights.
        ROWS: a power of two of at least 16.
        WIDTH: of a head, 64 or 128.
        BLOCK: rows of the cache that are read at once.
        SCALE: of scores, times log2(e).
    """
    split = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    length = tl.minimum(tl.load(lengths_ptr + pair // groups), capacity)
    start = split * split_rows
    if start >= length:
        return
    end = tl.minimum(start + split_rows, length)
    row = tl.arange(0, ROWS)
    lane = tl.arange(0, WIDTH)
    at = tl.arange(0, BLOCK)
    mine = row < rows
    query = tl.load(
        query_ptr + (pair * rows + row[:, None]) * WIDTH + lane[None, :],
        mask=mine[:, None],
        other=0.0,
    )
    seen = length - tokens + 1 + row % tokens
    base = pair * capacity * WIDTH
    greatest = tl.full((ROWS,), float("-inf"), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    summed = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(start, end, BLOCK):
        position = first + at
        there = position < end
        place = base + position[:, None] * WIDTH + lane[None, :]
        keys = tl.load(keys_ptr + place, mask=there[:, None], other=0.0)
        values = tl.load(values_ptr + place, mask=there[:, None], other=0.0)
        scores = tl.dot(query, tl.trans(keys)) * SCALE
        visible = there[None, :] & (position[None, :] < seen[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        new = tl.maximum(greatest, tl.max(scores, 1))
        # A row that has seen nothing yet keeps -inf, whose difference would be NaN.
        base_score = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(scores - base_score[:, None])
        fade = tl.exp2(greatest - base_score)
        weight = weight * fade + tl.sum(weights, 1)
        summed = tl.dot(weights.to(tl.float16), values, summed * fade[:, None])
        greatest = new
    line = (pair * tl.num_programs(0) + split) * rows + row
    tl.store(partial_ptr + line[:, None] * WIDTH + lane[None, :], summed, mask=mine[:, None])
    tl.store(stats_ptr + line * 2, greatest, mask=mine)
    tl.store(stats_ptr + line * 2 + 1, weight, mask=mine)


@triton.jit
def attend_combine(
    partial_ptr,
    stats_ptr,
    lengths_ptr,
    groups,
    rows,
    capacity,
    split_rows,
    splits,
    output_ptr,
    WIDTH: tl.constexpr,
):
    """Join what the programs of `attend_split` found for one row, in the order of the cache.

    Args:
        partial_ptr: see `attend_split`.
        stats_ptr: see `attend_split`.
        lengths_ptr: see `attend_split`.
        groups: see `attend_split`.
        rows: see `attend_split`.
        capacity: see `attend_split`.
        split_rows: see `attend_split`.
        splits: programs of `attend_split` per sequence and group.
        output_ptr: [batch, groups, heads of a group, tokens, WIDTH] FP16. A row that sees nothing
            is zero.
        WIDTH: of a head.
    """
    row = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    length = tl.minimum(tl.load(lengths_ptr + pair // groups), capacity)
    lane = tl.arange(0, WIDTH)
    greatest = float("-inf")
    weight = 0.0
    summed = tl.zeros((WIDTH,), tl.float32)
    for split in range(tl.minimum(tl.cdiv(length, split_rows), splits)):
        line = (pair * splits + split) * rows + row
        found = tl.load(stats_ptr + line * 2)
        new = tl.maximum(greatest, found)
        base_score = tl.where(new == float("-inf"), 0.0, new)
        fade = tl.exp2(greatest - base_score)
        share = tl.exp2(found - base_score)
        weight = weight * fade + tl.load(stats_ptr + line * 2 + 1) * share
        summed = summed * fade + tl.load(partial_ptr + line * WIDTH + lane) * share
        greatest = new
    output = tl.where(weight > 0.0, summed / tl.where(weight > 0.0, weight, 1.0), 0.0)
    tl.store(output_ptr + (pair * rows + row) * WIDTH + lane, output.to(tl.float16))
