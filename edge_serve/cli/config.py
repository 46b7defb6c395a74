"""``edge-llm config``: what the service would run with, and why."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
import msgspec

from edge.cli import echo_json
from edge.cli.options import json_option
from edge.cli.sections import option
from edge.cli.settings_options import settings_options
from edge.errors import ConfigError
from edge_serve.cli.config_option import SettingsCommand, config_option, default_config
from edge_serve.config_file import load_settings
from edge_serve.settings import ServerSettings


@click.group()
def config() -> None:
    """Settings of the service."""


@config.command(cls=SettingsCommand, short_help="Print the settings of edge-llm serve.")
@config_option
@option("Output", "--origin", is_flag=True, help="Also print where each value comes from.")
@json_option
@settings_options(ServerSettings)
def show(config_file: Path | None, origin: bool, as_json: bool, **flags: Any) -> None:
    """Print the settings of edge-llm serve as TOML: file, environment and flags put together.

    Takes the flags of serve. Exits with code 64 if serve would refuse to start with them, after
    printing those that can be read.
    """
    from edge_serve.inputs import read_inputs

    resolved = load_settings(
        ServerSettings, file=config_file or default_config(), environ=os.environ, flags=flags
    )
    values = msgspec.to_builtins(resolved.settings, enc_hook=str)
    if as_json:
        echo_json({"settings": values, "origin": resolved.origins} if origin else values)
    else:
        _show_toml(values, resolved.origins if origin else {})
    read_inputs(resolved.settings)


@config.command(cls=SettingsCommand, short_help="Print limits of memory and tasks for systemd.")
@config_option
@settings_options(ServerSettings)
def unit(config_file: Path | None, **flags: Any) -> None:
    """Print a drop-in for systemd: limits of memory and tasks, planned for the bundles.

    Takes the flags of serve. scripts/install-service writes it for each service.
    """
    from edge_serve.models.limits import unit_limits

    settings = load_settings(
        ServerSettings, file=config_file or default_config(), environ=os.environ, flags=flags
    ).settings
    if not settings.model:
        raise ConfigError("there is no bundle to plan for; name one with --model BUNDLE")
    limits = unit_limits(settings)
    click.echo("# Made by edge-llm config unit, from the settings and the bundles that they name.")
    click.echo("[Service]")
    click.echo(f"MemoryHigh={limits.memory_high_bytes}")
    click.echo(f"MemoryMax={limits.memory_max_bytes}")
    click.echo(f"TasksMax={limits.tasks_max}")


def _show_toml(values: dict[str, Any], origins: dict[str, str]) -> None:
    width = max(map(len, values))
    for name, value in values.items():
        # TOML has no null, so settings without a value are comments.
        line = f"# {name} is not set" if value is None else f"{name:{width}} = {_toml(value)}"
        click.echo(f"{line:60}  # {origins[name]}" if origins else line)


def _toml(value: Any) -> str:
    """Write a value as TOML does."""
    if isinstance(value, dict):
        pairs = ", ".join(f"{_toml(key)} = {_toml(item)}" for key, item in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    return msgspec.json.encode(value).decode()
