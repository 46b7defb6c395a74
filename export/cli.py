"""Defines ``edge-llm export``, which turns a checkpoint into a bundle."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge.bundle.quant_rules import RULES, fold_quant
from edge.cli.sections import SectionCommand, option
from edge.errors import EXIT_GATE_MISSED, ConfigError, DependencyError, GateError, install_command
from edge_make.manifest_text import (
    describe_from_source,
    describe_kv_cache,
    describe_sampling,
    describe_tensorrt,
    describe_vision,
)

from .targets import TARGETS

if TYPE_CHECKING:
    from edge.bundle.manifest import ReducedVocabulary


_FIGURES = ("tokens", "kl_mean", "top1_agreement", "perplexity_ratio")


def _keep(
    _ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]
) -> tuple[tuple[str, str], ...]:
    result = []
    for value in values:
        pattern, separator, scheme = value.partition("=")
        if not separator:
            raise ConfigError(f"--keep {value!r} is not of the form PATTERN=SCHEME")
        result.append((pattern, scheme))
    return tuple(result)


def _target(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    """Resolve ``here``, which is no particular device where there is no JetPack."""
    if value != "here":
        return value
    from edge_lab.telemetry import read_target

    return read_target()


def _recipe(ctx: click.Context, _param: click.Parameter, path: Path | None) -> None:
    """Make the recipe's values the defaults of the other options."""
    if path is None:
        return
    from .quantize.recipe import read_recipe

    options = read_recipe(path)
    if "keep" in options:
        options["keep"] = [f"{pattern}={scheme}" for pattern, scheme in options["keep"]]
    ctx.default_map = options


class _Quant(click.Choice):  # type: ignore[type-arg]  # generic from click 8.2 on
    """A precision in any spelling of `fold_quant`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the usual spelling, or end with the error that lists all precisions."""
        return super().convert(fold_quant(str(value)), param, ctx)


