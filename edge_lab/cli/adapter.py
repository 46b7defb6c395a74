"""``edge-llm adapter``: the adapters that are kept beside a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edge.cli import echo_json
from edge.cli.options import BundlePath, json_option
from edge.errors import EdgeError


@click.group()
def adapter() -> None:
    """Keep adapters (LoRA) beside a bundle, to choose one per answer.

    The bundle must have been exported with --adapters RANK.
    """


@adapter.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("bundle", type=BundlePath())
@click.option("--name", help="Name by which requests choose it; default: its directory's name.")
def add(path: Path, bundle: Path, name: str | None) -> None:
    """Check an adapter and copy it beside BUNDLE.

    PATH is the directory that peft saved, or the file of its weights.
    """
    from edge.adapters.library import check_name
    from edge.adapters.loaded import Adapters, own_name
    from edge.bundle.manifest import read_manifest
    from edge_make.adapter_library import add_adapter

    name = check_name(own_name(path) if name is None else name)
    weights = Adapters(bundle, read_manifest(bundle)).read(path, name)
    add_adapter(bundle, path, name)
    click.echo(
        f"added {name} (rank {weights.rank}); use it with: edge-llm run --adapter {name} {bundle}"
    )


@adapter.command("list")
@click.argument("bundle", type=BundlePath())
@json_option
def list_adapters(bundle: Path, as_json: bool) -> None:
    """List the adapters of BUNDLE, and say which cannot be used."""
    from edge.adapters.library import stored_adapters
    from edge.adapters.loaded import Adapters
    from edge.adapters.peft_file import adapter_files
    from edge.bundle.manifest import read_manifest

    adapters = Adapters(bundle, read_manifest(bundle))
    found: list[dict[str, Any]] = []
    for name, path in stored_adapters(bundle).items():
        about = {"name": name, "path": str(path)}
        try:
            weights = adapters.read(path, name)
            num_bytes = sum(file.stat().st_size for file in adapter_files(path))
            found.append(
                {**about, "rank": weights.rank, "num_bytes": num_bytes, "sha256": weights.digest}
            )
        except EdgeError as error:
            found.append({**about, "error": str(error)})
    if as_json:
        echo_json({"adapters": found})
        return
    for each in found:
        line = each.get("error") or f"rank {each['rank']:3}  {each['num_bytes'] / 1e6:,.1f} MB"
        click.echo(f"{each['name']:24}  {line}")
    if not found:
        click.echo("no adapter; edge-llm adapter add PATH BUNDLE", err=True)


@adapter.command("rm")
@click.argument("name")
@click.argument("bundle", type=BundlePath())
def remove(name: str, bundle: Path) -> None:
    """Remove an adapter of BUNDLE.

    A server gives no new answers with it, and ends those that run.
    """
    from edge_make.adapter_library import remove_adapter

    remove_adapter(bundle, name)
    click.echo(f"removed {name}")
