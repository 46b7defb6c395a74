"""Plans the memory of a running engine by part, and the peaks of loading and building."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from edge.backends.host_memory import (
    PYTHON_BYTES,
    SESSION_BYTES,
    HostMemory,
    embedding_bytes,
    plan_host_memory,
    tokenizer_bytes,
)
from edge.bundle import io_spec
from edge.bundle.manifest import Dialect, FloatType, Manifest
from edge.bundle.memory_facts import MemoryFacts, Part, read_memory_facts
from edge.bundle.sizes import (
    ALIGNMENT,
    CAPTURE_BYTES,
    DEFAULT_MAX_LOGITS,
    DEFAULT_WORKSPACE_BYTES,
    ENGINE_FLOAT_BYTES,
    INDEX_BYTES,
    activation_bytes,
    cache_slots,
)
from edge.bundle.weights import Linear, count_facts
from edge.model.cache import ELEMENT_BYTES, Rows, cache_tensors
from edge.model.spec import ModelSpec
from edge_make.engine_profiles import profile_limits

BackendKind = Literal["tensorrt", "ort-cpu"]
# CUDA's context with cuBLAS, TensorRT's libraries and their scratch. Not measured by us: it is the
# rest of the memory that NVIDIA published for Edge-LLM on Orin (docs/measured/planner.json).
_CUDA_BYTES = 600_000_000

# Peak resident memory of compiling with TensorRT for RTX 1.7 on a CPU, measured: SmolLM2 INT4
# (87 MB of weights) 0.94 GB, the 1.5B shape INT4 (921 MB) 3.34 GB. That is 0.69 GB and 2.9 times
# the weights; a little is added to both. NVIDIA tells users of its own builder 3 to 4 times.
_RTX_BUILD = (800 << 20, 3.2)
# A prediction for TensorRT itself on a Jetson: its library of kernels takes 1,227 MiB of the host
# and 1,235 of the GPU before any layer (OE4T/meta-tegra#2120, 10.13), which share one memory there.
# Before 10.13 external weights are copied once more (its CHANGELOG: "Decreased memory usage when
# importing models with external weights").
_BUILD = (2_500_000_000, 3.2)
_BUILD_BEFORE_10_13 = (2_500_000_000, 4.2)

# Share of a Jetson's memory for the kernel, its carve-outs and a system without a desktop.
_SYSTEM_SHARE, _SYSTEM_BYTES = 0.1, 1_000_000_000


@dataclass(frozen=True)
class Deployment:
    """How a model is to run.

    Attributes:
        backend: ``tensorrt`` or ``ort-cpu``.
        batch: slots of the cache, all decoded at once.
        kv_capacity: tokens per slot.
        max_prefill: tokens per prefill step.
        dialect: dialect of the graph, one of `edge.bundle.io_spec`.
        int8_layers: layers with an 8-bit cache, as in `edge.bundle.manifest.KvCache`. ``all`` plans
            without a bundle, whose calibration may keep some layers in float.
    """

    backend: BackendKind = "tensorrt"
    batch: int = 1
    kv_capacity: int = 4096
    max_prefill: int = 512
    dialect: Dialect = "native"
    int8_layers: tuple[int, ...] | Literal["all"] = ()

    def cache_rows(self, model: ModelSpec) -> list[tuple[int, int]]:
        """Return the heads of each cache tensor, and the bytes of a head's row in it."""
        layers = range(model.num_layers) if self.int8_layers == "all" else self.int8_layers
        tensors = cache_tensors(model, self.float_type, layers).values()
        rows = [spec for spec in tensors if isinstance(spec, Rows)]
        return [(spec.kv_heads, spec.dim * ELEMENT_BYTES[spec.type]) for spec in rows]

    def cache_token_bytes(self, model: ModelSpec) -> int:
        """Return the bytes of cache that a token takes over all layers."""
        return sum(heads * row for heads, row in self.cache_rows(model))

    @property
    def float_type(self) -> FloatType:
        """Type of activations and cache."""
        return "fp16" if self.backend == "tensorrt" else "fp32"


