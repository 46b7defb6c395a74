"""Memory of a running engine by part, and the peaks of loading and building."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from edge.bundle import io_spec
from edge.bundle.manifest import Dialect, FloatType, ModelSpec
from edge.bundle.schemes import stored_bytes
from edge.bundle.sizes import (
    ALIGNMENT,
    CAPTURE_BYTES,
    DEFAULT_MAX_LOGITS,
    ENGINE_FLOAT_BYTES,
    INDEX_BYTES,
    activation_bytes,
    cache_slots,
    plan_build_memory,
    profile_limits,
)
from edge.bundle.weights import Linear, Part, weight_parts

BackendKind = Literal["tensorrt", "ort-cpu"]
LEAST_CAPACITY = 1024
"""Tokens; less is no conversation, so a machine with no room for it is left to fail by itself."""

_FP32_BYTES = 4
# Measured with Python 3.11, numpy, click, tokenizers and ONNX Runtime 1.30 on x86-64.
_PYTHON_BYTES = 58_000_000
_TOKENIZER_BYTES, _TOKENIZER_BYTES_PER_TOKEN = 20_000_000, 360
# CUDA's context with cuBLAS, TensorRT's libraries and their scratch. Not measured by us: what is
# left of the memory that NVIDIA published for Edge-LLM on Orin (docs/planner-published.md).
_CUDA_BYTES = 600_000_000
_ORT_SESSION_BYTES = 4_000_000
# ONNX Runtime keeps the fp32 scales, packs them beside the integers, and adds sums of each group.
ORT_SCALE_COPIES = 3
_ORT_INT8_FACTOR = 1.1  # measured: what the 8-bit kernel's layout adds
_ORT_LOAD_FACTOR = 0.45  # measured: a layer's original lives beside its packed copy for a while
_ORT_JOINED_BYTES = 1.0  # per weight in planes: the joined one, until all are packed

# What the kernel, its carve-outs and a system without a desktop take of a Jetson's memory.
_SYSTEM_SHARE, _SYSTEM_BYTES = 0.1, 1_000_000_000


@dataclass(frozen=True)
class Deployment:
    """How a model is run.

    Attributes:
        backend: ``tensorrt`` or ``ort-cpu``.
        batch: slots of the cache, all decoded at once.
        kv_capacity: tokens per slot.
        max_prefill: tokens per prefill step.
        dialect: dialect of the graph, see `edge.bundle.io_spec`.
        int8_layers: layers whose cache is in 8 bits, see `edge.bundle.manifest.KvCache`.
            ``all`` plans without a bundle, whose calibration may keep some in float.
    """

    backend: BackendKind = "tensorrt"
    batch: int = 1
    kv_capacity: int = 4096
    max_prefill: int = 512
    dialect: Dialect = "native"
    int8_layers: tuple[int, ...] | Literal["all"] = ()

    def cache_row_bytes(self, model: ModelSpec) -> list[int]:
        """Bytes of a head's row in each cache tensor."""
        layers = range(model.num_layers) if self.int8_layers == "all" else self.int8_layers
        types = io_spec.cache_types(model, self.float_type, layers)
        return [model.head_dim * io_spec.ELEMENT_BYTES[each] for each in types]

    def cache_token_bytes(self, model: ModelSpec) -> int:
        """Bytes of cache that a token takes over all layers."""
        return model.num_kv_heads * sum(self.cache_row_bytes(model))

    @property
    def float_type(self) -> FloatType:
        """Type of activations and cache."""
        return "fp16" if self.backend == "tensorrt" else "fp32"


