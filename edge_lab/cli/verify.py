"""``edge-llm verify``: does this machine's engine answer as the same graph does on the CPU?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import msgspec

from edge.cli import echo_json
from edge.cli.options import bundle_argument, engine_options, take_engine
from edge.cli.sections import SectionCommand, option
from edge.engine_config import GPU_BACKENDS, EngineConfig
from edge.errors import EXIT_GATE_MISSED, ConfigError

from .options import Finite
from .progress import show_progress
from .tables import make_table

if TYPE_CHECKING:
    from edge.backends.ort.cpu import OrtBackend
    from edge.bundle.embeddings import EmbeddingTable
    from edge.bundle.manifest import Manifest
    from edge.text.tokenizer import Tokenizer
    from edge_lab.measure.layers import CpuLayers, LayerReport
    from edge_lab.measure.pictures import EncoderReport
    from edge_lab.measure.verify import Agreement, VerifyReport
    from edge_make.progress import Progress

_PROMPT_CHUNK = 64  # tokens per step: the longest prompt goes through several
_PROMPT_TOKENS = (1, 24, 300)  # one token, one chunk, several chunks


@click.command(cls=SectionCommand)
@bundle_argument
@engine_options("backend", "kv_capacity", "num_threads")
@option(
    "Text",
    "--prompts",
    "prompts_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="UTF-8 file, a prompt per line; default: three pieces of the built-in text.",
)
@option(
    "Text",
    "--decode-steps",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Tokens decoded after each prompt.",
)
@option(
    "Thresholds",
    "--min-cosine",
    type=Finite(-1, 1),
    help="Least cosine of the logits at a position; default 0.999, and 0.95 for ort-cpu with "
    "quantized weights, which rounds activations.",
)
@option(
    "Thresholds",
    "--min-top1",
    type=Finite(0, 1),
    help="Least share of equal likeliest tokens; 0.97 or 0.9.",
)
@option(
    "Thresholds",
    "--max-kl",
    type=Finite(0),
    help="Largest mean divergence, nats per token; 0.01 or 0.02.",
)
@option(
    "Thresholds",
    "--min-cache-cosine",
    type=Finite(-1, 1),
    help="Least cosine of a cached row; 0.999 or 0.95; 0.98 or 0.85 with an 8-bit cache.",
)
@option(
    "Output",
    "--layers",
    is_flag=True,
    help="Name the first decoder layer that drifts: by its output on the CPU, by its keys and "
    "values on a GPU. --min-cosine is then the least cosine of a layer at a position.",
)
@option("Output", "--json", "as_json", is_flag=True, help="Print one JSON line.")
def verify(
    bundle: Path,
    prompts_file: Path | None,
    decode_steps: int,
    min_cosine: float | None,
    min_top1: float | None,
    max_kl: float | None,
    min_cache_cosine: float | None,
    layers: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare the engine that runs BUNDLE here with the same graph in float on the CPU.

    Compares the logits at prefill and at every decode step, and the KV cache. Exits with code 3 if
    a threshold is missed.
    """
    given = {
        "cosine": min_cosine,
        "top1": min_top1,
        "kl": max_kl,
        "cache_cosine": min_cache_cosine,
    }
    wanted = {key: value for key, value in given.items() if value is not None}
    if layers:
        _verify_layers(bundle, _configs(options), prompts_file, decode_steps, wanted, as_json)
        return
    name, report, encoder = _compare(bundle, *_configs(options), prompts_file, decode_steps, wanted)
    passed = report.passed and (encoder is None or encoder.passed)
    if as_json:
        found = {"backend": name, "passed": passed, **msgspec.to_builtins(report)}
        echo_json(found if encoder is None else {**found, "vision": msgspec.to_builtins(encoder)})
    else:
        _print(bundle, name, report, encoder)
    if not passed:
        click.get_current_context().exit(EXIT_GATE_MISSED)


def _configs(options: dict[str, Any]) -> tuple[EngineConfig, EngineConfig]:
    """Read the configurations of the engine to verify and of the reference on the CPU."""
    reference = take_engine(
        {**options, "backend": "ort-cpu"}, num_slots=1, prefill_chunk=_PROMPT_CHUNK
    )
    if options["backend"] in GPU_BACKENDS:  # the threads are the reference's only
        options["num_threads"] = None
    return take_engine(options, num_slots=1, prefill_chunk=_PROMPT_CHUNK), reference


