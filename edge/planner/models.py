"""Which model: built in by name, a ``config.json``, or a bundle.

The runtime does not import the exporter, which reads ``config.json`` in full and refuses what it
cannot export. Here only the dimensions matter, so only these are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from edge.bundle.manifest import (
    MANIFEST_NAME,
    Architecture,
    Manifest,
    ModelSpec,
    RopeSpec,
    read_manifest,
)
from edge.errors import CheckpointError, ConfigError

_ARCHITECTURES: dict[str, Architecture] = {
    "Qwen2ForCausalLM": "qwen2",
    "LlamaForCausalLM": "llama",
    "Qwen3ForCausalLM": "qwen3",
}
_MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True)
class PlannedModel:
    """A model to plan for.

    Attributes:
        name: shown to the user.
        spec: its dimensions; of RoPE only what a ``config.json`` says at its top level.
        source: what ``edge-llm export`` takes, or None.
        manifest: of the bundle that it came from, or None.
        bundle: that bundle's directory, or None.
    """

    name: str
    spec: ModelSpec
    source: str | None = None
    manifest: Manifest | None = None
    bundle: Path | None = None


def decoder_spec(
    architecture: Architecture,
    hidden: int,
    layers: int,
    heads: tuple[int, int, int],
    intermediate: int,
    vocab: int,
    *,
    tied: bool = False,
    max_positions: int = 131072,
) -> ModelSpec:
    """A `ModelSpec` from dimensions alone.

    Args:
        architecture: says whether there are biases and q/k norms.
        hidden: hidden size.
        layers: number of layers.
        heads: query heads, KV heads, head size.
        intermediate: width of the MLP.
        vocab: rows of the token table.
        tied: whether the lm_head is the token table.
        max_positions: context of the model.
    """
    return ModelSpec(
        architecture=architecture,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=heads[2],
        intermediate_size=intermediate,
        vocab_size=vocab,
        rms_norm_eps=1e-6,
        max_position_embeddings=max_positions,
        rope=RopeSpec(theta=10_000.0),
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        tied_embeddings=tied,
    )


# Dimensions of the models' own config.json files.
BUILT_IN: dict[str, PlannedModel] = {
    "r1-qwen-1.5b": PlannedModel(
        "r1-qwen-1.5b",
        decoder_spec("qwen2", 1536, 28, (12, 2, 128), 8960, 151936),
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    ),
    "r1-qwen-7b": PlannedModel(
        "r1-qwen-7b",
        decoder_spec("qwen2", 3584, 28, (28, 4, 128), 18944, 152064),
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    ),
    "r1-llama-8b": PlannedModel(
        "r1-llama-8b",
        decoder_spec("llama", 4096, 32, (32, 8, 128), 14336, 128256),
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    ),
    "r1-qwen3-8b": PlannedModel(
        "r1-qwen3-8b",
        decoder_spec("qwen3", 4096, 36, (32, 8, 128), 12288, 151936),
        "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B",
    ),
}


def find_model(name: str) -> PlannedModel:
    """A built-in model, a bundle, a directory with a ``config.json``, or that file itself.

    Raises:
        ConfigError: it is none of these.
        CheckpointError: the ``config.json`` is no config of a supported decoder.
        BundleError: the bundle's manifest is damaged.
    """
    if name.lower() in BUILT_IN:
        return BUILT_IN[name.lower()]
    path = Path(name)
    if (path / MANIFEST_NAME).is_file():
        manifest = read_manifest(path)
        return PlannedModel(
            manifest.name, manifest.model, source=str(path), manifest=manifest, bundle=path
        )
    config = path / "config.json" if path.is_dir() else path
    if config.is_file():
        directory = config.resolve().parent
        return PlannedModel(directory.name, read_config(config), source=str(config.parent))
    raise ConfigError(
        f"{name} is no bundle, no directory with a config.json, no config.json and none of "
        f"{', '.join(BUILT_IN)}"
    )


def read_config(path: Path) -> ModelSpec:
    """The dimensions in a Hugging Face ``config.json``.

    Raises:
        CheckpointError: not such a file, another architecture, or a dimension that is missing or
            no positive integer; the key is named.
    """
    try:
        data = path.read_bytes()
        if len(data) > _MAX_CONFIG_BYTES:
            raise CheckpointError(f"{path} has {len(data)} bytes; a config.json has a few thousand")
        values = msgspec.json.decode(data, type=dict[str, Any])
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a JSON object: {error}") from error
    return _spec(values, path)


def _spec(values: dict[str, Any], path: Path) -> ModelSpec:
    def integer(key: str, default: int | None = None) -> int:
        value = values.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 1 << 31:
            raise CheckpointError(f"{path}: {key} must be a positive integer, found {value!r}")
        return value

    names = values.get("architectures")
    known = _ARCHITECTURES.get(names[0]) if isinstance(names, list) and len(names) == 1 else None
    if known is None:
        raise CheckpointError(
            f"{path}: architectures is {names!r}; supported: {', '.join(_ARCHITECTURES)}"
        )
    heads = integer("num_attention_heads")
    return decoder_spec(
        known,
        integer("hidden_size"),
        integer("num_hidden_layers"),
        (
            heads,
            integer("num_key_value_heads", heads),
            integer("head_dim", max(integer("hidden_size") // heads, 1)),
        ),
        integer("intermediate_size"),
        integer("vocab_size"),
        tied=values.get("tie_word_embeddings") is True,
        max_positions=integer("max_position_embeddings"),
    )
