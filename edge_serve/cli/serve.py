"""``edge-llm serve``: the OpenAI-compatible HTTP service."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from edge.cli.options import BundlePath, take_only_bundle
from edge.cli.settings_options import settings_options
from edge.errors import ConfigError, DependencyError, install_command
from edge_serve.cli.config_option import SettingsCommand, config_option, default_config
from edge_serve.config_file import load_settings
from edge_serve.settings import ServerSettings


class _Serve(SettingsCommand):
    """Names the option to use for a flag that other servers have."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if error.option_name != "--workers":
                raise
            raise click.UsageError(
                "there is no --workers: one process answers many requests at once with one copy "
                "of the weights; --num-slots says how many",
                ctx,
            ) from None


@click.command(cls=_Serve)
@click.argument("bundle", required=False, type=BundlePath(offers_export=True))
@config_option
@settings_options(ServerSettings)
def serve(bundle: Path | None, config_file: Path | None, **flags: Any) -> int:
    """Serve BUNDLE, or each --model [NAME=]BUNDLE, to OpenAI's clients until SIGTERM.

    BUNDLE is a directory or one of the names of edge-llm list; the only one need not be named. It
    is served under its directory's name, and to requests that name no model. Every option is a key
    of the file of --config, too; limits that few change are keys only: edge-llm config show
    --origin prints them all.
    """

    def serve_one(bundle: Path) -> None:
        name = bundle.resolve().name
        flags["model"] = {name: str(bundle)}
        flags["default_model"] = flags["default_model"] or name

    if bundle is not None:
        if flags["model"]:
            raise ConfigError("give either BUNDLE or --model, not both")
        serve_one(bundle)

    def read() -> ServerSettings:
        file = config_file or default_config()
        return load_settings(ServerSettings, file=file, environ=os.environ, flags=flags).settings

    settings = read()
    if not settings.model:
        serve_one(take_only_bundle())
        settings = read()
    try:
        from edge_serve.observe.logs import configure_logging
        from edge_serve.run import serve as run_service
    except ModuleNotFoundError as error:
        if error.name in ("starlette", "uvicorn", "h11"):
            raise DependencyError(
                f"the service needs {error.name}; run: {install_command('serve')}"
            ) from error
        raise
    configure_logging(settings.log_format, settings.log_level)
    return run_service(settings, reread=read)
