"""The kinds of scheme, and the bytes of what is stored by them."""

from __future__ import annotations

from typing import get_args

import pytest

from edge.bundle.manifest import SchemeKind, TensorScheme
from edge.bundle.quant_rules import RULES, Quant
from edge.bundle.schemes import SCHEMES, stored_bytes


def test_every_kind_has_its_facts_and_every_quantization_its_rules():
    assert set(SCHEMES) == set(get_args(SchemeKind))
    assert set(RULES) == set(get_args(Quant))


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (TensorScheme(kind="float"), (2 * 64 * 30, 0)),
        (
            TensorScheme(kind="int8", group_size=32, planes=True),
            (64 * 30, 2 * 2 * 2 * 30),
        ),  # a scale in each plane
        (TensorScheme(kind="int8", group_size=32), (64 * 30, 2 * 2 * 30)),  # of an old bundle
        (TensorScheme(kind="int8"), (64 * 30, 2 * 30)),
        (TensorScheme(kind="int4", group_size=32), (32 * 30, 2 * 2 * 30)),
        (TensorScheme(kind="w8a8"), (64 * 30, 2 * 30 + 2)),  # and the scale of the inputs
    ],
    ids=str,
)
def test_bytes_of_a_stored_weight_and_its_scales(scheme: TensorScheme, expected: tuple[int, int]):
    assert stored_bytes((64, 30), scheme) == expected
    assert stored_bytes((1, 3), TensorScheme(kind="int4", group_size=0))[0] == 2  # two in a byte
