"""Sliding: the rows that stay are those of their tokens at their new places."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.backends import Floats
from edge.backends.ort.cpu import OrtBackend
from edge.backends.step import step_after
from edge.bundle.embeddings import EMBEDDINGS_NAME, EmbeddingTable
from edge.bundle.manifest import read_manifest
from edge.bundle.rope import inverse_frequencies, turn
from edge.errors import ConfigError
from edge.model.spec import ModelSpec, RopeSpec
from edge.runtime.overflow import SlidingWindow
from tests.conftest import Bundles
from tests.makers.dense import Dense
from tests.makers.tiny_models import KINDS, Kind
from tests.standins.slot_rows import by_name, stacked


def _model(rope: RopeSpec | None = None, head_dim: int = 8) -> ModelSpec:
    return Dense(
        architecture="llama",
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=head_dim,
        intermediate_size=16,
        vocab_size=32,
        rms_norm_eps=1e-6,
        max_position_embeddings=4096,
        rope=rope or RopeSpec(theta=10_000.0),
    ).model()


@given(
    length=st.integers(2, 40),
    sinks=st.integers(1, 12),
    dtype=st.sampled_from([np.float16, np.float32]),
)
def test_sinks_and_the_newest_stay_in_order(length: int, sinks: int, dtype: type) -> None:
    rows: Floats = np.random.default_rng(0).standard_normal((4, 1, length, 8)).astype(dtype)
    before, ids = rows.copy(), list(range(100, 100 + length))
    slid, kept_ids = SlidingWindow(_model(), sinks).slide(by_name(rows), ids)
    kept = stacked(slid)

    assert 1 <= len(kept_ids) == kept.shape[2] < length
    assert kept.dtype == dtype
    assert kept_ids == sorted(set(kept_ids))  # an order, and nobody twice
    assert kept_ids[-1] == ids[-1]
    num_first = min(sinks, (length - 1) // 2)
    assert kept_ids[:num_first] == ids[:num_first]
    dropped = length - len(kept_ids)
    assert kept_ids[num_first:] == ids[num_first + dropped :]
    # Values, and the sinks' keys, are untouched.
    at = [token - 100 for token in kept_ids]
    assert np.array_equal(kept[1::2], before[1::2][:, :, at])
    assert np.array_equal(kept[:, :, :num_first], before[:, :, :num_first])
    assert np.array_equal(rows, before)


_ropes = st.sampled_from(
    [
        RopeSpec(theta=10_000.0),
        RopeSpec(theta=500_000.0, kind="llama3", factor=8.0, original_max_positions=8192),
        RopeSpec(theta=1e6, kind="linear", factor=4.0),
        RopeSpec(
            theta=1e6, kind="yarn", factor=4.0, original_max_positions=64, attention_factor=1.14
        ),
    ]
)


@given(rope=_ropes, start=st.integers(0, 30_000), by=st.integers(-30_000, 30_000))
def test_turning_is_computing_at_the_other_position(rope: RopeSpec, start: int, by: int) -> None:
    frequencies = inverse_frequencies(rope, 16)
    plain = np.random.default_rng(1).standard_normal((3, 16)) * rope.attention_factor
    there = turn(turn(plain, frequencies, start), frequencies, by)
    assert there == pytest.approx(turn(plain, frequencies, start + by), abs=1e-9)
    assert np.linalg.norm(there, axis=-1) == pytest.approx(np.linalg.norm(plain, axis=-1))


@pytest.mark.parametrize("kind", KINDS)
def test_turned_keys_are_those_that_the_graph_computes_there(
    tiny_bundles: Bundles, kind: Kind
) -> None:
    """Keys of the first layer depend on the token and its position alone; default, llama3, yarn."""
    bundle = tiny_bundles(kind, dialect="portable")
    manifest = read_manifest(bundle)
    ids = np.random.RandomState(3).randint(0, 300, 60)

    def rows_of(tokens: np.ndarray) -> np.ndarray:
        backend.forward(step_after([0], [0], table[tokens[None]], np.array([[len(tokens) - 1]])))
        return stacked(backend.read_slot(0, len(tokens)))

    table = EmbeddingTable(bundle / EMBEDDINGS_NAME)
    backend = OrtBackend(bundle, manifest, num_threads=1)
    try:
        window = SlidingWindow(manifest.model)
        slid, kept_ids = window.slide(by_name(rows_of(ids)), ids.tolist())
        kept = stacked(slid)
        fresh = rows_of(np.array(kept_ids))
        assert kept.dtype == fresh.dtype
        scale = np.abs(fresh[0]).max()
        assert np.abs(kept[0] - fresh[0]).max() <= 2e-6 * scale
        # It is the turning that does it.
        unturned = rows_of(ids)[0][:, [*range(4), *range(60 - (len(kept_ids) - 4), 60)]]
        assert np.abs(unturned - fresh[0]).max() > 0.1 * scale
    finally:
        backend.close()
        table.close()


def test_a_window_without_sinks_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1 sink"):
        SlidingWindow(_model(), 0)
