"""Evaluates bundles on a text or on a task, on this machine or wherever else parts of it can run.

The windows of a text and the questions of a task are independent, so a `Computer` may run them in
any order and on several machines. It returns the results in order, and all figures are made from
them here. They are the same to the bit if the parts were computed alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

from edge.backends.ort.session import rounds_activations
from edge.bundle.manifest import Manifest
from edge.bundle.trust import open_manifest
from edge.bundle.verified_files import VerifiedFiles
from edge.engine_config import EngineConfig
from edge.errors import ConfigError
from edge.model.spec import ModelSpec
from edge.runtime.llm import LLM
from edge.runtime.sampling_params import SamplingParams
from edge.text.tokenizer import Tokenizer
from edge_make.progress import Progress, prefixed, silent, uncounted

from .compare import CHUNK_TOKENS, Comparison, WindowResult, merge, num_scored, run_window
from .defaults import EVAL_TEXT, WINDOW
from .evaluate import EvalText, cut_windows, describe, measure, read_text, summarize
from .tasks import (
    ChoiceItem,
    Item,
    ItemResult,
    Scoring,
    answer_item,
    check_item,
    compare_task,
    read_task,
    summarize_task,
)


@dataclass(frozen=True)
class TextJob:
    """Models to open for the windows of a text.

    Attributes:
        bundle: the bundle to measure.
        reference: the reference to run beside it, if any.
        window: the most tokens of a window.
        engine: how the bundle is opened.
    """

    bundle: Path
    reference: Path | None
    window: int
    engine: EngineConfig


@dataclass(frozen=True)
class TaskJob:
    """How a bundle answers questions.

    Attributes:
        bundle: the bundle that answers.
        engine: how it is opened.
        scoring: how choices are compared.
        params: how answers are generated.
        file: name of the file of questions, for errors.
    """

    bundle: Path
    engine: EngineConfig
    scoring: Scoring
    params: SamplingParams
    file: str


class Computer(Protocol):
    """Runs the parts of an evaluation."""

    def score(
        self, job: TextJob, windows: Sequence[Sequence[int]], progress: Progress
    ) -> tuple[str, Iterator[WindowResult]]:
        """Run windows; return the engine's name, and the result of each window in order.

        The progress has the steps ``open`` and ``score``, in tokens.
        """
        ...

    def answer(
        self, job: TaskJob, items: Sequence[tuple[int, Item]], progress: Progress
    ) -> list[ItemResult]:
        """Answer questions in order; the steps are ``open`` and ``answer``, in questions."""
        ...


class OpenModels:
    """Keeps the models of a job open until the next job needs others."""

    def __init__(self) -> None:
        self._open: dict[tuple[object, ...], LLM] = {}

    def __enter__(self) -> OpenModels:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all."""
        while self._open:
            self._open.popitem()[1].close()

    def pair(self, job: TextJob) -> tuple[LLM, LLM | None]:
        """Open a bundle and its reference, one slot of a window's length each."""
        engine = job.engine.with_options(kv_capacity=job.window, prefill_chunk=CHUNK_TOKENS)
        wanted = [(job.bundle, engine)]
        if job.reference is not None:
            wanted.append((job.reference, engine_of_reference(engine, job.reference)))
        bundle, *others = self._switch(wanted)
        return bundle, others[0] if others else None

    def single(self, job: TaskJob) -> LLM:
        """Open a bundle that answers.

        Prefix reuse is off: a prompt that is read from another token on may differ in the last
        bits, and an answer must not depend on earlier questions.
        """
        return self._switch([(job.bundle, job.engine.with_options(reuse_prefix=False))])[0]

    def _switch(self, wanted: Sequence[tuple[Path, EngineConfig]]) -> list[LLM]:
        for key in set(self._open) - set(wanted):
            self._open.pop(key).close()  # before others take their memory
        for key in wanted:
            if key not in self._open:
                self._open[key] = LLM(*key)
        return [self._open[key] for key in wanted]


