"""The option ``--config``: a file of settings."""

from __future__ import annotations

from pathlib import Path

import click

from edge_serve.config_file import DEFAULT_FILE, ENV_PREFIX

config_option = click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help=f"TOML file of settings; flags and {ENV_PREFIX}* override it. "
    f"Default: {DEFAULT_FILE} where it exists.",
)


def default_config() -> Path | None:
    """Find `DEFAULT_FILE`; None where it does not exist."""
    return DEFAULT_FILE if DEFAULT_FILE.is_file() else None
