"""Runs a bundle on the CPU: the default engine of any machine, and the reference for all others.

The cache is in numpy arrays that are bound as input and output at one address. So a step writes its
rows in place and copies nothing.
"""

from __future__ import annotations

import ctypes
import itertools
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge.backends.step import Step, refuse_adapter
from edge.bundle import io_spec
from edge.bundle.manifest import Manifest
from edge.bundle.onnx_file import OnnxFile
from edge.device.huge_pages import collapse_filled
from edge.device.memory import read_available_memory_bytes
from edge.engine_config import INT8_PREFILL_TOKENS
from edge.errors import BackendError, ConfigError, ResourceError
from edge.model.cache import cache_tensors
from edge.model.slot_rows import SlotRows
from edge.model.spec import ModelSpec

from .cpu_attention import can_fuse, fuse_cache_attention
from .host_cache import HostCaches
from .join_planes import join_planes
from .runner import RunShape, StepOutputs, StepRunner, cache_bindings, fill_inputs, make_inputs
from .session import (
    accuracy_level,
    check_int8_activations,
    check_sizes,
    check_threads,
    import_onnxruntime,
    load_graph,
    multiplies_8_bits,
    open_session,
    rounds_activations,
)

if TYPE_CHECKING:
    from edge.bundle.kv_scales import Scales

_WEIGHTS_BYTES = 8 << 20  # larger regions hold weights


