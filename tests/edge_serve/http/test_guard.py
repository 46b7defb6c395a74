"""What stands in front of the application, from a raw socket's point of view."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import string
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.errors import ConfigError
from edge_make.key_file import hashed_line
from edge_serve.http.access import _MOST_CLIENTS, APIKeys, RateLimit, address_group
from edge_serve.http.connections import Connections, listen
from edge_serve.http.guard import Guard, _Body, _Headers
from edge_serve.http.messages import make_server
from edge_serve.settings import ServerSettings
from tests.conftest import Bundles, write_secret
from tests.edge_serve.scripted import Live, running, until

KEY = "sk-the-first-key-of-two"
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "what"}], "max_tokens": 2}
BODY = json.dumps(CHAT).encode()
_HEADER_TIMEOUT_S = 0.5


@pytest.fixture(scope="module")
def strict(tiny_bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A service with keys and short times."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    write_secret(keys, f"# who may call\nalice:{KEY}\n\nbob:sk-the-second-key-of-two\n")
    with running(
        tiny_bundles("qwen2"),
        api_key_file=keys,
        header_timeout_s=_HEADER_TIMEOUT_S,
        body_timeout_s=0.5,
        write_timeout_s=1.0,
        max_body_bytes=20_000,
        max_connections=400,
        max_connections_per_address=400,
    ) as live:
        yield live


def talk(live: Live, data: bytes, *, wait_s: float = 5.0) -> bytes:
    """Send bytes and read until the server closes the connection."""
    while True:
        began = time.monotonic()
        with closing(live.connect()) as sock:
            sock.settimeout(wait_s)
            sock.sendall(data)
            # On a busy machine the server may have waited for these bytes as long as it does.
            if time.monotonic() - began < _HEADER_TIMEOUT_S / 2:
                return read_all(sock)


def read_all(sock: socket.socket) -> bytes:
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
    return b"".join(parts)


def head(method: str = "POST", path: str = "/v1/chat/completions", **headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def error_of(answer: bytes) -> str:
    body = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert body["error"].keys() >= {"message", "type", "param", "code"}
    return str(body["error"]["code"])


# Keys


@pytest.mark.live
def test_a_key_opens_everything_and_nothing_else_does(strict: Live):
    good = {"Authorization": f"Bearer {KEY}"}
    assert strict.ask("/v1/models", headers=good).status == 200
    assert (
        strict.ask(
            "/v1/models", headers={"Authorization": "bearer sk-the-second-key-of-two"}
        ).status
        == 200
    )
    for wrong in (
        None, "", "Bearer", "Bearer ", f"Basic {KEY}", KEY, f"Bearer {KEY}x", f"Bearer {KEY[:-1]}",
        f"Bearer {KEY.upper()}", "Bearer alice", f"Bearer alice:{KEY}", f"Bearer {KEY} {KEY}",
        f'Bearer "{KEY}"', f"Bearer\t{KEY}", f"Token {KEY}", "Bearer # who may call",
        f"Bearer {KEY},sk-the-second-key-of-two", "Bearer null", "Bearer " + "x" * 2000,
        f"Bearer{KEY}",
    ):  # fmt: skip
        headers = {} if wrong is None else {"Authorization": wrong}
        answer = strict.ask("/v1/models", headers=headers)
        assert answer.status == 401, wrong
        assert answer.headers["www-authenticate"] == "Bearer"
        assert KEY.encode() not in answer.body


@pytest.mark.live
@pytest.mark.parametrize(
    "path",
    ["/v1/models", "//v1/models", "/v1/../v1/models", "/v1%2fmodels", "/stats",
     "/metrics", "/openapi.json", "/nothing", "/health/", "/ready/x", "/health/../stats",
     "/health%2f..%2fstats", "/tokenizer_info", "/?x=/health", "//", "/HEALTH", "/models"],
)  # fmt: skip
def test_every_path_but_three_needs_a_key(strict: Live, path: str):
    answer = talk(strict, head("GET", path))
    if path == "/?x=/health":
        assert status_of(answer) == 200  # that is the page
    else:
        assert status_of(answer) == 401


@pytest.mark.live
@pytest.mark.parametrize("host", ["a/health", "localhost/health?", "x@y", "", "[::1]/ready#"])
def test_the_host_header_opens_nothing(strict: Live, host: str):
    request = f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
    assert status_of(talk(strict, request)) in (400, 401)
    absolute = f"GET http://{host or 'h'}/stats HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
    is_health = "health?" in host  # whose query is what follows
    assert status_of(talk(strict, absolute.encode())) in ((200,) if is_health else (400, 401))


@pytest.mark.live
def test_a_target_in_absolute_form(strict: Live, live: Live):
    """A client sends one to what it takes for a proxy; its host counts, not the header."""

    def ask(target: str, host: str = "localhost", on: Live = live) -> int:
        lines = f"Host: {host}\r\nConnection: close\r\n"
        return status_of(talk(on, f"GET {target} HTTP/1.1\r\n{lines}\r\n".encode()))

    for target in ("http://localhost", "HTTP://LOCALHOST:8000", "https://[::1]:80"):
        assert ask(f"{target}/v1/models") == ask(f"{target}/v1/models?a=%62") == 200
        assert ask(f"{target}/%761/models") == 400
        assert ask(target) == 200  # the page
        assert ask(f"{target}/v1/models", "evil.example") == 200
        assert ask(f"{target}/nothing") == 404
        assert (ask(f"{target}/stats", on=strict), ask(f"{target}/health", on=strict)) == (401, 200)
    assert ask("http://evil.example/v1/models") == 403
    assert ask("http://localhost@evil.example/v1/models") == 404
    assert ask("http:///v1/models") == 404
    length = f"Content-Length: {len(BODY)}\r\nContent-Type: application/json\r\n"
    posted = f"POST http://localhost/v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n{length}"
    answer = talk(live, f"{posted}Connection: close\r\n\r\n".encode() + BODY)
    assert status_of(answer) == 200


@pytest.mark.live
def test_health_page_and_readiness_need_no_key(strict: Live):
    for path in ("/health", "/ready", "/"):
        assert strict.ask(path).status == 200


@pytest.mark.live
@pytest.mark.parametrize("form", ["plain", "hashed"])
def test_keys_are_read_again_at_a_reload(form: str, tiny_bundles: Bundles, tmp_path: Path):
    def line(name: str) -> str:
        return (
            f"{name}:sk-the-key-of-{name}\n"
            if form == "plain"
            else hashed_line(name, f"sk-the-key-of-{name}")
        )

    def status(name: str) -> int:
        headers = {"Authorization": f"Bearer sk-the-key-of-{name}"}
        return live.ask("/v1/models", headers=headers).status

    keys = write_secret(tmp_path / "keys", line("alice"))
    with running(tiny_bundles("qwen2"), api_key_file=keys) as live:
        service = live.service
        service._reread = lambda: service._settings

        def reload() -> None:
            assert service._loop is not None
            asyncio.run_coroutine_threadsafe(service.reload(), service._loop).result(30)

        assert (status("alice"), status("bob")) == (200, 401)
        stored = line("alice").strip().partition(":")[2]
        for digest in (stored.removeprefix("sha256:"), f"sha256:{stored}", line("alice").strip()):
            found = live.ask("/v1/models", headers={"Authorization": f"Bearer {digest}"})
            assert found.status == (200 if digest == "sk-the-key-of-alice" else 401)
        write_secret(keys, line("bob"))
        assert (status("alice"), status("bob")) == (200, 401)  # nobody said so yet
        reload()
        assert (status("alice"), status("bob")) == (401, 200)
        wrong_files = (
            "",
            "carol:short",
            "garbage without colon",
            "garbage-without-colon",
            f"{line('carol')}{line('dave').replace(':', ': ', 1)}",
        )
        for wrong in wrong_files:
            write_secret(keys, wrong)
            reload()
            assert (status("alice"), status("bob")) == (401, 200)  # as it was
        keys.chmod(0o644)
        keys.write_text(line("alice"))
        reload()
        assert (status("alice"), status("bob")) == (401, 200)


@pytest.mark.parametrize(
    "wrong", ["garbage without colon", "garbage-without-colon", ":sk-without-a-name"]
)
def test_a_file_that_is_no_list_of_keys_leaves_the_old_ones_in_force(tmp_path: Path, wrong: str):
    file = write_secret(tmp_path / "keys", f"alice:{KEY}\n")
    keys = APIKeys(file)
    write_secret(file, f"{wrong}\n")
    with pytest.raises(ConfigError, match="line 1 of"):
        keys.reread()
    found = keys.find(f"Bearer {KEY}".encode())
    assert found is not None
    assert found.name == "alice"
    assert keys.find(f"Bearer {wrong}".encode()) is None


def test_an_open_address_needs_a_key_or_an_explicit_word(tmp_path: Path):
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.com"):
        with pytest.raises(ConfigError, match="API key"):
            ServerSettings(host=host)
        ServerSettings(host=host, allow_open=True)
        ServerSettings(host=host, api_key_file=tmp_path / "keys")
    for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        ServerSettings(host=host)


def test_names_that_fit_into_no_header():
    for name in ("", "a b", "modèle", "a\r\nX-Evil: 1", "x" * 129):
        with pytest.raises(ConfigError, match="model name"):
            ServerSettings(model={name: Path("b")})
    ServerSettings(model={"deepseek-ai/R1:int4_v1.0": Path("b")})


def test_without_keys_only_local_names_are_served(live: Live):
    for host, wanted in (
        ("localhost", 200), ("127.0.0.1:8000", 200), ("[::1]:8000", 200), ("evil.example", 403),
        ("localhost.evil.example", 403), ("127.0.0.1.evil.example", 403), ("", 403),
        ("LOCALHOST:8000", 200), ("127.8.8.8", 200), ("localhost:", 200),
        ("localhost:80@evil.example", 403), ("localhost:80:90", 403), ("localhost:x", 403),
        ("localhost/@evil.example", 403), ("[::1]evil.example", 403), ("[::1]@evil.example", 403),
    ):  # fmt: skip
        request = f"GET /stats HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
        assert status_of(talk(live, request)) == wanted, host


CROSS_SITE = (
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site", "Origin": "http://localhost:3000"},  # another port is another
    {"Origin": "https://evil.example"},
    {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"},
    {"Origin": "http://localhost:3000"},
    {"Origin": "http://localhost.evil.example"},
    {"Origin": "null"},  # a sandboxed frame of any page
    {"Origin": ""},
)
OURS: tuple[dict[str, str], ...] = (
    {},  # a program
    {"Sec-Fetch-Site": "same-origin", "Origin": "http://localhost"},
    {"Sec-Fetch-Site": "none"},
    {"Origin": "http://localhost"},  # plain HTTP to another machine: no Sec-Fetch-Site
    {"Origin": "HTTP://LocalHost"},
    # A proxy under another name, which tells the server its own.
    {"Sec-Fetch-Site": "same-origin", "Origin": "https://chat.example.com"},
    {"Origin": "chrome-extension://abcdef", "Sec-Fetch-Site": "cross-site"},
    {"Origin": "app://obsidian.md"},
)


@pytest.mark.parametrize(
    ("headers", "wanted"), [*((h, 403) for h in CROSS_SITE), *((h, 200) for h in OURS)]
)
def test_without_keys_no_page_of_another_site_has_anything_computed(
    live: Live, headers: dict[str, str], wanted: int
):
    """Browsers ask first about JSON, and are refused; this holds where one does not."""
    request = head(Content_Type="application/json", Content_Length=str(len(BODY)), **headers)
    answer = talk(live, request + BODY)
    assert status_of(answer) == wanted
    if wanted == 403:
        assert error_of(answer) == "cross_site"
    assert status_of(talk(live, head("GET", "/", **headers))) == 200  # a link leads to the page


@pytest.mark.live
@pytest.mark.once
@pytest.mark.parametrize("name", ["127.0.0.1", "jetson.test"])
def test_a_real_browser_may_use_its_own_page_and_no_other(
    name: str, driver: Any, live: Live, tiny_bundles: Bundles
):
    """To jetson.test, for it another machine, it sends no ``Sec-Fetch-Site`` over plain HTTP."""
    ask = """
    const [url, mode, body] = arguments;
    const headers = mode === "cors" ? { "Content-Type": "application/json" } : {};
    return fetch(url, { method: "POST", mode, headers, body }).then((answer) => answer.status);"""
    with running(tiny_bundles("qwen2"), host="0.0.0.0", allow_open=True) as other:
        url = f"http://{name}:{other.port}/v1/chat/completions"
        driver.get(f"http://{name}:{other.port}/")
        assert driver.execute_script(ask, url, "cors", BODY.decode()) == 200
        driver.get(f"http://localhost:{live.port}/health")
        assert driver.execute_script(ask, url, "no-cors", BODY.decode()) == 0  # it may not look
        driver.get("about:blank")
        assert other.ask("/stats").json["rejections"] == {"cross_site": 1}


@pytest.mark.live
def test_a_key_is_all_that_a_page_needs(strict: Live):
    """No browser sends it by itself, so a proxy that lets pages in goes on working."""
    for headers in CROSS_SITE:
        request = head(
            Content_Type="application/json",
            Content_Length=str(len(BODY)),
            Authorization=f"Bearer {KEY}",
            **headers,
        )
        assert status_of(talk(strict, request + BODY)) == 200


def test_no_page_elsewhere_may_call(live: Live):
    answer = live.ask("/v1/models", headers={"Origin": "https://evil.example"})
    assert not any(name.startswith("access-control") for name in answer.headers)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        answer = live.ask("/v1/chat/completions", raw=BODY, headers={"Content-Type": kind})
        assert answer.status == 415
    preflight = talk(live, head("OPTIONS", Origin="https://evil.example"))
    assert status_of(preflight) == 405
    assert b"access-control" not in preflight.lower()


# Paths


@pytest.mark.parametrize(
    "path",
    ["/%6detrics", "/%73tats", "/%4Detrics", "/metric%73", "/%68ealth", "/%761/models",
     "/health/%2e%2e/stats", "/v1/models/a%2Fb%5fc", "http://localhost/%73tats"],
)  # fmt: skip
def test_a_path_that_hides_from_a_proxy_in_front_is_refused(live: Live, path: str):
    """A fleet's endpoint keeps clients from /stats and /metrics, which it looks for as written."""
    answer = talk(live, head("GET", path))
    assert (status_of(answer), error_of(answer)) == (400, "needless_escape")
    assert b"write the character itself" in answer


