"""Runs TensorRT engines on an NVIDIA GPU, of a Jetson or of any workstation.

Everything is allocated at load (`device_memory`), the execution contexts share one block of
activations, and each step runs on one stream: copy in, engine, copy out, one wait at its end.

The batch of an engine is a contiguous part of the cache, so a decode step on slots 0 and 2 spans
slot 1 too. The rows that such an idle slot writes must be harmless. In dialect ``native`` it writes
the last rows of the cache, which are kept free for that: where several slots can run together,
``capacity`` is less than the engine's, by one or by the longest step that checks drafts. In
``portable`` the runtime appends the rows itself and leaves idle slots out.

Steps have few shapes, so that each has a CUDA graph and TensorRT sees no change of shapes. Tokens
are padded to the next captured length, as far as the cache goes; past that, shorter steps are used.
A context holds addresses, so prompts are read in a slot of their own, ``home``, and their rows are
copied. Otherwise each length would need as many graphs as there are slots.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge.backends import BestLogits, Rows, cuda
from edge.backends.batching import (
    UNBOUNDED,
    Batching,
    Window,
    canonical_windows,
    padded_step,
    placed_in,
    prompt_lengths,
    spread,
)
from edge.backends.step import Step, refuse_adapter, step_after
from edge.bundle import io_spec
from edge.bundle.engine_file import rebuild_command
from edge.bundle.manifest import Manifest
from edge.bundle.sizes import ALIGNMENT, DEFAULT_MAX_LOGITS, ProfileName, cache_slots
from edge.engine_config import GpuWait
from edge.errors import BackendError, ConfigError, DeviceError
from edge.model.slot_rows import SlotRows

from .bound_context import BoundContext, StepShape
from .cuda_graph import StepGraphs
from .device_cache import DeviceCache, NewRows
from .device_memory import EngineMemory, StepSizes, plan_engine_memory, step_sizes
from .engine import ChosenEngine, Engine, choose_engine
from .step_buffers import StepBuffers

if TYPE_CHECKING:
    from edge.adapters.device import DeviceSlots
    from edge.adapters.weights import AdapterWeights
    from edge.bundle.kv_scales import Scales

    from .layer_times import LayerTimes

_log = logging.getLogger(__name__)
T = TypeVar("T")
_PROMPT_GRAPHS = 64  # most graphs: lengths times buckets of the cache


class _Run(NamedTuple):
    """One run of a step, or of some tokens of one of its sequences.

    Attributes:
        window: the part of ``step`` that runs, and its slots.
        step: all of the caller's sequences, or some tokens of one.
        shape: shape of the engine's run, with padding.
        row: the sequence that those tokens belong to; None for a window of all.
        start: index of the first of those tokens.
    """

    window: Window
    step: Step
    shape: StepShape
    row: int | None = None
    start: int = 0


class TensorRTBackend:
    """A `Backend` on a TensorRT engine.

    Args:
        bundle: the bundle's directory.
        manifest: its manifest.
        engine_dir: the engine's directory; None takes the one in the bundle that fits this GPU.
        num_slots: sequences that the cache holds; None is the engine's batch. More slots than that
            run in several batches.
        kv_capacity: refuse engines of another KV capacity; None takes any.
        use_cuda_graphs: whether to replay steps as CUDA graphs.
        max_graphs: most graphs that are captured at load, one per window or length and bucket of
            the cache.
        max_draft_tokens: guesses per sequence that steps check; 0 captures no such steps.
        max_logits: most rows of logits that one run returns; more are fetched in several runs.
        device: number of the GPU.
        gpu_wait: how threads wait, as `edge.engine_config.EngineConfig` describes.
        trusted_keys: file of trusted keys, as `EngineConfig` describes.

    Attributes:
        memory: the allocated memory by part.
        engine_dir: directory of the engine that runs.
        gpu_wait: how threads wait for the GPU now, as in `cuda.Device`.

    Raises:
        DependencyError: TensorRT, a working driver, or both PyCUDA and cuda-bindings are missing.
        BundleError, IntegrityError: there is no engine for this GPU and TensorRT, or it is damaged.
        ConfigError: a number is out of range.
        DeviceMemoryError: it does not fit into the GPU's memory.
        BackendError: TensorRT or the GPU failed, or ``gpu_wait`` cannot be set.
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
        max_graphs: int = 256,
        max_draft_tokens: int = 0,
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
        self.adapter_rank, self.set_adapter = 0, refuse_adapter
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
        self.kv_scales: Scales = {}
        if manifest.kv_cache is not None:
            from edge.bundle.kv_scales import read_scales

            self.kv_scales = read_scales(bundle, manifest, manifest.graphs.decoder)
        try:
            with self._device.active():
                self._load(bundle, chosen, num_slots, max_logits, max_draft_tokens)
                self._graphs = StepGraphs(
                    self._device,
                    self._stream,
                    lambda shape: self._make_context(self._profile_of(shape)),
                    max_graphs if use_cuda_graphs else 0,
                )
                self._resources.callback(self._graphs.close)
                self._capture()
        except BaseException:
            self.close()
            raise

    def _load(
        self,
        bundle: Path,
        chosen: ChosenEngine,
        num_slots: int | None,
        max_logits: int,
        max_draft_tokens: int,
    ) -> None:
        """Deserialize the engine and allocate everything that it will ever need."""
        info = self.info = chosen.info
        self.num_slots = num_slots or info.max_batch
        self.max_step_tokens = info.max_prefill
        self._dialect = io_spec.DIALECTS[self._manifest.dialect]
        self._home = cache_slots(self.num_slots) - 1
        self._home_of, self._home_rows = -1, 0  # the slot whose rows are at home, and how many
        self._spoilt = False  # whether rows at home may be NaN
        self._behind: dict[int, int] = {}  # end of the rows that padding wrote in a slot
        sizes = step_sizes(info, max_logits)
        # Decode first, since it is best for all that it covers.
        self._limits = sorted(
            (profile.limits for profile in info.profiles),
            key=lambda each: not each.profile.startswith("decode"),
        )
        most = max(limits.num_logits for limits in self._limits)
        self._max_num_logits = min(sizes[0].logits, most)  # per sequence
        shared = max((each.seq for each in self._limits if each.batch > 1), default=1)
        # Idle slots write into the last rows; with a batch of one there are no idle slots.
        together = min(info.max_batch, self.num_slots) > 1
        longest = min(shared if together else self.max_step_tokens, self._max_num_logits)
        lengths = [2**n for n in range(1, max_draft_tokens.bit_length() + 1)]
        self._drafts = [seq for seq in lengths if seq <= longest]
        self._spare = max(self._drafts, default=1) if self._dialect.in_place and together else 0
        self.capacity = info.kv_capacity - self._spare
        self._batching = Batching(
            decode_gap=UNBOUNDED,
            # Several tokens of an idle slot would not all fit into its spare row.
            chunk_gap=0 if self._dialect.in_place else UNBOUNDED,
            max_batch=info.max_batch,
            max_shared_seq=shared,
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

        # Only the loaded engine knows its activations.
        self._device.make_room("the engine", plan(0).device_bytes)
        self._engine = Engine(chosen, self._manifest)
        self._resources.callback(self._engine.close)
        self.memory = plan(self._engine.activations_bytes)
        self._device.make_room("the rest", self.memory.device_bytes - info.plan_bytes)
        self._allocate(sizes)
        self._adapters: DeviceSlots | None = None
        if "adapters" in self._manifest.extras:
            from .adapter_memory import reserve_adapters

            slots, where = cache_slots(self.num_slots), (self._device, self._stream)
            self._adapters = reserve_adapters(
                bundle, self._manifest, slots, *where, self._resources
            )
            self.adapter_rank, self.set_adapter = self._adapters.rank, self._put_adapter
        if info.outside is not None:
            from .external_weights import load_weights

            self._engine.weights = load_weights(
                chosen, info.outside, self._device, self._stream, self._resources
            )
        self._contexts: dict[ProfileName, BoundContext] = {}
        for limits in self._limits:
            context = self._make_context(limits.profile)
            self._contexts[limits.profile] = context
            self._resources.callback(context.close)
        self._stream.synchronize()

    def _allocate(self, sizes: tuple[StepSizes, StepSizes]) -> None:
        """Allocate memory and the stream; ``sizes`` are those of prefill and decode."""
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
            cache_slots(self.num_slots),
            info.kv_capacity,
        )
        # TensorRT wants an address even for an engine without scratch memory.
        activations_bytes = max(self._engine.activations_bytes, ALIGNMENT)
        self._activations = cuda.DeviceMemory(device, activations_bytes, "the activations")
        resources.callback(self._activations.close)
        self._new_rows = None
        if not self._dialect.in_place:
            self._new_rows = NewRows(device, resources, sizes[0], self._cache.planes)
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

    def _put_adapter(self, slot: int, weights: AdapterWeights | None) -> None:
        assert self._adapters is not None
        self._check_usable()
        with self._working():
            self._adapters.put(slot, weights)

    def _rank_of(self, slots: Sequence[int]) -> int:
        return 0 if self._adapters is None else self._adapters.rank_of(slots)

    def _capture(self) -> None:
        """Capture all steps that others are rounded up to, and leave the cache as it was."""
        self._decode_buffers.clear(idle_cursor=self._idle_cursor(1))
        self._prefill_buffers.clear(idle_cursor=0)
        self._graphs.capture(
            (
                StepShape(first, batch, seq, num, kv, rank)
                for rank in sorted({0, self.adapter_rank})
                for first, batch, seq, num in self._shapes()
                for kv in reversed(self._buckets)  # the largest works for every length
            ),
            lambda context, shape: self._put(context, shape, self._buffers_of(shape)),
        )
        self._cache.clear()
        self._stream.synchronize()

    def _shapes(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield first slot, sequences, tokens and logits of steps to capture, most useful first."""
        windows = canonical_windows(self.num_slots, self.info.max_batch)
        lengths = prompt_lengths(self.max_step_tokens, max(_PROMPT_GRAPHS // len(self._buckets), 1))
        prompts = [(self._home, 1, length, 1) for length in spread(lengths)]
        yield from prompts[:1]
        yield from ((first, batch, 1, 1) for first, batch in windows if batch == 1)
        yield from prompts[1:]
        yield from ((first, batch, 1, 1) for first, batch in windows if batch > 1)
        scored = min(self.max_step_tokens, self._max_num_logits)
        if scored > 1:
            yield self._home, 1, scored, scored
        for seq in self._drafts:
            most = min(self._batching.max_tokens, self._batching.max_logits) // seq
            yield from ((first, batch, seq, seq) for first, batch in windows if batch <= most)

    def _upload_positions(self) -> int:
        positions = np.arange(self.info.kv_capacity, dtype=np.int64)
        memory = cuda.DeviceMemory(self._device, positions.nbytes, "positions")
        self._resources.callback(memory.close)
        self._stream.upload(memory.address, positions)
        self._stream.synchronize()
        return memory.address

    def _profile_of(self, shape: StepShape) -> ProfileName:
        sizes = shape.batch, shape.seq, shape.num_logits
        found = (limits.profile for limits in self._limits if limits.covers(*sizes))
        return next(name for name in found if name.endswith("-adapters") == (shape.rank > 0))

    def _buffers_of(self, shape: StepShape) -> StepBuffers:
        return self._decode_buffers if shape.seq == shape.num_logits == 1 else self._prefill_buffers

    def _make_context(self, profile: ProfileName) -> BoundContext:
        decodes = profile.startswith("decode")
        buffers = self._decode_buffers if decodes else self._prefill_buffers
        return BoundContext(
            self._engine,
            profile,
            self._manifest,
            activations=self._activations,
            buffers=buffers,
            cache=self._cache,
            new_rows=self._new_rows,
            adapters=self._adapters,
            kv_positions=self._kv_positions,
            stream=self._stream,
        )

    @property
    def cache_bytes(self) -> int:
        """Return the memory of the cache, in bytes."""
        return self.memory.cache_bytes

    @property
    def failed(self) -> str | None:
        """Return why no step can succeed any more, or None; a lost GPU needs a new process."""
        return "the backend is closed" if self._closed else self._lost

    @property
    def graphs_disabled(self) -> str | None:
        """Return why decode runs without CUDA graphs, or None."""
        return self._graphs.disabled

    def time_layers(self) -> dict[ProfileName, LayerTimes]:
        """Time every layer of all later steps, which then run without CUDA graphs.

        Returns:
            The collected times by optimization profile.
        """
        from .layer_times import LayerTimes

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
        """Return None: engines are built without the output for a head (`engines.graph.adapt`)."""
        return None

    def forward(self, step: Step) -> NDArray[np.float32]:
        """See `edge.backends.Backend.forward`.

        After a failure the rows of the step's slots are undefined. The backend continues to work,
        unless `failed` says that the GPU is lost.
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
        runs = self._plan(step)
        with self._working():
            if len(runs) > 1 or runs[0].step is not step:
                return self._forward(step)  # another run would overwrite the rows of the first
            buffers = self._run(runs[0])
        num, number = runs[0].shape.num_logits, self._runs
        found: list[list[BestLogits]] = [[] for _ in range(step.batch)]
        window = runs[0].window
        for row, place in zip(window.rows, window.places, strict=True):
            for at in range(place * num, place * num + step.num_logits):
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
        for run in self._plan(step):
            self._run_whole(run, step, logits)
        return logits

    def _plan(self, step: Step) -> list[_Run]:
        """Plan the runs of a step: all its sequences in windows, or each alone."""
        if step.seq == 1 or step.batch > 1:
            runs = [self._window_run(window, step) for window in self._batching.plan(step)]
            # When shapes change, compiled plugins leak (NVIDIA/TensorRT#4849), and others run
            # Python.
            fixed = self.info.plugins is not None or step.num_logits > 1
            one_by_one = len(self._graphs) > 0 and step.seq > 1 and fixed
            if step.num_logits <= self._max_num_logits and (
                not one_by_one or all(run.shape in self._graphs for run in runs)
            ):
                return runs
        return [run for row in range(step.batch) for run in self._sequence_runs(step, row)]

    def _window_run(self, window: Window, step: Step) -> _Run:
        starts = [step.starts[row] for row in window.rows]
        shape = StepShape(
            window.first,
            window.batch,
            step.seq,
            step.num_logits,
            self._rows_read(starts, step.kv_len),
            self._rank_of([step.slots[row] for row in window.rows]),
        )
        cover = self._graphs.cover(shape)
        if cover is not None and max(starts) + cover.seq <= self.info.kv_capacity:
            shape, window = cover, placed_in(window, cover.first, cover.batch)
        return _Run(window, step, shape)

    def _rows_read(self, starts: Sequence[int], kv_len: int) -> int:
        """Return the least number of cache rows that suffices and that the engine may read."""
        return self._buckets[bisect_left(self._buckets, self._dialect.rows_read(starts, kv_len))]

    def _sequence_runs(self, step: Step, row: int) -> Iterator[_Run]:
        """Run one sequence's tokens, in pieces if no run takes them all.

        Each piece is in the cache when the next one attends to it.
        """
        slot, past, embeds = step.slots[row], step.starts[row], step.embeds[row : row + 1]
        wanted, start = np.unique(step.logits_indices[row]), 0
        if step.batch == 1 and len(wanted) == step.num_logits and (np.diff(wanted) > 0).all():
            shape, tokens = self._fit(slot, past, step.seq, wanted)
            if tokens == step.seq:
                yield _Run(self._window_of(slot, shape), step, shape)
                return
        while start < step.seq:
            shape, tokens = self._fit(slot, past + start, step.seq - start, wanted - start)
            inside = wanted[(wanted >= start) & (wanted < start + tokens)] - start
            indices = inside[None] if len(inside) else np.array([[tokens - 1]])
            part = embeds[:, start : start + tokens]
            piece = step_after([slot], [past + start], part, indices)
            yield _Run(self._window_of(slot, shape), piece, shape, row, start)
            start += tokens

    def _window_of(self, slot: int, shape: StepShape) -> Window:
        """Return the window in which a sequence runs alone."""
        if shape.first == self._home:
            slot = self._home
        return placed_in(Window(slot, 1, (0,), (0,)), shape.first, shape.batch)

    def _fit(
        self, slot: int, start: int, tokens: int, wanted: NDArray[np.int64]
    ) -> tuple[StepShape, int]:
        """Choose the shape that runs the next tokens of a sequence, and how many of them.

        Args:
            slot: slot of the sequence.
            start: its rows so far.
            tokens: number of tokens that are left.
            wanted: ascending indices of those that get logits; those below 0 have run.
        """
        wanted = wanted[wanted >= 0]
        room, rank = self.info.kv_capacity - start, self._rank_of([slot])

        def rows(count: int) -> int:
            return self._rows_read([start], start + count)

        def takes(shape: StepShape) -> bool:
            fits = shape.seq <= min(tokens, room) and shape.kv >= rows(shape.seq)
            fits = fits and shape.rank == rank
            return fits and int(np.searchsorted(wanted, shape.seq)) <= shape.num_logits

        num = max(len(wanted), 1)
        covers = [
            self._graphs.cover(StepShape(first, 1, tokens, num, rows(tokens), rank))
            for first in (slot, self._home)
        ]
        padded = [cover for cover in covers if cover is not None and cover.seq <= room]
        if padded:
            return min(padded, key=lambda shape: (shape.seq, shape.kv)), tokens
        shape = self._graphs.longest((slot, self._home), takes)
        if shape is not None:
            return shape, shape.seq
        if num > self._max_num_logits:
            num, tokens = self._max_num_logits, int(wanted[self._max_num_logits - 1]) + 1
        return StepShape(slot, 1, tokens, num, rows(tokens), rank), tokens

    def _run_whole(self, run: _Run, step: Step, logits: NDArray[np.float32]) -> None:
        """Run, and write the logits into the caller's rows."""
        buffers, window, num = self._run(run), run.window, run.shape.num_logits
        if self.info.best_logits:
            buffers.fetch(self._stream, 0, window.batch * num)
            self._stream.synchronize()
        if run.row is not None:
            wanted = step.logits_indices[run.row] - run.start
            into = np.nonzero((wanted >= 0) & (wanted < run.step.seq))[0]
            for at in into:
                place = int(np.searchsorted(run.step.logits_indices[0], wanted[at]))
                buffers.read_logits(place, logits[run.row, at])
        elif window.whole and window.batch == len(logits) and num == step.num_logits:
            buffers.read_logits(0, logits.reshape(-1, logits.shape[-1]))
        else:
            for row, place in zip(window.rows, window.places, strict=True):
                buffers.read_logits(place * num, logits[row])

    def _run(self, run: _Run) -> StepBuffers:
        """Run, and return the buffers that hold the engine's outputs."""
        window, step, shape = run.window, run.step, run.shape
        buffers = self._buffers_of(shape)
        padded = padded_step(step, shape.seq, shape.num_logits)
        buffers.fill(window, padded, idle_cursor=self._idle_cursor(shape.seq))
        at_home = shape.first == self._home >= self.num_slots
        if at_home:
            self._bring_home(step.slots[0], step.starts[0])
        if self._adapters is not None and shape.rank:
            self._adapters.settle([step.slots[row] for row in window.rows])
            if at_home:
                self._adapters.bring(step.slots[0], self._home)
        if not self._graphs.launch(shape):
            context = self._contexts[self._profile_of(shape)]
            context.bind(shape)
            self._put(context, shape, buffers)
        for row, place in zip(window.rows, window.places, strict=True):
            self._keep_rows(shape, place, step.slots[row], step.starts[row], step.seq)
        if at_home:
            self._home_rows = step.starts[0] + step.seq
        if self.meanwhile is not None:
            self.meanwhile()
        self._stream.synchronize()
        self._runs += 1
        return buffers

    def _bring_home(self, slot: int, start: int) -> None:
        """Copy the first rows of a slot to where prompts are read, unless they are there."""
        if self._spoilt:
            self._cache.clear(self._home)
            self._spoilt, self._home_of = False, -1
        there = self._home_rows if self._home_of == slot else 0
        self._home_of, self._home_rows = slot, min(there, start)
        self._cache.copy(slot, self._home, start, there)

    def _keep_rows(self, shape: StepShape, place: int, slot: int, start: int, rows: int) -> None:
        """Copy the rows that a run has made of one sequence into its slot, without padding."""
        at_home = shape.first == self._home >= self.num_slots
        if self._new_rows is not None:
            for target in {slot, self._home} if at_home else {slot}:
                self._cache.append(
                    self._new_rows, place, shape.batch, shape.seq, target, start, rows
                )
        elif at_home:
            self._cache.copy(self._home, slot, start + rows, start)
        elif shape.seq > rows:
            self._behind[slot] = start + shape.seq
        else:
            self._behind.pop(slot, None)
        if slot == self._home_of and not at_home:
            self._home_rows = min(self._home_rows, start)

    def _idle_cursor(self, seq: int) -> int:
        """Return the first row that an idle slot writes; no answer uses it where slots can idle."""
        return self.info.kv_capacity - seq if self._dialect.in_place else 0

    def _put(self, context: BoundContext, shape: StepShape, buffers: StepBuffers) -> None:
        """Put a step on the stream; a CUDA graph records exactly this."""
        buffers.upload(self._stream, shape.batch, shape.seq, shape.num_logits)
        context.enqueue()
        buffers.download(self._stream, shape.batch * shape.num_logits)

    @property
    def _buckets(self) -> tuple[int, ...]:
        """Return the numbers of cache rows to round up to; only one if rounding changes nothing."""
        return self.info.buckets_read or self.info.kv_buckets[-1:]

    def read_slot(self, slot: int, length: int) -> SlotRows:
        """See `edge.backends.Backend.read_slot`."""
        return self._with_slots((slot,), length, lambda: self._cache.read(slot, length))

    def write_slot(self, slot: int, rows: SlotRows) -> None:
        """See `edge.backends.Backend.write_slot`."""
        length = rows.length
        self._cache.check(rows)
        # In a sequence that failed, the rows that padding wrote after its own are as bad as they
        # are.
        behind = self._behind.pop(slot, 0) - length
        if behind > 0:
            rows = rows.zeroed(length, length + behind)
        self._spoilt = self._spoilt or slot == self._home_of
        self._with_slots((slot,), length, lambda: self._cache.write(slot, rows))

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """See `edge.backends.Backend.copy_slot`."""
        if source != target:
            self._home_of = -1 if self._home_of == target else self._home_of
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
        """Make the device's context current; after a failure nothing is left on the stream."""
        self._enter()
        try:
            yield
        except BaseException as error:  # an interrupt also leaves work on the stream
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
        """After a failed step, wait for running work, and find out whether the GPU is alive."""
        self._spoilt = True
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
