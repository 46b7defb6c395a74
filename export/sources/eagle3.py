"""Reads an EAGLE-3 head as it is published: ``config.json`` and one file of safetensors.

The layout is that of SafeAILab/EAGLE and SpecForge: ``fc``, one decoder layer ``midlayer``,
``norm`` and ``lm_head``. A head that guesses only some tokens has two more tables. ``d2t`` is added
to a token of the head to get the model's id, and ``t2d`` marks the model's tokens that it guesses.
vLLM's names are understood, too: ``layers.0`` for ``midlayer``, a prefix ``model.``, and
``transformer_layer_config`` around the layer's numbers. The token table is the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge.bundle.linears import LinearSpec, NormSpec, fuse, linear_layers
from edge.errors import CheckpointError
from edge.model.names import TOKEN_TABLE
from edge.model.spec import ModelSpec
from edge_make.file_hash import sha256_file
from edge_make.model_config import parse_config

from .checkpoint import Checkpoint, Transformed
from .checkpoint_text import read_json
from .safetensors_file import FLOATS, SafetensorsFile
from .weight_files import WEIGHTS_NAME, no_weights

_SPECULATOR = "Eagle3Speculator"
ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", _SPECULATOR)
_BEFORE = "norm_before_residual"
_LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
_FC, _D2T, _T2D, _TABLE = "fc.weight", "d2t", "t2d", "embed_tokens.weight"
_COMPARED_ROWS = 64
_SAME = 0.05  # share of a row's norm: tables are published in fp16, bf16 or dequantized


def head_linears(head: ModelSpec) -> list[LinearSpec]:
    """List the linear layers of an EAGLE-3 head, by names of the published checkpoints.

    The decoder layer's q, k and v read an embedding and a hidden state side by side. ``fc``, which
    joins three hidden states to one, runs in the model's graph and is not among them.
    """
    parts = []
    for linear in linear_layers(head):
        width = (2 if linear.name.endswith(".qkv") else 1) * linear.shape[0]
        rows = dict(zip(linear.weights, linear.rows, strict=True))
        modules = {_published(name): size for name, size in rows.items()}
        parts.append(fuse(linear.name, width, modules))
    return parts


def _published(name: str) -> str:
    """Return the module of a tensor as SafeAILab/EAGLE spells it."""
    return name.removesuffix(".weight").replace("model.layers.0.", "midlayer.", 1)


def head_norms(head: ModelSpec) -> list[NormSpec]:
    """List the RMSNorms of an EAGLE-3 head; two of them are side by side before its attention."""
    layer = "midlayer"
    sources = {
        "layers.0.embed_norm": f"{layer}.input_layernorm.weight",
        "layers.0.input_norm": f"{layer}.hidden_norm.weight",
        "layers.0.post_norm": f"{layer}.post_attention_layernorm.weight",
        "final_norm": "norm.weight",
    }
    return [NormSpec(name, source, head.hidden_size) for name, source in sources.items()]


class Eagle3Head(Transformed):
    """A head that fits a model; `tensor` reads its weights by their published names.

    Args:
        model: the model that it is to draft for; it is not closed with the head.
        directory: directory of the head.

    Attributes:
        spec: the head's own decoder, of one layer, with the tokens that it guesses.
        layers: the layers of the model whose inputs it reads, as in `manifest.DraftHead`.
        norm_before_residual: whether the norm comes first, as in `manifest.DraftHead`.
        vocabulary: the model's id of each of its tokens, int64 ``[draft vocab]``; None if it
            guesses all of them, in the model's order.
        sha256: SHA-256 of its weights' file.
        num_bytes: size of that file.

    Raises:
        CheckpointError: it is no such head, incomplete, or for another model; the message says why.
    """

    def __init__(self, model: Checkpoint, directory: Path) -> None:
        super().__init__(model)
        if TOKEN_TABLE in model.changed:
            raise CheckpointError(
                f"{model.name} is a {model.spec.architecture}, whose hidden states are scaled in "
                "the graph, so that no draft head fits; export without --eagle3"
            )
        self._directory = directory
        config = _HeadConfig.read(directory, model.spec)
        self.name = directory.resolve().name
        self.spec, self.layers = config.spec, config.layers
        self.norm_before_residual = config.norm_before_residual
        self._file = _open_weights(directory)
        self._names = {_plain(name): name for name in self._file.entries}
        self._check_tensors()
        self.vocabulary = self._read_vocabulary()
        self._check_table()
        weights = sha256_file(self._file.path)
        self.sha256, self.num_bytes = weights.sha256, weights.num_bytes

    def tensor(self, name: str) -> NDArray[Any]:
        """Read one of its tensors; see `Checkpoint.tensor`."""
        return self._file.tensor(self._names[name])

    def close(self) -> None:
        """Do nothing: whoever opened the model closes it."""

    def _check_tensors(self) -> None:
        model, hidden = self.original.spec, self.spec.hidden_size
        expected: dict[str, tuple[int, ...]] = {_FC: (hidden, 3 * model.hidden_size)}
        for layer in head_linears(self.spec):
            for name, rows in zip(layer.weights, layer.rows, strict=True):
                expected[name] = (rows, layer.shape[0])
        expected |= {norm.source: (norm.size,) for norm in head_norms(self.spec)}
        for name, shape in expected.items():
            if name not in self._names:
                raise CheckpointError(
                    f"{self._file.path} has no tensor {name}, expected {list(shape)}; the head is "
                    "incomplete, or not one of EAGLE-3"
                )
            entry = self._file.entries[self._names[name]]
            if entry.shape != shape:
                raise CheckpointError(
                    f"{self._file.path}: tensor {name} has shape {list(entry.shape)}, its "
                    f"config.json and {self.original.name} ask for {list(shape)}; the head is for "
                    "another model"
                )
            if entry.dtype not in FLOATS:
                raise CheckpointError(
                    f"{self._file.path}: tensor {name} has type {entry.dtype}, expected one of "
                    f"{', '.join(FLOATS)}"
                )
        strays = sorted(self._names.keys() - expected.keys() - {_D2T, _T2D, _TABLE})
        if strays:
            raise CheckpointError(
                f"{self._file.path}: tensor {strays[0]} is no part of an EAGLE-3 head of one layer "
                "without biases; only such heads are supported"
            )

    def _read_vocabulary(self) -> NDArray[np.int64] | None:
        size, total = self.spec.vocab_size, self.original.spec.vocab_size
        if _D2T not in self._names:
            if size != total:
                raise CheckpointError(
                    f"{self._file.path} has no tensor d2t, but the head guesses {size} tokens of "
                    f"{total}: which ones is not known; copy the whole head"
                )
            return None
        offsets = self._integers(_D2T, size)
        ids: NDArray[np.int64] = np.arange(size) + offsets.astype(np.int64)
        if ids.min() < 0 or ids.max() >= total:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise CheckpointError(
                f"{self._file.path}: d2t leads to token {wrong}, {self.original.name} has 0 to "
                f"{total - 1}; the head is for another model"
            )
        if len(np.unique(ids)) != size:
            raise CheckpointError(
                f"{self._file.path}: d2t leads to the same token twice; download the head again"
            )
        if _T2D in self._names:
            known = self._integers(_T2D, None) != 0
            # Tools pad tables differently; only the tokens count.
            if set(np.flatnonzero(known).tolist()) != set(ids.tolist()):
                raise CheckpointError(
                    f"{self._file.path}: t2d names other tokens than d2t; download the head again"
                )
        return None if size == total and (offsets == 0).all() else ids

    def _integers(self, name: str, size: int | None) -> NDArray[Any]:
        entry = self._file.entries[self._names[name]]
        if entry.dtype in FLOATS or len(entry.shape) != 1 or size not in (None, entry.shape[0]):
            raise CheckpointError(
                f"{self._file.path}: {name} is {entry.dtype} {list(entry.shape)}, expected "
                f"integers [{size or 'vocabulary'}]; download the head again"
            )
        return self._file.tensor(self._names[name])

    def _check_table(self) -> None:
        """Refuse a head whose token table is not the model's, since it was trained with its own."""
        if _TABLE not in self._names:
            return
        mine = self._file.tensor(self._names[_TABLE])
        model = self.original.tensor(TOKEN_TABLE)
        if mine.shape[1:] != model.shape[1:]:
            raise CheckpointError(
                f"{self._file.path}: {_TABLE} has shape {list(mine.shape)}, {self.original.name} "
                f"has {list(model.shape)}; the head is for another model"
            )
        rows = np.linspace(0, min(len(mine), len(model)) - 1, _COMPARED_ROWS).astype(np.int64)
        ours, theirs = (np.asarray(table[rows], np.float32) for table in (model, mine))
        apart = np.linalg.norm(ours - theirs) / max(float(np.linalg.norm(ours)), 1e-12)
        if not apart <= _SAME:
            raise CheckpointError(
                f"{self._file.path}: {_TABLE} differs from the token table of "
                f"{self.original.name} by {apart:.0%}; the head is for another model"
            )


