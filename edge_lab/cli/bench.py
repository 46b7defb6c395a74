"""``edge-llm bench``: speed, memory and energy of a bundle on this machine."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

import edge
from edge.cli import echo_json
from edge.cli.options import FILE, bundle_argument, engine_options, json_option, take_engine
from edge.cli.sections import SectionCommand, option
from edge.errors import EXIT_GATE_MISSED, BackendError, ConfigError
from edge.files import MALFORMED, read_file

from .options import Finite
from .progress import show_progress
from .tables import make_table

if TYPE_CHECKING:
    from edge.engine_config import EngineConfig
    from edge_lab.measure.bench import BenchConfig
    from edge_lab.measure.bench_report import Change

_MAX_RESULT_BYTES = 16 << 20
_SLOWEST = 15


@click.command(cls=SectionCommand)
@bundle_argument
@option(
    "Runs",
    "--prompt-tokens",
    type=int,
    default=512,
    show_default=True,
    help="Random tokens per prompt.",
)
@option(
    "Runs",
    "--output-tokens",
    type=int,
    default=128,
    show_default=True,
    help="Tokens to sample per sequence.",
)
@option("Runs", "--repeats", type=int, default=5, show_default=True, help="Measured runs.")
@option(
    "Expert", "--warmup", type=int, default=1, show_default=True, help="Runs that do not count."
)
@option(
    "Runs", "--batch", type=int, default=1, show_default=True, help="Sequences decoded together."
)
@option("Runs", "--image", type=FILE, help="Also time a picture: decoding, encoder and prompt.")
@option(
    "Expert", "--seed", type=int, default=0, show_default=True, help="Seed of prompts and sampling."
)
@option(
    "Comparison",
    "--against",
    type=FILE,
    help="Compare with the JSON of an earlier run.",
)
@option(
    "Comparison",
    "--max-slowdown",
    type=Finite(min=0),
    help="With --against: fail if a figure is slower by more than this share, e.g. 0.05, and "
    "slower beyond the noise.",
)
@option(
    "Output",
    "--layers",
    is_flag=True,
    help="Also time every layer of the TensorRT engine, with its profiler.",
)
@json_option
@engine_options(
    "backend", "kv_capacity", "num_threads", "gpu_wait", "prefill", "draft", "speculative",
    "image_tiles",
)  # fmt: skip
@click.pass_context
def bench(
    ctx: click.Context,
    /,
    bundle: Path,
    against: Path | None,
    max_slowdown: float | None,
    image: Path | None,
    layers: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure prefill and decode of BUNDLE: medians of repeats after a warm-up.

    With --draft or --speculative it then answers questions with and without drafts, in turns.
    """
    from edge_lab.measure.bench import BenchConfig
    from edge_lab.measure.bench_report import compare

    if max_slowdown is not None and against is None:
        raise ConfigError("--max-slowdown needs a run to compare with; give --against FILE")
    engine = take_engine(options)
    if engine.image_tiles is not None and image is None:
        raise ConfigError("--image-tiles needs a picture to cut; give --image FILE")
    config = BenchConfig(**options)
    before = None if against is None else _read_result(against)
    _check_before_loading(bundle, config, engine, before, layers=layers)
    result = _measure(bundle, config, engine.with_options(num_slots=config.batch), layers)
    changes = [] if before is None else compare(before, result)
    if image is not None:
        result["picture"] = _measure_picture(bundle, config, engine, image)
    result["against"] = [
        {
            "figure": change.name,
            "ratio": change.ratio,
            "interval": [change.low, change.high],
            "verdict": change.verdict,
        }
        for change in changes
    ]
    if as_json:
        echo_json(result)
    else:
        _print(result, changes)
    missed = [
        change
        for change in changes
        if max_slowdown is not None
        and change.ratio > 1 + max_slowdown
        and change.verdict == "slower"
    ]
    for change in missed:
        click.echo(
            f"edge-llm: {change.name} is {change.ratio - 1:+.1%} against {against}, more than "
            f"--max-slowdown {max_slowdown:g} allows",
            err=True,
        )
    if missed:
        ctx.exit(EXIT_GATE_MISSED)


