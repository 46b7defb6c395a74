"""ModelScope: a download against a small server on 127.0.0.1 that speaks its interface."""

from __future__ import annotations

import hashlib
import json
import re
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from edge.errors import CheckpointError, ConfigError
from export.sources import modelscope
from export.sources.checkpoint import Checkpoint
from export.sources.opening import open_checkpoint
from tests.export.sources.local_server import LocalServer
from tests.makers import tiny_models as tiny
from tests.makers.tiny_pooling import PROMPTS, write_embedder

pytestmark = pytest.mark.live

COMMIT, OLD = "c" * 40, "d" * 40
WEIGHTS = "model.safetensors"


class Server(LocalServer):
    """The two calls of the interface, with the faults of a bad line.

    Attributes:
        breaks: bytes after which the next transfers of weights break off, one number for each.
        ignores_range: whether a whole file is the answer to a part of it.
        corrupts: whether weights arrive with another byte.
        commit: what the listing names as its commit.
        asked: path, file and range of each request for a file.
    """

    def __init__(self, folders: dict[str, Path]) -> None:
        super().__init__()
        self.folders = folders
        self.breaks: list[int] = []
        self.ignores_range = self.corrupts = False
        self.commit = COMMIT
        self.hides_hashes = False
        self.asked: list[tuple[str, str, str | None]] = []

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(request.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        found = re.fullmatch(r"/api/v1/models/(\w+/[\w.-]+)/repo(/files)?", parts.path)
        assert found, request.path
        folder = self.folders.get(query["Revision"])
        if found[1] != "owner/tiny" or folder is None:
            failure = {"Code": 404, "Success": False, "Message": "no such record", "Data": None}
            return self.send(request, 404, json.dumps(failure).encode())
        if found[2]:
            assert query["Recursive"] == "true"
            return self.send(request, 200, json.dumps(self.listing(folder)).encode())
        name = query["FilePath"]
        self.asked.append((query["Revision"], name, request.headers.get("Range")))
        return self.send_file(request, name, (folder / name).read_bytes())

    def listing(self, folder: Path) -> dict[str, Any]:
        files = [{"Path": "original", "Type": "tree", "Size": 0}]
        for path in sorted(filter(Path.is_file, folder.rglob("*"))):
            name, data = path.relative_to(folder).as_posix(), path.read_bytes()
            digest = "" if self.hides_hashes else hashlib.sha256(data).hexdigest()
            files.append({"Path": name, "Type": "blob", "Size": len(data), "Sha256": digest})
        found = {"Files": files, "IsVisual": 0, "LatestCommitter": {"Id": self.commit}}
        return {"Code": 200, "Success": True, "Message": "success", "Data": found}

    def send_file(self, request: BaseHTTPRequestHandler, name: str, data: bytes) -> None:
        wanted = request.headers.get("Range")
        start = int(wanted[len("bytes=") : -1]) if wanted and not self.ignores_range else 0
        if name == WEIGHTS and self.corrupts:
            data = data[:-1] + bytes([data[-1] ^ 1])
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        request.send_header("Content-Length", str(len(data) - start))
        request.end_headers()
        end = len(data)
        if name == WEIGHTS and self.breaks:
            end = start + self.breaks.pop(0)
            request.close_connection = True
        request.wfile.write(data[start:end])

    def send(self, request: BaseHTTPRequestHandler, status: int, body: bytes) -> None:
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    main = tiny.write_checkpoint(tmp_path / "main", "qwen2")
    (main / "README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    (main / "pytorch_model.bin").write_bytes(b"pickle")
    old = tiny.write_checkpoint(tmp_path / "old", "qwen2", seed=7)
    server = Server({"master": main, COMMIT: main, OLD: old})
    monkeypatch.setenv("MODELSCOPE_DOMAIN", server.url)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(modelscope, "_PAUSE_S", 0.0)
    with server:
        yield server


def open_tiny(**options: Any) -> Checkpoint:
    return open_checkpoint("owner/tiny", hub="modelscope", **options)


@pytest.mark.usefixtures("homeless")
def test_without_a_home_a_directory_must_be_named():
    with pytest.raises(ConfigError, match="give --cache-dir or XDG_CACHE_HOME"):
        modelscope._cache_root()


def weight_requests(server: Server) -> list[str | None]:
    return [wanted for _, name, wanted in server.asked if name == WEIGHTS]


def test_a_download_is_the_checkpoint(server: Server, tmp_path: Path):
    steps: list[tuple[str, float, float]] = []
    with open_tiny(progress=lambda step, done, total, *_: steps.append((step, done, total))) as got:
        source, norm = got.source, got.tensor("model.norm.weight").tolist()
    with open_checkpoint(str(tmp_path / "main")) as expected:
        assert norm == expected.tensor("model.norm.weight").tolist()
        assert source.sha256 == expected.source.sha256
    assert (source.kind, source.location) == ("hub", "modelscope:owner/tiny")
    assert (source.revision, source.licence) == (COMMIT, "mit")
    names = [path.name for path in (tmp_path / "caches").rglob("*") if path.is_file()]
    assert "pytorch_model.bin" not in names
    assert not any(name.endswith(".part") for name in names)
    size = (tmp_path / "main" / WEIGHTS).stat().st_size
    assert (f"download {WEIGHTS}", size, size) in steps
    assert {revision for revision, _, _ in server.asked} == {COMMIT}


def test_a_model_that_embeds_has_a_file_in_a_folder(server: Server, tmp_path: Path):
    write_embedder(tmp_path / "main")
    for _ in range(2):
        with open_tiny() as found:
            assert found.spec.task == "embed"
            assert found.embedding is not None
            assert found.embedding.prompts == PROMPTS
    asked = [name for _, name, _ in server.asked]
    assert asked.count("1_Pooling/config.json") == asked.count("sentence_bert_config.json") == 1


def test_the_variable_chooses_the_hub(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EDGE_LLM_HUB", "modelscope")
    with open_checkpoint("owner/tiny") as checkpoint:
        assert checkpoint.source.location == "modelscope:owner/tiny"
    monkeypatch.setenv("EDGE_LLM_HUB", "elsewhere")
    with pytest.raises(ConfigError, match="EDGE_LLM_HUB is 'elsewhere'; use huggingface, models"):
        open_checkpoint("owner/tiny")


def test_a_revision_and_another_cache(server: Server, tmp_path: Path):
    server.commit = ""  # the listing of a commit may name none
    with open_tiny(revision=OLD, cache_dir=tmp_path / "kept") as checkpoint:
        assert checkpoint.source.revision == OLD
        norm = checkpoint.tensor("model.norm.weight").tolist()
    with open_checkpoint(str(tmp_path / "old")) as expected:
        assert norm == expected.tensor("model.norm.weight").tolist()
    assert (tmp_path / "kept" / "owner--tiny" / OLD / WEIGHTS).is_file()


def test_correct_files_are_not_fetched_again(server: Server, tmp_path: Path):
    open_tiny().close()
    server.asked.clear()
    open_tiny().close()
    assert server.asked == []
    (found,) = (tmp_path / "caches").rglob(WEIGHTS)
    data = found.read_bytes()
    found.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # of the right size
    open_tiny().close()
    assert weight_requests(server) == [None]
    assert found.read_bytes() == data


def test_a_broken_transfer_goes_on_where_it_ended(server: Server):
    server.breaks = [1000, 500]
    open_tiny().close()
    assert weight_requests(server) == [None, "bytes=1000-", "bytes=1500-"]


def test_a_later_run_resumes(server: Server):
    server.breaks = [1000, 0, 0, 0, 0, 0]
    with pytest.raises(CheckpointError, match="run the same command again to resume"):
        open_tiny()
    server.asked.clear()
    open_tiny().close()
    assert weight_requests(server) == ["bytes=1000-"]


def test_a_server_that_ignores_ranges_sends_it_whole(server: Server, tmp_path: Path):
    server.breaks, server.ignores_range = [1000], True
    open_tiny().close()
    (found,) = (tmp_path / "caches").rglob(WEIGHTS)
    assert found.read_bytes() == (tmp_path / "main" / WEIGHTS).read_bytes()


def test_bytes_that_differ_from_the_listing_are_refused(server: Server, tmp_path: Path):
    server.corrupts = True
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not what ModelScope lists"):
        open_tiny()
    assert not list((tmp_path / "caches").rglob("*model.safetensors*"))
    server.corrupts = False
    open_tiny().close()


def test_weights_without_a_hash_are_refused(server: Server):
    server.hides_hashes = True
    with pytest.raises(CheckpointError, match=r"lists no hash of model\.safetensors"):
        open_tiny()
    assert weight_requests(server) == []


def test_a_model_that_is_refused_costs_no_weights(server: Server, tmp_path: Path):
    tiny.write_checkpoint(tmp_path / "main", "llama", auto_map={"AutoModel": "x.Y"})
    with pytest.raises(CheckpointError, match="auto_map asks for Python code"):
        open_tiny()
    assert weight_requests(server) == []


@pytest.mark.parametrize(
    ("source", "revision", "words"),
    [
        (
            "owner/missing",
            None,
            ["owner/missing was not found on ModelScope", "check the spelling"],
        ),
        ("owner/tiny", "v9", ["at revision 'v9'", "its commits are its own"]),
    ],
)
def test_missing_repositories_and_revisions_are_named(
    server: Server, source: str, revision: str | None, words: list[str]
):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source, revision=revision, hub="modelscope")
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"Data": 3}', b"[" * 100_000])
def test_answers_that_are_no_listing_are_refused(
    server: Server, body: bytes, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Server, "answer", lambda self, request: self.send(request, 200, body))
    with pytest.raises(CheckpointError, match="is no listing of ModelScope"):
        open_tiny()


def test_a_listing_cannot_write_elsewhere(server: Server, monkeypatch: pytest.MonkeyPatch):
    listing = server.listing(server.folders[COMMIT])
    listing["Data"]["Files"] += [
        {"Path": path, "Type": "blob", "Size": 4, "Sha256": "0" * 64}
        for path in ("../config.json", "model-1-of-../../x-of-2.safetensors", "/etc/x")
    ]
    monkeypatch.setattr(server, "listing", lambda folder: listing)
    open_tiny().close()
    assert {name for _, name, _ in server.asked} <= {
        path.name for path in server.folders[COMMIT].iterdir()
    }


def test_no_modelscope_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    # Port 9 (discard) of this machine: nothing listens.
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "http://127.0.0.1:9")
    with pytest.raises(
        CheckpointError, match=r"9 \(MODELSCOPE_DOMAIN\) cannot be reached \(.*Connec"
    ):
        open_tiny(cache_dir=tmp_path)
    monkeypatch.delenv("MODELSCOPE_DOMAIN")
    gone = socket.gaierror(-2, "Name or service not known")

    def no_address(*_: object) -> None:
        raise gone

    monkeypatch.setattr(socket, "getaddrinfo", no_address)
    with pytest.raises(CheckpointError, match=r": www.modelscope.cn \(ModelScope\) cannot be re"):
        open_tiny(cache_dir=tmp_path)
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "file:///etc")
    with pytest.raises(ConfigError, match="which is no host"):
        open_tiny(cache_dir=tmp_path)


def test_two_downloads_at_once_do_not_mix(server: Server, tmp_path: Path):
    directory = tmp_path / "caches" / "edge-llm" / "modelscope" / "owner--tiny" / COMMIT
    directory.mkdir(parents=True)
    with (
        modelscope._lock(directory, "owner/tiny"),
        pytest.raises(CheckpointError, match="another process"),
    ):
        open_tiny()
    open_tiny().close()


def test_a_hub_is_for_hub_ids(tmp_path: Path):
    folder = tiny.write_checkpoint(tmp_path / "m", "qwen2")
    with pytest.raises(ConfigError, match="--hub is for hub ids"):
        open_checkpoint(str(folder), hub="modelscope")