class OrtBackend:
    """A `Backend` on ONNX Runtime's CPU provider.

    Args:
        bundle: the bundle's directory; its files are trusted (`verify_files` comes first).
        manifest: its manifest.
        num_slots: sequences that the cache holds.
        kv_capacity: rows per slot; None is the bundle's own. Only the small graph file is
            re-shaped in memory, the weights stay untouched.
        max_step_tokens: the most tokens per sequence and step; bounds the activations' memory.
        num_threads: CPU threads; None is one per physical core.
        fuse_attention: whether to rewrite attention for the CPU, if `cpu_attention.can_fuse`; off
            runs the graph as it is.
        int8_activations: let MatMulNBits round each block of activations to int8 (accuracy level
            4), its fastest kernel. That error is this engine's own, not the bundle's. Off
            multiplies dequantized weights in FP32, like engines with float activations. Weights are
            then dequantized in every step, so decode is many times slower. None rounds if this ONNX
            Runtime can; true is refused if nothing would be rounded.
        int8_prompts: run steps of many tokens in a second session whose weights are INT8
            (`int8_prompts`).
        deterministic: compute a token alike whatever runs beside it (`even_rows`). Steps of one
            token and of several still differ.
        hidden_states: put out the hidden states that a head reads, if the manifest has one.

    Raises:
        BackendError: ONNX Runtime has no kernels here for ``deterministic``.
        DependencyError: onnxruntime is missing, or too old for the bundle's dialect or for
            ``int8_activations``.
        BundleError: the graph's inputs and outputs are not those of `io_spec`.
        ConfigError: a number is out of range; ``int8_activations`` or ``int8_prompts`` would change
            nothing; or ``deterministic`` is set and attention is not rewritten.
        ResourceError: there is no memory for the cache, or for the weights of ``int8_prompts``.
    """

    name = "ort-cpu"
    meanwhile: Callable[[], None] | None = None
    forward_best = None  # rows are in host memory: finding the best costs more than drawing

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
        int8_prompts: bool = False,
        deterministic: bool = False,
        hidden_states: bool = False,
    ) -> None:
        self.capacity = check_sizes(manifest, num_slots, kv_capacity, max_step_tokens)
        self.num_slots, self.max_step_tokens = num_slots, max_step_tokens
        check_threads(num_threads)
        if int8_activations:
            check_int8_activations(manifest)
        rounds = int8_activations is not False
        self.rounds_activations = rounds and rounds_activations(manifest)
        self._model, self._dialect = manifest.model, io_spec.DIALECTS[manifest.dialect]
        if int8_prompts:
            _check_memory(manifest)
        fused = fuse_attention and can_fuse(manifest)
        if deterministic and not self._dialect.one_attention_operator:
            raise ConfigError(
                f"deterministic needs a bundle of dialect native, whose attention is one operator; "
                f"this one is {manifest.dialect}: export it again, or leave the option out"
            )
        if deterministic and not fused:
            raise ConfigError(
                "deterministic needs attention in ONNX Runtime's GroupQueryAttention, which "
                "does not take this model's heads; leave the option out"
            )
        if deterministic and platform.machine() not in ("x86_64", "AMD64"):
            raise BackendError(
                f"deterministic answers hold on x86-64 only, and this is {platform.machine()}, "
                "where rows differed in their last bits though a short trial found none; leave "
                "deterministic out"
            )

        def open_graph(prompts: bool) -> Any:
            graph = load_cpu_graph(
                bundle,
                manifest,
                self.capacity,
                fuse_attention=fuse_attention,
                int8_activations=rounds,
                int8_prompts=prompts,
                deterministic=deterministic,
                hidden_states=hidden_states,
            )
            session = open_session(graph, bundle, manifest, num_threads, int8_activations=rounds)
            del graph  # its weights are in the session's own form by now
            _return_freed_memory()
            return session

        self.kv_scales: Scales = {}
        if manifest.kv_cache is not None:
            from edge.bundle.kv_scales import read_scales

            self.kv_scales = read_scales(bundle, manifest, manifest.graphs.cpu)
        self._session = open_graph(prompts=False)
        self._prompt_session = open_graph(prompts=True) if int8_prompts else None
        # One piece after each step; none after the first step, since an answer waits for it.
        self._collapsing = itertools.chain([0], collapse_filled(_WEIGHTS_BYTES))
        model = self._model
        tensors = cache_tensors(model, "fp32", manifest.int8_layers)
        try:
            self._cache = HostCaches(tensors, num_slots, self.capacity, self.kv_scales)
        except MemoryError as error:
            raise ResourceError(
                f"the KV cache of {num_slots} slots of {self.capacity} tokens does not fit into "
                "memory; fewer slots, or a smaller --kv-capacity"
            ) from error
        self._kv_positions = np.arange(self.capacity, dtype=np.int64)
        self._runner = StepRunner(
            lambda shape, outputs: _HostStep(
                self._session_of(shape),
                self._dialect,
                model,
                self._cache,
                self._kv_positions,
                shape,
                outputs,
                embeds_width=manifest.embeds_width,
            ),
            read_slot=self.read_slot,
            put_back=self.write_slot,
            num_slots=num_slots,
            out_width=io_spec.output_width(model),
            hidden_width=manifest.hidden_width if hidden_states else 0,
            dtype=np.float32,
            fused=fused,
        )
        self.adapter_rank, self.set_adapter = 0, refuse_adapter
        if "adapters" in manifest.extras:
            from edge.adapters.slots import adapt

            adapt(self, self._runner, bundle, manifest, self._make_even if deterministic else None)
        elif deterministic:
            self._make_even()

    @property
    def hidden_states(self) -> NDArray[np.float32] | None:
        """See `edge.backends.Backend.hidden_states`."""
        return self._runner.hidden

    @property
    def failed(self) -> str | None:
        """See `edge.backends.Backend.failed`."""
        return "the backend is closed" if self._session is None else None

    @property
    def cache_bytes(self) -> int:
        """Return the memory of the cache when full, in bytes."""
        return sum(array.nbytes for array in self._cache.arrays.values())

    def forward(self, step: Step) -> NDArray[np.float32]:
        """See `edge.backends.Backend.forward`."""
        step.check(self)
        rows = self._runner.run(step)
        next(self._collapsing, None)
        return rows

    def read_slot(self, slot: int, length: int) -> SlotRows:
        """See `edge.backends.Backend.read_slot`."""
        return self._cache.read(slot, length)

    def write_slot(self, slot: int, rows: SlotRows) -> None:
        """See `edge.backends.Backend.write_slot`."""
        self._cache.write(slot, rows)

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """See `edge.backends.Backend.copy_slot`."""
        self._cache.copy(source, target, length)

    def close(self) -> None:
        """Free the session and the cache."""
        self._runner.forget()
        self._cache.close()
        self._session = self._prompt_session = None

    def _make_even(self) -> None:
        from .even_rows import find_unevenness

        found = find_unevenness(self, self._model.hidden_size)
        if found is not None and self.num_slots > 1:
            self._runner.pair_lone_tokens()
            found = find_unevenness(self, self._model.hidden_size)
        if found is not None:
            self.close()
            raise BackendError(
                f"this ONNX Runtime computes {found} differently on this processor, so answers "
                "cannot be kept from depending on what else runs; leave deterministic out"
            )

    def _session_of(self, shape: RunShape) -> Any:
        """Return the session that runs steps of a shape."""
        if shape.seq < INT8_PREFILL_TOKENS or shape.num_logits > 1 or self._prompt_session is None:
            return self._session
        return self._prompt_session


