"""Which tensor gets which scheme: the plan of a quantization, made before any weight is read."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Literal

from edge.errors import ConfigError
from edge.manifest import ModelSpec, TensorScheme

GROUP_SIZES = (128, 64, 32)  # what TensorRT's INT4 block quantization was built with
Quant = Literal["fp16", "bf16", "int8", "int4"]
Clip = Literal["absmax", "mse"]


@dataclass(frozen=True)
class LinearSpec:
    """A fused linear layer of the graph and the checkpoint tensors it is made of.

    Attributes:
        name: e.g. ``layers.0.qkv``.
        weights: HF names of ``[out, in]`` matrices, stacked along ``out``.
        biases: HF names of their biases, or empty.
        shape: ``[in, out]`` of the fused matrix.
    """

    name: str
    weights: tuple[str, ...]
    biases: tuple[str, ...]
    shape: tuple[int, int]


def linear_layers(model: ModelSpec) -> list[LinearSpec]:
    """Every linear layer in the order in which the graph runs them, the lm_head last."""
    hidden, wide = model.hidden_size, model.intermediate_size
    q_width, kv_width = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    layers: list[LinearSpec] = []
    for i in range(model.num_layers):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        qkv = tuple(f"{attention}.{part}_proj" for part in "qkv")
        layers += [
            LinearSpec(
                f"layers.{i}.qkv",
                tuple(f"{name}.weight" for name in qkv),
                tuple(f"{name}.bias" for name in qkv) if model.qkv_bias else (),
                (hidden, q_width + 2 * kv_width),
            ),
            LinearSpec(f"layers.{i}.o", (f"{attention}.o_proj.weight",), (), (q_width, hidden)),
            LinearSpec(
                f"layers.{i}.gate_up",
                (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"),
                (),
                (hidden, 2 * wide),
            ),
            LinearSpec(f"layers.{i}.down", (f"{mlp}.down_proj.weight",), (), (wide, hidden)),
        ]
    head = "model.embed_tokens.weight" if model.tied_embeddings else "lm_head.weight"
    layers.append(LinearSpec("lm_head", (head,), (), (hidden, model.vocab_size)))
    return layers


@dataclass(frozen=True)
class Recipe:
    """A quantization as asked for; `schemes` resolves it for a model.

    Attributes:
        quant: scheme of the linear layers; ``fp16`` and ``bf16`` leave the weights as floats.
        group_size: weights that share a scale; 0 is one scale per output channel (INT8 only);
            None picks the largest of 128, 64, 32 that divides every layer's input width.
        keep: ``(pattern, scheme)`` overrides in the order given, the last match wins. The
            pattern is a shell wildcard on layer names, the scheme ``float``, ``int8`` or ``int4``.
        clip: how a group's scale is chosen.
    """

    quant: Quant
    group_size: int | None = None
    keep: tuple[tuple[str, str], ...] = ()
    clip: Clip = "mse"

    def schemes(self, model: ModelSpec) -> dict[str, TensorScheme]:
        """The scheme of every linear layer.

        An INT4 recipe stores the lm_head in INT8 unless told otherwise: INT4 there costs more
        quality than all other layers together and the vocabulary is one matrix only.

        Raises:
            ConfigError: a group size that TensorRT or the model's shapes do not allow, a pattern
                that matches no layer, an unknown scheme, an option that no layer obeys.
        """
        layers = linear_layers(model)
        default = self._scheme("float" if self.quant in ("fp16", "bf16") else self.quant, layers)
        result = dict.fromkeys((layer.name for layer in layers), default)
        if self.quant == "int4":
            result["lm_head"] = self._scheme("int8", layers)
        for pattern, kind in self.keep:
            names = fnmatch.filter(result, pattern)
            if not names:
                raise ConfigError(
                    f"--keep {pattern}={kind} matches no linear layer; layers are named like "
                    f"{layers[0].name}, {layers[3].name} and lm_head"
                )
            result.update(dict.fromkeys(names, self._scheme(kind, layers)))
        if all(scheme.kind == "float" for scheme in result.values()):
            for option, given in (
                (f"--group-size {self.group_size}", self.group_size is not None),
                ("--clip absmax", self.clip == "absmax"),
            ):
                if given:
                    raise ConfigError(
                        f"{option} has no effect: every layer stays float; leave it out"
                    )
        return result

    def _scheme(self, kind: str, layers: list[LinearSpec]) -> TensorScheme:
        if kind == "float":
            return TensorScheme(kind="float")
        if kind not in ("int8", "int4"):
            raise ConfigError(f"unknown scheme {kind!r}; use float, int8 or int4")
        widths = sorted({layer.shape[0] for layer in layers})
        size = self.group_size
        if size is None:
            fitting = [g for g in GROUP_SIZES if all(width % g == 0 for width in widths)]
            if not fitting:
                raise ConfigError(
                    f"no group size of {GROUP_SIZES} divides the input widths {widths} of this "
                    "model; use --quant int8 --group-size 0, or --quant fp16"
                )
            size = fitting[0]
        if size == 0 and kind == "int4":
            raise ConfigError("INT4 needs groups: use --group-size 128, 64 or 32")
        if size != 0 and (size not in GROUP_SIZES or any(width % size for width in widths)):
            fitting = [g for g in GROUP_SIZES if all(width % g == 0 for width in widths)]
            raise ConfigError(
                f"--group-size {size} does not fit: the input widths are {widths}, "
                f"group sizes that fit are {fitting}"
            )
        return TensorScheme(kind="int8" if kind == "int8" else "int4", group_size=size)