class ThisMachine:
    """A `Computer` that runs in this process, windows one after the other; close it at the end."""

    def __init__(self, batch: int = 1) -> None:
        """Take the number of questions to answer together, where answers are generated."""
        self._batch = batch
        self._models = OpenModels()

    def __enter__(self) -> ThisMachine:
        return self

    def __exit__(self, *exc: object) -> None:
        self._models.close()

    def score(
        self, job: TextJob, windows: Sequence[Sequence[int]], progress: Progress
    ) -> tuple[str, Iterator[WindowResult]]:
        """Run windows, as `Computer.score` describes."""
        with uncounted(progress, "open"):
            bundle, reference = self._models.pair(job)
        return bundle.backend.name, self._windows(bundle, reference, windows, progress)

    @staticmethod
    def _windows(
        bundle: LLM, reference: LLM | None, windows: Sequence[Sequence[int]], progress: Progress
    ) -> Iterator[WindowResult]:
        done, total = 0, num_scored(windows)

        def scored(count: int) -> None:
            nonlocal done
            done += count
            progress("score", done, total, "tokens")

        scored(0)
        for window in windows:
            yield run_window(bundle, reference, window, scored)

    def answer(
        self, job: TaskJob, items: Sequence[tuple[int, Item]], progress: Progress
    ) -> list[ItemResult]:
        """Answer questions, as `Computer.answer` describes.

        Raises:
            ConfigError: several questions with choices are asked at a time, but choices are
                compared one by one; or a question does not fit into the KV cache. Nothing was
                answered then.
        """
        if self._batch > 1 and isinstance(items[0][1], ChoiceItem):
            raise ConfigError("--batch has no effect: choices are compared one after the other")
        engine = job.engine.with_options(num_slots=self._batch)
        with uncounted(progress, "open"):
            llm = self._models.single(replace(job, engine=engine))
        for line, item in items:
            check_item(llm, item, f"{job.file}, line {line}", job.scoring)
        results: dict[int, ItemResult] = {}
        progress("answer", 0, len(items), "questions")
        pool = ThreadPoolExecutor(self._batch, thread_name_prefix="edge-llm-answer")
        try:
            answers = {
                pool.submit(
                    answer_item, llm, line, item, scoring=job.scoring, params=job.params
                ): line
                for line, item in items
            }
            for answer in as_completed(answers):
                results[answers[answer]] = answer.result()
                progress("answer", len(results), len(items), "questions")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            self._models.close()  # this ends the answers that are being written
            raise
        finally:
            pool.shutdown()
        return [results[line] for line, _ in items]


def engine_of_reference(engine: EngineConfig, reference: Path) -> EngineConfig:
    """Fit the engine to a reference.

    A float reference stays open while the bundle is opened both ways. One with integer weights
    rounds activations where the bundle beside it does.
    """
    if engine.int8_activations:
        engine = engine.with_options(backend="ort-cpu", int8_activations=None)
    if rounds_activations(open_manifest(reference, engine.trusted_keys)):
        return engine
    return engine.with_options(int8_activations=False)


# ------------------------------------------------------------------------------- text


