from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from edge.errors import ConfigError
from engines.build_plan import plan_build
from engines.config import BuildConfig, BuildShapes, default_kv_buckets, resolve
from tests.makers.manifests import make_manifest

BUNDLE = Path("bundle")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_batch": 0}, "--max-batch 0"),
        ({"max_batch": 65}, "1 to 64"),
        ({"max_prefill": 0}, "--max-prefill 0"),
        ({"workspace_bytes": 1000}, "--workspace of 1000 bytes"),
        ({"opt_level": 6}, "--opt-level 6"),
        ({"kv_read": "paged"}, "none of auto, slice, full, lengths"),
        ({"kv_buckets": (512, 256)}, "512,256 must be positive and ascending"),
        ({"kv_buckets": (0, 256)}, "positive"),
        ({"kv_buckets": (256,), "kv_read": "full"}, "leave one of the two out"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(options, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        BuildConfig(BUNDLE, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_capacity": 1}, "--kv-capacity 1"),
        ({"kv_capacity": 100_000}, "--kv-capacity 100000"),
        ({"kv_capacity": 256}, "--max-prefill 512 exceeds the KV capacity of 256"),
        ({"kv_capacity": 1023}, "addresses that TensorRT refuses; .* a multiple of 4"),
        ({"kv_capacity": 1024, "kv_buckets": (256, 512)}, "must be the KV capacity, 1024"),
    ],
)
def test_numbers_that_do_not_fit_the_model_are_refused(options, words: str) -> None:
    manifest = make_manifest(kv_capacity=1024, rope_positions=2048)
    with pytest.raises(ConfigError, match=words):
        resolve(BuildConfig(BUNDLE, **options), manifest)


def test_lengths_need_an_attention_operator() -> None:
    manifest = make_manifest(kv_capacity=1024, rope_positions=2048, dialect="portable")
    with pytest.raises(ConfigError, match="--dialect native"):
        resolve(BuildConfig(BUNDLE, kv_read="lengths"), manifest)


def test_what_is_left_open_comes_from_the_bundle() -> None:
    manifest = make_manifest(kv_capacity=1000, rope_positions=2048)
    assert resolve(BuildConfig(BUNDLE), manifest) == BuildShapes(1, 512, 1000, (256, 512, 1000))
    full = resolve(BuildConfig(BUNDLE, kv_read="full", kv_capacity=2048), manifest)
    assert full == BuildShapes(1, 512, 2048, (2048,))


def test_default_buckets_end_at_the_capacity() -> None:
    assert default_kv_buckets(128) == (128,)
    assert default_kv_buckets(256) == (256,)
    assert default_kv_buckets(257) == (256, 257)
    assert default_kv_buckets(4096) == (256, 512, 1024, 2048, 4096)


def test_the_key_has_every_option_except_where_and_how_to_build() -> None:
    """The options of an engine are part of its key, and give it again."""
    manifest = make_manifest(kv_capacity=1000, rope_positions=2048)

    def options(**changes: Any) -> dict[str, Any]:
        config = BuildConfig(**{"bundle": BUNDLE, **changes})
        return plan_build(config, manifest).rebuild_options()

    apart = {"bundle": Path("elsewhere"), "timing_cache": Path("t"), "force": True, "again": True}
    counting = {
        "max_batch": 2,
        "max_prefill": 64,
        "kv_capacity": 512,
        "kv_buckets": (500, 1000),
        "kv_read": "full",
        "attention": "fused",
        "tune": True,
        "workspace_bytes": 1 << 29,
        "opt_level": 5,
        "best_logits": 64,
        "kernels": "own",
    }
    assert {field.name for field in dataclasses.fields(BuildConfig)} == {
        *apart,
        *counting,
        "plugins",
    }
    for name, value in apart.items():
        assert options(**{name: value}) == options()
    for name, value in counting.items():
        assert options(**{name: value}) != options(), name
    assert options(kernels="own", plugins="python") != options(kernels="own")
