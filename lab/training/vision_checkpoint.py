"""Writes a checkpoint for `lab train-vision`: Idefics3's layout, as SmolVLM's are published.

Its decoder is SmolLM2-135M, so the tokens that SmolVLM adds have the ids that they have there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer

TILE_PX = 128
PATCH_PX = 16
SCALE_FACTOR = 4  # sixteen patches become one row
ROWS = (TILE_PX // PATCH_PX // SCALE_FACTOR) ** 2
VISION = {
    "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4,
    "num_attention_heads": 3, "image_size": TILE_PX, "patch_size": PATCH_PX,
}  # fmt: skip

# SmolVLM's tokens after SmolLM2's 49,152, each with the id that it has there.
FAKE, IMAGE, GLOBAL = "<fake_token_around_image>", "<image>", "<global-img>"
END = "<end_of_utterance>"
TOKENS = [
    GLOBAL,
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    FAKE,
    IMAGE,
    *(f"<|reserved_special_token_{number}|>" for number in range(88)),
    END,
]
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
BEFORE_QUESTION = f"<|im_start|>User:{FAKE}{GLOBAL}{IMAGE * ROWS}{FAKE}"
AFTER_QUESTION = f"{END}\nAssistant:"


def extended_tokenizer(tokenizer_json: bytes) -> Any:
    """Return SmolLM2's tokenizer with SmolVLM's tokens appended."""
    tokenizer = Tokenizer.from_str(tokenizer_json.decode("utf-8"))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in TOKENS])
    return tokenizer


def new_model(decoder: Any, tokenizer: Any) -> Any:
    """Make an Idefics3 around a decoder; all other weights begin at random."""
    text = decoder.config.to_dict()
    old = text["vocab_size"]
    text |= {
        "vocab_size": old + len(TOKENS), "bos_token_id": 1, "pad_token_id": 2,
        "eos_token_id": tokenizer.token_to_id(END), "tie_word_embeddings": True,
    }  # fmt: skip
    config = transformers.Idefics3Config(
        vision_config=VISION, text_config=text, scale_factor=SCALE_FACTOR,
        image_token_id=tokenizer.token_to_id(IMAGE), tie_word_embeddings=True,
        pad_token_id=2, bos_token_id=1, eos_token_id=text["eos_token_id"],
    )  # fmt: skip
    model = transformers.Idefics3ForConditionalGeneration(config)
    weights = dict(decoder.model.state_dict())
    known = weights["embed_tokens.weight"]
    added = known.mean(0, keepdim=True).repeat(len(TOKENS), 1)
    added[TOKENS.index(END)] = known[2]  # <|im_end|>, which ends an answer of SmolLM2
    weights["embed_tokens.weight"] = torch.cat([known, added])
    model.model.text_model.load_state_dict(weights)
    model.tie_weights()
    return model


def write_texts(output: Path, tokenizer: Any) -> None:
    """Write all files of the checkpoint except its weights, under the usual names."""
    tokenizer.save(str(output / "tokenizer.json"))
    files: dict[str, Any] = {
        "tokenizer_config.json": {
            "add_prefix_space": False, "bos_token": "<|im_start|>", "eos_token": END,
            "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>", "model_max_length": 8192,
            "processor_class": "Idefics3Processor", "tokenizer_class": "GPT2Tokenizer",
            "additional_special_tokens": [FAKE, IMAGE, END],
            "clean_up_tokenization_spaces": False,
        },
        "chat_template.json": {"chat_template": TEMPLATE},
        "preprocessor_config.json": {
            "do_convert_rgb": True, "do_image_splitting": True, "do_normalize": True,
            "do_pad": True, "do_rescale": True, "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
            "image_processor_type": "Idefics3ImageProcessor",
            "max_image_size": {"longest_edge": TILE_PX}, "processor_class": "Idefics3Processor",
            "resample": 1, "rescale_factor": 1 / 255, "size": {"longest_edge": TILE_PX},
        },
        "processor_config.json": {
            "image_seq_len": ROWS, "processor_class": "Idefics3Processor"
        },
        "generation_config.json": {
            "bos_token_id": 1, "eos_token_id": tokenizer.token_to_id(END), "pad_token_id": 2,
        },
    }  # fmt: skip
    for name, content in files.items():
        (output / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
