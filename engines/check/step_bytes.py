"""Counts the bytes that a step reads by its graph, and how fast each module can be at best.

The planner computes the same bytes from dimensions and schemes (`edge.bundle.weights`), before
there is a graph; tests compare the two. Operations come from the planner in both cases.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from edge.bundle.engine_file import KvRead
from edge.bundle.io_spec import PAST_PREFIX
from edge.bundle.linears import ROTATION
from edge.bundle.manifest import Manifest
from edge.bundle.memory_facts import PARTS, Part
from edge.bundle.onnx_values import ELEMENT_BITS
from edge.bundle.sizes import ProfileName, StepLimits
from edge.bundle.weights import manifest_linears, part_of
from edge.errors import BundleError
from edge_lab.planner.devices import MODULES
from edge_lab.planner.memory import Deployment
from edge_lab.planner.speed import Ceiling, Work, ceiling, work_of
from edge_make.engine_profiles import profile_limits
from edge_make.unpacked_weights import unpacked_bytes
from engines.config import BuildShapes
from engines.rules.facts import QUANTIZING, FactNode, GraphFacts

_INT8 = ("int8",)
# Operators of which a step reads only some rows, and their inputs that are tables.
_TABLES = {"Gather": (0,), "RotaryEmbedding": (1, 2)}


@dataclass(frozen=True)
class GraphBytes:
    """Bytes that a graph alone determines.

    Attributes:
        parts: bytes of its constants, as they are stored (`edge.bundle.weights.PARTS`).
        unpacked: bytes that TensorRT also writes and reads in every step, because it unpacks
            weights (rules ``int8-weight-only`` and ``block-int8-unpacked``).
        cache_row: bytes of the keys and values of one token, in all layers.
    """

    parts: Mapping[Part, int]
    unpacked: int
    cache_row: int


def read_graph_bytes(facts: GraphFacts) -> GraphBytes:
    """Count the bytes that a decoder holds, and those of them that TensorRT unpacks.

    Raises:
        BundleError: a product reads a constant that belongs to no linear layer.
    """
    roles: dict[str, Part] = {}
    for node in facts.nodes:
        for index, name in enumerate(node.node.inputs):
            role = _role(node, index, name, facts)
            if role is not None:
                roles[name] = role
    parts: dict[Part, int] = dict.fromkeys(PARTS, 0)
    for name, role in roles.items():
        constant = facts.constant(name)
        assert constant is not None
        parts[role] += constant.num_bytes
    return GraphBytes(parts, _unpacked(facts), _cache_row(facts))


def _role(node: FactNode, index: int, name: str, facts: GraphFacts) -> Part | None:
    """Say where a constant counts; None for shapes, axes, zero points and rotations."""
    constant = facts.constant(name)
    if constant is None or (constant.location is None and len(constant.shape) == 0):
        return None
    if constant.dtype in ("int64", "int32", "bool"):
        return None
    if index in _TABLES.get(node.op_type, ()):
        return "rope"
    if node.op_type in QUANTIZING:
        return _linear(name) if index == 0 else "scales" if index == 1 else None
    if name.rpartition(".")[0] == ROTATION:
        return None  # a few KB for all layers, which stay in the GPU's cache
    return _linear(name) if node.op_type in ("MatMul", "Gemm") else "norms"


def _linear(weight: str) -> Part:
    try:
        return part_of(weight.rpartition(".")[0])
    except KeyError as error:
        raise BundleError(
            f"the graph multiplies by {weight}, which belongs to no linear layer of a decoder; "
            "export the bundle again"
        ) from error


def _unpacked(facts: GraphFacts) -> int:
    """Count each unpacked weight once, however often it is read."""
    found = {quant.data for _, quant in facts.weight_only_products(_INT8)}
    found |= {
        quant.data
        for quant in facts.quant_nodes
        if quant.blocked and quant.dequantizes and quant.dtype in _INT8
    }
    constants = (facts.constant(name) for name in sorted(found))
    return sum(unpacked_bytes(each.volume) for each in constants if each is not None)


def _cache_row(facts: GraphFacts) -> int:
    """Add up heads and head size of all caches; their shape is ``[batch, heads, rows, size]``."""
    total = 0
    for name, info in facts.inputs.items():
        if name.startswith(PAST_PREFIX):
            _, heads, _, size = info.shape
            assert isinstance(heads, int)
            assert isinstance(size, int)
            total += heads * size * ELEMENT_BITS[info.dtype] // 8
    return total


def work_of_graph(facts: GraphFacts, manifest: Manifest) -> Work:
    """Combine the graph's bytes with the operations that its dimensions give."""
    found = read_graph_bytes(facts)
    linears = manifest_linears(manifest)
    work = work_of(manifest.model, linears, found.parts, Deployment(dialect=manifest.dialect))
    return dataclasses.replace(
        work, unpacked_bytes=found.unpacked, kv_bytes_per_token=found.cache_row
    )