@pytest.mark.parametrize("path", ["/stats?a=%6d", "/metrics?%73=%2e", "/stats"])
def test_a_query_may_escape_whatever_it_likes(live: Live, path: str):
    assert status_of(talk(live, head("GET", path))) == 200


def test_only_characters_that_need_no_escape_are_refused_with_one():
    """RFC 3986 2.3 names them; a model's name needs an escape for its slash."""
    passed: list[bytes] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope["raw_path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        assert message["type"] != "http.response.start" or message["status"] in (200, 400)

    async def ask_all(form: str) -> None:
        guard = Guard(application, ServerSettings(), None)
        for code in range(256):
            raw = f"/%{code:{form}}".encode()
            scope = {"type": "http", "http_version": "1.1", "method": "GET", "client": None,
                     "headers": [(b"host", b"localhost")], "raw_path": raw,
                     "path": unquote(raw.decode())}  # fmt: skip
            await guard(scope, receive, send)

    unreserved = f"{string.ascii_letters}{string.digits}-._~".encode()
    for form in ("02x", "02X"):
        passed.clear()
        asyncio.run(ask_all(form))
        reserved = (code for code in range(256) if code not in unreserved)
        assert passed == [f"/%{code:{form}}".encode() for code in reserved]


# Heads and bodies


@pytest.mark.live
def test_large_heads_are_refused(strict: Live):
    for extra in (b"X: " + b"a" * 20_000, b"\r\n".join(b"x%d: y" % i for i in range(3_000))):
        request = head("GET", "/health")[:-2] + extra + b"\r\n\r\n"
        answer = talk(strict, request)
        assert status_of(answer) == 431
        assert error_of(answer) == "header_too_large"
    with closing(strict.connect()) as sock:  # piece by piece
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        answer = b""
        try:
            for _ in range(100):
                sock.sendall(b"X: " + b"a" * 1000 + b"\r\n")
            answer = read_all(sock)
        except ConnectionError:
            pass  # cut while it was sending
        assert answer == b"" or status_of(answer) == 431


@pytest.mark.live
def test_both_lengths_at_once_are_refused(strict: Live):
    request = head(Authorization=f"Bearer {KEY}", Content_Type="application/json",
                   Transfer_Encoding="chunked", Content_Length="5")  # fmt: skip
    answer = talk(strict, request + b"0\r\n\r\nGET /health HTTP/1.1\r\n\r\n")
    assert (status_of(answer), error_of(answer)) == (400, "ambiguous_length")
    assert answer.count(b"HTTP/1.1 ") == 1  # nothing that follows is read as a request


@pytest.mark.live
@pytest.mark.parametrize("length", ["-1", "1e3", "99999999999999999999", "0x10", " ", "5, 6"])
def test_invalid_lengths_are_refused(strict: Live, length: str):
    request = head(Authorization=f"Bearer {KEY}", Content_Type="application/json",
                   Content_Length=length)  # fmt: skip
    assert status_of(talk(strict, request + BODY)) in (400, 413)


@pytest.mark.live
def test_large_bodies_are_refused_and_the_sender_sees_it(strict: Live):
    good = {"Authorization": f"Bearer {KEY}"}
    large = json.dumps({**CHAT, "messages": [{"role": "user", "content": "x" * 25_000}]}).encode()
    answer = strict.ask("/v1/chat/completions", raw=large, headers=good)
    assert (answer.status, answer.json["error"]["code"]) == (413, "content_too_large")
    request = head(Authorization=f"Bearer {KEY}", Content_Type="application/json",
                   Transfer_Encoding="chunked")  # fmt: skip
    chunks = b"".join(b"%x\r\n%s\r\n" % (1000, b"x" * 1000) for _ in range(40))
    assert status_of(talk(strict, request + chunks + b"0\r\n\r\n")) == 413
    encoded = strict.ask(
        "/v1/chat/completions", raw=BODY, headers=good | {"Content-Encoding": "gzip"}
    )
    assert encoded.status == 415


@pytest.mark.live
def test_a_body_in_single_bytes(strict: Live):
    request = head(Authorization=f"Bearer {KEY}", Content_Type="application/json",
                   Transfer_Encoding="chunked")  # fmt: skip
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY)
    assert status_of(talk(strict, request + chunks + b"0\r\n\r\n")) == 200


