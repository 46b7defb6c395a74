"""Detects by scratch memory whether a step of a compiled engine unpacks weights.

An engine with packed weights may still unpack them while it runs: the compiler then reserves room
for the unpacked copy, and every step writes and reads it. Only the compiler's log shows that.

So a decode step of one sequence is compiled twice, as it is and with float weights, and the two
amounts of scratch memory are compared. One sequence is best, because kernels for more take room of
their own that differs with the type of the weights: by up to 30 % for a legal graph, measured with
TensorRT for RTX 1.7.1 in the shapes of SmolLM2. With one sequence the two agree within 0.1 %.
A layer of every kind and the lm_head are enough, since with one sequence 1, 4 and 30 layers take
the same within 0.2 %. So this takes seconds and the memory of one layer in floats; to compile the
whole model in floats would take two to four times the memory of the check itself. A bound from the
dimensions would not do: eight sequences in dialect ``portable`` take 185 MB with four layers, in
floats and INT4 alike, and only the compiler knows why.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edge.bundle import io_spec
from edge.bundle.onnx_file import OnnxFile
from edge.bundle.onnx_values import ELEMENT_BITS
from edge.model.parts import Layer
from edge.model.spec import ModelSpec
from edge_make.graph_edits import put_in_file
from edge_make.progress import silent
from engines.build_plan import BuildPlan, plan_build
from engines.compiler.compat import Compiler, TensorRT
from engines.graph.adapt import graph_of
from engines.profiles import Profile
from engines.rules.facts import GraphFacts

EXCESS = 0.05
"""How far a decode step may exceed its scratch memory with float weights, as a share of it."""
LEAST_BYTES = 16 << 20
"""Scratch memory to assume with float weights if they take less: room for two kernels that share
the sums of a product, 8.2 MB each. Products of a few hundred columns use none of them in floats and
up to two with packed weights, by measurement. Unpacked weights of so few bytes would go unseen."""
_REPORTED = re.compile(r"Max Scratch Memory: (\d+) bytes")
_ROUNDS, _HIGH_PRODUCT = "QuantizeLinear", ".high_product"
_ZEROS, _ALIGNMENT = "zeros", 4096


def scratch_by_profile(log: Sequence[str], profiles: Sequence[Profile]) -> dict[str, int]:
    """Read the bytes of each profile from a build's messages; empty if one is not named."""
    found = [int(match[1]) for line in log if (match := _REPORTED.search(line))]
    if len(found) != len(profiles):
        return {}
    return {profile.name: size for profile, size in zip(profiles, found, strict=True)}


@dataclass(frozen=True)
class DecodeScratch:
    """Scratch memory of a decode step of one sequence, in bytes.

    Attributes:
        packed: bytes with the weights of the bundle.
        floats: bytes with float weights in their place.
    """

    packed: int
    floats: int

    @property
    def problems(self) -> list[str]:
        """Say in one sentence that weights are unpacked; empty if they are not."""
        most = (1 + EXCESS) * max(self.floats, LEAST_BYTES)
        if self.packed <= most:
            return []
        return [
            f"a decode step takes {self.packed:,} bytes of scratch memory, with float weights "
            f"{self.floats:,}: weights are unpacked in every step; export the bundle again"
        ]


def compare_decode_scratch(
    build: BuildPlan, rt: TensorRT, compute_capability: str
) -> DecodeScratch | None:
    """Compile a decode step with the bundle's weights and with floats.

    Args:
        build: the plan to check; its bundle's files are verified already.
        rt: the TensorRT to compile with.
        compute_capability: compute capability of the GPU to compile for.

    Returns:
        The scratch memory of both; None if no weight is packed, or if TensorRT does not say how
        much it takes.

    Raises:
        BuildError: a step does not compile.
    """
    single = plan_build(replace(build.config, max_batch=1), build.manifest)
    path = build.config.bundle.resolve() / build.manifest.graphs.decoder
    graph = one_of_each_kind(graph_of(build), build.manifest.model)
    twin, num_bytes = in_floats(graph)
    if twin == graph:
        return None
    packed = _decode_scratch(graph, path, single, build, rt, compute_capability)
    with tempfile.TemporaryDirectory() as folder:
        with (Path(folder) / _ZEROS).open("wb") as file:
            file.truncate(num_bytes)  # takes no room on the disk
        where = Path(folder) / path.name
        floats = _decode_scratch(twin, where, single, build, rt, compute_capability)
    return None if packed is None or floats is None else DecodeScratch(packed, floats)


def _decode_scratch(
    graph: bytes,
    path: Path,
    single: BuildPlan,
    build: BuildPlan,
    rt: TensorRT,
    compute_capability: str,
) -> int | None:
    inputs = {info.name for info in OnnxFile(graph).inputs}
    profiles = [
        Profile(each.name, {name: each.inputs[name] for name in each.inputs if name in inputs})
        for each in single.profiles
        if each.name == "decode"
    ]
    lines: list[str] = []
    compiler = Compiler(rt, lambda _severity, message: lines.append(message))
    compiler.parse(graph, path, build.kv_read, build.attention)
    compiler.build(
        profiles,
        workspace_bytes=build.config.workspace_bytes,
        opt_level=build.config.opt_level,
        timings=None,
        compute_capability=compute_capability,
        progress=silent,
    )
    return scratch_by_profile(lines, profiles).get("decode")


