"""Merges a LoRA adapter in peft's layout into its base model, tensor by tensor.

``W' = W + scaling * B @ A`` (arXiv 2106.09685) for linears, the same with ``B @ A`` transposed for
the token table. Modules that the adapter holds whole (``modules_to_save``) replace the base's. The
merged model computes what base and adapter compute together, in float.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge.adapters.peft_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PAIR, PREFIX
from edge.bundle.manifest import Adapter, Source
from edge.errors import CheckpointError
from edge.model.names import TOKEN_TABLE
from edge.model.spec import ModelSpec
from edge_make.checkpoint_tensors import expected_tensors

from .checkpoint import Checkpoint, Transformed
from .lora_config import LoraConfig, read_lora_config
from .quantization_config import WeightFormat
from .quantized_weight import QuantizedWeight
from .safetensors_file import SafetensorsFile, TensorEntry
from .weight_files import hash_files, no_weights

_EMBEDDINGS, _HEAD = "model.embed_tokens", "lm_head"
_TILE_ROWS = 8192
# Endings after a module's name: (A, B) of a linear and of an embedding, and whole weights.
_PAIRS = (PAIR, (".lora_embedding_A", ".lora_embedding_B"))
_WHOLE = (".weight", ".base_layer.weight")

Array = NDArray[np.float32]


class LoraCheckpoint(Transformed):
    """A base model with an adapter merged in.

    A tied base is untied if the adapter changes the token table or the lm_head: the adapter was
    trained with the other one unchanged.

    Args:
        checkpoint: the base model; see `Transformed`.
        directory: holds ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        CheckpointError: not a plain LoRA, one for another base model, or one that is incomplete.
    """

    def __init__(self, checkpoint: Checkpoint, directory: Path) -> None:
        super().__init__(checkpoint)
        config = read_lora_config(directory)
        self._file: SafetensorsFile | None = _open_weights(directory)
        # peft leaves "model." out of the names if an embedder was trained without its head.
        lacks_head = checkpoint.spec.task == "embed" and not any(
            name.startswith(f"{PREFIX}model.") for name in self._file.entries
        )
        stem = "model." if lacks_head else ""
        modules = {
            module.removeprefix(stem): shape
            for module, shape in _modules(checkpoint.spec).items()
            if module.startswith(stem)
        }
        low_rank, whole = _sort_tensors(self._file, config, modules)
        self._low_rank = {stem + module: names for module, names in low_rank.items()}
        self._whole = {stem + module: name for module, name in whole.items()}
        self._scaling = {stem + module: config.scaling(module) for module in low_rank}
        touches_table = bool({_EMBEDDINGS, _HEAD} & {*self._low_rank, *self._whole})
        self._untied = checkpoint.spec.tied_embeddings and touches_table
        if touches_table and TOKEN_TABLE in checkpoint.changed:
            raise CheckpointError(
                f"{directory}: it adapts {_EMBEDDINGS} or {_HEAD}, which {checkpoint.name} scales "
                "(embedding_multiplier), and that is not supported; train an adapter of the layers"
            )
        if self._untied:
            if config.ensure_weight_tying:
                _check_tying(directory, {*self._low_rank, *self._whole})
            self.spec = msgspec.structs.replace(checkpoint.spec, tied_embeddings=False)
        # The config holds ranks and scales.
        files = [directory / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
        self._adapter = Adapter(name=directory.resolve().name, sha256=hash_files(files))
        self.name = f"{checkpoint.name}+{self._adapter.name}"

    @property
    def source(self) -> Source:
        """Describe the base model's origin, with the adapter's name and hash."""
        return msgspec.structs.replace(super().source, adapter=self._adapter)

    def tensor(self, name: str) -> NDArray[Any]:
        """Read a merged tensor, fp32 where the adapter adds to it; see `Checkpoint.tensor`."""
        if self._file is None:
            raise CheckpointError(f"the adapter {self._adapter.name} was closed")
        module, _, kind = name.rpartition(".")
        if kind != "weight":
            return super().tensor(name)
        rows: Any = slice(None)
        if module == _HEAD and self.reranking is not None:  # only two of its rows are left
            rows = [self.reranking.no, self.reranking.yes]
        base: NDArray[Any]
        if module in self._whole:
            base = self._file.tensor(self._whole[module])[rows]
        elif module == _HEAD and self._untied:
            base = super().tensor(f"{_EMBEDDINGS}.weight")
        else:
            base = super().tensor(name)
        if module not in self._low_rank:
            return base
        a, b = (self._file.tensor(part).astype(np.float32) for part in self._low_rank[module])
        if module == _EMBEDDINGS:
            a, b = b.T, a.T  # the table is [vocab, hidden], the product [hidden, vocab]
        return _add(base, a, b[rows], np.float32(self._scaling[module]))

    def weight_format(self, name: str) -> WeightFormat | None:
        """Tell how the base stores a weight; one that the adapter changes has float inputs."""
        form = super().weight_format(name)
        return replace(form, inputs="float") if form and self._touches(name) else form

    def quantized_weight(self, name: str) -> QuantizedWeight | None:
        """Read the integers of a weight that the adapter leaves alone; see `Checkpoint`."""
        return None if self._touches(name) else self.original.quantized_weight(name)

    def _touches(self, name: str) -> bool:
        module = name.removesuffix(".weight")
        return module in self._low_rank or module in self._whole

    def close(self) -> None:
        """Close the adapter and the base model."""
        self._file = None
        super().close()


def _add(base: NDArray[Any], a: Array, b: Array, scaling: np.float32) -> Array:
    """Compute ``base + scaling * b @ a`` in fp32, in tiles of rows."""
    result = np.empty(base.shape, dtype=np.float32)
    for start in range(0, len(base), _TILE_ROWS):
        rows = slice(start, start + _TILE_ROWS)
        np.matmul(b[rows], a, out=result[rows])
        result[rows] *= scaling
        result[rows] += base[rows]
    return result


def _open_weights(directory: Path) -> SafetensorsFile:
    path = directory / ADAPTER_WEIGHTS
    if not path.is_file():
        raise no_weights(
            f"--lora {directory} has no {ADAPTER_WEIGHTS}",
            directory,
            "save_pretrained(..., safe_serialization=True)",
            "copy the whole adapter",
            ["adapter_model.bin"],
        )
    file = SafetensorsFile(path)
    if not file.entries:
        raise CheckpointError(f"{path} holds no tensors, so there is nothing to merge")
    return file


def _modules(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Map every module's name to the shape of its weight, ``(out, in)`` for linears."""
    found = {
        name.removesuffix(".weight"): shape
        for name, shape in expected_tensors(spec).items()
        if name.endswith(".weight")
    }
    return {**found, _HEAD: found[_EMBEDDINGS]}


