"""The part of an evaluation that runs on a device: in a process of its own, beside the service.

It computes on the device's CPU, since its GPU is the service's, and opens bundles by what is in
them: the driver says a hash, and the device looks among its own bundles for it.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

import edge
from edge.bundle.library import BUNDLES_VARIABLE, bundle_directories, roots
from edge.bundle.manifest import Manifest, read_manifest
from edge.engine_config import EngineConfig
from edge.errors import BundleError
from edge.runtime.llm import LLM
from edge.runtime.sampling_params import SamplingParams
from edge_lab.measure.compare import CacheSums, WindowResult, run_window
from edge_lab.measure.evaluator import OpenModels, TaskJob, TextJob
from edge_lab.measure.tasks import Item, ItemResult, Scoring, answer_item, check_item
from edge_lab.telemetry import read_cpu_name


class Kind(msgspec.Struct, frozen=True):
    """What the last bits of a device's numbers depend on.

    Attributes:
        edge_llm: its version.
        onnxruntime: its version.
        numpy: its version.
        machine: the architecture.
        cpu: name of the CPU's model.
        cores: that the process sees.
    """

    edge_llm: str
    onnxruntime: str
    numpy: str
    machine: str
    cpu: str
    cores: int

    def __str__(self) -> str:
        """Describe it in a line."""
        return (
            f"{self.cpu} ({self.machine}, {self.cores} cores), edge-llm {self.edge_llm}, "
            f"onnxruntime {self.onnxruntime}, numpy {self.numpy}"
        )


class Content(msgspec.Struct, frozen=True):
    """A bundle, by its name for people and by the hash of what is in it."""

    name: str
    sha256: str

    @classmethod
    def of(cls, bundle: Path, manifest: Manifest) -> Content:
        """Describe a bundle of this machine; what was measured of it is no part of its content."""
        bare = msgspec.structs.replace(manifest, quality=None, self_sha256="")
        return cls(bundle.name, hashlib.sha256(msgspec.json.encode(bare)).hexdigest())

    def __str__(self) -> str:
        """Name it for a message."""
        return f"{self.name} ({self.sha256[:12]})"


@dataclass(frozen=True)
class RemoteText:
    """`TextJob` without paths.

    Attributes:
        bundle: what is to be opened.
        reference: what runs beside it, if any.
        window: the most tokens of a window.
        engine: how.
    """

    bundle: Content
    reference: Content | None
    window: int
    engine: EngineConfig


@dataclass(frozen=True)
class RemoteTask:
    """`TaskJob` without paths.

    Attributes:
        bundle: what is to be opened.
        engine: how.
        scoring: how choices are compared.
        params: how answers are generated.
        file: of the questions, as errors name it.
    """

    bundle: Content
    engine: EngineConfig
    scoring: Scoring
    params: SamplingParams
    file: str


class EvaluationAgent:
    """Runs windows and questions on a device, one at a time."""

    def __init__(self) -> None:
        self._models = OpenModels()
        self._pair: tuple[LLM, LLM | None] | None = None
        self._task: tuple[LLM, RemoteTask] | None = None

    def kind(self) -> Kind:
        """Say what computes here."""
        import onnxruntime

        return Kind(
            edge.__version__,
            onnxruntime.__version__,
            np.__version__,
            platform.machine(),
            read_cpu_name(),
            os.cpu_count() or 1,
        )

    def open(self, job: RemoteText | RemoteTask) -> str:
        """Open what a job needs, and close what it does not; returns the engine's name.

        Raises:
            BundleError: a bundle is not here.
            EdgeError: it cannot be opened.
        """
        self._pair = self._task = None
        bundle = _find(job.bundle)
        if isinstance(job, RemoteText):
            reference = None if job.reference is None else _find(job.reference)
            self._pair = self._models.pair(TextJob(bundle, reference, job.window, job.engine))
            return self._pair[0].backend.name
        llm = self._models.single(TaskJob(bundle, job.engine, job.scoring, job.params, job.file))
        self._task = (llm, job)
        return llm.backend.name

    def score(self, window: Sequence[int]) -> WindowResult:
        """Run a window of the text that was opened."""
        assert self._pair is not None
        return run_window(*self._pair, window)

    def answer(self, line: int, item: Item) -> ItemResult:
        """Answer a question of the task that was opened.

        Raises:
            ConfigError: it does not fit into the KV cache.
        """
        assert self._task is not None
        llm, job = self._task
        check_item(llm, item, f"{job.file}, line {line}", job.scoring)
        return answer_item(llm, line, item, scoring=job.scoring, params=job.params)

    def close(self) -> None:
        """Close the bundles."""
        self._models.close()


def _find(wanted: Content) -> Path:
    """Find a bundle by its content, whatever it is called here."""
    others = []
    for directory in bundle_directories():
        try:
            found = Content.of(directory, read_manifest(directory))
        except BundleError as error:
            others.append(f"{directory.name} (unreadable: {error})")
            continue
        if found.sha256 == wanted.sha256:
            return directory
        others.append(str(found))
    where = " or ".join(str(root.absolute()) for root in roots())
    raise BundleError(
        f"there is no bundle with the content of {wanted} in {where}"
        + (f", only {', '.join(others)}" if others else "")
        + "; bring it there (edge-llm bundle pull, edge-llm fleet rollout), start edge-llm fleet "
        f"join with {BUNDLES_VARIABLE} where it is elsewhere, or leave the device out"
    )


# ------------------------------------------------------------------------------- in pieces

Piece = WindowResult | tuple[NDArray[np.float64], NDArray[np.float64]]


def split(result: WindowResult) -> Iterator[Piece]:
    """Take a result apart, a layer at a time: in one piece it may be larger than Ray's store."""
    if result.cache is None:
        yield result
        return
    empty = CacheSums(result.cache.num_tokens, np.empty((0, 2)), np.empty(0))
    yield replace(result, cache=empty)
    # Ray sends into what it iterates, and `yield from` would pass that on to the zip.
    for layer in zip(result.cache.keys, result.cache.values, strict=True):  # noqa: UP028
        yield layer


def join(pieces: Iterable[Piece]) -> WindowResult:
    """Put the pieces of `split` together."""
    first, *layers = pieces
    assert isinstance(first, WindowResult)
    if first.cache is None:
        return first
    keys, values = zip(*layers, strict=True)
    cache = CacheSums(first.cache.num_tokens, np.stack(keys), np.stack(values))
    return replace(first, cache=cache)
