"""Gives verbs that read the service's settings ``--config``, and errors for keys without a flag."""

from __future__ import annotations

from pathlib import Path

import click

from edge.cli.sections import SectionCommand, option
from edge_serve.config_file import DEFAULT_FILE, ENV_PREFIX
from edge_serve.settings import keys_without_option

config_option = option(
    "Models",
    "--config",
    "config_file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help=f"TOML file of settings; flags and {ENV_PREFIX}* override it. "
    f"Default: {DEFAULT_FILE} where it exists.",
)


class SettingsCommand(SectionCommand):
    """A verb that names the key of a setting that has no flag."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse a flag for such a setting, and name its key."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            name = error.option_name
            key = name.removeprefix("--").removeprefix("no-").replace("-", "_")
            if key not in keys_without_option():
                raise
            raise click.UsageError(
                f"{name} is no option any more; write {key} in the file of --config, or set "
                f"{ENV_PREFIX}{key.upper()}",
                ctx,
            ) from None


def default_config() -> Path | None:
    """Find `DEFAULT_FILE`; None if it does not exist."""
    return DEFAULT_FILE if DEFAULT_FILE.is_file() else None
