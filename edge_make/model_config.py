"""Reads a Hugging Face checkpoint's ``config.json`` into a `ModelSpec`, for exporter and planner.

Unsupported settings that change the arithmetic are refused by name. Nothing is assumed that the
stock ``transformers`` class does not assume too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edge.model.spec import ModelSpec, RopeSpec, Task

from .families import FAMILIES, Config, Decoder, Family, decoder
from .families.family import WINDOW
from .other_models import experts, instead
from .picture_models import decoder_config, reads_pictures

_ROPES = ("rope_parameters", "rope_scaling")
BIDIRECTIONAL = "tokens that see those after them are not supported"


_ARITHMETIC: dict[str, tuple[Any, ...]] = {
    "sliding_window": (),
    "interleaved_sliding_window": (),
    "attention_chunk_size": (),
    "no_rope_layers": (),
    "no_rope_layer_interval": (),
    "rope_local_base_freq": (),
    "attention_multiplier": (),
    "residual_multiplier": (1,),
    "embedding_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "scale_emb": (1,),
    "scale_depth": (),
    "dim_model_base": (),
    "query_pre_attn_scalar": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "clip_qkv": (),
    "max_alibi_bias": (0,),
    "yarn_log_multiplier": (0,),
    "llama_4_scaling_beta": (0,),
    "attn_temperature_tuning": (False,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "parallel_attn": (False,),
    "use_parallel_residual": (False,),
    "hidden_activation": ("silu",),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
}
"""Keys that change the arithmetic where a class reads them, and the values that change nothing.

