"""Finds the few input channels of a W8A8 linear that are too loud for its static INT8 range.

In the down projections of some layers a few channels are 10 to 200 times louder than all others, at
the first token of a text (Sun et al., arXiv 2402.17762). A range that holds them leaves the other
channels a handful of integers, and a range that cuts them off breaks the attention of the whole
text. So their products are computed in float beside the integer product, as in LLM.int8()
(arXiv 2208.07339), but with channels that calibration fixes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
TOLERATED = 0.005
"""Of a linear's squared output, what rounding may take without more channels in float."""
MOST_CHANNELS = 64
_COUNTS = (0, 4, 16, MOST_CHANNELS)
_LEAST_SHARE = 16  # of the channels at most one of so many


def loud_channels(peaks: Array) -> Iterator[NDArray[np.int64]]:
    """Yield the channels to compute in float, ascending: none, the loudest few, then more.

    Args:
        peaks: largest ``|x|`` of each channel, float32 ``[in]``.
    """
    order = np.argsort(-peaks, kind="stable")
    for count in _COUNTS:
        if count * _LEAST_SHARE <= len(order):
            yield np.sort(order[:count]).astype(np.int64)
