"""ONNX Runtime on the CPU: the default engine of any machine, and the reference of every other.

The cache lives in numpy arrays that are bound as input and output at one address, so a step writes
its rows in place and copies nothing. A slot is a contiguous part of each array: a step on slots
``first .. first + B`` binds the addresses of that part.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edge.bundle import io_spec
from edge.bundle.manifest import FloatType, Manifest
from edge.bundle.onnx_file import OnnxFile
from edge.errors import (
    BackendError,
    BundleError,
    ConfigError,
    DependencyError,
    ResourceError,
    install_command,
)

from .cpu_attention import fuse_cache_attention
from .host_cache import HostCache
from .step import Floats, Step
from .windows import Batching, Window, window_step

if TYPE_CHECKING:
    import onnxruntime

_ROUNDS_INT8_WEIGHTS_SINCE = (1, 25)  # MatMulNBits of INT8 weights; of INT4 ones 1.23 has it


class OrtBackend:
    """A `Backend` on ONNX Runtime's CPU provider.

    Args:
        bundle: the bundle's directory; its files are trusted (`manifest.verify_files` comes first).
        manifest: its manifest.
        num_slots: sequences that the cache holds.
        kv_capacity: rows per slot; None is the bundle's own. Only the small graph file is
            re-shaped in memory, the weights stay untouched.
        max_step_tokens: the most tokens per sequence and step; bounds the activations' memory.
        num_threads: None is one per physical core.
        fuse_attention: rewrite attention for the CPU (`cpu_attention`); off runs the graph as is.
        int8_activations: let MatMulNBits round each block of activations to int8 (accuracy level
            4), its fastest kernel. That error is this engine's own, not the bundle's; off
            multiplies dequantized weights in FP32, as engines with float activations do in
            theirs, and weights are then dequantized in every step: decode is many times slower.
            None rounds where this ONNX Runtime can, true refuses where it rounds nothing.

    Raises:
        DependencyError: onnxruntime is missing, or too old for the bundle's dialect or for
            ``int8_activations``.
        BundleError: the graph's inputs and outputs are not those of `io_spec`.
        ConfigError: a number out of range, or ``int8_activations`` where nothing is rounded.
    """

    name = "ort-cpu"

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        *,
        num_slots: int = 1,
        kv_capacity: int | None = None,
        max_step_tokens: int = 512,
        num_threads: int | None = None,
        fuse_attention: bool = True,
        int8_activations: bool | None = None,
    ) -> None:
        self._set_sizes(manifest, num_slots, kv_capacity, max_step_tokens)
        if num_threads is not None and num_threads < 1:
            raise ConfigError(
                f"num_threads ({num_threads}) must be positive; leave it open for all"
            )
        cores = os.cpu_count() or 1
        if num_threads is not None and num_threads > cores:
            # They would spin and wait for each other; thousands never finish a step.
            raise ConfigError(
                f"num_threads ({num_threads}) is more than the {cores} cores of this machine; "
                "leave it open for all"
            )
        if int8_activations:
            check_int8_activations(manifest)
        self.rounds_activations = int8_activations is not False and any(
            linear.scheme.kind in ("int4", "int8")
            for linear in manifest.quantization.linears.values()
        )
        graph = load_graph(bundle / manifest.graphs.cpu, manifest, "fp32", self.capacity)
        self._fused = fuse_attention and self.dialect.one_attention_operator
        if self._fused:
            fuse_cache_attention(graph, self.model)
        self._session = _open_session(
            graph, bundle, manifest, num_threads, int8_activations=int8_activations is not False
        )
        _return_freed_memory()
        self._outputs = [value.name for value in self._session.get_outputs()]
        model = self.model
        shape = (num_slots, model.num_kv_heads, self.capacity, model.head_dim)
        self._dtype = np.float32
        try:
            self._memory = HostCache(2 * model.num_layers, shape, np.dtype(self._dtype))
        except MemoryError as error:
            raise ResourceError(
                f"the KV cache of {num_slots} slots of {self.capacity} tokens does not fit into "
                "memory; fewer slots, or a smaller --kv-capacity"
            ) from error
        self._cache = self._memory.arrays
        self._kv_positions = np.arange(self.capacity, dtype=np.int64)
        self._batching = ort_batching(self._fused)
        self._decode_steps: dict[tuple[int, int], BoundStep] = {}

    @property
    def failed(self) -> str | None:
        """See `edge.backends.Backend.failed`."""
        return "the backend is closed" if self._session is None else None

    @property
    def cache_bytes(self) -> int:
        """Memory of the cache when full."""
        return sum(array.nbytes for array in self._cache)

    def forward(self, step: Step) -> NDArray[np.float32]:
        """See `edge.backends.Backend.forward`."""
        step.check(self)
        windows = self._batching.plan(step)
        if len(windows) == 1 and windows[0].whole:
            return self._run(step)
        shape = (*step.logits_indices.shape, self.model.vocab_size)
        logits = np.empty(shape, dtype=np.float32)
        for window in windows:
            logits[list(window.rows)] = self._run_window(window, step)[list(window.places)]
        return logits

    def _run_window(self, window: Window, step: Step) -> NDArray[np.float32]:
        """Run a part of a step; the row that an idle slot writes is put back afterwards."""
        idle = [window.first + place for place in window.idle]
        kept = [(slot, self.read_slot(slot, 1)) for slot in idle]
        try:
            return self._run(window_step(window, step))
        finally:
            for slot, row in kept:
                self._put_back(slot, row)

    def _put_back(self, slot: int, row: Floats) -> None:
        """Restore the first row of a slot that a step has passed over."""
        self.write_slot(slot, row)

    def read_slot(self, slot: int, length: int) -> Floats:
        """See `edge.backends.Backend.read_slot`."""
        return np.stack([array[slot, :, :length] for array in self._cache])

    def write_slot(self, slot: int, rows: Floats) -> None:
        """See `edge.backends.Backend.write_slot`."""
        for array, values in zip(self._cache, rows, strict=True):
            array[slot, :, : values.shape[1]] = values
        self._memory.wrote(slot, rows.shape[2])

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """See `edge.backends.Backend.copy_slot`."""
        for array in self._cache:
            array[target, :, :length] = array[source, :, :length]
        self._memory.wrote(target, length)

    def close(self) -> None:
        """Free the session and the cache."""
        self._decode_steps.clear()
        self._cache = []
        vars(self).pop("_memory", None)
        self._session = None

    def _set_sizes(
        self, manifest: Manifest, num_slots: int, kv_capacity: int | None, max_step_tokens: int
    ) -> None:
        if num_slots < 1 or max_step_tokens < 1:
            raise ConfigError(
                f"num_slots ({num_slots}) and max_step_tokens ({max_step_tokens}) must be positive"
            )
        self.model = manifest.model
        self.dialect = io_spec.DIALECTS[manifest.dialect]
        self.num_slots = num_slots
        self.capacity = manifest.kv_capacity if kv_capacity is None else kv_capacity
        self.max_step_tokens = max_step_tokens
        io_spec.check_capacity(self.capacity, manifest.rope_positions)

    def _run(self, step: Step) -> NDArray[np.float32]:
        first, batch, seq, num_logits = step.slots[0], step.batch, step.seq, step.num_logits
        if seq == 1 and num_logits == 1:
            # Decode repeats the same shapes for ever: bind the cache once per run of slots.
            bound = self._decode_steps.get((first, batch))
            if bound is None:
                bound = self._decode_steps[first, batch] = self._make_step(first, batch, 1, 1)
        else:
            bound = self._make_step(first, batch, seq, num_logits)
        return bound.run(step)

    def _make_step(self, first: int, batch: int, seq: int, num_logits: int) -> BoundStep:
        return _Step(self, first, batch, seq, num_logits)


def ort_batching(fused: bool) -> Batching:
    """What ONNX Runtime takes in one run; ``fused`` is with `GroupQueryAttention`.

    A run reads all weights, a row more computes: at the 1.5B shape (INT4, 2 cores) 20 ms and 10 ms.
    So decode spans one idle slot. `GroupQueryAttention` takes several tokens after a past for one
    sequence at a time.
    """
    return Batching(decode_gap=1, chunk_gap=0, alone_after_past=fused)


class BoundStep(Protocol):
    """A step of one shape, prepared once and run many times."""

    def run(self, step: Step) -> NDArray[np.float32]:
        """Logits ``[B, N, vocab]``; the step's slots are those that are bound."""
        ...


