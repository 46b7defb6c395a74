"""``edge-llm pull``: download a model, export it, and build its engine."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import click

from edge.bundle.library import REVISIONS, bundle_name, hub_id, nearest_model, roots
from edge.bundle.manifest import MANIFEST_NAME, read_manifest
from edge.cli.options import build_option
from edge.errors import ConfigError, EdgeError
from edge_lab.place import check_replaceable
from edge_lab.telemetry import read_target


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("model")
@click.option("--quant", help="As for edge-llm export.")
@build_option
@click.option("--force", is_flag=True, help="Make it anew if it is there.")
@click.option(
    "--revision",
    help="Branch, tag or commit. Default: of a short name on the Hugging Face hub the commit that "
    "comes with edge-llm, else the newest of the default branch.",
)
@click.option(
    "--hub",
    type=click.Choice(["huggingface", "modelscope"]),
    help="Where to download from. Default: EDGE_LLM_HUB, else the Hugging Face hub.",
)
@click.argument("export_options", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def pull(
    ctx: click.Context,
    model: str,
    quant: str | None,
    build: bool | None,
    force: bool,
    revision: str | None,
    hub: str | None,
    export_options: tuple[str, ...],
) -> None:
    """Get MODEL: download it, export it, and build its engine where TensorRT runs.

    MODEL is deepseek-r1:1.5b, :7b, :8b (the Llama distill) or :8b-0528 (the Qwen3 distill), also
    as 1.5b or r1-qwen-7b, or a hub id. What follows is for edge-llm export, for example --method
    rtn or --kv-capacity 8192. HF_ENDPOINT sets a mirror of the Hugging Face hub.
    """
    source = hub_id(model) or model
    if "/" not in source:
        raise ConfigError(
            f"{model!r} is neither a hub id (owner/name) nor the name of a model; "
            f"{nearest_model(model)}"
        )
    if any(option.startswith(("-o", "--output")) for option in export_options):
        raise ConfigError(
            "pull names the bundle itself, so that every verb finds it; give --output to edge-llm "
            "export, or another directory of bundles in EDGE_LLM_BUNDLES"
        )
    quantization = _options({"--quant": quant})
    given = [*_options({"--revision": revision, "--hub": hub}), *export_options]
    bundle = _bundle(ctx, source, [*quantization, *given])
    if (bundle / MANIFEST_NAME).is_file() and not force:
        # The same command again goes on to a build that was cut off.
        found = f"{bundle} is there already"
        if given:
            found = f"{bundle} is there already, so {given[0]} has no effect"
        click.echo(f"{found}; --force makes it anew", err=True)
    else:
        try:
            bundle.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cannot make {bundle.parent}: {error.strerror}; go to another directory, or name "
                "one of bundles in EDGE_LLM_BUNDLES"
            ) from error
        machine = read_target()
        is_chosen = machine is None or "--target" in export_options
        target = () if is_chosen else ("--target", machine)
        is_pinned = source != model and "/" not in model and revision is None
        if is_pinned and (hub or os.environ.get("EDGE_LLM_HUB") or "huggingface") == "huggingface":
            revision = REVISIONS[source]
        where = _options({"--revision": revision, "--hub": hub})
        options = (*quantization, *target, *where, *export_options)
        options = (*options, *(["--force"] if force else []))
        _run(ctx, "export", source, "-o", str(bundle), *options)
        # Of a first bundle only the export has seen whether the source is quantized already.
        name = bundle_name(source, read_manifest(bundle).quantization.name)
        if name != bundle.name:
            check_replaceable(bundle.with_name(name), overwrite=False)
            bundle = bundle.rename(bundle.with_name(name))
            click.echo(f"moved to {bundle}, which says how it is quantized", err=True)
    if build is None:
        from edge_lab.doctor.machine import Machine

        build = Machine().tensorrt().error is None
    if build:
        _run(ctx, "build", str(bundle))
    click.echo(f"Try it: edge-llm run {bundle.name} 'Why is the sky blue?'")


def _options(given: dict[str, str | None]) -> list[str]:
    """What is given of these options of the export, as it is typed."""
    return [text for name, value in given.items() if value for text in (name, value)]


def _bundle(ctx: click.Context, source: str, options: list[str]) -> Path:
    """Where the export with these options belongs; see `export.config.ExportConfig.quant`.

    Raises:
        click.UsageError, ConfigError: the export does not know an option, or its value.
    """
    export = _verb(ctx, "export").make_context("edge-llm export", [source, "-o", "x", *options])
    quant = export.params["quant"]
    kept, rounded = (roots()[0] / bundle_name(source, name) for name in ("source", "int4"))
    if quant is None and ((kept / MANIFEST_NAME).is_file() or _was_quantized(rounded)):
        return kept
    return roots()[0] / bundle_name(source, quant or "int4")


def _was_quantized(bundle: Path) -> bool:
    """Whether there is a bundle here, and its source was quantized already."""
    try:
        return read_manifest(bundle).source.quantization is not None
    except EdgeError:
        return False


def _run(ctx: click.Context, verb: str, *arguments: str) -> None:
    """Run another verb as if it had been typed, and say what was typed."""
    click.echo(f"$ edge-llm {verb} {shlex.join(arguments)}", err=True)
    command = _verb(ctx, verb)
    code = command.main(list(arguments), f"edge-llm {verb}", standalone_mode=False)
    if isinstance(code, int) and code:
        ctx.exit(code)


def _verb(ctx: click.Context, name: str) -> click.Command:
    group = ctx.find_root().command
    assert isinstance(group, click.Group)
    command = group.get_command(ctx, name)
    assert command is not None, name
    return command
