"""Keeps each slot's adapter in memory; a step binds the part of its slots, as with the KV cache.

Memory is allocated when the first adapter comes. Until then, and whenever no slot of a step has an
adapter, steps run at rank 0 and read nothing. Where the engine needs it, they run at rank 1 and
read zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.bundle.io_spec import BATCH
from edge.bundle.manifest import Manifest
from edge.errors import BackendError, ResourceError

from .graph_inputs import adapted_linears, linear_inputs, rank_sizes, read_basis, read_section
from .weights import AdapterWeights

Shape = tuple[int, ...]


class AdapterSlots:
    """A and B of every joined linear for each slot, ``[slots, ...]``, in CPU memory.

    Args:
        bundle: the bundle's directory; its files are verified.
        manifest: its manifest; the bundle takes adapters.
        num_slots: number of slots of the KV cache.
        dtype: type of the graph's floats.
        idle_rank: rank of a step in which no slot has an adapter; above 0 it multiplies zeros.

    Attributes:
        rank: rank of a step in which some slot has an adapter; smaller adapters are padded with
            zeros.

    Raises:
        BundleError: `read_section` or `read_basis` refuses the bundle.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        num_slots: int,
        dtype: Any = np.float32,
        *,
        idle_rank: int = 0,
    ) -> None:
        section = read_section(manifest)
        assert section is not None, "the bundle takes no adapters"
        self.rank, self._basis = section.rank, read_basis(bundle, manifest)
        self._dtype = np.dtype(dtype)
        self._layers = adapted_linears(manifest.model)
        # Only names and shapes of them are used, not the type.
        self._specs = linear_inputs(manifest.model, "fp32")
        self._inputs = [spec for pair in self._specs.values() for spec in pair]
        self._held = [""] * num_slots  # digest of the adapter in a slot's memory; "" is zeros
        self._active = [False] * num_slots
        self._blocks: dict[str, NDArray[Any]] = {}
        self._idle_rank = idle_rank
        largest = max(int(np.prod(shape)) for _, shape in self._shapes(num_slots, idle_rank))
        self._nothing = np.zeros(max(largest, 64), np.float32)  # idle inputs point here

    @property
    def num_bytes(self) -> int:
        """Return how much memory is allocated, in bytes."""
        return sum(block.nbytes for block in self._blocks.values())

    def put(self, slot: int, weights: AdapterWeights | None) -> None:
        """Give a slot an adapter or none, as `edge.backends.Backend` describes.

        Raises:
            BackendError: the adapter does not fit the bundle; the slot keeps what it has.
            ResourceError: there is no memory for the first adapter.
        """
        if weights is not None and weights.digest != self._held[slot]:
            self._check(weights)
            self._allocate()
            self._held[slot], self._active[slot] = "?", False  # until all of it is written
            self._fill(slot, weights)
            self._held[slot] = weights.digest
        self._active[slot] = weights is not None

    def rank_of(self, slots: Iterable[int]) -> int:
        """Return the rank at which slots run together: 0 if none has an adapter."""
        return self.rank if any(self._active[slot] for slot in slots) else 0

    def settle(self, slots: Iterable[int]) -> None:
        """Zero the memory of slots without an adapter, if others of these slots have one."""
        for slot in slots:
            if self._held[slot] and not self._active[slot]:
                for spec in self._inputs:
                    self._write(spec.name, slot, None)
                self._held[slot] = ""

    def inputs(self, first: int, batch: int, rank: int) -> Iterator[tuple[str, Shape, int]]:
        """Yield name, shape and address of every input for ``batch`` slots from ``first`` on."""
        for name, shape in self._shapes(batch, rank or self._idle_rank):
            yield name, shape, self._address(name, first) if rank else self._empty()

    def _shapes(self, batch: int, rank: int) -> Iterator[tuple[str, Shape]]:
        sizes = {BATCH: batch, **rank_sizes(rank)}
        for spec in self._inputs:
            yield spec.name, tuple(sizes[d] if isinstance(d, str) else d for d in spec.shape)

    def try_all(self) -> None:
        """Give every slot an adapter of random numbers, until `forget` is called."""
        random = np.random.default_rng(0)
        tensors = {}
        for layer in self._layers:
            inner = len(layer.rows) * self.rank
            a, b = (
                random.standard_normal(shape, np.float32) / np.float32(shape[1] ** 0.5)
                for shape in ((inner, layer.shape[0]), (layer.shape[1], inner))
            )
            tensors[layer.name] = (a, b)
        for slot in range(len(self._held)):
            self.put(slot, AdapterWeights("a trial", "trial", self.rank, tensors))

    def forget(self) -> None:
        """Drop all adapters and free their memory; nothing may be bound to it."""
        self._blocks = {}
        self._held, self._active = [""] * len(self._held), [False] * len(self._held)

    def _check(self, weights: AdapterWeights) -> None:
        problem = None
        shapes = {layer.name: (len(layer.rows), *layer.shape) for layer in self._layers}
        if not 1 <= weights.rank <= self.rank:
            problem = f"its rank is {weights.rank}, and the bundle takes 1 to {self.rank}"
        for name, (a, b) in weights.tensors.items():
            parts, width, out = shapes.get(name, (0, 0, 0))
            inner = parts * weights.rank
            if (a.shape, b.shape) != ((inner, width), (out, inner)):
                problem = f"{name} has A {list(a.shape)} and B {list(b.shape)}"
        if problem is not None:
            raise BackendError(f"the adapter {weights.name} does not fit the bundle: {problem}")

    def _fill(self, slot: int, weights: AdapterWeights) -> None:
        for layer in self._layers:
            pair: tuple[NDArray[Any] | None, ...] = (None, None)
            if layer.name in weights.tensors:
                a, b = self._basis(layer, *weights.tensors[layer.name])
                if missing := len(layer.rows) * self.rank - len(a):
                    a, b = np.pad(a, ((0, missing), (0, 0))), np.pad(b, ((0, 0), (0, missing)))
                pair = (a, b)
            for spec, values in zip(self._specs[layer.name], pair, strict=True):
                self._write(spec.name, slot, values)

    # A subclass for a device's memory overrides these.

    def _allocate(self) -> None:
        """Allocate memory for all slots, unless that is done."""
        if self._blocks:
            return
        try:
            for name, shape in self._shapes(len(self._held), self.rank):
                self._blocks[name] = np.zeros(shape, self._dtype)
        except MemoryError as error:
            self._blocks = {}
            raise ResourceError(
                f"the adapters of {len(self._held)} slots do not fit into memory; fewer slots"
            ) from error

    def _write(self, name: str, slot: int, values: NDArray[Any] | None) -> None:
        """Overwrite a slot's part of an input; None writes zeros."""
        self._blocks[name][slot] = 0 if values is None else values

    def _address(self, name: str, first: int) -> int:
        return self._blocks[name][first:].ctypes.data

    def _empty(self) -> int:
        return self._nothing.ctypes.data


