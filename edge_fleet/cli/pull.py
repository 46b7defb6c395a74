"""``edge-llm pull``: download a model, export it, and build its engine."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import click
from click.core import ParameterSource

from edge.bundle.library import CATALOGUE, hub_address, roots
from edge.bundle.manifest import MANIFEST_NAME, read_manifest
from edge.bundle.model_names import bundle_name, hub_id, nearest_model
from edge.bundle.trust import trusted_keys_file
from edge.errors import ConfigError, EdgeError, RegistryError
from edge_fleet.registry.names import (
    REGISTRY_VARIABLE,
    TENSORRT,
    TeamRegistry,
    suffixes,
    takes,
    team_registry,
)
from edge_lab.cli.options import build_option
from edge_lab.cli.progress import show_progress
from edge_lab.telemetry import read_target
from edge_make.atomic_swap import check_replaceable, human
from edge_make.other_models import named_otherwise
from edge_make.published import PUBLISHED, REVISIONS


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("model")
@click.option("--quant", help="As for edge-llm export.")
@build_option
@click.option("--force", is_flag=True, help="Make it again if it is there.")
@click.option(
    "--revision",
    help="Branch, tag or commit. Default: of some R1 distills, by their short names on the Hugging "
    "Face hub, the commit that comes with edge-llm, else the newest of the default branch.",
)
@click.option(
    "--hub",
    type=click.Choice(["huggingface", "modelscope"]),
    help="Where to download from. Default: EDGE_LLM_HUB, else the Hugging Face hub.",
)
@click.option(
    "--fast",
    is_flag=True,
    help="As for edge-llm export: a bundle within minutes of the download, with more loss.",
)
@click.option(
    "--from",
    "origin",
    type=click.Choice(["hub", "registry"]),
    help="Export a model of the hub, or take only a bundle of the registry. Default: the registry "
    "of EDGE_LLM_REGISTRY first, then the hub.",
)
@click.option(
    "--dry-run", is_flag=True, help="Only say what is downloaded, and what disk and time it takes."
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
    fast: bool,
    origin: str | None,
    dry_run: bool,
    export_options: tuple[str, ...],
) -> None:
    """Get MODEL: download it, export it, and build its engine where TensorRT runs.

    MODEL is a short name, such as deepseek-r1:1.5b (also 1.5b), qwen3:4b or llama3.2, which
    edge-llm list shows, or a hub id. deepseek-r1:8b is the Llama distill. An address of the
    Hugging Face hub may name a GGUF file by its quantization: hf.co/owner/name:Q8_0. What follows
    is for edge-llm export, for example --method rtn or --kv-capacity 8192. HF_ENDPOINT sets a
    mirror of the hub.

    Of a short name, --quant source takes a checkpoint that others have quantized: a smaller
    download, and no calibration. If EDGE_LLM_REGISTRY names a registry, a bundle of it is fetched
    as it is, signed where this machine trusts keys.
    """
    source = hub_id(model) or hub_address(model) or model
    if "/" not in source:
        raise ConfigError(
            f"{model!r} is neither a hub id (owner/name) nor the name of a model; "
            f"{named_otherwise(model) or nearest_model(model)}"
        )
    if any(option.startswith(("-o", "--output")) for option in export_options):
        raise ConfigError(
            "pull names the bundle itself, so that every verb finds it; give --output to edge-llm "
            "export, or another directory of bundles in EDGE_LLM_BUNDLES"
        )
    is_short = source != model and "/" not in model
    if is_short and quant is not None and quant.lower() == "source":
        source = PUBLISHED.get(source, source)
    quantization = _options({"--quant": quant})
    given = [*_options({"--revision": revision, "--hub": hub}), *export_options]
    asked = _asked(ctx, source, [*quantization, *given, *(["--fast"] if fast else [])])
    bundle = _bundle(asked, source)
    if (bundle / MANIFEST_NAME).is_file() and not force:
        # The same command again continues with a build that was cut off.
        found = f"{bundle} is there already"
        if given:
            found = f"{bundle} is there already, so {given[0]} has no effect"
        elif not fast and quant is None and _method(bundle) == "rtn":
            found += ", rounded to nearest as by --fast"
        click.echo(f"{found}; --force makes it anew", err=True)
        if dry_run:
            return
    else:
        if not dry_run:
            _make_room(bundle.parent)
        machine = read_target()
        team = None if origin == "hub" else team_registry()
        if origin == "registry" and team is None:
            raise ConfigError(f"--from registry: {REGISTRY_VARIABLE} names none; set it")
        if team is not None and (only := _of_exports(asked, origin)):
            if origin == "registry":
                raise ConfigError(f"--from registry exports nothing, so {only} has no effect")
            click.echo(f"{only} is for an export, so {team.place} is not asked", err=True)
            team = None
        wanted = _quantizations(asked, source, bundle), asked.params["target"] or machine
        fetched = None if team is None else _fetch(team, source, *wanted, origin, force, dry_run)
        if fetched is None:
            is_chosen = machine is None or "--target" in export_options
            flags = {"--force": force, "--fast": fast, "--dry-run": dry_run}
            is_pinned = is_short and revision is None and source in REVISIONS
            hub_name = hub or os.environ.get("EDGE_LLM_HUB") or "huggingface"
            if is_pinned and hub_name == "huggingface":
                revision = REVISIONS[source]
            options = (
                *quantization,
                *(() if is_chosen else ("--target", machine)),
                *_options({"--revision": revision, "--hub": hub}),
                *export_options,
                *(flag for flag, is_given in flags.items() if is_given),
            )
            quick = not (quant or fast or export_options)
            hint = f"edge-llm pull {model} --fast"
            if is_short and quick and source in PUBLISHED:
                hint += f", or --quant source, which takes {PUBLISHED[source]}"
            notes = [f"sooner, but it loses more: {hint}"] if quick else []
            if build or (build is None and machine is not None):
                engines = "the engine is built" if fast or machine is None else "engines are built"
                notes.append(f"{engines} afterwards; nobody has timed that on an Orin yet")
            if trusted_keys_file(None) is not None:
                notes.append(
                    "this machine trusts keys: nothing here builds or runs the bundle until it is "
                    "signed by one of them (edge-llm bundle sign)"
                )
            _run(ctx, "export", source, "-o", str(bundle), *options, notes=notes)
            if dry_run:
                return
            bundle = _named_for(bundle, source)
        elif dry_run:
            return
        else:
            bundle = fetched
    if build is None:
        from edge_lab.doctor.machine import Machine

        build = Machine().tensorrt().error is None
    if build:
        # A Jetson builds two engines by default; --fast builds one.
        own = ("--kernels", "own") if fast and _takes_own_kernels(bundle) else ()
        _run(ctx, "build", str(bundle), *own)
    click.echo(f"Try it: edge-llm run {bundle.name} 'Why is the sky blue?'")


def _takes_own_kernels(bundle: Path) -> bool:
    """Whether a Jetson builds this bundle with own kernels: FP16, and some low-bit weights."""
    manifest = read_manifest(bundle)
    kinds = {linear.scheme.kind for linear in manifest.quantization.linears.values()}
    return manifest.dtype == "fp16" and bool(kinds & {"int4", "int8"}) and read_target() is not None


def _make_room(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot make {directory}: {error.strerror}; go to another directory, or name one of "
            "bundles in EDGE_LLM_BUNDLES"
        ) from error


def _named_for(bundle: Path, source: str) -> Path:
    """Rename a bundle whose source turned out to be quantized; only the export has seen that."""
    name = bundle_name(source, read_manifest(bundle).quantization.name)
    if name == bundle.name:
        return bundle
    check_replaceable(bundle.with_name(name), overwrite=False)
    bundle = bundle.rename(bundle.with_name(name))
    click.echo(f"moved to {bundle}, which says how it is quantized", err=True)
    return bundle


def _fetch(
    team: TeamRegistry,
    source: str,
    quantizations: Sequence[str],
    machine: str | None,
    origin: str | None,
    force: bool,
    dry_run: bool,
) -> Path | None:
    """Fetch a bundle from the team's registry; None if it has none, and the hub is next.

    Raises:
        BundleError, IntegrityError: the bundle there is not signed as this machine demands, is
            damaged, or is an older release.
        ConfigError: the registry refuses the credentials, or ``origin`` allows nothing else.
    """
    from edge_fleet.registry.client import DeniedError, NotThereError, Registry
    from edge_fleet.registry.pull import look
    from edge_fleet.registry.pull import pull as fetch
    from edge_fleet.registry.release import check_release, release_at

    why: list[str] = []
    missing: list[str] = []
    for quantization, suffix in product(quantizations, suffixes(machine)):
        reference = team.reference(source, quantization, suffix)
        with Registry(reference, plain_http=team.plain_http) as registry:
            try:
                offer = look(reference, registry)
            except NotThereError:
                missing.append(str(reference).removeprefix(f"{team.place}/"))
                continue
            except DeniedError as error:
                raise ConfigError(
                    f"{error}; --from hub does not ask it, nor does edge-llm without "
                    f"{REGISTRY_VARIABLE}"
                ) from error
            except RegistryError as error:
                why.append(str(error).partition(";")[0])
                break
            if not takes(offer.manifest, machine):
                why.append(f"{reference} is not for {machine}")
                continue
            if offer.manifest.quantization.name != quantization:
                why.append(f"{reference} is in {offer.manifest.quantization.name}")
                continue
            bundle = roots()[0] / bundle_name(source, quantization)
            note = check_release(offer.release, str(reference), release_at(bundle))
            size = sum(info.num_bytes for info in offer.manifest.files.values())
            signed = "" if offer.signer is None else f", signed with {offer.signer}"
            click.echo(
                f"{reference}{signed}: {human(size)} to fetch, less what bundles here share, and "
                f"{human(size)} of disk",
                err=True,
            )
            if note is not None:
                click.echo(note, err=True)
            if not dry_run:
                with show_progress() as progress:
                    done = fetch(offer, registry, bundle, overwrite=force, progress=progress)
                click.echo(f"{done.bundle}: fetched {human(done.fetched_bytes)} ({done.digest})")
            return bundle
    if missing:
        why.insert(0, f"{team.place} has no {', '.join(missing)}")
    if origin == "registry":
        raise ConfigError(f"--from registry: {'; '.join(why)}; push it there, or leave --from out")
    click.echo(f"{'; '.join(why)}: taking it from the hub", err=True)
    return None


def _quantizations(asked: click.Context, source: str, bundle: Path) -> list[str]:
    """List quantizations to ask a registry for, best first; an export would go to ``bundle``."""
    if quant := asked.params["quant"]:
        return [quant]
    if bundle.name.endswith("-source"):
        return ["source"]
    is_float = source in CATALOGUE.values()
    return ["int4"] if is_float else ["source", "int4"]


_OF_ANY_PULL = {"source", "output", "quant", "overwrite", "dry_run"}


def _of_exports(asked: click.Context, origin: str | None) -> str | None:
    """Return the first given option that only an export obeys; None if there is none.

    ``--fast`` is no such option: a registry may have the bundle sooner than a fast export.
    """
    others = _OF_ANY_PULL | (set() if origin == "registry" else {"fast"})
    if asked.params["target"] in (None, *TENSORRT):
        others |= {"target"}
    for parameter in asked.command.params:
        name = parameter.name or ""
        is_given = asked.get_parameter_source(name) not in (None, ParameterSource.DEFAULT)
        if is_given and name not in others:
            return parameter.opts[0]
    return None


def _options(given: dict[str, str | None]) -> list[str]:
    """Write these options of the export as a user would type them."""
    return [text for name, value in given.items() if value for text in (name, value)]


def _asked(ctx: click.Context, source: str, options: list[str]) -> click.Context:
    """Parse these options as the export does.

    Raises:
        click.UsageError, ConfigError: the export does not know an option, or its value.
    """
    return _verb(ctx, "export").make_context("edge-llm export", [source, "-o", "x", *options])


def _bundle(asked: click.Context, source: str) -> Path:
    """Return the directory of such an export (`export.config.ExportConfig.quant`)."""
    quant = asked.params["quant"]
    kept, rounded = (roots()[0] / bundle_name(source, name) for name in ("source", "int4"))
    if quant is None and ((kept / MANIFEST_NAME).is_file() or _was_quantized(rounded)):
        return kept
    return roots()[0] / bundle_name(source, quant or "int4")


def _method(bundle: Path) -> str | None:
    """Return how the INT4 layers of a bundle were rounded; None if it cannot be read."""
    try:
        return read_manifest(bundle).quantization.method
    except EdgeError:
        return None


def _was_quantized(bundle: Path) -> bool:
    """Whether there is a bundle here whose source was already quantized."""
    try:
        return read_manifest(bundle).source.quantization is not None
    except EdgeError:
        return False


def _run(ctx: click.Context, verb: str, *arguments: str, notes: Sequence[str] = ()) -> None:
    """Run another verb as if it had been typed; print the command line, and further notes."""
    click.echo(f"$ edge-llm {verb} {shlex.join(arguments)}", err=True)
    for note in notes:
        click.echo(note, err=True)
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
