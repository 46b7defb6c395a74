"""Opens a GGUF file of llama.cpp as a checkpoint: spec, weights and text from one file."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.bundle.manifest import Source
from edge.errors import CheckpointError
from edge.model.names import MODULES, OUTSIDE, module_name
from edge.model.parts import Add, Attention, GatedMlp, Linear, Norm, Rope, unknown_part
from edge.model.spec import ModelSpec, RopeSpec
from edge_make.checkpoint_tensors import expected_tensors
from edge_make.families import FAMILIES, Config, Decoder, decoder
from edge_make.file_hash import sha256_file
from edge_make.model_config import BIDIRECTIONAL, refuse_arithmetic, yarn_attention_factor
from edge_make.other_models import instead

from .checkpoint import Checkpoint
from .gguf_file import GgufFile
from .gguf_tokenizer import read_gguf_text

_log = logging.getLogger(__name__)
_ROPE_FACTORS = "rope_freqs.weight"
_EMBEDDINGS, _HEAD = "token_embd.weight", "output.weight"
# GGUF's names of the keys of `edge_make.families.config` and `edge_make.model_config`,
_KEYS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "intermediate_size": "feed_forward_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
    "vocab_size": "vocab_size",
    "rope_theta": "rope.freq_base",
}
_ARITHMETIC = {  # and of those that change the arithmetic, where 0 is off
    "sliding_window": "attention.sliding_window",
    "attention_multiplier": "attention.scale",
    "residual_multiplier": "residual_scale",
    "embedding_multiplier": "embedding_scale",
    "logits_scaling": "logit_scale",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "clip_qkv": "attention.clamp_kqv",
    "llama_4_scaling_beta": "attention.temperature_scale",
    "max_alibi_bias": "attention.max_alibi_bias",
    "yarn_log_multiplier": "rope.scaling.yarn_log_multiplier",
}


class GgufCheckpoint(Checkpoint):
    """A file's weights; quantized tensors are dequantized to fp32 one at a time."""

    def __init__(self, path: Path) -> None:
        """Open a file and check that exactly the model's tensors are there.

        Raises:
            CheckpointError: the file is damaged or not supported.
            DependencyError: the package gguf is not installed.
        """
        self._path = path
        self._file: GgufFile | None = GgufFile(path)
        metadata, tensors = self._file.metadata, self._file.tensors
        factors = self._file.tensor(_ROPE_FACTORS) if _ROPE_FACTORS in tensors else None
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        found = read_gguf_decoder(metadata, shapes, factors, path)
        self.spec = found.spec
        self._gguf_names = _check_tensors(self.spec, shapes, self._file, path)
        self.text = read_gguf_text(metadata, path, self.spec.vocab_size)
        self.name = path.stem
        self._undo = FAMILIES[self.spec.architecture].gguf_weights(self.spec)
        self._changes = found.changes
        self.changed = frozenset(found.changes)

    @cached_property
    def source(self) -> Source:
        """Describe the weights' origin; hash the file on first use (seconds per GB)."""
        licence = self._open_file().metadata.get("general.license")
        return Source(
            kind="gguf",
            location=self._path.name,
            sha256=sha256_file(self._path).sha256,
            licence=licence if isinstance(licence, str) else None,
        )

    def tensor(self, name: str) -> NDArray[Any]:
        """Read a tensor under its HF name, in HF's order of rows; see `Checkpoint.tensor`."""
        file = self._open_file()
        if name not in self._gguf_names:
            raise CheckpointError(f"{self._path} has no tensor {name}")
        weights = file.tensor(self._gguf_names[name])
        for changes in (self._undo, self._changes):
            if name in changes:
                weights = changes[name](weights)
        return weights

    def close(self) -> None:
        """Release the file; it stays mapped until the last view of it is gone."""
        self._file = None

    def _open_file(self) -> GgufFile:
        if self._file is None:
            raise CheckpointError(f"{self._path} was closed")
        return self._file


