"""Defines how weights are stored: the kinds of scheme, and their bytes.

A new kind of scheme is a name in `manifest.SchemeKind`, an entry in `SCHEMES`, and a rule in
`quant_rules.RULES` for the ``--quant`` that uses it. The planner, the checks of disk and memory,
and the options ``--quant``, ``--keep`` and ``--group-size`` read it from there.

TensorRT takes one scale per group of weights for INT4 only (NvInfer.h of 10.3 to 11.1,
IDequantizeLayer). INT8 weights with float inputs, as far as it takes them, it unpacks in every
step. So INT8 is stored as two INT4 planes, ``w = 16 * high + low``, each of which stays packed.
"""

from __future__ import annotations

from dataclasses import dataclass

from .manifest import SchemeKind, TensorScheme

GROUP_SIZES = (128, 64, 32)
"""Numbers of weights that may share a scale; TensorRT's INT4 block quantization has these."""
HIGH_PLANE = 16
"""Weight of one in the high plane; its scale is this many times the low plane's."""
PLANES_RANGE = (-128, 119)
"""Range of integers that are stored as planes: 7 in each is 119; joined they are INT8."""
PLANES_LEAST = -136
"""Least integer that two planes can hold; only layers with offsets reach it."""
INT4_GROUP_SIZE = 32
"""Default group size of INT4 layers; 128 loses three times as much (docs/quantization.md)."""
SCALE_BYTES = 2
"""Bytes of a scale in a graph typed FP16 or BF16."""


@dataclass(frozen=True)
class SchemeFacts:
    """Facts about all weights of one kind of scheme.

    Attributes:
        kind: name of the kind.
        weight_bits: bits of a stored weight, in a graph typed FP16 or BF16.
        group_sizes: numbers of weights that may share a scale, largest first; 0 is one scale per
            output channel. Empty for weights without scales.
        default_group_size: default group size; None is the largest that fits the model.
        int8_inputs: whether the layer's inputs are rounded to INT8 too, with one scale.
        planes: whether new bundles store it as two INT4 planes.
    """

    kind: SchemeKind
    weight_bits: int
    group_sizes: tuple[int, ...] = ()
    default_group_size: int | None = None
    int8_inputs: bool = False
    planes: bool = False


SCHEMES: dict[str, SchemeFacts] = {
    facts.kind: facts
    for facts in (
        SchemeFacts("float", 16),
        SchemeFacts("int8", 8, GROUP_SIZES, planes=True),
        SchemeFacts("int4", 4, GROUP_SIZES, INT4_GROUP_SIZE),
        SchemeFacts("w8a8", 8, (0,), int8_inputs=True),
    )
}


def stored_bytes(shape: tuple[int, int], scheme: TensorScheme) -> tuple[int, int]:
    """Return bytes of a weight ``[in, out]`` and of its scales, in a graph typed FP16 or BF16."""
    width, out = shape
    facts = SCHEMES[scheme.kind]
    weight = (width * out * facts.weight_bits + 7) // 8
    if not facts.group_sizes:
        return weight, 0
    groups = width // (scheme.group_size or width) * (2 if scheme.planes else 1)
    return weight, SCALE_BYTES * (groups * out + (1 if facts.int8_inputs else 0))
