"""``edge-llm list`` and ``rm``: the bundles of this machine, by name."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from edge.bundle.engine_file import find_engines
from edge.bundle.library import CATALOGUE, bundle_directories, catalogue_line, roots
from edge.bundle.manifest import MANIFEST_NAME, read_manifest
from edge.cli import echo_json
from edge.cli.options import BundlePath, json_option
from edge.errors import BundleError, ConfigError, EdgeError


@click.command("list")
@json_option
def list_bundles(as_json: bool) -> None:
    """List the bundles of this machine, and the models that pull knows.

    Bundles are looked for in bundles/ and in edge-llm/bundles of the user's data directory, or
    where EDGE_LLM_BUNDLES points.
    """
    found = [_describe(directory) for directory in bundle_directories()]
    if as_json:
        echo_json({"roots": list(map(str, roots())), "bundles": found, "catalogue": CATALOGUE})
        return
    if not found:
        click.echo(f"no bundle in {' or '.join(map(str, roots()))}")
    width = max((len(bundle["name"]) for bundle in found), default=0)
    for bundle in found:
        click.echo(f"{bundle['name']:{width}}  {_line(bundle)}")
    click.echo(f"to get one: edge-llm pull NAME, of {catalogue_line()}", err=True)


def _describe(directory: Path) -> dict[str, Any]:
    about: dict[str, Any] = {"name": directory.name, "path": str(directory)}
    try:
        manifest = read_manifest(directory)
    except EdgeError as error:
        return {**about, "error": str(error)}
    return {
        **about,
        "model": manifest.name,
        "quantization": manifest.quantization.name,
        "dialect": manifest.dialect,
        "num_bytes": sum(file.num_bytes for file in manifest.files.values()),
        "kv_capacity": manifest.kv_capacity,
        "engines": [engine.name for engine in find_engines(directory)],
    }


def _line(bundle: dict[str, Any]) -> str:
    if "error" in bundle:
        return f"damaged: {bundle['error']}"
    engines = ", ".join(bundle["engines"]) or "no engine"
    return (
        f"{bundle['quantization']:10}  {bundle['num_bytes'] / 1e6:6,.0f} MB  "
        f"{bundle['dialect']:8}  {engines}  ({bundle['path']})"
    )


@click.command("rm")
@click.argument("bundle", type=BundlePath())
@click.option("--yes", is_flag=True, help="Do not ask.")
def remove(bundle: Path, yes: bool) -> None:
    """Remove BUNDLE with its engines and adapters from this machine."""
    if not (bundle / MANIFEST_NAME).is_file():
        raise BundleError(
            f"{bundle} has no {MANIFEST_NAME}, so it is no bundle; nothing was removed"
        )
    if bundle.is_symlink():
        raise BundleError(
            f"{bundle} is a link to {bundle.resolve()}; remove the link with rm, or name the bundle"
        )
    from edge.adapters.library import library

    adapters = library(bundle)
    found = [path for each in (bundle, adapters) for path in each.rglob("*")]
    num_bytes = sum(path.lstat().st_size for path in found)
    what = f"{bundle} and {adapters}" if os.path.lexists(adapters) else f"{bundle}"
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError(f"removing {what} needs --yes where standard input is no terminal")
        if not click.confirm(f"remove {what} ({num_bytes / 1e6:,.0f} MB)?", err=True):
            click.echo("nothing was removed", err=True)
            return
    # Under its name there is all of the bundle or nothing, however this ends.
    doomed = bundle.resolve().with_name(f".{bundle.resolve().name}.removed")
    try:
        if doomed.exists():
            shutil.rmtree(doomed)
        bundle.rename(doomed)
        if os.path.lexists(adapters):
            adapters.rename(doomed / adapters.name)
        shutil.rmtree(doomed)
    except OSError as error:
        left = f"; what is left of it is in {doomed}" if doomed.exists() else ""
        raise ConfigError(
            f"cannot remove {what}: {error.strerror} ({error.filename}){left}; remove it as a "
            "user who may"
        ) from error
    click.echo(f"removed {what}, {num_bytes / 1e6:,.0f} MB")
