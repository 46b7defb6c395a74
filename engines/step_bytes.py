"""What a step reads by its graph, and how fast each module can be at best.

The planner computes the same bytes from dimensions and schemes (`edge.bundle.weights`), before
there is a graph; tests hold both together. Operations are the planner's in both cases.
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
from edge.bundle.sizes import ProfileName, StepLimits, profile_limits
from edge.bundle.weights import manifest_linears, part_of, unpacked_bytes
from edge.errors import BundleError
from edge_lab.planner.devices import MODULES
from edge_lab.planner.memory import Deployment
from edge_lab.planner.speed import Ceiling, Work, ceiling, work_of

from .config import BuildShapes
from .rules.facts import QUANTIZING, FactNode, GraphFacts

_INT8 = ("int8",)
# Of these a step looks up rows: operator and the inputs that are tables.
_TABLES = {"Gather": (0,), "RotaryEmbedding": (1, 2)}


@dataclass(frozen=True)
class GraphBytes:
    """Bytes by the graph alone.

    Attributes:
        parts: bytes of its constants, as they are stored (`edge.bundle.weights.PARTS`).
        unpacked: what TensorRT writes and reads on top in every step, because it unpacks weights
            (rules ``int8-weight-only`` and ``block-int8-unpacked``).
        cache_row: keys and values of one token, all layers.
    """

    parts: Mapping[Part, int]
    unpacked: int
    cache_row: int


def read_graph_bytes(facts: GraphFacts) -> GraphBytes:
    """Count what a decoder holds and what of it is unpacked.

    Raises:
        BundleError: a constant that belongs to no linear layer multiplies.
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
    """Where a constant counts; None for what is no weight: shapes, axes, zero points, rotations."""
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
        return None  # a few KB for all layers, which stay in the cache
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
    """Each weight once, whatever reads it."""
    found = {quant.data for _, quant in facts.weight_only_products(_INT8)}
    found |= {
        quant.data
        for quant in facts.quant_nodes
        if quant.blocked and quant.dequantizes and quant.dtype in _INT8
    }
    constants = (facts.constant(name) for name in sorted(found))
    return sum(unpacked_bytes(each.volume) for each in constants if each is not None)


def _cache_row(facts: GraphFacts) -> int:
    """Heads and head size of every cache input; the shape is ``[batch, heads, rows, size]``."""
    total = 0
    for name, info in facts.inputs.items():
        if name.startswith(PAST_PREFIX):
            _, heads, _, size = info.shape
            assert isinstance(heads, int)
            assert isinstance(size, int)
            total += heads * size * ELEMENT_BITS[info.dtype] // 8
    return total


def work_of_graph(facts: GraphFacts, manifest: Manifest) -> Work:
    """Bytes and operations of a step: the bytes of the graph, the operations of its dimensions."""
    found = read_graph_bytes(facts)
    linears = manifest_linears(manifest)
    work = work_of(manifest.model, linears, found.parts, Deployment(dialect=manifest.dialect))
    return dataclasses.replace(
        work, unpacked_bytes=found.unpacked, kv_bytes_per_token=found.cache_row
    )


@dataclass(frozen=True)
class ModuleCeiling:
    """What a module can do at best with a step, which no engine exceeds.

    Attributes:
        device, power_mode: names in `edge_lab.planner.devices.MODULES`.
        bytes_per_s: its bandwidth.
        short: with the fewest cache rows that the step reads.
        full: with a full cache.
    """

    device: str
    power_mode: str
    bytes_per_s: float
    short: Ceiling
    full: Ceiling


@dataclass(frozen=True)
class StepCost:
    """A step of an optimization profile.

    Attributes:
        profile: its name.
        batch: sequences.
        tokens: of each sequence.
        rows: fewest and most cache rows that each sequence reads.
        packed_bytes: weights as they are stored, with scales, norms and biases.
        unpacked_bytes: written and read on top because weights are unpacked.
        cache_bytes: with the fewest and with the most rows.
        ceilings: of every module and power mode.
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
    """The largest step of every profile, and decode of one sequence before that of all."""
    steps = []
    for step in profile_limits(shapes.max_batch, shapes.max_prefill):
        if step.profile == "decode" and step.batch > 1:
            steps.append(step._replace(batch=1))
        steps.append(step)
    return tuple(_cost(work, step, shapes, kv_read) for step in steps)


def _cost(work: Work, step: StepLimits, shapes: BuildShapes, kv_read: KvRead) -> StepCost:
    few = step.seq
    if kv_read != "lengths":  # which reads what a sequence has; the others read whole buckets
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
