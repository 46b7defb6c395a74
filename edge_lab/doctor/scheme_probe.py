"""Tests which precisions and operators a TensorRT takes, by building engines of one layer each.

Each graph is the exporter's own pattern, so a verdict holds for bundles: what fails here in seconds
would fail in a build of minutes. INT4 layers have the exported group sizes and a bundle's own
widths, since both decide which kernel takes them. Nothing is read or written.
"""

from __future__ import annotations

import importlib
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from edge.bundle.onnx_file import (
    ELEMENT_NUMBERS,
    Message,
    Node,
    attribute,
    small_model,
    tensor_info,
)
from edge.bundle.schemes import GROUP_SIZES, INT4_GROUP_SIZE
from edge.errors import BundleError
from edge_make.engine_layers import parse_inspector

_WIDTH, _OUT = 256, 64
WIDE = (1536, 8960)
"""Inputs and outputs of the 1.5B's widest layers; they are used where no bundle is named."""
_HEADS, _KV_HEADS, _HEAD_DIM, _ROWS = 12, 2, 128, 512  # attention of the 1.5B
_WORKSPACE_BYTES = 256 << 20
_FP16_SMALL = 0x2000  # 2^-7


class Verdict(msgspec.Struct, frozen=True):
    """TensorRT's answer to one graph.

    Attributes:
        scheme: name of the graph, a key of `SCHEMES`.
        built: whether there is an engine.
        detail: the engine's layers, or the reason from the parser or the builder.
        seconds: time for parsing and building.
    """

    scheme: str
    built: bool
    detail: str
    seconds: float


class Scheme(NamedTuple):
    """One graph.

    Attributes:
        title: name of the graph, for people.
        make: function that makes the ONNX file.
        needed_by: the exports that cannot be built without it.
        instead: the way out where it is refused.
        group: INT4 weights that share a scale; ``make`` then takes it and the widths. 0 is another
            precision, whose ``make`` takes nothing.
    """

    title: str
    make: Callable[..., bytes]
    needed_by: str
    instead: str
    group: int = 0


def _weight(name: str, dtype: str, shape: Sequence[int], data: bytes) -> Message:
    """Make a TensorProto."""
    tensor = Message()
    for size in shape:
        tensor.add(1, size)
    return tensor.add(2, ELEMENT_NUMBERS[dtype]).add(8, name).add(9, data)


def _halves(name: str, count: int, shape: Sequence[int], bits: int = _FP16_SMALL) -> Message:
    return _weight(name, "fp16", shape, struct.pack("<H", bits) * count)


def _matmul_model(
    nodes: list[Node], weights: list[Message], widths: tuple[int, int] = (_WIDTH, _OUT)
) -> bytes:
    fp16 = ELEMENT_NUMBERS["fp16"]
    return small_model(
        nodes,
        [tensor_info("x", fp16, ("batch", 1, widths[0]))],
        [tensor_info("y", fp16, ("batch", 1, widths[1]))],
        weights=weights,
        opset=21,
    )


def _float() -> bytes:
    weight = _halves("w", _WIDTH * _OUT, (_WIDTH, _OUT))
    return _matmul_model([Node("MatMul", ["x", "w"], ["y"], "y/MatMul")], [weight])


