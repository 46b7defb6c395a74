"""Which tensor gets which scheme: the plan of a quantization, made before any weight is read."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from edge.bundle.manifest import ModelSpec, TensorScheme
from edge.errors import ConfigError, DependencyError, install_command
from edge.planner.weights import INT4_GROUP_SIZE

GROUP_SIZES = (128, 64, 32)  # what TensorRT's INT4 block quantization was built with
Quant = Literal["fp16", "bf16", "int8", "int8-w8a8", "int4"]
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


def norm_sources(model: ModelSpec) -> dict[str, str]:
    """HF name of every RMSNorm weight by its name in the graph."""
    sources = {"final_norm": "model.norm.weight"}
    for i in range(model.num_layers):
        block = f"model.layers.{i}"
        sources[f"layers.{i}.input_norm"] = f"{block}.input_layernorm.weight"
        sources[f"layers.{i}.post_norm"] = f"{block}.post_attention_layernorm.weight"
        if model.qk_norm:
            for part in "qk":
                sources[f"layers.{i}.{part}_norm"] = f"{block}.self_attn.{part}_norm.weight"
    return sources


@dataclass(frozen=True)
class Recipe:
    """A quantization as asked for; `schemes` resolves it for a model.

    Attributes:
        quant: scheme of the linear layers; ``fp16`` and ``bf16`` leave the weights as floats.
        group_size: weights that share a scale; 0 is one scale per output channel (INT8 only);
            None is 32 for INT4 layers, and for INT8 the largest of 128, 64, 32 that divides every
            layer's input width.
        keep: ``(pattern, scheme)`` overrides in the order given, the last match wins. The
            pattern is a shell wildcard on layer names, the scheme ``float``, ``int8``, ``int4`` or
            ``w8a8``.
        clip: how a group's scale is chosen.
    """

    quant: Quant
    group_size: int | None = None
    keep: tuple[tuple[str, str], ...] = ()
    clip: Clip = "mse"

    def schemes(self, model: ModelSpec) -> dict[str, TensorScheme]:
        """The scheme of every linear layer.

        An INT4 recipe stores the lm_head in INT8 unless told otherwise: INT4 there costs more
        quality than all other layers together and the vocabulary is one matrix only. INT8-W8A8
        rounds the inputs of all layers but down, where the first token of a text is far
        louder than the others, and the lm_head, which runs for one token of a prompt.

        Raises:
            ConfigError: a group size that TensorRT or the model's shapes do not allow, a pattern
                that matches no layer, an unknown scheme, an option that no layer obeys.
        """
        layers = linear_layers(model)
        kinds = {"fp16": "float", "bf16": "float", "int8-w8a8": "w8a8"}
        default = self._scheme(kinds.get(self.quant, self.quant), layers)
        result = dict.fromkeys((layer.name for layer in layers), default)
        if self.quant == "int4":
            result["lm_head"] = self._scheme("int8", layers)
        if self.quant == "int8-w8a8":
            weak = [*fnmatch.filter(result, "*.down"), "lm_head"]
            result.update(dict.fromkeys(weak, self._scheme("int8", layers)))
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
        if kind == "w8a8":
            return TensorScheme(kind="w8a8")
        if kind not in ("int8", "int4"):
            raise ConfigError(f"unknown scheme {kind!r}; use float, int8, int4 or w8a8")
        widths = sorted({layer.shape[0] for layer in layers})
        size = self.group_size
        if size is None:
            fitting = [g for g in GROUP_SIZES if all(width % g == 0 for width in widths)]
            if not fitting:
                raise ConfigError(
                    f"no group size of {GROUP_SIZES} divides the input widths {widths} of this "
                    "model; use --quant int8 --group-size 0, or --quant fp16"
                )
            size = INT4_GROUP_SIZE if kind == "int4" else fitting[0]
        if size == 0 and kind == "int4":
            raise ConfigError("INT4 needs groups: use --group-size 128, 64 or 32")
        if size != 0 and (size not in GROUP_SIZES or any(width % size for width in widths)):
            fitting = [g for g in GROUP_SIZES if all(width % g == 0 for width in widths)]
            raise ConfigError(
                f"--group-size {size} does not fit: the input widths are {widths}, "
                f"group sizes that fit are {fitting}"
            )
        return TensorScheme(kind="int8" if kind == "int8" else "int4", group_size=size)


class _RecipeFile(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    quant: Quant | None = None
    method: Literal["rtn", "awq", "gptq", "awq+gptq"] | None = None
    group_size: int | None = None
    keep: dict[str, str] | None = None
    clip: Clip | None = None
    dtype: Literal["fp16", "bf16"] | None = None
    calibration: str | None = None
    calibration_tokens: int | None = None
    seed: int | None = None
    rotate: bool | None = None
    embeddings: Literal["fp16", "int8"] | None = None


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe in TOML or, if the file's name ends so, JSON.

    The keys are the options of ``edge-llm export`` in snake case; ``keep`` is a table from pattern
    to scheme. A relative ``calibration`` starts from the recipe's directory.

    Returns:
        Arguments of `pipeline.ExportConfig`, for the keys that the file has.

    Raises:
        ConfigError: the file cannot be read, has an unknown key or a wrong value; it is named.
        DependencyError: TOML on Python 3.10 without the package tomli.
    """
    decode = msgspec.json.decode if path.suffix.lower() == ".json" else msgspec.toml.decode
    try:
        recipe = decode(path.read_bytes(), type=_RecipeFile)
    except OSError as error:
        raise ConfigError(f"--recipe {path} cannot be read: {error.strerror}") from error
    except ImportError as error:
        raise DependencyError(
            "recipes in TOML need the package tomli before Python 3.11; install it with: "
            f"{install_command('export')}"
        ) from error
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ConfigError(f"--recipe {path} is not valid: {error}") from error
    options: dict[str, Any] = {
        name: value for name, value in msgspec.structs.asdict(recipe).items() if value is not None
    }
    if "keep" in options:
        options["keep"] = tuple(options["keep"].items())
    if "calibration" in options:
        options["calibration"] = path.parent / options["calibration"]
    return options
