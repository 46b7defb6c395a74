from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.bundle import io_spec
from edge.bundle.manifest import Dialect
from edge.bundle.sizes import DEFAULT_MAX_LOGITS
from edge_make.engine_profiles import profile_limits
from engines.config import BuildShapes
from engines.profiles import ShapeRange, make_profiles
from tests.makers.manifests import make_model

MODEL = make_model(num_layers=2, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16)
SHAPES = BuildShapes(max_batch=4, max_prefill=32, capacity=128, kv_buckets=(16, 64, 128))
CACHE = ((1, 2, 128, 16), (4, 2, 128, 16))


@pytest.mark.parametrize(
    ("dialect", "cursor"), [("native", "write_indices"), ("portable", "past_lengths")]
)
def test_golden(dialect: Dialect, cursor: str) -> None:
    prefill, decode, batch = make_profiles(MODEL, dialect, "fp16", SHAPES)
    kv = ShapeRange((16,), (64,), (128,))
    caches = [f"past_key_values.{i}.{part}" for i in (0, 1) for part in ("key", "value")]
    one, all_ = CACHE
    assert prefill.name == "prefill"
    assert dict(prefill.inputs) == {
        "inputs_embeds": ShapeRange((1, 1, 64), (1, 32, 64), (1, 32, 64)),
        "position_ids": ShapeRange((1, 1), (1, 32), (1, 32)),
        cursor: ShapeRange((1,), (1,), (1,)),
        "kv_positions": kv,
        "logits_indices": ShapeRange((1, 1), (1, 1), (1, 32)),
        **{name: ShapeRange(one, one, one) for name in caches},
    }
    assert decode.name == "decode"
    assert dict(decode.inputs) == {
        "inputs_embeds": ShapeRange((1, 1, 64), (4, 1, 64), (4, 1, 64)),
        "position_ids": ShapeRange((1, 1), (4, 1), (4, 1)),
        cursor: ShapeRange((1,), (4,), (4,)),
        "kv_positions": kv,
        "logits_indices": ShapeRange((1, 1), (4, 1), (4, 1)),
        **{name: ShapeRange(one, all_, all_) for name in caches},
    }
    assert batch.name == "batch"
    assert dict(batch.inputs) == {
        "inputs_embeds": ShapeRange((1, 1, 64), (4, 8, 64), (4, 8, 64)),
        "position_ids": ShapeRange((1, 1), (4, 8), (4, 8)),
        cursor: ShapeRange((1,), (4,), (4,)),
        "kv_positions": kv,
        "logits_indices": ShapeRange((1, 1), (4, 1), (4, 8)),
        **{name: ShapeRange(one, all_, all_) for name in caches},
    }


@pytest.mark.parametrize("dialect", ["native", "portable"])
def test_every_input_has_a_range_that_fits_its_spec(dialect: Dialect) -> None:
    specs = io_spec.decoder_inputs(MODEL, dialect, "fp16", SHAPES.capacity)
    for profile in make_profiles(MODEL, dialect, "fp16", SHAPES):
        assert list(profile.inputs) == [spec.name for spec in specs]
        for spec in specs:
            shape = profile.inputs[spec.name]
            for least, usual, largest, dim in zip(
                shape.min, shape.opt, shape.max, spec.shape, strict=True
            ):
                assert 1 <= least <= usual <= largest
                if isinstance(dim, int):
                    assert least == largest == dim


@given(st.integers(1, 64), st.integers(1, 2048))
def test_no_profile_takes_more_tokens_than_one_chunk_or_one_token_of_each(
    max_batch: int, max_prefill: int
) -> None:
    limits = {each.profile: each for each in profile_limits(max_batch, max_prefill)}
    assert limits["prefill"][1:] == (1, max_prefill, min(max_prefill, DEFAULT_MAX_LOGITS))
    assert all(each.num_logits <= min(each.seq, DEFAULT_MAX_LOGITS) for each in limits.values())
    assert limits["decode"][1:] == (max_batch, 1, 1)
    assert all(each.batch * each.seq <= max(max_prefill, max_batch) for each in limits.values())
    if "batch" in limits:
        assert limits["batch"].batch > 1
        assert limits["batch"].seq > 1
    else:  # one more token each would pass the chunk
        assert max_batch == 1 or 2 * max_batch > max_prefill
