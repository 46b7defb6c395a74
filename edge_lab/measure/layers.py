"""Finds the first decoder layer at which one way to run a graph drifts from another.

Both sides run the same tokens: prompts in chunks, then the reference's own greedy tokens. On the
CPU they run copies of the graph in memory in which every layer's output is an output of the graph.
On a GPU the rows that each layer wrote into the cache are compared: its keys and values are a
projection of the output of the layer before it. Errors add up from layer to layer, so the first
layer below the floor counts, not the worst.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from edge.backends import Backend, Floats
from edge.backends.ort.cpu import load_cpu_graph
from edge.backends.ort.runner import RunShape, cache_bindings, fill_inputs, make_inputs
from edge.backends.ort.session import check_sizes, check_threads, open_session
from edge.backends.step import TokenTable, last_token, step_after
from edge.bundle import io_spec
from edge.bundle.manifest import Manifest
from edge.bundle.onnx_file import ELEMENT_NUMBERS, tensor_info
from edge.errors import BackendError, ConfigError
from edge.model.cache import cache_tensors
from edge_make.graph_edits import add_output
from edge_make.progress import Progress, silent

from .divergence import cosine_similarity

Compared = Literal["outputs", "cache"]


@dataclass(frozen=True)
class LayerDrift:
    """Agreement of a layer over all positions.

    Attributes:
        layer: its index.
        min_cosine: the least cosine of a position's row.
        max_error: the largest difference of an element, as a multiple of the root mean square of
            its row in the reference.
    """

    layer: int
    min_cosine: float
    max_error: float


@dataclass(frozen=True)
class LayerReport:
    """Every layer's drift, and the first one below the floor.

    Attributes:
        compared: the layers' ``outputs``, or the keys and values that they wrote into the
            ``cache``.
        positions: number of positions compared.
        floor: the least cosine that passes.
        first: index of the first layer below the floor; None is good.
        layers: in order.
    """

    compared: Compared
    positions: int
    floor: float
    first: int | None
    layers: tuple[LayerDrift, ...]

    @property
    def passed(self) -> bool:
        """Whether no layer is below the floor."""
        return self.first is None


class LayerSource(Protocol):
    """A decoder of one sequence that shows its layers.

    Attributes:
        capacity: tokens that its cache holds.
        max_step_tokens: the most tokens that one `run` takes.
        compared: what it shows of a layer, as in `LayerReport`.
    """

    capacity: int
    max_step_tokens: int
    compared: Compared

    def run(self, start: int, embeds: Floats) -> tuple[dict[str, Floats], NDArray[np.float32]]:
        """Run tokens ``[S, hidden]`` from cache row ``start`` on.

        Returns:
            The parts of layers, ``[S, width]``, by names that begin with the layer's number:
            ``0``, or ``0.key`` and ``0.value``; and the logits ``[vocab]`` of the last token.

        Raises:
            BackendError: the engine failed.
        """
        ...


class CacheLayers:
    """A `LayerSource` on any engine: keys and values of all heads, from slot 0 of its cache."""

    compared: Compared = "cache"

    def __init__(self, backend: Backend) -> None:
        self.capacity, self.max_step_tokens = backend.capacity, backend.max_step_tokens
        self._backend = backend

    def run(self, start: int, embeds: Floats) -> tuple[dict[str, Floats], NDArray[np.float32]]:
        """Run tokens, as `LayerSource.run` describes."""
        step = step_after([0], [start], embeds[None], last_token(len(embeds))[None])
        logits = self._backend.forward(step)[0, -1].copy()
        rows = self._backend.read_slot(0, step.end).cut(start, step.end)
        by_token = rows.each(
            lambda array: array.swapaxes(0, 1).astype(np.float32).reshape(step.seq, -1)
        )
        return by_token, logits


class CpuLayers:
    """A `LayerSource` on ONNX Runtime's CPU provider.

    Args:
        bundle: the bundle's directory; its files are trusted (`verify_files` comes first).
        manifest: its manifest.
        capacity: rows of the cache.
        num_threads: None is one per physical core.
        fuse_attention, int8_activations: options of `edge.backends.ort.cpu.OrtBackend`.

    Raises:
        DependencyError, BundleError, ConfigError: `OrtBackend` refuses the bundle or the options.
    """

    compared: Compared = "outputs"

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        *,
        capacity: int,
        num_threads: int | None = None,
        fuse_attention: bool,
        int8_activations: bool,
    ) -> None:
        self.capacity = self.max_step_tokens = check_sizes(manifest, 1, capacity, 1)
        check_threads(num_threads)
        model = self._model = manifest.model
        self._dialect = io_spec.DIALECTS[manifest.dialect]
        graph = load_cpu_graph(
            bundle,
            manifest,
            capacity,
            fuse_attention=fuse_attention,
            int8_activations=int8_activations,
        )
        self._layers = [io_spec.layer_output(layer) for layer in range(model.num_layers)]
        shape = (io_spec.BATCH, io_spec.SEQ, model.hidden_size)
        for name in self._layers:
            add_output(graph, tensor_info(name, ELEMENT_NUMBERS["fp32"], shape))
        self._session = open_session(
            graph, bundle, manifest, num_threads, int8_activations=int8_activations
        )
        self._caches = {
            name: np.zeros(spec.shape(1, capacity), np.int8 if spec.type == "int8" else np.float32)
            for name, spec in cache_tensors(model, "fp32", manifest.int8_layers).items()
        }

    def run(self, start: int, embeds: Floats) -> tuple[dict[str, Floats], NDArray[np.float32]]:
        """Run tokens, as `LayerSource.run` describes."""
        step = step_after([0], [start], embeds[None], last_token(len(embeds))[None])
        shape = RunShape(0, 1, step.seq, 1)
        inputs = make_inputs(self._dialect, self._model.hidden_size, np.float32, shape)
        fill_inputs(inputs, step, step.embeds)
        caches, outputs, _ = cache_bindings(self._dialect, self._caches, lambda _, cache: cache)
        rows_read = self._dialect.rows_read(step.starts, step.kv_len)
        feeds = {**inputs, **caches, io_spec.KV_POSITIONS: np.arange(rows_read, dtype=np.int64)}
        try:
            logits, *found = self._session.run(
                [io_spec.output_name(self._model), *outputs, *self._layers], feeds
            )
        except Exception as error:
            raise BackendError(
                f"ONNX Runtime failed on a step of {step.seq} tokens: {error}"
            ) from error
        self._keep(found[: len(outputs)], start, step.end)
        layers = {str(number): each[0] for number, each in enumerate(found[len(outputs) :])}
        return layers, logits[0, -1]

    def _keep(self, rows: list[NDArray[np.float32]], start: int, end: int) -> None:
        """Keep the step's keys and values: whole caches, or only new rows where those are given."""
        for cache, new in zip(self._caches.values(), rows, strict=True):
            cache[:, :, start:end] = new[:, :, start:end] if self._dialect.in_place else new


