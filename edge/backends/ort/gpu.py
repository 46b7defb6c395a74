"""Runs a bundle on an NVIDIA GPU with ONNX Runtime: the graph of engines, without an engine.

It runs ``decoder.onnx``, typed fp16 or bf16. ONNX Runtime's CUDA provider has kernels for all of
dialect ``native``, including TensorScatter and Attention of opset 24 (OperatorKernels.md). It also
has `GroupQueryAttention`, which reads and writes the cache in place, so the load-time rewrite for
the CPU is used here, too. Dialect ``portable`` runs as it is and its new rows are scattered.

The cache is in device memory that ONNX Runtime allocated, at fixed addresses. Only a step's
embeddings and indices go in, and only logits come out.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge.backends.step import Step, last_token, refuse_adapter, step_after
from edge.bundle import io_spec
from edge.bundle.manifest import FloatType, Manifest
from edge.bundle.onnx_file import Node, OnnxFile
from edge.errors import BackendError, DependencyError, EdgeError
from edge.model.cache import cache_tensors
from edge.model.slot_rows import SlotRows

from .cpu_attention import can_fuse, fuse_cache_attention
from .device import OrtDevice, import_for_device, open_on_device
from .device_cache import OrtDeviceCache
from .device_step import DeviceStep
from .faults import DeviceFaults
from .float_bits import from_storage, storage_dtype, to_storage
from .join_planes import hand_over, join_planes
from .placement import tensor_nodes_elsewhere
from .runner import RunShape, StepOutputs, StepRunner
from .session import check_sizes, load_graph, session_options

if TYPE_CHECKING:
    from edge.bundle.kv_scales import Scales

_log = logging.getLogger(__name__)


class OrtCudaBackend:
    """A `Backend` on ONNX Runtime's CUDA provider.

    Args:
        bundle: the bundle's directory; its files are trusted (`verify_files` comes first).
        manifest: its manifest.
        num_slots: sequences that the cache holds.
        kv_capacity: rows per slot; None is the bundle's own.
        max_step_tokens: the most tokens per sequence and step; bounds the activations' memory.
        fuse_attention: whether to rewrite attention to `GroupQueryAttention`, if `can_fuse`;
            off runs the graph as it is, which copies the cache's valid rows in every step.
        device: another device than the first GPU; tests use the CPU.
        hidden_states: put out the hidden states that a head reads, if the manifest has one.

    Attributes:
        nodes_elsewhere: number of nodes by operator that work on tensors but run outside the
            device; empty if all is well. They are logged as a warning, too.

    Raises:
        DependencyError: onnxruntime-gpu, a library or a kernel that it needs is missing.
        DeviceMemoryError: weights and cache do not fit into the device's memory.
        BundleError: the graph's inputs and outputs are not those of `io_spec`.
        ConfigError: a number is out of range.
    """

    name = "ort-cuda"
    meanwhile: Callable[[], None] | None = None  # ONNX Runtime returns when the device is done
    forward_best = None  # only engines have outputs for it, not bundles
    rounds_activations = False

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        *,
        num_slots: int = 1,
        kv_capacity: int | None = None,
        max_step_tokens: int = 512,
        fuse_attention: bool = True,
        device: OrtDevice | None = None,
        hidden_states: bool = False,
    ) -> None:
        self.capacity = check_sizes(manifest, num_slots, kv_capacity, max_step_tokens)
        self.num_slots, self.max_step_tokens = num_slots, max_step_tokens
        self.device = device or OrtDevice()
        self._model, self._dialect = manifest.model, io_spec.DIALECTS[manifest.dialect]
        self._float_type: FloatType = manifest.dtype
        cache_bytes = io_spec.kv_bytes_per_token(self._model, self._float_type)
        cache_bytes *= self.capacity * num_slots
        self._faults = DeviceFaults(
            self.device.name,
            f"{cache_bytes / 1e6:,.0f} MB ({num_slots} slots of {self.capacity} tokens)",
        )
        _check_types(manifest)
        self.kv_scales: Scales = {}
        self._ort = import_for_device(manifest, self.device)
        path = bundle / manifest.graphs.decoder
        graph = load_graph(
            path, manifest, self._float_type, self.capacity, hidden_states=hidden_states
        )
        self._embeds_width = manifest.embeds_width
        self._fused = fuse_attention and can_fuse(manifest)
        if self._fused:
            fuse_cache_attention(graph, self._model)
            _take_total_from_shape(graph)
        join_planes(graph, bundle, manifest)
        self._runner = StepRunner(
            self._bind,
            read_slot=self.read_slot,
            put_back=self._put_back,
            num_slots=num_slots,
            out_width=io_spec.output_width(self._model),
            hidden_width=manifest.hidden_width if hidden_states else 0,
            dtype=storage_dtype(self._float_type),
            fused=self._fused,
        )
        self._session: Any = None
        self.adapter_rank, self.set_adapter = 0, refuse_adapter
        self._resources = ExitStack()
        try:
            events = self._load(graph, bundle, manifest)
            self._warm_up(1)
            self._check_in_place()
        except BaseException:
            self.close()  # drops cycles, so that a smaller try has memory (`device_backend`)
            raise
        self.nodes_elsewhere = tensor_nodes_elsewhere(events, self.device.provider)
        if self.nodes_elsewhere:
            _log.warning(
                "%d nodes run outside %s, each step waits for them: %s",
                sum(self.nodes_elsewhere.values()),
                self.device.provider,
                ", ".join(f"{count} {name}" for name, count in self.nodes_elsewhere.items()),
            )

    def _load(self, graph: OnnxFile, bundle: Path, manifest: Manifest) -> list[dict[str, Any]]:
        """Open the session, allocate the cache, and profile a first step; returns its events."""
        options = session_options(self._ort, bundle, manifest)
        hand_over(graph, self._ort, options)
        # Weights stay out of the arena, which would round every one of them up.
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        # MatMulNBits keeps the activations' type, as an engine does; 4 would mean int8.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        with tempfile.TemporaryDirectory(prefix="edge-llm-") as folder:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "step")
            with self._faults.explain("while loading"):
                self._session = open_on_device(self._ort, self.device, graph.serialize(), options)
                self._cache = OrtDeviceCache(
                    self._ort,
                    self.device,
                    cache_tensors(self._model, self._float_type),
                    self.num_slots,
                    self.capacity,
                    storage_dtype(self._float_type),
                )
                self._resources.callback(self._cache.close)
                if "adapters" in manifest.extras:
                    from edge.adapters.mirror import adapt_device

                    store = partial(to_storage, float_type=self._float_type)
                    adapt_device(self, self._runner, bundle, manifest, self._cache, store)
            self._warm_up(0)
            events: list[dict[str, Any]] = json.loads(
                Path(self._session.end_profiling()).read_text("utf-8")
            )
        return events

    @property
    def hidden_states(self) -> NDArray[np.float32] | None:
        """See `edge.backends.Backend.hidden_states`."""
        return self._runner.hidden

    @property
    def failed(self) -> str | None:
        """See `edge.backends.Backend.failed`; after a lost device the process must restart."""
        return "the backend is closed" if self._session is None else self._faults.lost

    @property
    def cache_bytes(self) -> int:
        """Return the device memory of the cache, in bytes."""
        return self._cache.num_bytes

    def forward(self, step: Step) -> NDArray[np.float32]:
        """See `edge.backends.Backend.forward`."""
        self._check_usable()
        step.check(self)
        return self._runner.run(step)

    def read_slot(self, slot: int, length: int) -> SlotRows:
        """See `edge.backends.Backend.read_slot`; bf16 rows become float32, without loss."""
        self._check_usable()
        with self._faults.explain("while reading a slot"):
            rows = self._cache.read(slot, length)
        return rows.each(lambda array: from_storage(array, self._float_type))

    def write_slot(self, slot: int, rows: SlotRows) -> None:
        """See `edge.backends.Backend.write_slot`."""
        self._check_usable()
        stored = rows.each(lambda array: to_storage(array, self._float_type))
        with self._faults.explain("while writing a slot"):
            self._cache.write(slot, stored)

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """See `edge.backends.Backend.copy_slot`; nothing leaves the device."""
        self._check_usable()
        with self._faults.explain("while copying a slot"):
            self._cache.copy(source, target, length)

    def close(self) -> None:
        """Free the session and the cache."""
        self._runner.forget()
        self._resources.close()
        self._session = None

    def _check_usable(self) -> None:
        self._faults.check()
        if self._session is None:
            raise BackendError("the backend is closed; load the bundle again")

    def _put_back(self, slot: int, row: SlotRows) -> None:
        try:
            self.write_slot(slot, row)
        except EdgeError as error:
            # Its rows may be a prefix that others share, and nobody would notice the fault.
            self._faults.lost = self._faults.lost or f"a slot's row could not be put back: {error}"
            raise

    def _warm_up(self, position: int) -> None:
        """Run a decode step, so that the device loads its kernels."""
        embeds = np.ones((1, 1, self._embeds_width), dtype=np.float16)
        self.forward(step_after([0], [position], embeds, last_token(1)[None]))

    def _check_in_place(self) -> None:
        """Check that the rows of two steps exist: a copied cache would have lost the first."""
        if not all(rows.any(axis=(0, 2)).all() for rows in self.read_slot(0, 2).values()):
            raise BackendError(
                f"ONNX Runtime {self._ort.__version__} did not update the cache in place on "
                f"{self.device.provider}; use another version, or --backend ort-cpu"
            )

    def _bind(self, shape: RunShape, outputs: StepOutputs) -> DeviceStep:
        with self._faults.explain("while preparing a step"):
            return DeviceStep(
                self._session,
                self._dialect,
                self._model,
                self._cache,
                self._faults,
                self._float_type,
                shape,
                outputs,
                kv_len_of_batch=self._fused,
                embeds_width=self._embeds_width,
            )


def _take_total_from_shape(graph: OnnxFile) -> None:
    """Give GroupQueryAttention its total length as a shape, which is known on the host.

    The operator needs that number in host memory. Computed from ``write_indices``, which are on the
    device, it would make the host wait for the device once more in every step.
    """
    for index, node in enumerate(graph.nodes):
        if node.outputs == ["cpu.longest"]:
            graph.nodes[index] = Node(
                "Shape", [io_spec.KV_POSITIONS], node.outputs, "cpu.longest/Shape"
            )
            return
    raise AssertionError("fuse_cache_attention computes cpu.longest")


def _check_types(manifest: Manifest) -> None:
    if manifest.kv_cache is not None:
        raise DependencyError(
            "the backend ort-cuda has no 8-bit KV cache yet; use --backend ort-cpu or an engine, "
            "or export without --kv-cache int8"
        )
    schemes = {info.scheme.kind for info in manifest.quantization.linears.values()}
    if manifest.dtype == "bf16" and schemes != {"float"}:
        raise DependencyError(
            "ONNX Runtime has no CUDA kernel for quantized weights with bf16 scales; export with "
            "--dtype fp16, or use an engine or --backend ort-cpu"
        )