class AdaptedStep:
    """A bound step of ONNX Runtime that binds its adapter inputs anew when the rank changes.

    Args:
        step: an `edge.backends.ort.runner.BoundStep` with a ``binding``.
        slots: the backend's adapter slots.
        first: the first slot of the step.
        batch: number of slots of the step.
        place: device, its number and the type of elements, as a binding takes them.
    """

    def __init__(
        self, step: Any, slots: AdapterSlots, first: int, batch: int, place: tuple[Any, ...]
    ) -> None:
        self.binding = step.binding
        self._step, self._slots, self._window, self._place = step, slots, (first, batch), place
        self._of = range(first, first + batch)
        self._rank = -1

    @property
    def hidden(self) -> NDArray[np.float32] | None:
        """Return the hidden states, as `edge.backends.ort.runner.BoundStep` does."""
        hidden: NDArray[np.float32] | None = self._step.hidden
        return hidden

    def run(self, step: Any) -> NDArray[np.float32]:
        """Run the step with the adapters of its slots, and return the logits."""
        rank = self._slots.rank_of(self._of)
        if rank:
            self._slots.settle(self._of)
        if rank != self._rank:
            self._rank = -1
            for name, shape, address in self._slots.inputs(*self._window, rank):
                self.binding.bind_input(name, *self._place, shape, address)
            self._rank = rank
        logits: NDArray[np.float32] = self._step.run(step)
        return logits


def adapt(
    backend: Any,
    runner: Any,
    bundle: Path,
    manifest: Manifest,
    trial: Callable[[], None] | None = None,
    place: tuple[Any, ...] = ("cpu", 0, np.float32),
    kind: Callable[..., AdapterSlots] = AdapterSlots,
) -> None:
    """Let a backend of ONNX Runtime take adapters, if its bundle does.

    Args:
        backend: the backend, which gets ``adapter_rank`` and ``set_adapter``.
        runner: the backend's `edge.backends.ort.runner.StepRunner`.
        bundle: the bundle's directory; its files are verified.
        manifest: the bundle's manifest.
        trial: runs once while every slot has an adapter; it raises if it finds a fault.
        place: device, number and element type, as in `AdaptedStep`.
        kind: makes the slots.

    Raises:
        BundleError: `read_section` or `read_basis` refuses the bundle.
        BackendError: the trial found a fault.
    """
    if read_section(manifest) is None:  # a draft head's bundle; the model's bundle has the section
        if trial is not None:
            trial()
        return
    import onnxruntime

    # Versions 1.23 to 1.31 leave a batch of transposed products over nothing unwritten. GPUs have
    # not been tried.
    is_sound = tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 32)
    idle_rank = 0 if is_sound and kind is AdapterSlots else 1
    slots = kind(bundle, manifest, backend.num_slots, idle_rank=idle_rank)
    bind = runner.bind

    def bind_adapted(shape: Any, outputs: Any) -> AdaptedStep:
        return AdaptedStep(bind(shape, outputs), slots, shape.first, shape.batch, place)

    runner.bind = bind_adapted
    if trial is not None:
        slots.try_all()
        trial()
        runner.forget()
        slots.forget()
    backend.adapter_rank, backend.set_adapter = slots.rank, slots.put