def _sort_tensors(
    file: SafetensorsFile, config: LoraConfig, modules: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """Sort tensor names by module: A and B, or whole weights; every tensor must be one of them."""
    low_rank: dict[str, tuple[str, str]] = {}
    whole: dict[str, str] = {}
    left = dict(file.entries)
    for module, shape in modules.items():
        if len(shape) == 2 and (names := _take_pair(file.path, left, config, module, shape)):
            low_rank[module] = names
        for ending in _WHOLE:
            name = f"{PREFIX}{module}{ending}"
            if name in left:
                _check_shape(file.path, name, left.pop(name), shape)
                whole[module] = name
        if config.saves(module) and module not in whole:
            raise CheckpointError(
                f"{file.path} has no weight of {module}, which modules_to_save in its config "
                "names; the adapter is incomplete"
            )
    if left:
        raise _surplus(file, config, min(left))
    return low_rank, whole


def _take_pair(
    path: Path,
    left: dict[str, TensorEntry],
    config: LoraConfig,
    module: str,
    shape: tuple[int, ...],
) -> tuple[str, str] | None:
    """Move A and B of a module out of ``left``; None if the adapter leaves it alone."""
    is_table = module.endswith("embed_tokens")
    a_ending, b_ending = _PAIRS[is_table]
    names = (f"{PREFIX}{module}{a_ending}", f"{PREFIX}{module}{b_ending}")
    targeted = config.targets(module)
    if left.keys().isdisjoint(names):
        if targeted:
            raise CheckpointError(
                f"{path} has no {names[0]}, but target_modules in its config covers {module}; "
                "the adapter is incomplete or for another base model"
            )
        return None
    # An embedding's A and B are those of a linear from ids to hidden states.
    out, width = shape[::-1] if is_table else shape
    rank = config.rank(module)
    _check_shape(path, names[0], left.pop(names[0], None), (rank, width))
    _check_shape(path, names[1], left.pop(names[1], None), (out, rank))
    if not targeted:
        raise CheckpointError(
            f"{path} has {names[0]}, but target_modules in its config does not cover {module}; "
            "config and weights are of different adapters"
        )
    return names


def _check_shape(path: Path, name: str, entry: TensorEntry | None, shape: tuple[int, ...]) -> None:
    if entry is None:
        raise CheckpointError(f"{path} has no {name}, the other half of a pair; copy it again")
    if entry.shape != shape:
        raise CheckpointError(
            f"{path}: {name} has shape {list(entry.shape)}, the base model and r in the config ask "
            f"for {list(shape)}; the adapter is for another base model, or its vocabulary was "
            "resized"
        )


def _surplus(file: SafetensorsFile, config: LoraConfig, name: str) -> CheckpointError:
    if name.endswith("bias") and config.bias != "none":
        return CheckpointError(
            f"{file.path}: bias is {config.bias!r} in its config and {name} holds a trained bias: "
            "not a plain LoRA; merge it with peft (merge_and_unload) and export the result"
        )
    return CheckpointError(
        f"{file.path}: {name} {list(file.entries[name].shape)} belongs to no module of the "
        "base model; the adapter is for another model, or not a plain LoRA"
    )


def _check_tying(directory: Path, touched: set[str]) -> None:
    if not {_EMBEDDINGS, _HEAD} <= touched:
        raise CheckpointError(
            f"--lora {directory}: ensure_weight_tying is true, but the weights have only one of "
            f"{_EMBEDDINGS} and {_HEAD}; save the adapter with a current peft"
        )
