"""Makes ONNX Runtime's CPU compute every token of a step alike, however many there are.

Its products of packed weights (MatMulNBits) use different kernels for one row, for a pair, and for
the odd row that is left. If these sum a row's parts in different orders, a sequence's results
depend on what runs beside it. A last bit is enough: activations are rounded to int8 after it, and a
greedy answer may change. Observed with ONNX Runtime 1.32: on x86 with AVX-512, kernels for groups
of 32 agree, but those for larger groups do not for a lone or last odd row. With AVX2 (emulated),
INT4 rows agree from two on, and a lone row differs. Attention also sums a single token in its own
way.

So groups are cut to 32 at load, which changes no weight, and a lone token of a decode step runs
beside an idle slot if necessary. Whether that is enough is found by trying, not by rules for
processors (`find_unevenness`). The scheduler sees to it that prompts run no lone token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.backends import Backend
from edge.backends.step import step_after
from edge.bundle.onnx_file import Node, OnnxFile, attribute
from edge.bundle.onnx_values import node_attributes

_GROUP = 32
_CHUNK = 6  # tokens of the trial's prompt, or fewer if a step or a slot holds fewer


def cut_groups(graph: OnnxFile, bundle: Path) -> None:
    """Cut groups of more than 32 weights to 32, each with the scale of the whole group.

    Args:
        graph: a decoder with FP32 scales, its planes joined.
        bundle: directory of its weights.
    """
    graph.prune()  # drops high planes
    stored = graph.external_tensors()
    values: dict[str, NDArray[Any]] = {}

    def value(name: str) -> NDArray[Any]:
        if name in graph.in_memory:
            return graph.in_memory[name]
        return stored[name].read(bundle)

    for node in graph.nodes:
        size = node_attributes(node).get("block_size", 0)
        if size <= _GROUP or size % _GROUP:
            continue
        times = size // _GROUP
        if node.op_type == "MatMulNBits":
            weight, scale = node.inputs[1:3]
            packed = value(weight)  # [out, groups, bytes]
            values[weight] = packed.reshape(len(packed), -1, packed.shape[2] // times)
            values[scale] = value(scale).repeat(times, axis=1)
        elif node.op_type == "DequantizeLinear":
            values.update((name, value(name).repeat(times, axis=0)) for name in node.inputs[1:])
        else:
            continue
        _set_block_size(node)
    if values:
        graph.put_in_memory(values)


def find_unevenness(backend: Backend, hidden_size: int) -> str | None:
    """Try whether a token's numbers depend on what runs beside it; the cache must be empty.

    A sequence runs in chunks cut at several places, then one token of it alone and beside others.
    All must agree in every bit. It takes about a dozen short steps and leaves rows that the first
    real tokens overwrite.

    Returns:
        A description of the difference; None if there is none.
    """
    random = np.random.default_rng(0)
    slots = list(range(min(backend.num_slots, 3)))
    before = min(_CHUNK, backend.max_step_tokens, backend.capacity - 1)
    embeds = random.standard_normal((len(slots), before + 1, hidden_size), np.float32)

    def run(slots: list[int], start: int, end: int) -> NDArray[np.float32]:
        part = embeds[slots, start:end]
        last = np.full((len(slots), 1), end - start - 1)
        logits = backend.forward(step_after(slots, [start] * len(slots), part, last))
        return np.array(logits)

    whole, rows = run([0], 0, before), backend.read_slot(0, before)
    for first in range(2, before - 1):
        run([0], 0, first)
        logits = run([0], first, before)
        found = backend.read_slot(0, before)
        if not (
            np.array_equal(logits, whole)
            and all(np.array_equal(array, rows[name]) for name, array in found.items())
        ):
            return f"a prompt of {before} tokens in chunks of {first} and {before - first}"
    for slot in slots[1:]:
        run([slot], 0, before)
    alone = [run([slot], before, before + 1)[0] for slot in slots]
    for count in range(2, len(slots) + 1):
        together = run(slots[:count], before, before + 1)
        if not all(map(np.array_equal, together, alone)):
            return f"{count} sequences in one step and one after the other"
    return None


def _set_block_size(node: Node) -> None:
    kept = [data for data in node.attributes if b"block_size" not in data]
    node.attributes = [*kept, attribute("block_size", _GROUP)]