def _check_before_loading(
    bundle: Path,
    config: BenchConfig,
    engine: EngineConfig,
    before: dict[str, Any] | None,
    *,
    layers: bool,
) -> None:
    """Refuse early what would only fail after the minutes that a model takes to load."""
    from edge.bundle.engine_file import find_engines
    from edge.bundle.manifest import read_manifest
    from edge_lab.measure.bench import check_room
    from edge_lab.measure.bench_report import check_alike, refuse_few_repeats
    from edge_lab.measure.layer_bench import no_layer_times

    manifest = read_manifest(bundle)
    check_room(config, engine.kv_capacity or manifest.kv_capacity)
    if layers:
        if engine.backend not in ("auto", "tensorrt"):
            raise no_layer_times(engine.backend)
        if not find_engines(bundle):
            raise no_layer_times("another backend")
    if before is not None:
        refuse_few_repeats(config.repeats)
        known = {
            name: getattr(config, name) for name in ("batch", "prompt_tokens", "output_tokens")
        }
        known |= {"prefill": engine.prefill, "num_threads": engine.num_threads}
        check_alike(before, known)


def _measure(
    bundle: Path, config: BenchConfig, engine_config: EngineConfig, layers: bool
) -> dict[str, Any]:
    import time
    from contextlib import closing
    from dataclasses import asdict

    from edge.backends.choose import open_backend, serial_slots
    from edge.bundle.embeddings import EMBEDDINGS_NAME, EmbeddingTable
    from edge.bundle.tasks import check_task
    from edge.bundle.trust import open_manifest
    from edge.bundle.verified_files import verify_files
    from edge_lab.measure import bench_report
    from edge_lab.measure.bench import run_bench
    from edge_lab.measure.layer_bench import require_layer_times, time_layers
    from edge_lab.telemetry import read_snapshot
    from edge_make.resident_memory import read_rss_bytes, read_rss_peak_bytes, reset_rss_peak

    manifest = open_manifest(bundle)
    check_task(manifest, "generate")
    verify_files(bundle, manifest)
    started = time.perf_counter()
    engine = open_backend(bundle, manifest, engine_config)
    load_s = time.perf_counter() - started
    with closing(engine), closing(EmbeddingTable(bundle / EMBEDDINGS_NAME)) as embeddings:
        if (serial := serial_slots(engine, engine_config)) is not None:
            raise ConfigError(f"--batch {config.batch}: {serial}")
        if layers:
            require_layer_times(engine)
        load_peak_bytes = read_rss_peak_bytes()
        peak_is_new = reset_rss_peak()
        with show_progress() as progress:
            samples = run_bench(engine, embeddings, manifest, config, progress=progress)
        rss_bytes, run_peak_bytes = read_rss_bytes(), read_rss_peak_bytes()
        snapshot = read_snapshot()
        device, remark = bench_report.find_bench_device(
            engine.name, snapshot, engine_config.num_threads
        )
        result = bench_report.report(manifest, engine, config, samples, device, snapshot)
        if layers:
            found = time_layers(require_layer_times(engine), embeddings, manifest, config)
            result["layers"] = {name: asdict(times) for name, times in found.items()}
    if remark is not None:
        click.echo(f"edge-llm: {remark}", err=True)
    if engine_config.max_draft_tokens:
        result["drafts"] = _measure_drafts(bundle, config, engine_config)
    return {
        **result,
        "bundle": str(bundle),
        "prefill": engine_config.prefill,
        "num_threads": engine_config.num_threads,
        "load_s": load_s,
        "memory": {
            "load_peak_bytes": load_peak_bytes,
            "rss_bytes": rss_bytes,
            "run_peak_bytes": run_peak_bytes if peak_is_new else None,
        },
        "versions": _versions(),
    }


