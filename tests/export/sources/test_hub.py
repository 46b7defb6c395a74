"""The hub: the real huggingface_hub against a small hub on 127.0.0.1."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from edge.errors import CheckpointError
from export.sources.hub import _missing_bytes, _no_way, choose_gguf
from tests.export.sources.local_server import LocalServer
from tests.export.sources.test_gguf import write_tiny
from tests.makers import tiny_models as tiny

pytestmark = pytest.mark.live

pytest.importorskip("huggingface_hub")

MAIN, TAG = "a" * 40, "b" * 40
# huggingface_hub reads its environment at import: a process of its own, one JSON line per call.
WORKER = """
import json, sys
from pathlib import Path
from edge.errors import EdgeError
from export.sources.opening import open_checkpoint
from edge.bundle.manifest import Source
import msgspec
for line in sys.stdin:
    source, revision, cache_dir = json.loads(line)
    cache_dir = cache_dir and Path(cache_dir)
    try:
        with open_checkpoint(source, revision=revision, cache_dir=cache_dir) as checkpoint:
            norm = checkpoint.tensor("model.norm.weight").astype("float32").tolist()
            answer = {"source": msgspec.to_builtins(checkpoint.source), "norm": norm,
                      "name": checkpoint.name}
    except EdgeError as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)
"""


class Hub(LocalServer):
    """The parts of the hub's HTTP interface that a download uses."""

    def __init__(self) -> None:
        super().__init__()
        self.snapshots: dict[tuple[str, str], Path] = {}
        self.requests: list[tuple[str, str]] = []
        self.gguf: dict[str, dict[str, Any]] = {}

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        parts = unquote(urlsplit(request.path).path).strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        owner, name, *rest = parts[2:] if is_api else parts
        repo = f"{owner}/{name}"
        self.requests.append((request.command, "/".join([repo, *rest])))
        if repo == "owner/gated":
            return self.refuse(request, 403, "GatedRepo")
        if not any(repo == known for known, _ in self.snapshots):
            return self.refuse(request, 401, "RepoNotFound")
        revision = rest[1] if len(rest) > 1 else "main"
        commit = {"main": MAIN, "v1": TAG}.get(revision, revision)
        if (repo, commit) not in self.snapshots:
            return self.refuse(request, 404, "RevisionNotFound")
        folder = self.snapshots[repo, commit]
        files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        if not is_api:
            file = Path(*rest[2:])
            if file not in files:
                return self.refuse(request, 404, "EntryNotFound")
            return self.send(request, (folder / file).read_bytes(), commit)
        if rest[:1] == ["tree"]:
            return self.send_json(request, [tree_entry(folder, file) for file in files])
        siblings = [{"rfilename": str(file)} for file in files]
        info = {"_id": "1", "id": repo, "modelId": repo, "sha": commit, "private": False}
        info["gguf"] = self.gguf.get(repo)
        return self.send_json(request, {**info, "tags": [], "siblings": siblings})

    def refuse(self, request: BaseHTTPRequestHandler, status: int, code: str) -> None:
        request.send_response(status)
        request.send_header("X-Error-Code", code)
        request.send_header("Content-Length", "0")
        request.end_headers()

    def send_json(self, request: BaseHTTPRequestHandler, value: object) -> None:
        self.send(request, json.dumps(value).encode(), None)

    def send(self, request: BaseHTTPRequestHandler, content: bytes, commit: str | None) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(content)))
        request.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        if commit:
            request.send_header("X-Repo-Commit", commit)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(content)


def tree_entry(folder: Path, file: Path) -> dict[str, Any]:
    content = (folder / file).read_bytes()
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return {"type": "file", "path": str(file), "size": len(content), "oid": oid}


