"""Builds the decoder graph in standard ONNX operators, with the tensors of `edge.bundle.io_spec`.

Both dialects share the layers. They differ in how RMSNorm, RoPE and attention are written and in
who appends to the cache (`edge.bundle.io_spec`). Shapes in comments: ``B`` batch, ``S`` tokens
of the step, ``K`` cache rows read, ``H`` heads, ``G`` KV heads, ``D`` head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import onnx

from edge._version import __version__
from edge.adapters.graph_inputs import linear_inputs
from edge.bundle import io_spec
from edge.bundle.manifest import Dialect, FloatType
from edge.model.spec import ModelSpec

from .data_file import StoredTensor
from .graph_builder import ONNX_TYPE, GraphBuilder
from .kv_quantization import KvScales, dequantized_rows, key_factor, rounded_rows, value_factor
from .linear_nodes import LinearNodes, StoredLinear

_FP32 = ONNX_TYPE["fp32"]


@dataclass(frozen=True)
class HiddenTap:
    """Hidden states that the graph outputs as ``hidden_states`` for a head.

    Attributes:
        layers: three layers whose inputs are joined.
        fc: the matrix that joins them, ``[3 * hidden, width]``.
    """

    layers: tuple[int, int, int]
    fc: StoredTensor


@dataclass(frozen=True)
class DecoderTensors:
    """Everything stored outside the graph.

    Attributes:
        linears: linears by layer name (`edge.bundle.linears.linear_layers`).
        norms: RMSNorm weights by name: ``layers.0.input_norm``, ``layers.0.post_norm``,
            ``layers.0.q_norm``, ``layers.0.k_norm``, ``final_norm``.
        rope_cos, rope_sin: ``[positions, head_dim / 2]``.
        kv_scales: scales of the layers whose cache is in 8 bits, by number.
        tap: hidden states for a head; None for a bundle without one.
        adapters: whether the linears take adapters, of any rank.
    """

    linears: Mapping[str, StoredLinear]
    norms: Mapping[str, StoredTensor]
    rope_cos: StoredTensor
    rope_sin: StoredTensor
    kv_scales: Mapping[int, KvScales] = field(default_factory=dict)
    tap: HiddenTap | None = None
    adapters: bool = False


def build_decoder(
    model: ModelSpec,
    dialect: Dialect,
    float_type: FloatType,
    tensors: DecoderTensors,
    kv_capacity: int,
) -> onnx.ModelProto:
    """Build the whole decoder.

    Args:
        model: the model's dimensions.
        dialect: ``native`` or ``portable``.
        float_type: type of activations, cache and logits.
        tensors: where the weights are.
        kv_capacity: rows of the cache, which only the graph's inputs and outputs mention.
    """
    writer = NativeDecoder if dialect == "native" else PortableDecoder
    return writer(model, float_type, tensors).build(dialect, kv_capacity)


class Decoder(LinearNodes):
    """The part of the decoder that both dialects share."""

    embeds_width: int | None = None
    """Width of ``inputs_embeds`` if it is not the hidden size."""

    def __init__(self, model: ModelSpec, float_type: FloatType, tensors: DecoderTensors) -> None:
        super().__init__(GraphBuilder(float_type), tensors.linears)
        self.model = model
        self.tensors = tensors
        self.adapters = linear_inputs(model, float_type) if tensors.adapters else {}

    def build(self, dialect: Dialect, kv_capacity: int) -> onnx.ModelProto:
        """Write all nodes, as `build_decoder` describes."""
        self.prologue()
        stream = [io_spec.INPUTS_EMBEDS]  # the input of each layer, and the last one's output
        for i in range(self.model.num_layers):
            stream.append(self.layer(i, stream[-1]))
        tap, hidden_width = self.tensors.tap, 0
        if tap is not None:
            hidden_width = tap.fc.dims[1]
            parts = [stream[i] for i in tap.layers]
            joined = self.g.node("Concat", parts, "eagle3.streams", axis=-1)
            self.g.node("MatMul", [joined, self.g.floats(tap.fc)], io_spec.HIDDEN_STATES)
        return self.finish(stream[-1], dialect, kv_capacity, hidden_width)

    def finish(
        self, x: str, dialect: Dialect, kv_capacity: int, hidden_width: int
    ) -> onnx.ModelProto:
        """Add the nodes after the last layer, and make the model."""
        # Only the wanted positions go through the final norm and the lm_head, if there is one.
        axes = self.g.constant("axes.last", [-1])
        indices = self.g.node(
            "Unsqueeze", [io_spec.LOGITS_INDICES, axes], "logits_indices.unsqueezed"
        )
        x = self.g.node("GatherND", [x, indices], "last_hidden", batch_dims=1)
        output = io_spec.output_name(self.model)
        if self.model.task == "embed":
            normed = self.norm(x, "final_norm")
            self.g.node("Identity", [normed], output)
        else:
            self.linear(self.norm(x, "final_norm"), "lm_head", output=output)
        spec = (self.model, dialect, self.g.float_type, kv_capacity, self.tensors.kv_scales)
        inputs = io_spec.decoder_inputs(*spec, self.embeds_width)
        return self.g.model(
            "decoder",
            io_spec.DIALECTS[dialect].opset,
            [*inputs, *(each for pair in self.adapters.values() for each in pair)],
            io_spec.decoder_outputs(*spec, hidden_width),
            __version__,
        )

    def attention_input(self, i: int, x: str) -> tuple[str, str]:
        """Return the input of a layer's q, k and v, and its residual stream."""
        return self.norm(x, f"layers.{i}.input_norm"), x

    def layer(self, i: int, x: str) -> str:
        """Add a layer to the residual stream ``x`` ``[B, S, hidden]``."""
        g, m = self.g, self.model
        name = f"layers.{i}"
        q_width, kv_width = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim
        h, x = self.attention_input(i, x)
        qkv = self.linear(h, f"{name}.qkv")
        g.node(
            "Split",
            [qkv, g.constant("split.qkv", [q_width, kv_width, kv_width])],
            f"{name}.split",
            outputs=[f"{name}.{part}" for part in "qkv"],
            axis=-1,
        )
        q = self.heads(f"{name}.q", m.num_heads, f"{name}.q_norm" if m.qk_norm else None)
        k = self.heads(f"{name}.k", m.num_kv_heads, f"{name}.k_norm" if m.qk_norm else None)
        v = self.heads(f"{name}.v", m.num_kv_heads, None)
        q, k = self.rope(q, f"{name}.q.rope"), self.rope(k, self.key_name(i))
        attended = self.attention(i, q, k, v)
        merged = g.node("Transpose", [attended], f"{name}.attended.t", perm=[0, 2, 1, 3])
        merged = g.node(
            "Reshape", [merged, g.constant("shape.merge", [0, 0, q_width])], f"{name}.merged"
        )
        x = g.node("Add", [x, self.linear(merged, f"{name}.o")], f"{name}.attention_residual")

        h = self.norm(x, f"{name}.post_norm")
        wide = m.intermediate_size
        g.node(
            "Split",
            [self.linear(h, f"{name}.gate_up"), g.constant("split.gate_up", [wide, wide])],
            f"{name}.split_mlp",
            outputs=[f"{name}.gate", f"{name}.up"],
            axis=-1,
        )
        # SiLU in two operators: TensorRT knows `Swish` only from 11.0 on.
        sigmoid = g.node("Sigmoid", [f"{name}.gate"], f"{name}.gate.sigmoid")
        gate = g.node("Mul", [f"{name}.gate", sigmoid], f"{name}.gate.silu")
        h = g.node("Mul", [gate, f"{name}.up"], f"{name}.gated")
        return g.node("Add", [x, self.linear(h, f"{name}.down")], io_spec.layer_output(i))

    def heads(self, x: str, count: int, norm: str | None) -> str:
        """Turn ``[B, S, count * D]`` into ``[B, count, S, D]``, normalised per head for Qwen3."""
        shape = self.g.constant(f"shape.heads.{count}", [0, 0, count, self.model.head_dim])
        x = self.g.node("Reshape", [x, shape], f"{x}.heads")
        if norm is not None:
            x = self.norm(x, norm)
        return self.g.node("Transpose", [x], self.heads_name(x), perm=[0, 2, 1, 3])

    def heads_name(self, x: str) -> str:
        """Return the name of a projection's heads."""
        return f"{x}.t"

    # The dialects differ in the following methods.

    def prologue(self) -> None:
        """Add the nodes that all layers share: the masks."""
        raise NotImplementedError

    def norm(self, x: str, name: str) -> str:
        """Add an RMSNorm over the last axis, in fp32 inside (fp16 squares overflow at 256)."""
        raise NotImplementedError

    def rope(self, x: str, output: str) -> str:
        """Rotate ``[B, heads, S, D]`` by its positions, halves paired (HF's layout)."""
        raise NotImplementedError

    def key_name(self, i: int) -> str:
        """Return the name of a layer's rotated keys."""
        raise NotImplementedError

    def attention(self, i: int, q: str, k: str, v: str) -> str:
        """Add the cache update and the attention; return ``[B, H, S, D]``."""
        raise NotImplementedError


