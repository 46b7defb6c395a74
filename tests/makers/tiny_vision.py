"""Tiny random checkpoints of models that read pictures, in the layout that is published.

The decoder is the tiny Llama of `tests.makers.tiny_models`. The encoder is SigLIP's: tiles of 32 x
32 pixels, patches of 8 x 8, two layers. Four patches become a row, so a tile is 4 rows. A picture
is resized to 128 pixels and cut into 4 x 4 tiles at most; with the one that shows it whole it has
68 rows in 17 tiles, as many tiles as with SmolVLM.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .tiny_models import FIRST_CONTROL_ID, _write_json, _write_safetensors, make_weights
from .tiny_models import write_tokenizer as _write_base_tokenizer

ModelType = Literal["idefics3", "smolvlm"]
Array = NDArray[np.float32]

TILE_PX, PATCH_PX, LONGEST_EDGE_PX, SCALE_FACTOR = 32, 8, 128, 2
ROWS_PER_TILE, MAX_TILES = 4, 17
HIDDEN, WIDE, HEADS, LAYERS = 64, 128, 4, 2
EPS = 1e-6

EOS, BOS, IMAGE, AROUND, WHOLE = (
    "<end_of_utterance>",
    "<|im_start|>",
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
)
_PLACES = tuple(f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7))
CONTROL = ("<|endoftext|>", BOS, EOS, AROUND, IMAGE, WHOLE, *_PLACES)
CONTROL_IDS = {token: FIRST_CONTROL_ID + i for i, token in enumerate(CONTROL)}
VOCAB_SIZE = 352

CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""SmolVLM's own: it reads contents that are lists of parts."""

_CONFIG: dict[str, Any] = {
    "image_token_id": CONTROL_IDS[IMAGE],
    "scale_factor": SCALE_FACTOR,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "text_config": {
        "architectures": ["VLlama3ForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 128,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000,
        "rope_scaling": None,
        "hidden_act": "silu",
        "is_llama_config": True,
        "pixel_shuffle_factor": SCALE_FACTOR,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_resampler": False,
        "bos_token_id": CONTROL_IDS[BOS],
        "eos_token_id": CONTROL_IDS[EOS],
        "pad_token_id": CONTROL_IDS["<|endoftext|>"],
    },
    "vision_config": {
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_channels": 3,
        "image_size": TILE_PX,
        "patch_size": PATCH_PX,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": EPS,
        "max_image_size": {"longest_edge": TILE_PX},
        "size": {"longest_edge": LONGEST_EDGE_PX},
        "tie_word_embeddings": False,
        "use_base_siglip": False,
    },
}
_CLASSES = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}


