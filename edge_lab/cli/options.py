"""Options that verbs of measuring, building and shipping share."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from edge.bundle.minisign import MAX_BYTES
from edge.cli.sections import option
from edge.errors import ConfigError
from edge_make.text_file import read_text_file


class Finite(click.FloatRange):
    """A float in a range. ``nan``, which click lets into every range, is in none."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Read the number, or end with a usage error."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


build_option = option(
    "Engine",
    "--build/--no-build",
    default=None,
    help="Build the engine. Default: where TensorRT runs.",
)


def given_flag(*names: str) -> str | None:
    """Return the flag of the first of these parameters that was given; None if none was."""
    context = click.get_current_context()
    for parameter in context.command.params:
        name = parameter.name or ""
        if name in names and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            return parameter.opts[0]
    return None


def check_writable(path: Path | None, option: str) -> None:
    """Refuse a file that cannot be written, before the hours that its content takes.

    Raises:
        ConfigError: the file does not exist and neither does its directory, or is not writable.
    """
    if path is None or os.access(path, os.W_OK):
        return
    directory = path.absolute().parent
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{option} {path} cannot be written: {directory} is no directory that this user may "
            "write to; name another, or make it first"
        )


def ask_password(file: Path | None, confirm: bool = False) -> str:
    """Read the password of a secret key from a file, or ask for it.

    Raises:
        ConfigError: the file cannot be read, or there is no terminal on which to ask.
    """
    if file is None:
        try:
            text: str = click.prompt(
                "password of the secret key", hide_input=True, confirmation_prompt=confirm, err=True
            )
        except click.Abort as error:
            if sys.stdin.isatty() or not isinstance(error.__context__, EOFError):
                raise
            raise ConfigError(
                "there is no terminal on which to ask for the password of the secret key; give it "
                "by --password-file"
            ) from None
        return text
    try:
        return read_text_file(file, MAX_BYTES).removesuffix("\n")
    except OSError as error:
        raise ConfigError(f"cannot read the password of {file}: {error}") from error