class NativeDecoder(Decoder):
    """The dialect of opset 24: RMSNormalization, RotaryEmbedding, TensorScatter, Attention."""

    def prologue(self) -> None:
        """Add the mask."""
        g = self.g
        # An explicit mask: TensorRT imports `is_causal` as upper-left, which is wrong in decode.
        positions = g.node(
            "Unsqueeze",
            [io_spec.POSITION_IDS, g.constant("axes.1_3", [1, 3])],
            "position_ids.column",
        )
        g.node("LessOrEqual", [io_spec.KV_POSITIONS, positions], "mask")  # [B, 1, S, K]
        g.node("Shape", [io_spec.KV_POSITIONS], "kv_len")

    def norm(self, x: str, name: str) -> str:
        """Add an RMSNorm, as one operator."""
        weight = self.g.floats(self.tensors.norms[name])
        return self.g.node(
            "RMSNormalization",
            [x, weight],
            f"{name}.out",
            axis=-1,
            epsilon=self.model.rms_norm_eps,
            stash_type=_FP32,
        )

    def rope(self, x: str, output: str) -> str:
        """Rotate by one operator."""
        cos, sin = self.g.floats(self.tensors.rope_cos), self.g.floats(self.tensors.rope_sin)
        return self.g.node("RotaryEmbedding", [x, cos, sin, io_spec.POSITION_IDS], output)

    def key_name(self, i: int) -> str:
        """Return the name of a layer's rotated keys."""
        return f"layers.{i}.k.rope"

    def attention(self, i: int, q: str, k: str, v: str) -> str:
        """Write the cache, then attend to its rows."""
        g = self.g
        read = [
            self._cached(i, k, io_spec.past_key(i), io_spec.present_key(i), key_factor),
            self._cached(i, v, io_spec.past_value(i), io_spec.present_value(i), value_factor),
        ]
        return g.node(
            "Attention",
            [q, *read, "mask"],
            f"layers.{i}.attended",
            scale=1.0 / math.sqrt(self.model.head_dim),
        )

    def _cached(
        self,
        i: int,
        new: str,
        past: str,
        present: str,
        make_factor: Callable[[GraphBuilder, int, KvScales], str],
    ) -> str:
        """Write a step's keys or values into the cache; return the rows that attention reads."""
        g, scales = self.g, self.tensors.kv_scales.get(i)
        if scales is not None:
            new = rounded_rows(g, new, make_factor(g, i, scales), f"{present}.new", scales)
        g.node("TensorScatter", [past, new, io_spec.WRITE_INDICES], present, axis=2)
        rows = g.node(
            "Slice",
            [present, g.constant("kv_start", [0]), "kv_len", g.constant("axes.2", [2])],
            f"{present}.read",
        )
        if scales is None:
            return rows
        rows = dequantized_rows(g, rows, scales)
        return g.node("Mul", [rows, make_factor(g, i, scales)], f"{present}.floats")


