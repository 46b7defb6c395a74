"""A checkpoint directory in Hugging Face's layout; weights stay mapped, nothing is loaded."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.bundle.linears import expected_tensors
from edge.bundle.manifest import Source, sha256_file
from edge.bundle.model_config import parse_config
from edge.errors import CheckpointError

from .checkpoint import Checkpoint
from .checkpoint_text import read_json, read_licence, read_text
from .safetensors_file import SafetensorsFile

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_COMPARE_BYTES = 1 << 24


class HfDirectory(Checkpoint):
    """A directory's weights; tensors are read-only views of the mapped files."""

    def __init__(
        self,
        directory: Path,
        *,
        hub_id: str | None = None,
        revision: str | None = None,
    ) -> None:
        """Open a directory and check that exactly the model's tensors are there.

        Args:
            directory: holds ``config.json``, ``tokenizer.json`` and safetensors.
            hub_id: where the directory was downloaded from, or None.
            revision: commit of the hub repository.

        Raises:
            CheckpointError: something is missing, damaged or not supported.
        """
        self._directory = directory
        self._hub_id = hub_id
        self._revision = revision
        config_path = directory / "config.json"
        config = read_json(config_path)
        self.spec = parse_config(config, str(config_path))
        self.text = read_text(directory, config, self.spec.vocab_size, hub_id)
        self.name = (hub_id or directory.resolve().name).rpartition("/")[2]
        self._files, self._owner = _open_weights(directory)
        self._check_tensors()

    @cached_property
    def source(self) -> Source:
        """Where the weights came from; hashes every weight file on first use (seconds per GB)."""
        # As of `sha256sum *.safetensors | sha256sum`, so that anyone can check it.
        lines = "".join(
            f"{sha256_file(file.path).sha256}  {name}\n"
            for name, file in sorted(self._files.items())
        )
        return Source(
            kind="hub" if self._hub_id else "directory",
            location=self._hub_id or self._directory.resolve().name,
            revision=self._revision,
            sha256=hashlib.sha256(lines.encode()).hexdigest(),
            licence=read_licence(self._directory),
        )

    def tensor(self, name: str) -> NDArray[Any]:
        """Return the tensor's view, fp32, fp16 or bfloat16; see `Checkpoint.tensor`."""
        if name not in self._owner:
            raise CheckpointError(f"{self._directory} has no tensor {name}, or it was closed")
        return self._owner[name].tensor(name)

    def close(self) -> None:
        """Let go of the files; each stays mapped until the last view of it is gone."""
        self._files = {}
        self._owner = {}

    def _check_tensors(self) -> None:
        expected = expected_tensors(self.spec)
        for name, shape in expected.items():
            if name not in self._owner:
                raise CheckpointError(
                    f"{self._directory} has no tensor {name}, expected {list(shape)}; the "
                    "checkpoint is incomplete or config.json is of another model"
                )
            found = self._owner[name].entries[name].shape
            if found != shape:
                raise CheckpointError(
                    f"{self._directory}: tensor {name} has shape {list(found)}, config.json says "
                    f"{list(shape)}"
                )
        for name in sorted(self._owner.keys() - expected.keys()):
            if name.endswith(".self_attn.rotary_emb.inv_freq"):
                continue  # written by old transformers; the frequencies follow from config.json
            if name == "lm_head.weight" and self.spec.tied_embeddings:
                self._check_tied_head()
                continue
            raise CheckpointError(
                f"{self._owner[name].path}: tensor {name} is not part of "
                f"{self.spec.architecture} as config.json describes it; found "
                f"{list(self._owner[name].entries[name].shape)}, expected no such tensor"
            )

    def _check_tied_head(self) -> None:
        embeddings = self.tensor("model.embed_tokens.weight")
        head = self.tensor("lm_head.weight")
        same = embeddings.shape == head.shape and embeddings.dtype == head.dtype
        if not same or not _equal_bytes(embeddings, head):
            raise CheckpointError(
                f"{self._directory}: config.json ties the embeddings (tie_word_embeddings), but "
                "lm_head.weight differs from model.embed_tokens.weight; set tie_word_embeddings "
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
    directory: Path,
) -> tuple[dict[str, SafetensorsFile], dict[str, SafetensorsFile]]:
    """Files by name, and the file that holds each tensor."""
    # transformers' order: the single file wins over an index.
    if (directory / WEIGHTS_NAME).exists():
        file = SafetensorsFile(directory / WEIGHTS_NAME)
        return {WEIGHTS_NAME: file}, dict.fromkeys(file.entries, file)
    index_path = directory / INDEX_NAME
    if not index_path.exists():
        raise CheckpointError(_no_weights(directory))
    shard_of = read_json(index_path).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise CheckpointError(f"{index_path} has no weight_map; download it again")
    for name, shard in shard_of.items():
        # A plain file name: nothing outside the directory may be read on the index's word.
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
                f"{directory} has no {shard}, which {INDEX_NAME} names; download the checkpoint "
                "again"
            )
        files[shard] = SafetensorsFile(directory / shard)
    for shard, file in files.items():
        listed = {name for name, owner in shard_of.items() if owner == shard}
        if stray := sorted(listed ^ file.entries.keys()):
            where = "the index only" if stray[0] in listed else "the file only"
            raise CheckpointError(
                f"{file.path}: {INDEX_NAME} and the file disagree: tensor {stray[0]} is in {where}"
            )
    return files, {name: files[shard] for name, shard in shard_of.items()}


def _no_weights(directory: Path) -> str:
    problem = f"{directory} has no {WEIGHTS_NAME} and no {INDEX_NAME}"
    pickled = sorted(path.name for pattern in _PICKLED for path in directory.glob(pattern))
    if pickled:
        return (
            f"{problem}, only {pickled[0]}: pickled weights can run code and are never opened; "
            "convert them where you trust them, with transformers: from_pretrained(...)"
            ".save_pretrained(..., safe_serialization=True)"
        )
    return f"{problem}; download the checkpoint with its weights"