def _int4(name: str, group: int, widths: tuple[int, int]) -> tuple[Node, list[Message]]:
    """Make INT4 weights in groups along the input, and their scales; every weight is 1."""
    depth, columns = widths
    groups = depth // group
    node = Node(
        "DequantizeLinear",
        [f"{name}.weight", f"{name}.scale"],
        [f"{name}.dequantized"],
        f"{name}.dequantized/DequantizeLinear",
        attributes=[attribute("axis", 0), attribute("block_size", group)],
    )
    return node, [
        _weight(f"{name}.weight", "int4", widths, b"\x11" * (depth * columns // 2)),
        _halves(f"{name}.scale", groups * columns, (groups, columns)),
    ]


def _int4_blocked(group: int, widths: tuple[int, int]) -> bytes:
    dequantize, weights = _int4("w", group, widths)
    product = Node("MatMul", ["x", "w.dequantized"], ["y"], "y/MatMul")
    return _matmul_model([dequantize, product], weights, widths)


def _int4_planes(group: int, widths: tuple[int, int]) -> bytes:
    nodes, weights = [], []
    for plane in ("high", "low"):
        dequantize, stored = _int4(plane, group, widths)
        product = Node(
            "MatMul",
            ["x", f"{plane}.dequantized"],
            [f"{plane}.product"],
            f"{plane}.product/MatMul",
        )
        nodes += [dequantize, product]
        weights += stored
    nodes.append(Node("Add", ["high.product", "low.product"], ["y"], "y/Add"))
    return _matmul_model(nodes, weights, widths)


def _w8a8(scales: Literal["fp16", "fp32"]) -> bytes:
    return _matmul_model(*_int8_product("x", "y", scales))


def _int8_product(
    x: str, y: str, scales: Literal["fp16", "fp32"]
) -> tuple[list[Node], list[Message]]:
    """Multiply inputs and weights on INT8 grids; their scales may differ in type from the graph."""
    wide, grid = scales == "fp32", ["x.scale", "zero"]
    one, weight = ("x.wide", "w.narrow") if wide else (x, "w.d")
    nodes = [
        Node("QuantizeLinear", [one, *grid], ["x.q"], "x.input.quantized/QuantizeLinear"),
        Node("DequantizeLinear", ["x.q", *grid], ["x.d"], "x.input.dequantized/DequantizeLinear"),
        Node(
            "DequantizeLinear",
            ["w", "w.scale"],
            ["w.d"],
            "w.dequantized/DequantizeLinear",
            attributes=[attribute("axis", 1)],
        ),
        Node("MatMul", ["x.narrow" if wide else "x.d", weight], [y], f"{y}/MatMul"),
    ]
    if wide:
        nodes = [
            _cast(x, "x.wide", "fp32"),
            *nodes[:2],
            _cast("x.d", "x.narrow", "fp16"),
            nodes[2],
            _cast("w.d", "w.narrow", "fp16"),
            nodes[3],
        ]
    return nodes, [
        _scales("x.scale", scales, ()),
        _weight("zero", "int8", (), b"\0"),
        _weight("w", "int8", (_WIDTH, _OUT), b"\1" * (_WIDTH * _OUT)),
        _scales("w.scale", scales, (_OUT,)),
    ]


def _per_token() -> bytes:
    """Make the same product for rotated inputs with a range per token; scales are FP32."""
    # An entry of a Hadamard matrix is negative where its indices share an odd number of bits.
    odd = ((row & column).bit_count() % 2 for row in range(64) for column in range(64))
    eighths = (0x3000 | sign << 15 for sign in odd)
    before = [
        Node("Reshape", ["x", "blocks"], ["x.blocks"], "x.input.blocks/Reshape"),
        Node("MatMul", ["x.blocks", "rotation"], ["x.turned"], "x.input.blocks.rotated/MatMul"),
        Node("Reshape", ["x.turned", "joined"], ["x.rotated"], "x.input.rotated/Reshape"),
        Node("Abs", ["x.rotated"], ["x.sizes"], "x.input.sizes/Abs"),
        Node(
            "ReduceMax",
            ["x.sizes", "last"],
            ["x.largest"],
            "x.input.largest/ReduceMax",
            attributes=[attribute("keepdims", 1)],
        ),
        Node("Max", ["x.largest", "least"], ["x.divisor"], "x.input.divisor/Max"),
        Node("Div", ["x.rotated", "x.divisor"], ["x.shares"], "x.input.shares/Div"),
    ]
    nodes, weights = _int8_product("x.shares", "product", "fp32")
    after = Node("Mul", ["product", "x.divisor"], ["y"], "y/Mul")
    return _matmul_model(
        [*before, *nodes, after],
        [
            *weights,
            _weight("rotation", "fp16", (64, 64), struct.pack("<4096H", *eighths)),
            _halves("least", 1, (), 0x0400),  # 2^-14
            _weight("blocks", "int64", (4,), struct.pack("<4q", 0, 0, -1, 64)),
            _weight("joined", "int64", (3,), struct.pack("<3q", 0, 0, -1)),
            _weight("last", "int64", (1,), struct.pack("<q", -1)),
        ],
    )


def _cast(source: str, target: str, dtype: str) -> Node:
    to = attribute("to", ELEMENT_NUMBERS[dtype])
    return Node("Cast", [source], [target], f"{target}/Cast", attributes=[to])


def _scales(name: str, dtype: Literal["fp16", "fp32"], shape: Sequence[int]) -> Message:
    count = shape[0] if shape else 1
    if dtype == "fp16":
        return _halves(name, count, shape)
    return _weight(name, dtype, shape, struct.pack("<f", 2.0**-7) * count)


def _attention() -> bytes:
    """Make a decode step of masked attention over as many cache rows as the mask has."""
    fp16, boolean = ELEMENT_NUMBERS["fp16"], ELEMENT_NUMBERS["bool"]
    cache = ("batch", _KV_HEADS, "kv", _HEAD_DIM)
    query = ("batch", _HEADS, 1, _HEAD_DIM)
    scale = attribute("scale", _HEAD_DIM**-0.5)
    return small_model(
        [
            Node(
                "Attention",
                ["q", "k", "v", "mask"],
                ["y"],
                "y.attended/Attention",
                attributes=[scale],
            )
        ],
        [
            tensor_info("q", fp16, query),
            tensor_info("k", fp16, cache),
            tensor_info("v", fp16, cache),
            tensor_info("mask", boolean, ("batch", 1, 1, "kv")),
        ],
        [tensor_info("y", fp16, query)],
        opset=24,
    )


def _kv_update() -> bytes:
    fp16 = ELEMENT_NUMBERS["fp16"]
    cache = ("batch", _KV_HEADS, _ROWS, _HEAD_DIM)
    return small_model(
        [
            Node(
                "TensorScatter",
                ["past", "new", "write_indices"],
                ["present"],
                "present/TensorScatter",
                attributes=[attribute("axis", 2)],
            )
        ],
        [
            tensor_info("past", fp16, cache),
            tensor_info("new", fp16, ("batch", _KV_HEADS, 1, _HEAD_DIM)),
            tensor_info("write_indices", ELEMENT_NUMBERS["int64"], ("batch",)),
        ],
        [tensor_info("present", fp16, cache)],
        opset=24,
    )


_PORTABLE = "export with --dialect portable"
SCHEMES: dict[str, Scheme] = {
    "fp16": Scheme("FP16 product", _float, "every bundle", "update TensorRT"),
    **{
        f"int4-g{group}": Scheme(
            f"INT4 weights in groups of {group}",
            _int4_blocked,
            "--quant int4" if group == INT4_GROUP_SIZE else f"--quant int4 --group-size {group}",
            "export with another --group-size, or --quant fp16",
            group,
        )
        for group in GROUP_SIZES[::-1]
    },
    **{
        f"int4-planes-g{group}": Scheme(
            f"INT8 weights as two INT4 planes in groups of {group}",
            _int4_planes,
            "--quant int8" if group == GROUP_SIZES[0] else f"--quant int8 --group-size {group}",
            "export with another --group-size, or --quant fp16",
            group,
        )
        for group in GROUP_SIZES
    },
    "w8a8": Scheme(
        "INT8 weights and activations",
        lambda: _w8a8("fp16"),
        "--quant int8-w8a8",
        "export with --target jetpack7, whose scales are in FP32, or with --quant int4",
    ),
    "w8a8-fp32": Scheme(
        "the same with scales in FP32",
        lambda: _w8a8("fp32"),
        "--quant int8-w8a8 --target jetpack7",
        "export with --quant int4",
    ),
    "w8a8-token": Scheme(
        "the same, rotated and with a range per token",
        _per_token,
        "--quant int8-w8a8, and checkpoints in W8A8 with a scale per token",
        "export with --quant int8 or int4",
    ),
    "attention": Scheme("attention with a mask, decode", _attention, "--dialect native", _PORTABLE),
    "kv-update": Scheme("KV-cache update in place", _kv_update, "--dialect native", _PORTABLE),
}


def probe_schemes(
    module: str = "tensorrt",
    compute_capability: str | None = None,
    *,
    widths: tuple[int, int] = WIDE,
) -> Iterator[Verdict]:
    """Build each of `SCHEMES`.

    Args:
        module: name of the TensorRT to import.
        compute_capability: the GPU to compile for, e.g. ``8.6``, where the machine may have none
            (TensorRT for RTX only); None is the GPU here.
        widths: inputs and outputs of layers in INT4; inputs are rounded up to whole groups.
    """
    most = max(GROUP_SIZES)
    whole = -(-widths[0] // most) * most, widths[1]
    trt = importlib.import_module(module)
    for name, scheme in SCHEMES.items():
        started = time.perf_counter()
        graph = scheme.make(scheme.group, whole) if scheme.group else scheme.make()
        built, detail = _try(trt, graph, compute_capability)
        yield Verdict(name, built, detail, round(time.perf_counter() - started, 3))


def _try(trt: Any, graph: bytes, compute_capability: str | None) -> tuple[bool, str]:
    """Build a graph, with attention in one kernel if that is possible, else in several."""
    built, detail, has_attention = _build(trt, graph, compute_capability, decomposable=False)
    if built or not has_attention:
        return built, detail
    apart, instead, _ = _build(trt, graph, compute_capability, decomposable=True)
    if not apart:
        return False, detail
    return True, f"{instead}, in several kernels only; in one: {detail}"


def _build(
    trt: Any, graph: bytes, compute_capability: str | None, *, decomposable: bool
) -> tuple[bool, str, bool]:
    """Return whether it was built, its layers or the reason, and whether it has attentions."""
    logger = _make_logger(trt)
    builder = trt.Builder(logger)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        reasons = [f"{error.node_operator()}: {_one_line(error.desc())}" for error in errors]
        return False, (reasons or logger.errors or ["the parser gave no reason"])[0], False
    attentions = _attentions(trt, network)
    for attention in attentions:
        attention.decomposable = decomposable
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, _WORKSPACE_BYTES)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if compute_capability is not None:
        target = getattr(trt.ComputeCapability, f"SM{compute_capability.replace('.', '')}")
        config.num_compute_capabilities = 1
        config.set_compute_capability(target, 0)
    config.add_optimization_profile(_profile(builder, network))
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        reason = _one_line(logger.errors[-1]) if logger.errors else "the builder gave no reason"
        return False, reason, bool(attentions)
    return True, _describe(trt, logger, plan), bool(attentions)


def _one_line(reason: str) -> str:
    return " ".join(reason.split())


def _attentions(trt: Any, network: Any) -> list[Any]:
    found = []
    for i in range(network.num_layers if hasattr(trt, "IAttention") else 0):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_OUTPUT:
            layer.__class__ = trt.IAttentionOutputLayer
            found.append(layer.attention)
    return found


def _profile(builder: Any, network: Any) -> Any:
    """Make a profile for one sequence and up to all rows of the cache."""
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        shape = tuple(tensor.shape)
        # The batch is the first dimension; a later one that is dynamic counts rows of the cache.
        least, most = (
            tuple(
                size if size >= 0 else 1 if axis == 0 else rows for axis, size in enumerate(shape)
            )
            for rows in (_ROWS // 2, _ROWS)
        )
        profile.set_shape(tensor.name, least, most, most)
    return profile


def _describe(trt: Any, logger: Any, plan: Any) -> str:
    """List the engine's layers if the plan can be opened here."""
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        return "built"
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        table = parse_inspector([text], ["probe"])
    except BundleError:
        return "built"
    kernels = [
        f"{layer.kernel} ({layer.dtype})"
        for layer in table.layers
        if layer.dtype != "-" and not layer.reformats
    ]
    unpacked = "; UNPACKS its weights each time" if table.summary()[0].unpacking else ""
    return f"built as {', '.join(kernels) or 'no kernel'}{unpacked}"


def _make_logger(trt: Any) -> Any:
    severity = trt.ILogger.Severity

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, level: Any, message: str) -> None:
            if level in (severity.ERROR, severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Logger()
