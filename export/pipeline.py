"""Checkpoint to bundle, tensor by tensor; peak memory is the largest packed layer plus tiles."""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray

from edge import io_spec
from edge._version import __version__
from edge.chat import ChatTemplate
from edge.errors import CheckpointError, ConfigError
from edge.manifest import (
    SCHEMA_VERSION,
    Calibration,
    Dialect,
    FloatType,
    Graphs,
    LinearInfo,
    Manifest,
    ModelSpec,
    Quantization,
    TensorScheme,
)
from edge.tokenizer import Tokenizer

from .bundle import BundleWriter
from .calibrated import CalibratedLinears, Method
from .calibration import (
    DEFAULT_TOKENS,
    SEQ_LEN,
    LayerRunner,
    calibration_batches,
    read_calibration_text,
)
from .checkpoint import Checkpoint, open_checkpoint
from .data_file import DataFile, StoredTensor
from .decoder import DecoderTensors, StoredLinear, build_decoder
from .graph_builder import ONNX_TYPE
from .quantize.linear import LinearTensors, RowQuantizer, convert_linear
from .quantize.rotation import RotatedCheckpoint
from .recipe import Clip, LinearSpec, Quant, Recipe, linear_layers, norm_sources
from .rope import rope_tables
from .safetensors_writer import TensorSource, write_safetensors

DEFAULT_KV_CAPACITY = 4096
GraphType = Literal["fp16", "bf16"]
_EMBEDDING_ROWS = 8192
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

Progress = Callable[[str, int, int], None]
"""Called with the phase, the weights done and the weights in all."""


@dataclass(frozen=True)
class ExportConfig:
    """What to export and how.

    Attributes:
        source: HF directory, hub id or GGUF file.
        output: the bundle's directory.
        quant: scheme of the linear layers.
        group_size: see `recipe.Recipe`.
        keep: see `recipe.Recipe`.
        clip: see `recipe.Recipe`.
        method: how INT4 layers are rounded: ``rtn`` to nearest, the others calibrated.
        calibration: text or JSONL to calibrate with; None is the built-in text.
        calibration_tokens: at most so many; None is `calibration.DEFAULT_TOKENS`.
        seed: of the order of the calibration documents; None is 0.
        rotate: rotate the residual stream and the heads' values (`quantize.rotation`); None does
            so for ``int8-w8a8`` only.
        dialect: see `edge.io_spec`.
        dtype: float type of the engine's graph; None is bf16 for ``quant="bf16"``, else fp16.
        kv_capacity: cache rows per sequence; None is 4096 or the model's own maximum, if less.
        revision: of a hub id; None is its default branch.
        cache_dir: of the hub; None is the hub's own.
        overwrite: replace an existing bundle.
    """

    source: str
    output: Path
    quant: Quant = "int4"
    group_size: int | None = None
    keep: tuple[tuple[str, str], ...] = ()
    clip: Clip = "mse"
    method: Method = "rtn"
    calibration: Path | None = None
    calibration_tokens: int | None = None
    seed: int | None = None
    rotate: bool | None = None
    dialect: Dialect = "native"
    dtype: GraphType | None = None
    kv_capacity: int | None = None
    revision: str | None = None
    cache_dir: Path | None = None
    overwrite: bool = False
    recipe: Recipe = field(init=False)
    float_type: GraphType = field(init=False)

    def __post_init__(self) -> None:
        implied: GraphType = "bf16" if self.quant == "bf16" else "fp16"
        for option, value, choices in (
            ("--quant", self.quant, Quant),
            ("--clip", self.clip, Clip),
            ("--method", self.method, Method),
            ("--dialect", self.dialect, Dialect),
            ("--dtype", self.dtype or implied, GraphType),
        ):
            if value not in get_args(choices):
                raise ConfigError(
                    f"{option} {value} is unknown; use {' or '.join(get_args(choices))}"
                )
        if self.dtype is not None and self.quant in ("fp16", "bf16") and self.dtype != implied:
            raise ConfigError(
                f"--quant {self.quant} contradicts --dtype {self.dtype}; say --quant {self.dtype}"
            )
        rounds_inputs = self.quant == "int8-w8a8" or any(kind == "w8a8" for _, kind in self.keep)
        for option, setting in (
            ("--calibration", self.calibration),
            ("--calibration-tokens", self.calibration_tokens),
            ("--seed", self.seed),
        ):
            if setting is not None and self.method == "rtn" and not rounds_inputs:
                raise ConfigError(
                    f"{option} has no effect with --method rtn; use --method awq+gptq or leave "
                    "it out"
                )
        if self.method != "rtn" and self.clip != "mse":
            raise ConfigError(f"--clip {self.clip} has no effect with --method {self.method}")
        object.__setattr__(self, "float_type", self.dtype or implied)
        recipe = Recipe(self.quant, self.group_size, self.keep, self.clip)
        object.__setattr__(self, "recipe", recipe)
        if self.rotate is None:
            object.__setattr__(self, "rotate", self.quant == "int8-w8a8")


