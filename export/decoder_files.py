"""The decoder's four files, layer by layer: both graphs, and the weights that they share.

Peak memory is the largest packed layer plus tiles; a calibrated export adds what
`calibration.LayerRunner` holds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray

from edge.bundle.manifest import Calibration, FloatType, Graphs, LinearInfo, TensorScheme
from edge.errors import CheckpointError, ConfigError
from edge.progress import Progress
from edge.text.chat_template import ChatTemplate
from edge.text.tokenizer import Tokenizer

from .bundle import BundleWriter
from .config import ExportConfig
from .graph.data_file import DataFile, StoredTensor
from .graph.decoder import DecoderTensors, StoredLinear, build_decoder
from .graph.graph_builder import ONNX_TYPE
from .graph.rope import rope_tables
from .quantize.calibrated import CalibratedLinears
from .quantize.calibration import LayerRunner
from .quantize.linear import LinearTensors, RowQuantizer, convert_linear
from .quantize.recipe import LinearSpec, linear_layers, norm_sources
from .resume import CalibrationState, calibration_key
from .sources.checkpoint import Checkpoint
from .sources.documents import DEFAULT_TOKENS, SEQ_LEN, calibration_batches, read_calibration_text

_INT_TYPE = {
    "int8": onnx.TensorProto.INT8,
    "w8a8": onnx.TensorProto.INT8,
    "int4": onnx.TensorProto.INT4,
}
_NUMPY_TYPE: dict[str, np.dtype[np.generic]] = {
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp32": np.dtype(np.float32),
}


class DecoderFiles:
    """Quantizes and stores a model's layers.

    Args:
        config: the recipe and the form of the graph.
        checkpoint: what is quantized.
        schemes: of every linear.
        positions: rows of the RoPE tables.
        progress: told the weights done (``quantize``) and, in a calibrated export, the sequences
            that passed a layer (``calibrate``).

    Attributes:
        calibration: what a calibrated export saw; None before `write` and without calibration.
        peaks: largest activations of a calibrated export, by name.
        input_scales: of the W8A8 linears, by name.
        float_channels: of those of them that this export calibrated and that have any, by name.
    """

    def __init__(
        self,
        config: ExportConfig,
        checkpoint: Checkpoint,
        schemes: Mapping[str, TensorScheme],
        positions: int,
        progress: Progress,
    ) -> None:
        self.calibration: Calibration | None = None
        self.peaks: dict[str, float] = {}
        self.input_scales: dict[str, float] = {}
        self.float_channels: dict[str, tuple[int, ...]] = {}
        self._config = config
        self._checkpoint = checkpoint
        self._model = checkpoint.spec
        self._schemes = schemes
        self._positions = positions
        self._progress = progress
        self._float_types: tuple[FloatType, FloatType] = (config.float_type, "fp32")
        self._layers = linear_layers(self._model)
        self._weights_done = 0
        self._weights_total = sum(layer.shape[0] * layer.shape[1] for layer in self._layers)
        self._runner: LayerRunner | None = None
        self._rounding: Iterable[tuple[LinearSpec, RowQuantizer | None]]
        self._rounding = ((layer, None) for layer in self._layers)

    @property
    def is_calibrated(self) -> bool:
        """Whether the recipe needs calibration.

        Raises:
            ConfigError: a method that no layer takes.
        """
        kinds = {scheme.kind for scheme in self._schemes.values()}
        if self._config.method not in (None, "rtn") and "int4" not in kinds:
            raise ConfigError(
                f"--method {self._config.method} has no effect: no layer is INT4; leave it out"
            )
        return (self._config.rounding != "rtn" and "int4" in kinds) or "w8a8" in kinds

    def write(self, writer: BundleWriter, kv_capacity: int) -> tuple[Graphs, dict[str, LinearInfo]]:
        """Write all four files; a calibrated export goes on where the last one was interrupted.

        Raises:
            ConfigError: a method that no layer takes, or a calibration text that does not do.
            CheckpointError: a weight that is not finite, or that the graph's type cannot hold.
        """
        graphs = Graphs()
        names = (graphs.decoder, graphs.cpu)
        targets = [writer.path(f"{name}.data") for name in names]
        ids = self._calibration_ids()
        if ids is None:
            state = CalibrationState(None, 2)
        else:
            key = calibration_key(self._config, self._checkpoint, ids)
            state = CalibrationState.open(writer.calibration_directory, key, 2)
        with state, contextlib.ExitStack() as stack:
            if ids is not None:
                self._calibrate(ids, state)
            files = [stack.enter_context(state.data_file(target)) for target in targets]
            self._write_linears(files, state)
            norms = [self._norms(*pair) for pair in zip(files, self._float_types, strict=True)]
            ropes = [self._rope(*pair) for pair in zip(files, self._float_types, strict=True)]
        state.finish(targets)
        for i, float_type in enumerate(self._float_types):
            tensors = DecoderTensors(state.linears[i], norms[i], *ropes[i])
            proto = build_decoder(
                self._model, self._config.dialect, float_type, tensors, kv_capacity
            )
            writer.write_bytes(names[i], proto.SerializeToString())
        return graphs, state.infos

    def _calibration_ids(self) -> NDArray[np.int64] | None:
        """The tokens to calibrate with, or None for a recipe that needs none."""
        if not self.is_calibrated:
            return None
        content = self._checkpoint.text
        text = read_calibration_text(self._config.calibration)
        seq_len = min(SEQ_LEN, self._positions)
        template = content.chat_template
        seed = self._config.seed or 0
        ids = calibration_batches(
            Tokenizer.from_bytes(content.tokenizer_json, content.tokens),
            None if template is None else ChatTemplate(template, content.tokens),
            text,
            self._config.calibration_tokens or DEFAULT_TOKENS,
            seq_len,
            seed,
        )
        self.calibration = Calibration(
            text=text.name, sha256=text.sha256, num_tokens=ids.size, seq_len=seq_len, seed=seed
        )
        return ids

    def _calibrate(self, ids: NDArray[np.int64], state: CalibrationState) -> None:
        """Round as the activations say, from the first layer that is not done yet."""
        runner = LayerRunner(self._checkpoint, ids, self._progress, state.finished, state.hidden)
        runner.peaks.update(state.peaks)
        linears = CalibratedLinears(
            runner,
            self._schemes,
            self._config.rounding,
            _NUMPY_TYPE[self._config.float_type],
            state.factors,
        )
        linears.input_scales.update(state.input_scales)
        self.peaks, self.input_scales = runner.peaks, linears.input_scales
        self.float_channels = linears.float_channels
        self._runner, self._rounding = runner, linears
        self._checkpoint = linears.checkpoint

    def _write_linears(self, files: list[DataFile], state: CalibrationState) -> None:
        self._weights_done = sum(info.shape[0] * info.shape[1] for info in state.infos.values())
        self._report()
        for layer, quantize in self._rounding:
            stored = self._store(layer, self._convert(layer, quantize), files)
            for target, linear in zip(state.linears, stored, strict=True):
                target[layer.name] = linear
            parts = (stored[0].weight, stored[0].scale, stored[0].float_weight)
            state.infos[layer.name] = LinearInfo(
                scheme=self._schemes[layer.name],
                shape=layer.shape,
                num_bytes=sum(part.num_bytes for part in parts if part is not None),
                activation_scale=self.input_scales.get(layer.name),
                float_channels=stored[0].float_channels,
            )
            if self._runner is not None and layer.name.endswith(".down"):
                state.save(self._runner.hidden, self.peaks, self.input_scales, files)

    def _report(self) -> None:
        self._progress("quantize", self._weights_done, self._weights_total, "weights")

    def _convert(self, layer: LinearSpec, quantize: RowQuantizer | None) -> LinearTensors:
        def count(done: int) -> None:
            self._weights_done += done
            self._report()

        return convert_linear(
            [self._checkpoint.tensor(name) for name in layer.weights],
            layer.weights,
            self._schemes[layer.name],
            self._config.clip,
            _NUMPY_TYPE[self._config.float_type],
            count,
            quantize,
            self.float_channels.get(layer.name, ()),
        )

    def _store(
        self, layer: LinearSpec, tensors: LinearTensors, files: list[DataFile]
    ) -> list[StoredLinear]:
        """Store the weight once and its scale and bias in the type of each graph."""
        scheme = self._schemes[layer.name]
        weight_type = _INT_TYPE.get(scheme.kind, ONNX_TYPE[self._config.float_type])
        weight = files[0].add(f"{layer.name}.weight", weight_type, layer.shape, tensors.weight)
        channels = self.float_channels.get(layer.name, ())
        float_weight = self._float_weight(layer, channels, files[0]) if channels else None
        bias = None
        if layer.biases:
            parts = [self._checkpoint.tensor(name).astype(np.float32) for name in layer.biases]
            bias = np.concatenate(parts)
        result = []
        for file, float_type in zip(files, self._float_types, strict=True):
            scale = (
                None
                if tensors.scale is None
                else _add_floats(file, f"{layer.name}.scale", tensors.scale, float_type)
            )
            stored_bias = (
                None if bias is None else _add_floats(file, f"{layer.name}.bias", bias, float_type)
            )
            input_scale = None
            if scheme.kind == "w8a8":
                values = np.array(self.input_scales[layer.name], dtype=np.float32)
                input_scale = _add_floats(file, f"{layer.name}.input_scale", values, float_type)
            result.append(
                StoredLinear(
                    scheme, weight, scale, stored_bias, input_scale, channels, float_weight
                )
            )
        return result

    def _float_weight(
        self, layer: LinearSpec, channels: tuple[int, ...], file: DataFile
    ) -> StoredTensor:
        """Store ``[channels, out]`` once; the FP32 twin casts it."""
        parts = [self._checkpoint.tensor(name)[:, list(channels)] for name in layer.weights]
        values = np.concatenate([part.astype(np.float32) for part in parts]).T
        return _add_floats(file, f"{layer.name}.float_weight", values, self._config.float_type)

    def _norms(self, file: DataFile, float_type: FloatType) -> dict[str, StoredTensor]:
        return {
            name: _add_floats(
                file,
                f"{name}.weight",
                self._checkpoint.tensor(source).astype(np.float32),
                float_type,
            )
            for name, source in norm_sources(self._model).items()
        }

    def _rope(self, file: DataFile, float_type: FloatType) -> tuple[StoredTensor, StoredTensor]:
        cos, sin = rope_tables(self._model.rope, self._model.head_dim, self._positions)
        return (
            _add_floats(file, "rope.cos_table", cos, float_type),
            _add_floats(file, "rope.sin_table", sin, float_type),
        )


def _add_floats(
    file: DataFile, name: str, values: NDArray[np.floating], float_type: FloatType
) -> StoredTensor:
    return file.add(name, ONNX_TYPE[float_type], values.shape, _to_float(values, name, float_type))


def _to_float(values: NDArray[np.generic], name: str, float_type: FloatType) -> NDArray[np.generic]:
    """Convert, refusing what the type cannot hold."""
    wide = values.astype(np.float32)
    largest = float(np.abs(wide).max(initial=0.0))
    if not np.isfinite(largest):
        raise CheckpointError(f"{name} holds NaN or infinite values; download the checkpoint again")
    if float_type == "fp16" and largest > 65504.0:
        raise CheckpointError(
            f"{name} holds a value of magnitude {largest:.4g}, FP16 ends at 65504; "
            "export with --dtype bf16"
        )
    return wide.astype(_NUMPY_TYPE[float_type])
