"""Plans the memory of a process that computes on the CPU, by part, and the peak of loading it.

Measured with Python 3.11, numpy, click, tokenizers and ONNX Runtime 1.30 on x86-64.
"""

from __future__ import annotations

from typing import NamedTuple

from edge.bundle import io_spec
from edge.bundle.manifest import Dialect
from edge.bundle.memory_facts import MemoryFacts
from edge.bundle.sizes import INDEX_BYTES
from edge.model.parts import widest
from edge.model.spec import ModelSpec

LEAST_CAPACITY = 1024
"""Least capacity in tokens; a machine without room for it is left to fail by itself."""
PYTHON_BYTES = 58_000_000
SESSION_BYTES = 4_000_000
"""Memory of ONNX Runtime's session besides weights and steps."""
_TOKENIZER_BYTES, _TOKENIZER_BYTES_PER_TOKEN = 20_000_000, 360
_FP32_BYTES = 4


class HostMemory(NamedTuple):
    """Bytes by part.

    Attributes:
        weights: the weights in ONNX Runtime's form.
        loading: extra bytes that ONNX Runtime takes while it loads them.
        cache: keys and values of all slots, full.
        activations: scratch memory of the largest step.
        io: inputs and outputs of the session besides the cache.
        embeddings: rows of the token table held in memory; the table itself stays in its file.
        tokenizer: vocabulary and merges.
    """

    weights: int
    loading: int
    cache: int
    activations: int
    io: int
    embeddings: int
    tokenizer: int

    @property
    def model_bytes(self) -> int:
        """Return the bytes that one more model adds to a running process."""
        return self.weights + self.cache + self.activations + self.io + self.embeddings

    @property
    def process_bytes(self) -> int:
        """Return the bytes of the whole process with a full cache."""
        return self.model_bytes + SESSION_BYTES + PYTHON_BYTES + self.tokenizer

    @property
    def load_peak(self) -> int:
        """Return the peak bytes of the process: while it loads, or with a full cache."""
        return self.process_bytes + max(self.loading - self.cache - self.activations, 0)


def plan_host_memory(
    model: ModelSpec,
    facts: MemoryFacts,
    dialect: Dialect,
    token_bytes: int,
    *,
    num_slots: int,
    kv_capacity: int,
    max_step_tokens: int,
) -> HostMemory:
    """Plan the memory of one model on the CPU.

    Args:
        model: dimensions.
        facts: bytes of its weights.
        dialect: dialect of its graph.
        token_bytes: bytes of cache that a token takes over all layers.
        num_slots: sequences that the cache holds.
        kv_capacity: rows of each.
        max_step_tokens: the most tokens per sequence and step.
    """
    step = min(max_step_tokens, kv_capacity)
    # ONNX Runtime frees between operators and prefills one sequence at a time. So at most the
    # scores of attention, or a linear's outputs, first fused and then separate, are alive at once.
    linears = max(widest(run.parts) for run in model.layers)
    attentions = (
        part.heads * kv_capacity + 2 * (part.heads + 2 * part.kv_heads) * part.dim
        for part in model.attentions()
    )
    activations = step * (max([2 * linears, *attentions]) + 2 * model.hidden_size)
    tokens = max(step, num_slots)
    values = tokens * model.hidden_size + num_slots * io_spec.output_width(model)
    io = _FP32_BYTES * values + INDEX_BYTES * (tokens + kv_capacity)
    if not io_spec.DIALECTS[dialect].in_place:
        io += tokens * token_bytes
    return HostMemory(
        weights=sum(facts.host.values()),
        loading=facts.host_loading_bytes,
        cache=num_slots * kv_capacity * token_bytes,
        activations=_FP32_BYTES * activations,
        io=io,
        embeddings=embedding_bytes(model, max_step_tokens),
        tokenizer=tokenizer_bytes(model),
    )


def embedding_bytes(model: ModelSpec, max_step_tokens: int) -> int:
    """Return the bytes of the token table's rows that a step reads."""
    return 2 * max_step_tokens * model.hidden_size


def tokenizer_bytes(model: ModelSpec) -> int:
    """Return the bytes of vocabulary and merges."""
    return _TOKENIZER_BYTES + _TOKENIZER_BYTES_PER_TOKEN * model.vocab_size
