"""``edge-llm build`` and ``edge-llm check``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from edge.bundle.manifest import read_manifest
from edge.bundle.sizes import DEFAULT_WORKSPACE_BYTES
from edge.cli import echo_json
from edge.cli.options import bundle_argument
from edge.cli.sections import SectionCommand, option
from edge.errors import EXIT_GATE_MISSED, ConfigError
from edge_lab.cli.options import check_writable, given_flag
from edge_lab.cli.progress import show_progress
from edge_lab.telemetry import read_target
from engines.trtexec.options import TRT_VERSIONS

from .config import (
    ATTENTIONS,
    KV_READS,
    PLUGINS,
    TENSORRT_ATTENTIONS,
    AttentionChoice,
    BuildConfig,
    KernelChoice,
)

if TYPE_CHECKING:
    from rich.console import Console

    from edge.bundle.engine_file import EngineInfo
    from engines.check.check import OwnBytes
    from engines.check.step_bytes import StepCost

    from .rules.check import Verdict

_ORIN = "87"
_SIZE = re.compile(r"(\d+) *([kmg])?(i?b)?\Z", re.IGNORECASE)


class _Sm(click.Choice[str]):
    """A GPU that TensorRT for RTX compiles for; an Orin is refused with advice."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Take the choice, or end with an error."""
        if value == _ORIN:
            raise ConfigError(
                f"--sm {value} is the Orin's, and TensorRT for RTX, which compiles without "
                f"a GPU, has no such target: it has {', '.join(self.choices)}. --sm 86 is closest: "
                "that it compiles tells that the graph parses, is fused and audited as meant on "
                "an Ampere GPU; kernels, speed and memory are others. Whether the Orin's own "
                "TensorRT takes the graph, --trt 10.3 (JetPack 6) or --trt 10.16 (JetPack 7) "
                "tells; the engine itself is built there, with edge-llm build"
            )
        return super().convert(value, param, ctx)


def _size(_ctx: click.Context, _param: click.Parameter, value: str) -> int:
    match = _SIZE.match(value.strip())
    if match is None:
        raise ConfigError(f"--workspace {value!r} is not a size such as 512M, 1G or 1073741824")
    return int(match[1]) << {"": 0, "k": 10, "m": 20, "g": 30}[(match[2] or "").lower()]


