"""Tiny random checkpoints of InternVL3 (Qwen2) and InternVL3.5 (Qwen3), as transformers has them.

Tiles of 32 x 32 pixels, patches of 8 x 8, two layers: four patches become a row, a tile is 4 rows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .tiny_models import FIRST_CONTROL_ID, _write_json, _write_safetensors, make_weights
from .tiny_models import write_tokenizer as _write_base_tokenizer

Array = NDArray[np.float32]

TILE_PX, PATCH_PX, ROWS_PER_TILE = 32, 8, 4
HIDDEN, WIDE, LAYERS = 64, 128, 2
IMAGE, BEGIN, END = "<IMG_CONTEXT>", "<img>", "</img>"
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", BEGIN, END, IMAGE)
CONTROL_IDS = {token: FIRST_CONTROL_ID + i for i, token in enumerate(CONTROL)}

CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
"""That of the published checkpoints without its videos."""

_TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 320,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": CONTROL_IDS["<|endoftext|>"],
    "eos_token_id": CONTROL_IDS["<|im_end|>"],
}
_PARTS = ("vision_tower", "multi_modal_projector")


def write_internvl_checkpoint(
    directory: Path,
    decoder: Literal["qwen2", "qwen3"] = "qwen2",
    *,
    qkv_bias: bool = True,
    mean_pooling: bool = True,
    old_names: bool = False,
    **overrides: Any,
) -> Path:
    """Write a complete checkpoint directory.

    Args:
        directory: made if missing.
        decoder: ``qwen2`` is InternVL3's, ``qwen3`` InternVL3.5's.
        qkv_bias: whether the encoder's q, k and v have biases, as in InternViT-300M.
        mean_pooling: whether no LayerNorm follows the encoder's last layer.
        old_names: whether tensors are named as transformers did up to 4.52.
        overrides: keys of config.json that replace or extend; a dict is merged.

    Returns:
        ``directory``.
    """
    text = {**_TEXT, "model_type": decoder} | ({"head_dim": 32} if decoder == "qwen3" else {})
    config: dict[str, Any] = {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "image_token_id": CONTROL_IDS[IMAGE],
        "image_seq_length": ROWS_PER_TILE,
        "downsample_ratio": 0.5,
        "tie_word_embeddings": False,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "text_config": text,
        "vision_config": {
            "model_type": "internvl_vision",
            "hidden_size": HIDDEN,
            "intermediate_size": WIDE,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "image_size": [TILE_PX, TILE_PX],
            "patch_size": [PATCH_PX, PATCH_PX],
            "attention_bias": qkv_bias,
            "use_mean_pooling": mean_pooling,
            "use_qk_norm": False,
            "norm_type": "layer_norm",
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
        },
    }
    for key, value in overrides.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", config)
    _write_json(
        directory / "preprocessor_config.json",
        {
            "crop_to_patches": False,
            "do_center_crop": None,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.485, 0.456, 0.406],
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "image_std": [0.229, 0.224, 0.225],
            "max_patches": 12,
            "min_patches": 1,
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            "size": {"height": TILE_PX, "width": TILE_PX},
        },
    )
    _write_json(
        directory / "processor_config.json",
        {"image_seq_length": ROWS_PER_TILE, "processor_class": "InternVLProcessor"},
    )
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    _write_tokenizer(directory)
    weights = internvl_weights(config, 5)
    if not old_names:
        weights = {_new_name(name): weight for name, weight in weights.items()}
    _write_safetensors(directory / "model.safetensors", weights, "bf16")
    return directory


def _new_name(name: str) -> str:
    if name.startswith("language_model.model."):
        return name.replace("language_model.model.", "model.language_model.", 1)
    return f"model.{name}" if name.startswith(_PARTS) else name.removeprefix("language_model.")


def internvl_weights(config: dict[str, Any], seed: int) -> dict[str, Array]:
    """Random weights by their old names, float32, exact in fp16 and bf16."""
    text = config["text_config"]
    weights = {f"language_model.{name}": each for name, each in make_weights(text, seed).items()}
    rng = np.random.RandomState(seed + 1)
    vision = config["vision_config"]

    def bell(*shape: int, exponent: int) -> Array:
        total = rng.randint(-31, 32, size=(4, *shape)).sum(axis=0)
        values: Array = (total * 2.0**exponent).astype(np.float32)
        return values

    def linear(name: str, rows: int, width: int, *, bias: bool = True, exponent: int = -8) -> None:
        weights[f"{name}.weight"] = bell(rows, width, exponent=exponent)
        if bias:
            weights[f"{name}.bias"] = bell(rows, exponent=-8)

    def norm(name: str, width: int = HIDDEN) -> None:
        weights[f"{name}.weight"] = 1 + bell(width, exponent=-7)
        weights[f"{name}.bias"] = bell(width, exponent=-8)

    start = "vision_tower."
    linear_name = f"{start}embeddings.patch_embeddings.projection"
    weights[f"{linear_name}.weight"] = bell(HIDDEN, 3, PATCH_PX, PATCH_PX, exponent=-9)
    weights[f"{linear_name}.bias"] = bell(HIDDEN, exponent=-8)
    weights[f"{start}embeddings.cls_token"] = bell(1, 1, HIDDEN, exponent=-6)
    places = (TILE_PX // PATCH_PX) ** 2 + 1
    weights[f"{start}embeddings.position_embeddings"] = bell(1, places, HIDDEN, exponent=-6)
    for i in range(LAYERS):
        layer = f"{start}encoder.layer.{i}."
        norm(f"{layer}layernorm_before")
        for part in "qkv":
            linear(f"{layer}attention.{part}_proj", HIDDEN, HIDDEN, bias=vision["attention_bias"])
        linear(f"{layer}attention.projection_layer", HIDDEN, HIDDEN)
        norm(f"{layer}layernorm_after")
        linear(f"{layer}mlp.fc1", WIDE, HIDDEN)
        linear(f"{layer}mlp.fc2", HIDDEN, WIDE)
        for number in (1, 2):
            weights[f"{layer}lambda_{number}"] = bell(HIDDEN, exponent=-6)
    if not vision["use_mean_pooling"]:
        norm(f"{start}layernorm")
    norm("multi_modal_projector.layer_norm", 4 * HIDDEN)
    linear("multi_modal_projector.linear_1", text["hidden_size"], 4 * HIDDEN, exponent=-9)
    linear("multi_modal_projector.linear_2", text["hidden_size"], text["hidden_size"], exponent=-9)
    return weights


def _write_tokenizer(directory: Path) -> None:
    """Write the tiny tokenizer with InternVL's control tokens; no token precedes a text."""
    _write_base_tokenizer(directory)
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text("utf-8"))
    tokenizer["post_processor"] = None
    pattern = tokenizer["added_tokens"][0]
    tokenizer["added_tokens"] = [
        {**pattern, "id": number, "content": token, "special": True}
        for token, number in CONTROL_IDS.items()
    ]
    _write_json(path, tokenizer)
    _write_json(
        directory / "tokenizer_config.json",
        {
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "context_image_token": IMAGE,
            "start_image_token": BEGIN,
            "end_image_token": END,
            "processor_class": "InternVLProcessor",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
