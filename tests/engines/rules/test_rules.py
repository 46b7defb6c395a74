"""Planted illegal graphs: each is refused by the rule that is meant for it, and by no other."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.backends.tensorrt.launch_rules import NAMESPACE
from edge.errors import BundleError
from engines.rules import check as check_module
from engines.rules import facts as facts_module
from engines.rules.check import Verdict, check_graph
from engines.rules.table import OPERATOR_SINCE, RULES, VERSIONS, version_of

onnx = pytest.importorskip("onnx", reason="makes the graphs")
helper, T = onnx.helper, onnx.TensorProto

BY_NAME = {version.name: version for version in VERSIONS}
Change = Callable[["Graph"], None]


class Graph:
    """A legal little decoder: quantized weights, a cache update and an attention."""

    def __init__(self, opset: int = 24) -> None:
        self.opset = opset
        self.nodes: list[Any] = []
        self.inputs: dict[str, tuple[int, Sequence[int | str]]] = {"x": (T.FLOAT16, ("b", 64))}
        self.outputs: dict[str, tuple[int, Sequence[int | str]]] = {}
        self.constants: dict[str, Any] = {}

    def constant(self, name: str, dtype: int, shape: Sequence[int], values: Any) -> str:
        volume = int(np.prod(shape))
        numbers = [values] * volume if np.isscalar(values) else list(values)
        self.constants[name] = helper.make_tensor(name, dtype, list(shape), numbers)
        return name

    def node(self, op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> Any:
        made = helper.make_node(op, inputs, outputs, name=outputs[0], **attributes)
        self.nodes.append(made)
        return made

    def find(self, op: str) -> Any:
        return next(node for node in self.nodes if node.op_type == op)

    def serialize(self) -> bytes:
        info = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes,
            "g",
            [info(name, *spec) for name, spec in self.inputs.items()],
            [info(name, *spec) for name, spec in self.outputs.items()],
            list(self.constants.values()),
        )
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("own", 1)]
        data: bytes = helper.make_model(graph, opset_imports=opsets).SerializeToString()
        return data


def int4_graph() -> Graph:
    """One INT4 linear layer in blocks of 32: opset 21, legal from 10.3 on."""
    graph = Graph(21)
    graph.constant("w", T.INT4, (64, 8), 1)
    graph.constant("s", T.FLOAT16, (2, 8), 0.5)
    graph.node("DequantizeLinear", ["w", "s"], ["dq"], axis=0, block_size=32)
    graph.node("MatMul", ["x", "dq"], ["y"])
    graph.outputs["y"] = (T.FLOAT16, ("b", 8))
    return graph


def w8a8_graph() -> Graph:
    """One layer with INT8 inputs and weights, scales in FP32."""
    graph = Graph(21)
    graph.inputs["x"] = (T.FLOAT, ("b", 64))
    graph.constant("w", T.INT8, (64, 8), 1)
    graph.constant("s", T.FLOAT, (8,), 0.5)
    graph.constant("a", T.FLOAT, (), 0.5)
    graph.constant("zero", T.INT8, (), 0)
    graph.node("QuantizeLinear", ["x", "a", "zero"], ["q"])
    graph.node("DequantizeLinear", ["q", "a", "zero"], ["dx"])
    graph.node("DequantizeLinear", ["w", "s"], ["dq"], axis=1)
    graph.node("MatMul", ["dx", "dq"], ["y"])
    graph.outputs["y"] = (T.FLOAT, ("b", 8))
    return graph


def attention_graph() -> Graph:
    """A cache update and an attention with a mask: legal from 10.16 on."""
    graph = Graph(24)
    for name in ("q", "k"):
        graph.inputs[name] = (T.FLOAT16, ("b", 2, "s", 8))
    graph.inputs["past"] = (T.FLOAT16, ("b", 2, 16, 8))
    graph.inputs["at"] = (T.INT64, ("b",))
    graph.inputs["mask"] = (T.BOOL, ("b", 1, "s", 16))
    graph.inputs["positions"] = (T.INT64, ("b", "s"))
    graph.constant("cos", T.FLOAT16, (32, 4), 0.5)
    graph.node("RotaryEmbedding", ["q", "cos", "cos", "positions"], ["r"])
    graph.node("TensorScatter", ["past", "k", "at"], ["present"], axis=2)
    graph.node("Attention", ["r", "present", "present", "mask"], ["y"])
    graph.outputs["y"] = (T.FLOAT16, ("b", 2, "s", 8))
    graph.outputs["present"] = (T.FLOAT16, ("b", 2, 16, 8))
    return graph


def verdict(graph: Graph, version: str = "10.16") -> Verdict:
    (found,) = check_graph(graph.serialize(), None, [BY_NAME[version]])
    return found


def broken(graph: Graph, version: str = "10.16") -> set[str]:
    return {finding.rule for finding in verdict(graph, version).refusals}


@pytest.mark.parametrize(
    ("make", "versions"),
    [
        (int4_graph, list(BY_NAME)),
        (w8a8_graph, list(BY_NAME)),
        (attention_graph, ["10.16", "11.1", "11.4", "rtx"]),
    ],
)
def test_the_graphs_that_faults_are_planted_in_are_legal(
    make: Callable[[], Graph], versions: list[str]
) -> None:
    for version in versions:
        assert broken(make(), version) == set()


def int8_blocks(graph: Graph) -> None:
    graph.constant("w", T.INT8, (64, 8), 1)


def dynamic_blocks(graph: Graph) -> None:
    del graph.constants["w"]
    graph.inputs["w"] = (T.FLOAT16, (64, 8))
    graph.constant("zeros", T.INT4, (2, 8), 0)
    quantize = helper.make_node(
        "QuantizeLinear", ["w", "s", "zeros"], ["q"], name="q", axis=0, block_size=32
    )
    graph.nodes.insert(0, quantize)
    graph.nodes[1].input[0] = "q"


def three_dimensions(graph: Graph) -> None:
    graph.constant("w", T.INT4, (1, 64, 8), 1)
    graph.constant("s", T.FLOAT16, (1, 2, 8), 0.5)
    graph.nodes[0] = helper.make_node(
        "DequantizeLinear", ["w", "s"], ["dq"], name="dq", axis=1, block_size=32
    )


def blocks(shape: tuple[int, int], size: int, axis: int = 0) -> Change:
    def change(graph: Graph) -> None:
        graph.constant("s", T.FLOAT16, shape, 0.5)
        graph.nodes[0] = helper.make_node(
            "DequantizeLinear", ["w", "s"], ["dq"], name="dq", axis=axis, block_size=size
        )

    return change


def odd_blocks(graph: Graph) -> None:
    graph.constant("w", T.INT4, (66, 8), 1)
    blocks((22, 8), 3)(graph)


def odd_weight(graph: Graph) -> None:
    graph.constant("w", T.INT4, (7, 3), 1)
    graph.constant("s", T.FLOAT16, (), 0.5)
    graph.nodes[0] = helper.make_node("DequantizeLinear", ["w", "s"], ["dq"], name="dq")


def scales(value: float) -> Change:
    def change(graph: Graph) -> None:
        graph.constant("s", T.FLOAT16, (2, 8), [0.5] * 15 + [value])

    return change


def dynamic_scale(graph: Graph) -> None:
    del graph.constants["s"]
    graph.inputs["s"] = (T.FLOAT16, (2, 8))


def double_scale(graph: Graph) -> None:
    graph.constant("s", T.DOUBLE, (2, 8), 0.5)


def gathered_weight(graph: Graph) -> None:
    graph.inputs["i"] = (T.INT64, (1,))
    graph.nodes.insert(0, helper.make_node("Gather", ["w", "i"], ["picked"], name="picked"))


def zero_point(value: int, dtype: int = T.INT8, shape: tuple[int, ...] = ()) -> Change:
    def change(graph: Graph) -> None:
        graph.constant("zero", dtype, shape, value)

    return change


def half_input_scale(graph: Graph) -> None:
    graph.inputs["x"] = (T.FLOAT16, ("b", 64))
    graph.constant("a", T.FLOAT16, (), 0.5)
    graph.constant("s", T.FLOAT16, (8,), 0.5)


def mixed_scale(graph: Graph) -> None:
    graph.constant("a", T.FLOAT16, (), 0.5)


def narrow_weight_scale(graph: Graph) -> None:
    graph.constant("s", T.FLOAT16, (8,), 0.5)
    graph.node("Cast", ["dq"], ["cast"], to=T.FLOAT)
    product = next(node for node in graph.nodes if node.op_type == "MatMul")
    product.input[1] = "cast"
    graph.nodes.remove(product)
    graph.nodes.append(product)


def channels_of_an_input(graph: Graph) -> None:
    graph.constant("a", T.FLOAT, (64,), 0.5)
    graph.constant("zero", T.INT8, (64,), 0)


def wrong_axis(graph: Graph) -> None:
    graph.nodes[2].attribute[0].i = 5


def scales_of_the_other_axis(graph: Graph) -> None:
    graph.nodes[2].attribute[0].i = 0


def uint8_input(graph: Graph) -> None:
    del graph.nodes[0].input[2], graph.nodes[1].input[2]


def attribute(op: str, name: str, value: Any) -> Change:
    def change(graph: Graph) -> None:
        node = graph.find(op)
        kept = [each for each in node.attribute if each.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return change


def past_in_attention(graph: Graph) -> None:
    graph.find("Attention").input.extend(["past", "past"])


def ragged_attention(graph: Graph) -> None:
    graph.find("Attention").input.extend(["", "", "at"])


def flat_mask(graph: Graph) -> None:
    graph.inputs["mask"] = (T.BOOL, ("s", 16))


def wide_mask(graph: Graph) -> None:
    graph.inputs["mask"] = (T.FLOAT, ("b", 1, "s", 16))


def mixed_attention(graph: Graph) -> None:
    graph.inputs["q"] = (T.FLOAT, ("b", 2, "s", 8))


def inner_cache(graph: Graph) -> None:
    graph.nodes.insert(0, helper.make_node("Neg", ["past"], ["made"], name="made"))
    graph.find("TensorScatter").input[0] = "made"


def hidden_present(graph: Graph) -> None:
    del graph.outputs["present"]


def open_capacity(graph: Graph) -> None:
    graph.inputs["past"] = (T.FLOAT16, ("b", 2, "rows", 8))


def wide_update(graph: Graph) -> None:
    graph.inputs["k"] = (T.FLOAT, ("b", 2, "s", 8))


def int32_positions(graph: Graph) -> None:
    graph.inputs["positions"] = (T.INT32, ("b", "s"))


def topk(k: int, **attributes: Any) -> Change:
    def change(graph: Graph) -> None:
        graph.constant("k_top", T.INT64, (1,), k)
        graph.node("TopK", ["x", "k_top"], ["top", "indices"], **attributes)

    return change


def dynamic_axes(graph: Graph) -> None:
    graph.inputs["axes"] = (T.INT64, (1,))
    graph.node("Unsqueeze", ["x", "axes"], ["wide"])


def own_operator(graph: Graph) -> None:
    graph.node("Magic", ["x"], ["magic"], domain="own")


def unknown_operator(graph: Graph) -> None:
    graph.node("BitShift", ["x", "x"], ["shifted"], direction="LEFT")


def loop(graph: Graph) -> None:
    body = helper.make_graph([], "body", [], [])
    graph.node("If", ["x"], ["chosen"], then_branch=body, else_branch=body)


def wide_input(graph: Graph) -> None:
    graph.inputs["wide"] = (T.DOUBLE, (1,))


PLANTED: list[tuple[str, Callable[[], Graph], Change, str]] = [
    ("block-type", int4_graph, int8_blocks, "int8 with a scale per block"),
    ("block-rank", int4_graph, three_dimensions, "3 dimensions"),
    ("block-constant", int4_graph, dynamic_blocks, "which is no constant"),
    ("int4-constant", int4_graph, dynamic_blocks, "which is no constant"),
    ("block-shape", int4_graph, blocks((3, 8), 32), "in blocks of 32"),
    ("block-shape", int4_graph, blocks((2, 4), 32), "with scales [2, 4]"),
    ("block-shape", int4_graph, blocks((2, 8), 16), "in blocks of 16"),
    ("block-shape", int4_graph, blocks((2, 8), 32, axis=1), "along axis 0, not 1"),
    ("block-size", int4_graph, odd_blocks, "blocks of 3"),
    ("int4-even", int4_graph, odd_weight, "21 elements of int4"),
    ("scale-positive", int4_graph, scales(0.0), "1 of 16 are zero, the first at 15"),
    ("scale-positive", int4_graph, scales(-0.5), "are negative"),
    ("scale-positive", int4_graph, scales(np.inf), "are infinite"),
    ("scale-positive", int4_graph, scales(np.nan), "are not a number"),
    ("scale-type", int4_graph, double_scale, "a scale of fp64"),
    ("quantized-use", int4_graph, gathered_weight, "Gather reads w"),
    ("quantized-type", w8a8_graph, uint8_input, "QuantizeLinear of uint8"),
    ("zero-point", w8a8_graph, zero_point(1), "not zero"),
    ("zero-point", w8a8_graph, zero_point(0, shape=(2,)), "2 zero points for 1 scales"),
    ("int8-half-scale", w8a8_graph, half_input_scale, "with a scale of fp16"),
    ("scale-input-type", w8a8_graph, mixed_scale, "an input of fp32 with a scale of fp16"),
    ("operand-scales", w8a8_graph, narrow_weight_scale, "are fp32 and fp16"),
    ("channel-scale", w8a8_graph, channels_of_an_input, "64 scales for x, which is no constant"),
    ("channel-scale", w8a8_graph, wrong_axis, "axis 5"),
    ("channel-scale", w8a8_graph, scales_of_the_other_axis, "8 scales for axis 0"),
    ("attention-causal", attention_graph, attribute("Attention", "is_causal", 1), "is_causal"),
    ("attention-inputs", attention_graph, past_in_attention, "past_key, past_value"),
    ("attention-inputs", attention_graph, ragged_attention, "nonpad_kv_seqlen"),
    ("attention-attributes", attention_graph, attribute("Attention", "softcap", 30.0), "softcap"),
    ("attention-rank", attention_graph, flat_mask, "mask has 2 dimensions"),
    ("attention-types", attention_graph, wide_mask, "its mask is fp32"),
    ("attention-types", attention_graph, mixed_attention, "fp32, fp16, fp16"),
    ("kv-update", attention_graph, inner_cache, "made is no input"),
    ("kv-update", attention_graph, hidden_present, "present is no output"),
    ("kv-update", attention_graph, attribute("TensorScatter", "axis", 1), "along axis 1"),
    ("kv-update", attention_graph, attribute("TensorScatter", "mode", "circular"), "circular"),
    ("kv-static", attention_graph, open_capacity, "'rows'"),
    ("kv-types", attention_graph, wide_update, "fp16 and fp32"),
    ("rotary-positions", attention_graph, int32_positions, "position_ids are int32"),
    ("topk", int4_graph, topk(3840), "K is 3840"),
    ("topk", int4_graph, topk(0), "K is 0"),
    ("topk", int4_graph, topk(8, sorted=0), "sorted is 0"),
    ("constant-axes", int4_graph, dynamic_axes, "axes, are no constant"),
    ("domain", int4_graph, own_operator, "Magic is of the domain own"),
    ("operators", int4_graph, unknown_operator, "BitShift is not among"),
    ("subgraph", int4_graph, loop, "If holds a graph"),
    ("io-types", int4_graph, wide_input, "the input is fp64"),
]


@pytest.mark.parametrize(
    ("rule", "make", "change", "found"),
    PLANTED,
    ids=[f"{rule}-{number}" for number, (rule, *_) in enumerate(PLANTED)],
)
def test_a_planted_fault_is_refused_for_its_reason(
    rule: str, make: Callable[[], Graph], change: Change, found: str
) -> None:
    graph = make()
    change(graph)
    version = "10.16" if rule == "int8-half-scale" else "11.1"
    refusals = {finding.rule: finding for finding in verdict(graph, version).refusals}
    assert rule in refusals
    finding = refusals[rule]
    assert found in finding.found
    assert finding.source
    assert finding.instead
    assert finding.nodes
    # Some faults break two rules at once: a dynamic INT4 weight, types that a mixture spoils.
    related = {"block-constant", "int4-constant", "operand-scales"}
    related |= {"attention-rank", "kv-types", "attention-types"}
    assert set(refusals) - related <= {rule}


def test_every_rule_has_a_planted_fault() -> None:
    elsewhere = {  # below, or warnings
        *("opset", "opset-documented", "scale-constant", "block-int8-unpacked"),
        *("block-size-tried", "int8-weight-only", "int8-moved"),
    }
    assert {rule.name for rule in RULES} == {rule for rule, *_ in PLANTED} | elsewhere
    assert len({rule.name for rule in RULES}) == len(RULES)


@pytest.mark.parametrize(
    ("opset", "legal"),
    [
        (20, list(BY_NAME)),
        (21, list(BY_NAME)),
        (22, ["10.13", "10.16", "11.1", "11.4", "rtx"]),
        (24, ["10.13", "10.16", "11.1", "11.4", "rtx"]),
        (25, []),
    ],
)
def test_the_ceiling_of_the_opset(opset: int, legal: list[str]) -> None:
    graph = int4_graph()
    graph.opset = opset
    assert [name for name in BY_NAME if "opset" not in broken(graph, name)] == legal


def test_releases_between_the_columns_have_rules_of_their_own() -> None:
    graph = Graph(22)
    graph.node("Identity", ["x"], ["y"])
    graph.outputs["y"] = (T.FLOAT16, ("b", 64))
    data = graph.serialize()
    for release, legal in (((10, 8), False), ((10, 9), True), ((11, 5), True)):
        (found,) = check_graph(data, None, [version_of("tensorrt", release)])
        assert found.legal is legal
        assert found.confirmed is (release <= (11, 1))


@pytest.mark.parametrize(
    ("operator", "versions"),
    [
        ("Attention", ["10.16", "11.1", "11.4", "rtx"]),
        ("RMSNormalization", ["10.16", "11.1", "11.4", "rtx"]),
        ("Swish", ["11.1", "11.4"]),
        ("MatMul", list(BY_NAME)),
    ],
)
def test_operators_come_with_a_release(operator: str, versions: list[str]) -> None:
    for name, version in BY_NAME.items():
        release = (10, 15) if name == "rtx" else version.release
        assert (OPERATOR_SINCE[operator] <= release) is (name in versions)
    graph = Graph(24)
    graph.node(operator, ["x", "x", "x"], ["y"])
    graph.outputs["y"] = (T.FLOAT16, ("b", 64))
    found = [name for name in BY_NAME if "operators" not in broken(graph, name)]
    assert found == versions


def test_dynamic_scales_are_for_newer_versions() -> None:
    graph = int4_graph()
    dynamic_scale(graph)
    assert "scale-constant" in broken(graph, "10.7")
    assert "scale-constant" not in broken(graph, "10.13")


def test_int8_blocks_are_a_warning_for_rtx_alone() -> None:
    graph = int4_graph()
    int8_blocks(graph)
    assert [name for name in BY_NAME if broken(graph, name) == {"block-type"}] == [
        name for name in BY_NAME if name != "rtx"
    ]
    assert [finding.rule for finding in verdict(graph, "rtx").findings] == ["block-int8-unpacked"]


def test_the_open_bug_of_10_16_is_for_10_16_alone() -> None:
    graph = w8a8_graph()
    half_input_scale(graph)
    refused = [name for name in BY_NAME if "int8-half-scale" in broken(graph, name)]
    assert refused == ["10.16"]
    source = {finding.rule: finding.source for finding in verdict(graph).findings}
    assert "issues/4832" in source["int8-half-scale"]


def test_int8_weights_with_float_inputs_are_a_warning() -> None:
    graph = w8a8_graph()
    graph.nodes[3].input[0] = "x"
    del graph.nodes[:2]
    found = verdict(graph, "10.3")
    assert found.legal
    assert "int8-weight-only" in {finding.rule for finding in found.findings}
    found = verdict(w8a8_graph(), "10.3")
    assert "int8-weight-only" not in {finding.rule for finding in found.findings}


def test_every_rule_has_a_check_a_source_and_advice() -> None:
    for rule in RULES:
        steps = [*rule.steps, *([rule.rtx] if rule.rtx is not None else [])]
        assert steps, rule.name
        assert [step.since for step in rule.steps] == sorted(step.since for step in rule.steps)
        assert all(re.search(r"\w", step.source) for step in steps), rule.name
        assert rule.says
        assert rule.instead
        assert rule.name in check_module._CHECKS
    assert set(check_module._CHECKS) == {rule.name for rule in RULES}


def test_the_first_of_many_nodes_is_shown_and_all_are_listed() -> None:
    graph = int4_graph()
    graph.constant("w8", T.INT8, (64, 8), 1)
    for number in range(3):
        graph.node("DequantizeLinear", ["w8", "s"], [f"dq{number}"], axis=0, block_size=32)
    (finding,) = verdict(graph, "10.3").refusals
    assert finding.nodes == ("dq0", "dq1", "dq2")
    assert "dq0 (and 2 more): rule block-type" in str(finding)


# Hostile graphs.


def test_a_circle_is_not_a_valid_graph() -> None:
    graph = Graph(21)
    graph.node("Add", ["b", "x"], ["a"])
    graph.node("Add", ["a", "x"], ["b"])
    with pytest.raises(BundleError, match=r"a reads 'b' before anything makes it"):
        check_graph(graph.serialize(), None, VERSIONS)


def test_a_node_that_reads_itself_is_not_a_valid_graph() -> None:
    graph = Graph(21)
    graph.node("Add", ["a", "x"], ["a"])
    with pytest.raises(BundleError, match="before anything makes it"):
        check_graph(graph.serialize(), None, VERSIONS)


def test_a_tensor_made_twice_is_not_a_valid_graph() -> None:
    graph = Graph(21)
    graph.node("Neg", ["x"], ["a"])
    graph.node("Neg", ["x"], ["a"])
    with pytest.raises(BundleError, match="made twice"):
        check_graph(graph.serialize(), None, VERSIONS)


@pytest.mark.parametrize("domain", ["", "own", NAMESPACE])
@pytest.mark.parametrize("operator", ["top_k_parts", "top_k_merge", "attention_parts"])
def test_an_own_plugins_name_promises_no_number_of_outputs(operator: str, domain: str) -> None:
    for outputs in (["y"], ["y", "a", "b", "c"]):
        graph = Graph(21)
        graph.node(operator, ["x"], outputs, domain=domain)
        graph.outputs["y"] = (T.FLOAT16, ("b", 64))
        assert broken(graph, "10.16") == {"domain" if domain else "operators"}


BASES = [make().serialize() for make in (int4_graph, w8a8_graph, attention_graph)]


@pytest.mark.slow
@settings(max_examples=600, deadline=None)
@given(
    st.sampled_from(BASES).flatmap(
        lambda base: (
            st.integers(0, len(base)).map(lambda n: base[:n])
            | st.builds(
                lambda at, value: base[:at] + value + base[at + len(value) :],
                st.integers(0, len(base) - 1),
                st.binary(min_size=1, max_size=10),
            )
        )
    )
)
def test_a_damaged_graph_is_a_bundle_error_or_has_a_verdict(data: bytes) -> None:
    with suppress(BundleError):
        assert len(check_graph(data, Path("/nonexistent"), VERSIONS)) == len(VERSIONS)


@pytest.mark.slow
def test_every_single_byte_of_a_graph_may_be_wrong() -> None:
    for base in BASES:
        for at in range(len(base)):
            for value in (0x00, 0x7F, 0x80, 0xFF, base[at] ^ 0x08):
                with suppress(BundleError):
                    check_graph(base[:at] + bytes([value]) + base[at + 1 :], None, VERSIONS[:1])


@given(st.integers(0, 0xFFFF))
def test_fp16_scales_are_judged_by_their_bits_as_by_their_values(bits: int) -> None:
    value = np.array([bits], np.uint16).view(np.float16)
    usable = bool(np.isfinite(value[0]) and value[0] > 0)
    with np.errstate(invalid="ignore"):  # Arm says that the cast quiets a signalling NaN
        wide = value.astype(np.float32)
    assert facts_module._all_usable(value) is usable
    assert facts_module._all_usable(wide) is usable
