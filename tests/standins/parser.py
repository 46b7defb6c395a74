"""A stand-in for the ONNX parser of ``tensorrt``.

It takes a graph by the project's own table (`engines.rules`), for the version that it stands for.
What is illegal there is refused by the parser or left to the builder, as the rule's source has it.
What TensorRT takes and answers wrong is a `RuleError`.

What passes here does not prove that TensorRT takes the graph: an error in the table is an error
here, too. The table's own judges are `tests/engines/rules/test_releases.py`, written down from
NVIDIA's documents, and TensorRT for RTX, which compiles (`tests/engines/builder/test_build.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edge.bundle.onnx_file import OnnxFile
from edge.bundle.onnx_values import node_attributes, read_constant
from edge.errors import BundleError
from engines.rules.check import check_facts
from engines.rules.facts import GraphFacts
from engines.rules.table import RULES

from . import plugin_v3
from .cuda import RuleError
from .network import ErrorCode, ILogger, Network, Severity
from .plugin import PLUGINS

# Rules whose breach gives no error and wrong answers, and what this stand-in cannot compute.
SILENT_RULES = {"attention-causal", "subgraph"}
_OF_THE_PARSER = ("onnxOpImporters.cpp", "operators.md", "elease notes", "Changelog.md")


class ParserError:
    """``ParserError``."""

    def __init__(self, node: str, operator: str, desc: str, code: ErrorCode, line: int) -> None:
        self._values = node, operator, desc, code, line

    def node_name(self) -> str:
        return self._values[0]

    def node_operator(self) -> str:
        return self._values[1]

    def desc(self) -> str:
        return self._values[2]

    def code(self) -> ErrorCode:
        return self._values[3]

    def file(self) -> str:
        return "onnxOpImporters.cpp"

    def line(self) -> int:
        return self._values[4]


class OnnxParser:
    """``OnnxParser``."""

    def __init__(self, network: Network, logger: ILogger) -> None:
        self._network, self._logger = network, logger
        self._errors: list[ParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def parse(self, model: bytes, path: str | None = None) -> bool:
        directory = Path(path).parent if path else None
        try:
            graph = OnnxFile(model)
            facts = GraphFacts(graph, directory)
            for each in map(read_constant, graph.initializers):
                file = (directory or Path()) / (each.location or "")
                if each.location is None:
                    continue
                if not file.is_file() or file.stat().st_size < each.offset + each.num_bytes:
                    raise BundleError(f"Failed to open file {file} for {each.name}")
            verdict = check_facts(facts, self._network.pretended.column)
        except BundleError as error:
            code = ErrorCode.MODEL_DESERIALIZE_FAILED
            return self._refuse(ParserError("", "", str(error), code, 0))
        plugins = set(self._find_plugins(graph))
        if self._errors:
            return False
        operators = {node.name: node.op_type for node in facts.nodes}
        lines = {rule.name: line for line, rule in enumerate(RULES, 1)}
        for finding in verdict.refusals:
            if finding.rule == "domain" and plugins.issuperset(finding.nodes):
                continue
            lost = "nonpad_kv_seqlen" in finding.found and "past" not in finding.found
            if finding.rule in SILENT_RULES or lost:
                raise RuleError(f"TensorRT would take this and answer wrong: {finding}")
            if not any(source in finding.source for source in _OF_THE_PARSER):
                self._network.refused.append(finding)
                continue
            node = finding.nodes[0]
            unknown = finding.rule in ("operators", "domain", "opset")
            code = ErrorCode.UNSUPPORTED_NODE if unknown else ErrorCode.INVALID_NODE
            self._refuse(
                ParserError(node, operators.get(node, ""), str(finding), code, lines[finding.rule])
            )
        if self._errors:
            return False
        self._network._take(graph, facts, directory)
        return True

    def _find_plugins(self, graph: OnnxFile) -> Iterator[str]:
        """Names of nodes that are plugins, as FallbackPluginImporter in onnx-tensorrt has it."""
        for node in graph.nodes:
            attributes = node_attributes(node)
            if not node.domain or "plugin_namespace" not in attributes:
                continue  # the table refuses it
            yield node.name
            key = node.op_type, attributes["plugin_version"], attributes["plugin_namespace"]
            if "aot" in attributes:
                found: Any = f"{key[2]}::{key[0]}" in PLUGINS.known and key[1] == "1"
            else:
                try:
                    found = plugin_v3.create(*key, attributes)
                except plugin_v3.FailedError:
                    found = None
                self._network.plugins[node.name] = found
            if not found:
                text = "Plugin not found, are the plugin name, version, and namespace correct?"
                code = ErrorCode.INVALID_NODE
                self._refuse(ParserError(node.name, node.op_type, text, code, 1))

    def _refuse(self, error: ParserError) -> bool:
        self._errors.append(error)
        text = f"ModelImporter.cpp: {error.desc()}"
        self._logger.log(Severity.ERROR, text)
        return False