def read_gguf_decoder(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope_factors: NDArray[Any] | None,
    path: Path,
) -> Decoder:
    """Read every number of the decoder from GGUF metadata.

    Args:
        metadata: metadata of the whole file.
        shapes: shapes of the tensors, by GGUF name.
        rope_factors: ``rope_freqs.weight`` [head_dim / 2], or None.
        path: the file, for error messages.

    Raises:
        CheckpointError: an unsupported architecture or feature, a missing key, a wrong type or a
            value that makes no sense; the key is named.
    """
    # Check this first, since parts after the first have no other keys.
    if metadata.get("split.count", 0) not in (0, 1):
        raise CheckpointError(
            f"{path} is one part of a split model; join them first: llama-gguf-split --merge"
        )
    architecture = metadata.get("general.architecture")
    own = {key.removeprefix(f"{architecture}."): value for key, value in metadata.items()}
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise CheckpointError(
            f"{path}: general.architecture {architecture!r} is not supported; supported: "
            f"{', '.join(FAMILIES)}; {instead(str(architecture), own)}"
        )
    family = FAMILIES[architecture]
    if own.get("expert_count") not in (None, 0):
        raise CheckpointError(
            f"{path}: {architecture}.expert_count is {own['expert_count']!r}: not supported; "
            f"{instead(architecture, own)}"
        )
    if own.get("attention.causal") is False:
        raise CheckpointError(f"{path}: {architecture}.attention.causal is false: {BIDIRECTIONAL}")
    if len(shapes.get(_EMBEDDINGS, ())) != 2:
        raise CheckpointError(f"{path} has no tensor {_EMBEDDINGS} [vocabulary, hidden]")
    rows = shapes[_EMBEDDINGS][0]
    values = {key: own[name] for key, name in _KEYS.items() if name in own}
    values |= {
        key: own[name] for key, name in _ARITHMETIC.items() if own.get(name) not in (None, 0)
    }
    keys = Config(
        {
            # Hugging Face's keys of the same names may mean something else.
            **{key: value for key, value in own.items() if key not in _ARITHMETIC.values()},
            **values,
            "attention_bias": "blk.0.attn_q.bias" in shapes,
            "tie_word_embeddings": _HEAD not in shapes,
        },
        str(path),
        defaults={
            **{key: value for key, value in family.defaults.items() if key != "rope_theta"},
            "num_key_value_heads": values.get("num_attention_heads"),
            "vocab_size": rows,
        },
        name=lambda key: f"{architecture}.{(_KEYS | _ARITHMETIC).get(key, key)}",
        remedy="convert the model again",
    )
    refuse_arithmetic(keys, family)
    if keys.integer("vocab_size", rows) != rows:
        raise keys.error(
            "vocab_size", f"is {keys.get('vocab_size')}, {_EMBEDDINGS} has {rows} rows"
        )
    heads = keys.integer("num_attention_heads")
    head_dim = keys.integer("head_dim", max(1, keys.integer("hidden_size") // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.integer(key, head_dim) != head_dim:
            raise keys.error(key, f"is {keys.get(key)}, expected the head dimension {head_dim}")
    return decoder(family, keys, _rope(keys, architecture, rope_factors, head_dim))


def _rope(keys: Config, architecture: str, factors: NDArray[Any] | None, head_dim: int) -> RopeSpec:
    theta = keys.number("rope_theta", 10_000.0)  # llama.cpp's default
    kind, scaling = keys.get("rope.scaling.type"), "rope.scaling.factor"
    if keys.get(scaling) is None and keys.get("rope.scale_linear") is not None:
        scaling = "rope.scale_linear"  # its name in old files
    if kind is None and keys.get(scaling) not in (None, 0, 1):
        kind = "linear"  # llama.cpp's default
    if factors is not None:
        if kind not in (None, "none", "llama3"):
            raise keys.error(
                "rope.scaling.type", f"is {kind!r} beside {_ROPE_FACTORS}: not supported"
            )
        return derive_llama3(np.asarray(factors, np.float64), theta, head_dim)
    if kind in (None, "none"):
        long = keys.integer("max_position_embeddings") > 8192  # where Llama 3's context ends
        if architecture == "llama" and theta == 500_000.0 and long:
            _log.warning(
                "%s has the context of Llama 3.1 without %s, in which GGUF keeps its RoPE scaling: "
                "if the original's config.json says rope_type llama3, this file is of a converter "
                "of July 2024 that left it out, and answers get worse; convert it again",
                *(keys.where, _ROPE_FACTORS),
            )
        return RopeSpec(theta=theta)
    if kind not in ("linear", "yarn"):
        raise keys.error(
            "rope.scaling.type", f"{kind!r} is not supported; supported: none, linear, yarn"
        )
    factor = keys.number(scaling)
    if factor < 1:
        raise keys.error(scaling, f"must be at least 1, found {factor}")
    if kind == "linear":
        return RopeSpec(theta=theta, kind="linear", factor=factor)
    scale = keys.number("rope.scaling.attn_factor", 1.0)
    return RopeSpec(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_max_positions=keys.integer("rope.scaling.original_context_length"),
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=scale * yarn_attention_factor(factor),
    )


def derive_llama3(factors: NDArray[np.float64], theta: float, head_dim: int) -> RopeSpec:
    """Find the parameters of ``llama3`` scaling from the divisors that GGUF stores instead of them.

    llama3 scaling divides frequency f by 1 / ((1 - s) / factor + s), where s is
    (original / wavelength - low) / (high - low) clipped to 0..1 and wavelength is 2 pi / f. So s
    is a straight line over f, and two points on the slope fix it. Scaling original, low and high
    by one number changes nothing, so low is set to 1, as in every published model.

    Args:
        factors: ``rope_freqs.weight`` [head_dim / 2].
        theta: base of the frequencies.
        head_dim: size of a head.

    Raises:
        CheckpointError: no parameters give these divisors.
    """
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    if factors.shape == frequencies.shape and np.isfinite(factors).all() and (factors >= 1).all():
        factor = float(factors.max())
        slope = (factors > 1) & (factors < factor)
        if slope.sum() >= 2:
            s = (1 / factors[slope] - 1 / factor) / (1 - 1 / factor)
            gradient, offset = np.polyfit(frequencies[slope], s, 1)
            # offset = -low / (high - low), gradient = original / (2 pi (high - low)).
            spec = RopeSpec(
                theta=theta,
                kind="llama3",
                factor=factor,
                original_max_positions=round(2 * math.pi * gradient / -offset) if offset else 0,
                low_freq_factor=1.0,
                high_freq_factor=float(round(1 - 1 / offset, 4)) if offset else 0.0,
            )
            if np.allclose(_llama3_divisors(spec, frequencies), factors, rtol=1e-4, atol=0):
                return spec
    raise CheckpointError(
        f"{_ROPE_FACTORS} holds no llama3 scaling: found {factors.shape} divisors from "
        f"{factors.min():g} to {factors.max():g}; export from the original Hugging Face checkpoint"
    )


def _llama3_divisors(spec: RopeSpec, frequencies: NDArray[np.float64]) -> NDArray[np.float64]:
    turns = spec.original_max_positions * frequencies / (2 * math.pi)
    s = (turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    s = np.clip(s, 0, 1)
    divisors: NDArray[np.float64] = 1 / ((1 - s) / spec.factor + s)
    return divisors


def _gguf_modules(model: ModelSpec) -> dict[str, str]:
    """Return the GGUF names of a model's modules by their HF names."""
    found = {names.safetensors: names.gguf for names in OUTSIDE.values()}
    for layer, parts in model.each_layer():
        for part in parts:
            match part:
                case Norm(name=name):
                    modules = [name]
                case Linear(outputs=outputs):
                    modules = [output for output, _ in outputs]
                case Rope() | Attention() | GatedMlp() | Add():
                    continue
                case _:
                    unknown_part(part)
            for name in modules:
                found[module_name(layer, name)] = f"blk.{layer}.{MODULES[name].gguf}"
    return found


def _check_tensors(
    spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]], file: GgufFile, path: Path
) -> dict[str, str]:
    """Map HF names to GGUF names, after a check that exactly these tensors are there."""
    expected = expected_tensors(spec)
    modules = _gguf_modules(spec)
    names = {}
    for name in expected:
        module, _, kind = name.rpartition(".")
        names[name] = f"{modules[module]}.{kind}"
    for name, gguf_name in names.items():
        found = shapes.get(gguf_name)
        if found != expected[name]:
            raise CheckpointError(
                f"{path}: tensor {gguf_name} must have shape {list(expected[name])}, found "
                f"{'none' if found is None else list(found)}; convert the model again"
            )
    for surplus in sorted(shapes.keys() - set(names.values()) - {_ROPE_FACTORS}):
        # Llama has biases of all four projections or of none, and those of o may be zeros.
        if not surplus.endswith("attn_output.bias") or file.tensor(surplus).any():
            raise CheckpointError(
                f"{path}: tensor {surplus} {list(shapes[surplus])} is not part of "
                f"{spec.architecture} as we know it: not supported"
            )
    return names
