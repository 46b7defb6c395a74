"""Writes the decoder's four files: both graphs, and the weights that they share, block by block.

Peak memory is the largest packed layer plus tiles. A calibrated export adds the memory of
`quantize.calibration.LayerRunner`, and the GPTQ factors of one decoder layer.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edge.adapters.graph_inputs import FACTORS_NAME
from edge.bundle.kv_scales import Scales
from edge.bundle.manifest import (
    Calibration,
    Dialect,
    FloatType,
    FromSource,
    Graphs,
    KvCache,
    LinearInfo,
    TensorScheme,
)
from edge.bundle.schemes import HIGH_PLANE
from edge.errors import ConfigError
from edge.model.spec import ModelSpec
from edge_make.checkpoint_tensors import norm_sources
from edge_make.progress import Progress, prefixed
from edge_make.safetensors_writer import TensorSource, write_safetensors

from .bundle import BundleWriter
from .config import AS_IN_SOURCE, ExportRecipe
from .graph.data_file import DataFile, StoredTensor
from .graph.decoder import DecoderTensors, HiddenTap, build_decoder, rope_names
from .graph.float_range import check_range
from .graph.graph_builder import NUMPY_TYPE, ONNX_TYPE
from .graph.kv_quantization import KvScales
from .graph.linear_nodes import StoredLinear
from .graph.rope import rope_tables
from .quantize.calibrated import Calibrated
from .quantize.calibration import LayerActivations, LayerRunner, warn_of_peaks
from .quantize.effort import layer_effort
from .quantize.from_source import AsInSource
from .quantize.held_layer import HeldLayer
from .quantize.kv_scales import CACHE_TOKENS, calibrate_kv_cache
from .quantize.linear import LinearTensors, convert
from .quantize.plan import Block, BlockPlan, Calibrator, LinearPlan, ToNearest, linear_blocks
from .quantize.rounded_twin import RoundedTwin, twin_taps
from .quantize.scaled_checkpoint import ScaledCheckpoint
from .resume import Finished, Work, calibration_key, fresh_work, resumable_work
from .sources.checkpoint import Checkpoint
from .sources.documents import SEQ_LEN, calibration_batches, read_calibration_text
from .sources.eagle3 import Eagle3Head

_Converted = tuple[BlockPlan, list[LinearTensors]]
_INT_TYPE = {
    "int8": onnx.TensorProto.INT8,
    "w8a8": onnx.TensorProto.INT8,
    "int4": onnx.TensorProto.INT4,
}


@dataclass(frozen=True)
class WrittenDecoder:
    """Facts about the decoder's files, for the manifest.

    Attributes:
        graphs: the graphs' names.
        linears: how every linear is stored, by name.
        calibration: the text of a calibrated export; None without calibration.
        peaks: largest activations in the calibration, by name.
        kv_cache: how the cache is stored; None means in float.
        kv_scales: scales of the cache tensors in 8 bits, as the graphs have them.
    """

    graphs: Graphs
    linears: Mapping[str, LinearInfo]
    calibration: Calibration | None
    peaks: Mapping[str, float]
    kv_cache: KvCache | None
    kv_scales: Scales


def _planes(scales: Mapping[int, KvScales]) -> Scales:
    """Name the scales of layers as cache tensors are named."""
    return {
        f"{layer}.{part}": values[:, None]
        for layer, each in sorted(scales.items())
        for part, values in (("key", each.keys), ("value", each.values))
    }


def _stored(factors: Mapping[str, NDArray[np.float32]]) -> dict[str, TensorSource]:
    """Return factors of linears as a file holds them."""
    return {
        name: TensorSource("F32", values.shape, [values.astype("<f4")])
        for name, values in factors.items()
    }


def calibrates(recipe: ExportRecipe, schemes: Mapping[str, TensorScheme]) -> bool:
    """Return whether the recipe needs calibration.

    Raises:
        ConfigError: no layer uses the method.
    """
    if recipe.quant == AS_IN_SOURCE:
        return False
    kinds = {scheme.kind for scheme in schemes.values()}
    if recipe.method not in (None, "rtn") and "int4" not in kinds:
        raise ConfigError(f"--method {recipe.method} has no effect: no layer is INT4; leave it out")
    return (recipe.rounding != "rtn" and "int4" in kinds) or "w8a8" in kinds


def cache_tokens(recipe: ExportRecipe) -> int:
    """Return the most tokens to calibrate the KV cache with; 0 if it stays in float."""
    if recipe.kv_cache == "float":
        return 0
    return CACHE_TOKENS if recipe.calibration_tokens is None else recipe.calibration_tokens


@dataclass(frozen=True)
class DecoderFiles:
    """Plans, converts and stores a model's linears, and writes the graphs that read them.

    Attributes:
        recipe: how the numbers are stored.
        wide_input_scales: whether scales of INT8 inputs are FP32, as in `targets.Target`.
        checkpoint: the model to quantize.
        schemes: the scheme of every linear, by name.
        positions: rows of the RoPE tables.
        progress: called with the weights done (step ``quantize``) and, in a calibrated export, the
            sequences that passed a layer (step ``calibrate``).
        head: head that reads hidden states, which the graph then outputs; None without one.
    """

    recipe: ExportRecipe
    wide_input_scales: bool
    checkpoint: Checkpoint
    schemes: Mapping[str, TensorScheme]
    positions: int
    progress: Progress
    head: Eagle3Head | None = None

    def write(self, writer: BundleWriter, dialect: Dialect, kv_capacity: int) -> WrittenDecoder:
        """Write all four files; a calibrated export resumes where the last one was interrupted.

        Raises:
            ConfigError: no layer uses the method, or the calibration text cannot be used.
            CheckpointError: a weight is not finite, or the graph's type cannot hold it.
        """
        graphs = Graphs()
        names = (graphs.decoder, graphs.cpu)
        targets = [writer.path(f"{name}.data") for name in names]
        calibration = None
        if calibrates(self.recipe, self.schemes):
            ids, calibration = self._calibration_text(self.recipe.most_calibration_tokens)
            key = calibration_key(self.recipe, self.checkpoint, ids, wide=self.wide_input_scales)
            with resumable_work(writer.calibration_directory, key, targets) as work:
                calibrator = self._calibrated(ids)
                calibrator.runner.report(min(work.finished.blocks, self.checkpoint.spec.num_layers))
                finished, tensors = self._write_data(calibrator, work)
        else:
            with fresh_work(targets) as work:
                finished, tensors = self._write_data(self._to_nearest(), work)
        kv_cache, peaks = None, finished.peaks
        if self.recipe.kv_cache == "int8":
            scales, kv_cache, met = self._kv_scales(finished)
            if not peaks:
                peaks = met
                warn_of_peaks(peaks, self.recipe.float_type)
            tensors = [replace(each, kv_scales=scales) for each in tensors]
        if self.recipe.adapters is not None:
            tensors = [replace(each, adapters=True) for each in tensors]
            if finished.factors:
                write_safetensors(writer.path(FACTORS_NAME), _stored(finished.factors))
        for name, float_type, each in zip(names, self._float_types, tensors, strict=True):
            proto = build_decoder(self.checkpoint.spec, dialect, float_type, each, kv_capacity)
            writer.write_bytes(name, proto.SerializeToString())
        planes = _planes(tensors[0].kv_scales)
        return WrittenDecoder(graphs, finished.infos, calibration, peaks, kv_cache, planes)

    @property
    def _float_types(self) -> tuple[FloatType, FloatType]:
        """The float type of each graph."""
        return (self.recipe.float_type, "fp32")

    def _kv_scales(
        self, finished: Finished
    ) -> tuple[dict[int, KvScales], KvCache, dict[str, float]]:
        """Calibrate the cache with the folded weights, as `calibrate_kv_cache` does.

        Raises:
            ConfigError: the text cannot be used, or no layer may be in 8 bits.
        """
        ids, calibration = self._calibration_text(cache_tokens(self.recipe))
        scales, kv_cache, peaks = calibrate_kv_cache(
            ScaledCheckpoint(self.checkpoint, finished.factors),
            ids,
            calibration,
            NUMPY_TYPE[self.recipe.float_type],
            wide=self.wide_input_scales,
            progress=prefixed(self.progress, "KV cache: "),
        )
        if not scales:
            raise ConfigError(
                "--kv-cache int8: rounding would move the attention scores of every layer by more "
                f"than {kv_cache.limit} (at least {min(kv_cache.score_errors):.3g}); leave the "
                "option out"
            )
        return scales, kv_cache, peaks

    def _calibration_text(self, tokens: int) -> tuple[NDArray[np.int64], Calibration]:
        """Read at most this many tokens to calibrate with, and describe them for the manifest."""
        content = self.checkpoint.text
        # AWQ hardly fits to its text; GPTQ and the ranges of INT8 inputs do
        # (docs/measured.md).
        has_ranges = any(scheme.kind == "w8a8" for scheme in self.schemes.values())
        mixed = "gptq" in self.recipe.rounding or has_ranges
        text = read_calibration_text(self.recipe.calibration, mixed=mixed)
        seq_len = min(SEQ_LEN, self.positions)
        seed = self.recipe.seed or 0
        ids = calibration_batches(
            content.tokenizer(), self.checkpoint.template(), text, tokens, seq_len, seed
        )
        return ids, Calibration(
            text=text.name, sha256=text.sha256, num_tokens=ids.size, seq_len=seq_len, seed=seed
        )

    def _calibrated(self, ids: NDArray[np.int64]) -> Calibrated:
        scale_type = NUMPY_TYPE[self.recipe.float_type]
        method, clip = self.recipe.rounding, self.recipe.clip
        if "gptq" not in method:
            runner = LayerRunner(self.checkpoint, ids, self.progress)
            return Calibrated(runner, self.schemes, method, clip, scale_type)
        held = HeldLayer(self.checkpoint)
        effort = [layer_effort(layer, ids.size) for _, layer in held.spec.each_layer()]
        shares = [each.look / each.total for each in effort]
        runner = LayerRunner(held, ids, self.progress, twin_taps, shares)
        twin = RoundedTwin(held, ids.shape[1])
        return Calibrated(runner, self.schemes, method, clip, scale_type, twin, effort)

    def _to_nearest(self) -> Calibrator:
        scale_type = NUMPY_TYPE[self.recipe.float_type]
        rounded = (self.checkpoint, self.schemes, self.recipe.clip, scale_type)
        if self.recipe.quant == AS_IN_SOURCE:
            anew = self.recipe.linears.overrides(self.checkpoint.spec)
            return AsInSource(*rounded, frozenset(self.schemes) - anew.keys())
        return ToNearest(*rounded)

    def _write_data(
        self, calibrator: Calibrator, work: Work
    ) -> tuple[Finished, list[DecoderTensors]]:
        """Write both data files; return the finished linears, and each graph's tensors."""
        outputs = [Output(*pair) for pair in zip(work.files, self._float_types, strict=True)]
        finished = self._write_linears(calibrator, work, outputs)
        folded = ScaledCheckpoint(self.checkpoint, finished.factors)
        tensors = []
        for i, output in enumerate(outputs):
            linears = {name: stored[i] for name, stored in finished.linears.items()}
            norms = _store_norms(folded, output)
            ropes = store_ropes(self.checkpoint.spec, self.positions, output)
            tensors.append(DecoderTensors(linears, norms, ropes))
        if self.head is None:
            return finished, tensors
        fc = outputs[0].add("eagle3.fc.weight", self.head.tensor("fc.weight").T)
        tap = HiddenTap(self.head.layers, fc)
        return finished, [replace(each, tap=tap) for each in tensors]

    def _write_linears(
        self, calibrator: Calibrator, work: Work, outputs: Sequence[Output]
    ) -> Finished:
        """Plan, convert and store every block that is not finished yet.

        The text goes through one layer after the other, since each reads the output of the one
        before. Except with GPTQ, a layer's rounding depends only on the layer's own activations. So
        layers are planned and converted side by side, and stored in their order.
        """
        finished = work.finished
        every = linear_blocks(self.checkpoint.spec)
        # A calibration with an effort reports whole layers itself.
        reported = isinstance(calibrator, Calibrated) and bool(calibrator.effort)
        first = self.checkpoint.spec.num_layers if reported else 0
        counted = {each.name: math.prod(each.shape) for b in every[first:] for each in b.linears}
        total = sum(counted.values())
        done = sum(size for name, size in counted.items() if name in finished.infos)
        lock, ended = threading.Lock(), threading.Event()

        def count(weights: int) -> None:
            nonlocal done
            with lock:
                if ended.is_set():
                    raise _EndedError
                done += weights
                self.progress("quantize", done, total, "weights")

        if counted and finished.blocks >= first:
            count(0)
        hidden, waiting = finished.hidden, deque[Future[_Converted]]()
        with ThreadPoolExecutor(self.recipe.workers) as pool:
            # One worker works in this thread, which a signal can interrupt anywhere.
            submit = pool.submit if self.recipe.workers > 1 else _done
            try:
                for block in every[finished.blocks :]:
                    if block.index == first and first:
                        count(0)
                    seen = calibrator.look(block, hidden)
                    hidden = None if seen is None else seen.hidden
                    report = count if block.index >= first else _uncounted
                    waiting.append(submit(self._convert_block, calibrator, block, seen, report))
                    del seen  # the worker may free its inputs
                    while len(waiting) == self.recipe.workers or (waiting and block is every[-1]):
                        finished = self._store_block(waiting.popleft().result(), finished, outputs)
                        work.save(finished)
                    if self.recipe.workers == 1:
                        hidden = finished.hidden  # also the states of the rounded layers
            except BaseException:
                ended.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return finished

    def _convert_block(
        self,
        calibrator: Calibrator,
        block: Block,
        seen: LayerActivations | None,
        count: Callable[[int], None],
    ) -> _Converted:
        plan = calibrator.plan(block, seen)
        float_type = NUMPY_TYPE[self.recipe.float_type]
        return plan, [convert(linear, float_type, count) for linear in plan.linears]

    def _store_block(
        self, converted: _Converted, finished: Finished, outputs: Sequence[Output]
    ) -> Finished:
        plan, converted_linears = converted
        warn_of_peaks(plan.peaks, self.recipe.float_type)
        linears, infos = {}, {}
        for linear, tensors in zip(plan.linears, converted_linears, strict=True):
            stored = store_linear(
                linear, tensors, outputs, wide_input_scales=self.wide_input_scales
            )
            linears[linear.layer.name] = stored
            infos[linear.layer.name] = linear_info(linear, stored[0], tensors)
        return finished.after(plan, linears, infos)


