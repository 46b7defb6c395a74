"""Counts bytes that a TensorRT engine takes besides its weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

from edge.errors import ConfigError
from edge.model.parts import Attention, only, widest
from edge.model.spec import ModelSpec

from .io_spec import DIALECTS, ELEMENT_BYTES
from .manifest import Dialect, Manifest

ProfileName = Literal[
    "prefill", "decode", "batch", "prefill-adapters", "decode-adapters", "batch-adapters"
]
"""Names the profiles; a bundle with adapters has each twice: at rank 0, and at its rank."""

INDEX_BYTES = 8
"""Bytes of a position, a cursor or an index: int64."""
ENGINE_FLOAT_BYTES = 2
"""Bytes of an activation, a cached value or a logit in an engine: FP16 or BF16."""
ALIGNMENT = 256
"""Alignment of every tensor's address in TensorRT (NvInferRuntime.h, setTensorAddress)."""
DEFAULT_MAX_LOGITS = 64
"""Most rows of logits that one run of an engine returns. Scoring a prompt needs more, and gets them
from several runs. 512 rows of the 1.5B's vocabulary are 156 MB, several times over."""
CAPTURE_BYTES = 256 * 10**6
"""Most GPU memory of an engine's CUDA graphs; beyond it no more are captured."""
DEFAULT_WORKSPACE_BYTES = 1 << 30
"""Scratch memory of a kernel. TensorRT's own default is all of the device's memory, which on a
Jetson is also the host's."""


class StepLimits(NamedTuple):
    """The most that one run of an optimization profile takes.

    Attributes:
        profile: its name.
        batch: sequences.
        seq: tokens of each.
        num_logits: logits of each.
    """

    profile: ProfileName
    batch: int
    seq: int
    num_logits: int

    def covers(self, batch: int, seq: int, num_logits: int) -> bool:
        """Whether a run of this size fits."""
        return batch <= self.batch and seq <= self.seq and num_logits <= self.num_logits


def cache_slots(num_slots: int) -> int:
    """Return the slots of an engine's cache: several share one more, in which prompts are read."""
    return num_slots + (num_slots > 1)


def cache_element_bytes(manifest: Manifest) -> int:
    """Return the bytes of the smallest element of an engine's cache."""
    return ELEMENT_BYTES["int8" if manifest.int8_layers else manifest.dtype]


def check_slots(model: ModelSpec, capacity: int, element_bytes: int = ENGINE_FLOAT_BYTES) -> None:
    """Refuse a KV capacity at which the slots of an engine would not be aligned.

    Args:
        model: dimensions.
        capacity: rows of a slot.
        element_bytes: bytes of the smallest element of the cache.

    Raises:
        ConfigError: the keys or values of a slot do not end at a multiple of `ALIGNMENT` bytes.
    """
    rows = {part.kv_heads * part.dim * element_bytes for part in model.attentions()}
    step = max((ALIGNMENT // math.gcd(ALIGNMENT, row) for row in rows), default=1)
    if capacity % step:
        raise ConfigError(
            f"a KV capacity of {capacity} tokens puts slots at addresses that TensorRT refuses; "
            f"build the engine with a --kv-capacity that is a multiple of {step}"
        )


def activation_bytes(
    model: ModelSpec,
    dialect: Dialect,
    limits: Iterable[StepLimits],
    kv_capacity: int,
    *,
    rows_in_fp32: bool = False,
) -> int:
    """Estimate an engine's scratch memory: two copies of the tensors of its widest layer.

    With ``rows_in_fp32`` its last layer makes FP32 rows of the logits, to find the best of them.

    TensorRT sizes it for the largest run of any profile. If attention is made of single operators
    (dialect ``portable``), the scores count too.
    """
    separate = not DIALECTS[dialect].one_attention_operator

    def values(step: StepLimits) -> int:
        rows = kv_capacity + step.seq if separate else 0
        layer = max(
            widest(run.parts) + rows * sum(part.heads for part in only(run.parts, Attention))
            for run in model.layers
        )
        logits = step.num_logits * model.vocab_size * 2 if rows_in_fp32 else 0
        return step.batch * max(step.seq * (layer + 2 * model.hidden_size), logits)

    return 2 * ENGINE_FLOAT_BYTES * max(map(values, limits))