class _Step:
    """Fixed buffers of one step shape, bound once and run many times."""

    def __init__(
        self, backend: OrtBackend, first: int, batch: int, seq: int, num_logits: int
    ) -> None:
        model = backend.model
        self._backend = backend
        self._memory = backend._memory
        self._slots = slice(first, first + batch)
        self._embeds = np.empty((batch, seq, model.hidden_size), dtype=backend._dtype)
        self._positions = np.empty((batch, seq), dtype=np.int64)
        self._cursor = np.empty(batch, dtype=np.int64)
        self._indices = np.empty((batch, num_logits), dtype=np.int64)
        self._logits = np.empty((batch, num_logits, model.vocab_size), dtype=backend._dtype)
        self._new: list[Floats] = []
        # ONNX Runtime is given bare addresses; what they point at must outlive a `close`.
        self._caches = [array[self._slots] for array in backend._cache]
        self._binding = backend._session.io_binding()
        dialect = backend.dialect
        inputs: dict[str, NDArray[Any]] = {
            io_spec.INPUTS_EMBEDS: self._embeds,
            io_spec.POSITION_IDS: self._positions,
            dialect.cursor: self._cursor,
            io_spec.LOGITS_INDICES: self._indices,
        }
        outputs: dict[str, NDArray[Any]] = {io_spec.LOGITS: self._logits}
        for layer in range(model.num_layers):
            caches = self._caches[2 * layer : 2 * layer + 2]
            inputs.update(zip(io_spec.cache_inputs(layer), caches, strict=True))
            rows = caches
            if not dialect.in_place:
                shape = (batch, model.num_kv_heads, seq, model.head_dim)
                rows = [np.empty(shape, dtype=backend._dtype) for _ in caches]
                self._new += rows
            outputs.update(zip(dialect.cache_outputs(layer), rows, strict=True))
        for name, array in inputs.items():
            self._bind(self._binding.bind_input, name, array)
        for name in backend._outputs:
            self._bind(self._binding.bind_output, name, outputs[name])

    @staticmethod
    def _bind(bind: Any, name: str, array: NDArray[Any]) -> None:
        bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def run(self, step: Step) -> NDArray[np.float32]:
        backend = self._backend
        self._embeds[...] = step.embeds
        self._positions[...] = step.positions
        self._cursor[...] = step.starts
        self._indices[...] = step.logits_indices
        kv_len = backend.dialect.rows_read(step.starts, step.kv_len)
        self._bind(self._binding.bind_input, io_spec.KV_POSITIONS, backend._kv_positions[:kv_len])
        try:
            backend._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise BackendError(
                f"ONNX Runtime failed on a step of {step.positions.shape} tokens: {error}"
            ) from error
        self._append(step)
        for slot, start in enumerate(step.starts, start=self._slots.start):
            self._memory.wrote(slot, start + step.seq)
        self._memory.settle(step.positions.size)
        return self._logits

    def _append(self, step: Step) -> None:
        """Copy the step's keys and values into the cache, where the graph does not write them."""
        if not self._new:
            return
        for row, start in enumerate(step.starts):
            for cache, new in zip(self._caches, self._new, strict=True):
                cache[row, :, start : start + step.seq] = new[row]