class Worker:
    """A process that opens checkpoints under an environment of its own."""

    def __init__(self, home: Path, **environment: str) -> None:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        self.stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            text=True,
            cwd=Path(__file__).parents[3],
            env={**kept, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **environment},
        )

    def open(self, source: str, revision: str | None = None, cache: Path | None = None) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        call = [source, revision, None if cache is None else str(cache)]
        self.process.stdin.write(json.dumps(call) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate(timeout=30)
        with self.stderr:
            self.stderr.seek(0)
            self.said = self.stderr.read()


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[Hub]:
    hub = Hub()
    root = tmp_path_factory.mktemp("hub")
    main = tiny.write_checkpoint(root / "main", "qwen2", num_shards=2)
    (main / "README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    (main / "original").mkdir()
    (main / "original" / "consolidated.safetensors").write_bytes(b"the same weights again")
    (main / "pytorch_model.bin").write_bytes(b"pickle")
    tag = tiny.write_checkpoint(root / "tag", "qwen2", seed=7)
    custom = tiny.write_checkpoint(root / "custom", "llama", auto_map={"AutoModel": "x.Y"})
    nf4 = {"quant_method": "bitsandbytes"}
    quantized = tiny.write_checkpoint(root / "nf4", "llama", quantization_config=nf4)
    files = root / "files"
    files.mkdir()
    (files / "README.md").write_text("GGUF files alone, some of which are read by their names only")
    for quant in ("Q8_0", "BF16"):
        made = write_tiny(root / quant, "qwen2", ggml_type=quant)
        made.rename(files / f"Tiny-{quant}.gguf")
    (files / "mmproj-Tiny-F16.gguf").write_bytes(b"a picture encoder")
    hub.snapshots = {
        ("owner/Tiny-GGUF", MAIN): files,
        ("owner/Gemma-GGUF", MAIN): files,
        ("owner/tiny", MAIN): main,
        ("owner/tiny", TAG): tag,
        ("owner/custom", MAIN): custom,
        ("owner/nf4", MAIN): quantized,
    }
    hub.gguf["owner/Tiny-GGUF"] = {"architecture": "qwen2", "total": 100_000}
    hub.gguf["owner/Gemma-GGUF"] = {"architecture": "gemma3"}
    with hub:
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return Path(tmp_path_factory.mktemp("hf_home"))


@pytest.fixture(scope="module")
def worker(hub: Hub, home: Path) -> Iterator[Worker]:
    with Worker(home, HF_ENDPOINT=hub.url) as worker:
        yield worker


def norm_of(folder: Path, seed: int) -> list[float]:
    config = json.loads((folder / "config.json").read_bytes())
    return [float(x) for x in tiny.make_weights(config, seed)["model.norm.weight"]]


def test_download(hub: Hub, worker: Worker, tmp_path: Path) -> None:
    answer = worker.open("owner/tiny", cache=tmp_path)
    assert "error" not in answer, answer
    folder = hub.snapshots["owner/tiny", MAIN]
    lines = "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
        for path in sorted(folder.glob("*.safetensors"))
    )
    assert answer == {
        "name": "tiny",
        "norm": norm_of(folder, seed=2),
        "source": {
            "kind": "hub",
            "location": "owner/tiny",
            "revision": MAIN,
            "sha256": hashlib.sha256(lines.encode()).hexdigest(),
            "licence": "mit",
            "adapter": None,
            "quantization": None,
        },
    }
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert "model-00001-of-00002.safetensors" in names
    assert not {"pytorch_model.bin", "consolidated.safetensors"} & names


@pytest.mark.parametrize("revision", ["v1", TAG])
def test_a_revision_is_resolved_to_its_commit(hub, worker, revision, tmp_path: Path) -> None:
    answer = worker.open("owner/tiny", revision=revision, cache=tmp_path)
    assert answer["source"]["revision"] == TAG
    assert answer["norm"] == norm_of(hub.snapshots["owner/tiny", TAG], seed=7)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("owner/custom", "auto_map asks for Python code"),
        ("owner/nf4", "quant_method is bitsandbytes: NF4"),
    ],
)
def test_a_model_that_is_refused_costs_no_download(
    source: str, words: str, hub, worker, tmp_path: Path
) -> None:
    assert words in worker.open(source, cache=tmp_path)["error"]
    resolved = [path for _, path in hub.requests if path.startswith(f"{source}/resolve")]
    assert any(path.endswith("/config.json") for path in resolved)
    assert not any(path.endswith(".safetensors") for path in resolved)


