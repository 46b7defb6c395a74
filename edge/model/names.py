"""Names the tensors of checkpoints, one row per part, as safetensors and GGUF files spell them."""

from __future__ import annotations

from typing import NamedTuple


class Names(NamedTuple):
    """One module's names: within a layer of safetensors and of a GGUF file."""

    safetensors: str
    gguf: str


TOKEN_TABLE = "model.embed_tokens.weight"
"""HF name of the token embeddings ``[vocab, hidden]``."""

FINAL_NORM = "model.norm.weight"
"""HF name of the weights of the last norm ``[hidden]``."""

MODULES = {
    "input_norm": Names("input_layernorm", "attn_norm"),
    "q": Names("self_attn.q_proj", "attn_q"),
    "k": Names("self_attn.k_proj", "attn_k"),
    "v": Names("self_attn.v_proj", "attn_v"),
    "q_norm": Names("self_attn.q_norm", "attn_q_norm"),
    "k_norm": Names("self_attn.k_norm", "attn_k_norm"),
    "o": Names("self_attn.o_proj", "attn_output"),
    "post_norm": Names("post_attention_layernorm", "ffn_norm"),
    "gate": Names("mlp.gate_proj", "ffn_gate"),
    "up": Names("mlp.up_proj", "ffn_up"),
    "down": Names("mlp.down_proj", "ffn_down"),
}
"""Modules of a layer by the names of norms and of linears' outputs (`edge.model.parts`)."""

OUTSIDE = {
    "embed_tokens": Names("model.embed_tokens", "token_embd"),
    "final_norm": Names("model.norm", "output_norm"),
    "lm_head": Names("lm_head", "output"),
}
"""Modules before and after the layers."""


def module_name(layer: int, part: str) -> str:
    """Return the HF name of a module of a layer, without ``.weight``."""
    return f"model.layers.{layer}.{MODULES[part].safetensors}"