def _buckets(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[int, ...]:
    if value is None:
        return ()
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError as error:
        raise ConfigError(
            f"--kv-buckets {value!r} is not a list of numbers such as 512,1024,4096"
        ) from error


_SHAPES = (
    bundle_argument,
    option(
        "Shapes",
        "--max-batch",
        type=int,
        default=1,
        show_default=True,
        help="Sequences per step: 1 is for one user; edge-llm serve has 4 slots.",
    ),
    option(
        "Shapes",
        "--max-prefill",
        type=int,
        default=512,
        show_default=True,
        help="Tokens per prefill step; longer prompts go in chunks.",
    ),
    option(
        "Shapes",
        "--kv-capacity",
        type=int,
        help="Tokens of prompt and answer; default: the bundle's own.",
    ),
    option(
        "Expert",
        "--kv-buckets",
        callback=_buckets,
        metavar="N,N,...",
        help="Cache rows that a step may read, the last one the capacity. Default: powers of two.",
    ),
    option(
        "Expert",
        "--kv-read",
        type=click.Choice(["auto", *KV_READS]),
        default="slice",
        show_default=True,
        help="How attention reads the cache: the rows of a bucket, all rows, or each sequence's "
        "own length (TensorRT 11); auto is the first of them that builds.",
    ),
    option(
        "Memory",
        "--workspace",
        "workspace_bytes",
        default=str(DEFAULT_WORKSPACE_BYTES),
        callback=_size,
        metavar="SIZE",
        help="Scratch memory of a kernel, e.g. 512M; default 1G.",
    ),
    option(
        "Kernels",
        "--opt-level",
        type=int,
        default=3,
        show_default=True,
        help="0 builds fast, 5 searches longest for fast kernels.",
    ),
    option(
        "Expert",
        "--best-logits",
        type=int,
        default=0,
        show_default=True,
        metavar="N",
        help="Put out the N best logits of each row by themselves, so that most tokens are drawn "
        "from them and the others stay on the GPU: 256 is enough; 0 puts out rows only.",
    ),
    option("Output", "--force", is_flag=True, help="Go on although memory seems too small."),
    option("Output", "--json", "as_json", is_flag=True, help="Print one JSON line at the end."),
)


def _shape_options(command: Any) -> Any:
    for add in reversed(_SHAPES):
        command = add(command)
    return command


def _attention_option(choices: tuple[AttentionChoice, ...], last: str) -> Callable[[Any], Any]:
    return option(
        "Expert",
        "--attention",
        type=click.Choice(choices),
        default="auto",
        show_default=True,
        help="TensorRT's attention as one kernel or not at all, in several kernels where it has no "
        f"such one (auto), {last}",
    )


@click.command(cls=SectionCommand)
@_shape_options
@_attention_option(ATTENTIONS, "or edge-llm's own (with --kernels own, whose auto tries it first).")
@option(
    "Expert",
    "--timing-cache",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File with kernel timings to reuse and extend; default: the one beside the engine.",
)
@option(
    "Expert",
    "--with",
    "via",
    type=click.Choice(["api", "trtexec"]),
    default="api",
    show_default=True,
    help="TensorRT's Python API, which also audits the network, or NVIDIA's trtexec.",
)
@option(
    "Kernels",
    "--kernels",
    type=click.Choice(["auto", "own", "tensorrt"]),
    help="Whose kernels compute products of low-bit weights, and attention: edge-llm's own, "
    "as plugins in the engine, or TensorRT's; auto builds one engine with each, compares and times "
    "both here, and keeps the faster. Default: auto on a Jetson, else tensorrt.",
)
@option(
    "Kernels",
    "--plugins",
    type=click.Choice(PLUGINS),
    default="auto",
    show_default=True,
    help="How own kernels are in the engine: compiled into it ahead of time (aot, from TensorRT "
    "10.13 on), or launched by Python; auto is the first that TensorRT takes.",
)
@option(
    "Kernels",
    "--tune",
    is_flag=True,
    help="Build every variant that --kv-read auto, --attention auto and --kernels auto leave open, "
    "time each on this GPU, and keep the fastest that answers as the CPU does.",
)
@option("Output", "--again", is_flag=True, help="Build even if the same engine is there already.")
@option(
    "Output", "--print-trtexec", is_flag=True, help="Only print the trtexec line for this engine."
)
@option(
    "Output",
    "--trt",
    type=click.Choice(list(TRT_VERSIONS)),
    help="TensorRT version of --print-trtexec; default: that of the trtexec here.",
)
def build(
    as_json: bool,
    via: Any,
    print_trtexec: bool,
    trt: str | None,
    kernels: KernelChoice | None,
    **options: Any,
) -> None:
    """Build the TensorRT engine of BUNDLE for the GPU of this machine."""
    if kernels is None:
        by_trtexec = print_trtexec or via == "trtexec"
        kernels = "tensorrt" if by_trtexec else _default_kernels(options["bundle"])
    config = BuildConfig(kernels=kernels, **options)
    if print_trtexec:
        if config.again:
            raise ConfigError("--again has no effect with --print-trtexec, which builds nothing")
        _print_trtexec(config, trt, as_json)
        return
    if trt is not None:
        raise ConfigError(
            "--trt goes with --print-trtexec: a build takes the TensorRT that is here"
        )
    check_writable(config.timing_cache, "--timing-cache")
    from edge_lab.cli.inspect_engine import describe_trial
    from edge_lab.telemetry import moving_clocks, read_snapshot
    from edge_make.engine_verdict import slow_parts
    from engines.builder.build import build_engine
    from engines.builder.fallbacks import describe

    if (moving := moving_clocks(read_snapshot())) is not None:
        click.echo(f"warning: {moving}", err=True)
    with show_progress() as progress:
        result = build_engine(
            config,
            via=via,
            progress=progress,
            say=lambda line: click.echo(line, err=True),
        )
    info = result.info
    if as_json:
        echo_json(
            {
                "engine": str(result.directory),
                "built": result.built,
                "plan_bytes": info.plan_bytes,
                "outside_bytes": info.weights_bytes - info.plan_bytes,
                "build_s": info.build_s,
                "peak_memory_bytes": info.peak_memory_bytes,
                "tensorrt": f"{info.flavour} {info.tensorrt_version}",
                "compute_capability": info.compute_capability,
                "kv_read": info.kv_read,
                "attention": info.attention,
                "scales": info.scales,
                "kernels": info.kernels,
                "own_linears": list(info.own_linears),
                "left_linears": dict(info.left_linears),
                "own_attentions": list(info.own_attentions),
                "own_top_k": info.own_top_k,
                "refused": msgspec.to_builtins(info.refused),
                "tuned": msgspec.to_builtins(info.tuned),
                "slow": list(slow_parts(info)),
            }
        )
        return
    if not result.built:
        click.echo(f"{result.directory} is up to date")
        _print_slowness(info)
        return
    peak = f", peak memory {info.peak_memory_bytes / 1e9:.1f} GB" if info.peak_memory_bytes else ""
    beside = f" and {info.outside.num_bytes / 1e6:,.0f} MB of weights" if info.outside else ""
    size = f"{info.plan_bytes / 1e6:,.0f} MB{beside}"
    click.echo(f"{result.directory}: {size} in {info.build_s:.0f} s{peak}")
    if info.kernels == "own":
        attentions = f", {len(info.own_attentions)} attentions" if info.own_attentions else ""
        top_k = ", best logits" if info.own_top_k else ""
        click.echo(f"own kernels: {len(info.own_linears)} layers{attentions}{top_k}")
        for name, reason in info.left_linears.items():
            click.echo(f"left to TensorRT: {name}: {reason}")
    for refused in info.refused:
        click.echo(f"refused: {describe(refused)}: {refused.reason}")
    for tried in info.tuned:
        click.echo(f"tried: {describe(tried)}: {describe_trial(tried)}")
    if info.refused or info.tuned:
        click.echo(f"taken: {describe(info)}")
    _print_slowness(info)


def _default_kernels(bundle: Path) -> KernelChoice:
    """Choose the faster kernels on a Jetson, where there are decode steps to time."""
    on_jetson = read_target() is not None
    return "auto" if on_jetson and read_manifest(bundle).model.task == "generate" else "tensorrt"


def _print_slowness(info: EngineInfo) -> None:
    from edge_make.engine_verdict import describe_slowness

    if info.compiled_unknown is not None:
        click.echo(f"nobody knows whether it is slow: {info.compiled_unknown}")
    elif (slow := describe_slowness(info)) is not None:
        click.echo(f"SLOW: {slow}")


def _print_trtexec(config: BuildConfig, trt: str | None, as_json: bool) -> None:
    from engines.builder.encoder import encoder_for_bundle
    from engines.trtexec.command import (
        command_for_bundle,
        find_trtexec,
        format_command,
        parse_version,
        trtexec_version,
    )

    from .rules.bundle import check_bundle_rules
    from .rules.table import version_of

    version = parse_version(trt) if trt else trtexec_version(find_trtexec())
    line = command_for_bundle(config, version)
    encoder = encoder_for_bundle(config, version)
    for verdict in check_bundle_rules(config.bundle, [version_of("tensorrt", version)]):
        for finding in verdict.refusals:
            click.echo(f"warning: {verdict.version} does not take the graph: {finding}", err=True)
    if as_json:
        echo_json({"trtexec": line, **({"trtexec_vision": encoder} if encoder else {})})
    else:
        click.echo("\n\n".join(format_command(each) for each in (line, encoder) if each))


@click.command(cls=SectionCommand)
@_shape_options
@_attention_option(TENSORRT_ATTENTIONS, "or auto: the latter.")
@option(
    "Device",
    "--trt",
    metavar="VERSION,...",
    help="Compile nothing: tell whether these versions of TensorRT take the graph, which need not "
    "be here. Releases such as 10.3, rtx, or all.",
)
@option(
    "Device",
    "--sm",
    type=_Sm(["80", "86", "89", "120"]),
    default="86",
    show_default=True,
    help="GPU to compile for, which need not be here. TensorRT for RTX cannot compile for the "
    "Orin's 87; 86 is closest, with the same parser, network and audit.",
)
@option(
    "Output",
    "--reduce",
    "reduced",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="OUT.onnx",
    help="If TensorRT refuses the graph, write its smallest part that is refused for the same "
    "cause. With a GPU here and no --sm it asks the TensorRT that builds.",
)
@click.pass_context
def check(
    ctx: click.Context,
    /,
    as_json: bool,
    sm: str,
    trt: str | None,
    reduced: Path | None,
    **options: Any,
) -> None:
    """Compile BUNDLE without a GPU and audit what TensorRT made of it.

    Needs TensorRT for RTX. Exits with code 65 if the audit finds a fault; nothing is written.

    With --trt it needs no TensorRT: it checks the graph by the rules of each version. Exits with
    code 3 if one of them refuses it.
    """
    if trt is not None:
        _check_rules(ctx, options["bundle"], trt, as_json)
        return
    if reduced is not None:
        own_gpu = given_flag("sm") is None
        _reduce(BuildConfig(**options), reduced, int(sm), own_gpu=own_gpu, as_json=as_json)
        return
    from engines.check.check import check_bundle

    config = BuildConfig(**options)
    with show_progress() as progress:
        report = check_bundle(config, int(sm), progress)
    if as_json:
        echo_json({"passed": report.passed, **msgspec.to_builtins(report)})
    else:
        _print_report(report)
    if not report.passed:
        click.get_current_context().exit(65)


def _check_rules(ctx: click.Context, bundle: Path, trt: str, as_json: bool) -> None:
    from .rules.bundle import check_bundle_rules, parse_versions, verdict_as_dict

    names = {parameter.name or "" for parameter in ctx.command.params}
    idle = given_flag(*names - {"bundle", "trt", "as_json"})
    if idle is not None:
        raise ConfigError(f"{idle} has no effect with --trt, which compiles nothing")
    verdicts = check_bundle_rules(bundle, parse_versions(trt))
    legal = all(verdict.legal for verdict in verdicts)
    if as_json:
        versions = [verdict_as_dict(verdict) for verdict in verdicts]
        echo_json({"bundle": str(bundle), "legal": legal, "versions": versions})
    else:
        for verdict in verdicts:
            _print_verdict(verdict)
    if not legal:
        ctx.exit(EXIT_GATE_MISSED)


def _reduce(config: BuildConfig, output: Path, sm: int, *, own_gpu: bool, as_json: bool) -> None:
    from edge.device.gpu import find_gpu
    from engines.check.reduce import reduce_bundle

    here = own_gpu and find_gpu() is not None
    with show_progress() as progress:
        found = reduce_bundle(config, output, None if here else sm, progress)
    if as_json:
        echo_json(msgspec.to_builtins(found))
        return
    files = " and ".join(filter(None, (found.path, found.weights)))
    click.echo(f"{files}: {found.num_bytes:,} bytes, refused by {found.tensorrt} ({found.step})")
    click.echo(f"{len(found.nodes)} of {found.nodes_before} nodes:")
    for title, lines in (("node", found.nodes), ("in", found.inputs), ("out", found.outputs)):
        for line in lines:
            click.echo(f"  {title}: {line}")
    if found.sizes:
        sizes = ", ".join(f"{name} = {size}" for name, size in found.sizes.items())
        click.echo(f"  dynamic dimensions were fixed: {sizes}")
    click.echo(f"error: {found.error}")
    click.echo(f"reproduce with: {found.command}")


def _print_verdict(verdict: Verdict) -> None:
    version = verdict.version
    unsure = "" if verdict.confirmed else " (not confirmed at its source, see docs/engines.md)"
    click.echo(
        f"{version} ({version.where or 'no JetPack'}): "
        f"{'legal' if verdict.legal else 'ILLEGAL'}{unsure}"
    )
    for finding in verdict.findings:
        click.echo(f"  {'refused' if finding.refused else 'warning'}: {finding}")
        click.echo(f"    source: {finding.source}")
        if finding.note:
            click.echo(f"    note: {finding.note}")
        click.echo(f"    instead: {finding.instead}")


def _print_steps(console: Console, steps: Sequence[StepCost]) -> None:
    from edge_lab.cli.tables import make_table

    costs = make_table(
        "Bytes of a step, MB: from the fewest cache rows to a full cache",
        *("profile", "sequences", "tokens", "weights", "unpacked", "cache", "per token"),
    )
    for step in steps:
        costs.add_row(
            step.profile,
            str(step.batch),
            str(step.batch * step.tokens),
            f"{step.packed_bytes / 1e6:,.1f}",
            f"{step.unpacked_bytes / 1e6:,.1f}",
            " to ".join(f"{size / 1e6:,.1f}" for size in step.cache_bytes),
            " to ".join(f"{size / 1e6:,.1f}" for size in step.bytes_per_token),
        )
    console.print(costs, "")
    names = [f"{step.profile} {step.batch}x{step.tokens}" for step in steps]
    ceilings = make_table(
        "Ceilings, tokens per second: full cache to fewest rows", "module", "GB/s", *names
    )
    for index, module in enumerate(steps[0].ceilings):
        at = [step.ceilings[index] for step in steps]
        ceilings.add_row(
            f"{module.device} {module.power_mode}",
            f"{module.bytes_per_s / 1e9:.1f}",
            *(f"{one.full.tokens_per_s:,.0f} to {one.short.tokens_per_s:,.0f}" for one in at),
        )
    console.print(ceilings)
    console.print(
        "A ceiling is computed: all bytes of a step at the whole bandwidth, or its operations at "
        "the tensor cores' peak if that takes longer.",
        "",
    )


def _compared(scratch: Any) -> list[tuple[str, str]]:
    if scratch is None:
        return []
    text = f"{scratch.packed:,} bytes, with float weights {scratch.floats:,}"
    return [("scratch of decode, one sequence", text)]


def _own_bytes(own: OwnBytes | None) -> list[tuple[str, str]]:
    if own is None:
        return [("with own kernels", "no layer is one that they compute")]
    return [
        (
            "with own kernels",
            f"{own.inside_bytes:,} bytes of constants in the plan, {own.outside_bytes:,} beside it",
        ),
        *((f"in the plan: {name}", f"{size:,} bytes") for name, size in own.large.items()),
        *((f"left to TensorRT: {name}", reason) for name, reason in own.left.items()),
    ]


def _print_report(report: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False)
    facts = Table(title=report.bundle, title_justify="left", box=None, show_header=False)
    for name, value in (
        ("compiled by", f"{report.tensorrt_version} for sm {report.compute_capability}"),
        ("plan", f"{report.plan_bytes:,} bytes"),
        *((("vision encoder", f"{size:,} bytes"),) if (size := report.encoder_plan_bytes) else ()),
        ("took", f"{report.build_s:.1f} s, peak memory {report.peak_memory_bytes / 1e9:.2f} GB"),
        ("attentions", f"{report.attentions}, {report.attention or 'of primitive operators'}"),
        *((f"refused {each.label}", each.reason) for each in report.refused),
        *((f"scratch of {name}", f"{size:,} bytes") for name, size in report.scratch_bytes.items()),
        *_compared(report.decode_scratch),
        *_own_bytes(report.own),
    ):
        facts.add_row(name, value)
    console.print(facts, "")
    _print_steps(console, report.steps)
    weights = Table(title="Weights of the linear layers", title_justify="left", box=None)
    for column in ("type", "layers", "bytes"):
        weights.add_column(column, justify="left" if column == "type" else "right")
    for weight in report.weights:
        weights.add_row(weight.dtype, str(weight.count), f"{weight.num_bytes:,}")
    console.print(weights, "")
    layers = Table(title="Layers by type", title_justify="left", box=None)
    for column in ("kind", "type", "count"):
        layers.add_column(column, justify="right" if column == "count" else "left")
    for layer in report.layers:
        layers.add_row(layer.kind, layer.dtype, str(layer.count))
    console.print(layers, "")
    for problem in report.problems:
        console.print(f"FAULT: {problem}")
    console.print("passed" if report.passed else f"{len(report.problems)} faults")