@pytest.mark.parametrize(
    ("source", "revision", "words"),
    [
        ("owner/missing", None, ["owner/missing was not found on the hub", "HF_TOKEN"]),
        ("owner/gated", None, ["owner/gated is gated", "accept its terms", "HF_TOKEN"]),
        ("owner/tiny", "v9", ["owner/tiny has no revision 'v9'"]),
        ("owner/tiny", "c" * 40, ["owner/tiny has no revision"]),
        ("owner/ti--ny", None, ["is no hub id"]),
    ],
)
def test_errors_say_what_to_do(worker, source, revision, words, tmp_path: Path) -> None:
    error = worker.open(source, revision=revision, cache=tmp_path)["error"]
    assert error.startswith("CheckpointError: ")
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    "source",
    [
        "hf.co/owner/Tiny-GGUF:q8_0",
        "https://huggingface.co/owner/Tiny-GGUF:Tiny-Q8_0.gguf",
        "huggingface.co/owner/Tiny-GGUF:Q8_0/",
    ],
)
def test_a_quantization_names_one_gguf_file(
    source: str, hub: Hub, worker: Worker, tmp_path: Path
) -> None:
    answer = worker.open(source, cache=tmp_path)
    assert "error" not in answer, answer
    assert answer["name"] == "Tiny-Q8_0"
    assert answer["source"]["location"] == "Tiny-Q8_0.gguf"
    assert {path.name for path in tmp_path.rglob("*.gguf")} == {"Tiny-Q8_0.gguf"}


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("hf.co/owner/Tiny-GGUF:Q4_K_M", "-GGUF has no GGUF file Q4_K_M; it has BF16, Q8_0"),
        ("hf.co/owner/Tiny-GGUF", "GGUF files alone; say which one: hf.co/owner/Tiny-GGUF with one "
         "of :BF16, :Q8_0"),
        ("hf.co/owner/tiny:Q8_0", "owner/tiny has no GGUF file; leave out :Q8_0"),
        ("hf.co/owner/Gemma-GGUF:Q8_0", "'gemma3', which is not supported; Gemma 3 needs"),
        ("hf.co/owner/missing:Q8_0", "owner/missing was not found on the hub"),
        ("hf.co/owner/tiny/blob/main/x.gguf", "no hub id (owner/name)"),
    ],
)  # fmt: skip
def test_what_names_no_gguf_file_says_which_there_are(
    source: str, words: str, hub: Hub, worker: Worker, tmp_path: Path
) -> None:
    assert words in worker.open(source, cache=tmp_path)["error"]
    assert not list(tmp_path.rglob("*.gguf"))


def test_a_full_address_is_a_hub_id(hub: Hub, worker: Worker, tmp_path: Path) -> None:
    whole = worker.open("owner/tiny", cache=tmp_path)
    for address in ("https://huggingface.co/owner/tiny", "hf.co/owner/tiny/tree/main"):
        assert worker.open(address, cache=tmp_path) == whole


