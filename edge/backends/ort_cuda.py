"""ONNX Runtime on an NVIDIA GPU: the same graph that engines are built from, without an engine.

It runs ``decoder.onnx``, typed fp16 or bf16. The CUDA provider of ONNX Runtime has kernels for all
of dialect ``native`` (TensorScatter and Attention of opset 24 among them, OperatorKernels.md), and
for `GroupQueryAttention`, which reads and writes the cache in place; so the load-time rewrite of
the CPU serves here, too. Dialect ``portable`` runs as it is and its new rows are scattered.

The cache lies in device memory that ONNX Runtime allocated, at fixed addresses. Only a step's
embeddings and indices go in, and only logits come out.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.bundle import io_spec
from edge.bundle.manifest import FloatType, Manifest
from edge.bundle.onnx_file import Node, OnnxFile
from edge.errors import (
    BackendError,
    DependencyError,
    DeviceError,
    DeviceMemoryError,
    EdgeError,
)

from .cpu_attention import fuse_cache_attention
from .float_bits import from_storage, storage_dtype, to_storage
from .ort import BoundStep, OrtBackend, load_graph, ort_batching, session_options
from .ort_device import OrtDevice, import_for_device, open_on_device
from .ort_placement import tensor_nodes_elsewhere
from .ort_rows import Block, RowMover
from .step import Floats, Step, last_token, step_after

_LOG = logging.getLogger(__name__)
_BF16 = 16  # onnx.TensorProto.BFLOAT16: NumPy has no such type, its bits travel as uint16
_NO_MEMORY = re.compile(r"out of memory|[Ff]ailed to allocate memory|ALLOC_FAILED", re.IGNORECASE)
_DEVICE_FAILED = re.compile(r"\b(?:CUDA|CUBLAS|CUDNN) (?:failure|error)", re.IGNORECASE)


class OrtCudaBackend(OrtBackend):
    """A `Backend` on ONNX Runtime's CUDA provider.

    Args:
        bundle: the bundle's directory; its files are trusted (`manifest.verify_files` comes first).
        manifest: its manifest.
        num_slots: sequences that the cache holds.
        kv_capacity: rows per slot; None is the bundle's own.
        max_step_tokens: the most tokens per sequence and step; bounds the activations' memory.
        fuse_attention: rewrite attention to `GroupQueryAttention` (dialect ``native``); off runs
            the graph as it is, which copies the cache's valid rows in every step.
        device: another one than the first GPU; tests put the CPU here.

    Attributes:
        nodes_elsewhere: operators that work on tensors but run outside the device, with their
            number; empty if all is well. They are logged as a warning, too.

    Raises:
        DependencyError: onnxruntime-gpu, a library or a kernel that it needs is missing.
        DeviceMemoryError: weights and cache do not fit into the device's memory.
        BundleError: the graph's inputs and outputs are not those of `io_spec`.
        ConfigError: a number out of range.
    """

    name = "ort-cuda"
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
    ) -> None:
        self._set_sizes(manifest, num_slots, kv_capacity, max_step_tokens)
        self.device = device or OrtDevice()
        self._float_type: FloatType = manifest.dtype
        self._storage = storage_dtype(self._float_type)
        self._lost: str | None = None
        self._session = None
        self._decode_steps = {}
        self._batching = ort_batching(fuse_attention and self.dialect.one_attention_operator)
        self._caches: list[Block] = []
        _check_types(manifest)
        self._ort = import_for_device(manifest, self.device)
        graph = load_graph(
            bundle / manifest.graphs.decoder, manifest, self._float_type, self.capacity
        )
        self._fused = fuse_attention and self.dialect.one_attention_operator
        if self._fused:
            fuse_cache_attention(graph, self.model)
            _take_total_from_shape(graph)
        options = session_options(self._ort, bundle)
        # Weights outside the arena: it would round every one of them up.
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        # MatMulNBits keeps activations as they are typed, as an engine does; 4 would mean int8.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        with tempfile.TemporaryDirectory(prefix="edge-llm-") as folder:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "step")
            with self.explain("while loading"):
                self._session = open_on_device(self._ort, self.device, graph.serialize(), options)
                self._outputs = [value.name for value in self._session.get_outputs()]
                self._allocate_cache()
            self._warm_up(0)
            profile = Path(self._session.end_profiling()).read_text("utf-8")
        self._warm_up(1)
        self._check_in_place()
        self.nodes_elsewhere = tensor_nodes_elsewhere(json.loads(profile), self.device.provider)
        if self.nodes_elsewhere:
            _LOG.warning(
                "%d nodes run outside %s, each step waits for them: %s",
                sum(self.nodes_elsewhere.values()),
                self.device.provider,
                ", ".join(f"{count} {name}" for name, count in self.nodes_elsewhere.items()),
            )

    @property
    def failed(self) -> str | None:
        """See `edge.backends.Backend.failed`; a lost device needs the process to restart."""
        return super().failed or self._lost

    @property
    def cache_bytes(self) -> int:
        """Device memory of the cache."""
        return len(self._caches) * self._slot_elements * self.num_slots * self._storage.itemsize

    def forward(self, step: Step) -> NDArray[np.float32]:
        """See `edge.backends.Backend.forward`."""
        self._check_usable()
        return super().forward(step)

    def _put_back(self, slot: int, row: Floats) -> None:
        try:
            super()._put_back(slot, row)
        except EdgeError as error:
            # Its rows may be a prefix that others share, and nobody would notice.
            self._lost = self._lost or f"a slot's row could not be put back: {error}"
            raise

    def read_slot(self, slot: int, length: int) -> Floats:
        """See `edge.backends.Backend.read_slot`; bf16 rows come as float32, which holds them."""
        self._check_usable()
        with self.explain("while reading a slot"):
            rows = self._mover.read_to_host(self.blocks(slot, 1), length)[:, 0]
        return from_storage(rows, self._float_type)

    def write_slot(self, slot: int, rows: Floats) -> None:
        """See `edge.backends.Backend.write_slot`."""
        self._check_usable()
        stored = to_storage(rows, self._float_type)
        with self.explain("while writing a slot"):
            blocks = [self.upload(array[None]) for array in stored]
            self._mover.writer(self.blocks(slot, 1), blocks).write([0])

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """See `edge.backends.Backend.copy_slot`; nothing leaves the device."""
        self._check_usable()
        with self.explain("while copying a slot"):
            rows = self._mover.read(self.blocks(source, 1), length)
            self._mover.writer(self.blocks(target, 1), rows).write([0])

    def close(self) -> None:
        """Free the session and the cache."""
        super().close()
        self._caches = []
        vars(self).pop("_mover", None)  # its sessions hold device memory, too

    def blocks(self, first: int, batch: int) -> list[Block]:
        """The part of each cache tensor that holds ``batch`` slots from ``first`` on."""
        offset = first * self._slot_elements * self._storage.itemsize
        return [
            Block(cache.address + offset, (batch, *cache.shape[1:]), cache.owner)
            for cache in self._caches
        ]

    def allocate(self, shape: Sequence[int], dtype: Any = None) -> Block:
        """An uninitialized tensor on the device; by default of the graph's float type."""
        value = self._ort.OrtValue.ortvalue_from_shape_and_type(
            list(shape), dtype or self._storage.type, self.device.name, self.device.index
        )
        return Block(value.data_ptr(), shape, value)

    def upload(self, array: NDArray[Any]) -> Block:
        """A copy of an array on the device."""
        value = self._ort.OrtValue.ortvalue_from_numpy(
            np.ascontiguousarray(array), self.device.name, self.device.index
        )
        return Block(value.data_ptr(), array.shape, value)

    @contextlib.contextmanager
    def explain(self, when: str) -> Iterator[None]:
        """Turn ONNX Runtime's exceptions, which are of many classes, into ours."""
        try:
            yield
        except EdgeError:
            raise
        except Exception as error:
            raise self._error(error, when) from error

    def _error(self, error: Exception, when: str) -> EdgeError:
        text = str(error)
        if isinstance(error, MemoryError) or _NO_MEMORY.search(text):
            cache_mb = self.kv_bytes / 1e6
            return DeviceMemoryError(
                f"{self.device.name} ran out of memory {when}; the KV cache alone takes "
                f"{cache_mb:,.0f} MB ({self.num_slots} slots of {self.capacity} tokens): use fewer "
                f"slots, a smaller --kv-capacity or a smaller model, or end other programs ({text})"
            )
        if _DEVICE_FAILED.search(text):
            # Errors of a CUDA context stay with it: every later call would fail likewise.
            self._lost = f"{self.device.name} failed {when}: {text}"
            return DeviceError(
                f"{self.device.name} failed {when}: {text}; restart the process, and run "
                "edge-llm doctor if it happens again",
                fatal=True,
            )
        return BackendError(f"ONNX Runtime failed {when}: {text}")

    @property
    def kv_bytes(self) -> int:
        """What the cache of all slots takes, allocated or not."""
        per_token = io_spec.kv_bytes_per_token(self.model, self._float_type)
        return per_token * self.capacity * self.num_slots

    def _check_usable(self) -> None:
        if self._lost is not None:
            raise DeviceError(
                f"{self.device.name} failed in an earlier step and cannot be used any more "
                f"({self._lost}); restart the process",
                fatal=True,
            )
        if self._session is None:
            raise BackendError("the backend is closed; load the bundle again")

    def _allocate_cache(self) -> None:
        model = self.model
        shape = (self.num_slots, model.num_kv_heads, self.capacity, model.head_dim)
        self._slot_elements = int(np.prod(shape[1:]))
        # Zeros, not what lay there before: a masked row is multiplied by 0, and NaN times 0 is NaN.
        self._caches = [
            self.upload(np.zeros(shape, dtype=self._storage)) for _ in range(2 * model.num_layers)
        ]
        self.positions = self.upload(np.arange(self.capacity, dtype=np.int64))

        def open_session(data: bytes) -> Any:
            options = self._ort.SessionOptions()
            options.log_severity_level = 3
            return open_on_device(self._ort, self.device, data, options)

        self._mover = RowMover(
            open_session,
            self.allocate,
            (self.device.name, self.device.index),
            len(self._caches),
            self._storage,
        )

    def _warm_up(self, position: int) -> None:
        """A decode step, so that the device loads its kernels."""
        embeds = np.ones((1, 1, self.model.hidden_size), dtype=np.float16)
        self.forward(step_after([0], [position], embeds, last_token(1)[None]))

    def _check_in_place(self) -> None:
        """The rows of two steps must be there: a copied cache would have lost the first."""
        if not self.read_slot(0, 2).any(axis=(1, 3)).all():
            raise BackendError(
                f"ONNX Runtime {self._ort.__version__} did not update the cache in place on "
                f"{self.device.provider}; use another version, or --backend ort-cpu"
            )

    def _make_step(self, first: int, batch: int, seq: int, num_logits: int) -> BoundStep:
        with self.explain("while preparing a step"):
            return _DeviceStep(self, first, batch, seq, num_logits)