@pytest.mark.live
@pytest.mark.parametrize("has_key", [True, False])
def test_a_long_body_in_single_bytes_is_refused_early(
    tiny_bundles: Bundles, tmp_path: Path, has_key: bool
):
    write_secret(tmp_path / "keys", f"alice:{KEY}\n")
    keys = {"Authorization": f"Bearer {KEY}"} if has_key else {}
    request = head(Content_Type="application/json", Transfer_Encoding="chunked", **keys)
    with (
        running(
            tiny_bundles("qwen2"), api_key_file=tmp_path / "keys", max_body_bytes=20_000,
            body_timeout_s=30.0,
        ) as live,
        closing(live.connect()) as sock,
    ):  # fmt: skip
        sock.settimeout(10)  # sooner than the body's time is over
        sock.sendall(request)
        sock.sendall(b"1\r\n \r\n" * (32 * 2**10 // 6))
        answer = read_all(sock)
    assert (status_of(answer), error_of(answer)) == (400, "invalid_http")


@pytest.mark.live
def test_small_chunks_of_a_long_body_are_no_attack(strict: Live):
    request = head(Authorization=f"Bearer {KEY}", Content_Type="application/json",
                   Transfer_Encoding="chunked")  # fmt: skip
    body = BODY + b" " * (19_000 - len(BODY))
    chunks = b"".join(b"8\r\n%-8b\r\n" % body[at : at + 8] for at in range(0, len(body), 8))
    assert status_of(talk(strict, request + chunks + b"0\r\n\r\n")) == 200


@pytest.mark.live
@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /health\r\n\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
        b"GET\r\n\r\n",
        b"\r\n\r\n\r\n",
        b"GET /he\x00alth HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",  # no Host
        b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost : a\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_bytes_that_are_not_http_are_refused(strict: Live, data: bytes):
    answer = talk(strict, data)
    assert status_of(answer) in (400, 408, 505)
    assert error_of(answer)


@pytest.mark.live
def test_upgrades_and_odd_methods_get_nothing(strict: Live):
    upgrade = head("GET", "/health")[:-2].replace(b"Connection: close", b"Connection: Upgrade")
    for protocol in (b"websocket", b"h2c"):
        request = upgrade + b"Upgrade: " + protocol + b"\r\nConnection: close\r\n\r\n"
        assert status_of(talk(strict, request)) != 101
    for method in ("TRACE", "PUT", "DELETE", "PATCH", "BREW", "CONNECT"):
        answer = talk(strict, head(method, "/health"))
        assert (status_of(answer), error_of(answer)) == (405, "method_not_allowed")
        assert b"\r\nallow: GET, HEAD\r\n" in answer or b"\r\nallow: HEAD, GET\r\n" in answer


# Slow clients


@pytest.mark.live
def test_an_offer_of_http_2_is_answered_without_a_word_in_the_log(
    strict: Live, caplog: pytest.LogCaptureFixture
):
    """The client of every JDK makes it with each request that is not encrypted."""
    data = (
        f"POST /v1/chat/completions HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings, close\r\n"
        f"Content-Length: {len(BODY)}\r\nHost: localhost\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"
        f"Upgrade: h2c\r\nContent-Type: application/json\r\nAuthorization: Bearer {KEY}\r\n\r\n"
    ).encode() + BODY
    assert status_of(talk(strict, data)) == 200
    assert [r.getMessage() for r in caplog.records if r.levelno > logging.INFO] == []


@pytest.mark.timing
def test_slow_heads_are_cut(strict: Live):
    started = time.monotonic()
    answer = talk(strict, b"GET /health HTTP/1.1\r\nHost: localh")
    assert status_of(answer) == 408
    assert 0.3 < time.monotonic() - started < 3
    assert talk(strict, b"") == b""  # nothing at all


@pytest.mark.timing
def test_a_head_that_drips_is_cut(strict: Live):
    started = time.monotonic()
    with closing(strict.connect()) as sock:
        try:
            for byte in head("GET", "/health"):
                sock.sendall(bytes([byte]))
                time.sleep(0.05)
        except ConnectionError:
            pass
    assert time.monotonic() - started < 3


@pytest.mark.timing
def test_slow_bodies_are_cut(strict: Live):
    request = head(Authorization=f"Bearer {KEY}", Content_Type="application/json",
                   Content_Length="100")  # fmt: skip
    started = time.monotonic()
    answer = talk(strict, request + b'{"model"')
    assert (status_of(answer), error_of(answer)) == (408, "body_timeout")
    assert time.monotonic() - started < 3


@pytest.mark.timing
def test_a_body_that_nobody_wants_cannot_drip_for_ever(strict: Live):
    for request in (head("GET", "/health", Content_Length="100"), head(Content_Length="100")):
        started = time.monotonic()
        with closing(strict.connect()) as sock:
            sock.sendall(request.replace(b"Connection: close\r\n", b""))
            try:
                while time.monotonic() - started < 5:
                    sock.sendall(b"x")
                    time.sleep(0.05)
            except ConnectionError:
                pass
        assert time.monotonic() - started < 4


@pytest.mark.live
def test_a_steady_reader_gets_all_of_a_long_answer():
    body = bytes(6_000_000)

    async def application(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def read_slowly(port: int) -> bytes:
        answer = bytearray()
        with socket.create_connection(("127.0.0.1", port), 5) as sock:
            sock.sendall(head("GET", "/"))
            while part := sock.recv(50_000):
                answer += part
                time.sleep(0.02)
        return bytes(answer)

    async def test() -> bytes:
        settings = ServerSettings(write_timeout_s=1.0)
        with listen("127.0.0.1", 0) as sock:
            server = make_server(Guard(application, settings, None), settings, Connections(9, 9))
            serving = asyncio.create_task(server.serve(sockets=[sock]))
            try:
                return await asyncio.to_thread(read_slowly, sock.getsockname()[1])
            finally:
                server.should_exit = True
                await serving

    started = time.monotonic()
    assert asyncio.run(test()).endswith(b"\r\n\r\n" + body)
    assert time.monotonic() - started > 2  # twice the time, at least


def test_no_more_of_a_refused_body_is_read_than_its_bound():
    read = 0

    async def receive() -> dict[str, Any]:
        nonlocal read
        read += 1000
        assert read < 100_000, "it reads on"
        await asyncio.sleep(0)  # else no time limit could end it
        return {"type": "http.request", "body": bytes(1000), "more_body": True}

    headers = _Headers([(b"content-length", b"1000000")])
    asyncio.run(_Body(receive, headers).discard(5000))
    assert 5000 <= read <= 5000 + 1000


@pytest.mark.timing
def test_three_hundred_slow_clients_hold_up_nobody(strict: Live):
    slow = [strict.connect() for _ in range(300)]
    try:
        for sock in slow:
            sock.sendall(b"GET /health HTTP/1.1\r\nX-Slow: ")
        started = time.monotonic()
        assert strict.ask("/health").status == 200
        assert time.monotonic() - started < 1
        for sock in slow:
            sock.settimeout(5)
            assert b" 408 " in sock.recv(4096)
    finally:
        for sock in slow:
            sock.close()
    assert strict.ask("/health").status == 200


@pytest.mark.live
def test_a_connection_too_many_replaces_the_one_that_was_idle_longest(strict: Live):
    many = [strict.connect() for _ in range(420)]
    try:
        for sock in many[:20]:
            sock.settimeout(0.4)
            with suppress(ConnectionError):
                assert sock.recv(1) == b""
        for sock in many[400:]:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b" 200 " in sock.recv(4096)
    finally:
        for sock in many:
            sock.close()
    time.sleep(0.1)
    assert strict.ask("/health").status == 200


def test_an_answer_does_not_wait_for_an_acknowledgement(live: Live):
    """Head and body are two writes; with Nagle's algorithm on, the second waits 40 ms."""
    times = []
    with closing(live.connect()) as sock:
        for _ in range(20):
            started = time.monotonic()
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += sock.recv(4096)
            times.append(time.monotonic() - started)
    assert min(times[10:]) < 0.03


# Identity and rate


@pytest.mark.parametrize(
    ("address", "group"),
    [
        ("192.168.1.7", "192.168.1.7"),
        ("::ffff:192.168.1.7", "192.168.1.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
    ],
)
def test_addresses_that_count_as_one_client(address: str, group: str):
    assert address_group(address) == group


def test_request_ids_go_through_if_they_are_harmless(live: Live):
    assert live.ask("/health", headers={"X-Request-Id": "abc-1.2_3"}).headers[
        "x-request-id"
    ] == "abc-1.2_3"  # fmt: skip
    for bad in ("a b", "x" * 65, "<script>", "a;b"):
        given = live.ask("/health", headers={"X-Request-Id": bad}).headers["x-request-id"]
        assert re.fullmatch(r"[0-9a-f]{24}", given)


@pytest.mark.live
def test_a_rate_limit_counts_each_key_for_itself(tiny_bundles: Bundles, tmp_path: Path):
    keys = tmp_path / "keys"
    write_secret(keys, "a:sk-aaaaaaaaaaaaaaaa\nb:sk-bbbbbbbbbbbbbbbb\n")
    with running(tiny_bundles("qwen2"), api_key_file=keys, rate_limit_rpm=3) as live:
        for key in ("sk-aaaaaaaaaaaaaaaa", "sk-bbbbbbbbbbbbbbbb"):
            headers = {"Authorization": f"Bearer {key}"}
            answers = [
                live.ask("/detokenize", {"model": "tiny", "tokens": [70]}, headers=headers)
                for _ in range(4)
            ]
            assert [answer.status for answer in answers] == [200, 200, 200, 429]
            assert int(answers[-1].headers["retry-after"]) in range(1, 21)
            assert answers[-1].json["error"]["code"] == "rate_limit_exceeded"
            assert live.ask("/stats", headers=headers).status == 200


@pytest.mark.parametrize("per_minute", [1, 60])
def test_a_client_that_was_idle_for_a_day_may_burst_a_minutes_worth(per_minute: int):
    now = 0.0
    limit = RateLimit(per_minute, lambda: now)
    assert limit.take("a") == 0
    now += 86_400
    assert [limit.take("a") > 0 for _ in range(per_minute + 1)] == [*[False] * per_minute, True]


@given(st.lists(st.floats(0, 30), max_size=40), st.integers(1, 120))
def test_a_rate_limit_never_lets_more_through(gaps: list[float], per_minute: int):
    now = 0.0
    limit = RateLimit(per_minute, lambda: now)
    passed: list[float] = []
    for gap in gaps:
        now += gap
        wait_s = limit.take("a")
        assert wait_s >= 0
        if not wait_s:
            passed.append(now)
        elif gap:
            at = now
            now = at + wait_s + 1e-6  # after that time there is one
            assert limit.take("a") == 0
            passed.append(now)
    for start in passed:  # a full bucket and what came in meanwhile
        assert sum(start <= at < start + 60 for at in passed) <= 2 * per_minute


def test_a_bucket_of_an_address_refills_and_bursts_as_it_is_told():
    now = 0.0
    limit = RateLimit(120, lambda: now, burst=5)
    assert limit.wait_s("a") == 0
    assert [limit.take("a") for _ in range(6)] == [*[0] * 5, 0.5]
    assert limit.wait_s("a") == 0.5
    assert limit.wait_s("b") == limit.take("b") == 0
    now += 1.1
    assert limit.wait_s("a") == 0
    assert [limit.take("a") > 0 for _ in range(3)] == [False, False, True]
    for number in range(3 * _MOST_CLIENTS):  # who comes with ever new addresses fills no memory
        limit.take(f"{number}")
    assert len(limit._levels) == _MOST_CLIENTS


def ask_from(live: Live, address: str, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", live.port), 5, (address, 0)) as sock:
        sock.sendall(request)
        answer = b""
        while part := sock.recv(65536):
            answer += part
    return answer


@pytest.mark.live
def test_an_address_that_sends_too_much_is_refused_before_its_request_is_read(
    tiny_bundles: Bundles,
):
    with running(tiny_bundles("qwen2"), rate_limit_address_rps=1) as live:
        health = head("GET", "/health")
        answers = [ask_from(live, "127.0.0.2", health) for _ in range(40)]
        assert all(b" 200 " in answer for answer in answers[:10])
        refused = answers[-1]
        assert b" 429 " in refused
        assert b"retry-after: 1\r\n" in refused
        assert b"connection: close" in refused
        assert b"address_rate_exceeded" in refused
        # Nothing of it is parsed: this is no HTTP.
        assert b" 429 " in ask_from(live, "127.0.0.2", b"nonsense\r\n\r\n")
        assert b" 200 " in ask_from(live, "127.0.0.3", health)
        assert live.ask("/stats").json["rejections"]["address_rate_exceeded"] >= 20
        until(lambda: b" 200 " in ask_from(live, "127.0.0.2", health))


@pytest.mark.live
def test_requests_of_one_connection_count_one_by_one(tiny_bundles: Bundles):
    with running(tiny_bundles("qwen2"), rate_limit_address_rps=1) as live:
        keep = head("GET", "/health").replace(b"Connection: close\r\n", b"")
        with closing(live.connect()) as sock:
            sock.sendall(40 * keep)
            answer = b""
            while part := sock.recv(65536):
                answer += part
        assert 10 <= answer.count(b" 200 OK") <= 15
        assert b"address_rate_exceeded" in answer


@pytest.mark.live
def test_a_trusted_proxy_is_not_refused_for_its_clients(tiny_bundles: Bundles):
    with running(
        tiny_bundles("qwen2"), rate_limit_address_rps=1, trusted_proxies=["127.0.0.2"]
    ) as live:

        def ask(**said: str) -> bytes:
            return ask_from(live, "127.0.0.2", head("GET", "/health", **said))

        for said in ({"X_Edge_Client": "10.0.0.1"}, {}):  # a client's, and the proxy's own
            assert b"address_rate_exceeded" in [ask(**said) for _ in range(40)][-1]
            assert b" 200 " in ask(X_Edge_Client="10.0.0.2")


class Panic(BaseException):
    """As `pyo3_runtime.PanicException`: no `Exception`."""


@pytest.mark.parametrize(
    ("error", "is_answered"),
    [(Panic("boom"), True), (ValueError("boom"), True)]
    + [(kind(), False) for kind in (asyncio.CancelledError, KeyboardInterrupt, SystemExit)],
)
def test_whatever_fails_is_answered_in_the_envelope(error: BaseException, is_answered: bool):
    sent: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        raise error

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "GET",
        "path": "/v1/models",
        "raw_path": b"/v1/models",
        "headers": [(b"host", b"localhost")],
        "client": ("127.0.0.1", 1),
    }
    guard = Guard(application, ServerSettings(), None)
    call = guard(scope, receive, send).__await__()
    if not is_answered:
        with pytest.raises(type(error)):
            next(call)
        assert not sent
        return
    with pytest.raises(StopIteration):
        next(call)
    assert sent[0]["status"] == 500
    answer = json.loads(sent[1]["body"])["error"]
    assert answer["code"] == "internal_error"
    assert "boom" not in answer["message"]
