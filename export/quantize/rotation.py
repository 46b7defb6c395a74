"""Rotates a model so that outliers spread over all channels and the float model stays the same.

The residual stream is written in another orthonormal basis ``R``: rows of the embedding become
``x R``, and so do a picture's. Layers that read the stream absorb ``R`` and the RMSNorm weight
before it, since a norm without weight commutes with rotations. Layers that write to the stream
absorb ``R`` too. So a layer must read the stream by a norm and a linear, and add to it what a
linear computes. Each head's values are rotated in the same way and the linear after attention
rotates them back. Everything is folded into weights: the graph stays as it is.
Sources: QuaRot (arXiv 2404.00456), SpinQuant (arXiv 2405.16406).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge.errors import CheckpointError
from edge.model.names import FINAL_NORM, TOKEN_TABLE, module_name
from edge.model.parts import Add, Attention, Layer, Linear, Norm, only
from export.graph.block_rotation import hadamard, rotate_blocks
from export.sources.checkpoint import Checkpoint, Transformed

from .fed_linears import neighbours, value_name

Array = NDArray[np.float32]
Change = Callable[[NDArray[Any]], NDArray[Any]]
_HEAD = "lm_head.weight"
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
        self.size = size
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

    Raises:
        CheckpointError: a layer's parts do not allow it.
    """

    def __init__(self, checkpoint: Checkpoint, seed: int = 0) -> None:
        super().__init__(checkpoint)
        model = checkpoint.spec
        self.spec = msgspec.structs.replace(model, tied_embeddings=False)
        self._residual = Rotation(model.hidden_size, seed)
        self._heads = cache(lambda size: Rotation(size, seed + 1))
        # What is done to each tensor, in this order.
        self._changes: dict[str, list[Change]] = {
            TOKEN_TABLE: [self._read_stream],
            _HEAD: [partial(self._read_stream, norm=FINAL_NORM)],
            FINAL_NORM: [_ones],
        }
        vision = checkpoint.vision
        if vision is not None:
            for name in vision.tensors():
                if name.rpartition(".")[0] == vision.projector:
                    self._changes[name] = [partial(_rotate_rows, by=self._residual)]
        for number, layer in model.each_layer():
            self._plan(number, layer)

    def _plan(self, number: int, layer: Layer) -> None:
        """Find what is done to the tensors of a layer."""

        def change(
            how: Change, modules: Iterable[str], kinds: tuple[str, ...] = ("weight",)
        ) -> None:
            for name in (f"{module_name(number, module)}.{k}" for module in modules for k in kinds):
                self._changes.setdefault(name, []).append(how)

        normed = {norm.of for norm in only(layer, Norm)}
        for before, part, after in neighbours(layer):
            match before, part, after:
                case None | Add(), Norm(), Linear():
                    norm = f"{module_name(number, part.name)}.weight"
                    change(partial(self._read_stream, norm=norm), dict(after.outputs))
                    change(_ones, [part.name])
                case Linear(), Add(), _:
                    how = partial(_rotate_rows, by=self._residual)
                    change(how, dict(before.outputs), ("weight", "bias"))
                case Attention(dim=dim), Linear(), _ if "v" not in normed:
                    change(partial(_rotate_rows, by=self._heads(dim)), "v", ("weight", "bias"))
                    change(partial(_rotate_columns, by=self._heads(dim)), dict(part.outputs))
                case (None | Add(), _, _) | (_, Add(), _):
                    raise CheckpointError(
                        f"layers.{number}.{value_name(part)}: a model can be rotated only if norms "
                        "before linears read its residual stream and linears write to it; export "
                        "with --no-rotate"
                    )
                case _:
                    pass  # it does not touch the stream; `value_name` refuses an unknown kind

    def tensor(self, name: str) -> NDArray[Any]:
        """Read a rotated tensor; see `Checkpoint.tensor`."""
        is_tied = name == _HEAD and self.original.spec.tied_embeddings
        tensor = self.original.tensor(TOKEN_TABLE if is_tied else name)
        for change in self._changes.get(name, ()):
            tensor = change(tensor)
        return tensor

    def _read_stream(self, weight: NDArray[Any], norm: str | None = None) -> Array:
        """Compute ``W diag(norm) R`` for ``[out, hidden]`` weights."""
        factors = None if norm is None else self.original.tensor(norm).astype(np.float32)
        result = np.empty(weight.shape, dtype=np.float32)
        for start in range(0, len(weight), _TILE_ROWS):
            rows = weight[start : start + _TILE_ROWS].astype(np.float32)
            if factors is not None:
                rows *= factors
            result[start : start + len(rows)] = self._residual(rows)
        return result


def _ones(norm: NDArray[Any]) -> Array:
    return np.ones(norm.shape, dtype=np.float32)


def _rotate_columns(tensor: NDArray[Any], by: Rotation) -> Array:
    """Compute ``W R`` for ``[out, in]`` weights, or for each head of ``in``."""
    values = np.ascontiguousarray(tensor, dtype=np.float32)
    return by(values.reshape(-1, by.size)).reshape(tensor.shape)


def _rotate_rows(tensor: NDArray[Any], by: Rotation) -> Array:
    """Compute ``R^T W`` for ``[out, in]`` weights, or for each head of ``out``.

    A bias is one column.
    """
    columns = tensor.reshape(len(tensor), -1)
    return np.ascontiguousarray(_rotate_columns(columns.T, by).T).reshape(tensor.shape)


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
