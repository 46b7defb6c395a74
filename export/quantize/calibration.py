"""Calibrates: finds the inputs of the float model's linear layers for a text.

The float model runs in ONNX Runtime one decoder layer at a time. One small graph whose weights are
inputs serves all layers of the same parts. So memory holds the hidden states of all tokens, one
layer's weights and one layer's activations, whatever the model's depth. There is no KV cache: a
sequence is run whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edge._version import __version__
from edge.bundle import io_spec
from edge.bundle.io_spec import TensorSpec
from edge.bundle.linears import linear_layers, norm_layers
from edge.bundle.manifest import FloatType, TensorScheme
from edge.device.process import choose_num_threads
from edge.errors import DependencyError, install_command
from edge.model.names import FINAL_NORM, TOKEN_TABLE
from edge.model.parts import Add, Attention, GatedMlp, Layer, Linear, Rope, only
from edge.model.spec import ModelSpec
from edge_make.progress import Progress, silent
from export.graph.data_file import StoredTensor
from export.graph.decoder import DecoderTensors, PortableDecoder
from export.graph.float_range import FP16_MAX
from export.graph.graph_builder import ONNX_TYPE, GraphBuilder
from export.graph.linear_nodes import StoredLinear
from export.graph.rope import rope_tables
from export.sources.checkpoint import Checkpoint

from .fed_linears import fed_linears, value_name

Array = NDArray[np.float32]
Taps = Callable[[Layer], Mapping[str, str]]
"""Finds the values of a layer to look at: from their names in its graph to other ones."""

_FP16_NEAR = FP16_MAX / 2  # calibration sees few tokens, so less than a factor of two is too near
_EMBEDDINGS = "embeddings"
_ROPE = ("cos", "sin")
_log = logging.getLogger(__name__)


def linear_taps(layer: Layer) -> dict[str, str]:
    """Find the values that feed a layer's linears."""
    return {each.value: each.part.name for each in fed_linears(layer)}


@dataclass(frozen=True)
class LayerActivations:
    """Activations of one decoder layer, or of the lm_head, for every calibration token.

    Attributes:
        inputs: float32 ``[tokens, width]`` by the linear's last name, e.g. ``qkv`` or ``lm_head``,
            or by the names of other taps. Tokens are in the order of the batches, row by row.
        peaks: largest magnitude of each channel of the values whose range matters to an fp16
            graph, float32 ``[channels]`` by the value's full name, e.g. ``layers.3.gated``.
        hidden: hidden states after the layer, before any final norm, float32 ``[sequences, seq_len,
            hidden]``.
        before: hidden states before the layer, float32 ``[2, sequences, seq_len, hidden]``: the
            float model's and the rounded one's; None if the rounded one is not run.
    """

    inputs: dict[str, Array]
    peaks: dict[str, Array]
    hidden: Array
    before: Array | None = None