class PortableDecoder(Decoder):
    """The dialect of opset 21: primitive operators only; the runtime appends to the cache."""

    def prologue(self) -> None:
        """Add the rows of the RoPE tables and the additive masks."""
        g = self.g
        self.rope_rows()
        last, head_axis = g.constant("axes.last", [-1]), g.constant("axes.1", [1])
        # Additive masks are in fp32, the type of the scores. New tokens see each other by
        # position, so that padding after a short sequence is never seen.
        zero = g.scalar("mask.keep", 0.0, "fp32")
        # Not -inf: a row of the past part may be all masked, and -inf minus -inf is NaN.
        drop = g.scalar("mask.drop", -1.0e30, "fp32")
        lengths = g.node("Unsqueeze", [io_spec.PAST_LENGTHS, last], "past_lengths.column")
        valid = g.node("Less", [io_spec.KV_POSITIONS, lengths], "mask.past.valid")  # [B, K]
        valid = g.node("Where", [valid, zero, drop], "mask.past.flat")
        g.node("Unsqueeze", [valid, g.constant("axes.1_2_3", [1, 2, 3])], "mask.past")
        rows = g.node("Unsqueeze", [io_spec.POSITION_IDS, last], "position_ids.column")
        columns = g.node("Unsqueeze", [io_spec.POSITION_IDS, head_axis], "position_ids.row")
        causal = g.node("LessOrEqual", [columns, rows], "mask.new.valid")  # [B, S, S]
        causal = g.node("Where", [causal, zero, drop], "mask.new.flat")
        g.node("Unsqueeze", [causal, g.constant("axes.1_2", [1, 2])], "mask.new")
        g.node("Shape", [io_spec.KV_POSITIONS], "kv_len")
        seq_len = g.node("Shape", [io_spec.POSITION_IDS], "seq_len", start=1, end=2)
        g.node("Concat", ["kv_len", seq_len], "split.scores", axis=0)

    def rope_rows(self) -> None:
        """Add a row of cos/sin per token, broadcast over the heads: ``[B, 1, S, D / 2]``."""
        g = self.g
        for name, table in (("cos", self.tensors.rope_cos), ("sin", self.tensors.rope_sin)):
            rows = g.node("Gather", [g.floats(table), io_spec.POSITION_IDS], f"rope.{name}.rows")
            g.node("Unsqueeze", [rows, g.constant("axes.1", [1])], f"rope.{name}")

    def norm(self, x: str, name: str) -> str:
        """Add an RMSNorm in primitive operators."""
        g = self.g
        fp32 = g.float_type == "fp32"
        wide = x if fp32 else g.node("Cast", [x], f"{name}.fp32", to=_FP32)
        square = g.node("Mul", [wide, wide], f"{name}.square")
        mean = g.node(
            "ReduceMean", [square, g.constant("axes.last", [-1])], f"{name}.mean", keepdims=1
        )
        eps = g.scalar("rms_norm_eps", self.model.rms_norm_eps, "fp32")
        root = g.node("Sqrt", [g.node("Add", [mean, eps], f"{name}.mean_eps")], f"{name}.root")
        normed = g.node("Div", [wide, root], f"{name}.normed")
        if not fp32:
            normed = g.node("Cast", [normed], f"{name}.narrow", to=ONNX_TYPE[g.float_type])
        return g.node("Mul", [normed, g.floats(self.tensors.norms[name])], f"{name}.out")

    def rope(self, x: str, output: str) -> str:
        """Rotate in primitive operators."""
        g = self.g
        half = self.model.head_dim // 2
        first, second = f"{output}.first", f"{output}.second"
        g.node(
            "Split",
            [x, g.constant("split.rope", [half, half])],
            f"{output}.split",
            outputs=[first, second],
            axis=-1,
        )
        low = g.node(
            "Sub",
            [
                g.node("Mul", [first, "rope.cos"], f"{first}.cos"),
                g.node("Mul", [second, "rope.sin"], f"{second}.sin"),
            ],
            f"{output}.low",
        )
        high = g.node(
            "Add",
            [
                g.node("Mul", [second, "rope.cos"], f"{second}.cos"),
                g.node("Mul", [first, "rope.sin"], f"{first}.sin"),
            ],
            f"{output}.high",
        )
        return g.node("Concat", [low, high], output, axis=-1)

    def key_name(self, i: int) -> str:
        """Return the name of an output: the keys leave the graph as they are, or rounded."""
        return f"layers.{i}.k.rope" if i in self.tensors.kv_scales else io_spec.new_key(i)

    def heads_name(self, x: str) -> str:
        """Return the name of a projection's heads; values are outputs of the graph, as keys are."""
        parts = x.split(".")
        if parts[0] == "layers" and parts[2:] == ["v", "heads"]:
            layer = int(parts[1])
            if layer not in self.tensors.kv_scales:
                return io_spec.new_value(layer)
        return f"{x}.t"

    def attention(self, i: int, q: str, k: str, v: str) -> str:
        """Join past and new rows in the scores, not in the cache: softmax([q.K_past | q.K_new])."""
        g, m = self.g, self.model
        name = f"layers.{i}"
        shared, size = m.num_heads // m.num_kv_heads, m.head_dim
        # [B, H, S, D] -> [B, G, H / G, S, D]: query heads beside the KV head that they share.
        grouped = g.node(
            "Reshape",
            [q, g.constant("shape.grouped", [0, m.num_kv_heads, shared, -1, size])],
            f"{name}.q.grouped",
        )
        scale = g.scalar("attention_scale", 1.0 / math.sqrt(size))
        grouped = g.node("Mul", [grouped, scale], f"{name}.q.scaled")
        group_axis = g.constant("axes.2", [2])
        scores, values = [], []
        kv = self.tensors.kv_scales.get(i)
        if kv is not None:
            # Rows in 8 bits enter the products as integers. The keys' scales are put on the queries
            # instead, and the values' on the mix: TensorRT takes scales per channel for weights
            # alone (rule channel-scale), and here they cost one row each and not the whole cache.
            k = rounded_rows(g, k, key_factor(g, i, kv), io_spec.new_key(i), kv)
            v = rounded_rows(g, v, value_factor(g, i, kv), io_spec.new_value(i), kv)
            grouped = self._scaled(grouped, key_factor(g, i, kv), f"{name}.q.by_key_scale")
        past = (io_spec.past_key(i), io_spec.past_value(i))
        for part, keys, vals in (("past", *past), ("new", k, v)):
            if part == "past":
                bounds = [g.constant("kv_start", [0]), "kv_len", group_axis]
                keys = g.node("Slice", [keys, *bounds], f"{keys}.read")
                vals = g.node("Slice", [vals, *bounds], f"{vals}.read")
            keys = g.node("Unsqueeze", [keys, group_axis], f"{keys}.grouped")
            vals = g.node("Unsqueeze", [vals, group_axis], f"{vals}.grouped")
            keys = g.node("Transpose", [keys], f"{keys}.t", perm=[0, 1, 2, 4, 3])
            if kv is not None:
                keys, vals = dequantized_rows(g, keys, kv), dequantized_rows(g, vals, kv)
            values.append(vals)
            score = g.node("MatMul", [grouped, keys], f"{name}.scores.{part}")
            if g.float_type != "fp32":
                score = g.node("Cast", [score], f"{score}.fp32", to=_FP32)
            scores.append(g.node("Add", [score, f"mask.{part}"], f"{name}.scores.{part}.masked"))
        joined = g.node("Concat", scores, f"{name}.scores", axis=-1)
        weights = g.node("Softmax", [joined], f"{name}.softmax", axis=-1)
        if g.float_type != "fp32":
            weights = g.node("Cast", [weights], f"{weights}.narrow", to=ONNX_TYPE[g.float_type])
        g.node(
            "Split",
            [weights, "split.scores"],
            f"{name}.split_weights",
            outputs=[f"{name}.weights.past", f"{name}.weights.new"],
            axis=-1,
        )
        mixed = [
            g.node("MatMul", [f"{name}.weights.{part}", value], f"{name}.mixed.{part}")
            for part, value in zip(("past", "new"), values, strict=True)
        ]
        total = g.node("Add", mixed, f"{name}.mixed")
        if kv is not None:
            total = self._scaled(total, value_factor(g, i, kv), f"{name}.mixed.by_value_scale")
        return g.node(
            "Reshape",
            [total, g.constant("shape.ungrouped", [0, m.num_heads, -1, size])],
            f"{name}.attended",
        )

    def _scaled(self, x: str, factor: str, output: str) -> str:
        """Multiply ``[B, G, H / G, S, D]`` by the factors ``[G, 1, D]`` of a cache."""
        axis = self.g.constant("axes.1", [1])
        grouped = self.g.node("Unsqueeze", [factor, axis], f"{factor}.grouped")
        return self.g.node("Mul", [x, grouped], output)