@dataclass(frozen=True)
class ProcessMemory:
    """Bytes by part. The first six are the engine's, the others those of the process around it.

    Attributes:
        weights: bytes of the weights by part (`weights.PARTS`).
        cache: keys and values of all slots, full.
        activations: scratch of the largest step.
        io: the engine's inputs and outputs besides the cache that the host does not see.
        pinned: bytes in host memory that the GPU reads and writes in place.
        graphs: the most that captured CUDA graphs take; how much they do take is not predicted.
        embeddings: rows of the token table held in memory; the table itself stays in its file.
        runtime: CUDA and TensorRT, or ONNX Runtime's session.
        python: the interpreter and its libraries.
        tokenizer: vocabulary and merges.
        load_peak: the process while it loads.
        build_peak: ``edge-llm build``; 0 where nothing is built.
        plan_extra: what the plan of a built engine takes besides the weights as stored: kernels,
            and weights in another layout for another profile; 0 where the engine is not built.
    """

    weights: Mapping[Part, int]
    cache: int
    activations: int
    io: int
    pinned: int
    graphs: int
    embeddings: int
    runtime: int
    python: int
    tokenizer: int
    load_peak: int
    build_peak: int
    plan_extra: int = 0

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(self.weights.values())

    @property
    def device_bytes(self) -> int:
        """Bytes that the engine allocates, at most."""
        steps = self.activations + self.io + self.pinned + self.graphs
        return self.weights_bytes + self.plan_extra + self.cache + steps

    @property
    def process_bytes(self) -> int:
        """Bytes of the whole process with a full cache."""
        around = self.embeddings + self.runtime + self.python + self.tokenizer
        return self.device_bytes + around

    def as_dict(self) -> dict[str, int | dict[str, int]]:
        """Plain numbers for JSON."""
        return {
            "weights": {str(part): size for part, size in self.weights.items()},
            "weights_bytes": self.weights_bytes,
            "plan_extra_bytes": self.plan_extra,
            "cache_bytes": self.cache,
            "activations_bytes": self.activations,
            "io_bytes": self.io,
            "pinned_bytes": self.pinned,
            "graphs_max_bytes": self.graphs,
            "embeddings_bytes": self.embeddings,
            "runtime_bytes": self.runtime,
            "python_bytes": self.python,
            "tokenizer_bytes": self.tokenizer,
            "device_bytes": self.device_bytes,
            "process_bytes": self.process_bytes,
            "load_peak_bytes": self.load_peak,
            "build_peak_bytes": self.build_peak,
        }


def plan_process_memory(
    model: ModelSpec, linears: Sequence[Linear], positions: int, deployment: Deployment
) -> ProcessMemory:
    """Plan the memory of one model in one quantization.

    Args:
        model: dimensions.
        linears: its linear layers (`weights.manifest_linears`, or of a recipe).
        positions: rows of the RoPE table.
        deployment: how it is run.
    """
    on_cpu = deployment.backend == "ort-cpu"
    parts = weight_parts(model, linears, positions)
    stored = sum(parts.values())
    cache = cache_bytes(model, deployment)
    activations = step_bytes(model, deployment)
    io, pinned = io_bytes(model, deployment)
    release = io_spec.DIALECTS[deployment.dialect].min_tensorrt
    plan = ProcessMemory(
        weights=cpu_parts(parts, linears) if on_cpu else parts,
        cache=cache,
        activations=activations,
        io=io,
        pinned=pinned,
        graphs=0 if on_cpu else CAPTURE_BYTES,
        embeddings=2 * deployment.max_prefill * model.hidden_size,
        runtime=_ORT_SESSION_BYTES if on_cpu else _CUDA_BYTES,
        python=_PYTHON_BYTES,
        tokenizer=_TOKENIZER_BYTES + _TOKENIZER_BYTES_PER_TOKEN * model.vocab_size,
        load_peak=0,
        build_peak=0 if on_cpu else plan_build_memory(stored, release=release).peak_bytes,
    )
    # TensorRT reads the plan from a mapped file into the device's memory: nothing is held twice.
    idle = plan.process_bytes - cache - activations
    joined = sum(math.prod(linear.shape) for linear in linears if linear.scheme.planes)
    loading = int(_ORT_LOAD_FACTOR * stored + _ORT_JOINED_BYTES * joined)
    load_peak = idle + loading if on_cpu else plan.process_bytes
    return dataclasses.replace(plan, load_peak=max(load_peak, plan.process_bytes))


def memory_of_plan(memory: ProcessMemory, plan_bytes: int) -> ProcessMemory:
    """Count the plan of a built engine in place of its weights, as the runtime does."""
    extra = plan_bytes - memory.weights_bytes
    return dataclasses.replace(memory, plan_extra=extra, load_peak=memory.load_peak + extra)


def plan_process_pair(target: ProcessMemory, draft: ProcessMemory | None) -> ProcessMemory:
    """Add a second model in the same process: its engine, but no second Python or tokenizer.

    Args:
        target: the model that answers.
        draft: the one that drafts; None leaves the plan as it is. It is loaded after the target.

    Returns:
        The sum by part. A build is that of one engine after the other.
    """
    if draft is None:
        return target
    weights = {part: size + draft.weights.get(part, 0) for part, size in target.weights.items()}
    own = draft.device_bytes + draft.embeddings
    loading = max(draft.load_peak - draft.process_bytes, 0)
    both = dataclasses.replace(
        target,
        weights=weights,
        cache=target.cache + draft.cache,
        activations=target.activations + draft.activations,
        io=target.io + draft.io,
        pinned=target.pinned + draft.pinned,
        graphs=target.graphs + draft.graphs,
        embeddings=target.embeddings + draft.embeddings,
        build_peak=max(target.build_peak, draft.build_peak),
    )
    # Plans of one process count the cache at its peak only once it is full, as this does.
    peak = max(target.load_peak, both.process_bytes, target.process_bytes + own + loading)
    return dataclasses.replace(both, load_peak=peak)


