"""``w4_gemm``: the product of `gemv` for many rows, on tensor cores.

Triton: imported where kernels are compiled or interpreted, never where they run.
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
    """``y = x @ dequantized + bias``, sums in FP32, rounded to FP16 once.

    A program owns `ROWS` rows and `COLUMNS` columns and walks down the depth, a block of 32 weights
    of each column at a time. The tensor cores multiply by integers, which FP16 holds exactly: -8 to
    7, of two planes -136 to 119. The scale is applied to the FP32 sum of the block, so nothing is
    rounded but sums.

    Args:
        x_ptr: see `gemv.w4_gemv`, as all others here.
        weights_ptr: [depth / 32, PLANES, columns, 4] 32-bit words.
        scales_ptr: [depth / (32 << group_shift), columns] FP16.
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
    # Programs that run at the same time share their columns: the weights, which are more than a
    # cache holds, come from memory once.
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    row = (program % tl.num_programs(1)) * ROWS + tl.arange(0, ROWS)
    column = (program // tl.num_programs(1)) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, 32)
    word = tl.arange(0, 4)
    shift = tl.arange(0, 8) * 4
    there = row < rows
    inside = column < columns
    wide_row = row.to(tl.int64)
    x_at = x_ptr + wide_row[:, None] * depth + k[None, :]
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    blocks = depth // 32
    next_scale = tl.load(scales_ptr + column, mask=inside, other=0.0)
    for block in range(blocks):
        x = tl.load(x_at + block * 32, mask=there[:, None], other=0.0)
        # Triton puts the loads of x and weights ahead, and not these. The last is one too many.
        scale = next_scale
        group = tl.minimum(block + 1, blocks - 1) >> group_shift
        next_scale = tl.load(scales_ptr + group * columns + column, mask=inside, other=0.0)
        line = block * PLANES * columns.to(tl.int64) + column  # may pass 2 GiB of addresses
        words = tl.load(
            weights_ptr + line[:, None] * 4 + word[None, :], mask=inside[:, None], other=0
        )
        nibbles = (words[:, None, :] >> shift[None, :, None]) & 15
        if PLANES == 2:
            words = tl.load(
                weights_ptr + (line + columns)[:, None] * 4 + word[None, :],
                mask=inside[:, None],
                other=0,
            )
            nibbles |= ((words[:, None, :] >> shift[None, :, None]) & 15) << 4
        # As the lower bits of the mantissa of 1024.0 they are FP16 without a conversion.
        excess: tl.constexpr = 1032.0 if PLANES == 1 else 1160.0
        values = (nibbles | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - excess
        # Place ``j`` of word ``q`` is weight ``4 * j + q``.
        values = tl.trans(tl.reshape(values, (COLUMNS, 32)))
        sums += tl.dot(x, values) * scale.to(tl.float32)[None, :]
    biased = tl.where(has_bias != 0, columns, 0)
    bias = tl.load(bias_ptr + column, mask=column < biased, other=0.0).to(tl.float32)
    y_at = y_ptr + wide_row[:, None] * columns + column[None, :]
    y = (sums + bias[None, :]).to(tl.float16)
    tl.store(y_at, y, mask=there[:, None] & inside[None, :])
