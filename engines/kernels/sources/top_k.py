"""Finds the largest logits of a row, their places, and the mass of all others.

A sampler needs no more of 151,936 logits. ``top_k_parts`` keeps the largest of a part of a row,
``top_k_merge`` the largest of those from all parts.

Both select, and only the logits that are kept in the end are sorted. An FP16 maps to a 16-bit
integer of the same order. So 16 steps of binary search find the least one to keep, by counting
those no smaller. Kept logits are stored in order of place, which tells equals apart.

Imports Triton: use it to compile or interpret kernels, never to run them.
"""

import triton
import triton.language as tl

NOTHING = tl.constexpr(-0x8000)
"""Marks a missing logit; the integers of all others are greater."""
GREATER = tl.constexpr(11)
"""Bits that count how many logits are greater than another; 20 are left to count its equals."""


@triton.jit
def as_half(ordered):
    """Return the FP16 of an integer of the same order; negative floats fall as integers rise."""
    bits = tl.where(ordered < 0, ordered ^ 0x7FFF, ordered).to(tl.int16)
    return bits.to(tl.float16, bitcast=True)


@triton.jit
def slots(ordered, least, above, keep, before):
    """Assign a slot to each of the largest, in order of place, and -1 to all others.

    Args:
        ordered: INT32, in order of place.
        least: the least of the largest; the first of its equals are among them.
        above: number of logits greater than `least`, fewer than `keep`.
        keep: number of the largest.
        before: number of greater logits before these, in the lowest `GREATER` bits, and above them
            the number of equal ones.

    Returns:
        The slots, and `before` for the next block.
    """
    equal = (ordered == least) & (ordered > NOTHING)
    ones = tl.where(ordered > least, 1, equal.to(tl.int32) << GREATER)
    until = before + tl.cumsum(ones, 0)
    equals = until >> GREATER
    taken = (ordered > least) | (equal & (equals <= keep - above))
    slot = until - (equals << GREATER) + tl.minimum(equals, keep - above) - 1
    return tl.where(taken, slot, -1), before + tl.sum(ones, 0)


@triton.jit
def top_k_parts(
    logits_ptr,
    keep_ptr,
    columns,
    keep,
    keys_ptr,
    stats_ptr,
    PART: tl.constexpr,
    MOST: tl.constexpr,
):
    """Keep the largest logits of a `PART`, in order of place.

    A key has the FP16 as an integer of the same order in its upper half, and the place in the part
    in its lower half. The two zeros are equal, and a NaN of either sign is greater than infinity.

    Args:
        logits_ptr: [rows, columns] FP16.
        keep_ptr: not read; TensorRT knows `keep` by its shape.
        columns: logits per row.
        keep: number of logits to keep, at most `MOST`.
        keys_ptr: [rows, parts, keep] INT32; `NOTHING` in the upper half if a part has fewer.
        stats_ptr: [rows, parts, 2] FP32: the greatest logit, and the sum of ``exp(x - greatest)``
            over those that are not kept.
        PART: a power of two, at most 32,768.
        MOST: a power of two.
    """
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    place = tl.arange(0, PART)
    there = part * PART + place < columns
    logits = tl.load(
        logits_ptr + row * columns + part * PART + place, mask=there, other=float("-inf")
    )
    bits = logits.to(tl.int16, bitcast=True).to(tl.int32)
    ordered = tl.where(bits < 0, bits ^ 0x7FFF, bits)
    ordered = tl.where(ordered == -1, 0, ordered)  # the negative zero
    ordered = tl.where((bits & 0x7FFF) > 0x7C00, 0x7FFF, ordered)  # NaN
    ordered = tl.where(there, ordered, NOTHING)
    least, step = NOTHING, 0x8000
    while step > 0:
        enough = tl.sum((ordered >= least + step).to(tl.int32), 0) >= keep
        least = tl.where(enough, least + step, least)
        step = step // 2
    above = tl.sum((ordered > least).to(tl.int32), 0)
    slot, _ = slots(ordered, least, above, keep, 0)
    line = row * tl.num_programs(0) + part
    tl.store(keys_ptr + line * keep + slot, (ordered << 16) | place, mask=slot >= 0)
    empty = tl.arange(0, MOST)
    tl.store(
        keys_ptr + line * keep + empty,
        tl.full((MOST,), NOTHING << 16, tl.int32),
        mask=(empty >= columns - part * PART) & (empty < keep),
    )
    greatest = as_half(tl.max(ordered, 0)).to(tl.float32)
    base = tl.where(greatest == float("-inf"), 0.0, greatest)  # all -inf: the sum is 0, not NaN
    others = tl.where(slot < 0, tl.exp(logits.to(tl.float32) - base), 0.0)
    tl.store(stats_ptr + line * 2, greatest)
    tl.store(stats_ptr + line * 2 + 1, tl.sum(others, 0))


