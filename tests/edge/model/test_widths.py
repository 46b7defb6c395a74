"""Sums over layers that differ: what a model takes is what its own layers take."""

from __future__ import annotations

import msgspec
import pytest

from edge.backends.host_memory import plan_host_memory
from edge.bundle.memory_facts import MemoryFacts
from edge.bundle.sizes import StepLimits, activation_bytes, check_slots
from edge.bundle.weights import weight_parts
from edge.errors import ConfigError
from edge.model.parts import widest
from edge.model.spec import LayerRun, ModelSpec, RopeSpec
from edge_lab.planner.memory import Deployment
from tests.makers.dense import Dense

_SMALL = Dense("llama", 64, 1, 4, 2, 16, 96, 300, 1e-6, 512, RopeSpec(10_000.0))
_LARGE = msgspec.structs.replace(_SMALL, num_heads=8, num_kv_heads=1, head_dim=32)


def mixed(*dense: Dense, without_rope: tuple[int, ...] = ()) -> ModelSpec:
    """A model with a layer of each."""
    layers = [each.model([0] if i in without_rope else ()).layer(0) for i, each in enumerate(dense)]
    runs = tuple(LayerRun(1, layer) for layer in layers)
    return msgspec.structs.replace(dense[0].model(), layers=runs)


def test_the_widest_point_of_a_layer() -> None:
    assert widest(_SMALL.model().layer(0)) == 2 * 96
    assert widest(_LARGE.model().layer(0)) == (8 + 2 * 1) * 32
    assert widest(()) == 0


@pytest.mark.parametrize("order", [(_SMALL, _LARGE), (_LARGE, _SMALL)])
def test_activations_are_those_of_the_widest_layer(order: tuple[Dense, Dense]) -> None:
    model, limits = mixed(*order), [StepLimits("prefill", 1, 10, 1)]
    assert activation_bytes(model, "native", limits, 100) == 2 * 2 * 10 * (320 + 2 * 64)
    portable = 2 * 2 * 10 * (320 + 8 * (100 + 10) + 2 * 64)
    assert activation_bytes(model, "portable", limits, 100) == portable
    facts = MemoryFacts({}, {}, 0)
    sizes = {"num_slots": 1, "kv_capacity": 100, "max_step_tokens": 10}
    plan = plan_host_memory(model, facts, "native", 0, **sizes)
    assert plan.activations == 4 * 10 * (8 * 100 + 2 * 320 + 2 * 64)


def test_a_slot_ends_aligned_in_every_layer() -> None:
    check_slots(_LARGE.model(), 4)  # rows of 64 bytes
    odd = msgspec.structs.replace(_SMALL, num_heads=1, num_kv_heads=1, head_dim=8)  # of 16
    check_slots(mixed(_LARGE, odd), 16)
    with pytest.raises(ConfigError, match="multiple of 16"):
        check_slots(mixed(_LARGE, odd), 4)


def test_the_cache_is_the_sum_of_the_layers() -> None:
    deployment = Deployment("ort-cpu")
    assert deployment.cache_rows(mixed(_SMALL, _LARGE)) == [(2, 64), (2, 64), (1, 128), (1, 128)]
    assert deployment.cache_token_bytes(mixed(_SMALL, _LARGE)) == 2 * 2 * 64 + 2 * 128


def test_a_table_of_rope_is_as_wide_as_what_it_turns() -> None:
    turned = weight_parts(mixed(_SMALL, _SMALL, without_rope=(1,)), [], 100)["rope"]
    assert turned == weight_parts(_SMALL.model(), [], 100)["rope"] == 2 * 100 * 16
    assert weight_parts(mixed(_SMALL, without_rope=(0,)), [], 100)["rope"] == 0
