"""Lists the kernels to compile and their constants: data, without Triton.

A variant is one Triton function with its compile-time constants. Its cubin and its record in the
manifest have its name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from edge.backends.tensorrt.launch_rules import MOST_CACHE_PARTS, PART_LOGITS

ARCHITECTURES = (80, 87, 90, 100, 110, 120)
"""Compute capabilities, times ten. 80 is Ampere, and runs on other desktop GPUs of 8.x and Ada; 87
is the Orin; 90 is Hopper; 100 and 120 are Blackwell, for data centres and desktops; 110 is Thor."""
MAX_ROWS = 8
"""The most rows of a product by `w4_gemv`; beyond that tensor cores are faster."""
HEAD_WIDTHS = (64, 128)
ATTENTION_ROWS, JOIN_ROWS = (16, 64), (1, 8)
"""Numbers of (head, token) pairs that a program of attention computes, and one that joins parts."""
LEAST_PART = 128
"""Fewest rows of a sequence that are worth a program."""
KEPT = (256, 1024)
"""Sizes of the kernel that sorts the kept logits: each is the most logits of a row it keeps."""
MOST_PARTS = 64
"""The most parts, of `PART_LOGITS` logits each, in a row; so a row has at most 262,144 logits."""

Type = Literal["*fp16", "*fp32", "*i32", "i32"]


@dataclass(frozen=True)
class Variant:
    """One kernel to compile.

    Attributes:
        name: name of the variant.
        source: module under `sources`.
        function: function in that module; the entry point has the variant's name instead.
        parameters: names and types in order: inputs, numbers, outputs.
        constants: compile-time constants.
        warps: threads per program, in units of 32.
        stages: how many iterations ahead a loop prefetches into shared memory; 1 prefetches none.
        aligned: numbers that are multiples of 16, which wide loads need. Pointers always are.
    """

    name: str
    source: str
    function: str
    parameters: dict[str, Type]
    constants: dict[str, int | float]
    warps: int
    stages: int = 1
    aligned: frozenset[str] = field(default_factory=frozenset)


def gemv_name(rows: int, planes: int) -> str:
    """Name the variant for this many rows (up to 8) and planes of weights (1 or 2)."""
    return f"w4_gemv_rows{_power(rows, 1)}_planes{planes}"


def gemm_name(planes: int) -> str:
    """Name the variant for many rows and this many planes of weights (1 or 2)."""
    return f"w4_gemm_planes{planes}"


def attention_name(rows: int, width: int) -> str:
    """Name the variant with this many (head, token) pairs (16 or 64) of this width per program."""
    return f"attention_parts_rows{rows}_width{width}"


def join_name(rows: int, width: int) -> str:
    """Name the variant that joins the parts of this many (head, token) pairs (1 or 8)."""
    return f"attention_join_rows{rows}_width{width}"


def merge_name(keep: int) -> str:
    """Name the variant that sorts this many of the largest logits (up to 1024)."""
    return f"top_k_merge_most{next(most for most in KEPT if most >= keep)}"


def _power(number: int, least: int) -> int:
    return max(1 << (number - 1).bit_length(), least)


_PRODUCT: dict[str, Type] = {
    "x_ptr": "*fp16",
    "weights_ptr": "*i32",
    "scales_ptr": "*fp16",
    "bias_ptr": "*fp16",
    "rows": "i32",
    "columns": "i32",
    "depth": "i32",
    "group_shift": "i32",
    "has_bias": "i32",
    "y_ptr": "*fp16",
}


def _gemv(rows: int, planes: int) -> Variant:
    # Eight rows in one loop of all eight nibbles would spill: inputs are prefetched too far.
    warps, unroll = {1: (8, 8), 2: (8, 8), 4: (4, 2), 8: (4, 2 if planes == 1 else 1)}[rows]
    return Variant(
        gemv_name(rows, planes),
        "gemv",
        "w4_gemv",
        _PRODUCT,
        {"ROWS": rows, "PLANES": planes, "PARTS": 2, "SLICES": warps, "UNROLL": unroll},
        warps,
        aligned=frozenset({"depth"}),
    )


def _gemm(planes: int) -> Variant:
    return Variant(
        gemm_name(planes),
        "gemm",
        "w4_gemm",
        _PRODUCT,
        {"ROWS": 128, "COLUMNS": 64, "PLANES": planes},
        4,
        stages=4,
        aligned=frozenset({"depth"}),
    )


def _attention(rows: int, width: int) -> Variant:
    return Variant(
        attention_name(rows, width),
        "attention",
        "attention_parts",
        {
            "query_ptr": "*fp16",
            "keys_ptr": "*fp16",
            "values_ptr": "*fp16",
            "new_keys_ptr": "*fp16",
            "new_values_ptr": "*fp16",
            "positions_ptr": "*i32",
            "groups": "i32",
            "heads": "i32",
            "tokens": "i32",
            "capacity": "i32",
            "partial_ptr": "*fp32",
            "stats_ptr": "*fp32",
        },
        {
            "ROWS": rows,
            "WIDTH": width,
            # With 64 rows of 128 values, two stages exceed the 48 KiB that a launch may have.
            "BLOCK": 64 if rows == 16 or width == 64 else 32,
            "LEAST": LEAST_PART,
            "SCALE": math.log2(math.e) / math.sqrt(width),
        },
        4,
        stages=2,
    )


def _join(rows: int, width: int) -> Variant:
    return Variant(
        join_name(rows, width),
        "attention",
        "attention_join",
        {
            "partial_ptr": "*fp32",
            "stats_ptr": "*fp32",
            "positions_ptr": "*i32",
            "query_ptr": "*fp16",
            "rows": "i32",
            "tokens": "i32",
            "heads": "i32",
            "parts": "i32",
            "output_ptr": "*fp16",
        },
        {
            "ROWS": rows,
            "WIDTH": width,
            "STEP": 8 // rows,
            "PARTS": MOST_CACHE_PARTS,
            "LEAST": LEAST_PART,
        },
        4,
    )


def _merge(most: int) -> Variant:
    return Variant(
        merge_name(most),
        "top_k",
        "top_k_merge",
        {
            "keys_ptr": "*i32",
            "stats_ptr": "*fp32",
            "parts": "i32",
            "keep": "i32",
            "values_ptr": "*fp16",
            "places_ptr": "*i32",
            "rest_ptr": "*fp32",
        },
        {"PART": PART_LOGITS, "MOST": most, "PARTS": MOST_PARTS, "BLOCK": 2048},
        8,
    )


VARIANTS: tuple[Variant, ...] = (
    *(_gemv(rows, planes) for rows in (1, 2, 4, 8) for planes in (1, 2)),
    *(_gemm(planes) for planes in (1, 2)),
    *(_attention(rows, width) for rows in ATTENTION_ROWS for width in HEAD_WIDTHS),
    *(_join(rows, width) for rows in JOIN_ROWS for width in HEAD_WIDTHS),
    Variant(
        "top_k_parts",
        "top_k",
        "top_k_parts",
        {
            "logits_ptr": "*fp16",
            "keep_ptr": "*fp32",
            "columns": "i32",
            "keep": "i32",
            "keys_ptr": "*i32",
            "stats_ptr": "*fp32",
        },
        {"PART": PART_LOGITS, "MOST": KEPT[-1]},
        8,
    ),
    *(_merge(most) for most in KEPT),
)
BY_NAME = {variant.name: variant for variant in VARIANTS}
