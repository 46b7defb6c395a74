"""``edge-llm cache``: keep the KV cache of prompt beginnings on disk."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge.bundle.manifest import read_manifest
from edge.bundle.tasks import check_task
from edge.cli import echo_json
from edge.cli.options import bundle_argument, engine_options, json_option, take_engine
from edge.errors import ConfigError, RequestError
from edge_make.text_file import read_text_file

if TYPE_CHECKING:
    from edge.runtime.llm import LLM

_directory_option = click.option(
    "--prefix-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory of all stored prefixes; default: $XDG_CACHE_HOME/edge-llm/prefixes.",
)
_MAX_TEXT_BYTES = 1 << 24


@click.group()
def cache() -> None:
    """Keep the KV cache of system prompts and documents on disk, by name."""


@cache.command(short_help="Compute the cache of a prompt's beginning and store it.")
@bundle_argument
@click.argument("name")
@click.option(
    "--system",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="File with a system prompt, for chats that begin with it; its last line end is left out.",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="File with plain text, for prompts without chat template that begin with it.",
)
@_directory_option
@json_option
@engine_options("backend", "kv_capacity", "num_threads", "int8_activations")
def build(
    bundle: Path,
    name: str,
    system: Path | None,
    text: Path | None,
    prefix_dir: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Compute the cache of a prompt's beginning with BUNDLE and store it as NAME.

    It serves the same bundle on the same engine, rounding activations or not, and is computed anew
    after a new export.
    """
    from edge.runtime.llm import LLM
    from edge.runtime.prefix_store import Layout, PrefixStore
    from edge_lab.prefixes import compute_rows, default_directory

    if (system is None) == (text is None):
        raise ConfigError("give one of --system FILE and --text FILE")
    check_task(read_manifest(bundle), "generate")
    with LLM(bundle, take_engine(options, num_slots=1)) as llm:
        if system is not None:
            # Editors end a file with a newline that is not meant to be sent; $(cat) drops it, too.
            ids = _system_ids(llm, _read(system).removesuffix("\n"))
        else:
            ids = _text_ids(llm, _read(text))
        directory = prefix_dir or default_directory()
        store = PrefixStore(
            directory,
            llm.manifest,
            Layout.of(llm.backend),
            scales=llm.backend.kv_scales,
        )
        path = store.save(name, ids, compute_rows(llm.backend, llm.embeddings, ids))
    size = path.stat().st_size
    if as_json:
        echo_json({"name": name, "num_tokens": len(ids), "num_bytes": size, "path": str(path)})
    else:
        click.echo(f"{name}: {len(ids)} tokens, {size:,} bytes in {path}")
        used = shlex.quote(str(directory))
        click.echo(f"run, chat and serve use it with --prefix-dir {used}", err=True)


@cache.command("list")
@bundle_argument
@_directory_option
@json_option
def list_prefixes(bundle: Path, prefix_dir: Path | None, as_json: bool) -> None:
    """List what is stored for BUNDLE; every file is checked."""
    from edge.runtime.prefix_store import PrefixStore
    from edge_lab.prefixes import default_directory

    found = PrefixStore(prefix_dir or default_directory(), read_manifest(bundle)).list()
    if as_json:
        echo_json({"prefixes": [dataclasses.asdict(info) for info in found]})
        return
    for info in found:
        state = f"not used: {info.problem}" if info.problem else f"{info.num_tokens} tokens"
        click.echo(f"{info.name}: {state}, {info.num_bytes:,} bytes")
    if not found:
        click.echo("nothing is stored for this bundle")


@cache.command()
@bundle_argument
@click.argument("name")
@_directory_option
@json_option
def drop(bundle: Path, name: str, prefix_dir: Path | None, as_json: bool) -> None:
    """Remove the stored prefix NAME of BUNDLE."""
    from edge.runtime.prefix_store import PrefixStore
    from edge_lab.prefixes import default_directory

    store = PrefixStore(prefix_dir or default_directory(), read_manifest(bundle))
    if not store.drop(name):
        place = "" if prefix_dir is None else f" --prefix-dir {shlex.quote(str(prefix_dir))}"
        raise RequestError(
            f"nothing is stored as {name!r} in {store.directory}; "
            f"list what is with: edge-llm cache list BUNDLE{place}"
        )
    if as_json:
        echo_json({"dropped": name})
    else:
        click.echo(f"dropped {name}")


def _read(path: Path | None) -> str:
    assert path is not None
    try:
        return read_text_file(path, _MAX_TEXT_BYTES)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from error


def _system_ids(llm: LLM, system: str) -> list[int]:
    from edge_lab.prefixes import stable_prefix

    def encode(user: str) -> list[int]:
        return llm.encode(
            [{"role": "system", "content": system}, {"role": "user", "content": user}]
        )

    ids = stable_prefix(encode)
    plain = stable_prefix(lambda user: llm.encode([{"role": "user", "content": user}]))
    if ids == plain:
        raise RequestError("this model's chat template has no place for a system message")
    return ids


def _text_ids(llm: LLM, text: str) -> list[int]:
    from edge_lab.prefixes import stable_prefix

    return stable_prefix(lambda rest: llm.encode(text + rest))