def cache_bytes(model: ModelSpec, deployment: Deployment) -> int:
    """Keys and values of every slot at full capacity."""
    slots = deployment.batch
    if deployment.backend == "tensorrt":
        slots = cache_slots(slots)
    return slots * deployment.kv_capacity * deployment.cache_token_bytes(model)


def step_bytes(model: ModelSpec, deployment: Deployment) -> int:
    """Estimate the scratch of the largest prefill step, as far as it can be said without an engine.

    ONNX Runtime frees between operators and prefills one sequence at a time: the scores of its
    attention or the MLP are the most that lives at once.
    """
    step = min(deployment.max_prefill, deployment.kv_capacity)
    if deployment.backend == "tensorrt":
        limits = profile_limits(deployment.batch, step)
        return activation_bytes(model, deployment.dialect, limits, deployment.kv_capacity)
    qkv = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    scores = model.num_heads * step * deployment.kv_capacity
    mlp = step * 4 * model.intermediate_size  # gate and up, fused and then apart
    return _FP32_BYTES * (max(scores + 2 * step * qkv, mlp) + 2 * step * model.hidden_size)


def io_bytes(model: ModelSpec, deployment: Deployment) -> tuple[int, int]:
    """Inputs and outputs besides the cache, and the part of them that the host shares.

    On Orin the GPU reads and writes pinned host memory in place. Its own are the numbers of the
    cache's rows and, in dialect ``portable``, the step's keys and values, at strides that take a
    head more per layer, or several of small ones.
    """
    tokens = max(min(deployment.max_prefill, deployment.kv_capacity), deployment.batch)
    positions = INDEX_BYTES * deployment.kv_capacity
    if deployment.backend == "ort-cpu":
        values = tokens * model.hidden_size + deployment.batch * io_spec.output_width(model)
        io = _FP32_BYTES * values + INDEX_BYTES * tokens + positions
        if not io_spec.DIALECTS[deployment.dialect].in_place:
            io += tokens * deployment.cache_token_bytes(model)
        return io, 0
    # Of prefill and of decode.
    logits = max(DEFAULT_MAX_LOGITS, deployment.batch) + deployment.batch
    inputs = tokens + deployment.batch
    values = inputs * model.hidden_size + logits * io_spec.output_width(model)
    io = positions
    if not io_spec.DIALECTS[deployment.dialect].in_place:
        io += sum(
            tokens * (model.num_kv_heads + _padding_heads(row)) * row
            for row in deployment.cache_row_bytes(model)
        )
    return io, ENGINE_FLOAT_BYTES * values + INDEX_BYTES * (inputs + logits)


def _padding_heads(row_bytes: int) -> int:
    """Heads by which a stride grows until it is aligned."""
    return ALIGNMENT // math.gcd(ALIGNMENT, row_bytes)


def cpu_parts(parts: Mapping[Part, int], linears: Iterable[Linear]) -> dict[Part, int]:
    """Count the bytes of weights in ONNX Runtime on the CPU: floats in fp32, integers packed."""
    result = dict(parts)
    wide: tuple[Part, ...] = ("scales", "norms", "rope")
    for part in wide:
        result[part] = 2 * parts[part]
    result["scales"] *= ORT_SCALE_COPIES
    for linear in linears:
        weight, scales = stored_bytes(linear.shape, linear.scheme)
        if linear.scheme.planes:  # joined at load, which leaves the low plane's scales
            result["scales"] -= ORT_SCALE_COPIES * scales
        grown = {"float": 2.0, "int8": _ORT_INT8_FACTOR}.get(linear.scheme.kind, 1.0)
        result[linear.part] += round((grown - 1) * weight)
    return result


def usable_bytes(module_bytes: int) -> int:
    """Count the bytes of a module's memory that programs can have."""
    return int(module_bytes * (1 - _SYSTEM_SHARE)) - _SYSTEM_BYTES
