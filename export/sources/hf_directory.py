"""Opens a checkpoint directory in Hugging Face's layout; weights stay mapped, nothing is loaded."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.bundle.linears import linear_layers
from edge.bundle.manifest import Source
from edge.errors import CheckpointError
from edge.model.names import TOKEN_TABLE
from edge.model.spec import Task
from edge_make.checkpoint_tensors import expected_tensors
from edge_make.model_config import parse_decoder

from .checkpoint import Checkpoint
from .checkpoint_text import read_json, read_licence, read_text
from .picture_encoder import read_vision
from .pooling import read_embedding
from .quantization_config import WeightFormat, read_quantization
from .quantized_module import QuantizedModule
from .quantized_weight import QuantizedWeight
from .safetensors_file import FLOATS, SafetensorsFile, TensorEntry
from .weight_files import WEIGHTS_NAME, hash_files, no_weights

INDEX_NAME = "model.safetensors.index.json"
_COMPARE_BYTES = 1 << 24
_CACHE_SCALES = (
    *(".k_scale", ".v_scale", ".q_scale"),
    # compressed-tensors up to 0.5, and AutoFP8.
    *(".k_proj.output_scale", ".v_proj.output_scale", ".q_proj.output_scale"),
)
_PREFIX = "model."


class HfDirectory(Checkpoint):
    """A directory's weights; tensors are read-only views of the mapped files.

    Weights that are quantized already (``quantization_config``) are dequantized to fp32 one at a
    time, or read as the integers that they are.
    """

    def __init__(
        self,
        directory: Path,
        *,
        hub_id: str | None = None,
        revision: str | None = None,
        hub: str | None = None,
        task: Task = "generate",
    ) -> None:
        """Open a directory and check that exactly the model's tensors are there.

        Args:
            directory: holds ``config.json``, ``tokenizer.json`` and safetensors.
            hub_id: where the directory was downloaded from, or None.
            revision: commit of the hub repository.
            hub: name of the hub if it is not the Hugging Face hub.
            task: ``generate``, or ``embed`` for a model that needs no lm_head.

        Raises:
            CheckpointError: something is missing, damaged or not supported.
        """
        self._directory = directory
        self._hub_id = hub_id
        self._revision = revision
        self._hub = hub
        config_path = directory / "config.json"
        config = read_json(config_path)
        decoder = parse_decoder(config, str(config_path), task)
        self.spec, self._changes = decoder.spec, decoder.changes
        self.changed = frozenset(decoder.changes)
        self._says_biases = config.get("attention_bias") is True
        self.text = read_text(directory, config, self.spec.vocab_size, hub_id)
        self.name = (hub_id or directory.resolve().name).rpartition("/")[2]
        if task == "embed":
            names = [self.name, str(config.get("_name_or_path") or "")]
            self.embedding = read_embedding(directory, config, self.text, names)
        self.vision = read_vision(directory, config, self.spec.hidden_size)
        self._quantization = read_quantization(config, directory)
        is_quantized = self._quantization is not None
        self._files, found = _open_weights(directory, quantized=is_quantized)
        # It was saved without the class that has a head.
        prefix = _PREFIX if task == "embed" and TOKEN_TABLE not in found else ""
        rename = str if self.vision is None else self.vision.decoder_name
        self._stored = {prefix + rename(name): name for name in found}
        self._owner = {name: found[stored] for name, stored in self._stored.items()}
        self._modules = self._quantized_modules()
        self._check_tensors()
        for module in self._modules.values():
            module.check_values(self._read, self._owner.__contains__)

    @cached_property
    def source(self) -> Source:
        """Describe the weights' origin; hash every weight file on first use (seconds per GB)."""
        return Source(
            kind="hub" if self._hub_id else "directory",
            location=self._location(),
            revision=self._revision,
            sha256=hash_files(file.path for _, file in sorted(self._files.items())),
            licence=read_licence(self._directory),
            quantization=None if self._quantization is None else self._quantization.describe(),
        )

    def _location(self) -> str:
        if self._hub_id is None:
            return self._directory.resolve().name
        return self._hub_id if self._hub is None else f"{self._hub}:{self._hub_id}"

    def tensor(self, name: str) -> NDArray[Any]:
        """Return a tensor's view, fp32, fp16 or bfloat16; see `Checkpoint.tensor`."""
        module = self._modules.get(name)
        if module is not None:
            weights = module.read_floats(self._read, self._owner.__contains__)
        else:
            weights = self._read(name)
        return self._changes[name](weights) if name in self._changes else weights

    def weight_format(self, name: str) -> WeightFormat | None:
        """Tell how a linear's weight is stored; see `Checkpoint.weight_format`."""
        if name in self._changes or name not in self._modules:
            return None
        return self._modules[name].form

    def quantized_weight(self, name: str) -> QuantizedWeight | None:
        """Read a weight as integers; see `Checkpoint.quantized_weight`."""
        return self._modules[name].read(self._read, self._owner.__contains__)

    def close(self) -> None:
        """Release the files; each stays mapped until the last view of it is gone."""
        self._files = {}
        self._owner = {}

    def _read(self, name: str) -> NDArray[Any]:
        if name not in self._owner:
            raise CheckpointError(f"{self._directory} has no tensor {name}, or it was closed")
        return self._owner[name].tensor(self._stored[name])

    def _quantized_modules(self) -> dict[str, QuantizedModule]:
        """Find the linear modules that config.json calls quantized, by the name of their weight."""
        modules: dict[str, QuantizedModule] = {}
        if self._quantization is None:
            return modules
        for layer in linear_layers(self.spec):
            for name, rows in zip(layer.weights, layer.rows, strict=True):
                module = name.removesuffix(".weight")
                form = self._quantization.format_of(module)
                if name != TOKEN_TABLE and form is not None:
                    shape = (rows, layer.shape[0])
                    modules[name] = QuantizedModule(
                        module, form, shape, self._quantization.place, self._directory
                    )
        if not modules:
            raise CheckpointError(
                f"{self._directory}: {self._quantization.place} leaves every linear layer float; "
                "delete it from a local copy"
            )
        return modules

    def _check_tensors(self) -> None:
        entries = {name: file.entries[self._stored[name]] for name, file in self._owner.items()}
        expected = expected_tensors(self.spec)
        if self.vision is not None:
            expected |= self.vision.tensors()
        known: set[str] = set()
        for module in self._modules.values():
            known |= module.check(entries)
        for name, shape in expected.items():
            if name in self._modules:
                continue
            known.add(name)
            if name not in entries:
                says = ""
                if name.endswith(".bias") and self._says_biases:
                    says = " since attention_bias in config.json is true"
                raise CheckpointError(
                    f"{self._directory} has no tensor {name}, expected {list(shape)}{says}; the "
                    "checkpoint is incomplete or config.json is of another model"
                )
            found = entries[name]
            if found.shape != shape:
                raise CheckpointError(
                    f"{self._directory}: tensor {name} has shape {list(found.shape)}, config.json "
                    f"says {list(shape)}"
                )
            if found.dtype not in FLOATS:
                raise CheckpointError(
                    f"{self._directory}: tensor {name} has type {found.dtype}, but config.json "
                    f"leaves it float ({', '.join(FLOATS)}); the config is of another checkpoint"
                )
        for name in sorted(entries.keys() - known):
            if not self._is_ignored(name, entries[name]):
                raise self._stray(name, entries[name])

    def _is_ignored(self, name: str, entry: TensorEntry) -> bool:
        """Return whether a tensor that is no part of the model can be ignored."""
        if name.endswith(".self_attn.rotary_emb.inv_freq"):
            return True  # written by old transformers; the frequencies follow from config.json
        if name == "lm_head.weight" and self.spec.task == "embed":
            return True
        if name == "lm_head.weight" and self.spec.tied_embeddings:
            self._check_tied_head()
            return True
        quantization = self._quantization
        if quantization is not None and quantization.cache_scales and name.endswith(_CACHE_SCALES):
            return True
        shape = expected_tensors(self.spec).get(name.removesuffix("bias") + "weight")
        if shape is None or entry.shape != shape[:1] or entry.dtype not in FLOATS:
            return False
        # Old GPTQ tools give every module a bias, and Qwen2 saved as Llama has one of o.
        return not self._read(name).astype(np.float32).any()

    def _stray(self, name: str, entry: TensorEntry) -> CheckpointError:
        problem = (
            f"{self._owner[name].path}: tensor {name} is not part of {self.spec.architecture} as "
            f"config.json describes it; found {entry.dtype} {list(entry.shape)}, expected no such "
            "tensor"
        )
        module, _, part = name.rpartition(".")
        if part == "bias":
            problem += (
                ": biases are read of q, k and v, of Llama and Qwen3 where attention_bias is true; "
                "elsewhere they must be 0"
            )
        if self._quantization is None:
            return CheckpointError(problem)
        form = self._quantization.format_of(module)
        return CheckpointError(
            f"{problem}: {self._quantization.place} says of {module}: {form or 'not quantized'}"
        )

    def _check_tied_head(self) -> None:
        embeddings = self._read(TOKEN_TABLE)
        head = self._read("lm_head.weight")
        same = embeddings.shape == head.shape and embeddings.dtype == head.dtype
        if not same or not _equal_bytes(embeddings, head):
            raise CheckpointError(
                f"{self._directory}: config.json ties the embeddings (tie_word_embeddings), but "
                f"lm_head.weight differs from {TOKEN_TABLE}; set tie_word_embeddings "
                "to false if the model has a head of its own"
            )