@dataclass(frozen=True)
class ProcessMemory:
    """Bytes by part; the first six are the engine's, the others those of the process around it.

    Attributes:
        weights: bytes of the weights by part (`weights.PARTS`).
        cache: keys and values of all slots, full.
        activations: scratch of the largest step.
        io: the engine's inputs and outputs besides the cache that the host does not see, with the
            adapters of all slots.
        pinned: bytes in host memory that the GPU reads and writes in place.
        graphs: the most that captured CUDA graphs take; their real size is not predicted.
        embeddings: rows of the token table held in memory; the table itself stays in its file.
        runtime: CUDA and TensorRT, or ONNX Runtime's session.
        python: the interpreter and its libraries.
        tokenizer: vocabulary and merges.
        load_peak: the process while it loads.
        build_peak: ``edge-llm build``; 0 where nothing is built.
        plan_extra: bytes of a built engine's plan besides the weights as stored: kernels, and
            weights in another layout for another profile; 0 if the engine is not built.
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
        """Return the bytes of all weights."""
        return sum(self.weights.values())

    @property
    def device_bytes(self) -> int:
        """Return the most bytes that the engine allocates."""
        steps = self.activations + self.io + self.pinned + self.graphs
        return self.weights_bytes + self.plan_extra + self.cache + steps

    @property
    def process_bytes(self) -> int:
        """Return the bytes of the whole process with a full cache."""
        around = self.embeddings + self.runtime + self.python + self.tokenizer
        return self.device_bytes + around

    def as_dict(self) -> dict[str, int | dict[str, int]]:
        """Return plain numbers for JSON."""
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
    """Plan the memory of one model in one quantization; no bundle is needed.

    Args:
        model: dimensions.
        linears: its linear layers (`weights.manifest_linears`, or those of a recipe).
        positions: rows of the RoPE table.
        deployment: how it is run.
    """
    return _plan(model, count_facts(model, linears, positions), deployment)


def plan_bundle_memory(
    manifest: Manifest, deployment: Deployment, beside: Manifest | None = None
) -> ProcessMemory:
    """Plan the memory of a bundle, by the numbers of its manifest.

    Args:
        manifest: manifest of the bundle, or of its head.
        deployment: how it is to run.
        beside: manifest of the bundle or head that drafts for it.

    Raises:
        BundleError: the manifest's numbers do not fit this edge-llm.
    """
    plan = _plan(manifest.model, read_memory_facts(manifest, beside), deployment)
    if not (adapters := adapter_bytes(manifest, deployment.backend)):
        return plan
    slots = deployment.batch if deployment.backend == "ort-cpu" else cache_slots(deployment.batch)
    more = {name: getattr(plan, name) + slots * adapters for name in ("io", "load_peak")}
    return dataclasses.replace(plan, **more)


def adapter_bytes(manifest: Manifest, backend: BackendKind) -> int:
    """Return the bytes of one slot's adapter, the same for every adapter; 0 without adapters."""
    if "adapters" not in manifest.extras:
        return 0
    from edge.adapters.graph_inputs import read_section, slot_values

    section = read_section(manifest)
    if section is None:  # the manifest of a head
        return 0
    element_bytes = 4 if backend == "ort-cpu" else ENGINE_FLOAT_BYTES
    return element_bytes * slot_values(manifest.model, section.rank)


def _plan(model: ModelSpec, facts: MemoryFacts, deployment: Deployment) -> ProcessMemory:
    if deployment.backend == "ort-cpu":
        host = _host_memory(model, facts, deployment)
        return ProcessMemory(
            weights=facts.host,
            cache=host.cache,
            activations=host.activations,
            io=host.io,
            pinned=0,
            graphs=0,
            embeddings=host.embeddings,
            runtime=SESSION_BYTES,
            python=PYTHON_BYTES,
            tokenizer=host.tokenizer,
            load_peak=host.load_peak,
            build_peak=0,
        )
    step = min(deployment.max_prefill, deployment.kv_capacity)
    limits = profile_limits(deployment.batch, step)
    io, pinned = io_bytes(model, deployment)
    release = io_spec.DIALECTS[deployment.dialect].min_tensorrt
    stored = sum(facts.weights.values())
    plan = ProcessMemory(
        weights=facts.weights,
        cache=cache_bytes(model, deployment),
        activations=activation_bytes(model, deployment.dialect, limits, deployment.kv_capacity),
        io=io,
        pinned=pinned,
        graphs=CAPTURE_BYTES,
        embeddings=embedding_bytes(model, deployment.max_prefill),
        runtime=_CUDA_BYTES,
        python=PYTHON_BYTES,
        tokenizer=tokenizer_bytes(model),
        load_peak=0,
        build_peak=plan_build_memory(stored, release=release).peak_bytes,
    )
    # TensorRT reads the plan from a mapped file into the device's memory: no copy is held.
    return dataclasses.replace(plan, load_peak=plan.process_bytes)