def _uncounted(_weights: int) -> None:
    """Report nothing: the calibration reports these weights."""


class _EndedError(Exception):
    """Ends a worker whose result is no longer wanted."""


def _done(work: Callable[..., _Converted], *arguments: Any) -> Future[_Converted]:
    future: Future[_Converted] = Future()
    future.set_result(work(*arguments))
    return future


@dataclass(frozen=True)
class Output:
    """The data file of one graph and the type of its floats."""

    file: DataFile
    float_type: FloatType

    def add(self, name: str, values: NDArray[np.floating]) -> StoredTensor:
        """Store floats in the graph's type.

        Raises:
            CheckpointError: a value is not finite, or the type cannot hold it.
        """
        dtype, wide = NUMPY_TYPE[self.float_type], values.astype(np.float32)
        check_range(wide, name, dtype)
        return self.file.add(name, ONNX_TYPE[self.float_type], values.shape, wide.astype(dtype))

    def add_any(self, name: str, values: NDArray[np.floating] | None) -> StoredTensor | None:
        """Store floats that may be missing."""
        return None if values is None else self.add(name, values)


def store_ropes(
    model: ModelSpec, positions: int, output: Output
) -> list[tuple[StoredTensor, StoredTensor]]:
    """Store the cosines and sines of each RoPE table."""
    result = []
    for number, rope in enumerate(model.ropes):
        tables = rope_tables(rope, model.rope_dims(number), positions)
        cos, sin = (
            output.add(f"{name}_table", table)
            for name, table in zip(rope_names(number), tables, strict=True)
        )
        result.append((cos, sin))
    return result


