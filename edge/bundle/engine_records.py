"""Decides which engines a machine with trusted keys runs: those it built, and those signed.

A bundle's signature does not cover its engines, which are built on each device, and an engine is
executable code. So each build leaves a record outside of the bundle. It is a file named by the
SHA-256 of ``engine.json``, which contains the plan's hash and the kernels. An engine that was built
elsewhere needs ``engine.json.minisig``, by a trusted key. Nothing of ``engine.json`` is parsed
before one of the two is found.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from edge.errors import BundleError, ConfigError
from edge.files import read_guarded_file

from .minisign import PublicKey, find_signer

ENGINE_SIGNATURE = "engine.json.minisig"
RECORDS_VARIABLE = "EDGE_LLM_ENGINE_RECORDS"
BUILDERS_VARIABLE = "EDGE_LLM_ENGINE_BUILDERS"
DEFAULT_RECORDS = Path("/var/lib/edge-llm/engine-records")
"""Directory to which root's builds write, and in which every user looks."""
built_here: set[str] = set()
"""SHA-256 of each engine that this process built; engines only for trials have no other record."""
_MAX_RECORD_BYTES = 1 << 13  # a hash and the longest path


class UnvouchedError(BundleError):
    """Nobody vouches for an engine on a machine that has trusted keys."""


def record_directories() -> list[Path]:
    """Return the directories that hold records; this user's builds write to the first."""
    if named := os.environ.get(RECORDS_VARIABLE):
        return [Path(named), DEFAULT_RECORDS]
    if os.geteuid() == 0:
        return [DEFAULT_RECORDS]
    home = os.environ.get("HOME", "")
    state = os.environ.get("XDG_STATE_HOME") or (home and f"{home}/.local/state")
    return [*([Path(state) / "edge-llm" / "engine-records"] if state else []), DEFAULT_RECORDS]


def why_unrecorded(data: bytes) -> str | None:
    """Return why no record of this machine contains a file; None if one does.

    Args:
        data: the file's bytes.

    Raises:
        ConfigError: ``EDGE_LLM_ENGINE_BUILDERS`` names an unknown user.
    """
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 in built_here:
        return None
    problems, builders = [], _builders()
    for directory in record_directories():
        problem = _problem(directory / sha256, sha256, builders)
        if problem is None:
            return None
        problems.append(problem)
    return "; ".join(problems)


def who_vouches(directory: Path, data: bytes, trusted_keys: Path) -> str:
    """Find who vouches for an engine: this machine, which built it, or a trusted key.

    Args:
        directory: the engine's directory.
        data: bytes of its ``engine.json``, not parsed yet.
        trusted_keys: file of public keys.

    Returns:
        Who vouches for it, in a few words.

    Raises:
        UnvouchedError: nobody does; the message says why, and what to do.
        ConfigError: the file of trusted keys, or the environment as in `why_unrecorded`, cannot be
            used.
    """
    unrecorded = why_unrecorded(data)
    if unrecorded is None:
        return "this machine, which built it"
    signer = find_signer(directory / ENGINE_SIGNATURE, data, trusted_keys, "engines")
    if isinstance(signer, PublicKey):
        return f"the trusted key {signer.name}"
    bundle = directory.parent.parent
    raise UnvouchedError(
        f"the engine {directory} is passed over: nobody vouches for it, as {trusted_keys} demands "
        f"({unrecorded}; {signer}); build it on this machine with: edge-llm build {bundle}, or "
        f"sign it with: edge-llm bundle sign {bundle} --engine {directory.name} --key FILE"
    )


def _builders() -> list[int]:
    """Return the ids of users whose records count, besides root's and this user's."""
    import pwd

    names = os.environ.get(BUILDERS_VARIABLE, "").split()
    try:
        return [pwd.getpwnam(name).pw_uid for name in names]
    except KeyError as error:
        raise ConfigError(
            f"{BUILDERS_VARIABLE} is {' '.join(names)!r}, and {error.args[0]}; name users of this "
            "machine, with spaces between them"
        ) from error


def _problem(record: Path, sha256: str, builders: list[int]) -> str | None:
    try:
        if record.is_symlink():
            return f"{record} does not count: it is a symbolic link"
        if read_guarded_file(record, _MAX_RECORD_BYTES, builders)[:64] == sha256.encode():
            return None
    except FileNotFoundError:
        return f"no record in {record.parent}"
    except OSError as error:
        return f"{record} does not count: {error.strerror}"
    return f"{record} does not count: it has another hash than its name"