@click.command(cls=SectionCommand)
@click.argument("source")
@option(
    "Output",
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Directory of the bundle to write.",
)
@option(
    "Quantization",
    "--quant",
    type=_Quant([*RULES, "source"]),
    help="Scheme of the linear layers; source keeps the integers of a checkpoint that is quantized "
    "already (GPTQ, AWQ, compressed-tensors, AutoRound). Default: source for such a checkpoint, "
    "else int4.",
)
@option(
    "Quantization",
    "--group-size",
    type=int,
    help="Weights that share a scale: 128, 64 or 32. "
    "Default: 32 for INT4, for INT8 the largest that fits the model.",
)
@option(
    "Expert",
    "--keep",
    multiple=True,
    callback=_keep,
    metavar="PATTERN=SCHEME",
    help="Another scheme (float, int8, int4, w8a8) for the layers that match, e.g. "
    "'lm_head=int4' or 'layers.0.*=int8'; 'int4-g64' is INT4 in groups of 64. By default "
    "INT4 recipes store the lm_head in INT8, and int8-w8a8 stores it in INT8 with "
    "float inputs.",
)
@option(
    "Expert",
    "--clip",
    type=click.Choice(["mse", "absmax"]),
    default="mse",
    show_default=True,
    help="How scales are chosen: least squared error, or the largest weight (faster, worse).",
)
@option(
    "Quantization",
    "--method",
    type=click.Choice(["rtn", "awq", "gptq", "awq+gptq"]),
    help="How INT4 layers are rounded; default awq+gptq, which loses least. rtn takes a minute and "
    "needs no calibration, but loses most.",
)
@option(
    "Quantization",
    "--best",
    is_flag=True,
    help="INT4 that loses least: as by default, but calibrated with all of the text, which takes "
    "about three times as long.",
)
@option(
    "Quantization",
    "--fast",
    is_flag=True,
    help="A bundle within minutes: INT4 rounded to nearest, nothing calibrated, nothing measured. "
    "At 1.5B it loses twice what calibrated INT4 does, about as much as llama.cpp's Q4_0.",
)
@option(
    "Quantization",
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help='Text, or JSONL of {"text": ...} or {"messages": [...]}; default: a built-in text, for '
    "GPTQ and W8A8 one with Chinese and more code.",
)
@option(
    "Expert",
    "--calibration-tokens",
    type=int,
    help="Most tokens to calibrate with; default all of the built-in text, 20480 of another, and "
    "4096 for the KV cache.",
)
@option("Expert", "--seed", type=int, help="Seed of the calibration documents' order; default 0.")
@option(
    "Quantization",
    "--workers",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Layers to round side by side, to the same bytes: faster with many cores; each one more "
    "takes memory. Not with GPTQ, which rounds a layer for what the ones before it lost.",
)
@option(
    "Expert",
    "--rotate/--no-rotate",
    default=None,
    help="Spread outliers by rotating the hidden states, exact in float, at no cost in a step. "
    "Default: only for int8 and int8-w8a8, and not for models that embed or with --eagle3.",
)
@option(
    "Quantization",
    "--recipe",
    type=click.Path(path_type=Path),
    metavar="FILE",
    is_eager=True,
    expose_value=False,
    callback=_recipe,
    help="TOML or JSON with these options; one given here wins over the file's.",
)
@option(
    "Expert",
    "--embeddings",
    type=click.Choice(["fp16", "int8"]),
    default="fp16",
    show_default=True,
    help="Rows of the token table; int8, one scale per row, halves its file.",
)
@option(
    "Memory",
    "--kv-cache",
    type=click.Choice(["float", "int8"]),
    default="float",
    show_default=True,
    help="Rows of the KV cache; int8 halves them in an engine and quarters them on the CPU, with "
    "scales that a calibration finds. Layers that would lose too much stay in float.",
)
@option(
    "Quantization",
    "--vision-quant",
    type=click.Choice(["fp16", "int8"]),
    help="Weights of the vision encoder of a model that reads pictures; int8 halves its file, and "
    "quarters what it takes on the CPU. Default: fp16, or bf16 with --dtype bf16.",
)
@option(
    "Source",
    "--lora",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Merge this LoRA adapter (peft's layout, safetensors) into the weights first.",
)
@option(
    "Source",
    "--adapters",
    type=int,
    metavar="RANK",
    help="Take LoRA adapters of up to this rank (1 to 128) at run time, several in one batch. "
    "Default: none.",
)
@option(
    "Expert",
    "--eagle3",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Put this EAGLE-3 head (config.json and model.safetensors as published) into the bundle; "
    "run and serve draft with it by --draft eagle3.",
)
@option(
    "Expert",
    "--vocab-keep",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Leave out all tokens except those of this text (or JSONL, as for --calibration), or of "
    "this JSON list of token ids. Single bytes, control tokens and the chat template's stay.",
)
@option(
    "Expert",
    "--vocab-size",
    type=int,
    help="Tokens to keep, a multiple of 64: the most frequent of the text of --vocab-keep, then "
    "the first of the vocabulary. Default: all of the text.",
)
@option(
    "Graph",
    "--target",
    type=click.Choice([*TARGETS, "here"]),
    callback=_target,
    help="Device that the bundle is for: chooses the dialect and the type of scales, and writes no"
    " bundle that its TensorRT does not take (JetPack 6: 10.3, JetPack 7: 10.16, trt11: 11.1 "
    "and 11.4); here is this machine's JetPack, if any. Default: no particular device.",
)
@option(
    "Expert",
    "--dialect",
    type=click.Choice(["native", "portable"]),
    help="native: TensorRT >= 10.15 (JetPack 7.2). portable: TensorRT >= 10.3 (JetPack 6). "
    "Default: that of --target, else native.",
)
@option(
    "Expert",
    "--dtype",
    type=click.Choice(["fp16", "bf16"]),
    help="Float type of the engine's graph; default fp16.",
)
@option(
    "Memory",
    "--kv-capacity",
    type=int,
    help="Tokens of prompt and answer; default 4096, or 8192 for a model that reasons (its chat "
    "template knows </think>).",
)
@option(
    "Source",
    "--task",
    type=click.Choice(["generate", "embed", "rerank"]),
    help="What the bundle is for. rerank judges documents as Qwen3-Reranker does. Default: embed "
    "for a directory of sentence-transformers (modules.json), else generate.",
)
@option("Source", "--revision", help="Branch, tag or commit of a hub id.")
@option(
    "Source", "--cache-dir", type=click.Path(path_type=Path), help="Download cache for a hub id."
)
@option(
    "Source",
    "--hub",
    type=click.Choice(["huggingface", "modelscope"]),
    help="Hub to download a hub id from. Default: EDGE_LLM_HUB, else the Hugging Face hub; "
    "HF_ENDPOINT sets a mirror of it.",
)
@option("Output", "--force", "overwrite", is_flag=True, help="Replace an existing bundle.")
@option(
    "Thresholds",
    "--verify/--no-verify",
    default=None,
    help="Measure the bundle against the float model on 4096 tokens before it is put in place, as "
    "edge-llm eval does; if a threshold is missed, write no bundle and exit with code 3. "
    "--no-verify measures nothing. Default: measure on 512 tokens and refuse nothing.",
)
@option(
    "Thresholds",
    "--gate",
    metavar="NAME|FILE",
    help="Thresholds of --verify, as for edge-llm eval. Default: recipe.",
)
@option(
    "Output",
    "--dry-run",
    is_flag=True,
    help="Only print what it would take: the download, the disk, the minutes. For a hub id only "
    "the small files are fetched.",
)
@option("Output", "--json", "as_json", is_flag=True, help="Print one JSON line at the end.")
@click.pass_context
def export(
    ctx: click.Context,
    /,
    as_json: bool,
    verify: bool | None,
    dry_run: bool,
    fast: bool,
    best: bool,
    **options: Any,
) -> None:
    """Turn SOURCE into a bundle.

    SOURCE is a Hugging Face directory, a hub id such as
    deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B, a name that pull takes, or a GGUF file.
    """
    try:
        from .pipeline import VERIFY_STEP, ExportConfig, export_checkpoint, forecast_checkpoint
        from .recipes import RECIPES, RecipeName
        from .verify import better_recipe
    except ImportError as error:
        if isinstance(error, DependencyError):
            raise
        raise DependencyError(
            f"exporting needs the package {error.name}; install it with: "
            f"{install_command('export')}"
        ) from error
    from edge.cli import echo_json
    from edge_lab.cli.progress import show_progress
    from edge_lab.measure.evaluate import gate_of_recipe, load_gate, missed_thresholds

    if fast and best:
        raise ConfigError("--fast contradicts --best; leave one of the two out")
    name: RecipeName = "fast" if fast else "best" if best else "default"
    named = RECIPES[name]
    report = verify is None and named.measures
    config = ExportConfig(**options, named=name, verify=bool(verify), report=report)
    if dry_run:
        with show_progress([]) as progress:
            found = forecast_checkpoint(config, progress)
        if as_json:
            echo_json(found.as_dict())
        else:
            click.echo("\n".join(found.lines()))
        return
    try:
        with show_progress([VERIFY_STEP]) as progress:
            manifest = export_checkpoint(config, progress, lambda line: click.echo(line, err=True))
    except GateError as error:
        click.echo(f"edge-llm: {error}", err=True)
        ctx.exit(EXIT_GATE_MISSED)
    num_bytes = sum(file.num_bytes for file in manifest.files.values())
    text = (manifest.quality or {}).get("text")
    missed = (
        []
        if text is None
        else list(
            missed_thresholds(load_gate(config.gate or "recipe", manifest.quantization.name), text)
        )
    )
    if as_json:
        echo_json(
            {
                "bundle": str(config.output),
                "name": manifest.name,
                "quantization": manifest.quantization.name,
                "num_bytes": num_bytes,
                "source": manifest.source.location,
                "revision": manifest.source.revision,
                "source_quantization": describe_from_source(manifest),
                "sampling_assumed": manifest.sampling.assumed,
                "dialect": manifest.dialect,
                "tensorrt": manifest.tensorrt,
                "kv_cache": describe_kv_cache(manifest),
                "quality": None if text is None else _figures(text),
                "missed": missed,
            }
        )
        return
    click.echo(
        f"{config.output}: {manifest.name}, {manifest.quantization.name}, {num_bytes / 1e6:,.0f} MB"
    )
    click.echo(f"TensorRT: {describe_tensorrt(manifest)}")
    for target in _other_targets(config.target, manifest.tensorrt):
        click.echo(
            f"not for JetPack {target[-1]}: export again with --target {target} and another -o"
        )
    if manifest.kv_cache is not None:
        click.echo(f"KV cache: {describe_kv_cache(manifest)}")
    if (pictures := describe_vision(manifest)) is not None:
        click.echo(f"pictures: {pictures}")
    if (from_source := describe_from_source(manifest)) is not None:
        click.echo(f"the source is quantized: {from_source}")
    if manifest.vocabulary is not None:
        click.echo(_vocabulary(manifest.vocabulary))
    if manifest.sampling.assumed is not None:
        click.echo(f"the source states no sampling: {describe_sampling(manifest.sampling)}")
    if text is not None:
        alone = text.get("bundle_alone")
        verdict = "verified" if config.verify else "measured"
        click.echo(f"{verdict}{' as the CPU serves it' if alone else ''}: {_loss(text)}")
        if alone:
            click.echo(f"  with float activations, as a TensorRT engine has them: {_loss(alone)}")
        if missed:
            kind = gate_of_recipe(manifest.quantization.name)
            click.echo(
                f"warning: it misses the gate {kind}, which is meant for "
                f"models of 1.5B and more: {'; '.join(missed)}",
                err=True,
            )
    schemes = {name: info.scheme for name, info in manifest.quantization.linears.items()}
    resolved = config.resolved(config.source, is_quantized=manifest.source.quantization is not None)
    if named.loss and text is None and resolved.quant == "int4":
        click.echo(f"{named.loss}; without --fast it is calibrated, see docs/quantization.md")
    elif (better := better_recipe(resolved, schemes, missed=bool(missed))) is not None:
        click.echo(f"{better} would lose less; docs/quantization.md has the figures")
    verb = {"embed": "embed", "rerank": "serve"}.get(manifest.model.task, "run")
    words = "" if verb == "serve" else " 'Why is the sky blue?'"
    click.echo(f"Try it: edge-llm {verb} {config.output}{words}")


def _figures(text: dict[str, Any]) -> dict[str, Any]:
    """Return what ``--json`` says of a measurement: as served, and of the bundle alone."""
    figures = {name: text[name] for name in _FIGURES}
    if alone := text.get("bundle_alone"):
        figures["bundle_alone"] = {name: alone[name] for name in _FIGURES if name in alone}
    return figures


def _loss(figures: dict[str, Any]) -> str:
    return (
        f"KL {figures['kl_mean']:.4f}, top-1 {figures['top1_agreement']:.1%}, perplexity "
        f"{figures['perplexity']:.2f} ({figures['perplexity_reference']:.2f} in float, "
        f"x{figures['perplexity_ratio']:.3f})"
    )


def _other_targets(target: str | None, versions: Collection[str] | None) -> list[str]:
    """List the targets of a JetPack whose TensorRT does not take the graph.

    Args:
        target: value of ``--target``; with None the bundle is for no JetPack in particular.
        versions: TensorRT versions that take the graph; None if that was not checked.
    """
    if versions is None or (target is not None and not target.startswith("jetpack")):
        return []
    return [
        name
        for name, each in TARGETS.items()
        if name.startswith("jetpack") and not {*each.versions} <= {*versions}
    ]


def _vocabulary(reduced: ReducedVocabulary) -> str:
    line = f"vocabulary: {reduced.size:,} of {reduced.original_size:,} tokens"
    if reduced.text_tokens is None:
        return line
    return (
        f"{line}; {reduced.file} takes {reduced.text_tokens:,} of them, "
        f"{reduced.text_tokens_original:,} before"
    )