def store_linear(
    plan: LinearPlan,
    tensors: LinearTensors,
    outputs: Sequence[Output],
    *,
    wide_input_scales: bool,
) -> list[StoredLinear]:
    """Store the weights once, and scales and bias in the type of each graph.

    ``wide_input_scales`` stores the scales of a linear with INT8 inputs in FP32 for every graph.

    Returns:
        The linear as each graph reads it; the CPU's graph casts float weights.
    """
    name = plan.layer.name
    main = outputs[0]
    weight_type = _INT_TYPE.get(plan.scheme.kind, ONNX_TYPE[main.float_type])
    high_weight = high_scale = None
    if tensors.high_weight is not None and tensors.scale is not None:
        weight_type = onnx.TensorProto.INT4
        high_weight = main.file.add(
            f"{name}.high_weight", weight_type, plan.layer.shape, tensors.high_weight
        )
        high_scale = tensors.scale * np.float32(HIGH_PLANE)  # exact: a power of two
    weight = main.file.add(f"{name}.weight", weight_type, plan.layer.shape, tensors.weight)
    grid = None if plan.input_scale is None else np.array(plan.input_scale, dtype=np.float32)
    # Both operands of a product in INT8 have scales of one type (rule operand-scales).
    wide = wide_input_scales and grid is not None

    def store(output: Output) -> StoredLinear:
        scales = Output(output.file, "fp32") if wide else output
        return StoredLinear(
            plan.scheme,
            weight,
            scales.add_any(f"{name}.scale", tensors.scale),
            output.add_any(f"{name}.bias", tensors.bias),
            scales.add_any(f"{name}.input_scale", grid),
            plan.per_token,
            plan.rotation_block,
            high_weight,
            output.add_any(f"{name}.high_scale", high_scale),
            output.add_any(f"{name}.offset", tensors.offset),
            plan.input_order,
        )

    return [store(output) for output in outputs]