def one_of_each_kind(data: bytes, model: ModelSpec) -> bytes:
    """Leave out decoder layers with the parts of an earlier one, and weights stored like its.

    Args:
        data: bytes of a decoder.
        model: its layers.

    Returns:
        A decoder with fewer layers that reads the same weight files.
    """
    graph, facts = OnnxFile(data), GraphFacts(OnnxFile(data))
    kinds: set[tuple[Layer, frozenset[tuple[object, ...]]]] = set()
    skipped: dict[str, str] = {}
    dropped: set[str] = set()
    last = io_spec.INPUTS_EMBEDS
    for layer, parts in model.each_layer():
        if io_spec.past_key(layer) not in facts.inputs:
            continue
        kind, output = (parts, _kind(facts, layer)), io_spec.layer_output(layer)
        if kind in kinds:
            skipped[output] = last
            dropped |= {io_spec.past_key(layer), io_spec.past_value(layer)}
            dropped |= {io_spec.present_key(layer), io_spec.present_value(layer)}
            dropped |= {io_spec.new_key(layer), io_spec.new_value(layer)}
        else:
            kinds.add(kind)
            last = output
    for node in graph.nodes:
        node.inputs = [skipped.get(name, name) for name in node.inputs]
    graph.remove_values(dropped)
    return graph.serialize()


def _kind(facts: GraphFacts, layer: int) -> frozenset[tuple[object, ...]]:
    """Describe how the weights of a layer are stored."""
    prefix = f"layers.{layer}."
    quantized = (
        (
            *(quant.data.removeprefix(prefix), quant.dtype, quant.data_shape),
            *(quant.scale_shape, facts.dtype(quant.scale)),
        )
        for quant in facts.quant_nodes
        if quant.data.startswith(prefix) and quant.data_shape is not None
    )
    products = (
        (node.name.removeprefix(prefix), facts.dtype(node.input(0)))
        for node in facts.nodes
        if node.op_type == "MatMul" and node.name.startswith(prefix)
    )
    return frozenset((*quantized, *products))


def in_floats(data: bytes) -> tuple[bytes, int]:
    """Replace packed weights by floats.

    Two planes become one product, and INT8 inputs become floats, too. All values are read from a
    file of zeros: the scratch memory does not depend on values.

    Args:
        data: bytes of a decoder.

    Returns:
        The other decoder, and the size that the file ``zeros`` beside it must have. A decoder
        without packed weights is returned as it is.
    """
    graph, facts = OnnxFile(data), GraphFacts(OnnxFile(data))
    floats = {
        quant.node.node.outputs[0]: (facts.dtype(quant.scale), quant.data_shape)
        for quant in facts.quant_nodes
        if quant.dequantizes and quant.data_shape is not None
    }
    if not floats:
        return data, 0
    graph.nodes = [node for node in graph.nodes if node.outputs[0] not in floats]
    _join_planes(graph)
    _keep_inputs(graph)
    tensors = {name: (each.dtype, each.shape) for name, each in graph.external_tensors().items()}
    end = 0
    for name, (dtype, shape) in {**tensors, **floats}.items():
        assert dtype is not None
        assert shape is not None
        # TensorRT refuses weights of different sizes in one place.
        num_bytes = (math.prod(shape) * ELEMENT_BITS[dtype] + 7) // 8
        put_in_file(graph, name, dtype, shape, (_ZEROS, end, num_bytes))
        end += num_bytes + -num_bytes % _ALIGNMENT
    return graph.serialize(), end


def _keep_inputs(graph: OnnxFile) -> None:
    """Let products read their inputs before these are rounded to INT8."""
    before = {node.outputs[0]: node.inputs[0] for node in graph.nodes if node.op_type == _ROUNDS}
    floats = {
        node.outputs[0]: before[node.inputs[0]]
        for node in graph.nodes
        if node.op_type == "DequantizeLinear" and node.inputs[0] in before
    }
    for node in graph.nodes:
        node.inputs = [floats.get(name, name) for name in node.inputs]


def _join_planes(graph: OnnxFile) -> None:
    """Drop the high planes' products; the low plane's product takes the name of the sum."""
    makers = {name: node for node in graph.nodes for name in node.outputs}
    kept = []
    for node in graph.nodes:
        high = next((name for name in node.inputs if name.endswith(_HIGH_PRODUCT)), None)
        if node.op_type == "Add" and high is not None:
            (product,) = (name for name in node.inputs if name != high)
            makers[product].outputs = list(node.outputs)
        else:
            kept.append(node)
    graph.nodes = kept
