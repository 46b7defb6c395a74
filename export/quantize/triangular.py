"""Factors and solves symmetric matrices in place, by blocks.

Most of the work is matrix products, which NumPy leaves to BLAS. Its own ``linalg`` takes several
times as long for a linear's thousands of channels, and copies the matrix.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
_BLOCK = 128


def damp(matrix: Array, damping: float) -> float:
    """Add a fraction of the diagonal's mean to the diagonal, in place, and return what is added."""
    diagonal = np.diagonal(matrix)
    mean = float(diagonal.mean(dtype=np.float64)) or 1.0
    added = damping * mean
    matrix[np.diag_indices_from(matrix)] += np.float32(added)
    return added


def factor_upper(matrix: Array) -> None:
    """Factor a symmetric positive definite matrix into ``R R^T``, R upper triangular, in place."""
    for start in reversed(range(0, len(matrix), _BLOCK)):
        stop = min(start + _BLOCK, len(matrix))
        matrix[:stop, start:stop] -= matrix[:stop, stop:] @ matrix[start:stop, stop:].T
        # NumPy's factor is lower triangular: factor the reversed block and reverse the result.
        corner = np.linalg.cholesky(matrix[start:stop, start:stop][::-1, ::-1])[::-1, ::-1]
        matrix[start:stop, start:stop] = corner
        matrix[:start, start:stop] = matrix[:start, start:stop] @ np.linalg.inv(corner).T
        matrix[stop:, start:stop] = 0


def solve_factored(upper: Array, values: Array) -> None:
    """Solve ``R R^T x = values`` for ``[width, columns]``, in place; see `factor_upper`."""
    blocks = [slice(at, min(at + _BLOCK, len(upper))) for at in range(0, len(upper), _BLOCK)]
    corners = [np.linalg.inv(upper[block, block]) for block in blocks]
    for block, corner in zip(reversed(blocks), reversed(corners), strict=True):
        values[block] -= upper[block, block.stop :] @ values[block.stop :]
        values[block] = corner @ values[block]
    for block, corner in zip(blocks, corners, strict=True):
        values[block] -= upper[: block.start, block].T @ values[: block.start]
        values[block] = corner.T @ values[block]