def linear_info(plan: LinearPlan, stored: StoredLinear, tensors: LinearTensors) -> LinearInfo:
    """Describe a linear for the manifest; its bytes are those of the engine's graph."""
    parts = (
        stored.weight,
        stored.scale,
        stored.high_weight,
        stored.high_scale,
        stored.offset,
    )
    from_source = None
    if plan.treatment is not None:
        from_source = FromSource(
            treatment=plan.treatment,
            groups=tensors.num_groups,
            changed_groups=tensors.changed_groups,
            relative_error=tensors.relative_error,
            note=plan.note,
        )
    return LinearInfo(
        scheme=plan.scheme,
        shape=plan.layer.shape,
        num_bytes=sum(part.num_bytes for part in parts if part is not None),
        activation_scale=plan.input_scale,
        per_token=plan.per_token,
        rotation_block=plan.rotation_block,
        offsets=stored.offset is not None,
        reordered=bool(plan.input_order),
        from_source=from_source,
    )


def _store_norms(folded: Checkpoint, output: Output) -> dict[str, StoredTensor]:
    """Store the RMSNorm weights, with the factors of the linears after them folded in."""
    return {
        name: output.add(f"{name}.weight", folded.tensor(source).astype(np.float32))
        for name, source in norm_sources(folded.spec).items()
    }
