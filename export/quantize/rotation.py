"""Rotates a model so that outliers spread over all channels and the float model stays the same.

The residual stream is written in another orthonormal basis ``R``: rows of the embedding become
``x R``, and so do a picture's. Layers that read the stream absorb ``R`` and the RMSNorm weight
before it, since a norm without weight commutes with rotations. Layers that write to the stream
absorb ``R`` too. Each head's values are rotated in the same way and the output projection rotates
them back. Sources: QuaRot (arXiv 2404.00456), SpinQuant (arXiv 2405.16406). Everything is folded
into weights: the graph stays as it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge.model.names import TOKEN_TABLE
from export.graph.block_rotation import hadamard, rotate_blocks
from export.sources.checkpoint import Checkpoint, Transformed

Array = NDArray[np.float32]
_HEAD = "lm_head.weight"
_FINAL_NORM = "model.norm.weight"
_LAYER_NORM = re.compile(r"(?:model\.layers\.\d+\.(?:input|post_attention)_layer)?norm\.weight")
_TILE_ROWS = 1024  # so few that temporaries stay near the CPU's cache


class Rotation:
    """A random orthogonal ``[size, size]`` matrix without large entries, as factors.

    The largest power of two in ``size`` takes a Hadamard matrix, the odd rest a cosine transform
    (DCT-II), so every entry is at most ``sqrt(2 / size)``; random signs of the input channels make
    the matrix independent of the model. It is the Kronecker product of an outer and an inner
    matrix of about ``sqrt(size)``, times the signs: products with these take a thirtieth of the
    arithmetic at 1,536 channels.
    """

    def __init__(self, size: int, seed: int) -> None:
        odd = size
        while odd % 2 == 0:
            odd //= 2
        outer = 1
        while size % (2 * outer) == 0 and (2 * outer) ** 2 <= size:
            outer *= 2
        rows, columns = np.arange(odd)[:, None], np.arange(odd)[None]
        cosine = np.cos(math.pi * rows * (2 * columns + 1) / (2 * odd)) * math.sqrt(2 / odd)
        cosine[0] /= math.sqrt(2)
        self._signs = np.random.RandomState(seed).randint(0, 2, size).astype(np.float32) * 2 - 1
        self._outer = hadamard(outer)
        self._inner = np.kron(hadamard(size // odd // outer), cosine).astype(np.float32)

    def __call__(self, values: Array) -> Array:
        """Compute ``values R`` for float32 ``[n, size]``."""
        inner = (values * self._signs).reshape(-1, len(self._inner)) @ self._inner
        blocks = inner.reshape(len(values), len(self._outer), -1)
        rotated: Array = np.matmul(self._outer, blocks)  # a Hadamard matrix is symmetric
        return rotated.reshape(values.shape)


class RotatedCheckpoint(Transformed):
    """A model that computes the same logits from rotated weights.

    The embedding and the lm_head become different tables, so a tied head is untied; all norm
    weights except those of single heads become ones. Tensors are computed on each read, as fp32, in
    tiles of rows: a table of 151,936 x 1,536 takes 0.93 GB.

    Args:
        checkpoint: the float model; see `Transformed`.
        seed: seed of the two rotations.
    """

    def __init__(self, checkpoint: Checkpoint, seed: int = 0) -> None:
        super().__init__(checkpoint)
        model = checkpoint.spec
        self.spec = msgspec.structs.replace(model, tied_embeddings=False)
        self._residual = Rotation(model.hidden_size, seed)
        self._head = Rotation(model.head_dim, seed + 1)
        vision = checkpoint.vision
        self._encoder = {} if vision is None else vision.tensors()
        self._projector = "" if vision is None else vision.projector

    def tensor(self, name: str) -> NDArray[Any]:
        """Read a rotated tensor; see `Checkpoint.tensor`."""
        if name in self._encoder:
            tensor = self.original.tensor(name)
            if name.rpartition(".")[0] != self._projector:
                return tensor
            columns = tensor.astype(np.float32).reshape(len(tensor), -1)  # a bias is one
            return self._write_stream(columns).reshape(tensor.shape)
        if name == TOKEN_TABLE:
            return self._read_stream(self.original.tensor(name), None)
        if name == _HEAD:
            tied = self.original.spec.tied_embeddings
            head = self.original.tensor(TOKEN_TABLE if tied else _HEAD)
            return self._read_stream(head, _FINAL_NORM)
        tensor = self.original.tensor(name)
        if name == _FINAL_NORM or _LAYER_NORM.fullmatch(name):
            return np.ones(tensor.shape, dtype=np.float32)
        block, _, part = name.rpartition(".self_attn.")
        if part.startswith(("q_proj.weight", "k_proj.weight")):
            return self._read_stream(tensor, f"{block}.input_layernorm.weight")
        if part == "v_proj.weight":
            rows = self._read_stream(tensor, f"{block}.input_layernorm.weight")
            return np.ascontiguousarray(self._rotate_heads(rows.T).T)
        if part == "v_proj.bias":
            return self._rotate_heads(tensor[None].astype(np.float32)).reshape(-1)
        if part == "o_proj.weight":
            return self._write_stream(self._rotate_heads(tensor.astype(np.float32)))
        block, _, part = name.rpartition(".mlp.")
        if part in ("gate_proj.weight", "up_proj.weight"):
            return self._read_stream(tensor, f"{block}.post_attention_layernorm.weight")
        if part == "down_proj.weight":
            return self._write_stream(tensor.astype(np.float32))
        return tensor  # biases of q and k, norms of single heads

    def _read_stream(self, weight: NDArray[Any], norm: str | None) -> Array:
        """Compute ``W diag(norm) R`` for ``[out, hidden]`` weights."""
        factors = None if norm is None else self.original.tensor(norm).astype(np.float32)
        result = np.empty(weight.shape, dtype=np.float32)
        for start in range(0, len(weight), _TILE_ROWS):
            rows = weight[start : start + _TILE_ROWS].astype(np.float32)
            if factors is not None:
                rows *= factors
            result[start : start + len(rows)] = self._residual(rows)
        return result

    def _write_stream(self, weight: Array) -> Array:
        """Compute ``R^T W`` for ``[hidden, in]`` weights."""
        return np.ascontiguousarray(self._residual(np.ascontiguousarray(weight.T)).T)

    def _rotate_heads(self, values: Array) -> Array:
        """Rotate ``[n, heads * head_dim]`` head by head."""
        width = self.spec.head_dim
        return self._head(np.ascontiguousarray(values).reshape(-1, width)).reshape(values.shape)


class BlockRotatedCheckpoint(Transformed):
    """A model some of whose weights take inputs that the graph rotates.

    Args:
        checkpoint: the float model; see `Transformed`.
        names: the weights, ``[out, in]``.
        size: size of a rotated block, as for `rotate_blocks`.
    """

    def __init__(self, checkpoint: Checkpoint, names: Iterable[str], size: int) -> None:
        super().__init__(checkpoint)
        self._names = frozenset(names)
        self._size = size

    def tensor(self, name: str) -> NDArray[Any]:
        """Read a tensor, as fp32 where it is rotated; see `Checkpoint.tensor`."""
        tensor = super().tensor(name)
        return rotate_blocks(tensor, self._size) if name in self._names else tensor
