"""The table of rules against releases that were written down by hand from NVIDIA's documents.

`VERSIONS` has a column for each JetPack; what lies between two of them is judged here. Whoever
moves a step of the table must have read another document than these. Read for this file: the
operators of 10.0, 10.1, 10.14, 11.0 and 11.2, and opset 25 of 11.5. The other releases are those
that the table's sources name, written down a second time.
"""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from engines.rules.check import check_graph
from engines.rules.table import OPERATOR_SINCE, RULES, Release, version_of
from tests.engines.rules.test_rules import Graph, T

RELEASES = [(10, minor) for minor in range(17)] + [(11, minor) for minor in range(6)]
# docs/Changelog.md of onnx-tensorrt 10.1, the notes of its release 10.14, and those of
# NVIDIA/TensorRT 11.0 and 11.2; for 10.4, 10.5 and 10.15 see `engines.rules.table`.
ADDED: dict[str, Release] = {
    "DeformConv": (10, 1),
    "BlackmanWindow": (10, 4),
    "HammingWindow": (10, 4),
    "HannWindow": (10, 4),
    "STFT": (10, 5),
    "Attention": (10, 14),
    "RotaryEmbedding": (10, 15),
    "RMSNormalization": (10, 15),
    "TensorScatter": (10, 15),
    "Swish": (11, 0),
    "DFT": (11, 2),
}
ALWAYS = ("MatMul", "DequantizeLinear", "TopK", "Gelu")
NEVER = ("BitShift", "Col2Im", "Bernoulli")
# The 149 operators with a Y in docs/operators.md of onnx-tensorrt 10.0-GA, sorted, one a line.
OPERATORS_OF_10_0 = "1c2b7fc94d19c715d01e88e058ddba67c7b308822940c0aab74a59f89ca2f358"

# Rules that change, by the first release of each value; None: the rule does not hold.
CHANGES: dict[str, dict[Release, Any]] = {
    # Changelog.md of onnx-tensorrt 10.0 (INT4); release notes of 10.9, 10.13 and 11.5.
    "opset": {(10, 0): 21, (10, 9): 22, (10, 13): 24, (11, 5): 25},
    "opset-documented": {(10, 0): 20, (10, 9): None},
    # NvInfer.h of 10.3, 10.7 and 10.13: IQuantizeLayer, IDequantizeLayer.
    "quantized-type": {
        (10, 0): ("int8", "int4", "fp8"),
        (10, 13): ("int8", "int4", "fp8", "fp4"),
    },
    "block-type": {(10, 0): ("int4",), (10, 13): ("int4", "fp8", "fp4")},
    "scale-constant": {(10, 0): True, (10, 13): None},
    "scale-input-type": {(10, 0): ("fp32", "fp16", "bf16"), (10, 13): ("fp16", "bf16")},
    # github.com/NVIDIA/TensorRT/issues/4832
    "int8-half-scale": {(10, 0): None, (10, 16): ("fp16", "bf16"), (11, 0): None},
}


def refused(graph: Graph, release: Release) -> set[str]:
    (found,) = check_graph(graph.serialize(), None, [version_of("tensorrt", release)])
    return {finding.rule for finding in found.refusals}


@pytest.mark.parametrize("operator", [*ADDED, *ALWAYS, *NEVER])
def test_an_operator_is_taken_from_its_release_on(operator: str) -> None:
    graph = Graph(21)
    graph.node(operator, ["x"], ["y"])
    graph.outputs["y"] = (T.FLOAT16, ("b", 64))
    first = ADDED.get(operator, (10, 0) if operator in ALWAYS else (99, 0))
    taken = [release for release in RELEASES if "operators" not in refused(graph, release)]
    assert taken == [release for release in RELEASES if release >= first]


def test_the_operators_of_the_first_release_are_those_of_its_document() -> None:
    first = sorted(name for name, since in OPERATOR_SINCE.items() if since == (10, 0))
    assert hashlib.sha256("\n".join(first).encode()).hexdigest() == OPERATORS_OF_10_0
    assert OPERATOR_SINCE.keys() - first == ADDED.keys()


@pytest.mark.parametrize(
    ("opset", "first"),
    [(21, (10, 0)), (22, (10, 9)), (23, (10, 13)), (24, (10, 13)), (25, (11, 5))],
)
def test_an_opset_is_read_from_its_release_on(opset: int, first: Release) -> None:
    graph = Graph(opset)
    graph.node("Identity", ["x"], ["y"])
    graph.outputs["y"] = (T.FLOAT16, ("b", 64))
    taken = [release for release in RELEASES if not refused(graph, release)]
    assert taken == [release for release in RELEASES if release >= first]


@pytest.mark.parametrize("name", CHANGES)
def test_a_rule_changes_with_its_release(name: str) -> None:
    (rule,) = (rule for rule in RULES if rule.name == name)
    for release in RELEASES:
        step = rule.at(version_of("tensorrt", release))
        expected = CHANGES[name][max(since for since in CHANGES[name] if since <= release)]
        assert (None if step is None else step.value) == expected, release


def test_no_other_rule_changes() -> None:
    for rule in RULES:
        if rule.name not in CHANGES:
            assert {step.since for step in rule.steps} <= {(10, 0)}, rule.name
