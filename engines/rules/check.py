"""Checks a graph against the rules of one or many versions of TensorRT."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge.bundle.onnx_file import OnnxFile

from .facts import FactNode, GraphFacts, QuantNode
from .table import LAST_CONFIRMED, RULES, Rule, Step, Version

Breach = tuple[str, str]
"""The name of a node (or tensor), and what was found there."""


@dataclass(frozen=True)
class Finding:
    """A rule that a graph breaks.

    Attributes:
        rule: name of the rule.
        refused: whether the graph is illegal because of it; else this is a warning.
        nodes: every node (or tensor) that breaks it, in the graph's order.
        found: what the first of them has.
        says: what TensorRT takes.
        source: where NVIDIA writes that.
        instead: what to export instead.
        note: a disagreement of sources, or what is not confirmed; may be empty.
    """

    rule: str
    refused: bool
    nodes: tuple[str, ...]
    found: str
    says: str
    source: str
    instead: str
    note: str

    def __str__(self) -> str:
        more = f" (and {len(self.nodes) - 1} more)" if len(self.nodes) > 1 else ""
        return f"{self.nodes[0]}{more}: rule {self.rule}: {self.found}, but {self.says}"


@dataclass(frozen=True)
class Verdict:
    """The findings of one version of TensorRT's rules about a graph.

    Attributes:
        version: the TensorRT.
        findings: refusals and warnings.
        confirmed: whether the rules of exactly this release were read in NVIDIA's sources.
    """

    version: Version
    findings: tuple[Finding, ...]
    confirmed: bool

    @property
    def legal(self) -> bool:
        """Whether nothing is refused."""
        return not self.refusals

    @property
    def refusals(self) -> tuple[Finding, ...]:
        """Findings that make the graph illegal."""
        return tuple(finding for finding in self.findings if finding.refused)


def check_graph(data: bytes, directory: Path | None, versions: Iterable[Version]) -> list[Verdict]:
    """Check a graph against the rules.

    Args:
        data: the ONNX file.
        directory: directory of its weights; None leaves the values of scales unchecked.
        versions: versions of TensorRT to check for.

    Raises:
        BundleError: the graph is not valid, or its weights cannot be read.
    """
    facts = GraphFacts(OnnxFile(data), directory)
    return [check_facts(facts, version) for version in versions]


def check_facts(facts: GraphFacts, version: Version) -> Verdict:
    """Check a graph that is already read."""
    findings = []
    for rule in RULES:
        step = rule.at(version)
        if step is None:
            continue
        breaches = list(_CHECKS[rule.name](facts, step.value, version))
        if breaches:
            findings.append(_finding(rule, step, breaches))
    confirmed = version.flavour == "tensorrt" and version.release <= LAST_CONFIRMED
    return Verdict(version, tuple(findings), confirmed)


def _finding(rule: Rule, step: Step, breaches: list[Breach]) -> Finding:
    return Finding(
        rule.name,
        rule.refuses,
        tuple(name for name, _ in breaches),
        breaches[0][1],
        rule.sentence(step),
        step.source,
        rule.instead,
        rule.note,
    )


Check = Callable[[GraphFacts, Any, Version], Iterator[Breach]]
_CHECKS: dict[str, Check] = {}


def _rule(*names: str) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        for name in names:
            _CHECKS[name] = check
        return check

    return register


def _quant_rule(
    *names: str,
) -> Callable[[Callable[[GraphFacts, QuantNode, Any], str | None]], Any]:
    """Register a check of one quantizing node, which says what is wrong or None."""

    def register(check: Callable[[GraphFacts, QuantNode, Any], str | None]) -> Any:
        def each(facts: GraphFacts, value: Any, _version: Version) -> Iterator[Breach]:
            for quant in facts.quant_nodes:
                found = check(facts, quant, value)
                if found is not None:
                    yield quant.node.name, found

        for name in names:
            _CHECKS[name] = each
        return check

    return register


def _op_rule(
    name: str, *operators: str
) -> Callable[[Callable[[GraphFacts, FactNode, Any], str | None]], Any]:
    """Register a check of the nodes of some operators; without names, of all nodes."""

    def register(check: Callable[[GraphFacts, FactNode, Any], str | None]) -> Any:
        def each(facts: GraphFacts, value: Any, _version: Version) -> Iterator[Breach]:
            for node in facts.nodes:
                if operators and (node.op_type not in operators or node.node.domain):
                    continue
                found = check(facts, node, value)
                if found is not None:
                    yield node.name, found

        _CHECKS[name] = each
        return check

    return register


# The graph.


@_rule("opset", "opset-documented")
def _opset(facts: GraphFacts, value: int, _version: Version) -> Iterator[Breach]:
    if facts.opset > value:
        yield "the graph", f"it has opset {facts.opset}"


@_rule("operators")
def _operators(facts: GraphFacts, value: dict[str, Any], version: Version) -> Iterator[Breach]:
    release = (10, 15) if version.flavour == "tensorrt-rtx" else version.release
    for node in facts.nodes:
        if node.node.domain not in ("", "ai.onnx"):
            continue
        since = value.get(node.op_type)
        if since is None:
            yield node.name, f"{node.op_type} is not among the parser's operators"
        elif since > release:
            yield node.name, f"{node.op_type} comes with TensorRT {since[0]}.{since[1]}"


@_op_rule("domain")
def _domain(_facts: GraphFacts, node: FactNode, value: tuple[str, ...]) -> str | None:
    domain = "" if node.node.domain == "ai.onnx" else node.node.domain
    return None if domain in value else f"{node.op_type} is of the domain {domain}"


@_op_rule("subgraph")
def _subgraph(_facts: GraphFacts, node: FactNode, value: tuple[str, ...]) -> str | None:
    return f"{node.op_type} holds a graph" if node.op_type in value else None


@_rule("io-types")
def _io_types(facts: GraphFacts, value: tuple[str, ...], _version: Version) -> Iterator[Breach]:
    for kind, info in facts.infos():
        if info.dtype not in value:
            yield info.name, f"the {kind} is {info.dtype}"


# Quantization.


@_quant_rule("quantized-type")
def _quantized_type(_facts: GraphFacts, quant: QuantNode, value: tuple[str, ...]) -> str | None:
    if quant.dtype is None or quant.dtype in value:
        return None
    return f"{quant.node.op_type} of {quant.dtype}"


@_quant_rule("block-type", "block-int8-unpacked")
def _block_type(_facts: GraphFacts, quant: QuantNode, value: tuple[str, ...]) -> str | None:
    if not quant.blocked or quant.dtype is None or quant.dtype in value:
        return None
    return f"{quant.dtype} with a scale per block"


@_quant_rule("block-rank")
def _block_rank(facts: GraphFacts, quant: QuantNode, value: int) -> str | None:
    rank = facts.rank(quant.data)
    if not quant.blocked or rank in (None, value):
        return None
    return f"a scale per block of a tensor of {rank} dimensions"


@_quant_rule("block-constant")
def _block_constant(_facts: GraphFacts, quant: QuantNode, _value: bool) -> str | None:
    if not quant.blocked or quant.data_shape is not None:
        return None
    return f"a scale per block of {quant.data}, which is no constant"


@_quant_rule("block-shape")
def _block_shape(_facts: GraphFacts, quant: QuantNode, _value: bool) -> str | None:
    whole, scales = quant.data_shape, quant.scale_shape
    if not quant.blocked or whole is None or scales is None:
        return None
    found = f"a weight {list(whole)} with scales {list(scales)}"
    if len(whole) != len(scales):
        return found
    blocked = [i for i, (a, b) in enumerate(zip(whole, scales, strict=True)) if a != b]
    axis = quant.axis + len(whole) if quant.axis < 0 else quant.axis
    if not blocked and 0 <= axis < len(whole) and quant.block_size == 1:
        blocked = [axis]  # a scale for each weight
    if len(blocked) != 1 or blocked[0] < len(whole) - 2:
        return found
    at = blocked[0]
    if not scales[at] or whole[at] % scales[at] or whole[at] // scales[at] != quant.block_size:
        return f"{found} in blocks of {quant.block_size}"
    return f"{found}, blocked along axis {at}, not {quant.axis}" if at != axis else None


@_quant_rule("block-size")
def _block_size(_facts: GraphFacts, quant: QuantNode, value: int) -> str | None:
    size = quant.block_size if quant.blocked else None
    return f"blocks of {size}" if size is not None and size % value else None


@_quant_rule("block-size-tried")
def _block_size_tried(_facts: GraphFacts, quant: QuantNode, value: tuple[int, ...]) -> str | None:
    size = quant.block_size if quant.blocked else None
    return f"blocks of {size}" if size is not None and size not in value else None


@_quant_rule("int4-constant")
def _int4_constant(_facts: GraphFacts, quant: QuantNode, value: tuple[str, ...]) -> str | None:
    if quant.dtype not in value or quant.data_shape is not None:
        return None
    return f"{quant.data}, which is no constant, in {quant.dtype}"


@_quant_rule("int4-even")
def _int4_even(facts: GraphFacts, quant: QuantNode, value: tuple[str, ...]) -> str | None:
    constant = facts.constant(quant.data)
    if quant.dtype not in value or constant is None or constant.volume % 2 == 0:
        return None
    return f"{constant.volume} elements of {quant.dtype}"


@_quant_rule("scale-type")
def _scale_type(facts: GraphFacts, quant: QuantNode, value: tuple[str, ...]) -> str | None:
    dtype = facts.dtype(quant.scale)
    return None if dtype is None or dtype in value else f"a scale of {dtype}"


@_quant_rule("scale-positive")
def _scale_positive(facts: GraphFacts, quant: QuantNode, _value: bool) -> str | None:
    fault = facts.scale_fault(quant.scale)
    return None if fault is None else f"of its scales {fault}"


@_quant_rule("scale-constant")
def _scale_constant(_facts: GraphFacts, quant: QuantNode, _value: bool) -> str | None:
    return None if quant.scale_shape is not None else f"the scale {quant.scale} is no constant"


@_quant_rule("scale-input-type")
def _scale_input_type(facts: GraphFacts, quant: QuantNode, value: tuple[str, ...]) -> str | None:
    data, scale = facts.dtype(quant.data), facts.dtype(quant.scale)
    if quant.dequantizes or data is None or scale not in value or data == scale:
        return None
    return f"an input of {data} with a scale of {scale}"


@_quant_rule("zero-point")
def _zero_point(facts: GraphFacts, quant: QuantNode, _value: bool) -> str | None:
    if not quant.zero_point:
        return None
    constant = facts.constant(quant.zero_point)
    if constant is None:
        return f"the zero point {quant.zero_point} is no constant"
    if quant.dtype is not None and constant.dtype != quant.dtype:
        return f"a zero point of {constant.dtype} for {quant.dtype}"
    if facts.all_zero(quant.zero_point) is False:
        return "a zero point that is not zero"
    scale = facts.constant(quant.scale)
    if scale is not None and scale.volume != constant.volume:
        return f"{constant.volume} zero points for {scale.volume} scales"
    return None


@_quant_rule("channel-scale")
def _channel_scale(facts: GraphFacts, quant: QuantNode, _value: bool) -> str | None:
    scales, rank = quant.scale_shape, facts.rank(quant.data)
    if quant.blocked or scales is None or scales in ((), (1,)):
        return None
    if len(scales) != 1:
        return f"scales {list(scales)}"
    if quant.data_shape is None:
        return f"{scales[0]} scales for {quant.data}, which is no constant"
    axis = quant.axis + len(quant.data_shape) if quant.axis < 0 else quant.axis
    if not 0 <= axis < len(quant.data_shape):
        return f"axis {quant.axis} of a weight of {rank} dimensions"
    if quant.data_shape[axis] != scales[0]:
        return f"{scales[0]} scales for axis {axis} of a weight {list(quant.data_shape)}"
    return None


@_quant_rule("int8-half-scale")
def _int8_half_scale(facts: GraphFacts, quant: QuantNode, value: tuple[str, ...]) -> str | None:
    scale = facts.dtype(quant.scale)
    if quant.dtype != "int8" or quant.data_shape is not None or scale not in value:
        return None
    return f"{quant.node.op_type} of int8 with a scale of {scale}"


@_rule("operand-scales")
def _operand_scales(facts: GraphFacts, _value: bool, _version: Version) -> Iterator[Breach]:
    scales: dict[str, str | None] = {}
    for quant in facts.quant_nodes:
        if quant.dequantizes and not quant.blocked and quant.dtype == "int8":
            scales.update(dict.fromkeys(quant.node.node.outputs, facts.dtype(quant.scale)))
    for node in facts.nodes:
        if node.op_type == "Cast" and node.input(0) in scales:
            scales.update(dict.fromkeys(node.node.outputs, scales[node.input(0)]))
        left, right = scales.get(node.input(0)), scales.get(node.input(1))
        if node.op_type == "MatMul" and left and right and left != right:
            yield node.name, f"the scales of its operands are {left} and {right}"


@_rule("int8-weight-only")
def _int8_weight_only(
    facts: GraphFacts, value: tuple[str, ...], _version: Version
) -> Iterator[Breach]:
    for node, _weight in facts.weight_only_products(value):
        yield node.name, f"{node.input(1)} is INT8, {node.input(0)} is not"


@_rule("quantized-use")
def _quantized_use(
    facts: GraphFacts, value: tuple[str, ...], _version: Version
) -> Iterator[Breach]:
    for node in facts.nodes:
        dequantizes = node.op_type == "DequantizeLinear"
        allowed = {0, 2} if dequantizes else {2} if node.op_type == "QuantizeLinear" else set()
        for index, name in enumerate(node.node.inputs):
            constant = facts.constant(name)
            if constant is not None and constant.dtype in value and index not in allowed:
                yield node.name, f"{node.op_type} reads {name}, a constant of {constant.dtype}"


# Operators.


@_op_rule("int8-moved")
def _int8_moved(facts: GraphFacts, node: FactNode, value: tuple[str, ...]) -> str | None:
    if node.op_type not in value or facts.dtype(node.input(0)) != "int8":
        return None
    return f"{node.op_type} of int8"


@_op_rule("attention-causal", "Attention")
def _attention_causal(_facts: GraphFacts, node: FactNode, _value: bool) -> str | None:
    return "is_causal is set" if node.attributes.get("is_causal") else None


@_op_rule("attention-inputs", "Attention")
def _attention_inputs(_facts: GraphFacts, node: FactNode, value: int) -> str | None:
    names = ("past_key", "past_value", "nonpad_kv_seqlen")
    given = [
        names[index] if index < len(names) else f"input {value + index}"
        for index, name in enumerate(node.node.inputs[value:])
        if name
    ]
    if given:
        return f"it has {', '.join(given)}"
    outputs = sum(1 for name in node.node.outputs if name)
    return f"it has {outputs} outputs" if outputs != 1 else None


@_op_rule("attention-attributes", "Attention")
def _attention_attributes(_facts: GraphFacts, node: FactNode, value: tuple[str, ...]) -> str | None:
    given = [name for name in value if node.attributes.get(name)]
    return f"it has {', '.join(given)}" if given else None


@_op_rule("attention-rank", "Attention")
def _attention_rank(facts: GraphFacts, node: FactNode, value: int) -> str | None:
    for index, what in enumerate(("query", "key", "value", "mask")):
        rank = facts.rank(node.input(index))
        if rank not in (None, value):
            return f"its {what} has {rank} dimensions"
    return None


@_op_rule("attention-types", "Attention")
def _attention_types(facts: GraphFacts, node: FactNode, value: tuple[str, ...]) -> str | None:
    types = [facts.dtype(node.input(index)) for index in range(3)]
    known = {dtype for dtype in types if dtype is not None}
    if len(known) > 1 or not known <= set(value):
        return f"query, key and value are {', '.join(dtype or 'unknown' for dtype in types)}"
    mask = facts.dtype(node.input(3))
    if mask in (None, "bool") or not known or mask in known:
        return None
    return f"its mask is {mask}, its query {known.pop()}"


@_op_rule("kv-update", "TensorScatter")
def _kv_update(facts: GraphFacts, node: FactNode, value: int) -> str | None:
    cache = facts.inputs.get(node.input(0))
    if cache is None:
        return f"its cache {node.input(0)} is no input of the graph"
    if node.node.outputs[:1] and node.node.outputs[0] not in facts.outputs:
        return f"its result {node.node.outputs[0]} is no output of the graph"
    ranks = (len(cache.shape), facts.rank(node.input(1)))
    if any(rank not in (None, value) for rank in ranks):
        return f"cache and update have {ranks[0]} and {ranks[1]} dimensions"
    if node.attributes.get("axis", -2) not in (-2, value - 2):
        return f"it writes along axis {node.attributes['axis']}"
    mode = node.attributes.get("mode", "linear")
    return None if mode == "linear" else f"its mode is {mode}"


@_op_rule("kv-static", "TensorScatter")
def _kv_static(facts: GraphFacts, node: FactNode, value: tuple[int, ...]) -> str | None:
    cache = facts.inputs.get(node.input(0))
    if cache is None or len(cache.shape) != 4:
        return None
    open_sizes = [cache.shape[i] for i in value if not isinstance(cache.shape[i], int)]
    return f"{cache.name} has the shape {list(cache.shape)}" if open_sizes else None


@_op_rule("kv-types", "TensorScatter")
def _kv_types(facts: GraphFacts, node: FactNode, value: tuple[str, ...]) -> str | None:
    types = [facts.dtype(node.input(index)) for index in range(2)]
    known = {dtype for dtype in types if dtype is not None}
    if len(known) <= 1 and known <= set(value):
        return None
    return f"cache and update are {types[0]} and {types[1]}"


@_op_rule("rotary-positions", "RotaryEmbedding")
def _rotary_positions(facts: GraphFacts, node: FactNode, value: str) -> str | None:
    dtype = facts.dtype(node.input(3))
    return None if dtype in (None, value) else f"its position_ids are {dtype}"


@_op_rule("topk", "TopK")
def _topk(facts: GraphFacts, node: FactNode, value: int) -> str | None:
    if not node.attributes.get("sorted", 1):
        return "sorted is 0"
    name = node.input(1)
    numbers = facts.constants.values(name) if facts.constant(name) is not None else None
    if numbers is None or numbers.size != 1 or 0 < int(numbers[0]) < value:
        return None
    return f"K is {int(numbers[0])}"


@_op_rule("constant-axes")
def _constant_axes(facts: GraphFacts, node: FactNode, value: tuple[str, ...]) -> str | None:
    axes = node.input(1)
    if node.op_type not in value or not axes or facts.constant(axes) is not None:
        return None
    return f"the axes of {node.op_type}, {axes}, are no constant"
