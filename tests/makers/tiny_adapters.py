"""Tiny LoRA adapters in peft's layout for the models of `tiny_models`, and what peft makes of them.

Entries of A and B are -1, 0 and 1 times powers of two, scalings are powers of two, and replaced
tables have 8 bits, so that every merged weight is exact in fp16. ``tests/data/golden/lora.npz``
holds the logits of peft's merged models in float32. To write it again where peft is installed::

    python -m tests.makers.tiny_adapters
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_make.checkpoint_tensors import expected_tensors
from edge_make.model_config import parse_config
from export.sources.lora_config import LoraConfig

from .goldens import GOLDEN_DIR
from .tiny_models import BOS_ID, FIRST_CONTROL_ID, Kind, _write_safetensors, write_checkpoint

GOLDEN = GOLDEN_DIR / "lora.npz"
NUM_TOKENS = 16
_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """A base model and what its adapter's config says."""

    kind: Kind
    config: dict[str, Any]
    base: dict[str, Any] = field(default_factory=dict)


CASES = {
    "qwen2 all linears": Case("qwen2", {"target_modules": _LAYERS}),
    "qwen2 patterns": Case(
        "qwen2",
        {
            "target_modules": r"model\.layers\.\d+\.(self_attn\.[qv]_proj|mlp\.down_proj)",
            "exclude_modules": [r"layers.0.self_attn.q_proj"],
            "rank_pattern": {"down_proj": 2, r"layers\.1\.self_attn\.v_proj": 8},
            "alpha_pattern": {"mlp.down_proj": 4, "1.self_attn.v_proj": 4},
        },
    ),
    "qwen2 whole tables": Case(
        "qwen2",
        {
            "target_modules": ["gate_proj", "o_proj"],
            "modules_to_save": ["lm_head", "embed_tokens"],
            "fan_in_fan_out": True,
        },
    ),
    "llama rslora, one layer": Case(
        "llama",
        {
            "target_modules": ["q_proj", "up_proj"],
            "use_rslora": True,
            "layers_to_transform": [1],
            "layers_pattern": "layers",
        },
    ),
    "llama tables": Case("llama", {"target_modules": ["embed_tokens", "lm_head", "k_proj"]}),
    "llama tied, head": Case(
        "llama",
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "norm"]},
        {"tie_word_embeddings": True},
    ),
    "llama tied, table": Case(
        "llama",
        {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]},
        {"tie_word_embeddings": True},
    ),
}
_BASE_CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "some/where",
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "loftq_config": {},
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_dora": False,
    "use_rslora": False,
    "layer_replication": None,
    "inference_mode": True,
}


def write_adapter(
    directory: Path, model: Path, config: dict[str, Any], seed: int = 3, **overrides: Any
) -> Path:
    """Write an adapter for a tiny checkpoint.

    Args:
        directory: made if missing.
        model: the base model's directory.
        config: keys of ``adapter_config.json``; the usual ones have defaults.
        seed: of the weights.
        overrides: keys that only the file on disk gets.
    """
    directory.mkdir(parents=True, exist_ok=True)
    values = {**_BASE_CONFIG, **config}
    rules = LoraConfig(**{k: v for k, v in values.items() if k in LoraConfig.__struct_fields__})
    spec = parse_config(json.loads((model / "config.json").read_bytes()))
    shapes = expected_tensors(spec)
    shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    rng = np.random.RandomState(seed)
    weights: dict[str, NDArray[np.float32]] = {}

    def small(exponent: int, *shape: int) -> NDArray[np.float32]:
        return (rng.randint(-1, 2, size=shape) * 2.0**exponent).astype(np.float32)

    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        if kind != "weight":
            continue
        prefix = f"base_model.model.{module}"
        if rules.saves(module):
            table = rng.randint(-100, 101, size=shape) * 2.0**-7
            if module not in ("lm_head", "model.embed_tokens"):
                table = 1 + table / 4
            weights[f"{prefix}.weight"] = table.astype(np.float32)
        elif len(shape) == 2 and rules.targets(module):
            rank = rules.rank(module)
            a, b = small(-3, rank, shape[1]), small(-5, shape[0], rank)
            if module == "model.embed_tokens":
                weights[f"{prefix}.lora_embedding_A"] = small(-3, rank, shape[0])
                weights[f"{prefix}.lora_embedding_B"] = small(-3, shape[1], rank)
            else:
                weights[f"{prefix}.lora_A.weight"], weights[f"{prefix}.lora_B.weight"] = a, b
    (directory / "adapter_config.json").write_text(json.dumps({**values, **overrides}))
    _write_safetensors(directory / "adapter_model.safetensors", weights, "fp16")
    return directory


def write_case(root: Path, name: str) -> tuple[Path, Path]:
    """Base model and adapter of a case."""
    case = CASES[name]
    base = write_checkpoint(root / "base", case.kind, **case.base)
    return base, write_adapter(root / "tuned", base, case.config)


def golden_ids() -> NDArray[np.int64]:
    """Token ids ``[n]`` that every case is run on."""
    ids = np.random.RandomState(1).randint(0, FIRST_CONTROL_ID, size=NUM_TOKENS).astype(np.int64)
    ids[0] = BOS_ID
    return ids


def peft_logits(base: Path, adapter: Path) -> NDArray[np.float32]:
    """Logits ``[n, vocab]`` of `golden_ids` from peft's merged model; checked against unmerged."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    ids = torch.from_numpy(golden_ids())[None]
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    )
    tuned = peft.PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        apart = tuned(ids).logits[0].numpy()
        merged = tuned.merge_and_unload()(ids).logits[0].numpy()
    np.testing.assert_allclose(merged, apart, atol=1e-4)
    result: NDArray[np.float32] = merged
    return result


def _write_golden() -> None:
    logits = {}
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            logits[name] = peft_logits(*write_case(Path(folder), name))
    np.savez_compressed(GOLDEN, **logits)  # type: ignore[arg-type]


if __name__ == "__main__":
    _write_golden()