def compare_layers(
    reference: LayerSource,
    candidate: LayerSource,
    prompts: Sequence[Sequence[int]],
    table: TokenTable,
    *,
    decode_steps: int,
    floor: float,
    max_tokens: int = 64,
    progress: Progress = silent,
) -> LayerReport:
    """Run prompts through both and compare the outputs of every layer.

    Args:
        reference: the side that is taken to be right.
        candidate: the side that is measured.
        prompts: token ids.
        table: the bundle's token table.
        decode_steps: steps after each prompt, with the reference's greedy tokens.
        floor: the least cosine that a layer must reach at every position.
        max_tokens: most tokens of a prompt's step; both engines have limits of their own, too.
        progress: called with the tokens that both have run (step ``compare``).

    Raises:
        ConfigError: there is nothing to compare, or a prompt does not fit a cache.
        BackendError: an engine failed.
    """
    limit = min(reference.capacity, candidate.capacity) - decode_steps
    if not prompts or not all(1 <= len(prompt) <= limit for prompt in prompts):
        raise ConfigError(
            f"prompts of 1 to {limit} tokens fit the cache with {decode_steps} decode steps; found "
            f"{[len(prompt) for prompt in prompts]}"
        )
    chunk = min(max_tokens, reference.max_step_tokens, candidate.max_step_tokens)
    measured: list[dict[str, NDArray[np.float64]]] = []
    ran, total = 0, sum(len(prompt) + decode_steps for prompt in prompts)
    progress("compare", 0, total, "tokens")
    for prompt in prompts:
        ids, start = np.asarray(prompt, dtype=np.int64), 0
        while start < len(prompt) + decode_steps:
            embeds = table[ids[start : start + chunk]]
            ours, logits = reference.run(start, embeds)
            theirs = candidate.run(start, embeds)[0]
            measured.append({name: _measure(rows, theirs[name]) for name, rows in ours.items()})
            start += len(embeds)
            ran += len(embeds)
            progress("compare", ran, total, "tokens")
            if start == len(ids):
                ids = np.append(ids, logits.argmax())
    joined = {name: np.hstack([each[name] for each in measured]) for name in measured[0]}
    return _report(reference.compared, joined, floor)


def _measure(ours: Floats, theirs: Floats) -> NDArray[np.float64]:
    """Return cosine and error of each row, ``[2, S]``; NaN for a row not finite."""
    with np.errstate(invalid="ignore"):
        error = np.abs(ours.astype(np.float64) - theirs).max(axis=-1)
        size = np.sqrt(np.square(ours, dtype=np.float64).mean(axis=-1))
        relative = error / np.maximum(size, np.finfo(np.float64).tiny)
    return np.stack([cosine_similarity(ours, theirs), relative])


def _report(
    compared: Compared, measured: dict[str, NDArray[np.float64]], floor: float
) -> LayerReport:
    layers = []
    for layer, names in groupby(measured, lambda name: int(name.partition(".")[0])):
        # min and max both keep a NaN
        cosines, errors = np.hstack([measured[name] for name in names])
        layers.append(LayerDrift(layer, float(cosines.min()), float(errors.max())))
    first = next((each.layer for each in layers if not each.min_cosine >= floor), None)
    positions = next(iter(measured.values())).shape[-1]
    return LayerReport(compared, positions, floor, first, tuple(layers))