@dataclass(frozen=True)
class _HeadConfig:
    """Numbers from a head's ``config.json``."""

    spec: ModelSpec
    layers: tuple[int, int, int]
    norm_before_residual: bool

    @staticmethod
    def read(directory: Path, model: ModelSpec) -> _HeadConfig:
        path = directory / "config.json"
        config = read_json(path)
        names = config.get("architectures")
        if not isinstance(names, list) or len(names) != 1 or names[0] not in ARCHITECTURES:
            raise CheckpointError(
                f"{path}: architectures is {names!r}, an EAGLE-3 head has one of "
                f"{', '.join(ARCHITECTURES)}"
            )
        inner = config.get("transformer_layer_config", config)
        if not isinstance(inner, dict):
            raise CheckpointError(f"{path}: transformer_layer_config must be an object")
        values = {**inner, "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
        spec = parse_config(values, str(path))
        if any(linear.biases for linear in linear_layers(spec)):
            raise CheckpointError(f"{path}: attention_bias is true: a head has no biases")
        if spec.num_layers != 1:
            raise CheckpointError(
                f"{path}: num_hidden_layers is {spec.num_layers}; heads of one layer are supported"
            )
        for key, found in (
            ("hidden_size", spec.hidden_size),
            ("target_hidden_size", config.get("target_hidden_size") or model.hidden_size),
        ):
            if found != model.hidden_size:
                raise CheckpointError(
                    f"{path}: {key} is {found}, the model's is {model.hidden_size}; the head is "
                    "for another model"
                )
        size = config.get("draft_vocab_size") or model.vocab_size
        if type(size) is not int or not 1 <= size <= model.vocab_size:
            raise CheckpointError(
                f"{path}: draft_vocab_size is {size!r}, the model has {model.vocab_size} tokens; "
                "the head is for another model"
            )
        before = config.get(_BEFORE, None if names == [_SPECULATOR] else False)
        if before is None:
            raise CheckpointError(
                f"{path} has no {_BEFORE}, which the library speculators takes as false, and vLLM "
                "as true; write the one that the head was trained with"
            )
        if type(before) is not bool:
            raise CheckpointError(f"{path}: {_BEFORE} must be true or false")
        return _HeadConfig(
            msgspec.structs.replace(spec, vocab_size=size),
            _layers(config, model.num_layers, path),
            before,
        )


def _layers(config: Mapping[str, Any], count: int, path: Path) -> tuple[int, int, int]:
    """Find the layers whose inputs are read: by default as in SafeAILab/EAGLE, vLLM and SGLang.

    If the config names layers, two conventions are in use: the layer whose input is meant, or the
    one whose output. Only the second kind begins with 1, since nobody reads the embeddings (SGLang
    tells them apart the same way).
    """
    section = config.get("eagle_config")
    inner = section if isinstance(section, dict) else {}
    found = config.get(_LAYER_IDS) or inner.get(_LAYER_IDS)
    if found is None:
        if count < 6:
            raise CheckpointError(
                f"{path} does not say which layers the head reads ({_LAYER_IDS}), and a model of "
                f"{count} layers has no usual ones"
            )
        return 2, count // 2, count - 3
    if (
        not isinstance(found, list)
        or len(found) != 3
        or any(type(each) is not int or each < 0 for each in found)
    ):
        raise CheckpointError(f"{path}: {_LAYER_IDS} is {found!r}, expected three layers")
    low, middle, high = (each + 1 if found[0] == 1 else each for each in found)
    if max(low, middle, high) > count:
        raise CheckpointError(
            f"{path}: {_LAYER_IDS} is {found}, the model has {count} layers; the head is for "
            "another model"
        )
    return low, middle, high


def _plain(name: str) -> str:
    """Return a tensor's name in SafeAILab/EAGLE's spelling."""
    name = name.removeprefix("model.")
    return name.replace("layers.0.", "midlayer.", 1) if name.startswith("layers.0.") else name


def _open_weights(directory: Path) -> SafetensorsFile:
    path = directory / WEIGHTS_NAME
    if path.is_file():
        return SafetensorsFile(path, quantized=True)
    raise no_weights(
        f"--eagle3 {directory} has no {WEIGHTS_NAME}",
        directory,
        f"safetensors.torch.save_file(torch.load({{name!r}}, weights_only=True), {WEIGHTS_NAME!r})",
        "give the directory of a published EAGLE-3 head",
    )
