"""Sizes and places, without a device: nothing overlaps, everything is aligned, all of it fits."""

from __future__ import annotations

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.backends.tensorrt.device_memory import (
    CachePlanes,
    StepSizes,
    input_arrays,
    new_rows_bytes,
    new_rows_stride,
    placed,
)
from edge.bundle.sizes import ALIGNMENT
from edge.model.cache import Rows
from tests.makers.manifests import make_manifest

MODEL = make_manifest().model


@settings(deadline=None)
@given(
    st.integers(1, 8), st.integers(1, 8), st.integers(1, 300), st.sampled_from([16, 24, 64, 128])
)
def test_the_new_rows_of_any_step_fit_and_are_aligned(batch: int, heads: int, seq: int, dim: int):
    rows = Rows(heads, dim, "fp16")
    stride = new_rows_stride(batch, seq, rows)
    pitch = seq * dim * 2
    assert stride % ALIGNMENT == stride % pitch == 0
    assert stride >= batch * heads * pitch
    # The block of the largest step holds every smaller one.
    sizes = StepSizes(8, batch * seq, 1)
    assert 4 * stride <= new_rows_bytes(sizes, CachePlanes(["0.key"] * 4, rows))


@given(st.integers(1, 64), st.integers(1, 2000), st.integers(1, 500), st.integers(1, 5000))
def test_regions_of_the_inputs_do_not_overlap(batch: int, tokens: int, logits: int, hidden: int):
    model = msgspec.structs.replace(MODEL, hidden_size=hidden)
    offsets, end = placed(input_arrays(StepSizes(batch, tokens, logits), model, "write_indices"))
    starts = [*offsets.values(), end]
    needed = [8 * batch, 8 * logits, 8 * tokens, 2 * tokens * hidden]
    assert all(start % ALIGNMENT == 0 for start in starts)
    for start, end, num_bytes in zip(starts, starts[1:], needed, strict=False):
        assert 0 <= end - start - num_bytes < ALIGNMENT