def _measure_drafts(
    bundle: Path, config: BenchConfig, engine_config: EngineConfig
) -> dict[str, Any]:
    from edge.runtime.llm import LLM
    from edge_lab.measure.draft_bench import run_draft_bench

    draft = engine_config.draft
    with LLM(bundle, engine_config, reuse_prefix=False) as llm, show_progress() as progress:
        texts = run_draft_bench(llm, config, progress=progress)
        failed = llm.scheduler.stats().drafts_failed
    if failed is not None:
        raise BackendError(f"the draft failed, so there is nothing to compare: {failed}")
    return {
        "draft": None if draft is None else str(draft),
        "speculative": engine_config.max_draft_tokens,
        "texts": texts,
    }


def _measure_picture(
    bundle: Path, config: BenchConfig, engine_config: EngineConfig, image: Path
) -> dict[str, Any]:
    from edge.runtime.llm import LLM
    from edge_lab.measure.picture_bench import bench_picture

    with LLM(bundle, engine_config, reuse_prefix=False) as llm:
        return bench_picture(llm, image, repeats=config.repeats, warmup=config.warmup)


def _versions() -> dict[str, str]:
    found = {"edge_llm": edge.__version__, "python": platform.python_version()}
    for name in ("onnxruntime", "onnxruntime-gpu", "tensorrt", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _read_result(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(read_file(path, _MAX_RESULT_BYTES), type=dict[str, Any])
    except OSError as error:
        raise ConfigError(f"--against {path} cannot be read: {error.strerror}") from error
    except MALFORMED as error:
        raise ConfigError(
            f"--against {path} is not what edge-llm bench --json prints: {error}"
        ) from error


def _print(result: dict[str, Any], changes: list[Change]) -> None:
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    device = result["device"]
    place = device["module"] or device["name"] or "this machine"
    # The mode it ran in, which the table of modes may not list.
    mode = f", {device['nvpmodel']}" if device["nvpmodel"] else ""
    table = make_table(
        f"{result['bundle']} ({result['quantization']}) with {result['backend']} on {place}{mode}: "
        f"batch {result['batch']}, prompt {result['prompt_tokens']}, output "
        f"{result['output_tokens']}, {result['repeats']} runs",
        *("figure", "median", "± MAD", "min", "max"),
    )
    for key, name in (("prefill_s", "prefill"), ("ttft_s", "TTFT"), ("tpot_s", "TPOT")):
        figures = result[key]
        cells = [f"{figures[part] * 1e3:.2f}" for part in ("median", "mad", "min", "max")]
        table.add_row(f"{name}, ms", *cells)
    console.print(table)
    steps = result["itl_s"]
    console.print(
        f"ITL ms: p50 {steps['p50'] * 1e3:.2f}, p90 {steps['p90'] * 1e3:.2f}, "
        f"p95 {steps['p95'] * 1e3:.2f}, p99 {steps['p99'] * 1e3:.2f}; of a step "
        f"{result['own_s_per_step'] * 1e3:.2f} ms outside the engine"
    )
    wait = "" if result["gpu_wait"] is None else f", waiting for the GPU by {result['gpu_wait']}"
    busy = result["cpu_s_per_step"] / result["tpot_s"]["median"]
    console.print(
        f"CPU time of a step: {result['cpu_s_per_step'] * 1e3:.2f} ms, {busy:.2f} CPUs busy{wait}"
    )
    console.print(
        f"prefill {result['prefill_tps']:,.1f} tok/s, decode {result['decode_tps']:,.1f} tok/s"
    )
    ceiling = result["roofline"]
    if ceiling is None:
        console.print("roofline: not known for this device")
    else:
        console.print(
            f"roofline: {ceiling['decode_tps']:,.1f} tok/s at {device['bytes_per_s'] / 1e9:.1f} "
            f"GB/s and {ceiling['bytes_per_step'] / 1e6:,.0f} MB per step; reached "
            f"{ceiling['reached']:.0%}"
        )
        if ceiling["predicted_decode_tps"] is not None:
            console.print(f"edge-llm plan predicts {ceiling['predicted_decode_tps']:,.1f} tok/s")
    console.print(f"memory: {_memory(result)}; load {result['load_s']:.1f} s")
    joules, watts = result["decode_joules_per_token"], result["decode_watts"]
    energy = "no power rails here" if joules is None else f"{joules:.3f} J/token at {watts:.1f} W"
    console.print(f"energy of decode: {energy}")
    if "picture" in result:
        from .pictures import describe_picture

        console.print(describe_picture(result["picture"]))
    if "drafts" in result:
        _print_drafts(result["drafts"])
    for profile in result.get("layers", ()):
        _print_layers(profile, result["layers"][profile])
    for change in changes:
        console.print(
            f"against: {change.name} {change.ratio - 1:+.1%} "
            f"(95 % {change.low - 1:+.1%} to {change.high - 1:+.1%}): {change.verdict}"
        )
    if changes:
        console.print("against: the intervals know the noise within one process only")


def _print_drafts(drafts: dict[str, Any]) -> None:
    """Print each text's speed with and without drafts."""
    from rich.console import Console

    table = make_table(
        f"Drafts by {drafts['draft'] or 'what the text repeats'}, up to {drafts['speculative']} "
        "tokens a step",
        *("text", "temperature", "plain, tok/s", "drafts, tok/s", "gain", "proposed", "accepted"),
        *("steps", "saved, s", "same answers"),
        keys=2,
    )
    for row in drafts["texts"]:
        share = "" if row["acceptance"] is None else f" ({row['acceptance']:.0%})"
        table.add_row(
            row["text"],
            f"{row['temperature']:g}",
            f"{row['plain_tps']:.1f}",
            f"{row['drafted_tps']:.1f}",
            f"{row['ratio']:.2f}x",
            str(row["drafted"]),
            f"{row['accepted']}{share}",
            str(row["steps"]),
            f"{row['saved_s']:.2f}",
            f"{row['same']} of {row['pairs']}",
        )
    Console(markup=False, highlight=False).print("", table)


def _print_layers(profile: str, times: dict[str, Any]) -> None:
    """Print a profile's kinds of layers and its slowest ones."""
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    layers = times["layers"]
    kinds = make_table(
        f"{profile}: {len(layers)} layers, {times['total_ms']:.3f} ms under the profiler, median "
        f"of {times['runs']} runs",
        *("kind", "layers", "ms", "share"),
    )
    found: dict[str, tuple[int, float]] = {}
    for layer in layers:
        key = f"{layer['kind'] or 'unknown'} {layer['dtype'] or ''}"
        count, ms = found.get(key, (0, 0.0))
        found[key] = count + 1, ms + layer["ms"]
    for key, (count, ms) in sorted(found.items(), key=lambda item: -item[1][1]):
        kinds.add_row(key, str(count), f"{ms:.3f}", f"{ms / times['total_ms']:.1%}")
    slowest = make_table(f"{profile}: the slowest layers", "layer", "ms", "share", "type", "kernel")
    for layer in layers[:_SLOWEST]:
        slowest.add_row(
            layer["name"],
            f"{layer['ms']:.3f}",
            f"{layer['share']:.1%}",
            layer["dtype"] or "-",
            layer["tactic"] or "-",
        )
    console.print("", kinds, "", slowest)


def _memory(result: dict[str, Any]) -> str:
    memory = result["memory"]
    names = {
        "rss_bytes": "resident",
        "run_peak_bytes": "peak",
        "load_peak_bytes": "peak of loading",
    }
    parts = [f"{name} {memory[key] / 1e6:,.0f} MB" for key, name in names.items() if memory[key]]
    if result["device_memory"] is not None:
        parts.append(f"engine {result['device_memory']['device_bytes'] / 1e6:,.0f} MB")
    return ", ".join(parts) or "not known on this system"