class _DeviceStep:
    """Fixed buffers on the device for one step shape, bound once and run many times."""

    def __init__(
        self, backend: OrtCudaBackend, first: int, batch: int, seq: int, num_logits: int
    ) -> None:
        model, dialect = backend.model, backend.dialect
        self._backend = backend
        self._session = backend._session
        self._binding = self._session.io_binding()
        self._caches = backend.blocks(first, batch)
        # Bound anew in every step: a binding copies host memory to where the graph wants it, and
        # ONNX Runtime wants some of the indices on the host and some on the device.
        self._inputs = {
            io_spec.INPUTS_EMBEDS: np.empty((batch, seq, model.hidden_size), backend._storage),
            io_spec.POSITION_IDS: np.empty((batch, seq), np.int64),
            dialect.cursor: np.empty(batch, np.int64),
            io_spec.LOGITS_INDICES: np.empty((batch, num_logits), np.int64),
        }
        # Logits are what leaves the device: ONNX Runtime copies them here.
        shape = (batch, num_logits, model.vocab_size)
        self._logits = np.empty(shape, dtype=backend._storage)
        new: list[Block] = []
        outputs: dict[str, Block] = {}
        caches: dict[str, Block] = {}
        for layer in range(model.num_layers):
            blocks = self._caches[2 * layer : 2 * layer + 2]
            caches.update(zip(io_spec.cache_inputs(layer), blocks, strict=True))
            rows = blocks
            if not dialect.in_place:
                shape_new = (batch, model.num_kv_heads, seq, model.head_dim)
                rows = [backend.allocate(shape_new) for _ in blocks]
                new += rows
            outputs.update(zip(dialect.cache_outputs(layer), rows, strict=True))
        # Dialect portable returns the step's own rows; appending them is a run of its own.
        self._append = backend._mover.writer(self._caches, new) if new else None
        self._rows = new  # keeps what is bound alive
        float_type = _BF16 if backend._float_type == "bf16" else backend._storage.type
        self._float_type = float_type
        for name, block in caches.items():
            self._bind_input(name, block, float_type)
        where = backend.device
        for name in backend._outputs:
            if name == io_spec.LOGITS:
                address = self._logits.ctypes.data
                self._binding.bind_output(name, "cpu", 0, float_type, shape, address)
            else:
                block = outputs[name]
                self._binding.bind_output(
                    name, where.name, where.index, float_type, block.shape, block.address
                )

    def _bind_input(self, name: str, block: Block, element_type: Any) -> None:
        where = self._backend.device
        self._binding.bind_input(
            name, where.name, where.index, element_type, block.shape, block.address
        )

    def run(self, step: Step) -> NDArray[np.float32]:
        backend = self._backend
        kv_len = backend.dialect.rows_read(step.starts, step.kv_len)
        if backend._fused:
            # GroupQueryAttention takes the length for the longest sequence of this very batch.
            kv_len = step.end
        embeds = to_storage(step.embeds, backend._float_type)
        arrays = (embeds, step.positions, step.starts, step.logits_indices)
        rows = Block(backend.positions.address, (kv_len,), backend.positions.owner)
        with backend.explain(f"on a step of {step.positions.shape} tokens"):
            for (name, buffer), array in zip(self._inputs.items(), arrays, strict=True):
                buffer[...] = array
                element = self._float_type if name == io_spec.INPUTS_EMBEDS else np.int64
                self._binding.bind_input(name, "cpu", 0, element, buffer.shape, buffer.ctypes.data)
            self._bind_input(io_spec.KV_POSITIONS, rows, np.int64)
            self._session.run_with_iobinding(self._binding)
            if self._append is not None:
                self._append.write(step.starts)
        return from_storage(self._logits, backend._float_type).astype(np.float32, copy=False)


def _take_total_from_shape(graph: OnnxFile) -> None:
    """Give GroupQueryAttention its total length as a shape, which is known on the host.

    It wants that number in host memory. Computed from ``write_indices``, which lie on the device,
    it would make the host wait for the device once more in every step.
    """
    for index, node in enumerate(graph.nodes):
        if node.outputs == ["cpu.longest"]:
            graph.nodes[index] = Node(
                "Shape", [io_spec.KV_POSITIONS], node.outputs, "cpu.longest/Shape"
            )
            return
    raise AssertionError("fuse_cache_attention computes cpu.longest")


def _check_types(manifest: Manifest) -> None:
    schemes = {info.scheme.kind for info in manifest.quantization.linears.values()}
    if manifest.dtype == "bf16" and schemes != {"float"}:
        raise DependencyError(
            "ONNX Runtime has no CUDA kernel for quantized weights with bf16 scales; export with "
            "--dtype fp16, or use an engine or --backend ort-cpu"
        )