def load_cpu_graph(
    bundle: Path,
    manifest: Manifest,
    capacity: int,
    *,
    fuse_attention: bool,
    int8_activations: bool,
    int8_prompts: bool = False,
    deterministic: bool = False,
    hidden_states: bool = False,
) -> OnnxFile:
    """Read the decoder as `OrtBackend` runs it.

    Args:
        bundle: the bundle's directory.
        manifest: its manifest.
        capacity: rows of the cache.
        fuse_attention: whether to rewrite attention for the CPU, if `can_fuse`.
        int8_activations: the value that `open_session` will get.
        int8_prompts: whether to make the form for steps of many tokens.
        deterministic: whether to make the form whose products treat all rows alike.
        hidden_states: whether to keep the output for a head, as in `load_graph`.

    Raises:
        DependencyError: `import_onnxruntime` finds none that is new enough.
        BundleError: the graph is not one that edge-llm's exporter wrote.
    """
    path = bundle / manifest.graphs.cpu
    graph = load_graph(path, manifest, "fp32", capacity, hidden_states=hidden_states)
    if fuse_attention and can_fuse(manifest):
        fuse_cache_attention(graph, manifest.model)
    ort = import_onnxruntime(manifest, "the CPU backend needs onnxruntime", "cpu")
    widened: list[str] = []
    if int8_prompts:
        from .int8_prompts import widen_products

        widened = widen_products(graph, bundle, manifest)
    # Otherwise no kernel takes 8-bit weights, and a joined one is unpacked to float in every step.
    if int8_activations and multiplies_8_bits(ort):
        join_planes(graph, bundle, manifest, accuracy_level=accuracy_level(True), without=widened)
    if deterministic:
        from .even_rows import cut_groups

        cut_groups(graph, bundle)
    return graph


def _check_memory(manifest: Manifest) -> None:
    """Refuse INT8 weights for prompts that do not fit into memory."""
    from .int8_prompts import int8_bytes

    needed = 2 * int8_bytes(manifest)  # they exist twice while the session packs them
    free = read_available_memory_bytes()
    if free is not None and free < needed:
        raise ResourceError(
            f"--prefill int8 takes {needed / 1e9:.1f} GB of memory while it loads, half of it from "
            f"then on, and {free / 1e9:.1f} GB are free; leave the option out, or free some memory"
        )


class _HostStep:
    """Fixed arrays for one step shape, bound once and run many times.

    Args:
        session: ONNX Runtime's session.
        dialect, model: dialect and dimensions of its graph.
        cache: the cache of all slots.
        kv_positions: 0, 1, 2, ... up to the capacity.
        shape: shape of the steps.
        outputs: memory for logits and hidden states.
        embeds_width: width of ``inputs_embeds``, as in `manifest.Manifest`.
    """

    def __init__(
        self,
        session: Any,
        dialect: io_spec.DialectSpec,
        model: ModelSpec,
        cache: HostCaches,
        kv_positions: NDArray[np.int64],
        shape: RunShape,
        outputs: StepOutputs,
        *,
        embeds_width: int,
    ) -> None:
        first, batch, seq, _ = shape
        self._session, self._dialect, self._first = session, dialect, first
        self._cache, self._kv_positions = cache, kv_positions
        self._inputs = make_inputs(dialect, embeds_width, np.float32, shape)
        self._logits, self.hidden = outputs
        # ONNX Runtime gets bare addresses; the arrays at them must outlive a `close`.
        self._caches = {n: array[first : first + batch] for n, array in cache.arrays.items()}
        inputs, bound, self._new = cache_bindings(
            dialect, self._caches, lambda _, cache: np.empty_like(cache[:, :, :seq], order="C")
        )
        self.binding = session.io_binding()
        for name, array in {**self._inputs, **inputs}.items():
            _bind(self.binding.bind_input, name, array)
        bound[io_spec.output_name(model)] = self._logits
        if self.hidden is not None:
            bound[io_spec.HIDDEN_STATES] = self.hidden
        for name, array in bound.items():
            _bind(self.binding.bind_output, name, array)

    def run(self, step: Step) -> NDArray[np.float32]:
        fill_inputs(self._inputs, step, step.embeds)
        kv_len = self._dialect.rows_read(step.starts, step.kv_len)
        _bind(self.binding.bind_input, io_spec.KV_POSITIONS, self._kv_positions[:kv_len])
        try:
            self._session.run_with_iobinding(self.binding)
        except Exception as error:
            raise BackendError(
                f"ONNX Runtime failed on a step of {step.positions.shape} tokens: {error}"
            ) from error
        self._append(step)
        for slot, start in enumerate(step.starts, start=self._first):
            self._cache.wrote(slot, start + step.seq)
        self._cache.settle(step.positions.size)
        return self._logits

    def _append(self, step: Step) -> None:
        """Copy the step's keys and values into the cache, if the graph does not write them."""
        if not self._new:
            return
        for row, start in enumerate(step.starts):
            for name, new in self._new.items():
                self._caches[name][row, :, start : start + step.seq] = new[row]


def _bind(bind: Any, name: str, array: NDArray[Any]) -> None:
    bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _return_freed_memory() -> None:
    """Return memory freed by loading to the kernel: 200 MB of packed weights' originals at 1.5B.

    glibc keeps it for later use by the process; other C libraries need no such call.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