def export_checkpoint(config: ExportConfig, progress: Progress | None = None) -> Manifest:
    """Write a bundle; it appears at ``config.output`` whole or not at all.

    Raises:
        ConfigError: options that contradict each other or the model.
        CheckpointError: a source that cannot be exported.
        ResourceError: not enough disk space.
    """
    with open_checkpoint(
        config.source, revision=config.revision, cache_dir=config.cache_dir
    ) as checkpoint:
        return _Export(config, checkpoint, progress or _silent).run()


class _Export:
    def __init__(self, config: ExportConfig, checkpoint: Checkpoint, progress: Progress) -> None:
        self.config = config
        if config.rotate:
            checkpoint = RotatedCheckpoint(checkpoint)
        self.checkpoint = checkpoint
        self.model = checkpoint.spec
        self.schemes = config.recipe.schemes(self.model)
        self.positions = io_spec.rope_positions(self.model)
        self.kv_capacity = (
            min(DEFAULT_KV_CAPACITY, self.positions)
            if config.kv_capacity is None
            else config.kv_capacity
        )
        io_spec.check_capacity(self.kv_capacity, self.positions)
        self.layers = linear_layers(self.model)
        self.calibration: Calibration | None = None
        self.peaks: dict[str, float] = {}
        self.input_scales: dict[str, float] = {}
        self.progress = progress
        self.weights_done = 0
        self.weights_total = sum(layer.shape[0] * layer.shape[1] for layer in self.layers)

    def run(self) -> Manifest:
        required = estimated_bytes(self.model, self.schemes, self.positions)
        with BundleWriter(
            self.config.output, required_bytes=required, overwrite=self.config.overwrite
        ) as writer:
            graphs, linears = self.write_decoder(writer)
            self.write_embeddings(writer.path(io_spec.EMBEDDINGS_NAME))
            self.write_text(writer)
            phase = "hash and move into place"
            self.progress(phase, 0, self.weights_total)
            manifest = writer.commit(self.manifest(graphs, linears))
        self.progress(phase, self.weights_total, self.weights_total)
        return manifest

    def write_decoder(self, writer: BundleWriter) -> tuple[Graphs, dict[str, LinearInfo]]:
        graphs = Graphs()
        names = (graphs.decoder, graphs.cpu)
        infos: dict[str, LinearInfo] = {}
        float_types: tuple[FloatType, FloatType] = (self.config.float_type, "fp32")
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(DataFile(writer.path(f"{name}.data"))) for name in names]
            linears: list[dict[str, StoredLinear]] = [{} for _ in files]
            for layer, quantize in self.rounding():
                tensors = self.convert(layer, quantize)
                stored = self.store_linear(layer, tensors, files, float_types)
                for target, linear in zip(linears, stored, strict=True):
                    target[layer.name] = linear
                num_bytes = stored[0].weight.num_bytes
                num_bytes += stored[0].scale.num_bytes if stored[0].scale else 0
                infos[layer.name] = LinearInfo(
                    scheme=self.schemes[layer.name],
                    shape=layer.shape,
                    num_bytes=num_bytes,
                    activation_scale=self.input_scales.get(layer.name),
                )
            norms = [self.store_norms(*pair) for pair in zip(files, float_types, strict=True)]
            ropes = [self.store_rope(*pair) for pair in zip(files, float_types, strict=True)]
        for i, float_type in enumerate(float_types):
            stored_tensors = DecoderTensors(linears[i], norms[i], *ropes[i])
            proto = build_decoder(
                self.model, self.config.dialect, float_type, stored_tensors, self.kv_capacity
            )
            writer.write_bytes(names[i], proto.SerializeToString())
        return graphs, infos

    def rounding(self) -> Iterable[tuple[LinearSpec, RowQuantizer | None]]:
        """Every linear and how its rows are rounded; None is to nearest."""
        method = self.config.method
        kinds = {scheme.kind for scheme in self.schemes.values()}
        if method == "rtn" and "w8a8" not in kinds:
            return ((layer, None) for layer in self.layers)
        if method != "rtn" and "int4" not in kinds:
            raise ConfigError(f"--method {method} has no effect: no layer is INT4; leave it out")
        content = self.checkpoint.text
        text = read_calibration_text(self.config.calibration)
        seq_len = min(SEQ_LEN, self.positions)
        template = content.chat_template
        seed = self.config.seed or 0
        ids = calibration_batches(
            Tokenizer.from_bytes(content.tokenizer_json, content.tokens),
            None if template is None else ChatTemplate(template, content.tokens),
            text,
            self.config.calibration_tokens or DEFAULT_TOKENS,
            seq_len,
            seed,
        )
        self.calibration = Calibration(
            text=text.name, sha256=text.sha256, num_tokens=ids.size, seq_len=seq_len, seed=seed
        )
        runner = LayerRunner(self.checkpoint, ids)
        self.peaks = runner.peaks
        linears = CalibratedLinears(
            runner, self.schemes, method, _NUMPY_TYPE[self.config.float_type]
        )
        self.checkpoint = linears.checkpoint
        self.input_scales = linears.input_scales
        return linears

    def convert(self, layer: LinearSpec, quantize: RowQuantizer | None) -> LinearTensors:
        def count(done: int) -> None:
            self.weights_done += done
            self.progress("quantize", self.weights_done, self.weights_total)

        return convert_linear(
            [self.checkpoint.tensor(name) for name in layer.weights],
            layer.weights,
            self.schemes[layer.name],
            self.config.clip,
            _NUMPY_TYPE[self.config.float_type],
            count,
            quantize,
        )

    def store_linear(
        self,
        layer: LinearSpec,
        tensors: LinearTensors,
        files: list[DataFile],
        float_types: tuple[FloatType, FloatType],
    ) -> list[StoredLinear]:
        """Store the weight once and its scale and bias in the type of each graph."""
        scheme = self.schemes[layer.name]
        weight_type = _INT_TYPE.get(scheme.kind, ONNX_TYPE[self.config.float_type])
        weight = files[0].add(f"{layer.name}.weight", weight_type, layer.shape, tensors.weight)
        bias = None
        if layer.biases:
            parts = [self.checkpoint.tensor(name).astype(np.float32) for name in layer.biases]
            bias = np.concatenate(parts)
        result = []
        for file, float_type in zip(files, float_types, strict=True):
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
            result.append(StoredLinear(scheme, weight, scale, stored_bias, input_scale))
        return result

    def store_norms(self, file: DataFile, float_type: FloatType) -> dict[str, StoredTensor]:
        return {
            name: _add_floats(
                file,
                f"{name}.weight",
                self.checkpoint.tensor(source).astype(np.float32),
                float_type,
            )
            for name, source in norm_sources(self.model).items()
        }

    def store_rope(
        self, file: DataFile, float_type: FloatType
    ) -> tuple[StoredTensor, StoredTensor]:
        cos, sin = rope_tables(self.model.rope, self.model.head_dim, self.positions)
        return (
            _add_floats(file, "rope.cos_table", cos, float_type),
            _add_floats(file, "rope.sin_table", sin, float_type),
        )

    def write_embeddings(self, path: Path) -> None:
        name = "model.embed_tokens.weight"
        table = self.checkpoint.tensor(name)

        def chunks() -> Iterator[NDArray[np.generic]]:
            for start in range(0, len(table), _EMBEDDING_ROWS):
                rows = table[start : start + _EMBEDDING_ROWS]
                yield _to_float(
                    rows, name, "fp16", "which is all that the embedding table may hold"
                )
                done = (start + len(rows)) * self.model.hidden_size
                self.progress("embeddings", done, table.size)

        source = TensorSource("F16", (self.model.vocab_size, self.model.hidden_size), chunks())
        write_safetensors(path, {io_spec.EMBEDDINGS_TENSOR: source})

    def write_text(self, writer: BundleWriter) -> None:
        text = self.checkpoint.text
        writer.write_bytes("tokenizer.json", text.tokenizer_json)
        if text.chat_template is not None:
            writer.write_bytes("chat_template.jinja", text.chat_template.encode())
        generation = json.dumps(text.generation_config, indent=2, ensure_ascii=False)
        writer.write_bytes("generation_config.json", generation.encode())

    def manifest(self, graphs: Graphs, linears: dict[str, LinearInfo]) -> Manifest:
        quantized = any(scheme.kind != "float" for scheme in self.schemes.values())
        return Manifest(
            schema_version=SCHEMA_VERSION,
            producer=f"edge-llm {__version__}",
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            name=self.checkpoint.name,
            model=self.model,
            dialect=self.config.dialect,
            dtype=self.config.float_type,
            kv_capacity=self.kv_capacity,
            rope_positions=self.positions,
            quantization=Quantization(
                name=self.config.quant,
                method=self.config.method if quantized else "none",
                clip=self.config.clip if quantized else "none",
                linears=linears,
                calibration=self.calibration,
                smoothed=bool(self.input_scales),
                rotated=bool(self.config.rotate),
            ),
            sampling=self.checkpoint.text.sampling,
            tokens=self.checkpoint.text.tokens,
            source=self.checkpoint.source,
            graphs=graphs,
            files={},
            quality={"activation_peaks": self.peaks} if self.peaks else None,
        )


