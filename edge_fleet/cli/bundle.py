"""``edge-llm bundle``: signs bundles, pushes and pulls them, compares them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from edge.bundle.engine_file import find_engines
from edge.bundle.library import find_bundle, roots
from edge.bundle.manifest import MANIFEST_NAME, read_manifest, read_manifest_bytes
from edge.bundle.minisign import key_name, parse_signature
from edge.bundle.release import Release, read_release, say_time
from edge.bundle.trust import (
    SIGNATURE_NAME,
    check_manifest,
    read_signature_bytes,
    trusted_keys_file,
)
from edge.bundle.verified_files import verify_files
from edge.cli import echo_json
from edge.cli.options import FILE, bundle_argument, json_option
from edge.errors import EXIT_GATE_MISSED, ConfigError
from edge.files import is_directory
from edge_fleet.registry.names import REGISTRY_VARIABLE, team_registry
from edge_fleet.registry.reference import Reference, parse_reference
from edge_fleet.signing import sign_bundle, sign_engine
from edge_fleet.unsigned_files import find_uncovered
from edge_lab.cli.options import ask_password
from edge_lab.cli.progress import show_progress
from edge_make.progress import Progress, uncounted
from edge_make.signing import make_key_pair, open_signer

from .registry_options import (
    ReferenceType,
    allow_older_option,
    plain_http_option,
    reference_argument,
    trusted_keys_option,
)
from .rollout import recover, rollback, rollout

if TYPE_CHECKING:
    from edge_fleet.registry.artifact import Contents
    from edge_fleet.registry.client import Registry


@click.group()
def bundle() -> None:
    """Sign bundles, and keep them in a registry.

    REFERENCE is HOST[:PORT]/NAME:TAG or HOST[:PORT]/NAME@sha256:DIGEST of an OCI registry.
    Credentials are those of docker login or podman login.
    """


bundle.add_command(rollout)
bundle.add_command(rollback)
bundle.add_command(recover)


@bundle.command(short_help="Send a bundle to a registry.")
@bundle_argument
@click.argument("reference", type=ReferenceType(), required=False)
@plain_http_option
@json_option
def push(bundle: Path, reference: Reference | None, plain_http: bool | None, as_json: bool) -> None:
    """Send BUNDLE to a registry as REFERENCE; only what is not there yet is sent.

    Without REFERENCE it goes to the registry of EDGE_LLM_REGISTRY, under the name by which edge-llm
    pull finds it there. The hash of every file is checked first. Engines stay here: they are built
    on each device.
    """
    from edge_fleet.registry.push import push as send

    if reference is None:
        team = team_registry()
        if team is None:
            raise ConfigError(
                f"there is no REFERENCE, and {REGISTRY_VARIABLE} names no registry; give one of "
                "them"
            )
        reference = team.reference_of(read_manifest(bundle))
        plain_http = team.plain_http if plain_http is None else plain_http
    with _open(reference, plain_http) as registry, show_progress() as progress:
        done = send(bundle, reference, registry, progress)
    place = f"{reference.registry}/{reference.repository}@{done.digest}"
    if as_json:
        echo_json({"reference": place, **done._asdict()})
        return
    unsigned = "" if done.signed else "; it is not signed (edge-llm bundle sign)"
    click.echo(
        f"{place}: {done.num_bytes / 1e6:,.1f} MB, sent {done.sent_bytes / 1e6:,.3f} MB{unsigned}"
    )


@bundle.command(short_help="Get a bundle from a registry.")
@reference_argument
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory of the bundle. Default: the reference's name, among this machine's bundles.",
)
@click.option("--force", is_flag=True, help="Replace another bundle that is there.")
@allow_older_option
@trusted_keys_option
@plain_http_option
@json_option
def pull(
    reference: Reference,
    output: Path | None,
    force: bool,
    allow_older: bool,
    trusted_keys: Path | None,
    plain_http: bool | None,
    as_json: bool,
) -> None:
    """Get REFERENCE from a registry; an interrupted pull continues where it was.

    The signature is checked before anything large is fetched, and every file before the bundle
    appears. Pieces that bundles in the same directory have are copied from them. A release that has
    expired, or is older than the one it would replace, is refused with exit code 65.
    """
    from edge_fleet.registry.pull import look
    from edge_fleet.registry.pull import pull as fetch
    from edge_fleet.registry.release import check_release, release_at

    target = roots()[0] / reference.name if output is None else output
    with _open(reference, plain_http) as registry, show_progress() as progress:
        offer = look(reference, registry, trusted_keys)
        note = None
        if not allow_older:
            note = check_release(offer.release, str(reference), release_at(target))
        done = fetch(offer, registry, target, overwrite=force, progress=progress)
    if note is not None:
        click.echo(note, err=True)
    if as_json:
        found = {**done._asdict(), "bundle": str(done.bundle)}
        del found["manifest"]
        echo_json(found)
        return
    signed = "" if done.signer is None else f", signed with {done.signer}"
    click.echo(
        f"{done.bundle}: {done.num_bytes / 1e6:,.1f} MB, fetched "
        f"{done.fetched_bytes / 1e6:,.3f} MB{signed} ({done.digest})"
    )
    click.echo(f"On a device with TensorRT, build its engine: edge-llm build {target}", err=True)


@bundle.command()
@bundle_argument
@click.option("--key", "key_file", type=FILE, required=True, help="Secret key of minisign.")
@click.option("--engine", metavar="NAME", help="Sign this engine of BUNDLE, and not BUNDLE.")
@click.option("--comment", help="One line that is signed, too. Default: time and name.")
@click.option(
    "--password-file", type=FILE, help="File of the key's password. Default: it is asked for."
)
@click.option(
    "--release",
    type=click.IntRange(1, 1 << 50),
    metavar="NUMBER",
    help="Number of this release: devices that had a higher one refuse it. Default: what BUNDLE "
    "has, if it was signed as a release before.",
)
@click.option(
    "--expires",
    type=click.DateTime(("%Y-%m-%d", "%Y-%m-%dT%H:%M:%SZ")),
    help="When the release expires, in UTC; devices then refuse to fetch it.",
)
@click.option("--name", help="The only repository that the release is for, e.g. acme/r1-7b.")
@json_option
def sign(
    bundle: Path,
    key_file: Path,
    engine: str | None,
    comment: str | None,
    password_file: Path | None,
    release: int | None,
    expires: datetime | None,
    name: str | None,
    as_json: bool,
) -> None:
    """Sign BUNDLE; an earlier signature is replaced.

    The signature, manifest.json.minisig, covers manifest.json, which has the hash of every file.
    All hashes are checked first. The format is minisign's: minisign -Vm manifest.json -P KEY.
    A release is written into manifest.json before it is signed.

    Engines are not covered: a device that trusts keys runs those that it built itself, and those
    that were signed with --engine, which writes engine.json.minisig.
    """
    made = _release(release, expires, name)
    if engine is not None and made is not None:
        raise ConfigError("--engine signs an engine, which is no release; leave one of the two out")
    manifest = read_manifest(bundle)
    signed = bundle if engine is None else _find_engine(bundle, engine)
    key = open_signer(key_file, lambda: ask_password(password_file))
    if comment is None:
        comment = f"timestamp:{int(time.time())} bundle:{manifest.name}"
        comment += f" engine:{engine}" if engine else ""
    with show_progress() as progress, uncounted(progress, "hash"):
        if engine is None:
            verify_files(bundle, manifest)
            sign_bundle(bundle, key, comment, made)
        else:
            sign_engine(signed, key, comment)
    found = read_release(read_manifest(bundle)) if engine is None else None
    if as_json:
        told = {"key": key.public_key.name, "comment": comment, "engine": engine}
        echo_json({"bundle": str(bundle), **told, "release": msgspec.to_builtins(found)})
        return
    what = "" if found is None else f" as release {found}"
    click.echo(f"{signed}: signed with {key.public_key.name}{what}")


def _find_engine(bundle: Path, name: str) -> Path:
    names = {directory.name: directory for directory in find_engines(bundle)}
    if name not in names:
        there = f"there are {', '.join(names)}" if names else "it has none"
        raise ConfigError(f"{bundle} has no engine {name}; {there}")
    return names[name]


@bundle.command()
@click.argument("name", type=click.Path(path_type=Path))
@click.option("--no-password", is_flag=True, help="Do not encrypt the secret key.")
@click.option("--password-file", type=FILE, help="File of the password. Default: it is asked for.")
def keygen(name: Path, no_password: bool, password_file: Path | None) -> None:
    """Make a pair of keys, NAME.key and NAME.pub, in minisign's format.

    NAME.key signs: keep it off devices and registries. Devices trust NAME.pub; to trust several
    keys, put them into one file, one after the other.
    """
    if no_password and password_file is not None:
        raise ConfigError("--no-password and --password-file exclude each other")
    secret, public = (name.with_name(f"{name.name}.{end}") for end in ("key", "pub"))
    password = "" if no_password else ask_password(password_file, confirm=True)
    if not no_password and not password:
        raise ConfigError("the password is empty; --no-password leaves the key unencrypted")
    key = make_key_pair(secret, public, password)
    click.echo(f"{key.name}: {secret} signs, {public} is for devices")


@bundle.command(short_help="Check every file of a bundle, and its signature.")
@bundle_argument
@trusted_keys_option
@json_option
@click.pass_context
def verify(ctx: click.Context, bundle: Path, trusted_keys: Path | None, as_json: bool) -> None:
    """Check every file of BUNDLE against its manifest, and the manifest's signature.

    Without trusted keys the signature is only shown. With them, an engine must be built on this
    machine or signed, as when it runs. Exit code 65: something is wrong. 3: BUNDLE contains
    something that nobody vouches for; nothing reads or runs it. To check that the engines answer
    as the graph does, use edge-llm verify.
    """
    data, signature = read_manifest_bytes(bundle), read_signature_bytes(bundle)
    manifest = read_manifest(bundle)
    release = read_release(manifest)
    file = trusted_keys_file(trusted_keys)
    found: dict[str, Any] = {"bundle": str(bundle), "files": len(manifest.files)}
    found["release"] = msgspec.to_builtins(release)
    found |= {"key": None, "trusted": False, "comment": None}
    if file is not None:
        key, parsed = check_manifest(data, signature, file, str(bundle))
        found |= {"key": key.name, "trusted": True, "comment": parsed.comment}
    elif signature is not None:
        parsed = parse_signature(signature, str(bundle / SIGNATURE_NAME))
        found["key"] = key_name(parsed.key_id)  # nobody has vouched for its comment yet
    with show_progress() as progress, uncounted(progress, "hash"):
        verify_files(bundle, manifest)
        uncovered = find_uncovered(bundle, file)
    found |= uncovered._asdict()
    if as_json:
        echo_json(found)
    else:
        _print_verified(bundle, found, release)
    if uncovered.unlisted or uncovered.unvouched:
        ctx.exit(EXIT_GATE_MISSED)


def _print_verified(bundle: Path, found: dict[str, Any], release: Release | None) -> None:
    click.echo(f"{bundle}: {found['files']} files are as {MANIFEST_NAME} says")
    if found["trusted"]:
        click.echo(f"signed with the trusted key {found['key']}: {found['comment']}")
    elif found["key"]:
        click.echo(f"says it is signed with {found['key']}; name --trusted-keys to check that")
    else:
        click.echo("not signed")
    if release is not None:
        is_over = release.expires is not None and release.expires <= datetime.now(timezone.utc)
        says = "" if found["trusted"] else "says it is "
        click.echo(f"{says}release {release}{', which is over' if is_over else ''}")
    for name, who in found["engines"].items():
        click.echo(f"engine {name}: {who}")
    for name, why in found["unvouched"].items():
        click.echo(f"engine {name}: NOT VOUCHED FOR: {why}")
    for name in found["unlisted"]:
        click.echo(f"{name!r}: NOT LISTED in {MANIFEST_NAME}; nothing reads it, so remove it")


@bundle.command(short_help="Say what differs between two bundles.")
@click.argument("old", metavar="OLD")
@click.argument("new", metavar="NEW")
@plain_http_option
@json_option
def diff(old: str, new: str, plain_http: bool | None, as_json: bool) -> None:
    """Show what differs between two bundles, and what a device with OLD fetches for NEW.

    Each is a bundle on this machine or a REFERENCE.
    """
    with show_progress() as progress:
        before, after = (_contents(text, plain_http, progress) for text in (old, new))
    have = {piece.digest for piece in before[0].all_pieces()}
    files: dict[str, dict[str, Any]] = {}
    for name in sorted(before[0].pieces.keys() | after[0].pieces.keys()):
        mine, theirs = (each[0].pieces.get(name) for each in (before, after))
        if mine == theirs:
            continue
        state = "added" if mine is None else "removed" if theirs is None else "changed"
        news = {piece.digest: piece.num_bytes for piece in theirs or () if piece.digest not in have}
        size = sum(piece.num_bytes for piece in theirs or mine or ())
        files[name] = {"state": state, "num_bytes": size, "fetched_bytes": sum(news.values())}
    keys = sorted(key for key in after[1] if before[1].get(key) != after[1][key])
    signatures = [each[0].signature and each[0].signature.digest for each in (before, after)]
    fetched = sum(file["fetched_bytes"] for file in files.values())
    if as_json:
        echo_json(
            {
                "files": files,
                "manifest": keys,
                "signature": signatures[0] != signatures[1],
                "fetched_bytes": fetched,
            }
        )
        return
    for name, file in files.items():
        click.echo(
            f"{file['state']:8} {name}: {file['num_bytes'] / 1e6:,.3f} MB, "
            f"{file['fetched_bytes'] / 1e6:,.3f} MB of it new"
        )
    if keys:
        click.echo(f"manifest: {', '.join(keys)}")
    if signatures[0] != signatures[1]:
        click.echo("another signature")
    if not files and not keys and signatures[0] == signatures[1]:
        click.echo("the same")
    else:
        click.echo(f"a device with {old} fetches {fetched / 1e6:,.3f} MB of files")


@contextmanager
def _open(reference: Reference, plain_http: bool | None) -> Iterator[Registry]:
    from edge_fleet.registry.client import Registry

    with Registry(reference, plain_http=plain_http) as registry:
        yield registry


def _contents(
    text: str, plain_http: bool | None, progress: Progress
) -> tuple[Contents, dict[str, Any]]:
    """Read what a bundle or a reference contains, and its manifest without what always differs."""
    from edge_fleet.registry.artifact import decode, describe, encode
    from edge_fleet.registry.pull import look
    from edge_fleet.registry.reference import is_reference

    if not is_directory(Path(text)) and is_reference(text):
        reference = parse_reference(text)
        with _open(reference, plain_http) as registry:
            offer = look(reference, registry)
        contents, manifest = offer.contents, offer.manifest
    else:
        path = find_bundle(text)
        artifact, manifest = describe(path, progress)
        contents = decode(encode(artifact), str(path))[1]
    values: dict[str, Any] = msgspec.to_builtins(manifest)
    for name in ("files", "self_sha256"):
        del values[name]
    return contents, values


def _release(number: int | None, expires: datetime | None, name: str | None) -> Release | None:
    """Make the release that a bundle is signed as; None if none is given.

    Raises:
        ConfigError: it has no number, has already expired, or names no valid repository.
    """
    if number is None:
        if expires is not None or name is not None:
            raise ConfigError("--expires and --name are of a release; give its number by --release")
        return None
    now = datetime.now(timezone.utc).replace(microsecond=0)
    until = expires and expires.replace(tzinfo=timezone.utc)
    if until is not None and until <= now:
        raise ConfigError(f"--expires is {say_time(until)}, and it is {say_time(now)} already")
    made = {"number": number, "signed": now, "expires": until, "name": name}
    try:
        return msgspec.convert(made, Release)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"--name {name} is no name of a repository; write it in lower case, e.g. acme/r1-7b"
        ) from error
