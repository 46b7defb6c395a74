"""``edge-llm key``: make an API key, or the hash of one, for the file that the service reads."""

from __future__ import annotations

import sys

import click

from edge.errors import ConfigError
from edge_make.key_file import hashed_line, make_key

_MAX_CHARS = 4096


@click.command()
@click.argument("name")
@click.option("--stdin", is_flag=True, help="Hash the key on standard input instead of a new one.")
def key(name: str, stdin: bool) -> None:
    """Make an API key called NAME.

    Standard output gets the line for the key file, which holds only the key's hash; standard error
    gets the key, which is shown this once.
    """
    if stdin:
        given = sys.stdin.read(_MAX_CHARS + 1)
        if len(given) > _MAX_CHARS or not given.strip():
            raise ConfigError(
                "standard input has no key of one line; for example: "
                f"edge-llm key {name} --stdin < FILE"
            )
        click.echo(hashed_line(name, given.removesuffix("\n")))
        return
    made = make_key()
    line = hashed_line(name, made)
    click.echo(f"{name}'s key, for its client; it is stored nowhere: {made}", err=True)
    click.echo(line)
