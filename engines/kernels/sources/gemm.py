"""``w4_gemm``: the product of `gemv` for many rows, on tensor cores.

Imports Triton: use it to compile or interpret kernels, never to run them.
"""

import triton
import triton.language as tl


@triton.jit
def w4_gemm(
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
    COLUMNS: tl.constexpr,
    PLANES: tl.constexpr,
):
    """Compute ``y = x @ dequantized + bias`` with sums in FP32, rounded to FP16 once.

    A program owns `ROWS` rows and `COLUMNS` columns and walks down the depth, a block of 32 weights
    of each column at a time. The tensor cores multiply by integers, which FP16 holds exactly: -8 to
    7, or with two planes -136 to 119. The scale multiplies the FP32 sum of the block, so only sums
    are rounded.

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
        ROWS: a power of two of at least 16.
        COLUMNS: a power of two of at least 16.
        PLANES: 1 or 2.
    """
    # Programs that run at the same time share their columns: the weights exceed the GPU's cache,
    # and this reads them from memory once.
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    row = (program % tl.num_programs(1)) * ROWS + tl.arange(0, ROWS)
    column = (program // tl.num_programs(1)) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, 32)
    word = tl.arange(0, 4)
    half = (tl.arange(0, 2) * 4)[None, :, None]
    byte = (tl.arange(0, 4) * 8)[None, :, None, None]
    there = row < rows
    inside = column < columns
    wide_row = row.to(tl.int64)
    x_at = x_ptr + wide_row[:, None] * depth + k[None, :]
    # In the lower bits of the mantissa of 1024.0 an integer is FP16 without a conversion. A zero
    # that the compiler does not recognize keeps "and" and "or" one instruction, as in `gemv`.
    zero = rows >> 31
    mask = (15 if PLANES == 1 else 255) + zero
    exponent = 0x6400 + zero
    excess: tl.constexpr = 1032.0 if PLANES == 1 else 1160.0
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    blocks = depth // 32
    # Triton prefetches x and weights, but not scales. A column past the end reads the last one's
    # scale; the last block reads its own twice.
    scale_at = scales_ptr + tl.minimum(column, columns - 1)
    next_scale = tl.load(scale_at)
    for block in range(blocks):
        x = tl.load(x_at + block * 32, mask=there[:, None], other=0.0)
        scale = next_scale
        group = tl.minimum(block + 1, blocks - 1) >> group_shift
        next_scale = tl.load(scale_at + group * columns)
        # Use 64 bits: an lm_head of 8 bits soon exceeds 2 GiB of addresses.
        line = block * PLANES * columns.to(tl.int64) + column
        words = tl.load(
            weights_ptr + line[:, None] * 4 + word[None, :], mask=inside[:, None], other=0
        )
        # Take the lower halves of bytes, [COLUMNS, half, word]; with two planes, whole bytes.
        packed = words[:, None, :] >> half
        if PLANES == 2:
            upper = tl.load(
                weights_ptr + (line + columns)[:, None] * 4 + word[None, :],
                mask=inside[:, None],
                other=0,
            )
            packed = (packed & 0x0F0F0F0F) | ((upper[:, None, :] << (4 - half)) & -0x0F0F0F10)
        # A weight is number ``8 * byte + 4 * half + word``. Splitting the words puts neighbours
        # into one register, so weights are unpacked where they are multiplied, without staging.
        even, odd = tl.split(tl.reshape(packed, (COLUMNS, 2, 2, 2)))
        even = ((even[:, None, :, :] >> byte) & mask) | exponent
        odd = ((odd[:, None, :, :] >> byte) & mask) | exponent
        values = tl.join(even, odd).to(tl.int16).to(tl.float16, bitcast=True) - excess
        values = tl.trans(tl.reshape(values, (COLUMNS, 32)))
        sums += tl.dot(x, values) * scale.to(tl.float32)[None, :]
    biased = tl.where(has_bias != 0, columns, 0)
    bias = tl.load(bias_ptr + column, mask=column < biased, other=0.0).to(tl.float32)
    y_at = y_ptr + wide_row[:, None] * columns + column[None, :]
    y = (sums + bias[None, :]).to(tl.float16)
    tl.store(y_at, y, mask=there[:, None] & inside[None, :])
