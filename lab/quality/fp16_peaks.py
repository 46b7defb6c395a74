"""Run a bundle's fp16-typed graph over text and print the largest value of every kind of tensor.

usage: python3 -m lab fp16-peaks BUNDLE [--tokens 1024] [--window 256] [--text NAME ...]

It runs `decoder.onnx`, the graph that an engine is built from, not its fp32 twin. In a copy in
memory each fp16 value between two nodes gets a further output with its magnitude. Values of the
same name in different layers are one kind. ONNX Runtime's CPU computes each node in fp32 and rounds
its outputs, so a sum that only overflows inside a product is not seen. The exit code is 1 if a
value is not finite in fp16.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from edge.backends.ort.runner import RunShape, fill_inputs, make_inputs
from edge.backends.step import last_token, step_after
from edge.bundle import io_spec
from edge.bundle.embeddings import EmbeddingTable
from edge.bundle.manifest import Manifest, read_manifest
from edge_lab.measure.evaluate import read_text
from edge_make.read_tokenizer import read_tokenizer
from export.graph.float_range import FP16_MAX

from .score import DEVELOPMENT_TEXTS as TEXTS

_LAYER = re.compile(r"layers\.(\d+)\.")
_FIRST_INFINITE = 65520.0  # a number from here on is rounded to infinity
# These output the whole cache, whose rows were seen, or their input in another shape.
_SEEN_BEFORE = ("TensorScatter", "Slice", "Reshape", "Transpose")
_MAGNITUDE = ".magnitude"
Peaks = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(
        "python3 -m lab fp16-peaks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, default=1024, help="of each text")
    parser.add_argument("--window", type=int, default=256, help="tokens that see each other")
    parser.add_argument("--text", nargs="*", default=list(TEXTS), choices=list(TEXTS))
    options = parser.parse_args()
    manifest = read_manifest(options.bundle)
    if manifest.dtype != "fp16":
        sys.exit(f"error: {options.bundle} is typed {manifest.dtype}, not fp16")
    if not 1 <= options.window <= manifest.kv_capacity:
        sys.exit(f"error: --window {options.window} is not within 1 to {manifest.kv_capacity}")
    peaks: Peaks = {}
    runner = PeakRunner(options.bundle, manifest)
    tokenizer = read_tokenizer(options.bundle / "tokenizer.json", manifest.tokens)
    count = 0
    for name in options.text:
        ids = np.array(tokenizer.encode(read_text(TEXTS[name]))[: options.tokens], dtype=np.int64)
        for at in range(0, len(ids), options.window):
            runner.run(ids[at : at + options.window], peaks)
            print(f"{name}: {at} of {len(ids)} tokens", file=sys.stderr)
        count += len(ids)
    print(f"{manifest.name}, {count:,} tokens of {', '.join(options.text)}:\n")
    print(table(peaks))
    lost = [name for name, peak in peaks.items() if not peak < _FIRST_INFINITE]
    if lost:
        sys.exit(f"error: {lost[0]} is not finite in fp16; export with --dtype bf16")


class PeakRunner:
    """The fp16-typed decoder with the magnitude of each of its values as an output."""

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        import onnxruntime

        self._model = manifest.model
        self._dialect = io_spec.DIALECTS[manifest.dialect]
        self._table: EmbeddingTable = EmbeddingTable(bundle / io_spec.EMBEDDINGS_NAME)
        graph = onnx.load(bundle / "decoder.onnx", load_external_data=False)
        self.names = add_magnitudes(graph)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # No optimization: nothing is fused, so every value is there.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(bundle)
        )
        self._session = onnxruntime.InferenceSession(
            graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._cache = {
            # The batch is the one dimension without a number.
            value.name: np.zeros([d if isinstance(d, int) else 1 for d in value.shape], np.float16)
            for value in self._session.get_inputs()
            if value.name.startswith(io_spec.PAST_PREFIX)
        }

    def run(self, ids: NDArray[np.int64], peaks: Peaks) -> None:
        """Run one window from an empty cache; raise ``peaks`` where its values are larger."""
        embeds = self._table[ids]
        step = step_after([0], [0], embeds[None], last_token(len(ids))[None])
        shape = RunShape(0, 1, step.seq, 1)
        inputs = make_inputs(self._dialect, self._model.hidden_size, np.float16, shape)
        fill_inputs(inputs, step, step.embeds)
        rows = np.arange(self._dialect.rows_read(step.starts, step.kv_len), dtype=np.int64)
        feeds = {**inputs, **self._cache, io_spec.KV_POSITIONS: rows}
        found = self._session.run([f"{name}{_MAGNITUDE}" for name in self.names], feeds)
        seen = {"embeddings": float(np.abs(embeds.astype(np.float32)).max())}
        seen |= {name: float(value) for name, value in zip(self.names, found, strict=True)}
        for name, peak in seen.items():
            peaks[name] = float(np.maximum(peaks.get(name, 0.0), peak))  # a NaN stays


def add_magnitudes(graph: onnx.ModelProto) -> list[str]:
    """Give each fp16 value of a graph an output with its largest magnitude, fp32.

    Returns:
        The names of these values.
    """
    typed = onnx.shape_inference.infer_shapes(graph)
    half = {
        value.name
        for value in [*typed.graph.value_info, *typed.graph.output]
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    }
    names = [
        name
        for node in graph.graph.node
        if node.op_type not in (*_SEEN_BEFORE, "DequantizeLinear", "Constant")
        for name in node.output
        if name in half
    ]
    make = onnx.helper.make_node
    for name in names:
        graph.graph.node.extend(
            (
                make("Cast", [name], [f"{name}.seen"], to=onnx.TensorProto.FLOAT),
                make("Abs", [f"{name}.seen"], [f"{name}.seen.size"]),
                make("ReduceMax", [f"{name}.seen.size"], [f"{name}{_MAGNITUDE}"], keepdims=0),
            )
        )
        graph.graph.output.append(
            onnx.helper.make_tensor_value_info(f"{name}{_MAGNITUDE}", onnx.TensorProto.FLOAT, ())
        )
    return names


def table(peaks: Peaks) -> str:
    """Write the largest value of each kind and its layer, largest first, as Markdown."""
    kinds: dict[str, tuple[float, str]] = {}
    for name, peak in peaks.items():
        layer = _LAYER.match(name)
        kind = name[layer.end() :] if layer else name
        known = kinds.get(kind)
        if known is None or not (peak <= known[0] or np.isnan(known[0])):
            kinds[kind] = peak, layer.group(1) if layer else ""
    lines = ["| Value | Largest magnitude | In layer | Of FP16's range |", "|---|---|---|---|"]
    for kind, (peak, layer_name) in sorted(kinds.items(), key=lambda item: -item[1][0]):
        lines.append(f"| `{kind}` | {peak:.4g} | {layer_name} | {100 * peak / FP16_MAX:.2g} % |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