class LayerRunner:
    """Runs the float model over a text, one decoder layer per call.

    The activations are those of the float model; `rounded_twin` computes the rounded one's.

    Args:
        checkpoint: the model; its weights are used as fp32.
        ids: token ids int64 ``[sequences, seq_len]``.
        progress: called with the sequences that passed a layer (step ``calibrate``), counted over
            all layers.
        taps: finds the values of a layer that `LayerActivations.inputs` has, and their names there.
        shares: share of each layer's work that running it takes; the caller reports the rest.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        ids: NDArray[np.int64],
        progress: Progress = silent,
        taps: Taps = linear_taps,
        shares: Sequence[float] = (),
    ) -> None:
        self.checkpoint = checkpoint
        self._shares = shares or (1.0,) * checkpoint.spec.num_layers
        self._ids = ids
        self._progress = progress
        self._graph = cache(lambda one: LayerGraph(one, taps))  # layers of equal parts share it

    def run(self, index: int, hidden: Array | None) -> LayerActivations:
        """Run all sequences through a decoder layer, or through the norm before the lm_head.

        Args:
            index: number of the layer; the number of layers means the norm after the last one.
            hidden: `LayerActivations.hidden` of the layer before; None for the first layer, which
                begins with the tokens' embeddings.
        """
        if hidden is None:
            hidden = self.embed()
        embedded = {} if index else {_EMBEDDINGS: np.abs(hidden).max(axis=(0, 1))}
        last = index == self.checkpoint.spec.num_layers
        seen = self._final_norm(hidden) if last else self._layer(index, hidden)
        return replace(seen, peaks=embedded | seen.peaks)

    def report(self, layers: float) -> None:
        """Report how many layers are done; a fraction counts parts of one."""
        count = len(self._ids)
        total = self.checkpoint.spec.num_layers * count
        self._progress("calibrate", layers * count, total, "sequences through a layer")

    def embed(self) -> Array:
        """Return the hidden states before the first layer, as `LayerActivations.hidden`."""
        table = self.checkpoint.tensor(TOKEN_TABLE)
        return np.stack([table[row].astype(np.float32) for row in self._ids])

    def _layer(self, index: int, hidden: Array) -> LayerActivations:
        count, seq_len, _ = hidden.shape
        graph = self._graph(self.checkpoint.spec.of_layer(index))
        weights = graph.rope_feed(seq_len) | graph.weights(self.checkpoint, index)
        positions = np.arange(seq_len, dtype=np.int64)[None]
        inputs: dict[str, Array] = {}
        peaks: dict[str, Array] = {}
        after = np.empty_like(hidden)
        for at in range(count):
            feed = {
                **weights,
                io_spec.INPUTS_EMBEDS: hidden[at : at + 1],
                io_spec.POSITION_IDS: positions,
            }
            values = graph.session.run(list(graph.outputs), feed)
            for name, value in zip(graph.outputs.values(), values, strict=True):
                kind, _, short = name.partition(" ")
                if kind == "peak":
                    full = f"layers.{index}.{short}"
                    peaks[full] = np.maximum(peaks.get(full, value), value)
                elif kind == "input":
                    if short not in inputs:
                        inputs[short] = np.empty(
                            (count * seq_len, value.shape[-1]), dtype=np.float32
                        )
                    inputs[short][at * seq_len : (at + 1) * seq_len] = value[0]
                else:
                    after[at] = value[0]
            self.report(index + self._shares[index] * (at + 1) / count)
        return LayerActivations(inputs, peaks, after)

    def _final_norm(self, hidden: Array) -> LayerActivations:
        eps = np.float32(self.checkpoint.spec.rms_norm_eps)
        norm = self.checkpoint.tensor(FINAL_NORM).astype(np.float32)
        normed = np.empty_like(hidden)
        for row, result in zip(hidden, normed, strict=True):
            size = np.sqrt(np.mean(np.square(row), axis=-1, keepdims=True) + eps)
            np.multiply(row, norm / size, out=result)
        x = normed.reshape(-1, normed.shape[-1])
        return LayerActivations({"lm_head": x}, {"final_norm": np.abs(x).max(axis=0)}, hidden)


def warn_of_peaks(peaks: Mapping[str, float], float_type: FloatType) -> None:
    """Warn of values that come near the largest of FP16, where FP16 holds them.

    Args:
        peaks: the largest magnitude of each value, by its full name.
        float_type: float type of the graph; the token table is always in FP16.
    """
    for name, peak in peaks.items():
        if peak < _FP16_NEAR:
            continue
        if name == _EMBEDDINGS:
            _log.warning(
                "the embeddings reach %.4g in calibration; the token table ends at %.0f whatever "
                "--dtype says, and a larger value ends the export",
                peak,
                FP16_MAX,
            )
        elif float_type == "fp16":
            _log.warning(
                "%s reaches %.4g in calibration, FP16 ends at %.0f; export with --dtype bf16",
                name,
                peak,
                FP16_MAX,
            )


class _FedGraph(GraphBuilder):
    """A builder whose external tensors are inputs of the graph, so that weights can be fed."""

    def __init__(self) -> None:
        super().__init__("fp32")
        self.fed: dict[str, TensorSpec] = {}

    def external(self, tensor: StoredTensor) -> str:
        self.fed[tensor.name] = TensorSpec(tensor.name, tensor.dims, "fp32")
        return tensor.name


class LayerGraph(PortableDecoder):
    """One decoder layer in fp32 from hidden states to hidden states: no cache, extra outputs.

    Args:
        model: the model of this layer alone.
        taps: finds the values to put out as ``input <name>``.

    Attributes:
        outputs: meaning of each output of the graph, in order: ``hidden``, ``input <name>`` or
            ``peak <name>``.
    """

    def __init__(self, model: ModelSpec, taps: Taps) -> None:
        self.parts = model.layer(0)
        self._taps = taps(self.parts)
        self.linear_specs = {layer.name: layer for layer in linear_layers(model)}
        self.linear_specs.pop("lm_head", None)  # a model that embeds has none
        self.norm_specs = norm_layers(model)[:-1]
        linears = {
            name: StoredLinear(
                scheme=TensorScheme(kind="float"),
                weight=_placeholder(f"{name}.weight", *layer.shape),
                scale=None,
                bias=_placeholder(f"{name}.bias", layer.shape[1]) if layer.biases else None,
            )
            for name, layer in self.linear_specs.items()
        }
        norms = {
            norm.name: _placeholder(f"{norm.name}.weight", norm.size) for norm in self.norm_specs
        }
        ropes: list[tuple[StoredTensor, StoredTensor]] = []
        for part in only(self.parts, Rope):
            cos, sin = (_placeholder(f"rope.{each}_table", -1, part.dims // 2) for each in _ROPE)
            ropes = [(cos, sin)] * (part.table + 1)  # the one table that is fed, at its number
        super().__init__(model, "fp32", DecoderTensors(linears, norms, ropes))
        self.g: _FedGraph = _FedGraph()
        self.outputs: dict[str, str] = {}

    @property
    def fed(self) -> list[str]:
        """Names of the inputs that take the weights of the layer that was built."""
        return list(self.g.fed)

    @cached_property
    def session(self) -> Any:
        """Open a session of the model."""
        return run_session(self.build_layer())

    def build_layer(self) -> onnx.ModelProto:
        """Build the model; its inputs are the hidden states, the positions and every weight."""
        g = self.g
        self.prologue()
        width = self.model.hidden_size
        hidden = self.layer(0, io_spec.INPUTS_EMBEDS)
        outputs = [TensorSpec(hidden, ("batch", "seq", width), "fp32")]
        self.outputs[hidden] = "hidden"
        for value, short in self._taps.items():
            name = f"layers.0.{value}"
            self.outputs[name] = f"input {short}"
            outputs.append(TensorSpec(name, ("batch", "seq", f"{short}.width"), "fp32"))
        tokens = g.constant("axes.0_1", [0, 1])
        for part in self.parts:
            if not isinstance(part, Linear | GatedMlp | Add):
                continue  # the others stay in the range of what they take
            value = value_name(part)
            name = f"layers.0.{value}"
            size = g.node("Abs", [name], f"{name}.magnitude")
            peak = g.node("ReduceMax", [size, tokens], f"{name}.peak", keepdims=0)
            self.outputs[peak] = f"peak {value}"
            outputs.append(TensorSpec(peak, (f"{value}.width",), "fp32"))
        inputs = [
            TensorSpec(io_spec.INPUTS_EMBEDS, ("batch", "seq", width), "fp32"),
            TensorSpec(io_spec.POSITION_IDS, ("batch", "seq"), "int64"),
            *g.fed.values(),
        ]
        return g.model("layer", io_spec.DIALECTS["portable"].opset, inputs, outputs, __version__)

    def weights(self, checkpoint: Checkpoint, index: int) -> dict[str, Array]:
        """Read the weights of one layer of a checkpoint, by the inputs that take them."""

        def read(name: str) -> Array:
            source = name.replace("model.layers.0.", f"model.layers.{index}.")
            return checkpoint.tensor(source).astype(np.float32)

        result: dict[str, Array] = {}
        for name, layer in self.linear_specs.items():
            fused = np.empty(layer.shape, dtype=np.float32)
            column = 0
            for part in layer.weights:
                rows = read(part)
                fused[:, column : column + len(rows)] = rows.T
                column += len(rows)
            result[f"{name}.weight"] = fused
            if layer.biases:
                result[f"{name}.bias"] = np.concatenate([read(part) for part in layer.biases])
        for norm in self.norm_specs:
            result[f"{norm.name}.weight"] = read(norm.source)
        return result

    def rope_feed(self, seq_len: int) -> dict[str, Array]:
        """Compute the RoPE tables, by the inputs that take them; none for a layer without RoPE."""
        return {
            f"rope.{name}_table": table.astype(np.float32)
            for part in only(self.parts, Rope)
            for name, table in zip(
                _ROPE, rope_tables(self.model.ropes[part.table], part.dims, seq_len), strict=True
            )
        }

    def prologue(self) -> None:
        """Add the rows of RoPE and the causal mask."""
        g = self.g
        self.rope_rows()
        columns = g.node("Unsqueeze", [io_spec.POSITION_IDS, g.constant("axes.1", [1])], "row")
        rows = g.node("Unsqueeze", [io_spec.POSITION_IDS, g.constant("axes.last", [-1])], "column")
        causal = g.node("LessOrEqual", [columns, rows], "mask.valid")
        keep, drop = g.scalar("mask.keep", 0.0), g.scalar("mask.drop", -1.0e30)
        causal = g.node("Where", [causal, keep, drop], "mask.flat")
        g.node("Unsqueeze", [causal, g.constant("axes.1_2", [1, 2])], "mask")

    def attention(self, i: int, part: Attention, q: str, k: str, v: str) -> str:
        """Attend without a cache; return ``[B, H, S, D]``."""
        g, name, kv_heads, dim = self.g, f"layers.{i}", part.kv_heads, part.dim
        shape = g.constant("shape.grouped", [0, kv_heads, part.heads // kv_heads, -1, dim])
        grouped = g.node("Reshape", [q, shape], f"{name}.q.grouped")
        scale = g.scalar("attention_scale", part.factor)
        grouped = g.node("Mul", [grouped, scale], f"{name}.q.scaled")
        axis = g.constant("axes.2", [2])
        keys = g.node("Unsqueeze", [k, axis], f"{name}.k.grouped")
        keys = g.node("Transpose", [keys], f"{name}.k.columns", perm=[0, 1, 2, 4, 3])
        scores = g.node("MatMul", [grouped, keys], f"{name}.scores")
        scores = g.node("Add", [scores, "mask"], f"{name}.scores.masked")
        weights = g.node("Softmax", [scores], f"{name}.softmax", axis=-1)
        values = g.node("Unsqueeze", [v, axis], f"{name}.v.grouped")
        mixed = g.node("MatMul", [weights, values], f"{name}.mixed")
        shape = g.constant("shape.ungrouped", [0, part.heads, -1, dim])
        return g.node("Reshape", [mixed, shape], f"{name}.attended")


def _placeholder(name: str, *dims: int) -> StoredTensor:
    return StoredTensor(name, ONNX_TYPE["fp32"], dims, "", 0, 0)


def runtime_version() -> str:
    """Return the version of ONNX Runtime.

    Raises:
        DependencyError: ONNX Runtime is not installed.
    """
    version: str = _onnxruntime().__version__
    return version


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise DependencyError(
            f"calibration needs the package onnxruntime; install it with: {install_command('cpu')}"
        ) from error
    return onnxruntime


def run_session(model: onnx.ModelProto) -> Any:
    """Open a model without initial weights on the CPU."""
    onnxruntime = _onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = choose_num_threads()
    # Threads that spin while they wait for the next product would take the cores from NumPy.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
