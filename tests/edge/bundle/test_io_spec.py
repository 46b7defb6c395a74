from __future__ import annotations

import math
import re
from typing import Any

import msgspec
import pytest

from edge.bundle import io_spec
from edge.bundle.io_spec import (
    TensorSpec,
    check_capacity,
    decoder_inputs,
    decoder_outputs,
    kv_bytes_per_token,
    new_key,
    new_value,
    past_key,
    past_value,
    present_key,
    present_value,
    rope_positions,
)
from edge.bundle.manifest import Dialect, FloatType
from edge.errors import ConfigError
from edge.model.cache import cache_tensors
from tests.makers.manifests import make_model

MODEL = make_model(num_layers=3, hidden_size=80)
CAPACITY = 512
DIALECTS: list[Dialect] = ["native", "portable"]


def by_name(specs: list[TensorSpec]) -> dict[str, TensorSpec]:
    return {spec.name: spec for spec in specs}


def cache_shape(spec: TensorSpec) -> tuple[int, ...]:
    """One sequence's share of a cache input."""
    return tuple(size for size in spec.shape[1:] if isinstance(size, int))


def test_the_docstrings_table_is_the_native_dialect() -> None:
    sizes: dict[str, int | str] = {
        "B": io_spec.BATCH, "S": io_spec.SEQ, "N": io_spec.NUM_LOGITS, "K": io_spec.KV,
        "C": CAPACITY, "hidden": MODEL.hidden_size, "kv": MODEL.attentions()[0].kv_heads,
        "dim": MODEL.attentions()[0].dim, "vocab": MODEL.vocab_size,
    }  # fmt: skip
    rows = re.findall(
        r"^(in|out) +([\w.]+) +\[(.+?)\] +(\w+) ", io_spec.__doc__ or "", re.MULTILINE
    )
    assert len(rows) == 9
    sides = {
        "in": by_name(decoder_inputs(MODEL, "native", "bf16", CAPACITY)),
        "out": by_name(
            decoder_outputs(MODEL, "native", "bf16", CAPACITY, hidden_width=MODEL.hidden_size)
        ),
    }
    for side, name, shape, dtype in rows:
        for i in range(MODEL.num_layers) if ".i." in name else [0]:
            spec = sides[side].pop(name.replace(".i.", f".{i}."))
            assert spec.shape == tuple(sizes[symbol] for symbol in shape.split(", "))
            assert spec.dtype == ("bf16" if dtype == "T" else dtype)
    # The table leaves out the values, which are like the keys.
    left = {*sides["in"], *sides["out"]}
    layers = range(MODEL.num_layers)
    assert left == {past_value(i) for i in layers} | {present_value(i) for i in layers}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_names_are_unique(dialect: Dialect) -> None:
    specs = decoder_inputs(MODEL, dialect, "fp16", CAPACITY)
    specs += decoder_outputs(MODEL, dialect, "fp16", CAPACITY)
    assert len(by_name(specs)) == len(specs)


def test_native_cache_can_be_bound_in_place() -> None:
    inputs = by_name(decoder_inputs(MODEL, "native", "fp16", CAPACITY))
    outputs = by_name(decoder_outputs(MODEL, "native", "fp16", CAPACITY))
    for i in range(MODEL.num_layers):
        for past, present in ((past_key, present_key), (past_value, present_value)):
            one, other = inputs[past(i)], outputs[present(i)]
            assert (one.shape, one.dtype) == (other.shape, other.dtype)


def test_portable_returns_the_steps_rows_in_the_layout_of_the_cache() -> None:
    inputs = by_name(decoder_inputs(MODEL, "portable", "fp16", CAPACITY))
    outputs = by_name(decoder_outputs(MODEL, "portable", "fp16", CAPACITY))
    for i in range(MODEL.num_layers):
        for past, new in ((past_key, new_key), (past_value, new_value)):
            batch, heads, rows, dim = inputs[past(i)].shape
            assert rows == CAPACITY
            assert outputs[new(i)].shape == (batch, heads, io_spec.SEQ, dim)
            assert outputs[new(i)].dtype == inputs[past(i)].dtype


def test_dialects_differ_in_the_cursor_only() -> None:
    native, portable = (
        [spec.name for spec in decoder_inputs(MODEL, dialect, "fp16", CAPACITY)]
        for dialect in DIALECTS
    )
    assert len(native) == len(portable)
    differing = [pair for pair in zip(native, portable, strict=True) if len(set(pair)) == 2]
    assert differing == [(io_spec.WRITE_INDICES, io_spec.PAST_LENGTHS)]


@pytest.mark.parametrize(("dtype", "size"), [("fp16", 2), ("bf16", 2), ("fp32", 4)])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_kv_bytes_per_token_is_the_size_of_the_cache_inputs(
    dialect: Dialect, dtype: FloatType, size: int
) -> None:
    caches = [
        spec
        for spec in decoder_inputs(MODEL, dialect, dtype, CAPACITY)
        if spec.name.startswith("past_key_values.")
    ]
    total = sum(math.prod(cache_shape(spec)) * size for spec in caches)
    assert total == kv_bytes_per_token(MODEL, dtype) * CAPACITY


def test_rope_table_is_capped() -> None:
    assert rope_positions(make_model(max_position_embeddings=2048)) == 2048
    assert rope_positions(make_model(max_position_embeddings=131072)) == 32768


@pytest.mark.parametrize("capacity", [2, 100])
def test_capacity_inside(capacity: int) -> None:
    check_capacity(capacity, 100)


@pytest.mark.parametrize("capacity", [-1, 0, 1, 101])
def test_capacity_outside(capacity: int) -> None:
    with pytest.raises(ConfigError, match=rf"--kv-capacity {capacity} .* 2 to 100"):
        check_capacity(capacity, 100)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_dialect_is_described_as_its_tensors_are(dialect: Dialect) -> None:
    spec = io_spec.DIALECTS[dialect]
    inputs = by_name(decoder_inputs(MODEL, dialect, "fp16", CAPACITY))
    outputs = by_name(decoder_outputs(MODEL, dialect, "fp16", CAPACITY))
    assert inputs[spec.cursor].shape == (io_spec.BATCH,)
    for name in cache_tensors(MODEL, "fp16"):
        # In place, the output is the cache itself.
        past, output = inputs[io_spec.PAST_PREFIX + name], outputs[spec.new_prefix + name]
        assert (past.shape == output.shape) == spec.in_place


def test_rows_that_a_step_reads() -> None:
    native, portable = io_spec.DIALECTS["native"], io_spec.DIALECTS["portable"]
    assert native.rows_read([3, 9], 12) == 12  # its own rows are written first
    assert portable.rows_read([3, 9], 12) == 9
    assert portable.rows_read([0], 5) == 1  # never none


@pytest.mark.parametrize(
    ("task", "name", "width"),
    [("generate", "logits", MODEL.vocab_size), ("rerank", "logits", 2),
     ("embed", "embeddings", MODEL.hidden_size)],
)  # fmt: skip
@pytest.mark.parametrize("dialect", ["native", "portable"])
def test_the_first_output_is_that_of_the_task(
    task: Any, name: str, width: int, dialect: Any
) -> None:
    model = msgspec.structs.replace(MODEL, task=task)
    first, *rest = decoder_outputs(model, dialect, "fp16", CAPACITY)
    assert (first.name, first.shape) == (name, (io_spec.BATCH, io_spec.NUM_LOGITS, width))
    assert rest == decoder_outputs(MODEL, dialect, "fp16", CAPACITY)[1:]
