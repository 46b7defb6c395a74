"""Builds the decoder graph in standard ONNX operators, with the tensors of `edge.bundle.io_spec`.

Both dialects share the layers. They differ in how RMSNorm, RoPE and attention are written and in
who appends to the cache (`edge.bundle.io_spec`). Shapes in comments: ``B`` batch, ``S`` tokens
of the step, ``K`` cache rows read, ``H`` heads, ``G`` KV heads, ``D`` head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx

from edge._version import __version__
from edge.adapters.graph_inputs import linear_inputs
from edge.bundle import io_spec
from edge.bundle.manifest import Dialect, FloatType
from edge.errors import CheckpointError
from edge.model.parts import (
    Add,
    AnyPart,
    Attention,
    GatedMlp,
    Linear,
    Norm,
    Rope,
    only,
    unknown_part,
)
from edge.model.spec import ModelSpec

from .data_file import StoredTensor
from .graph_builder import ONNX_TYPE, GraphBuilder
from .kv_quantization import KvScales, dequantized_rows, key_factor, rounded_rows, value_factor
from .linear_nodes import LinearNodes, StoredLinear

_FP32 = ONNX_TYPE["fp32"]
_SPLITS = {"qkv": "split", "gate_up": "split_mlp"}  # nodes whose names are older than parts


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
        ropes: cosines and sines of each of the model's `RopeSpec`, ``[positions, dims / 2]``.
        kv_scales: scales of the layers whose cache is in 8 bits, by number.
        tap: hidden states for a head; None for a bundle without one.
        adapters: whether the linears take adapters, of any rank.
    """

    linears: Mapping[str, StoredLinear]
    norms: Mapping[str, StoredTensor]
    ropes: Sequence[tuple[StoredTensor, StoredTensor]]
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


