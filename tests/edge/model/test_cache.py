"""The cache by name: what rows can do that a state cannot, and rows that come back."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from edge.errors import ConfigError
from edge.model.cache import CacheSpec, Rows, State, alike, cache_tensors, check_cache
from edge.model.slot_rows import SlotRows
from tests.makers.manifests import make_model


def test_every_attention_has_keys_and_values_in_graph_order() -> None:
    tensors = cache_tensors(make_model(num_layers=3), "fp16", [1])
    assert list(tensors) == ["0.key", "0.value", "1.key", "1.value", "2.key", "2.value"]
    assert [spec.type for spec in tensors.values()] == [*["fp16"] * 2, *["int8"] * 2, *["fp16"] * 2]
    assert [names for names, _ in alike(tensors)] == [
        ["0.key", "0.value", "2.key", "2.value"],
        ["1.key", "1.value"],
    ]


def test_a_state_is_neither_cut_nor_rewound() -> None:
    tensors: dict[str, CacheSpec] = {"0.key": Rows(2, 8, "fp16"), "1.state": State((4, 8), "fp32")}
    assert [spec.row_bytes for spec in tensors.values()] == [32, 0]
    assert tensors["1.state"].shape(3, 100) == (3, 4, 8)
    check_cache({"0.key": tensors["0.key"]}, "can_cut", "a slide")
    check_cache({"0.key": tensors["0.key"]}, "can_rewind", "a draft")
    with pytest.raises(ConfigError, match=r"a slide is impossible: the cache 1\.state"):
        check_cache(tensors, "can_cut", "a slide")
    with pytest.raises(ConfigError, match=r"a draft is impossible: the cache 1\.state"):
        check_cache(tensors, "can_rewind", "a draft")


def test_rows_are_cut_and_zeroed_by_name() -> None:
    random = np.random.default_rng(0)
    rows = SlotRows({"0.key": random.random((2, 5, 8)), "3.value": random.random((1, 5, 4))})
    assert rows.length == 5
    left, zeroed = rows.without(1, 2), rows.zeroed(2, 7)
    for name, array in rows.items():
        assert_array_equal(left[name], array[:, [0, 3, 4]])
        assert_array_equal(rows.cut(1, 4)[name], array[:, 1:4])
        assert_array_equal(zeroed[name][:, :2], array[:, :2])
        assert zeroed[name].shape[1] == 7
        assert not zeroed[name][:, 2:].any()
