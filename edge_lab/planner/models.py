"""Finds the model to plan for: built in by name, a ``config.json``, or a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from edge.bundle.library import CATALOGUE, find_bundle
from edge.bundle.manifest import MANIFEST_NAME, Manifest, head_manifest, read_manifest
from edge.bundle.model_names import hub_id, nearest_model
from edge.errors import BundleError, CheckpointError, ConfigError
from edge.files import MALFORMED, exists, is_directory, is_file, read_file
from edge.model.spec import ModelSpec
from edge.text.tokenizer_difference import tokenizer_difference
from edge_make.families import FAMILIES
from edge_make.model_config import parse_config

_MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True)
class PlannedModel:
    """A model to plan for.

    Attributes:
        name: name to show to the user.
        spec: its dimensions.
        source: argument for ``edge-llm export``, or None.
        manifest: manifest of the bundle that it came from, or None.
        bundle: directory of that bundle, or None.
    """

    name: str
    spec: ModelSpec
    source: str | None = None
    manifest: Manifest | None = None
    bundle: Path | None = None


def decoder_spec(
    architecture: str,
    hidden: int,
    layers: int,
    heads: tuple[int, int, int],
    intermediate: int,
    vocab: int,
    *,
    tied: bool = False,
    max_positions: int = 131072,
) -> ModelSpec:
    """Make a `ModelSpec` from dimensions alone.

    Args:
        architecture: the family, which decides about biases and q/k norms.
        hidden: hidden size.
        layers: number of layers.
        heads: query heads, KV heads, head size.
        intermediate: width of the MLP.
        vocab: rows of the token table.
        tied: whether the lm_head is the token table.
        max_positions: context of the model.
    """
    return parse_config(
        {
            "architectures": [FAMILIES[architecture].model_class],
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads[0],
            "num_key_value_heads": heads[1],
            "head_dim": heads[2],
            "intermediate_size": intermediate,
            "vocab_size": vocab,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": max_positions,
            "rope_theta": 10_000.0,
            "tie_word_embeddings": tied,
        }
    )


# Dimensions of the models' own config.json files.
BUILT_IN: dict[str, PlannedModel] = {
    name: PlannedModel(name, spec, CATALOGUE[name])
    for name, spec in {
        "deepseek-r1:1.5b": decoder_spec("qwen2", 1536, 28, (12, 2, 128), 8960, 151936),
        "deepseek-r1:7b": decoder_spec("qwen2", 3584, 28, (28, 4, 128), 18944, 152064),
        "deepseek-r1:8b": decoder_spec("llama", 4096, 32, (32, 8, 128), 14336, 128256),
        "deepseek-r1:8b-0528": decoder_spec("qwen3", 4096, 36, (32, 8, 128), 12288, 151936),
    }.items()
}
"""Built-in models by their names in the `CATALOGUE`."""


def find_model(name: str) -> PlannedModel:
    """Find a bundle or a directory with a ``config.json``, that file itself, or a built-in model.

    Built-in models have the names of `hub_id`, bundles also those of `find_bundle`.

    Raises:
        ConfigError: it is none of these, or could be more than one.
        CheckpointError: the ``config.json`` is no config of a supported decoder.
        BundleError: the bundle's manifest is damaged.
    """
    path = Path(name)
    if not exists(path):
        if (model := find_built_in(name)) is not None:
            return model
        try:
            path = find_bundle(name)
        except BundleError as error:
            known = f"known without a bundle: {', '.join(BUILT_IN)}"
            near = nearest_model(name) if hub_id(name) is None else known
            raise ConfigError(f"{name} is no model by name ({near}): {error}") from error
    if is_file(path / MANIFEST_NAME):
        manifest = read_manifest(path)
        return PlannedModel(
            manifest.name, manifest.model, source=str(path), manifest=manifest, bundle=path
        )
    config = path / "config.json" if is_directory(path) else path
    if is_file(config):
        directory = config.resolve().parent
        return PlannedModel(directory.name, read_config(config), source=str(config.parent))
    raise ConfigError(
        f"{name} is no bundle, no directory with a config.json, no config.json and no model by "
        f"name ({nearest_model(name)})"
    )


def find_built_in(name: str) -> PlannedModel | None:
    """Find a built-in model by any name of `hub_id`; None if it is none.

    Raises:
        ConfigError: it could be more than one.
    """
    known = hub_id(name)
    return next((model for model in BUILT_IN.values() if model.source == known), None)


def find_head(target: PlannedModel) -> PlannedModel:
    """Return the EAGLE-3 head of a bundle, as a model that drafts for it.

    Raises:
        ConfigError: the model is no bundle, or has no head.
    """
    manifest = None if target.manifest is None else head_manifest(target.manifest)
    if manifest is None:
        raise ConfigError(
            f"--draft eagle3 is planned for a bundle with a head, and {target.name} is none: "
            "export one with --eagle3 DIR"
        )
    return PlannedModel(manifest.name, manifest.model, target.source, manifest, target.bundle)


def check_tokenizers(target: PlannedModel, draft: PlannedModel) -> None:
    """Refuse a draft with another tokenizer.

    The tokenizers of two bundles are compared. Otherwise the families are, since a model of another
    family has another tokenizer.

    Raises:
        ConfigError: they differ; the message names the difference.
    """
    difference = None
    if target.bundle is not None and draft.bundle is not None:
        difference = tokenizer_difference(
            target.bundle / "tokenizer.json", draft.bundle / "tokenizer.json"
        )
    elif target.spec.architecture != draft.spec.architecture:
        difference = f"one is a {target.spec.architecture}, the other a {draft.spec.architecture}"
    if difference is not None:
        raise ConfigError(
            f"--draft {draft.name} has another tokenizer than {target.name}: {difference}; take a "
            "smaller model of the same family"
        )


def read_config(path: Path) -> ModelSpec:
    """Read the model in a Hugging Face ``config.json``, as ``edge-llm export`` reads it.

    Raises:
        CheckpointError: not such a file, or a model that cannot be exported; the key is named.
    """
    try:
        data = read_file(path, _MAX_CONFIG_BYTES)
        values = msgspec.json.decode(data, type=dict[str, Any])
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except MALFORMED as error:
        raise CheckpointError(f"{path} is not a JSON object: {error}") from error
    return parse_config(values, str(path))