def _compare(
    bundle: Path,
    config: EngineConfig,
    reference_config: EngineConfig,
    prompts_file: Path | None,
    decode_steps: int,
    wanted: Mapping[str, float],
) -> tuple[str, VerifyReport, EncoderReport | None]:
    """Compare the engine that runs the bundle here, and return its name and the reports."""
    from edge.backends.choose import open_backend
    from edge_lab.measure.pictures import compare_encoders
    from edge_lab.measure.verify import compare_backends, default_thresholds
    from edge_make.progress import uncounted

    with _open(bundle) as opened:
        manifest = opened.manifest
        with uncounted(opened.progress, "open"):
            reference = _open_plain(opened, bundle, reference_config)
            candidate = open_backend(bundle, manifest, config)
            opened.stack.enter_context(closing(candidate))
        quantized = manifest.quantization.method != "none"
        usual = default_thresholds(manifest, rounds=candidate.name == "ort-cpu" and quantized)
        # An engine may have been built for fewer rows than the bundle names.
        capacity = min(reference.capacity, candidate.capacity)
        report = compare_backends(
            reference,
            candidate,
            read_prompts(prompts_file, opened.tokenizer, capacity - decode_steps),
            opened.table,
            decode_steps=decode_steps,
            thresholds=replace(usual, **wanted),
            progress=opened.progress,
        )
        threads = reference_config.num_threads
        encoder = compare_encoders(bundle, manifest, candidate, threads)
        return candidate.name, report, encoder


class _Opened(NamedTuple):
    """A bundle whose hashes are right, and what closes with it."""

    stack: ExitStack
    progress: Progress
    manifest: Manifest
    tokenizer: Tokenizer
    table: EmbeddingTable


@contextmanager
def _open(bundle: Path) -> Iterator[_Opened]:
    from edge.bundle.embeddings import EMBEDDINGS_NAME, EmbeddingTable
    from edge.bundle.trust import open_manifest
    from edge.bundle.verified_files import verify_files
    from edge_lab.measure.manifest_facts import check_facts
    from edge_make.progress import uncounted
    from edge_make.read_tokenizer import read_tokenizer

    manifest = open_manifest(bundle)
    with ExitStack() as stack:
        progress = stack.enter_context(show_progress())
        with uncounted(progress, "hash"):
            verify_files(bundle, manifest, manifest.files)
            check_facts(bundle, manifest)
        tokenizer = read_tokenizer(bundle / "tokenizer.json", manifest.tokens)
        table = stack.enter_context(closing(EmbeddingTable(bundle / EMBEDDINGS_NAME)))
        yield _Opened(stack, progress, manifest, tokenizer, table)


def _open_plain(opened: _Opened, bundle: Path, config: EngineConfig) -> OrtBackend:
    """Open the graph as it was exported: no rewritten attention, no rounded activations."""
    from edge.backends.ort.cpu import OrtBackend

    backend = OrtBackend(
        bundle,
        opened.manifest,
        kv_capacity=config.kv_capacity,
        num_threads=config.num_threads,
        max_step_tokens=config.prefill_chunk,
        fuse_attention=False,
        int8_activations=False,
    )
    return opened.stack.enter_context(closing(backend))


def _verify_layers(
    bundle: Path,
    configs: tuple[EngineConfig, EngineConfig],
    prompts_file: Path | None,
    decode_steps: int,
    wanted: Mapping[str, float],
    as_json: bool,
) -> None:
    """Compare layer by layer with the float graph, and end with the verdict."""
    flags = {"top1": "--min-top1", "kl": "--max-kl", "cache_cosine": "--min-cache-cosine"}
    for name, flag in flags.items():
        if name in wanted:
            raise ConfigError(f"{flag} has no effect with --layers, which compares no logits")
    floor = wanted.get("cosine")
    engine, report = _compare_layers(bundle, *configs, prompts_file, decode_steps, floor)
    if as_json:
        echo_json({"backend": engine, "passed": report.passed, **msgspec.to_builtins(report)})
    else:
        _print_layers(bundle, engine, report)
    if not report.passed:
        click.get_current_context().exit(EXIT_GATE_MISSED)


def _compare_layers(
    bundle: Path,
    config: EngineConfig,
    reference_config: EngineConfig,
    prompts_file: Path | None,
    decode_steps: int,
    floor: float | None,
) -> tuple[str, LayerReport]:
    """Compare the layers' outputs on the CPU, and what they cached on a GPU."""
    from edge.backends.choose import open_backend, tries_gpu
    from edge_lab.measure.layers import CacheLayers, LayerSource, compare_layers
    from edge_lab.measure.verify import ROUNDED_ACTIVATIONS, Thresholds
    from edge_make.progress import uncounted

    with _open(bundle) as opened:
        manifest, progress = opened.manifest, opened.progress
        name, quantized = "ort-cpu", manifest.quantization.method != "none"
        reference: LayerSource
        candidate: LayerSource
        with uncounted(progress, "open"):
            backend = open_backend(bundle, manifest, config) if tries_gpu(bundle, config) else None
            if backend is not None and backend.name == name:
                backend.close()  # the CPU's layers have sessions of their own
                backend = None
            if backend is not None:
                opened.stack.enter_context(closing(backend))
                plain = _open_plain(opened, bundle, reference_config)
                name, reference, candidate = backend.name, CacheLayers(plain), CacheLayers(backend)
                limit = min(reference.capacity, candidate.capacity)
                prompts = read_prompts(prompts_file, opened.tokenizer, limit - decode_steps)
            else:
                prompts, reference, candidate = _open_cpu_layers(
                    opened, bundle, config, prompts_file, decode_steps
                )
        if floor is None:
            rounded = name == "ort-cpu" and quantized
            floor = (ROUNDED_ACTIVATIONS if rounded else Thresholds()).cosine
        return name, compare_layers(
            reference,
            candidate,
            prompts,
            opened.table,
            decode_steps=decode_steps,
            floor=floor,
            max_tokens=_PROMPT_CHUNK,
            progress=progress,
        )


