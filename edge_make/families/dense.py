"""Makes layers of the Llama kind: norm, attention, norm and gated MLP."""

from __future__ import annotations

from collections.abc import Collection

from edge.model.parts import Add, AnyPart, Attention, GatedMlp, Linear, Norm, Rope

from .config import Config

Layers = list[tuple[AnyPart, ...]]


def dense(
    config: Config,
    *,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    without_rope: Collection[int] = (),
    scale: float | None = None,
    kv_heads: int | None = None,
) -> Layers:
    """Make all layers of a model.

    Args:
        config: numbers of the model.
        qkv_bias: whether q, k and v have biases whatever ``attention_bias`` says.
        qk_norm: whether the heads of q and k are normalized.
        without_rope: layers that positions do not turn.
        scale: factor on the scores of attention; None is ``head_dim ** -0.5``.
        kv_heads: number of KV heads if the config names none; None refuses that.

    Raises:
        CheckpointError: a number is missing or makes no sense.
    """
    heads = config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", kv_heads)
    dim = _head_dim(config, heads)
    if heads % kv_heads:
        raise config.error(
            "num_attention_heads",
            f"({heads}) is not a multiple of num_key_value_heads ({kv_heads})",
        )
    # `attention_bias` gives o a bias as well, which is looked for in the weights.
    layer = dense_layer(
        config.integer("hidden_size"),
        (heads, kv_heads, dim),
        config.integer("intermediate_size"),
        qkv_bias=config.boolean("attention_bias") or qkv_bias,
        qk_norm=qk_norm,
        scale=scale,
    )
    unturned = tuple(part for part in layer if not isinstance(part, Rope))
    count = config.integer("num_hidden_layers")
    return [unturned if number in without_rope else layer for number in range(count)]


def dense_layer(
    hidden: int,
    heads: tuple[int, int, int],
    wide: int,
    *,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    scale: float | None = None,
) -> tuple[AnyPart, ...]:
    """Make one layer of query heads, KV heads and their size, and an MLP of a width."""
    num_heads, kv_heads, dim = heads
    q_width, kv_width = num_heads * dim, kv_heads * dim
    qkv = ("q", q_width), ("k", kv_width), ("v", kv_width)
    return (
        Norm("input_norm", hidden),
        Linear("qkv", hidden, qkv, bias=qkv_bias),
        *([Norm("q_norm", dim, "q"), Norm("k_norm", dim, "k")] if qk_norm else []),
        Rope(dim),
        Attention(num_heads, kv_heads, dim, scale),
        Linear("o", q_width, (("o", hidden),)),
        Add("attention_residual"),
        Norm("post_norm", hidden),
        Linear("gate_up", hidden, (("gate", wide), ("up", wide))),
        GatedMlp(),
        Linear("down", wide, (("down", hidden),)),
        Add("mlp_residual"),
    )


def _head_dim(config: Config, num_heads: int) -> int:
    if config.get("head_dim") is not None:
        dim = config.integer("head_dim")
    else:
        hidden_size = config.integer("hidden_size")
        if hidden_size % num_heads:
            raise config.error(
                "hidden_size",
                f"({hidden_size}) is not a multiple of num_attention_heads ({num_heads}) and "
                "head_dim is not given",
            )
        dim = hidden_size // num_heads
    if dim % 2:
        raise config.error("head_dim", f"is {dim}; rotary embeddings need an even one")
    return dim
