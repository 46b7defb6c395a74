"""TensorRT on an NVIDIA GPU: the engine of a Jetson, and of any workstation.

Everything is allocated at load (`device_memory`), the execution contexts share one block of
activations, and each step runs on one stream: copy in, engine, copy out, one wait at its end.

The batch of an engine is a contiguous part of the cache, so a decode step on slots 0 and 2 spans
slot 1 too. What such an idle slot writes must be harmless: in dialect ``native`` it writes the last
row of the cache, which is kept free for that (``capacity`` is one less than the engine's where
several slots can run together). In ``portable`` the runtime appends the rows itself and leaves
idle slots out. Steps of several tokens span no idle slots in ``native``: they run one contiguous
part after the other.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from edge.backends import BestLogits, Rows, cuda
from edge.backends.step import Floats, Step, step_after
from edge.backends.windows import UNBOUNDED, Batching, Window, canonical_windows
from edge.bundle import io_spec
from edge.bundle.engine_file import rebuild_command
from edge.bundle.kv_scales import Scales, read_scales
from edge.bundle.manifest import Manifest
from edge.bundle.onnx_file import OnnxFile
from edge.bundle.sizes import ALIGNMENT, DEFAULT_MAX_LOGITS, ProfileName
from edge.bundle.verified_files import verify_files
from edge.engine_config import GpuWait
from edge.errors import BackendError, ConfigError, DeviceError

from .bound_context import BoundContext, StepShape
from .cuda_graph import DecodeGraphs
from .device_cache import DeviceCache, NewRows
from .device_memory import (
    EngineMemory,
    StepSizes,
    plan_engine_memory,
    step_sizes,
)
from .engine import ChosenEngine, Engine, choose_engine
from .layer_times import LayerTimes
from .outside_weights import load_weights
from .step_buffers import StepBuffers

_log = logging.getLogger(__name__)
T = TypeVar("T")


class TensorRTBackend:
    """A `Backend` on a TensorRT engine.

    Args:
        bundle: the bundle's directory.
        manifest: its manifest.
        engine_dir: the engine's directory; None takes the one in the bundle that fits this GPU.
        num_slots: sequences that the cache holds; None is the engine's batch. More slots than that
            are run in several batches.
        kv_capacity: refuse engines of another KV capacity; None takes any.
        use_cuda_graphs: replay decode steps as CUDA graphs.
        max_graphs: graphs that are captured at load, one per window and bucket of the cache.
        max_logits: rows of logits that one run returns at most; more are fetched in several runs.
        device: number of the GPU.
        gpu_wait: see `edge.engine_config.EngineConfig`.
        trusted_keys: see there.

    Attributes:
        memory: what was allocated.
        engine_dir: of the engine that runs.
        gpu_wait: how threads wait for the GPU now, see `cuda.Device`.

    Raises:
        DependencyError: TensorRT, a working driver, or both PyCUDA and cuda-bindings are missing.
        BundleError, IntegrityError: no engine for this GPU and TensorRT, or a damaged one.
        ConfigError: a number out of range.
        DeviceMemoryError: it does not fit into the GPU's memory.
        BackendError: TensorRT or the GPU failed, or ``gpu_wait`` cannot be had.
    """

    name = "tensorrt"
    rounds_activations = False

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        engine_dir: Path | None = None,
        *,
        num_slots: int | None = None,
        kv_capacity: int | None = None,
        use_cuda_graphs: bool = True,
        max_graphs: int = 128,
        max_logits: int = DEFAULT_MAX_LOGITS,
        device: int = 0,
        gpu_wait: GpuWait = "auto",
        trusted_keys: Path | None = None,
    ) -> None:
        for option, value in (
            ("num_slots", num_slots), ("max_graphs", max_graphs), ("max_logits", max_logits)
        ):  # fmt: skip
            if value is not None and value < 1:
                raise ConfigError(f"{option} {value} must be positive")
        self._manifest = manifest
        self.meanwhile: Callable[[], None] | None = lambda: None
        self._lost: str | None = None
        self._closed = False
        self._device = cuda.Device(device, gpu_wait)
        self.gpu_wait = self._device.wait
        self._resources = ExitStack()
        chosen = choose_engine(
            bundle,
            manifest,
            self._device.compute_capability,
            engine_dir=engine_dir,
            num_slots=num_slots,
            kv_capacity=kv_capacity,
            trusted_keys=trusted_keys,
        )
        self.engine_dir = chosen.directory
        if chosen.info.num_sms not in (None, self._device.num_sms):
            _log.warning(
                "the engine %s was tuned for %d multiprocessors, and %d are on, as in another "
                "power mode: it may be slow; tune it for these with: %s",
                chosen.directory,
                chosen.info.num_sms,
                self._device.num_sms,
                rebuild_command(chosen.directory, chosen.info),
            )
        self.kv_scales = _read_scales(bundle, manifest)
        try:
            with self._device.active():
                self._load(chosen, num_slots, max_logits)
                self._graphs = DecodeGraphs(
                    self._device,
                    self._stream,
                    lambda: self._make_context("decode"),
                    max_graphs if use_cuda_graphs else 0,
                )
                self._resources.callback(self._graphs.close)
                self._capture_decode()
        except BaseException:
            self.close()
            raise

    def _load(self, chosen: ChosenEngine, num_slots: int | None, max_logits: int) -> None:
        """Deserialize the engine and allocate everything that it will ever need."""
        info = self.info = chosen.info
        self.num_slots = num_slots or info.max_batch
        self.max_step_tokens = info.max_prefill
        self._dialect = io_spec.DIALECTS[self._manifest.dialect]
        # The last row is where idle slots write; a batch of one has no idle slots.
        spare = self._dialect.in_place and min(info.max_batch, self.num_slots) > 1
        self.capacity = info.kv_capacity - int(spare)
        sizes = step_sizes(info, max_logits)
        # Decode first: it is the best for what it covers.
        self._limits = sorted(
            (profile.limits for profile in info.profiles), key=lambda each: each.profile != "decode"
        )
        most = max(limits.num_logits for limits in self._limits)
        self._max_num_logits = min(sizes[0].logits, most)  # of one sequence
        shared = (limits.seq for limits in self._limits if limits.batch > 1)
        self._batching = Batching(
            decode_gap=UNBOUNDED,
            # Several tokens of an idle slot would not all land in its spare row.
            chunk_gap=0 if self._dialect.in_place else UNBOUNDED,
            max_batch=info.max_batch,
            max_shared_seq=max(shared, default=1),
            max_tokens=sizes[0].tokens,
            max_logits=sizes[0].logits,
        )

        def plan(activations_bytes: int) -> EngineMemory:
            return plan_engine_memory(
                info,
                self._manifest,
                num_slots=self.num_slots,
                max_logits=max_logits,
                integrated=self._device.integrated,
                activations_bytes=activations_bytes,
            )

        # Only the engine itself knows its activations.
        self._device.make_room("the engine", plan(0).device_bytes)
        self._engine = Engine(chosen, self._manifest)
        self._resources.callback(self._engine.close)
        self.memory = plan(self._engine.activations_bytes)
        self._device.make_room("the rest", self.memory.device_bytes - info.plan_bytes)
        self._allocate(sizes)
        self._engine.weights = load_weights(chosen, self._device, self._stream, self._resources)
        self._contexts: dict[ProfileName, BoundContext] = {}
        for limits in self._limits:
            context = self._make_context(limits.profile)
            self._contexts[limits.profile] = context
            self._resources.callback(context.close)
        self._stream.synchronize()

    def _allocate(self, sizes: tuple[StepSizes, StepSizes]) -> None:
        """Memory and the stream; ``sizes`` of prefill and decode."""
        device, resources, info = self._device, self._resources, self.info
        model, dtype = self._manifest.model, self._manifest.dtype
        self._stream = cuda.Stream(device)
        resources.callback(self._stream.close)
        self._cache = DeviceCache(
            device,
            self._stream,
            resources,
            self._manifest,
            self.kv_scales,
            self.num_slots,
            info.kv_capacity,
        )
        # TensorRT wants an address even for an engine without scratch memory.
        activations_bytes = max(self._engine.activations_bytes, ALIGNMENT)
        self._activations = cuda.DeviceMemory(device, activations_bytes, "the activations")
        resources.callback(self._activations.close)
        self._new_rows = None
        if not self._dialect.in_place:
            self._new_rows = NewRows(device, resources, model, sizes[0], self._cache.planes)
        cursor = self._dialect.cursor
        buffers = [
            StepBuffers(device, resources, size, model, dtype, cursor, info.best_logits)
            for size in sizes
        ]
        for buffer in buffers:
            resources.callback(buffer.close)
        self._prefill_buffers, self._decode_buffers = buffers
        self._kv_positions = self._upload_positions()
        self._out_width = io_spec.output_width(model)
        self._runs = 0
        self._decode_logits = np.empty((info.max_batch, 1, self._out_width), dtype=np.float32)

    def _capture_decode(self) -> None:
        """Capture the decode steps of all windows that steps are rounded up to."""
        self._decode_buffers.clear(idle_cursor=self._idle_cursor)
        self._graphs.capture(
            (
                StepShape(first, batch, 1, 1, kv)
                for first, batch in canonical_windows(self.num_slots, self.info.max_batch)
                for kv in self._buckets
            ),
            self._put_decode,
        )
        self._cache.clear()
        self._stream.synchronize()

    def _upload_positions(self) -> int:
        positions = np.arange(self.info.kv_capacity, dtype=np.int64)
        memory = cuda.DeviceMemory(self._device, positions.nbytes, "positions")
        self._resources.callback(memory.close)
        self._stream.upload(memory.address, positions)
        self._stream.synchronize()
        return memory.address

    def _make_context(self, profile: ProfileName) -> BoundContext:
        buffers = self._decode_buffers if profile == "decode" else self._prefill_buffers
        return BoundContext(
            self._engine,
            profile,
            self._manifest,
            activations=self._activations,
            buffers=buffers,
            cache=self._cache,
            new_rows=self._new_rows,
            kv_positions=self._kv_positions,
            stream=self._stream,
        )

    @property
    def cache_bytes(self) -> int:
        """Memory of the cache."""
        return self.memory.cache_bytes

    @property
    def failed(self) -> str | None:
        """Why no step can succeed any more, or None; a lost GPU needs the process to restart."""
        return "the backend is closed" if self._closed else self._lost

    @property
    def graphs_disabled(self) -> str | None:
        """Why decode runs without CUDA graphs, or None."""
        return self._graphs.disabled

    def time_layers(self) -> dict[ProfileName, LayerTimes]:
        """Time every layer of all later steps, which then run without CUDA graphs.

        Returns:
            The collected times by optimization profile.
        """
        self._check_usable()
        with self._device.active():
            self._stream.synchronize()
            self._graphs.switch_off("the layers are timed")
            times = {profile: LayerTimes() for profile in self._contexts}
            for profile, context in self._contexts.items():
                context.time_layers(times[profile])
        return times

    @property
    def hidden_states(self) -> NDArray[np.float32] | None:
        """None: engines are built without the output for a head (`engines.graph`)."""
        return None

    def forward(self, step: Step) -> NDArray[np.float32]:
        """See `edge.backends.Backend.forward`.

        After a failure the rows of the step's slots are undefined. The backend works on, unless
        `failed` says that the GPU is lost.
        """
        self._check_usable()
        step.check(self)
        with self._working():
            return self._forward(step)

    @property
    def forward_best(self) -> Callable[[Step], Rows] | None:
        """See `edge.backends.Backend.forward_best`."""
        return self._forward_best if self.info.best_logits else None

    def _forward_best(self, step: Step) -> Rows:
        self._check_usable()
        step.check(self)
        windows = self._plan(step)
        with self._working():
            if len(windows) > 1 or step.num_logits > self._max_num_logits:
                return self._forward(step)  # a further run would overwrite the rows of the first
            buffers = self._run(windows[0], step)
        num, number = step.num_logits, self._runs
        found: list[list[BestLogits]] = [[] for _ in range(step.batch)]
        for row, place in zip(windows[0].rows, windows[0].places, strict=True):
            for at in range(place * num, (place + 1) * num):
                fetch = partial(self._fetch, buffers, at, number)
                found[row].append(
                    BestLogits(*buffers.best(at), self._out_width, self._manifest.dtype, fetch)
                )
        return found

    def _fetch(self, buffers: StepBuffers, at: int, number: int) -> NDArray[np.float32]:
        """Fetch a row of logits of the newest run."""
        if number != self._runs:
            raise BackendError("a row of logits is asked for after the engine's next step")
        self._check_usable()
        row = np.empty(self._out_width, dtype=np.float32)
        with self._working():
            buffers.fetch(self._stream, at, 1)
            self._stream.synchronize()
        buffers.read_logits(at, row)
        return row

    def _forward(self, step: Step) -> NDArray[np.float32]:
        batch, num, width = step.batch, step.num_logits, self._out_width
        if step.seq == num == 1 and batch <= len(self._decode_logits):
            logits = self._decode_logits[:batch]
        else:
            logits = np.empty((batch, num, width), dtype=np.float32)
        if num > self._max_num_logits:
            for row in range(batch):
                logits[row] = self._run_in_pieces(step, row)
            return logits
        for window in self._plan(step):
            self._run_whole(window, step, logits)
        return logits

    def _plan(self, step: Step) -> list[Window]:
        """The windows of a step; those of decode where they have a graph."""
        windows = self._batching.plan(step)
        if not step.seq == step.num_logits == 1:
            return windows
        return [self._graphs.cover(window, self._rows_read(window, step)) for window in windows]

    def _rows_read(self, window: Window, step: Step) -> int:
        starts = [step.starts[row] for row in window.rows]
        return self._bucket(self._dialect.rows_read(starts, step.kv_len))

    def _run_in_pieces(self, step: Step, row: int) -> NDArray[np.float32]:
        """Fetch more logits of one sequence than fit: cut its tokens after the last that do.

        What comes first lies in the cache when the next piece attends to it.
        """
        slot, past, embeds = step.slots[row], step.starts[row], step.embeds[row : row + 1]
        places, inverse = np.unique(step.logits_indices[row], return_inverse=True)
        found = np.empty((len(places), self._out_width), dtype=np.float32)
        window, start = Window(slot, 1, (0,), (0,)), 0
        for group in range(0, len(places), self._max_num_logits):
            some = places[group : group + self._max_num_logits]
            last = group + len(some) == len(places)
            end = step.seq if last else int(some[-1]) + 1
            piece = step_after([slot], [past + start], embeds[:, start:end], some[None] - start)
            self._run_whole(window, piece, found[None, group : group + len(some)])
            start = end
        result: NDArray[np.float32] = found[inverse]
        return result

    def _run_whole(self, window: Window, step: Step, logits: NDArray[np.float32]) -> None:
        """Run one window and put its logits into the caller's rows."""
        buffers, num = self._run(window, step), step.num_logits
        if self.info.best_logits:
            buffers.fetch(self._stream, 0, window.batch * num)
            self._stream.synchronize()
        if window.whole and window.batch == len(logits):
            buffers.read_logits(0, logits.reshape(-1, logits.shape[-1]))
            return
        for row, place in zip(window.rows, window.places, strict=True):
            buffers.read_logits(place * num, logits[row])

    def _run(self, window: Window, step: Step) -> StepBuffers:
        """Run one window; what it puts out is in the buffers that are returned."""
        seq, num = step.seq, step.num_logits
        decode = seq == num == 1
        buffers = self._decode_buffers if decode else self._prefill_buffers
        buffers.fill(window, step, idle_cursor=self._idle_cursor)
        kv = self._rows_read(window, step)
        shape = StepShape(window.first, window.batch, seq, num, kv)
        if not (decode and self._graphs.launch(shape)):
            profile = next(
                limits.profile for limits in self._limits if limits.covers(window.batch, seq, num)
            )
            context = self._contexts[profile]
            context.bind(shape)
            self._put(context, shape, buffers)
        if self._new_rows is not None:
            for row, place in zip(window.rows, window.places, strict=True):
                slot, start = window.first + place, step.starts[row]
                self._cache.append(self._new_rows, place, window.batch, seq, slot, start)
        if self.meanwhile is not None:
            self.meanwhile()
        self._stream.synchronize()
        self._runs += 1
        return buffers

    @property
    def _idle_cursor(self) -> int:
        """The row that an idle slot writes: its last, which is no answer's where slots can idle."""
        return self.info.kv_capacity - 1 if self._dialect.in_place else 0

    def _put_decode(self, context: BoundContext, shape: StepShape) -> None:
        self._put(context, shape, self._decode_buffers)

    def _put(self, context: BoundContext, shape: StepShape, buffers: StepBuffers) -> None:
        """Put a step on the stream; a CUDA graph records this and nothing else."""
        buffers.upload(self._stream, shape.batch, shape.seq, shape.num_logits)
        context.enqueue()
        buffers.download(self._stream, shape.batch * shape.num_logits)

    @property
    def _buckets(self) -> tuple[int, ...]:
        """Numbers of cache rows that steps are rounded up to; one where that changes nothing."""
        return self.info.buckets_read or self.info.kv_buckets[-1:]

    def _bucket(self, kv_len: int) -> int:
        """The least number of cache rows that the engine may read and that is enough."""
        return self._buckets[bisect_left(self._buckets, kv_len)]

    def read_slot(self, slot: int, length: int) -> Floats:
        """See `edge.backends.Backend.read_slot`."""
        return self._with_slots((slot,), length, lambda: self._cache.read(slot, length))

    def write_slot(self, slot: int, rows: Floats) -> None:
        """See `edge.backends.Backend.write_slot`."""
        model = self._manifest.model
        length = rows.shape[2]
        expected = (2 * model.num_layers, model.num_kv_heads, length, model.head_dim)
        if rows.shape != expected:
            raise BackendError(f"rows of shape {rows.shape} do not fit a cache of {expected}")
        self._with_slots((slot,), length, lambda: self._cache.write(slot, rows))

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """See `edge.backends.Backend.copy_slot`."""
        if source != target:
            self._with_slots(
                (source, target), length, lambda: self._cache.copy(source, target, length)
            )

    def close(self) -> None:
        """Free everything; calling it twice is harmless."""
        if self._closed:
            return
        self._closed = True
        try:
            with self._device.active():
                self._resources.close()
        except DeviceError as error:  # on a lost device nothing can be freed
            _log.warning("not everything could be freed: %s", error)

    def _with_slots(self, slots: Sequence[int], length: int, work: Callable[[], T]) -> T:
        self._check_usable()
        if not all(0 <= slot < self.num_slots for slot in slots):
            raise BackendError(f"slots {list(slots)} are not slots of {self.num_slots}")
        if not 0 <= length <= self.capacity:
            raise BackendError(f"{length} rows do not fit a cache of {self.capacity}")
        with self._working():
            return work()

    @contextmanager
    def _working(self) -> Iterator[None]:
        """The device's context is current; after a failure nothing is left on the stream."""
        self._enter()
        try:
            yield
        except BaseException as error:  # an interrupt leaves work on the stream, too
            self._recover(error)
            raise
        finally:
            self._leave()

    def _enter(self) -> None:
        try:
            self._device.enter()
        except DeviceError as error:
            if error.fatal:
                self._lose(error)
            raise

    def _leave(self) -> None:
        try:
            self._device.leave()
        except DeviceError as error:
            self._recover(error)

    def _recover(self, error: BaseException) -> None:
        """After a failed step: wait for what still runs, and find out whether the GPU is alive."""
        lost: BaseException | None = None
        if isinstance(error, DeviceError) and error.fatal:
            lost = error
        else:
            try:
                self._stream.synchronize()
            except DeviceError as second:
                lost = second
        if lost is not None:
            self._lose(lost)

    def _lose(self, error: BaseException) -> None:
        if self._lost is None:
            self._lost = str(error)
            _log.error("the GPU is lost: %s", self._lost)

    def _check_usable(self) -> None:
        if self._closed:
            raise BackendError("the backend is closed; load the bundle again")
        if self._lost is not None:
            raise DeviceError(
                f"the GPU is lost since an earlier step ({self._lost}); restart the process",
                fatal=True,
            )


def _read_scales(bundle: Path, manifest: Manifest) -> Scales:
    """The scales of the graph that the engine was built from, which must still be in the bundle."""
    if manifest.kv_cache is None:
        return {}
    verify_files(bundle, manifest, [manifest.graphs.decoder])
    path = bundle / manifest.graphs.decoder
    return read_scales(OnnxFile(path.read_bytes()), manifest, path)