def test_offline_a_gguf_file_is_found_among_those_that_are_cached(
    hub: Hub, worker: Worker, home: Path
) -> None:
    online = worker.open("hf.co/owner/Tiny-GGUF:BF16")
    with Worker(home, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1") as offline:
        assert offline.open("hf.co/owner/Tiny-GGUF:BF16") == online
        assert "; it has BF16" in offline.open("hf.co/owner/Tiny-GGUF:Q8_0")["error"]


NAMES = [
    "x-Q4_K_M.gguf", "x-UD-Q4_K_XL.gguf", "x-Q4_K_XL.gguf", "x.IQ4_XS.gguf", "x-imatrix-Q2_K.gguf",
    "Q8_0/x-Q8_0-00001-of-00002.gguf", "Q8_0/x-Q8_0-00002-of-00002.gguf", "F16/x-F16.gguf",
    "f16/x-f16.gguf", "imatrix_x.gguf", "x.safetensors", "strange.gguf", "x-fp16.gguf",
]  # fmt: skip


@pytest.mark.parametrize(
    ("tag", "chosen"),
    [
        ("Q4_K_M", "x-Q4_K_M.gguf"),
        ("q4_k_xl", "x-Q4_K_XL.gguf"),
        ("UD-Q4_K_XL", "x-UD-Q4_K_XL.gguf"),
        ("IQ4_XS", "x.IQ4_XS.gguf"),
        ("strange", "strange.gguf"),
        ("f16", "f16/x-f16.gguf"),
        ("x-fp16.gguf", "x-fp16.gguf"),
    ],
)
def test_the_file_that_a_tag_means(tag: str, chosen: str) -> None:
    assert choose_gguf(NAMES, tag, "o/x") == chosen


@pytest.mark.parametrize(
    ("names", "tag", "words"),
    [
        (NAMES, "Q8_0", "o/x has Q8_0 in 2 parts; .* llama-gguf-split --merge"),
        (["a-Q2_K.gguf", "b-Q2_K.gguf"], "Q2_K", "several files Q2_K: a-Q2_K.gguf, b-Q2_K.gguf; g"),
        (NAMES, "Q4_K", r"has no GGUF file Q4_K; it has F16, IQ4_XS, Q2_K, Q4_K_M, "),
        (["mmproj-F16.gguf"], "F16", "o/x has no GGUF file; leave out :F16"),
    ],
)
def test_a_tag_that_means_no_single_file(names: list[str], tag: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        choose_gguf(names, tag, "o/x")


def test_offline_takes_what_is_cached(hub: Hub, worker: Worker, home: Path) -> None:
    online = worker.open("owner/tiny")  # the cache of HF_HOME
    num_requests = len(hub.requests)
    with Worker(home, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1") as offline:
        assert offline.open("owner/tiny") == online
        error = offline.open("owner/other")["error"]
    assert "HF_HUB_OFFLINE" in error
    assert len(hub.requests) == num_requests


SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]


@pytest.mark.parametrize(
    ("cached", "missing"),
    [
        ([], None),
        (["model.safetensors"], 0),
        (["gptq_model-4bit-128g.safetensors"], 0),
        (["model.safetensors.index.json"], None),
        (["model.safetensors.index.json", SHARDS[0]], None),
        (["model.safetensors.index.json", *SHARDS], 0),
    ],
)
def test_offline_only_weights_that_are_there_are_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cached: list[str], missing: int | None
) -> None:
    """The small files of a dry run are in the cache without them."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "config.json").touch()
    index = {"metadata": {}, "weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}
    for name in cached:
        (tmp_path / name).write_text(json.dumps(index))
    assert _missing_bytes("owner/tiny", MAIN, tmp_path) == missing


def test_no_hub_there(tmp_path: Path) -> None:
    # Port 9 (discard) of this machine: nothing listens.
    with Worker(tmp_path, HF_ENDPOINT="http://127.0.0.1:9") as unreachable:
        error = unreachable.open("owner/tiny")["error"]
    assert error.startswith("CheckpointError: owner/tiny is not whole in the local cache, and ")
    assert "127.0.0.1:9 (HF_ENDPOINT) cannot be reached (Connection refused)" in error
    assert unreachable.said == ""  # the library's log of each try


def test_a_host_without_an_address_is_asked_for_once(
    hub: Hub, home: Path, worker: Worker, tmp_path: Path
) -> None:
    """RFC 6761: no name under .invalid has one. What the cache has whole is still taken."""
    whole = worker.open("owner/tiny")
    environment = {"HF_ENDPOINT": "https://hf-mirror.invalid", "HF_HUB_VERBOSITY": "warning"}
    with Worker(tmp_path, **environment) as unreachable:
        error = unreachable.open("owner/tiny", revision="a" * 40)["error"]  # as `pull` asks
    assert "hf-mirror.invalid (HF_ENDPOINT) cannot be reached" in error
    assert "Retrying" not in unreachable.said
    with Worker(home, **environment) as cached:
        assert cached.open("owner/tiny") == whole


def test_a_hub_that_breaks_off_is_no_traceback(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closing = threading.Thread(target=close_each, args=(server,), daemon=True)
        closing.start()
        port = server.getsockname()[1]
        with Worker(tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{port}") as broken:
            error = broken.open("owner/tiny")["error"]
        server.shutdown(socket.SHUT_RDWR)
        closing.join()
    # The oldest huggingface_hub looks into its cache first, the newest hands the failure on.
    assert re.match(
        "CheckpointError: owner/tiny (could not be downloaded from|is not whole in the local cache,"
        rf" and) 127.0.0.1:{port} \(HF_ENDPOINT\)",
        error,
    )


def close_each(server: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the listener is shut
        while True:
            server.accept()[0].close()


@pytest.mark.parametrize(
    ("proxy", "bypass", "asks"),
    [("", "", True), ("http://p:1", "", False), ("http://p:1", "*", True)],
)
def test_behind_a_proxy_only_the_proxy_knows(
    proxy: str, bypass: str, asks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http", "https", "all", "no"):
        monkeypatch.delenv(f"{name}_proxy", raising=False)
        monkeypatch.delenv(f"{name.upper()}_PROXY", raising=False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    if proxy:
        monkeypatch.setenv("https_proxy", proxy)
    monkeypatch.setenv("no_proxy", bypass)
    said = "hf.invalid (the Hugging Face hub) cannot be reached ("
    assert (_no_way("https://hf.invalid") or "").startswith(said) == asks