def _equal_bytes(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Compare two matrices of one shape and type chunk by chunk, NaN and all."""
    step = max(1, _COMPARE_BYTES // max(1, a[:1].nbytes))
    return all(
        np.array_equal(a[row : row + step].view(np.uint8), b[row : row + step].view(np.uint8))
        for row in range(0, len(a), step)
    )


def _open_weights(
    directory: Path, *, quantized: bool
) -> tuple[dict[str, SafetensorsFile], dict[str, SafetensorsFile]]:
    """Return the files by name, and the file that holds each tensor."""
    index_path = _weights_or_index(directory)
    if index_path.suffix == ".safetensors":
        file = SafetensorsFile(index_path, quantized=quantized)
        return {index_path.name: file}, dict.fromkeys(file.entries, file)
    shard_of = read_json(index_path).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise CheckpointError(f"{index_path} has no weight_map; download it again")
    for name, shard in shard_of.items():
        # Only a plain file name: an index must not make us read outside the directory.
        if (
            not isinstance(shard, str)
            or not shard.endswith(".safetensors")
            or {"/", "\\", "\0"} & set(shard)
        ):
            raise CheckpointError(
                f"{index_path} maps {name} to {shard!r}; expected the plain name of a "
                ".safetensors file beside it"
            )
    files: dict[str, SafetensorsFile] = {}
    for shard in sorted(set(shard_of.values())):
        if not (directory / shard).exists():
            raise CheckpointError(
                f"{directory} has no {shard}, which {index_path.name} names; download the "
                "checkpoint again"
            )
        files[shard] = SafetensorsFile(directory / shard, quantized=quantized)
    for shard, file in files.items():
        listed = {name for name, owner in shard_of.items() if owner == shard}
        if stray := sorted(listed ^ file.entries.keys()):
            where = "the index only" if stray[0] in listed else "the file only"
            raise CheckpointError(
                f"{file.path}: {index_path.name} and the file disagree: tensor {stray[0]} is in "
                f"{where}"
            )
    return files, {name: files[shard] for name, shard in shard_of.items()}


def _weights_or_index(directory: Path) -> Path:
    """Return the file that holds all weights, or the index that names the files that do."""
    # transformers' order: the single file wins over an index.
    for name in (WEIGHTS_NAME, INDEX_NAME):
        if (directory / name).exists():
            return directory / name
    # AutoGPTQ names them after the recipe: gptq_model-4bit-128g.safetensors.
    for ending in ("*.safetensors.index.json", "*.safetensors"):
        found = sorted(directory.glob(ending))
        if len(found) == 1:
            return found[0]
        if found:
            raise CheckpointError(
                f"{directory} has {len(found)} files {ending}, {found[0].name} first, and none is "
                f"{WEIGHTS_NAME} or {INDEX_NAME}; give the one that is the model's that name"
            )
    raise no_weights(
        f"{directory} has no {WEIGHTS_NAME} and no {INDEX_NAME}",
        directory,
        "with transformers, from_pretrained(...).save_pretrained(..., safe_serialization=True)",
        "download the checkpoint with its weights",
    )
