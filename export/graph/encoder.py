"""Builds the graph of a vision encoder: pixels of tiles in, rows of ``inputs_embeds`` out.

One form serves both dialects. It is opset 21 and has no operator that TensorRT 10.3 lacks; nothing
in it depends on the tokens of a prompt. Shapes in comments: ``T`` tiles, ``N`` patches of a tile,
``H`` heads, ``D`` head size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import onnx

from edge._version import __version__
from edge.bundle import io_spec
from edge.bundle.manifest import FloatType
from edge.vision.section import IMAGE_ROWS, PIXEL_VALUES
from export.sources.picture_encoder import PROJECTOR_NORM, EncoderSpec

from .data_file import StoredTensor
from .graph_builder import ONNX_TYPE, GraphBuilder
from .linear_nodes import LinearNodes, StoredLinear

_OPSET = io_spec.DIALECTS["portable"].opset
_FP32 = ONNX_TYPE["fp32"]
_TILES = "tiles"
_PROJECTOR_EPS = 1e-5  # PyTorch's own
_WITHOUT_FIRST = (("starts", 1), ("ends", 1 << 31), ("axes", 1))


@dataclass(frozen=True)
class EncoderTensors:
    """Everything stored outside the graph.

    Attributes:
        linears: linear layers by the names of `export.sources.picture_encoder.Vision.linears`.
        norms: weight and bias of each LayerNorm, by name.
        positions: ``[N, hidden]``; with a class token ``[N + 1, hidden]``, whose first row includes
            the token.
        scales: factors on the sums that a layer adds, ``[hidden]``, by the name of the linear layer
            that makes them; empty in a family without.
    """

    linears: Mapping[str, StoredLinear]
    norms: Mapping[str, tuple[StoredTensor, StoredTensor]]
    positions: StoredTensor
    scales: Mapping[str, StoredTensor]


def build_encoder(
    spec: EncoderSpec, float_type: FloatType, tensors: EncoderTensors
) -> onnx.ModelProto:
    """Build the whole encoder, projector included.

    Args:
        spec: its numbers.
        float_type: type of pixels, activations and rows.
        tensors: where the weights are.
    """
    return _Encoder(spec, float_type, tensors).build()


class _Encoder(LinearNodes):
    def __init__(self, spec: EncoderSpec, float_type: FloatType, tensors: EncoderTensors) -> None:
        super().__init__(GraphBuilder(float_type), tensors.linears)
        self.spec = spec
        self.tensors = tensors

    def build(self) -> onnx.ModelProto:
        """Write all nodes, as `build_encoder` describes."""
        g, spec = self.g, self.spec
        x = self.linear(self.patches(), "patches")
        if spec.class_token:  # its row, still empty
            ahead = g.constant("pads.class", [0, 1, 0, 0, 0, 0])
            x = g.node("Pad", [x, ahead], "patches.after_class")
        x = g.node("Add", [x, g.floats(self.tensors.positions)], "embedded")
        for i in range(spec.num_layers):
            x = self.layer(i, x)
        if "final_norm" in self.tensors.norms:
            x = self.norm(x, "final_norm")
        if spec.class_token:
            bounds = [g.constant(f"class.{name}", [value]) for name, value in _WITHOUT_FIRST]
            x = g.node("Slice", [x, *bounds], "patches.alone")
        x = self.joined(x)
        if PROJECTOR_NORM in self.tensors.norms:
            x = self.norm(x, PROJECTOR_NORM, _PROJECTOR_EPS)
            x = self.gelu(self.linear(x, "projector.up"), "projector.gelu")
        self.linear(x, "projector", output=IMAGE_ROWS)
        px = spec.side * spec.patch_px
        kind = g.float_type
        return g.model(
            "vision",
            _OPSET,
            [io_spec.TensorSpec(PIXEL_VALUES, (_TILES, 3, px, px), kind)],
            [io_spec.TensorSpec(IMAGE_ROWS, (_TILES, spec.rows, spec.width), kind)],
            __version__,
        )

    def patches(self) -> str:
        """Cut tiles into patches ``[T, N, 3 * patch * patch]``, a row for each position.

        The published model uses a convolution whose stride is the kernel's size. This does the same
        with a product, since integers are stored for products only.
        """
        g, side, px = self.g, self.spec.side, self.spec.patch_px
        shape = g.constant("shape.cut", [0, 3, side, px, side, px])
        x = g.node("Reshape", [PIXEL_VALUES, shape], "pixels.cut")
        x = g.node("Transpose", [x], "pixels.by_place", perm=[0, 2, 4, 1, 3, 5])
        shape = g.constant("shape.patches", [0, side * side, 3 * px * px])
        return g.node("Reshape", [x, shape], "pixels.patches")

    def layer(self, i: int, x: str) -> str:
        """Add a layer to the residual stream ``x`` ``[T, N, hidden]``."""
        g, name = self.g, f"layers.{i}"
        h = self.linear(self.norm(x, f"{name}.input_norm"), f"{name}.qkv")
        x = g.node(
            "Add", [x, self.scaled(self.attention(name, h), f"{name}.o")], f"{name}.attended.added"
        )
        h = self.gelu(self.linear(self.norm(x, f"{name}.post_norm"), f"{name}.up"), f"{name}.gelu")
        return g.node("Add", [x, self.scaled(h, f"{name}.down")], f"{name}.out")

    def scaled(self, x: str, name: str) -> str:
        """Add a linear layer, and a factor for each of its outputs in a family that has them."""
        x = self.linear(x, name)
        if name not in self.tensors.scales:
            return x
        scale = self.g.floats(self.tensors.scales[name])
        return self.g.node("Mul", [x, scale], f"{name}.scaled")

    def attention(self, name: str, qkv: str) -> str:
        """Let every patch of a tile attend to all of them; return ``[T, N, hidden]``."""
        g, hidden, heads = self.g, self.spec.hidden_size, self.spec.num_heads
        size = hidden // heads
        parts = [f"{name}.{part}" for part in "qkv"]
        split = g.constant("split.qkv", [hidden] * 3)
        g.node("Split", [qkv, split], f"{name}.split", outputs=parts, axis=-1)
        shape = g.constant("shape.heads", [0, 0, heads, size])
        q, k, v = (g.node("Reshape", [part, shape], f"{part}.heads") for part in parts)
        q = g.node("Transpose", [q], f"{name}.q.t", perm=[0, 2, 1, 3])  # [T, H, N, D]
        k = g.node("Transpose", [k], f"{name}.k.t", perm=[0, 2, 3, 1])  # [T, H, D, N]
        v = g.node("Transpose", [v], f"{name}.v.t", perm=[0, 2, 1, 3])
        q = g.node("Mul", [q, g.scalar("attention_scale", 1 / math.sqrt(size))], f"{name}.q.scaled")
        scores = g.node("MatMul", [q, k], f"{name}.scores")
        shares = g.node("Softmax", [scores], f"{name}.softmax", axis=-1)
        mixed = g.node("MatMul", [shares, v], f"{name}.mixed")
        mixed = g.node("Transpose", [mixed], f"{name}.mixed.t", perm=[0, 2, 1, 3])
        return g.node(
            "Reshape", [mixed, g.constant("shape.merge", [0, 0, hidden])], f"{name}.merged"
        )

    def gelu(self, x: str, name: str) -> str:
        """Add ``0.5 x (1 + erf(x / sqrt(2)))``, or the form with tanh in place of erf.

        That form has ``tanh(sqrt(2 / pi) (x + 0.044715 x^3))``. In FP16 its square overflows from
        256 on, which leaves tanh at 1 and the value right.
        """
        g = self.g
        if self.spec.exact_gelu:
            inner = g.node("Mul", [x, g.scalar("gelu.inner", math.sqrt(0.5))], f"{name}.inner")
            share = g.node("Erf", [inner], f"{name}.erf")
        else:
            share = self.tanh_share(x, name)
        share = g.node("Add", [share, g.scalar("one", 1.0)], f"{name}.share")
        half = g.node("Mul", [x, g.scalar("half", 0.5)], f"{name}.half")
        return g.node("Mul", [half, share], f"{name}.out")

    def tanh_share(self, x: str, name: str) -> str:
        """Add the hyperbolic tangent in `gelu`."""
        g = self.g
        square = g.node("Mul", [x, x], f"{name}.square")
        factor = g.scalar("gelu.cubic", 0.044715 * math.sqrt(2 / math.pi))
        inner = g.node("Mul", [square, factor], f"{name}.scaled")
        inner = g.node(
            "Add", [inner, g.scalar("gelu.linear", math.sqrt(2 / math.pi))], f"{name}.sum"
        )
        inner = g.node("Mul", [inner, x], f"{name}.inner")
        return g.node("Tanh", [inner], f"{name}.tanh")

    def norm(self, x: str, name: str, eps: float | None = None) -> str:
        """Add a LayerNorm over the last axis, with statistics in FP32."""
        weight, bias = (self.g.floats(each) for each in self.tensors.norms[name])
        return self.g.node(
            "LayerNormalization",
            [x, weight, bias],
            f"{name}.out",
            axis=-1,
            epsilon=self.spec.eps if eps is None else eps,
            stash_type=_FP32,
        )

    def joined(self, x: str) -> str:
        """Join the patches of each square to a row: ``[T, rows, scale^2 * hidden]``."""
        g, spec = self.g, self.spec
        scale, hidden = spec.scale_factor, spec.hidden_size
        across, wide = spec.side // scale, scale * spec.hidden_size
        # A row of patches is already a row of squares: their edges are side by side.
        shape = g.constant("shape.squares", [-1, scale, across, wide])
        x = g.node("Reshape", [x, shape], "squares.edges")
        x = g.node("Transpose", [x], "squares.t", perm=[0, 2, 1, 3])
        shape = g.constant("shape.rows", [-1, spec.rows, scale * scale * hidden])
        return g.node("Reshape", [x, shape], "squares")