def _open_cpu_layers(
    opened: _Opened,
    bundle: Path,
    config: EngineConfig,
    prompts_file: Path | None,
    decode_steps: int,
) -> tuple[list[list[int]], CpuLayers, CpuLayers]:
    """Read the prompts, and open the plain graph and the CPU's fast path."""
    from edge_lab.measure.layers import CpuLayers

    limit = config.kv_capacity or opened.manifest.kv_capacity
    prompts = read_prompts(prompts_file, opened.tokenizer, limit - decode_steps)
    # No more rows than these tokens need: a step copies the whole cache.
    capacity = min(limit, max(map(len, prompts)) + decode_steps)
    rounds = config.int8_activations is not False
    reference, candidate = (
        CpuLayers(
            bundle,
            opened.manifest,
            capacity=capacity,
            num_threads=config.num_threads,
            fuse_attention=fast,
            int8_activations=fast and rounds,
        )
        for fast in (False, True)
    )
    return prompts, reference, candidate


def _print_layers(bundle: Path, engine: str, report: LayerReport) -> None:
    from rich.console import Console

    console = Console(markup=False)
    shown = "outputs of the layers" if report.compared == "outputs" else "keys and values"
    table = make_table(
        f"{bundle}: {shown}, {engine} against the float graph on the CPU",
        *("layer", "least cosine", "largest error / RMS"),
    )
    for each in report.layers:
        table.add_row(str(each.layer), f"{each.min_cosine:.6f}", f"{each.max_error:.4f}")
    console.print(table)
    console.print(f"positions: {report.positions}")
    if report.first is None:
        console.print(f"passed: no layer is below {report.floor}")
        return
    console.print(f"MISSED: layer {report.first} is the first below {report.floor}")
    if report.compared == "cache":
        before = f", or in layer {report.first - 1} after it" if report.first else ""
        console.print(f"what drifts is in its norm, projection or rotation{before}")


def read_prompts(path: Path | None, tokenizer: Tokenizer, limit: int) -> list[list[int]]:
    """Read prompts, as token ids: each line of a file, or three pieces of the built-in text.

    Args:
        path: UTF-8, a prompt per line, empty lines left out; None is the built-in text.
        tokenizer: the bundle's.
        limit: tokens that a prompt may have; pieces of the built-in text are cut to it.

    Raises:
        ConfigError: the file cannot be read or has no prompt, or the cache is too small.
    """
    from edge_lab.measure.defaults import EVAL_TEXT
    from edge_lab.measure.evaluate import read_text

    if limit < 1:
        raise ConfigError(
            "the decode steps fill the KV cache; give fewer --decode-steps or a larger "
            "--kv-capacity"
        )
    text = read_text(path or EVAL_TEXT)
    if path is None:
        return _pieces(tokenizer.encode(text[:20_000]), limit)
    lines = text.split("\n")  # not splitlines, for which a form feed ends a line, too
    prompts = [tokenizer.encode(line) for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"--prompts {path} has no prompt; write one per line")
    return prompts


def _pieces(ids: Sequence[int], limit: int) -> list[list[int]]:
    pieces, start = [], 0
    for length in _PROMPT_TOKENS:
        piece = list(ids[start : start + min(length, limit)])
        pieces.append(piece)
        start += len(piece)
    return pieces


def _print(bundle: Path, name: str, report: VerifyReport, encoder: EncoderReport | None) -> None:
    from rich.console import Console

    console = Console(markup=False)
    table = make_table(
        f"{bundle}: {name} against the float graph on the CPU",
        *("phase", "positions", "least cosine", "same top token", "mean KL"),
    )
    for phase, found in (("prefill", report.prefill), ("decode", report.decode)):
        table.add_row(phase, *_figures(found))
    console.print(table)
    console.print(f"least cosine of a cached row: {report.min_cache_cosine:.6f}")
    misses = list(report.misses)
    if encoder is not None:
        line = f"rows of a picture differ by {encoder.error:.3%}, at most {encoder.limit:.0%}"
        console.print(line)
        misses += [] if encoder.passed else [line]
    for miss in misses:
        console.print(f"MISSED: {miss}")
    console.print("passed" if not misses else f"{len(misses)} thresholds missed")


def _figures(found: Agreement) -> tuple[str, ...]:
    return (
        str(found.positions),
        f"{found.min_cosine:.6f}",
        f"{found.top1:.1%}",
        f"{found.mean_kl:.6f}",
    )