def write_vision_checkpoint(
    directory: Path,
    family: Literal["idefics3"] = "idefics3",
    *,
    model_type: ModelType = "smolvlm",
    seed: int = 5,
    drop: tuple[str, ...] = (),
    extra: dict[str, Array] | None = None,
    **overrides: Any,
) -> Path:
    """Write a complete checkpoint directory as SmolVLM (``idefics3``) and SmolVLM2 have it.

    Args:
        directory: made if missing.
        family: of the layout.
        model_type: of ``config.json``; SmolVLM's is ``idefics3``, SmolVLM2's ``smolvlm``.
        seed: of the weights.
        drop: tensors that are left out, by name.
        extra: tensors that are added.
        overrides: keys of config.json that replace or extend; a dict is merged.

    Returns:
        ``directory``.
    """
    name = _CLASSES[model_type]
    config: dict[str, Any] = {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": model_type,
        **_CONFIG,
    }
    for key, value in overrides.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    config["vision_config"] = {
        "model_type": "idefics3_vision" if model_type == "idefics3" else "smolvlm_vision",
        **config["vision_config"],
    }
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", config)
    _write_json(
        directory / "generation_config.json",
        {"bos_token_id": CONTROL_IDS[BOS], "eos_token_id": CONTROL_IDS[EOS]},
    )
    _write_json(
        directory / "preprocessor_config.json",
        {
            "do_convert_rgb": True,
            "do_image_splitting": True,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": f"{name}ImageProcessor",
            "image_std": [0.5, 0.5, 0.5],
            "max_image_size": {"longest_edge": TILE_PX},
            "processor_class": f"{name}Processor",
            "resample": 1,
            "rescale_factor": 0.00392156862745098,
            "size": {"longest_edge": LONGEST_EDGE_PX},
        },
    )
    _write_json(
        directory / "processor_config.json",
        {"image_seq_len": ROWS_PER_TILE, "processor_class": f"{name}Processor"},
    )
    _write_json(directory / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    _write_tokenizer(directory, f"{name}Processor")
    weights = vision_weights(config, seed) | (extra or {})
    kept = {name: weight for name, weight in weights.items() if name not in drop}
    _write_safetensors(directory / "model.safetensors", kept, "bf16")
    return directory


def vision_weights(config: dict[str, Any], seed: int) -> dict[str, Array]:
    """Random weights by their names in the checkpoint, float32, exact in fp16 and bf16.

    The projector's rows are about as large as the token table's, so an answer depends on both.
    """
    text = {**config["text_config"], "tie_word_embeddings": config["tie_word_embeddings"]}
    weights = {
        name.replace("model.", "model.text_model.", 1): weight
        for name, weight in make_weights(text, seed).items()
    }
    rng = np.random.RandomState(seed + 1)
    vision = config["vision_config"]
    hidden, wide = vision["hidden_size"], vision["intermediate_size"]
    patch, places = vision["patch_size"], (vision["image_size"] // vision["patch_size"]) ** 2

    def bell(*shape: int, exponent: int) -> Array:
        total = rng.randint(-31, 32, size=(4, *shape)).sum(axis=0)
        values: Array = (total * 2.0**exponent).astype(np.float32)
        return values

    def linear(name: str, rows: int, width: int, exponent: int = -8) -> None:
        weights[f"{name}.weight"] = bell(rows, width, exponent=exponent)
        weights[f"{name}.bias"] = bell(rows, exponent=-8)

    def norm(name: str) -> None:
        weights[f"{name}.weight"] = 1 + bell(hidden, exponent=-7)
        weights[f"{name}.bias"] = bell(hidden, exponent=-8)

    start = "model.vision_model."
    weights[f"{start}embeddings.patch_embedding.weight"] = bell(
        hidden, 3, patch, patch, exponent=-9
    )
    weights[f"{start}embeddings.patch_embedding.bias"] = bell(hidden, exponent=-8)
    weights[f"{start}embeddings.position_embedding.weight"] = bell(places, hidden, exponent=-7)
    for i in range(vision["num_hidden_layers"]):
        layer = f"{start}encoder.layers.{i}."
        norm(f"{layer}layer_norm1")
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{layer}self_attn.{part}", hidden, hidden)
        norm(f"{layer}layer_norm2")
        linear(f"{layer}mlp.fc1", wide, hidden)
        linear(f"{layer}mlp.fc2", hidden, wide)
    norm(f"{start}post_layernorm")
    weights["model.connector.modality_projection.proj.weight"] = bell(
        text["hidden_size"], hidden * config["scale_factor"] ** 2, exponent=-11
    )
    return weights


def encoder_rows(
    config: dict[str, Any], weights: dict[str, Array], pixels: Array
) -> NDArray[np.float64]:
    """Compute the rows of tiles in plain NumPy, as the model's paper has it.

    Args:
        config: the checkpoint's.
        weights: by name.
        pixels: ``[tiles, 3, px, px]``.

    Returns:
        ``[tiles, rows, text hidden]`` in float64.
    """
    vision, scale = config["vision_config"], config["scale_factor"]
    start, patch, heads = "model.vision_model.", vision["patch_size"], vision["num_attention_heads"]
    tiles, side = len(pixels), vision["image_size"] // patch

    def at(name: str) -> NDArray[np.float64]:
        return weights[name].astype(np.float64)

    def linear(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        y: NDArray[np.float64] = x @ at(f"{name}.weight").T + at(f"{name}.bias")
        return y

    def norm(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        centred = x - x.mean(-1, keepdims=True)
        spread = np.sqrt((centred**2).mean(-1, keepdims=True) + vision["layer_norm_eps"])
        y: NDArray[np.float64] = centred / spread * at(f"{name}.weight") + at(f"{name}.bias")
        return y

    x = np.empty((tiles, side * side, vision["hidden_size"]))
    kernel = at(f"{start}embeddings.patch_embedding.weight")
    for row in range(side):
        for col in range(side):
            cut = np.s_[:, :, row * patch : (row + 1) * patch, col * patch : (col + 1) * patch]
            x[:, row * side + col] = np.einsum("tcij,hcij->th", pixels[cut], kernel)
    x += at(f"{start}embeddings.patch_embedding.bias")
    x += at(f"{start}embeddings.position_embedding.weight")
    for i in range(vision["num_hidden_layers"]):
        layer = f"{start}encoder.layers.{i}."
        h = norm(x, f"{layer}layer_norm1")
        q, k, v = (
            linear(h, f"{layer}self_attn.{part}_proj")
            .reshape(tiles, side * side, heads, -1)
            .transpose(0, 2, 1, 3)
            for part in "qkv"
        )
        scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(q.shape[-1])
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (shares / shares.sum(-1, keepdims=True)) @ v
        joined = mixed.transpose(0, 2, 1, 3).reshape(x.shape)
        x = x + linear(joined, f"{layer}self_attn.out_proj")
        h = linear(norm(x, f"{layer}layer_norm2"), f"{layer}mlp.fc1")
        h = h * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, f"{layer}mlp.fc2")
    x = norm(x, f"{start}post_layernorm").reshape(tiles, side, side, -1)
    rows = []
    for row in range(0, side, scale):
        for col in range(0, side, scale):
            corner = x[:, row : row + scale, col : col + scale]
            rows.append(corner.reshape(tiles, -1))
    projector = at("model.connector.modality_projection.proj.weight")
    projected: NDArray[np.float64] = np.stack(rows, 1) @ projector.T
    return projected


def _write_tokenizer(directory: Path, processor: str) -> None:
    """Write the tiny tokenizer with SmolVLM's control tokens; no token precedes a text."""
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
            "add_prefix_space": False,
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "additional_special_tokens": [AROUND, IMAGE, EOS],
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1024,
            "processor_class": processor,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
