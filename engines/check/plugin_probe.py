"""Tests whether TensorRT builds edge-llm's own kernels here, by one small engine per plugin kind.

``edge-llm doctor`` runs ``python -m engines.check.plugin_probe DEPTH COLUMNS`` in a process of its
own, because a library may crash it. It prints a line of JSON per kind. A builder times a plugin's
kernels, so whatever is built has run on this GPU.
"""

from __future__ import annotations

import os
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from edge.backends.tensorrt.launch_rules import BLOCK, NAMESPACE, PRODUCT
from edge.bundle.engine_file import Plugins
from edge.bundle.onnx_file import ELEMENT_NUMBERS, Message, OnnxFile, small_model, tensor_info
from edge.bundle.schemes import INT4_GROUP_SIZE
from edge.errors import BundleError, EdgeError
from edge_lab.doctor.scheme_probe import Verdict
from edge_make.engine_layers import parse_inspector
from edge_make.progress import silent
from engines.builder.target import Target, find_target
from engines.compiler import compat, support
from engines.compiler.compat import Compiler
from engines.graph.plugin_nodes import plugin_node
from engines.profiles import Profile, ShapeRange

_WORKSPACE_BYTES = 256 << 20
_HALF = 0x3800


def probe_plugins(target: Target, widths: tuple[int, int]) -> Iterator[Verdict]:
    """Build a product of one row with INT4 weights, in the groups that an export uses.

    Args:
        target: TensorRT and the GPU to build for.
        widths: number of inputs, which is rounded up to whole groups, and of outputs.

    Yields:
        A verdict for each kind of plugin that this TensorRT has, named after the kind.
    """
    kinds: tuple[Plugins, ...] = ("python",)
    if compat.plugins_of(target.rt) == "compiled":
        kinds = ("compiled", "python")
    for kind in kinds:
        started = time.perf_counter()
        try:
            built, detail = True, _build(target, kind, widths)
        except EdgeError as error:
            built, detail = False, " ".join(str(error).split())
        yield Verdict(kind, built, detail, round(time.perf_counter() - started, 3))


def _build(target: Target, kind: Plugins, widths: tuple[int, int]) -> str:
    """Build a plugin; return the kernel that it became, if the engine's inspector says.

    Raises:
        EdgeError: the build failed.
    """
    rt = target.rt
    support.check_own_kernels(rt.flavour, rt.version, target.compute_capability)
    compat.register_own_kernels(rt, target.compute_capability, kind)
    depth = -(-widths[0] // INT4_GROUP_SIZE) * INT4_GROUP_SIZE
    shape = (1, 1, depth)
    profile = Profile("decode", {"x": ShapeRange(shape, shape, shape)})
    compiler = Compiler(rt, lambda _severity, _text: None)
    compiler.parse(_graph(kind, depth, widths[1]), Path("plugin.onnx"), "slice")
    plan, _ = compiler.build(
        [profile],
        workspace_bytes=_WORKSPACE_BYTES,
        opt_level=3,
        timings=None,
        compute_capability=None,
        progress=silent,
    )
    try:
        table = parse_inspector(compat.inspect_plan(rt, plan, 1), [profile.name])
    except BundleError:  # the inspector lists no layers
        return "built"
    return f"built as {', '.join(layer.kernel for layer in table.layers if not layer.reformats)}"


def _graph(kind: Plugins, depth: int, columns: int) -> bytes:
    groups = depth // INT4_GROUP_SIZE
    weights = [
        _tensor("weights", "int32", (depth // BLOCK, 1, columns, 4), bytes(depth * columns // 2)),
        _tensor("scales", "fp16", (groups, columns), struct.pack("<H", _HALF) * groups * columns),
        _tensor("bias", "fp16", (columns,), bytes(2 * columns)),
    ]
    half = ELEMENT_NUMBERS["fp16"]
    graph = small_model(
        [plugin_node(PRODUCT, ["x", "weights", "scales", "bias"], ["y"], "probe", kind, 1)],
        [tensor_info("x", half, ("batch", "seq", depth))],
        [tensor_info("y", half, ("batch", "seq", columns))],
        weights=weights,
        opset=21,
    )
    file = OnnxFile(graph)
    file.use_domain(NAMESPACE, 1)
    return file.serialize()


def _tensor(name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> Message:
    tensor = Message()
    for size in shape:
        tensor.add(1, size)
    return tensor.add(2, ELEMENT_NUMBERS[dtype]).add(8, name).add(9, data)


def main(arguments: list[str]) -> None:
    """Print a line of JSON per kind; output of libraries goes to standard error."""
    depth, columns = map(int, arguments)
    output = os.dup(1)
    os.dup2(2, 1)
    for verdict in probe_plugins(find_target(), (depth, columns)):
        os.write(output, msgspec.json.encode(verdict) + b"\n")


if __name__ == "__main__":
    main(sys.argv[1:])
