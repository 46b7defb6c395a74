"""The command ``edge-llm``; its verbs come from the entry-point group ``edge_llm.commands``.

Here: ``edge-llm run`` and what the verbs of all packages share: options, sections of the help, and
printing. A verb parses, calls the library and prints; the work itself belongs to the library.
Results go to stdout, progress and figures to stderr. An `EdgeError` becomes one line on stderr and
its own exit code (`edge.errors`).
"""

from __future__ import annotations

import codecs
import errno
import io
import json
import os
import platform
import signal
import sys
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

import click

import edge
from edge.errors import EdgeError, ResourceError
from edge.other_names import nearest_name

from .verbs import GROUPS

COMMAND_GROUP = "edge_llm.commands"


class _Verbs(click.Group):
    """A group that loads a verb's module only when that verb is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(entry.name for entry in entry_points(group=COMMAND_GROUP))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for entry in entry_points(group=COMMAND_GROUP, name=cmd_name):
            command: click.Command = entry.load()
            return command
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs in their groups; loads only verbs that other packages registered."""
        installed = self.list_commands(ctx)
        known = {name for lines in GROUPS.values() for name in lines}
        others = {
            name: command.get_short_help_str(60)
            for name in installed
            if name not in known and (command := self.get_command(ctx, name)) is not None
        }
        width = max(map(len, installed), default=0)
        for title, lines in {**GROUPS, "Other": others}.items():
            rows = [(f"{name:{width}}", lines[name]) for name in lines if name in installed]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        verbs = self.list_commands(ctx)
        if name not in verbs and not name.startswith("-"):
            near = nearest_name(name, verbs)
            hint = f"; did you mean {near}?" if near else ""
            ctx.fail(f"No such command {name!r}{hint}")
        return super().resolve_command(ctx, args)


def _print_versions(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    click.echo(f"edge-llm {edge.__version__} from {Path(edge.__file__).parent}")
    click.echo(f"python {platform.python_version()} on {platform.machine()}")
    for name in ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tokenizers", "numpy"):
        try:
            click.echo(f"{name} {version(name)}")
        except PackageNotFoundError:
            click.echo(f"{name} not installed")
    ctx.exit()


@click.command(
    cls=_Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="First steps: edge-llm pull deepseek-r1:1.5b, or edge-llm export SOURCE -o BUNDLE of "
    "any other model; then edge-llm run BUNDLE PROMPT.",
)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_versions,
    help="Versions, and where edge-llm was loaded from.",
)
def cli() -> None:
    """Export, build and run DeepSeek-R1 distills on a Jetson, or any CPU."""


def main() -> None:
    """Run the command and exit with its exit code."""
    if sys.argv[1:2] == ["serve"]:  # until it has handlers; else a signal while loading ends it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGTERM})
    if sys.stdin is None:  # closed, e.g. by <&-
        sys.stdin = Path(os.devnull).open()  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    if sys.stderr is None:  # opened last, so that each of the three gets its own number
        sys.stderr = Path(os.devnull).open("w", errors="backslashreplace")  # noqa: SIM115
    if isinstance(sys.stdin, io.TextIOWrapper):
        # A verb sees bytes that are not text and refuses them with a proper error.
        sys.stdin.reconfigure(errors="surrogateescape")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors != "surrogateescape":
        # As on standard error: a character that the locale lacks is printed by its number.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = cli.main(standalone_mode=False, prog_name="edge-llm")
    except EdgeError as error:
        click.echo(f"edge-llm: error: {error}", err=True)
        if os.environ.get("EDGE_LLM_TRACEBACK"):
            raise
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _show_usage_error(error)
        sys.exit(64)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        # Verbs handle errors of the files that they write; this one is of standard output.
        click.echo("edge-llm: error: the output cannot be written: the disk is full", err=True)
        # The rest of the buffer would fail again at the end, and Python would exit with 120.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(ResourceError.exit_code)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


def _show_usage_error(error: click.ClickException) -> None:
    """Print one line that names the verb's help; without a verb, print the help itself."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    message = error.format_message()
    if context is None or "\n" in message:
        error.show()
        return
    click.echo(
        f"edge-llm: error: {message.rstrip('.')}; see: {context.command_path} --help", err=True
    )


def echo_json(value: Any) -> None:
    """Print one line of JSON (`to_json`) on stdout; ASCII only if the locale is not UTF-8."""
    text = to_json(value, ensure_ascii=not _writes_utf8(), separators=(",", ":"))
    # A byte of a name that is not UTF-8 becomes \udc and two digits, which JSON reads as such.
    click.echo(text.encode(errors="backslashreplace").decode())


def to_json(value: Any, **options: Any) -> str:
    """Encode as JSON; a number that is not finite becomes null, since JSON has none.

    Args:
        value: the value to encode.
        **options: options for `json.dumps`.
    """
    finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return json.dumps(finite, allow_nan=False, **options)


def _writes_utf8() -> bool:
    return codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"