def estimated_bytes(model: ModelSpec, schemes: dict[str, TensorScheme], positions: int) -> int:
    """Upper estimate of a bundle's size, for the check of free disk space."""
    total = 2 * model.vocab_size * model.hidden_size  # the embedding table
    total += positions * model.head_dim * (2 + 4)  # cos and sin, for both graphs
    for layer in linear_layers(model):
        width, out = layer.shape
        scheme = schemes[layer.name]
        weight_bits = {"float": 16, "int8": 8, "w8a8": 8, "int4": 4}[scheme.kind]
        groups = 0 if scheme.kind == "float" else width // (scheme.group_size or width)
        total += width * out * weight_bits // 8 + groups * out * (2 + 4)
    return total + (64 << 20)  # norms, biases, graphs, tokenizer, alignment


def _add_floats(
    file: DataFile, name: str, values: NDArray[np.floating], float_type: FloatType
) -> StoredTensor:
    return file.add(name, ONNX_TYPE[float_type], values.shape, _to_float(values, name, float_type))


def _to_float(
    values: NDArray[np.generic],
    name: str,
    float_type: FloatType,
    advice: str = "export with --dtype bf16",
) -> NDArray[np.generic]:
    """Convert, refusing what the type cannot hold."""
    wide = values.astype(np.float32)
    largest = float(np.abs(wide).max(initial=0.0))
    if not np.isfinite(largest):
        raise CheckpointError(f"{name} holds NaN or infinite values; download the checkpoint again")
    if float_type == "fp16" and largest > 65504.0:
        raise CheckpointError(
            f"{name} holds a value of magnitude {largest:.4g}, FP16 ends at 65504; {advice}"
        )
    return wide.astype(_NUMPY_TYPE[float_type])


def _silent(phase: str, done: int, total: int) -> None:
    """Report nothing."""
