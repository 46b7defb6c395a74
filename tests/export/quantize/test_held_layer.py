"""Each tensor of a layer is read once, and no more of them is held than those of one layer."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.model.names import TOKEN_TABLE
from export.quantize.held_layer import HeldLayer
from export.sources.checkpoint import Transformed
from export.sources.opening import open_checkpoint
from tests.conftest import Checkpoints

FIRST, SECOND = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))


class Counted(Transformed):
    """A checkpoint that counts its reads."""

    reads: Counter[str]

    def tensor(self, name: str) -> NDArray[Any]:
        self.reads[name] += 1
        return super().tensor(name)


def test_a_layer_is_read_once_and_dropped_with_the_next(tiny_checkpoints: Checkpoints):
    with open_checkpoint(str(tiny_checkpoints("qwen2"))) as checkpoint:
        counted = Counted(checkpoint)
        counted.reads = Counter()
        held = HeldLayer(counted)
        for name in (FIRST, FIRST, TOKEN_TABLE, FIRST, SECOND, SECOND, FIRST):
            np.testing.assert_array_equal(held.tensor(name), checkpoint.tensor(name))
        assert counted.reads == {FIRST: 2, SECOND: 1, TOKEN_TABLE: 1}
        with pytest.raises(ValueError, match="read-only"):
            held.tensor(FIRST)[0, 0] = 1
