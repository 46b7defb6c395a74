"""Finds user and password for a registry where Docker and Podman keep them.

They are looked for in this order: the JSON in ``DOCKER_AUTH_CONFIG``, the file
``REGISTRY_AUTH_FILE``, ``config.json`` in ``DOCKER_CONFIG`` or ``~/.docker``, and, if neither
variable is set, Podman's ``auth.json`` (containers-auth.json(5)). So ``docker login`` and
``podman login`` store them, and no secret is on a command line. Helpers
(``credHelpers``, ``credsStore``) are run as Docker runs them.
"""

from __future__ import annotations

import base64
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from edge.errors import ConfigError
from edge.files import MALFORMED, read_file
from edge.user_paths import user_directory

_MAX_BYTES = 1 << 20
_HELPER_TIMEOUT_S = 30.0
_HELPER_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
_HUB = "https://index.docker.io/v1/"
"""Key under which Docker keeps the credentials for all hosts of its own registry."""
_HUB_HOSTS = ("docker.io", "index.docker.io", "registry-1.docker.io")
_TOKEN_USER = "<token>"  # user name from a helper whose secret is an identity token
_NO_CREDENTIALS = "credentials not found"  # how the message of a helper without any begins


class _TokenError(ConfigError):
    """There is only an identity token."""


@dataclass(frozen=True)
class Credentials:
    """User and password; printing this does not show the password."""

    user: str
    password: str = field(repr=False)


class _Entry(msgspec.Struct):
    auth: str = ""
    username: str = ""
    password: str = ""
    identitytoken: str = ""


class _Config(msgspec.Struct, rename="camel"):
    auths: dict[str, _Entry] = {}
    cred_helpers: dict[str, str] = {}
    creds_store: str = ""


class _Answer(msgspec.Struct):
    Username: str
    Secret: str


def find_credentials(
    registry: str, environ: Mapping[str, str] | None = None, repository: str = ""
) -> Credentials | None:
    """Find the credentials of a registry; None if there are none.

    Args:
        registry: host, with its port if it has one.
        environ: used instead of ``os.environ``.
        repository: path of names; Podman may keep credentials for it or a part of it.

    Raises:
        ConfigError: a file or an entry cannot be used, or a helper fails.
    """
    server = _HUB if registry in _HUB_HOSTS else registry
    hosts = _HUB_HOSTS if registry in _HUB_HOSTS else (registry,)
    parts = repository.split("/") if repository else []
    ends = range(len(parts), -1, -1)  # the most specific first
    keys = ["/".join([host, *parts[:end]]) for end in ends for host in hosts]
    keys += [f"https://{registry}", f"https://{registry}/v2/", server]
    token: _TokenError | None = None
    for config, where in _configs(os.environ if environ is None else environ):
        try:
            helper = config.cred_helpers.get(server) or config.creds_store
            if helper:
                found = _ask_helper(helper, server, where)
                if found is not None:
                    return found
            for key in keys:
                if key in config.auths:
                    found = _read_entry(config.auths[key], registry, where)
                    if found is not None:
                        return found
        except _TokenError as error:  # a later file may have a password
            token = token or error
    if token is not None:
        raise token
    return None


def _configs(environ: Mapping[str, str]) -> Iterator[tuple[_Config, str]]:
    if text := environ.get("DOCKER_AUTH_CONFIG"):
        yield _decode(text.encode(), "DOCKER_AUTH_CONFIG"), "DOCKER_AUTH_CONFIG"
    named = environ.get("REGISTRY_AUTH_FILE")
    paths = [Path(named)] if named else []
    if (docker := user_directory("DOCKER_CONFIG", ".docker", environ)) is not None:
        paths.append(docker / "config.json")
    guessed: list[Path] = []
    if not (named or environ.get("DOCKER_CONFIG")):
        running = environ.get("XDG_RUNTIME_DIR")
        folder = f"{running}/containers" if running else f"/run/containers/{os.getuid()}"
        guessed = [Path(folder) / "auth.json"]
        if (config := user_directory("XDG_CONFIG_HOME", ".config", environ)) is not None:
            guessed.append(config / "containers" / "auth.json")
    for path in (*paths, *guessed):
        try:
            data = read_file(path, _MAX_BYTES)
        except FileNotFoundError:
            continue
        except (PermissionError, NotADirectoryError) as error:
            if path in guessed:  # may belong to another user, or root
                continue
            raise _unreadable(path, error) from error
        except OSError as error:
            raise _unreadable(path, error) from error
        yield _decode(data, str(path)), str(path)


def _unreadable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"cannot read the credentials of {path}: {error.strerror}")


def _decode(data: bytes, where: str) -> _Config:
    try:
        return msgspec.json.decode(data, type=_Config)
    except MALFORMED as error:
        # The error's text may quote a secret value.
        raise ConfigError(
            f"{where} is no configuration of Docker ({type(error).__name__}); docker login or "
            "podman login writes one"
        ) from None


def _read_entry(entry: _Entry, registry: str, where: str) -> Credentials | None:
    user, password = entry.username, entry.password
    if entry.auth:
        try:
            text = base64.b64decode(entry.auth, validate=True).decode("utf-8").rstrip("\0")
        except ValueError:  # not ASCII, not base64, not UTF-8
            text = ""
        user, colon, password = text.partition(":")
        if not colon or not user:
            raise ConfigError(
                f"the entry of {registry} in {where} is not the base64 of USER:PASSWORD; log in "
                "again"
            )
    if entry.identitytoken and not password:
        raise _only_token(where, registry)
    return Credentials(user, password) if user else None


def _only_token(where: str, registry: str) -> _TokenError:
    return _TokenError(
        f"{where} has only an identity token for {registry}, which this client cannot use; "
        "log in with a user and a password or access token"
    )


def _ask_helper(helper: str, registry: str, where: str) -> Credentials | None:
    if not set(helper) <= _HELPER_NAME:
        raise ConfigError(f"{where} names the helper {helper!r}, which is no name of a program")
    program = f"docker-credential-{helper}"
    try:
        done = subprocess.run(
            [program, "get"],
            input=registry.encode(),
            capture_output=True,
            check=False,
            timeout=_HELPER_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(
            f"{program}, which {where} names, cannot be asked for {registry}: {error}"
        ) from error
    if done.returncode:
        said = (done.stdout or done.stderr).decode("utf-8", "replace").strip()
        if said.startswith(_NO_CREDENTIALS):
            return None
        raise ConfigError(f"{program} fails for {registry}: {said[:200]}")
    try:
        answer = msgspec.json.decode(done.stdout, type=_Answer)
    except MALFORMED:
        raise ConfigError(f"{program} gives no user and secret for {registry}") from None
    if answer.Username == _TOKEN_USER:
        raise _only_token(program, registry)
    return Credentials(answer.Username, answer.Secret)
