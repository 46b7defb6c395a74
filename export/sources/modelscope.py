"""Downloads a checkpoint from ModelScope by the HTTP interface that ModelScope's client uses.

``GET /api/v1/models/OWNER/NAME/repo/files?Revision=R&Recursive=true`` lists the files of a branch,
tag or commit: ``Data.Files`` with ``Path``, ``Type``, ``Size`` in bytes and ``Sha256``, and in
``Data.LatestCommitter`` the commit. ``GET .../repo?Revision=R&FilePath=F`` is a file, after a
redirect, and honours ``Range`` (modelscope/hub/api.py and file_download.py in
github.com/modelscope/modelscope). The commits are ModelScope's own, not those of the Hugging Face
hub.
"""

from __future__ import annotations

import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlencode, urlsplit

import msgspec

from edge.bundle.update import try_lock
from edge.errors import CheckpointError, ConfigError
from edge.files import MALFORMED
from edge.user_paths import user_directory
from edge_make.file_hash import sha256_file
from edge_make.progress import Progress

from .download import Download

DOMAIN_VARIABLE = "MODELSCOPE_DOMAIN"
"""ModelScope's own variable for another host; a scheme before it, as for a mirror, is kept."""
_DOMAIN = "www.modelscope.cn"
_BRANCH = "master"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WEIGHTS = re.compile(r"(model(-\d+-of-\d+)?|gptq_model-[\w.-]+)\.safetensors")
_MAX_LISTING_BYTES = 16 << 20
_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 60.0
_ATTEMPTS = 5  # tries in a row that bring nothing
_PAUSE_S = 1.0


class _File(msgspec.Struct, rename="pascal"):
    path: str
    type: str = "blob"
    size: Annotated[int, msgspec.Meta(ge=0)] = 0
    sha256: str = ""


class _Commit(msgspec.Struct, rename="pascal"):
    id: str = ""


class _Data(msgspec.Struct, rename="pascal"):
    files: list[_File] | None = None
    latest_committer: _Commit | None = None


class _Listing(msgspec.Struct, rename="pascal"):
    success: bool = False
    message: str = ""
    data: _Data | None = None


class _InterruptedError(Exception):
    """A transfer broke off; the bytes that came are kept."""


def download(
    repo_id: str,
    revision: str | None,
    cache_dir: Path | None,
    check: Callable[[Path, Download], object],
    text_files: list[str],
    progress: Progress,
) -> tuple[Path, str]:
    """Fetch one revision of a repository: first the small files, then the weights.

    A file appears only whole, with the size and hash of the listing. A broken transfer resumes
    where it ended, also in a later run.

    Args:
        repo_id: ``owner/name``.
        revision: branch, tag or commit; None is ``master``.
        cache_dir: directory of downloads; None is ``edge-llm/modelscope`` among the user's caches.
        check: called with the directory and the weights still to come, before any of them is
            fetched; an exception that it raises ends the download.
        text_files: names of the small files, all of which may be missing.
        progress: called with the bytes of each file.

    Returns:
        The directory, and the commit, or a stand-in for it if the listing names none.

    Raises:
        CheckpointError: not found, no network, or files that differ from the listing.
        ConfigError: the variable ``MODELSCOPE_DOMAIN`` is no host, or the user has no home for
            caches.
    """
    hub = _Hub(repo_id, revision or _BRANCH, progress)
    files, commit = hub.listing()
    root = cache_dir or _cache_root()
    directory = root / repo_id.replace("/", "--") / re.sub(r"[^\w.-]", "_", commit)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _lock(directory, repo_id):
            for name in text_files:
                if name in files:
                    hub.fetch(files[name], directory)
            weights = [files[name] for name in sorted(filter(_WEIGHTS.fullmatch, files))]
            missing = sum(file.size for file in weights if not (directory / file.path).exists())
            check(directory, Download(missing, directory))
            for file in weights:
                hub.fetch(file, directory)
    except OSError as error:  # from the disk; network errors are handled where they occur
        raise CheckpointError(
            f"{repo_id} could not be downloaded to {directory} ({error.strerror or error}); make "
            "room, or give another --cache-dir, and run the same command again to resume"
        ) from error
    return directory, commit


def _cache_root() -> Path:
    caches = user_directory("XDG_CACHE_HOME", ".cache")
    if caches is None:
        raise ConfigError("this user has no home directory; give --cache-dir or XDG_CACHE_HOME")
    return caches / "edge-llm" / "modelscope"


@contextmanager
def _lock(directory: Path, repo_id: str) -> Iterator[None]:
    with (directory / ".lock").open("w") as file:
        if not try_lock(file.fileno()):
            raise CheckpointError(
                f"{repo_id} is being downloaded by another process; run this again when it is done"
            )
        yield


