"""Bytes that a TensorRT engine takes besides its weights, and the peak of building it."""

from __future__ import annotations

from dataclasses import dataclass

from .io_spec import DIALECTS
from .manifest import Dialect, ModelSpec

INDEX_BYTES = 8
"""Of a position, a cursor or an index: int64."""
ENGINE_FLOAT_BYTES = 2
"""Of an activation, a cached value or a logit in an engine: FP16 or BF16."""
DEFAULT_MAX_LOGITS = 64
"""Rows of logits that one run of an engine returns at most; scoring a prompt asks for many."""
DEFAULT_WORKSPACE_BYTES = 1 << 30
"""Scratch memory of a kernel. TensorRT's own default is all of the device's memory, which on a
Jetson is also the host's."""

# Peak resident memory of compiling with TensorRT for RTX 1.7 on a CPU, measured: SmolLM2 INT4
# (87 MB of weights) 0.94 GB, the 1.5B shape INT4 (921 MB) 3.34 GB. That is 0.69 GB and 2.9 times
# the weights; a little is added to both. NVIDIA tells users of its own builder 3 to 4 times.
_BUILD_FIXED_BYTES = 800 << 20
_BUILD_WEIGHT_FACTOR = 3.2


def activation_bytes(
    model: ModelSpec, dialect: Dialect, *, batch: int, max_prefill: int, kv_capacity: int
) -> int:
    """Estimate an engine's scratch memory: two copies of the tensors of its widest layer.

    TensorRT sizes it for the prefill profile's largest batch of its longest chunks. Where attention
    is made of single operators (dialect ``portable``), the scores count too.
    """
    tokens = batch * max_prefill
    qkv = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    widest = max(2 * model.intermediate_size, qkv) + 2 * model.hidden_size
    scores = 0
    if not DIALECTS[dialect].one_attention_operator:
        scores = tokens * model.num_heads * (kv_capacity + max_prefill)
    return 2 * ENGINE_FLOAT_BYTES * (tokens * widest + scores)


@dataclass(frozen=True)
class BuildMemory:
    """The estimated peak of an engine's build by part, in bytes."""

    weights_bytes: int
    builder_bytes: int
    workspace_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Everything at once."""
        return self.weights_bytes + self.builder_bytes + self.workspace_bytes


def plan_build_memory(
    weights_bytes: int, workspace_bytes: int = DEFAULT_WORKSPACE_BYTES
) -> BuildMemory:
    """Estimate a build.

    Args:
        weights_bytes: bytes of the graph's weights as they are stored.
        workspace_bytes: scratch memory of the kernels that are tried; 0 where nothing runs.
    """
    builder = _BUILD_FIXED_BYTES + int((_BUILD_WEIGHT_FACTOR - 1) * weights_bytes)
    return BuildMemory(weights_bytes, builder, workspace_bytes)
