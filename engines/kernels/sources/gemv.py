"""``w4_gemv``: few rows of FP16 times weights of 4 bits, or of 8 bits as two planes of 4.

Imports Triton: use it to compile or interpret kernels, never to run them.
"""

import triton
import triton.language as tl


@triton.jit
def w4_gemv(
    x_ptr,
    weights_ptr,
    scales_ptr,
    bias_ptr,
    rows,
    columns,
    depth,
    group_shift,
    has_bias,
    y_ptr,
    ROWS: tl.constexpr,
    PLANES: tl.constexpr,
    PARTS: tl.constexpr,
    SLICES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Compute ``y = x @ dequantized + bias`` with sums in FP32, rounded once.

    A program owns ``32 * PARTS`` columns of `ROWS` rows. Its warps share the depth among them: warp
    ``i`` takes the blocks of 32 weights ``i``, ``i + SLICES``, ...; the sums of the warps are added
    at the end, in a fixed order. A thread reads the 32 weights of one column and block as 16 bytes.

    Args:
        x_ptr: [rows, depth] FP16.
        weights_ptr: [depth / 32, PLANES, columns, 4] 32-bit words of `layout.pack_weights`.
        scales_ptr: [depth / (32 << group_shift), columns] FP16; with two planes, the low one's.
        bias_ptr: [columns] FP16, read if `has_bias`.
        rows: any number.
        columns: any number.
        depth: a multiple of the group.
        group_shift: 0, 1, 2 for groups of 32, 64, 128.
        has_bias: 0 or 1.
        y_ptr: [rows, columns] FP16.
        ROWS: a power of two.
        PLANES: 1 or 2.
        PARTS: columns per thread.
        SLICES: number of warps.
        UNROLL: nibbles of a word whose inputs are prefetched, as far as registers allow.
    """
    # Triton hands out lanes, warps, and at last registers in the order of the axes.
    part = tl.arange(0, PARTS)[:, None, None]
    warp = tl.arange(0, SLICES)[None, :, None]
    lane = tl.arange(0, 32)[None, None, :]
    word = tl.arange(0, 4)[None, None, None, :]
    column = tl.program_id(0) * (PARTS * 32) + part * 32 + lane
    inside = column < columns
    blocks = depth // 32
    first_row = tl.program_id(1) * ROWS
    x_at = x_ptr + first_row.to(tl.int64) * depth
    # A zero that the compiler does not recognize keeps the exponent in a register: with two
    # constants, "and" and "or" would be two instructions.
    exponent = 0x41800000 + (rows >> 31)
    sums = ()
    for _ in tl.static_range(ROWS):
        sums += (tl.zeros((PARTS, SLICES, 32), tl.float32),)
    for first in range(0, blocks, SLICES):
        block = first + warp
        valid = (block < blocks) & inside
        scale = tl.load(
            scales_ptr + (block >> group_shift) * columns + column, mask=valid, other=0.0
        ).to(tl.float32)
        totals = ()
        for row in tl.static_range(ROWS):
            # A missing row has no blocks.
            here = block < tl.where(first_row + row < rows, blocks, 0)
            inputs = tl.load(x_at + row * depth + block * 32 + lane, mask=here, other=0.0)
            # Every nibble will be 24 too large.
            excess = 24.0 * (17 if PLANES == 2 else 1) * tl.sum(inputs.to(tl.float32), 2)
            totals += (tl.zeros((PARTS, SLICES, 32), tl.float32) - excess[:, :, None],)
        for plane in tl.static_range(PLANES):
            # Use 64 bits: an lm_head of 8 bits soon exceeds 2 GiB of addresses.
            line = (block * PLANES + plane).to(tl.int64) * columns + column
            words = tl.load(
                weights_ptr + line[:, :, :, None] * 4 + word, mask=valid[:, :, :, None], other=0
            )
            dots = ()
            for _ in tl.static_range(ROWS):
                dots += (tl.zeros((PARTS, SLICES, 32, 4), tl.float32),)
            for place in tl.range(0, 8, loop_unroll_factor=UNROLL):
                # A nibble v + 8 in the upper mantissa bits of 16.0 is the float 24 + v.
                value = (((words << 19) & 0x780000) | exponent).to(tl.float32, bitcast=True)
                words = words >> 4
                k = block[:, :, :, None] * 32 + place * 4 + word
                new_dots = ()
                for row in tl.static_range(ROWS):
                    wanted = block < tl.where(first_row + row < rows, blocks, 0)
                    x = tl.load(x_at + row * depth + k, mask=wanted[:, :, :, None], other=0.0)
                    new_dots += (dots[row] + value * x.to(tl.float32),)
                dots = new_dots
            new_totals = ()
            for row in tl.static_range(ROWS):
                new_totals += (totals[row] + tl.sum(dots[row], 3) * (16.0 if plane else 1.0),)
            totals = new_totals
        new_sums = ()
        for row in tl.static_range(ROWS):
            new_sums += (sums[row] + totals[row] * scale,)
        sums = new_sums
    biased = tl.where(has_bias != 0, columns, 0)
    bias = tl.load(bias_ptr + column, mask=column < biased, other=0.0).to(tl.float32)
    for row in tl.static_range(ROWS):
        y = tl.sum(sums[row], 1)[:, None, :] + bias
        at = y_ptr + (first_row + row).to(tl.int64) * columns + column
        tl.store(at, y.to(tl.float16), mask=column < tl.where(first_row + row < rows, columns, 0))
