"""Refuses numbers that are not finite or that FP16 cannot hold, wherever floats are stored."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge.errors import CheckpointError

FP16_MAX = 65504.0


def check_range(
    values: NDArray[np.float32],
    name: str,
    float_type: np.dtype[np.generic],
    advice: str = "export with --dtype bf16",
) -> None:
    """Refuse values that are not finite, or too large for the type that is to hold them.

    Args:
        values: values of any shape.
        name: name of the tensor, for the error.
        float_type: float16, bfloat16 or float32; the latter two hold every finite number.
        advice: advice for a value that FP16 cannot hold.

    Raises:
        CheckpointError: there is such a value.
    """
    largest = float(np.abs(values).max(initial=0.0))
    if not np.isfinite(largest):
        raise CheckpointError(
            f"{name} holds NaN or infinite values; the checkpoint is damaged: download it again"
        )
    if float_type == np.float16 and largest > FP16_MAX:
        raise CheckpointError(
            f"{name} holds a value of magnitude {largest:.4g}, FP16 ends at {FP16_MAX:.0f}; "
            f"{advice}"
        )
