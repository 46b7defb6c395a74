"""The options of the engine: checked once, the same for Python, the service and every verb."""

from __future__ import annotations

import ast
import math
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import edge
from edge.cli.settings_options import attribute_texts
from edge.engine_config import EngineConfig, EngineOptions
from edge.errors import ConfigError

OTHER_VALUES: dict[str, Any] = {
    "backend": "ort-cpu",
    "kv_capacity": 99,
    "num_threads": 1,
    "prefill": "int8",
    "prefill_chunk": 33,
    "int8_activations": False,
    "num_slots": 5,
    "max_batch": 2,
    "queue_capacity": 7,
    "target_itl_ms": 12.5,
    "reuse_prefix": False,
    "overflow": "slide",
    "draft": Path(),
    "speculative": 4,
    "prefix_dir": Path(),
    "stop_when_sure": 0.9,
    "trusted_keys": Path(),
    "image_tiles": 3,
}
"""A value that is not its default, of every option but those of `EXCLUDING`."""
EXCLUDING: dict[str, Any] = {"deterministic": True, "gpu_wait": "spin"}
"""Options that others would contradict, and each other."""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tensorrt9"}, "backend is 'tensorrt9': use auto, tensorrt, ort-cuda, ort-cpu"),
        ({"kv_capacity": 0}, "kv_capacity is 0: Expected `int` >= 1"),
        ({"num_threads": 0}, "num_threads is 0"),
        ({"prefill": "fp8"}, "prefill is 'fp8': use plain, int8"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0"),
        ({"num_slots": 0}, "num_slots is 0"),
        ({"num_slots": "4"}, "num_slots is '4': Expected `int`, got `str`"),
        ({"num_slots": True}, "num_slots is True: Expected `int`, got `bool`"),
        ({"max_batch": 0}, "max_batch is 0"),
        ({"queue_capacity": -1}, "queue_capacity is -1: Expected `int` >= 0"),
        ({"target_itl_ms": 0}, "target_itl_ms is 0: Expected `float` > 0"),
        ({"target_itl_ms": math.nan}, "target_itl_ms is nan"),
        ({"reuse_prefix": 1}, "reuse_prefix is 1: Expected `bool`"),
        ({"stop_when_sure": 0}, "stop_when_sure is 0: Expected `float` > 0"),
        ({"stop_when_sure": 1.1}, "stop_when_sure is 1.1"),
        ({"overflow": "grow"}, "overflow is 'grow': use stop, slide"),
        ({"speculative": -1}, "speculative is -1"),
        ({"draft": "small", "speculative": 0}, "draft is small, but speculative is 0"),
        ({"speculative": 4, "prefill_chunk": 1}, "no step has room for a drafted token"),
        ({"draft": "small", "prefill_chunk": 1}, "leave speculative and draft out"),
        ({"prefill": "int8", "prefill_chunk": 15}, "steps of 16 tokens and more"),
        ({"max_batch": 5, "num_slots": 4}, "max_batch is 5, but there are 4 slots"),
        ({"backend": "ort-cuda", "num_threads": 2}, "num_threads is for ort-cpu, and ort-cuda"),
        ({"backend": "tensorrt", "num_threads": 2}, "num_threads is for ort-cpu, and tensorrt"),
        ({"backend": "ort-cuda", "int8_activations": True}, "int8_activations is for ort-cpu"),
        ({"backend": "tensorrt", "int8_activations": True}, "leave one out"),
        ({"gpu_wait": "poll"}, "gpu_wait is 'poll': use auto, spin, yield, block"),
        ({"backend": "ort-cpu", "gpu_wait": "spin"}, "gpu_wait is for tensorrt, and ort-cpu is"),
        ({"backend": "ort-cuda", "gpu_wait": "block"}, "and ort-cuda is not: leave one out"),
        ({"num_threads": 2, "gpu_wait": "yield"}, "gpu_wait is for tensorrt, and num_threads is"),
        ({"backend": "tensorrt", "prefill": "int8"}, "prefill is for ort-cpu, and tensorrt"),
    ],
)
def test_what_is_wrong_is_refused_with_its_name(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as refused:
        EngineConfig(**options)
    assert message in str(refused.value)
    with pytest.raises(ConfigError):
        EngineConfig().with_options(**options)


def test_a_value_has_the_type_of_its_field():
    config = EngineConfig(target_itl_ms=40, prefix_dir="prefixes")  # type: ignore[arg-type]
    assert (config.target_itl_s, config.prefix_dir) == (0.04, Path("prefixes"))
    assert config == EngineConfig(target_itl_ms=40.0, prefix_dir=Path("prefixes"))


def test_the_smallest_chunks_that_drafts_and_int8_prompts_take():
    assert EngineConfig(speculative=4, prefill_chunk=2).max_draft_tokens == 4
    assert EngineConfig(speculative=0, prefill_chunk=1).max_draft_tokens == 0
    assert EngineConfig(prefill="int8", prefill_chunk=16).prefill == "int8"


def test_every_option_has_another_value_to_be_tried():
    changed = {
        field.name
        for field in fields(EngineConfig)
        if getattr(EngineConfig(**OTHER_VALUES), field.name) != field.default
    }
    assert changed == OTHER_VALUES.keys()
    assert changed | EXCLUDING.keys() == {field.name for field in fields(EngineConfig)}
    for name, value in EXCLUDING.items():
        assert getattr(EngineConfig(**{name: value}), name) != getattr(EngineConfig(), name)


def test_no_option_is_accepted_and_never_read():
    package = Path(edge.__file__).parent
    found = {
        node.attr
        for room in ("backends", "runtime")
        for path in (package / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("config")
    }
    found.add("target_itl_ms" if "target_itl_s" in found else "nothing")
    assert {field.name for field in fields(EngineConfig)} - found == set()


def test_an_option_that_gpu_engines_keep_anyway_requests_no_cpu():
    assert EngineConfig(backend="tensorrt", int8_activations=False).cpu_option is None


@pytest.mark.parametrize("backend", ["auto", "tensorrt", "ort-cuda", "ort-cpu"])
def test_a_wait_that_nobody_named_is_taken_everywhere(backend: Any):
    assert EngineConfig(backend=backend, gpu_wait="auto").gpu_option is None


def test_an_unknown_option_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match="no option 'slots'; the nearest known one is 'num_slots"):
        EngineConfig().with_options(slots=4)  # type: ignore[call-arg]


def test_keyword_arguments_are_the_fields():
    """The type that editors and mypy see; mypy compares the types in `with_options`."""
    assert [*typing.get_type_hints(EngineOptions)] == [field.name for field in fields(EngineConfig)]


def test_every_option_is_described():
    texts = attribute_texts(EngineConfig)
    assert [*texts] == [field.name for field in fields(EngineConfig)]