@dataclass(frozen=True)
class ModuleCeiling:
    """The best that a module can do with a step; no engine exceeds it.

    Attributes:
        device, power_mode: names in `edge_lab.planner.devices.MODULES`.
        bytes_per_s: the module's memory bandwidth.
        short: ceiling with the fewest cache rows that the step reads.
        full: ceiling with a full cache.
    """

    device: str
    power_mode: str
    bytes_per_s: float
    short: Ceiling
    full: Ceiling


@dataclass(frozen=True)
class StepCost:
    """Bytes that a step of an optimization profile reads, and its ceilings.

    Attributes:
        profile: name of the profile.
        batch: number of sequences.
        tokens: tokens of each sequence.
        rows: fewest and most cache rows that each sequence reads.
        packed_bytes: bytes of weights as they are stored, with scales, norms and biases.
        unpacked_bytes: bytes that are also written and read because weights are unpacked.
        cache_bytes: bytes of the cache with the fewest and with the most rows.
        ceilings: the best that every module and power mode can do.
    """

    profile: ProfileName
    batch: int
    tokens: int
    rows: tuple[int, int]
    packed_bytes: int
    unpacked_bytes: int
    cache_bytes: tuple[int, int]
    ceilings: tuple[ModuleCeiling, ...]

    @property
    def bytes_per_token(self) -> tuple[float, float]:
        """Bytes of the step for each of its tokens, with the fewest and with the most rows."""
        few, many = self.cache_bytes
        packed = self.packed_bytes + self.unpacked_bytes
        tokens = self.batch * self.tokens
        return (packed + few) / tokens, (packed + many) / tokens


def step_costs(work: Work, shapes: BuildShapes, kv_read: KvRead) -> tuple[StepCost, ...]:
    """Cost the largest step of every profile, and before them the decode of one sequence."""
    steps = []
    for step in profile_limits(shapes.max_batch, shapes.max_prefill):
        if step.profile == "decode" and step.batch > 1:
            steps.append(step._replace(batch=1))
        steps.append(step)
    return tuple(_cost(work, step, shapes, kv_read) for step in steps)


def _cost(work: Work, step: StepLimits, shapes: BuildShapes, kv_read: KvRead) -> StepCost:
    few = step.seq
    if kv_read != "lengths":  # it reads a sequence's own rows; the others read whole buckets
        few = next(rows for rows in shapes.kv_buckets if rows >= step.seq)
    rows = few, shapes.capacity
    few_bytes, many_bytes = (step.batch * each * work.kv_bytes_per_token for each in rows)
    return StepCost(
        step.profile,
        step.batch,
        step.seq,
        rows,
        work.step_bytes,
        work.unpacked_bytes,
        (few_bytes, many_bytes),
        tuple(
            ModuleCeiling(
                module.name,
                mode.name,
                mode.bytes_per_s,
                *(ceiling(work, mode, step.batch, step.seq, each) for each in rows),
            )
            for module in MODULES.values()
            for mode in module.modes
        ),
    )