class _Hub:
    """One revision of one repository."""

    def __init__(self, repo_id: str, revision: str, progress: Progress) -> None:
        domain = os.environ.get(DOMAIN_VARIABLE) or _DOMAIN
        endpoint = domain if "://" in domain else f"https://{domain}"
        if not re.fullmatch(r"https?://[\w.:\[\]-]+/?", endpoint):
            raise ConfigError(
                f"{DOMAIN_VARIABLE} is {domain!r}, which is no host; unset it for {_DOMAIN}"
            )
        self._host = urlsplit(endpoint).netloc
        self._base = f"{endpoint.rstrip('/')}/api/v1/models/{quote(repo_id)}/repo"
        self._repo_id = repo_id
        self._revision = revision
        self._progress = progress

    def listing(self) -> tuple[dict[str, _File], str]:
        """Return the files at the top of the repository by name, and the commit."""
        query = urlencode({"Revision": self._revision, "Recursive": "true"})
        with self._open(f"{self._base}/files?{query}") as answer:
            try:
                body = answer.read(_MAX_LISTING_BYTES)
            except (OSError, http.client.HTTPException) as error:
                raise self._unreachable(error) from error
        try:
            found = msgspec.json.decode(body, type=_Listing)
        except MALFORMED as error:
            raise CheckpointError(
                f"{self._repo_id}: {self._base}/files is no listing of ModelScope ({error}); check "
                f"{DOMAIN_VARIABLE}"
            ) from error
        if not found.success or found.data is None or found.data.files is None:
            raise self._not_found(found.message)
        files = {file.path: file for file in found.data.files if file.type == "blob"}
        commit = found.data.latest_committer.id if found.data.latest_committer else ""
        if _COMMIT.fullmatch(commit):
            self._revision = commit  # fetch the files of this one, even if the branch moves
        return files, self._revision

    def fetch(self, file: _File, directory: Path) -> None:
        """Fetch one file into place; leave it alone if it is already right."""
        if _WEIGHTS.fullmatch(file.path) and not file.sha256:
            raise CheckpointError(
                f"{self._repo_id}: ModelScope lists no hash of {file.path}, so nothing says "
                "whether it is whole; take another --hub"
            )
        path = directory / file.path
        if path.is_file() and _is_right(path, file):
            return
        path.parent.mkdir(exist_ok=True)  # such as 1_Pooling of sentence-transformers
        part = path.with_name(f".{path.name}.part")
        self._transfer(file, part)
        if not _is_right(part, file):
            part.unlink()
            raise CheckpointError(
                f"{self._repo_id}: {file.path} is not what ModelScope lists (SHA-256 "
                f"{file.sha256}, {file.size} bytes); run the same command again, which fetches it "
                "anew"
            )
        part.replace(path)

    def _transfer(self, file: _File, part: Path) -> None:
        failures = 0
        while True:
            have = part.stat().st_size if part.exists() else 0
            if have > file.size:
                part.unlink()
                have = 0
            if have == file.size and part.exists():
                return
            try:
                self._go_on(file, part, have)
            except _InterruptedError as error:
                grown = part.exists() and part.stat().st_size > have
                failures = 0 if grown else failures + 1
                if failures == _ATTEMPTS:
                    raise CheckpointError(
                        f"{self._repo_id} could not be downloaded ({error}); run the same command "
                        "again to resume"
                    ) from error
                time.sleep(_PAUSE_S * failures)

    def _go_on(self, file: _File, part: Path, have: int) -> None:
        """Append the missing bytes; raise `_InterruptedError` if the connection ends too early."""
        query = urlencode({"Revision": self._revision, "FilePath": file.path})
        headers = {"Range": f"bytes={have}-"} if have else {}
        step = f"download {file.path}"
        with self._open(f"{self._base}?{query}", headers) as answer:
            if have and answer.status != http.HTTPStatus.PARTIAL_CONTENT:
                have = 0  # the server sends the whole file, whatever was asked for
            elif have and not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                part.unlink()
                raise _InterruptedError("the answer is of another range than was asked for")
            with part.open("ab" if have else "wb") as output:
                self._progress(step, have, file.size, "bytes")
                while have < file.size:
                    try:
                        data = answer.read(min(_CHUNK_BYTES, file.size - have))
                    except (OSError, http.client.HTTPException) as error:
                        raise _InterruptedError(str(error) or type(error).__name__) from error
                    if not data:
                        raise _InterruptedError(
                            f"{file.path} ended after {have} of {file.size} bytes"
                        )
                    output.write(data)
                    have += len(data)
                    self._progress(step, have, file.size, "bytes")

    def _open(self, url: str, headers: dict[str, str] | None = None) -> Any:
        request = urllib.request.Request(url, headers={"User-Agent": "edge-llm", **(headers or {})})
        try:
            return urllib.request.urlopen(request, timeout=_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            with error:
                if error.code in (401, 403, 404):
                    raise self._not_found(f"status {error.code}") from error
                if headers is None:
                    raise self._unreachable(error) from error
                raise _InterruptedError(str(error)) from error
        except (OSError, http.client.HTTPException) as error:
            if headers is None:
                raise self._unreachable(error) from error
            raise _InterruptedError(str(error)) from error

    def _not_found(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self._repo_id} was not found on ModelScope at revision {self._revision!r} ({why}); "
            "check the spelling (owners may differ from the Hugging Face hub's) and --revision: "
            "ModelScope's default branch is master, and its commits are its own"
        )

    def _unreachable(self, error: Exception) -> CheckpointError:
        whence = DOMAIN_VARIABLE if os.environ.get(DOMAIN_VARIABLE) else "ModelScope"
        reason = getattr(error, "reason", error)  # urllib wraps the network's error
        return CheckpointError(
            f"{self._repo_id}: {self._host} ({whence}) cannot be reached ({reason}); check the "
            f"network and {DOMAIN_VARIABLE}, or give a directory that was downloaded elsewhere"
        )


def _is_right(path: Path, file: _File) -> bool:
    if path.stat().st_size != file.size:
        return False
    return not file.sha256 or sha256_file(path).sha256 == file.sha256.lower()
