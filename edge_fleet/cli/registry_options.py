"""Defines the options of verbs that talk to a registry."""

from __future__ import annotations

from typing import Any

import click

from edge.cli.options import FILE
from edge.cli.sections import option
from edge_fleet.registry.reference import Reference, parse_reference

plain_http_option = option(
    "Source",
    "--plain-http/--tls",
    default=None,
    help="Speak HTTP without TLS. Default: with a registry on this very machine only.",
)
allow_older_option = option(
    "Source",
    "--allow-older",
    is_flag=True,
    help="Also take a release that has expired, or that is older than the one that was here.",
)
trusted_keys_option = option(
    "Source",
    "--trusted-keys",
    type=FILE,
    help="File of minisign public keys. Default: what EDGE_LLM_TRUSTED_KEYS names, or "
    "/etc/edge-llm/trusted-keys where it exists; without any, signatures are not asked for.",
)


class ReferenceType(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """A reference to a registry."""

    name = "reference"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Reference:
        """Parse the reference, or end with an error that shows how to write one."""
        return value if isinstance(value, Reference) else parse_reference(str(value))


reference_argument = click.argument("reference", type=ReferenceType())