@triton.jit
def top_k_merge(
    keys_ptr,
    stats_ptr,
    parts,
    keep,
    values_ptr,
    places_ptr,
    rest_ptr,
    PART: tl.constexpr,
    MOST: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find the largest among those that all parts kept, falling; places rise among equals.

    Args:
        keys_ptr: [rows, parts, keep] INT32 from `top_k_parts`.
        stats_ptr: [rows, parts, 2] FP32 from `top_k_parts`.
        parts: parts per row, at most `PARTS`.
        keep: number of logits to keep, at most `MOST` and at most the logits of a row.
        values_ptr: [rows, keep] FP16.
        places_ptr: [rows, keep] INT32.
        rest_ptr: [rows] FP32: the sum of ``exp(x - greatest)`` of all others; NaN if the greatest
            is not a number.
        PART: logits per part, as in `top_k_parts`.
        MOST: a power of two.
        PARTS: a power of two.
        BLOCK: keys that are compared together.
    """
    row = tl.program_id(0).to(tl.int64)
    each = tl.arange(0, PARTS)
    stat = (row * parts + each) * 2
    largest = tl.load(stats_ptr + stat, mask=each < parts, other=float("-inf"))
    rest = tl.load(stats_ptr + stat + 1, mask=each < parts, other=0.0)
    total_keys = parts * keep
    keys_ptr += row * total_keys
    at = tl.arange(0, BLOCK)
    least, step = NOTHING, 0x8000
    above = 0
    while step > 0:
        count = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, total_keys, BLOCK):
            there = first + at < total_keys
            keys = tl.load(keys_ptr + first + at, mask=there, other=NOTHING << 16)
            count += (keys >= (least + step) << 16).to(tl.int32)
        total = tl.sum(count, 0)
        above = tl.where(total >= keep, above, total)
        least = tl.where(total >= keep, least + step, least)
        step = step // 2
    greatest = tl.max(tl.where(largest != largest, float("inf"), largest), 0)
    total = tl.sum(rest * tl.exp(largest - greatest), 0)
    before = 0
    others = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, total_keys, BLOCK):
        there = first + at < total_keys
        keys = tl.load(keys_ptr + first + at, mask=there, other=NOTHING << 16)
        ordered = keys >> 16
        slot, before = slots(ordered, least, above, keep, before)
        value = as_half(ordered)
        tl.store(values_ptr + row * keep + slot, value, mask=slot >= 0)
        place = (first + at) // keep * PART + (keys & 0xFFFF)
        tl.store(places_ptr + row * keep + slot, place, mask=slot >= 0)
        mass = tl.exp(value.to(tl.float32) - greatest)
        others += tl.where((slot < 0) & (ordered > NOTHING), mass, 0.0)
    tl.store(rest_ptr + row, total + tl.sum(others, 0))
    tl.debug_barrier()  # other threads stored the keys that are sorted here
    mine = tl.arange(0, MOST)
    there = mine < keep
    bits = tl.load(values_ptr + row * keep + mine, mask=there, other=0.0)
    bits = bits.to(tl.int16, bitcast=True).to(tl.int32)
    ordered = tl.where(bits < 0, bits ^ 0x7FFF, bits)
    # They are already in the order of their places.
    keys = tl.where(there, (ordered << 16) | (0xFFFF - mine), NOTHING << 16)
    keys = tl.sort(keys, descending=True)
    slot = 0xFFFF - (keys & 0xFFFF)
    place = tl.load(places_ptr + row * keep + slot, mask=there)
    tl.debug_barrier()  # all have read before anyone writes
    tl.store(values_ptr + row * keep + mine, as_half(keys >> 16), mask=there)
    tl.store(places_ptr + row * keep + mine, place, mask=there)