def rope_names(table: int) -> tuple[str, str]:
    """Return the names of a table's cosines and sines."""
    base = f"rope.{table}" if table else "rope"
    return f"{base}.cos", f"{base}.sin"


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

    def begin(self, i: int, x: str) -> tuple[str, str, Sequence[AnyPart]]:
        """Return the running value of a layer, its residual stream, and the parts that follow."""
        return x, x, self.model.layer(i)

    def layer(self, i: int, x: str) -> str:
        """Add a layer to the residual stream ``x`` ``[B, S, hidden]``, part by part."""
        g, name = self.g, f"layers.{i}"
        x, stream, parts = self.begin(i, x)
        head_norms: dict[str, str] = {}
        heads: list[str] = []  # q, k and v, once a part wants heads
        for part in parts:
            match part:
                case Norm():
                    if part.of is None:
                        x = self.norm(x, f"{name}.{part.name}")
                    else:
                        head_norms[part.of] = f"{name}.{part.name}"
                case Linear():
                    x = self.linear(x, f"{name}.{part.name}")
                    if len(part.outputs) > 1:
                        widths = [width for _, width in part.outputs]
                        g.node(
                            "Split",
                            [x, g.constant(f"split.{part.name}", widths)],
                            f"{name}.{_SPLITS.get(part.name, f'split_{part.name}')}",
                            outputs=[f"{name}.{value}" for value, _ in part.outputs],
                            axis=-1,
                        )
                case Rope():
                    attention = only(parts, Attention)[0]
                    if part.dims != attention.dim:
                        raise CheckpointError(
                            f"{name}: RoPE of {part.dims} of {attention.dim} dimensions of a head "
                            "is not supported; take a model whose heads turn whole"
                        )
                    q, k, v = self.qkv_heads(i, attention, head_norms, turns=True)
                    q = self.rope(q, f"{name}.q.rope", part.table)
                    heads = [q, self.rope(k, self.key_name(i), part.table), v]
                case Attention():
                    q, k, v = heads or self.qkv_heads(i, part, head_norms, turns=False)
                    x = self.attention(i, part, q, k, v)
                    x = g.node("Transpose", [x], f"{name}.attended.t", perm=[0, 2, 1, 3])
                    shape = g.constant("shape.merge", [0, 0, part.heads * part.dim])
                    x = g.node("Reshape", [x, shape], f"{name}.merged")
                case GatedMlp():
                    # SiLU in two operators: TensorRT knows `Swish` only from 11.0 on.
                    sigmoid = g.node("Sigmoid", [f"{name}.gate"], f"{name}.gate.sigmoid")
                    gate = g.node("Mul", [f"{name}.gate", sigmoid], f"{name}.gate.silu")
                    x = g.node("Mul", [gate, f"{name}.up"], f"{name}.gated")
                case Add():
                    x = stream = g.node("Add", [stream, x], f"{name}.{part.name}")
                case _:
                    unknown_part(part)
        return x

    def qkv_heads(
        self, i: int, part: Attention, norms: Mapping[str, str], *, turns: bool
    ) -> list[str]:
        """Divide q, k and v into heads ``[B, heads, S, D]``, some of them normalized.

        Keys that ``turns`` says will be rotated are not yet what the cache takes.
        """
        counts = {"q": part.heads, "k": part.kv_heads, "v": part.kv_heads}
        found = []
        for value, count in counts.items():
            x = f"layers.{i}.{value}"
            shape = self.g.constant(f"shape.heads.{count}", [0, 0, count, part.dim])
            x = self.g.node("Reshape", [x, shape], f"{x}.heads")
            if value in norms:
                x = self.norm(x, norms[value])
            output = f"{x}.t"
            if value == "v":
                output = self.value_name(i, output)
            elif value == "k" and not turns:
                output = self.key_name(i)
            found.append(self.g.node("Transpose", [x], output, perm=[0, 2, 1, 3]))
        return found

    def value_name(self, i: int, name: str) -> str:
        """Return the name of a layer's heads of values, by default ``name``."""
        return name

    # The dialects differ in the following methods.

    def prologue(self) -> None:
        """Add the nodes that all layers share: the masks."""
        raise NotImplementedError

    def norm(self, x: str, name: str) -> str:
        """Add an RMSNorm over the last axis, in fp32 inside (fp16 squares overflow at 256)."""
        raise NotImplementedError

    def rope(self, x: str, output: str, table: int) -> str:
        """Rotate ``[B, heads, S, D]`` by its positions, halves paired (HF's layout)."""
        raise NotImplementedError

    def key_name(self, i: int) -> str:
        """Return the name of a layer's keys as the cache takes them, but for their rounding."""
        raise NotImplementedError

    def attention(self, i: int, part: Attention, q: str, k: str, v: str) -> str:
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

    def rope(self, x: str, output: str, table: int) -> str:
        """Rotate by one operator."""
        cos, sin = (self.g.floats(part) for part in self.tensors.ropes[table])
        return self.g.node("RotaryEmbedding", [x, cos, sin, io_spec.POSITION_IDS], output)

    def key_name(self, i: int) -> str:
        """Return the name of a layer's keys as the cache takes them, but for their rounding."""
        return f"layers.{i}.k.rope"

    def attention(self, i: int, part: Attention, q: str, k: str, v: str) -> str:
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
            scale=part.factor,
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
        for number, tables in enumerate(self.tensors.ropes):
            for name, table in zip(rope_names(number), tables, strict=True):
                rows = g.node("Gather", [g.floats(table), io_spec.POSITION_IDS], f"{name}.rows")
                g.node("Unsqueeze", [rows, g.constant("axes.1", [1])], name)

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

    def rope(self, x: str, output: str, table: int) -> str:
        """Rotate in primitive operators."""
        g = self.g
        half = self.tensors.ropes[table][0].dims[1]
        cos, sin = rope_names(table)
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
                g.node("Mul", [first, cos], f"{first}.cos"),
                g.node("Mul", [second, sin], f"{second}.sin"),
            ],
            f"{output}.low",
        )
        high = g.node(
            "Add",
            [
                g.node("Mul", [second, cos], f"{second}.cos"),
                g.node("Mul", [first, sin], f"{first}.sin"),
            ],
            f"{output}.high",
        )
        return g.node("Concat", [low, high], output, axis=-1)

    def key_name(self, i: int) -> str:
        """Return the name of an output: the keys leave the graph as they are, or rounded."""
        return f"layers.{i}.k.rope" if i in self.tensors.kv_scales else io_spec.new_key(i)

    def value_name(self, i: int, name: str) -> str:
        """Return the name of an output, too, unless values are rounded first."""
        return name if i in self.tensors.kv_scales else io_spec.new_value(i)

    def attention(self, i: int, part: Attention, q: str, k: str, v: str) -> str:
        """Join past and new rows in the scores, not in the cache: softmax([q.K_past | q.K_new])."""
        g, name = self.g, f"layers.{i}"
        kv_heads, size = part.kv_heads, part.dim
        # [B, H, S, D] -> [B, G, H / G, S, D]: query heads beside the KV head that they share.
        grouped = g.node(
            "Reshape",
            [q, g.constant("shape.grouped", [0, kv_heads, part.heads // kv_heads, -1, size])],
            f"{name}.q.grouped",
        )
        scale = g.scalar("attention_scale", part.factor)
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
        for rows, keys, vals in (("past", *past), ("new", k, v)):
            if rows == "past":
                bounds = [g.constant("kv_start", [0]), "kv_len", group_axis]
                keys = g.node("Slice", [keys, *bounds], f"{keys}.read")
                vals = g.node("Slice", [vals, *bounds], f"{vals}.read")
            keys = g.node("Unsqueeze", [keys, group_axis], f"{keys}.grouped")
            vals = g.node("Unsqueeze", [vals, group_axis], f"{vals}.grouped")
            keys = g.node("Transpose", [keys], f"{keys}.t", perm=[0, 1, 2, 4, 3])
            if kv is not None:
                keys, vals = dequantized_rows(g, keys, kv), dequantized_rows(g, vals, kv)
            values.append(vals)
            score = g.node("MatMul", [grouped, keys], f"{name}.scores.{rows}")
            if g.float_type != "fp32":
                score = g.node("Cast", [score], f"{score}.fp32", to=_FP32)
            scores.append(g.node("Add", [score, f"mask.{rows}"], f"{name}.scores.{rows}.masked"))
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
            g.node("MatMul", [f"{name}.weights.{rows}", value], f"{name}.mixed.{rows}")
            for rows, value in zip(("past", "new"), values, strict=True)
        ]
        total = g.node("Add", mixed, f"{name}.mixed")
        if kv is not None:
            total = self._scaled(total, value_factor(g, i, kv), f"{name}.mixed.by_value_scale")
        return g.node(
            "Reshape",
            [total, g.constant("shape.ungrouped", [0, part.heads, -1, size])],
            f"{name}.attended",
        )

    def _scaled(self, x: str, factor: str, output: str) -> str:
        """Multiply ``[B, G, H / G, S, D]`` by the factors ``[G, 1, D]`` of a cache."""
        axis = self.g.constant("axes.1", [1])
        grouped = self.g.node("Unsqueeze", [factor, axis], f"{factor}.grouped")
        return self.g.node("Mul", [x, grouped], output)
