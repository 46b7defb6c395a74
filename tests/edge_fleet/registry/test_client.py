"""What a registry may do, and where credentials go: servers of our own stand in for bad ones."""

from __future__ import annotations

import base64
import io
import json
import shutil
import socket
import ssl
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import urllib3
from hypothesis import given
from hypothesis import strategies as st

from edge.errors import ConfigError, EdgeError, IntegrityError, RegistryError
from edge_fleet.registry import artifact as artifacts
from edge_fleet.registry import client as clients
from edge_fleet.registry.client import MANIFEST_TYPE, Registry, digest_of
from edge_fleet.registry.credentials import Credentials, find_credentials
from edge_fleet.registry.reference import parse_reference

Answer = tuple[int, dict[str, str], bytes]
USER = Credentials("alice", "wonderland")
BASIC = "Basic " + base64.b64encode(b"alice:wonderland").decode()


class Server:
    """A server that answers by a function; it remembers who asked what with which key.

    The header ``Missing`` makes it announce that many bytes more than it sends; the status 0 makes
    it hang up.
    """

    def __init__(
        self,
        answer: Callable[[str, dict[str, str]], Answer],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.asked: list[tuple[str, str | None]] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_PUT(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.do_GET()

            def do_POST(self) -> None:
                self.do_PUT()

            def do_GET(self) -> None:
                owner.asked.append((self.path, self.headers["Authorization"]))
                status, headers, body = answer(self.path, dict(self.headers))
                if not status:
                    self.close_connection = True
                    return
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                missing = int(headers.get("Missing", 0))
                self.send_header("Content-Length", str(len(body) + missing))
                self.end_headers()
                self.wfile.write(body)
                self.close_connection = self.close_connection or missing > 0

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.address = f"127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(*arguments: Any) -> Server:
        servers.append(Server(*arguments))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def client(server: Server | Drip, credentials: Credentials | None = USER) -> Registry:
    return Registry(parse_reference(f"{server.address}/r1"), credentials=credentials)


@pytest.mark.live
def test_a_password_is_sent_when_it_is_asked_for(serve: Callable[..., Server]):
    def answer(_: str, headers: dict[str, str]) -> Answer:
        if headers.get("Authorization") != BASIC:
            return 401, {"WWW-Authenticate": 'Basic realm="r"'}, b""
        return 200, {}, b"{}"

    server = serve(answer)
    with client(server) as registry:
        assert registry.manifest("v1")[0] == b"{}"
        registry.manifest("v1")
    assert [key for _, key in server.asked] == [None, BASIC, BASIC]
    with client(server, Credentials("alice", "wrong")) as registry:
        with pytest.raises(ConfigError, match="refuses the credentials") as caught:
            registry.manifest("v1")
        assert "wrong" not in str(caught.value)
    with client(server, None) as registry, pytest.raises(ConfigError, match="there are none"):
        registry.manifest("v1")


@pytest.mark.live
def test_a_token_is_fetched_where_the_registry_says(serve: Callable[..., Server]):
    def tokens(path: str, headers: dict[str, str]) -> Answer:
        assert "scope=repository%3Ar1%3Apull" in path
        assert "service=it" in path
        right = headers.get("Authorization") == BASIC
        return (200, {}, b'{"token": "t0"}') if right else (401, {}, b"")

    token_server = serve(tokens)
    challenge = f'Bearer realm="http://{token_server.address}/token",service="it"'

    def answer(_: str, headers: dict[str, str]) -> Answer:
        if headers.get("Authorization") != "Bearer t0":
            return 401, {"WWW-Authenticate": challenge}, b""
        return 200, {}, b"{}"

    server = serve(answer)
    with client(server) as registry:
        registry.manifest("v1")
    assert [key for _, key in server.asked] == [None, "Bearer t0"]
    denied = pytest.raises(ConfigError, match="refuses the credentials")
    with client(server, Credentials("a", "b")) as registry, denied:
        registry.manifest("v1")


@pytest.mark.live
def test_a_redirect_gets_the_blob_and_no_credentials(serve: Callable[..., Server]):
    blob = b"weights"
    store = serve(lambda *_: (200, {}, blob))

    def answer(path: str, headers: dict[str, str]) -> Answer:
        if headers.get("Authorization") != BASIC:
            return 401, {"WWW-Authenticate": "Basic"}, b""
        return 307, {"Location": f"http://{store.address}/elsewhere"}, b""

    with client(serve(answer)) as registry:
        assert registry.blob(digest_of(blob), len(blob)) == blob
    assert store.asked == [("/elsewhere", None)]


@pytest.mark.live
def test_redirects_end(serve: Callable[..., Server]):
    server = serve(lambda *_: (302, {"Location": "/again"}, b""))
    with client(server) as registry, pytest.raises(RegistryError, match="is not followed"):
        registry.blob(digest_of(b""), 0)
    assert len(server.asked) < 10
    outside = serve(lambda *_: (302, {"Location": "file:///etc/passwd"}, b""))
    with client(outside) as registry, pytest.raises(RegistryError, match="is not followed"):
        registry.blob(digest_of(b""), 0)


@pytest.mark.live
@pytest.mark.parametrize(
    "challenge",
    ["", "Negotiate", "Bearer", 'Bearer realm="file:///etc/passwd"', 'Bearer realm=""'],
)
def test_an_unknown_challenge_is_refused(serve: Callable[..., Server], challenge: str):
    server = serve(lambda *_: (401, {"WWW-Authenticate": challenge}, b""))
    with client(server) as registry, pytest.raises(RegistryError, match="not known or not safe"):
        registry.manifest("v1")


@pytest.mark.live
def test_a_registry_that_is_busy_is_asked_again(
    serve: Callable[..., Server], quick: Callable[[], list[float]]
):
    statuses = [503, 429, 200]
    server = serve(lambda *_: (statuses.pop(0), {"Retry-After": "3"}, b"{}"))
    with client(server) as registry:
        assert registry.manifest("v1")[0] == b"{}"
    assert quick() == [3.0, 3.0]
    broken = serve(lambda *_: (500, {}, b"out of \x1b[31mdisk"))
    with client(broken) as registry, pytest.raises(RegistryError, match="gives 500") as caught:
        registry.manifest("v1")
    assert caught.value.exit_code == 75
    assert "\x1b" not in str(caught.value)


@pytest.mark.live
def test_a_line_that_breaks_is_waited_for_once_something_has_come(
    serve: Callable[..., Server], quick: Callable[[], list[float]]
):
    statuses = [0] * 4
    server = serve(lambda *_: (statuses.pop() if statuses else 200, {}, b"{}"))
    with client(server) as registry:
        with pytest.raises(RegistryError, match="is the address right"):
            registry.manifest("v1")
        assert sum(quick()) < 5
        registry.manifest("v1")
        statuses.extend([0] * 18)
        registry.manifest("v1")
        assert 120 < sum(quick()) < 130
        assert max(quick()) < 10  # for that long an interrupt may have to wait
        statuses.extend([0] * 20)
        with pytest.raises(RegistryError, match="run the same again"):
            registry.manifest("v1")


@pytest.mark.live
def test_retries_end_after_two_minutes_however_long_each_takes(
    serve: Callable[..., Server], quick: Callable[[], list[float]]
):
    """As where a line takes a request and nothing comes back."""

    def answer(*_: object) -> Answer:
        if len(server.asked) > 1:
            quick().append(60.0)
            return 0, {}, b""
        return 200, {}, b"{}"

    server = serve(answer)
    with client(server) as registry:
        registry.manifest("v1")
        with pytest.raises(RegistryError, match="gives no answer"):
            registry.manifest("v1")
    assert len(server.asked) <= 1 + 4


@pytest.mark.live
def test_a_certificate_that_does_not_hold_is_named_at_once_with_the_clock(
    serve: Callable[..., Server], quick: Callable[[], list[float]], tmp_path: Path
):
    if shutil.which("openssl") is None:
        pytest.skip("needs Debian's package openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-keyout", key, "-out", certificate, "-subj", "/CN=x"],
        check=True, capture_output=True,
    )  # fmt: skip
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    server = serve(lambda *_: (200, {}, b"{}"), tls)
    reference = parse_reference(f"{server.address}/r1")
    with (
        Registry(reference, plain_http=False, credentials=USER) as registry,
        pytest.raises(RegistryError, match=r"certificate is refused .*is the clock") as caught,
    ):
        registry.manifest("v1")
    assert "network" not in str(caught.value)
    assert not quick()
    assert not server.asked
    # A handshake that breaks off is no such thing.
    reference = parse_reference(f"{serve(lambda *_: (200, {}, b'')).address}/r1")
    with (
        Registry(reference, plain_http=False, credentials=USER) as registry,
        pytest.raises(RegistryError, match="the network up"),
    ):
        registry.manifest("v1")
    assert len(quick()) == 3


@pytest.mark.live
def test_a_token_is_asked_for_again(serve: Callable[..., Server], quick: Callable[[], list[float]]):
    statuses = [200, 503, 0]
    token_server = serve(lambda *_: (statuses.pop(), {}, b'{"token": "t0"}'))
    challenge = f'Bearer realm="http://{token_server.address}/token"'

    def answer(_: str, headers: dict[str, str]) -> Answer:
        found = headers.get("Authorization") == "Bearer t0"
        return (200, {}, b"{}") if found else (401, {"WWW-Authenticate": challenge}, b"")

    with client(serve(answer)) as registry:
        assert registry.manifest("v1")[0] == b"{}"
    assert quick() == [0.5, 1.0]


@pytest.mark.live
def test_a_manifest_without_end_is_refused(serve: Callable[..., Server]):
    server = serve(lambda *_: (200, {}, bytes(5 << 20)))
    with client(server) as registry, pytest.raises(IntegrityError, match="is longer than"):
        registry.manifest("v1")


@pytest.mark.live
def test_a_manifest_that_breaks_off_is_asked_for_again(
    serve: Callable[..., Server], quick: Callable[[], list[float]]
):
    missing = [5, 5, 0]

    def answer(*_: object) -> Answer:
        return 200, {"Missing": str(missing.pop(0) if missing else 5)}, b"{}"

    server = serve(answer)
    with client(server) as registry:
        assert registry.manifest("v1")[0] == b"{}"
        with pytest.raises(RegistryError, match="gives no answer") as caught:
            registry.manifest("v1")
    assert caught.value.exit_code == 75
    assert len(server.asked) == 3 + len(quick()) - 1


@pytest.mark.live
def test_a_broken_upload_is_begun_again_in_another_place(
    serve: Callable[..., Server], quick: Callable[[], list[float]]
):
    statuses = [404, 416, 503, 201]

    def answer(path: str, _: object) -> Answer:
        if path.endswith("/uploads/"):
            return 202, {"Location": f"/place/{len(statuses)}"}, b""
        status = statuses.pop(0) if statuses else 404
        return status, {"Retry-After": "8"} if status == 503 else {}, b""

    server = serve(answer)
    with client(server) as registry:
        registry.put_blob(b"weights", digest_of(b"weights"))
        places = [path.partition("?")[0] for path, _ in server.asked if path.startswith("/place")]
        assert places == ["/place/4", "/place/3", "/place/2", "/place/1"]
        assert quick() == [0.5, 1.0, 8.0]  # as the last one asked
        with pytest.raises(RegistryError, match="gives 404") as caught:
            registry.put_blob(b"weights", digest_of(b"weights"))
    assert caught.value.exit_code == 75


@pytest.mark.live
def test_a_slow_line_has_its_time_for_each_piece(monkeypatch: pytest.MonkeyPatch):
    """All together may take longer than a connect: 16 MiB at 12 MB/s, and 0.7 s for each piece."""
    monkeypatch.setattr(clients, "_CONNECT_S", 0.7)
    monkeypatch.setattr(clients, "_TRIES", 1)
    blob, got = bytes(16 << 20), []

    def slow(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection, connection.makefile("rb") as file:
            for answer in (b"202 A\r\nLocation: /place", b"201 C"):
                size = 0
                while line := file.readline().strip().lower():
                    if line.startswith(b"content-length:"):
                        size = int(line.partition(b":")[2])
                left = size
                while left and (data := file.read(min(left, 1 << 17))):
                    left -= len(data)
                    time.sleep(0.01)
                got.append(size - left)
                connection.sendall(b"HTTP/1.1 " + answer + b"\r\nContent-Length: 0\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        thread = threading.Thread(target=slow, args=(listening,), daemon=True)
        thread.start()
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        with Registry(parse_reference(f"{address}/r1"), credentials=USER) as registry:
            registry.put_blob(blob, digest_of(blob))
        thread.join(10)
    assert got == [0, len(blob)]


@pytest.mark.live
@pytest.mark.parametrize("place", ["https://[bad/", "http://a.b:99999/"])
def test_a_place_that_is_no_address_is_refused(serve: Callable[..., Server], place: str):
    def answer(path: str, _: object) -> Answer:
        if "manifests" in path:
            return 401, {"WWW-Authenticate": f'Bearer realm="{place}"'}, b""
        return (202 if path.endswith("/uploads/") else 307), {"Location": place}, b""

    with client(serve(answer)) as registry:
        for ask in (
            lambda: registry.blob(digest_of(b""), 0),
            lambda: registry.put_blob(b"", digest_of(b"")),
            lambda: registry.manifest("v1"),
        ):
            with pytest.raises(RegistryError, match="points to"):
                ask()


@pytest.mark.parametrize(
    ("url", "same"),
    [
        ("https://a.b:443/v2/", True),
        ("https://A.b/v2/", True),
        ("http://a.b/v2/", False),
        ("https://a.b:444/v2/", False),
        ("https://b/v2/", False),
    ],
)
def test_a_registry_is_known_by_any_spelling_of_its_address(url: str, same: bool):
    assert (clients._origin(url) == clients._origin("https://a.b")) == same


@pytest.mark.live
@pytest.mark.parametrize("scheme", ["http://", ""])
def test_a_proxy_gets_the_password_of_its_address(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, scheme: str
):
    keys: list[str] = []

    def answer(_: str, headers: dict[str, str]) -> Answer:
        keys.extend(headers[name] for name in headers if name.lower() == "proxy-authorization")
        return 200, {}, b"{}"

    proxy = serve(answer)
    monkeypatch.setenv("http_proxy", f"{scheme}alice:wonder%6Cand@{proxy.address}")
    monkeypatch.setenv("no_proxy", "")
    reference = parse_reference("registry.example.com/r1")
    with Registry(reference, plain_http=True) as registry:
        assert registry.manifest("v1")[0] == b"{}"
    assert keys == [BASIC]
    assert proxy.asked[0][0].startswith("http://registry.example.com/v2/r1/manifests")


@pytest.mark.live
def test_each_host_is_asked_through_the_proxy_or_not(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
):
    proxy = serve(lambda *_: (200, {}, b"weights"))
    monkeypatch.setenv("http_proxy", f"http://{proxy.address}")
    monkeypatch.setenv("no_proxy", "near.example.com,far.example.com:5000")
    server = serve(lambda *_: (307, {"Location": "http://far.example.com/blob"}, b""))
    with client(server) as registry:
        assert registry.blob(digest_of(b"weights"), 7) == b"weights"
        assert proxy.asked == [("http://far.example.com/blob", None)]
        near = registry._pool(f"http://{server.address}/")
        assert registry._pool("http://near.example.com/") is near
        assert registry._pool("http://far.example.com:5000/") is near
        assert registry._pool("http://far.example.com/") is not near


# ------------------------------------------------------------------------------- credentials


def entry(user: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


def test_credentials_are_those_of_docker_and_podman(tmp_path: Path):
    docker, podman = tmp_path / "config.json", tmp_path / "auth.json"
    docker.write_text(json.dumps({"auths": {"a.b": entry("d", "1:2"), "c.d:5000": {}}}))
    podman.write_text(json.dumps({"auths": {"a.b": entry("p", "x")}}))
    environ = {"DOCKER_CONFIG": str(tmp_path)}
    assert find_credentials("a.b", environ) == Credentials("d", "1:2")
    assert find_credentials("c.d:5000", environ) is None
    assert find_credentials("a.b:443", environ) is None
    environ["REGISTRY_AUTH_FILE"] = str(podman)
    assert find_credentials("a.b", environ) == Credentials("p", "x")
    environ["DOCKER_AUTH_CONFIG"] = json.dumps({"auths": {"https://a.b": entry("g", "y")}})
    found = find_credentials("a.b", environ)
    assert found == Credentials("g", "y")
    assert "y" not in repr(found).replace("Credentials", "")


def test_podmans_own_files_are_found_and_the_most_specific_entry_counts(tmp_path: Path):
    home, running = tmp_path / "home", tmp_path / "run"
    lasting, fleeting = home / ".config" / "containers", running / "containers"
    for folder in (lasting, fleeting):
        folder.mkdir(parents=True)
    auths = {"a.b": entry("all", "1"), "a.b/team": entry("team", "2"), "a.b/t": entry("t", "3")}
    (fleeting / "auth.json").write_text(json.dumps({"auths": auths}))
    (lasting / "auth.json").write_text(
        json.dumps({"auths": {"a.b": entry("x", "4"), "c.d": entry("old", "5")}})
    )
    environ = {"HOME": str(home), "XDG_RUNTIME_DIR": str(running)}
    assert find_credentials("a.b", environ, "team/r1") == Credentials("team", "2")
    assert find_credentials("a.b", environ, "r1") == Credentials("all", "1")
    assert find_credentials("c.d", environ, "r1") == Credentials("old", "5")
    # Of the files of others nothing is known; a file that was named must be there to read.
    (fleeting / "auth.json").rename(running / "kept")
    fleeting.rmdir()
    fleeting.write_text("no directory")
    assert find_credentials("c.d", environ, "r1") == Credentials("old", "5")
    named = environ | {"REGISTRY_AUTH_FILE": str(fleeting / "auth.json")}
    with pytest.raises(ConfigError, match="cannot read the credentials"):
        find_credentials("c.d", named, "r1")
    # Whoever says where to look means that place alone.
    assert find_credentials("c.d", environ | {"DOCKER_CONFIG": str(tmp_path)}, "r1") is None


@pytest.mark.usefixtures("homeless")
def test_without_a_home_there_are_the_credentials_that_are_elsewhere(tmp_path: Path):
    assert find_credentials("a.b", {}) is None
    (tmp_path / "containers").mkdir()
    auths = json.dumps({"auths": {"a.b": entry("me", "x")}})
    (tmp_path / "containers" / "auth.json").write_text(auths)
    assert find_credentials("a.b", {"XDG_RUNTIME_DIR": f"{tmp_path}"}) == Credentials("me", "x")


@pytest.mark.parametrize("key", ["https://index.docker.io/v1/", "docker.io", "docker.io/me"])
def test_docker_hub_is_known_by_the_names_that_logins_use(key: str):
    environ = {
        "DOCKER_CONFIG": "/none",
        "DOCKER_AUTH_CONFIG": json.dumps({"auths": {key: entry("me", "x")}}),
    }
    for host in ("docker.io", "registry-1.docker.io"):
        assert find_credentials(host, environ, "me/r1") == Credentials("me", "x")
    assert find_credentials("a.b", environ, "me/r1") is None


def test_an_identity_token_is_no_password(tmp_path: Path):
    token = entry("00000000-0000-0000-0000-000000000000", "") | {"identitytoken": "t"}
    environ = {"DOCKER_CONFIG": "/none"}
    for found in (token, {"identitytoken": "t"}):
        environ["DOCKER_AUTH_CONFIG"] = json.dumps({"auths": {"a.b": found}})
        with pytest.raises(ConfigError, match="only an identity token"):
            find_credentials("a.b", environ)
    # A later file may have a password.
    later = tmp_path / "config.json"
    later.write_text(json.dumps({"auths": {"a.b": entry("u", "p")}}))
    assert find_credentials("a.b", environ | {"DOCKER_CONFIG": str(tmp_path)}) == Credentials(
        "u", "p"
    )
    both = entry("u", "p") | {"identitytoken": "t"}
    environ["DOCKER_AUTH_CONFIG"] = json.dumps({"auths": {"a.b": both}})
    assert find_credentials("a.b", environ) == Credentials("u", "p")


def test_helpers_are_asked_as_docker_asks_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = tmp_path / "docker-credential-here"
    program.write_text(
        "#!/bin/sh\nread host\n"
        '[ "$host" = c.d ] && { echo \'{"Username": "<token>", "Secret": "s"}\'; exit; }\n'
        '[ "$host" = a.b ] || [ "$host" = https://index.docker.io/v1/ ] ||'
        ' { echo "credentials not found in it"; exit 1; }\n'
        'echo \'{"Username": "h", "Secret": "s"}\'\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "config.json").write_text('{"credsStore": "here"}')
    environ = {"DOCKER_CONFIG": str(tmp_path)}
    assert find_credentials("a.b", environ) == Credentials("h", "s")
    assert find_credentials("docker.io", environ) == Credentials("h", "s")
    assert find_credentials("other", environ) is None
    with pytest.raises(ConfigError, match="only an identity token"):
        find_credentials("c.d", environ)
    for config, message in (
        ({"credsStore": "../../bin/sh"}, "no name of a program"),
        ({"credHelpers": {"a.b": "missing"}}, "cannot be asked"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ConfigError, match=message):
            find_credentials("a.b", environ)


@given(
    st.binary(max_size=100)
    | st.text(max_size=60).map(lambda auth: json.dumps({"auths": {"a.b": {"auth": auth}}}).encode())
)
def test_any_file_gives_credentials_or_an_error(data: bytes):
    text = data.decode("utf-8", "replace").replace("\0", "")
    try:
        found = find_credentials("a.b", {"DOCKER_AUTH_CONFIG": text, "DOCKER_CONFIG": "/none"})
    except ConfigError:
        return
    assert found is None or found.user


_LAYER = st.fixed_dictionaries(
    {
        "mediaType": st.sampled_from(
            [artifacts.MANIFEST_LAYER, artifacts.FILE_LAYER, artifacts.CHUNK_LAYER, "x"]
        ),
        "digest": st.sampled_from([digest_of(b""), "sha256:0", "md5:0"]),
        "size": st.integers(-1, 1 << 40),
        "annotations": st.dictionaries(
            st.sampled_from([artifacts.TITLE, artifacts.FILE, artifacts.OFFSET]),
            st.sampled_from(["manifest.json", "a.onnx", "../a", "0", "5", "-1", "٣", ""]),
        ),
    }
)


@given(st.lists(_LAYER, max_size=4))
def test_whatever_a_registry_lists_is_whole_files_or_an_error(layers: list[dict[str, object]]):
    image = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": artifacts.ARTIFACT_TYPE,
        "config": {"mediaType": artifacts.EMPTY_TYPE, "digest": digest_of(b"{}"), "size": 2},
        "layers": layers,
    }
    try:
        _, contents = artifacts.decode(json.dumps(image).encode(), "it")
    except EdgeError:
        return
    for name, pieces in contents.pieces.items():
        assert "/" not in name
        end = 0
        for piece in pieces:
            assert piece.offset == end
            end += piece.num_bytes


@pytest.mark.parametrize(
    ("root", "place", "found"),
    [
        ("a.b/r1", "/v2/r1/u/1?x=y", "https://a.b/v2/r1/u/1?x=y"),
        ("a.b:5000/r1", "http://a.b/v2/u", "https://a.b:5000/v2/u"),  # a proxy ends TLS
        ("a.b/r1", "https://store.c/u", "https://store.c/u"),
        ("a.b/r1", "http://store.c/u", None),
        ("a.b/r1", "ftp://a.b/u", None),
        ("localhost:5000/r1", "http://localhost:5000/u", "http://localhost:5000/u"),
    ],
)
def test_a_blob_goes_nowhere_without_tls_unless_the_registry_has_none(
    root: str, place: str, found: str | None
):
    with Registry(parse_reference(root), credentials=USER) as registry:
        if found is None:
            with pytest.raises(RegistryError, match="without TLS"):
                registry._upload_place(place)
        else:
            assert registry._upload_place(place) == found


@pytest.mark.parametrize(
    ("root", "place", "is_followed"),
    [
        ("a.b/r1", "https://store.c/m", True),
        ("a.b/r1", "http://store.c/m", False),
        ("a.b/r1", "ftp://store.c/m", False),
        ("localhost:5000/r1", "https://store.c/m", True),
        ("localhost:5000/r1", "http://store.c/m", True),
    ],
)
def test_a_redirect_away_from_tls_is_not_followed(
    root: str, place: str, is_followed: bool, monkeypatch: pytest.MonkeyPatch
):
    """Whoever listens would see what is fetched, and could put another manifest in its place."""
    asked: list[str] = []

    def request(_pool: object, _method: str, url: str, **_options: object) -> urllib3.HTTPResponse:
        asked.append(url)
        answers = url == place
        headers = {} if answers else {"Location": place}
        body = io.BytesIO(b"{}" if answers else b"")
        return urllib3.HTTPResponse(body, headers, 200 if answers else 307, preload_content=False)

    monkeypatch.setattr(urllib3.PoolManager, "request", request)
    with Registry(parse_reference(root), credentials=USER) as registry:
        if is_followed:
            assert registry.manifest("v1")[0] == b"{}"
        else:
            with pytest.raises(RegistryError, match="is not followed"):
                registry.manifest("v1")
    assert asked[1:] == ([place] if is_followed else [])


@pytest.mark.parametrize(
    ("root", "realm"),
    [("a.b/r1", "http://a.b/token"), ("localhost:5000/r1", "http://elsewhere.c/token")],
)
def test_a_password_goes_nowhere_without_tls(root: str, realm: str):
    registry = Registry(parse_reference(root), credentials=USER)
    with registry, pytest.raises(RegistryError, match="not safe"):
        registry._authenticate(f'Bearer realm="{realm}"', push=False)


class Drip:
    """A server that sends a byte at a time, for ever: what comes before it, and what it repeats."""

    def __init__(self, begin: bytes, byte: bytes, pause_s: float) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self._begin, self._byte, self._pause_s = begin, byte, pause_s
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):  # closed
            while True:
                line, _ = self._socket.accept()
                threading.Thread(target=self._drip, args=(line,), daemon=True).start()

    def _drip(self, line: socket.socket) -> None:
        with line, suppress(OSError):  # the client has gone
            line.recv(1 << 16)
            line.sendall(self._begin)
            while True:
                time.sleep(self._pause_s)
                line.sendall(self._byte)

    def close(self) -> None:
        self._socket.close()


_BODY = b"HTTP/1.1 200 OK\r\nContent-Length: 4000000\r\n\r\n"


@pytest.mark.live
@pytest.mark.parametrize(
    "begin",
    [
        _BODY,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffff\r\n",
        _BODY.replace(b"200 OK", b"404 Not Found"),
        _BODY.replace(b"200 OK", b"302 Found\r\nLocation: /elsewhere"),
        _BODY.replace(b"200 OK", b'401 No\r\nWWW-Authenticate: Basic realm="r"'),
    ],
    ids=["body", "chunks", "error", "redirect", "challenge"],
)
def test_a_registry_that_drips_is_not_followed_for_ever(
    begin: bytes, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(clients, "_SLOW_S", 0.5)
    drip = Drip(begin, b"x", 0.02)
    try:
        with client(drip) as registry, pytest.raises(RegistryError) as caught:
            registry.manifest("v1")
    finally:
        drip.close()
    assert "sends too slowly: " in str(caught.value)
    assert "run the same again later" in str(caught.value)


@pytest.mark.live
def test_a_head_that_drips_is_hung_up_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(clients, "_READ_S", 0.5)  # a byte comes well within that, again and again
    monkeypatch.setattr(clients, "_TRIES", 2)
    monkeypatch.setattr(clients, "_FIRST_PAUSE_S", 0.0)
    drip = Drip(b"HTTP/1.1 200 OK\r\nX: ", b"x", 0.02)
    try:
        with client(drip) as registry, pytest.raises(RegistryError, match="gives no answer"):
            registry.manifest("v1")
    finally:
        drip.close()


@pytest.mark.live
def test_a_slow_line_is_judged_by_what_all_its_connections_bring(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
):
    """Four that share 2 KiB a second have less than one each, and the pull goes on."""
    monkeypatch.setattr(clients, "_SLOW_S", 0.2)
    with client(serve(lambda *_: (200, {}, b""))) as registry:

        def slow(count: int, alone: bool) -> bytes:
            pieces = iter([b"x" * 10] * count)

            def read1(*_: object, **__: object) -> bytes:
                time.sleep(0.05)
                registry._arrived_bytes += 0 if alone else 100  # what another connection reads
                return next(pieces, b"")

            body = SimpleNamespace(read1=read1, close=lambda: None, release_conn=lambda: None)
            return registry._read(body, 1 << 20, "it")

        assert len(slow(20, alone=False)) == 200
        with pytest.raises(RegistryError, match="sends too slowly"):
            slow(20, alone=True)