def _host_memory(model: ModelSpec, facts: MemoryFacts, deployment: Deployment) -> HostMemory:
    return plan_host_memory(
        model,
        facts,
        deployment.dialect,
        deployment.cache_token_bytes(model),
        num_slots=deployment.batch,
        kv_capacity=deployment.kv_capacity,
        max_step_tokens=deployment.max_prefill,
    )


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
        The sum by part. ``build_peak`` is that of one engine after the other.
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
    # A process's peak includes the cache only once it is full, and so does this sum.
    peak = max(target.load_peak, both.process_bytes, target.process_bytes + own + loading)
    return dataclasses.replace(both, load_peak=peak)


def cache_bytes(model: ModelSpec, deployment: Deployment) -> int:
    """Return the bytes of the keys and values of every slot at full capacity."""
    slots = deployment.batch
    if deployment.backend == "tensorrt":
        slots = cache_slots(slots)
    return slots * deployment.kv_capacity * deployment.cache_token_bytes(model)


def io_bytes(model: ModelSpec, deployment: Deployment) -> tuple[int, int]:
    """Count the bytes of an engine's inputs and outputs besides the cache.

    On Orin the GPU reads and writes pinned host memory in place.

    Returns:
        The device's own bytes and those shared with the host. The device's own are the numbers of
        the cache's rows and, in dialect ``portable``, the step's keys and values. Their strides
        take one head more per layer, or several small ones.
    """
    tokens = max(min(deployment.max_prefill, deployment.kv_capacity), deployment.batch)
    # Logits of prefill and of decode.
    logits = max(DEFAULT_MAX_LOGITS, deployment.batch) + deployment.batch
    inputs = tokens + deployment.batch
    values = inputs * model.hidden_size + logits * io_spec.output_width(model)
    io = INDEX_BYTES * deployment.kv_capacity
    if not io_spec.DIALECTS[deployment.dialect].in_place:
        io += sum(
            tokens * (heads + _padding_heads(row)) * row
            for heads, row in deployment.cache_rows(model)
        )
    return io, ENGINE_FLOAT_BYTES * values + INDEX_BYTES * (inputs + logits)


def _padding_heads(row_bytes: int) -> int:
    """Return by how many heads a stride grows until it is aligned."""
    return ALIGNMENT // math.gcd(ALIGNMENT, row_bytes)


def usable_bytes(module_bytes: int) -> int:
    """Count the bytes of a module's memory that programs can have."""
    return int(module_bytes * (1 - _SYSTEM_SHARE)) - _SYSTEM_BYTES


@dataclass(frozen=True)
class BuildMemory:
    """The estimated peak of an engine's build by part, in bytes."""

    weights_bytes: int
    builder_bytes: int
    workspace_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The sum of the parts."""
        return self.weights_bytes + self.builder_bytes + self.workspace_bytes


def plan_build_memory(
    weights_bytes: int,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    release: tuple[int, int] | None = None,
) -> BuildMemory:
    """Estimate a build.

    Args:
        weights_bytes: bytes of the graph's weights as they are stored.
        workspace_bytes: scratch memory of the kernels that are tried; 0 where nothing runs.
        release: TensorRT's release; None is TensorRT for RTX.
    """
    fixed, factor = _RTX_BUILD
    if release is not None:
        fixed, factor = _BUILD if release >= (10, 13) else _BUILD_BEFORE_10_13
    builder = fixed + int((factor - 1) * weights_bytes)
    return BuildMemory(weights_bytes, builder, workspace_bytes)
