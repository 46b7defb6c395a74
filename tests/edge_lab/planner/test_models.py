"""Where the planner's dimensions come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.errors import CheckpointError, ConfigError
from edge.model.spec import ModelSpec, RopeSpec
from edge_lab.planner.models import BUILT_IN, find_model, read_config
from edge_lab.prove.checkpoint import CONFIG
from edge_make.model_config import parse_config
from tests.conftest import Bundles, Checkpoints
from tests.makers.dense import dense
from tests.makers.manifests import change_model
from tests.makers.tiny_models import Kind


def without_rope(spec: ModelSpec) -> ModelSpec:
    """RoPE and epsilon are no matter of bytes; the built-in models leave them out."""
    return change_model(spec, rope=RopeSpec(theta=1.0), rms_norm_eps=1.0)


@pytest.mark.parametrize("kind", ["qwen2", "llama", "qwen3"])
def test_a_config_is_found_by_its_directory_and_by_its_path(
    kind: Kind, tiny_checkpoints: Checkpoints
):
    path = tiny_checkpoints(kind) / "config.json"
    assert read_config(path) == parse_config(json.loads(path.read_text()))
    assert find_model(str(path.parent)).spec == find_model(str(path)).spec == read_config(path)


def test_the_built_in_model_is_the_real_config(tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    assert without_rope(BUILT_IN["deepseek-r1:1.5b"].spec) == without_rope(read_config(path))


@pytest.mark.parametrize(
    ("name", "layers", "head", "total"),
    [  # 10^9 parameters; the models' cards round them to 1.78, 7.62, 8.03 and 8.19
        ("deepseek-r1:1.5b", 1.310, 0.233, 1.777),
        ("deepseek-r1:7b", 6.525, 0.545, 7.615),
        ("deepseek-r1:8b", 6.979, 0.525, 8.030),
        ("deepseek-r1:8b-0528", 6.946, 0.622, 8.190),
    ],
)
def test_built_in_models_have_the_published_sizes(
    name: str, layers: float, head: float, total: float
):
    spec = BUILT_IN[name].spec
    q_width, kv_width = (
        spec.attentions()[0].heads * spec.attentions()[0].dim,
        spec.attentions()[0].kv_heads * spec.attentions()[0].dim,
    )
    per_layer = spec.hidden_size * (2 * q_width + 2 * kv_width + 3 * dense(spec).intermediate_size)
    table = spec.hidden_size * spec.vocab_size
    assert spec.num_layers * per_layer / 1e9 == pytest.approx(layers, abs=0.001)
    assert table / 1e9 == pytest.approx(head, abs=0.001)
    assert (spec.num_layers * per_layer + 2 * table) / 1e9 == pytest.approx(total, abs=0.002)


def test_a_bundle_brings_its_manifest(tiny_bundles: Bundles):
    bundle = tiny_bundles("qwen2", quant="int4")
    found = find_model(str(bundle))
    assert found.manifest is not None
    assert (found.spec, found.bundle) == (found.manifest.model, bundle)


def test_an_unknown_model_is_refused_with_suggestions(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"deepseek-r1:1\.5b"):
        find_model(str(tmp_path))
    with pytest.raises(ConfigError, match="no-such-model is no model by name"):
        find_model("no-such-model")
    with pytest.raises(ConfigError, match="n is no model by name"):
        find_model("n" * 300)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures GPT2LMHeadModel is not supported"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be"),
    ],
)
def test_a_config_that_export_refuses_is_refused_by_its_path(
    change: dict[str, Any], message: str, tmp_path: Path
):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**CONFIG, **change}))
    with pytest.raises(CheckpointError, match=f"^{path}: .*{message}"):
        read_config(path)


def test_a_quantized_checkpoint_is_planned_by_its_dimensions(tmp_path: Path):
    """What it is planned as is the recipe that the plan is asked for."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**CONFIG, "quantization_config": {"quant_method": "awq"}}))
    assert read_config(path) == parse_config(CONFIG)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes):
    path = tmp_path_factory.getbasetemp() / "config.json"
    path.write_bytes(data)
    with pytest.raises(CheckpointError):
        read_config(path)
