"""The largest logits of a row, their places, and the logarithm of the sum of all exponentials.

What a sampler needs of 151,936 logits, so that 64 pairs and one number leave the GPU. Two kernels:
``top_k_parts`` looks at a part of a row per program, ``top_k_merge`` at what they found.

Triton: imported where kernels are compiled or interpreted, never where they run.
"""

import triton
import triton.language as tl


@triton.jit
def top_k_parts(
    logits_ptr,
    columns,
    keys_ptr,
    stats_ptr,
    PART: tl.constexpr,
    KEEP: tl.constexpr,
):
    """The largest `KEEP` of `PART` logits as keys, in falling order.

    A key sorts by value and then by place, the lower first: the upper half is the FP16 as an
    integer of the same order, the lower half counts places backwards.

    Args:
        logits_ptr: [rows, columns] FP16.
        columns: of a row.
        keys_ptr: [rows, parts, KEEP] INT32.
        stats_ptr: [rows, parts, 2] FP32: the largest logit, and the sum of ``exp(x - largest)``.
        PART: a power of two, at most 65,536.
        KEEP: a power of two.
    """
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    place = tl.arange(0, PART)
    there = part * PART + place < columns
    logits = tl.load(
        logits_ptr + row * columns + part * PART + place, mask=there, other=float("-inf")
    )
    logits = tl.where(logits == 0.0, 0.0, logits)  # the two zeros are equal
    bits = logits.to(tl.int16, bitcast=True).to(tl.int32)
    # Two's complement: negative floats fall where their integers rise.
    ordered = tl.where(bits < 0, bits ^ 0x7FFF, bits)
    # What is not there sorts after everything that is: no FP16 is ordered as low as this.
    keys = tl.where(there, (ordered << 16) | (0xFFFF - place), -0x80000000)
    line = row * tl.num_programs(0) + part
    wide = logits.to(tl.float32)
    largest = tl.max(wide, 0)  # before the sort, which needs the registers
    base = tl.where(largest == float("-inf"), 0.0, largest)  # all -inf: the sum is 0, not NaN
    tl.store(stats_ptr + line * 2, largest)
    tl.store(stats_ptr + line * 2 + 1, tl.sum(tl.exp(wide - base), 0))
    tl.store(keys_ptr + line * KEEP + tl.arange(0, KEEP), tl.topk(keys, KEEP))


@triton.jit
def top_k_merge(
    keys_ptr,
    stats_ptr,
    parts,
    values_ptr,
    places_ptr,
    logsumexp_ptr,
    PART: tl.constexpr,
    KEEP: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest of what all parts of a row kept.

    Args:
        keys_ptr: see `top_k_parts`.
        stats_ptr: see `top_k_parts`.
        parts: of a row, at most `PARTS`.
        values_ptr: [rows, KEEP] FP32, falling; places rise among equals.
        places_ptr: [rows, KEEP] INT32; -1 where a row has fewer logits.
        logsumexp_ptr: [rows] FP32.
        PART: see `top_k_parts`.
        KEEP: see `top_k_parts`.
        PARTS: a power of two.
        BLOCK: keys that are sorted at once; sorting all would be 100 KB of code.
    """
    row = tl.program_id(0).to(tl.int64)
    total_keys = parts * KEEP
    best = tl.full((KEEP,), -0x8000000000000000, tl.int64)
    for first in range(0, total_keys, BLOCK):
        at = first + tl.arange(0, BLOCK)
        keys = tl.load(keys_ptr + row * total_keys + at, mask=at < total_keys, other=-0x80000000)
        place = (at // KEEP) * PART + (0xFFFF - (keys & 0xFFFF))
        wide = ((keys >> 16).to(tl.int64) << 32) | (0x7FFFFFFF - place).to(tl.int64)
        wide = tl.where(keys == -0x80000000, -0x8000000000000000, wide)
        both = tl.join(best, tl.topk(wide, KEEP))
        best = tl.topk(tl.reshape(both, (2 * KEEP,)), KEEP)
    none = best == -0x8000000000000000
    ordered = (best >> 32).to(tl.int32)
    bits = tl.where(ordered < 0, ordered ^ 0x7FFF, ordered).to(tl.int16)
    value = bits.to(tl.float16, bitcast=True).to(tl.float32)
    keep = tl.arange(0, KEEP)
    tl.store(values_ptr + row * KEEP + keep, tl.where(none, float("-inf"), value))
    found = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)
    tl.store(places_ptr + row * KEEP + keep, tl.where(none, -1, found))
    each = tl.arange(0, PARTS)
    line = (row * parts + each) * 2
    largest = tl.load(stats_ptr + line, mask=each < parts, other=float("-inf"))
    total = tl.load(stats_ptr + line + 1, mask=each < parts, other=0.0)
    overall = tl.max(largest, 0)
    base = tl.where(overall == float("-inf"), 0.0, overall)
    summed = tl.sum(total * tl.exp(tl.where(total > 0.0, largest, float("-inf")) - base), 0)
    tl.store(logsumexp_ptr + row, base + tl.log(summed))