def evaluate_text(
    computer: Computer,
    bundles: Sequence[Path],
    reference: Path | None,
    engine: EngineConfig,
    *,
    text_file: Path | None = None,
    tokens: int | None = None,
    window: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Measure bundles on a text, one after the other, each beside the reference.

    Args:
        computer: runs the windows.
        bundles: directories.
        reference: directory of the reference; None measures the perplexity alone.
        engine: how bundles are opened.
        text_file: UTF-8 text; None is the one that comes with edge-llm.
        tokens: most tokens of the text to use.
        window: tokens per window; None is `WINDOW`.
        seed: seed of the bootstrap.
        progress: called with the steps of each bundle, named ``NAME: open`` and ``NAME: score``.

    Returns:
        For each bundle what `measure` returns, with ``bundle`` and ``int8_activations`` (whether
        they were rounded). If the engine rounds by default and there is a reference,
        ``bundle_alone`` has the figures of `summarize` with float activations.

    Raises:
        ConfigError: the text cannot be read, a window is too long, or the reference is another
            model's.
        EdgeError: a bundle cannot be opened, or an engine failed.
    """
    path = text_file or EVAL_TEXT
    text = read_text(path)
    size = window or WINDOW
    base = None if reference is None else open_manifest(reference, engine.trusted_keys)
    wanted = None
    if reference is not None and base is not None:
        wanted = _windows(reference, base, text, size, tokens)
    results = []
    for bundle in bundles:
        manifest = open_manifest(bundle, engine.trusted_keys)
        windows = _windows(bundle, manifest, text, size, tokens)
        if wanted is not None and wanted != windows:
            raise ConfigError(
                f"{bundle} and {reference} read the text as other tokens, so they cannot be "
                "compared; give the same model's bundle to --against"
            )
        if base is not None and _shape(base) != _shape(manifest):
            raise ConfigError(
                f"{bundle} and {reference} are bundles of models with other dimensions; give the "
                "same model's bundle to --against"
            )
        digest = hashlib.sha256(text.encode()).hexdigest()
        read = EvalText(windows, path.name, digest)

        def run(engine: EngineConfig, step: str, bundle: Path = bundle) -> tuple[str, Comparison]:
            job = TextJob(bundle, reference, size, engine)
            name, parts = computer.score(job, windows, prefixed(progress, f"{step}: "))  # noqa: B023
            return name, merge(parts)

        name, found = run(engine, bundle.name)
        result = measure(found, manifest, base, read, window=size, engine=name, seed=seed)
        rounds = engine.int8_activations is not False and rounds_activations(manifest)
        result |= {"bundle": str(bundle), "int8_activations": rounds}
        if rounds and engine.int8_activations is None and base is not None:
            _, alone = run(engine.with_options(int8_activations=False), f"{bundle.name} alone")
            result["bundle_alone"] = summarize(alone.positions)
        results.append(result)
    return results


def _windows(
    bundle: Path, manifest: Manifest, text: str, size: int, tokens: int | None
) -> list[list[int]]:
    if size > manifest.rope_positions:
        raise ConfigError(
            f"--window {size} is longer than the {manifest.rope_positions} positions of {bundle}"
        )
    with VerifiedFiles(bundle, manifest, ["tokenizer.json"]) as files:
        tokenizer = Tokenizer.from_bytes(files.read("tokenizer.json"), manifest.tokens)
    known = manifest.tokens
    prefix = [known.bos] if known.add_bos and known.bos is not None else []
    return cut_windows(tokenizer.encode(text), size, prefix, tokens)


def _shape(manifest: Manifest) -> ModelSpec:
    """Describe the model without what a recipe or a source's format may change.

    A rotation unties the lm_head, and GGUF stores epsilon in float32, which some tools keep.
    """
    model = manifest.model
    epsilon = float(np.float32(model.rms_norm_eps))
    return msgspec.structs.replace(model, tied_embeddings=False, rms_norm_eps=epsilon)


# ------------------------------------------------------------------------------- tasks


def evaluate_task(
    computer: Computer,
    bundles: Sequence[Path],
    reference: Path | None,
    engine: EngineConfig,
    task_file: Path,
    *,
    limit: int | None = None,
    scoring: Scoring | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Let bundles answer the questions of a file, and compare each with the reference.

    Args:
        computer: answers the questions.
        bundles: directories.
        reference: directory of the reference, if any.
        engine: how bundles are opened.
        task_file: JSONL in a layout of `edge_lab.measure.tasks`.
        limit: most questions to ask.
        scoring: how choices are compared; None is by letter.
        max_tokens: most tokens of an answer; None is 1024.
        temperature: temperature of generated answers; None is 0.
        seed: seed of sampled answers.
        progress: called with the steps of each bundle, named ``NAME: open`` and
            ``NAME: answer``.

    Returns:
        For each bundle what `summarize_task` returns, with ``bundle``, ``task``,
        ``int8_activations`` and, with a reference, ``against``.

    Raises:
        ConfigError: the file cannot be read, an option does not fit its layout, or a question does
            not fit into the KV cache.
        EdgeError: a bundle cannot be opened, or an engine failed.
    """
    items = read_task(task_file, limit)
    is_choice = isinstance(items[0][1], ChoiceItem)
    idle = [
        flag
        for flag, value, fits in (
            ("--choices", scoring, is_choice),
            ("--max-tokens", max_tokens, not is_choice),
            ("--temperature", temperature, not is_choice),
        )
        if value is not None and not fits
    ]
    if idle:
        kind = "choices" if is_choice else "generated"
        raise ConfigError(f"{idle[0]} has no effect: the answers in {task_file} are {kind}")
    params = SamplingParams(
        temperature=temperature or 0.0, seed=seed, max_tokens=max_tokens or 1024
    )

    def answers(bundle: Path, engine: EngineConfig) -> list[ItemResult]:
        # Open one bundle at a time: the second needs no memory while the first runs.
        job = TaskJob(bundle, engine, scoring or "letter", params, str(task_file))
        return computer.answer(job, items, prefixed(progress, f"{bundle.name}: "))

    theirs = (
        None if reference is None else answers(reference, engine_of_reference(engine, reference))
    )
    digest = hashlib.sha256(read_text(task_file).encode()).hexdigest()
    results = []
    for bundle in bundles:
        ours = answers(bundle, engine)
        result = {
            "bundle": str(bundle),
            **summarize_task(ours),
            "task": {"name": task_file.name, "sha256": digest},
            "int8_activations": engine.int8_activations is not False
            and rounds_activations(open_manifest(bundle, engine.trusted_keys)),
        }
        if theirs is not None and reference is not None:
            result["against"] = {
                "reference": describe(open_manifest(reference, engine.trusted_keys)),
                **summarize_task(theirs),
                **compare_task(ours, theirs),
            }
        results.append(result)
    return results