def _return_freed_memory() -> None:
    """Give the kernel back what loading has freed: 200 MB of packed weights' originals at 1.5B.

    glibc keeps it for a process that would need it again; elsewhere there is nothing to call.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def load_graph(path: Path, manifest: Manifest, float_type: FloatType, capacity: int) -> OnnxFile:
    """Read a decoder, give its cache ``capacity`` rows and hold it against `io_spec`.

    Raises:
        BundleError: its inputs and outputs are not those of `io_spec`.
    """
    graph = OnnxFile(path.read_bytes())
    cache = [
        value.name
        for value in [*graph.inputs, *graph.outputs]
        if value.name.startswith(("past_key_values.", "present."))
    ]
    graph.set_dimension(cache, 2, capacity)
    spec = (manifest.model, manifest.dialect, float_type, capacity)
    for found, expected in (
        (graph.inputs, io_spec.decoder_inputs(*spec)),
        (graph.outputs, io_spec.decoder_outputs(*spec)),
    ):
        ours = [(value.name, value.dtype, value.shape) for value in found]
        theirs = [(value.name, value.dtype, value.shape) for value in expected]
        if ours != theirs:
            wrong = next(
                (pair for pair in zip(ours, theirs, strict=False) if pair[0] != pair[1]),
                (f"{len(ours)} tensors", f"{len(theirs)} tensors"),
            )
            raise BundleError(
                f"{path} does not fit the decoder's contract: found {wrong[0]}, expected "
                f"{wrong[1]}; export the bundle again with this edge-llm"
            )
    return graph


def _open_session(
    graph: OnnxFile,
    bundle: Path,
    manifest: Manifest,
    num_threads: int | None,
    *,
    int8_activations: bool,
) -> onnxruntime.InferenceSession:
    ort = import_onnxruntime(manifest, "the CPU backend needs onnxruntime", "cpu")
    options = session_options(ort, bundle)
    options.intra_op_num_threads = num_threads or 0
    # The arena grows in powers of two and never shrinks: 250 MB more resident at 1.5B.
    options.enable_cpu_mem_arena = False
    # What MatMulNBits computes with, as its schema numbers it: 1 is fp32, 4 is int8.
    options.add_session_config_entry(
        "session.qdq_matmulnbits_accuracy_level", "4" if int8_activations else "1"
    )
    try:
        return ort.InferenceSession(graph.serialize(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise BackendError(f"ONNX Runtime cannot load {bundle}: {error}") from error


def check_int8_activations(manifest: Manifest) -> None:
    """Refuse the wish that activations are rounded where it would change nothing.

    Raises:
        ConfigError: no linear layer of the bundle has integer weights and float inputs.
        DependencyError: this ONNX Runtime multiplies them in float, whatever it is asked for.
    """
    kinds = {linear.scheme.kind for linear in manifest.quantization.linears.values()}
    if "int4" in kinds:
        return
    if "int8" not in kinds:
        raise ConfigError(
            f"int8 activations have no effect on {manifest.name} ({manifest.quantization.name}): "
            "only inputs of INT8 or INT4 weights are rounded; leave the option out"
        )
    ort = import_onnxruntime(manifest, "int8 activations need onnxruntime", "cpu")
    needed = _ROUNDS_INT8_WEIGHTS_SINCE
    if onnxruntime_version(ort) < needed:
        raise DependencyError(
            f"int8 activations with INT8 weights need onnxruntime >= {needed[0]}.{needed[1]}; "
            f"found {ort.__version__}, which multiplies them in float; upgrade it, or leave the "
            "option out"
        )


def onnxruntime_version(ort: ModuleType) -> tuple[int, int]:
    """Major and minor version of the module ``onnxruntime``."""
    major, minor = ort.__version__.split(".")[:2]
    return int(major), int(minor)


def import_onnxruntime(manifest: Manifest, need: str, extra: str) -> ModuleType:
    """The module ``onnxruntime``.

    Args:
        manifest: of the bundle that it shall run.
        need: begins the message if it is missing.
        extra: what to install then.

    Raises:
        DependencyError: it is missing or too old for the bundle's dialect.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise DependencyError(f"{need}; install it with: {install_command(extra)}") from error
    needed = io_spec.DIALECTS[manifest.dialect].min_onnxruntime
    if onnxruntime_version(ort) < needed:
        raise DependencyError(
            f"this bundle (dialect {manifest.dialect}) needs onnxruntime >= "
            f"{needed[0]}.{needed[1]}, found {ort.__version__}; upgrade it, or export with "
            "--dialect portable"
        )
    module: ModuleType = ort
    return module


def session_options(ort: ModuleType, bundle: Path) -> onnxruntime.SessionOptions:
    """Options that every session on a bundle has: quiet, and the weights are found."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", os.fspath(bundle.resolve())
    )
    return options