A family reads a key (`Family.reads`), or a config with another value is refused.
"""


def parse_config(
    config: Mapping[str, Any], where: str = "config.json", task: Task = "generate"
) -> ModelSpec:
    """Read the model of `parse_decoder` alone."""
    return parse_decoder(config, where, task).spec


def parse_decoder(
    config: Mapping[str, Any], where: str = "config.json", task: Task = "generate"
) -> Decoder:
    """Read every number of the decoder from a ``config.json``.

    Both styles of RoPE keys are understood: ``rope_theta`` with ``rope_scaling`` (transformers 4)
    and ``rope_parameters`` (transformers 5).

    Args:
        config: the parsed JSON object.
        where: path for error messages.
        task: use of the model; one that embeds needs no lm_head.

    Raises:
        CheckpointError: an unsupported architecture or feature, a missing key, a wrong type or a
            value that makes no sense; the key is named.
    """
    if reads_pictures(config):
        config, where = decoder_config(config, where), f"{where}: text_config"
    reader = Config(config, where)
    family = _family(reader, task)
    reader = Config(config, where, defaults=family.defaults)
    _refuse_unsupported(reader, family)
    return decoder(family, reader, _rope(reader), task)


def yarn_attention_factor(
    factor: float, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
    """Compute YaRN's scale on cos and sin (https://arxiv.org/abs/2309.00071, eq. 22).

    With both ``mscale`` keys it is DeepSeek's quotient, as ``transformers`` computes it.
    """

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if mscale and mscale_all_dim:
        return scale(mscale) / scale(mscale_all_dim)
    return scale(1.0)


def _family(config: Config, task: Task) -> Family:
    names = config.get("architectures")
    known = {family.model_class: family for family in FAMILIES.values()}
    without_head = {family.base_class: family for family in FAMILIES.values()}
    if task == "embed":
        known |= without_head
    supported = ", ".join(known)
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise config.error(
            "architectures", f"must name one model class, found {names!r}; supported: {supported}"
        )
    if names[0] not in known:
        advice = instead(names[0], config.values, task)
        if names[0] in without_head:
            advice = "a model that embeds: --task embed"
        raise config.error(
            "architectures", f"{names[0]} is not supported; supported: {supported}; {advice}"
        )
    if (mixture := experts(config.values)) is not None:
        advice = instead(names[0], config.values, task)
        raise config.error(mixture[0], f"is {mixture[1]}, which is not supported; {advice}")
    return known[names[0]]


def refuse_arithmetic(config: Config, family: Family, *, window_is_off: bool = False) -> None:
    """Refuse keys that change the arithmetic, unless the family reads them.

    Args:
        config: numbers of the model.
        family: its family.
        window_is_off: whether a window has no effect: a Qwen2 that was saved as a Llama names its
            own, and says so.

    Raises:
        CheckpointError: there is such a key.
    """
    reads = family.reads | (WINDOW if window_is_off else frozenset())
    for key, neutral in _ARITHMETIC.items():
        value = config.get(key)
        if value is not None and key not in reads and value not in neutral:
            raise config.error(
                key,
                f"is {value!r:.80}, which changes the arithmetic, and nothing of {family.name} "
                "reads it; take a model without it (docs/support-matrix.md)",
            )


def _refuse_unsupported(config: Config, family: Family) -> None:
    # Check this before auto_map, whose advice to take the stock class would not help here.
    if not config.boolean("is_causal", default=True):
        raise config.error("is_causal", f"is false: {BIDIRECTIONAL}")
    if config.boolean("use_bidirectional_attention"):
        raise config.error("use_bidirectional_attention", f"is true: {BIDIRECTIONAL}")
    for section in (config, *(Config(config.section(k), f"{config.where}: {k}") for k in _ROPES)):
        refuse_arithmetic(section, family, window_is_off=config.get("use_sliding_window") is False)
    if config.get("auto_map") is not None:
        raise config.error(
            "auto_map",
            "asks for Python code from the checkpoint, which is never run; if the model is the "
            "stock architecture, delete the key from a local copy",
        )
    activation = config.get("hidden_act")
    if activation not in (None, "silu"):  # silu is the default of all classes
        raise config.error("hidden_act", f"must be silu, found {activation!r}")
    layer_types = config.get("layer_types")
    if layer_types is not None and (
        not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types)
    ):
        raise config.error("layer_types", "has other entries than full_attention: not supported")


def _rope(config: Config) -> RopeSpec:
    # The order of transformers 5: a non-empty rope_scaling wins over rope_parameters.
    name = "rope_scaling" if config.section("rope_scaling") else "rope_parameters"
    values = config.section(name)
    rope = Config(values, f"{config.where}: {name}")
    for key, value in values.items():
        if isinstance(value, dict):
            raise rope.error(key, "is an object: RoPE parameters per layer are not supported")
    theta = rope.number("rope_theta", config.number("rope_theta", 10_000.0))
    if rope.get("rope_theta") is None and config.get("rope_theta") is None:
        ignored = config.section("rope_parameters").get("rope_theta")
        if ignored is not None:
            raise rope.error(
                "rope_theta",
                f"is missing, and rope_parameters, which has {ignored!r}, does not count beside "
                "rope_scaling; put all keys into rope_parameters",
            )
    kind = values.get("rope_type", values.get("type", "default"))
    for section in (config, rope):
        if section.number("partial_rotary_factor", 1.0) != 1.0:
            raise section.error("partial_rotary_factor", "other than 1 is not supported")
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind == "linear":
        return RopeSpec(theta=theta, kind="linear", factor=_factor(rope))
    if kind not in ("llama3", "yarn"):
        raise rope.error(
            "rope_type", f"{kind!r} is not supported; supported: default, linear, llama3, yarn"
        )

    max_positions = config.integer("max_position_embeddings")
    original = rope.integer("original_max_position_embeddings", max_positions)
    # transformers lets the key beside rope_scaling win (Phi-3 style).
    original = config.integer("original_max_position_embeddings", original)
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if low >= high:
            raise rope.error("high_freq_factor", f"({high}) must exceed low_freq_factor ({low})")
        return RopeSpec(
            theta=theta,
            kind="llama3",
            factor=_factor(rope),
            original_max_positions=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    return _yarn(rope, theta, original)


def _yarn(rope: Config, theta: float, original: int) -> RopeSpec:
    if not rope.boolean("truncate", default=True):
        raise rope.error("truncate", "false is not supported")
    factor = _factor(rope)
    fast, slow = rope.number("beta_fast", 32.0), rope.number("beta_slow", 1.0)
    if fast < slow:
        raise rope.error("beta_fast", f"({fast}) must not be below beta_slow ({slow})")
    # R1-0528-Qwen3-8B has `attn_factor`, the inverse of the factor that YaRN implies, so that its
    # attention is Qwen3-8B's. SGLang multiplies by it, as vLLM did when the model was published;
    # transformers and later versions of vLLM ignore the key.
    scale = rope.number("attn_factor", 1.0)
    mscale = [rope.number(key) if rope.get(key) else None for key in ("mscale", "mscale_all_dim")]
    return RopeSpec(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_max_positions=original,
        beta_fast=fast,
        beta_slow=slow,
        attention_factor=rope.number(
            "attention_factor", scale * yarn_attention_factor(factor, *mscale)
        ),
    )


def _factor(rope: Config) -> float:
    factor = rope.number("factor")
    if factor < 1:
        raise rope.error("factor", f"must be at least 1, found {factor}")
    return factor
