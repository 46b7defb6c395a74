"""A picture that a request names by an address comes from a public machine, or not at all."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edge_serve.pictures import fetch
from tests.edge_serve.pictures.test_parts import block, chat, image_url, message, respond, text, uri
from tests.edge_serve.scripted import Answer, Live, RealEngine, running

pytestmark = pytest.mark.live

PICTURE = b"\x89PNG" + bytes(range(256)) * 100
ELSEWHERE = "127.0.0.2"  # a machine that is not this one, as far as addresses tell
Handler = Callable[[socket.socket, bytes], None]


@contextmanager
def site(handler: Handler) -> Iterator[str]:
    """A web server that answers each connection once; returns its address."""
    listener = socket.create_server((ELSEWHERE, 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def answer(connection: socket.socket) -> None:
        with connection:
            head = b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(4096)
            try:
                handler(connection, head)
            except OSError:
                return  # it hung up

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://{ELSEWHERE}:{listener.getsockname()[1]}/picture.png?size=1"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def whole(data: bytes = PICTURE, status: str = "200 OK", *headers: str) -> Handler:
    def handle(connection: socket.socket, head: bytes) -> None:
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(data)}", *headers, "", ""]
        connection.sendall("\r\n".join(lines).encode() + data)

    return handle


def in_chunks(connection: socket.socket, head: bytes) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for start in range(0, len(PICTURE), 7000):
        piece = PICTURE[start : start + 7000]
        connection.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
    connection.sendall(b"0\r\n\r\n")


def to_its_end(connection: socket.socket, head: bytes) -> None:
    connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + PICTURE)


def cut(connection: socket.socket, head: bytes) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n" + PICTURE)


def endless(connection: socket.socket, head: bytes) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        connection.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")


def dripping(connection: socket.socket, head: bytes) -> None:
    while True:
        connection.sendall(b"H")
        time.sleep(0.05)


@pytest.fixture
def elsewhere_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    is_public = fetch._is_public
    monkeypatch.setattr(fetch, "_is_public", lambda ip: ip == ELSEWHERE or is_public(ip))


@pytest.fixture(scope="module")
def fetches(sees_bundle: Path) -> Iterator[Live]:
    with running(
        sees_bundle, RealEngine(), image_urls=True, max_image_bytes=200_000, max_images=3
    ) as live:
        yield live


SENDERS: dict[str, tuple[Callable[[Live, str], Answer], str]] = {
    "chat": (
        lambda live, url: chat(live, text(), image_url({"url": url, "detail": "high"})),
        "messages[0].content[1].image_url.url",
    ),
    "chat, an address alone": (
        lambda live, url: chat(live, text(), image_url(url)),
        "messages[0].content[1].image_url",
    ),
    "responses": (
        lambda live, url: respond(
            live, text(kind="input_text"), {"type": "input_image", "image_url": url}
        ),
        "input[0].content[1].image_url",
    ),
    "messages": (
        lambda live, url: message(live, text(), block({"type": "url", "url": url})),
        "messages[0].content[1].source.url",
    ),
}
EACH = pytest.mark.parametrize("sender", SENDERS.values(), ids=SENDERS)


@EACH
def test_a_picture_is_fetched(
    fetches: Live, asked: list[Any], elsewhere_is_public: None, sender: Any
):
    heads: list[bytes] = []

    def handle(connection: socket.socket, head: bytes) -> None:
        heads.append(head)
        whole()(connection, head)

    with site(handle) as url:
        answer = sender[0](fetches, url)
    assert answer.status == 200, answer.body
    assert asked[0].prompt[0]["content"] == [text(), {"type": "image", "image": PICTURE}]
    first, host, *_ = heads[0].decode().split("\r\n")
    assert first == "GET /picture.png?size=1 HTTP/1.1"
    assert host.lower() == f"host: {url.split('/')[2]}"


@pytest.mark.parametrize("handler", [in_chunks, to_its_end])
def test_other_forms_of_an_answer(
    fetches: Live, asked: list[Any], elsewhere_is_public: None, handler: Handler
):
    with site(handler) as url:
        answer = chat(fetches, image_url(url))
    assert answer.status == 200, answer.body
    assert asked[0].prompt[0]["content"][0]["image"] == PICTURE


FAILS: dict[str, tuple[Handler, str]] = {
    "not there": (whole(b"", "404 Not Found"), "the answer has status 404"),
    "elsewhere": (
        whole(b"", "302 Found", "Location: http://169.254.169.254/latest/meta-data"),
        "it leads to another address",
    ),
    "cut": (cut, "cannot be reached or breaks off"),
    "endless": (endless, "has more than the 200000 bytes"),
    "too large": (whole(b"x" * 200_001), "has more than the 200000 bytes"),
    "no HTTP": (whole(b"", "what?"), "cannot be reached or breaks off"),
}


@pytest.mark.parametrize("case", FAILS.values(), ids=FAILS)
def test_a_picture_that_does_not_come(
    fetches: Live, asked: list[Any], elsewhere_is_public: None, case: Any
):
    handler, why = case
    with site(handler) as url:
        answer = chat(fetches, image_url({"url": url}))
    assert answer.status == 400, answer.body
    error = answer.json["error"]
    assert error["param"] == "messages[0].content[0].image_url.url"
    assert why in error["message"]
    assert not asked


def test_a_slowly_sent_picture_times_out(
    fetches: Live, elsewhere_is_public: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fetch, "FETCH_S", 0.3)
    with site(dripping) as url:
        answer = chat(fetches, image_url(url))
    assert answer.status == 400
    assert "it took more than 0.3 s" in answer.json["error"]["message"]


def test_the_bytes_of_several_are_bounded_together(
    fetches: Live, asked: list[Any], elsewhere_is_public: None
):
    with site(whole(b"x" * 90_000)) as url:
        assert chat(fetches, image_url(url), image_url(url)).status == 200
        refused = chat(fetches, *[image_url(url)] * 3)
        assert refused.json["error"]["param"] == "messages[0].content[2].image_url"
        assert "the 20000 bytes that are left" in refused.json["error"]["message"]
        refused = chat(fetches, *[image_url(url)] * 4)
        assert "may have 3 pictures" in refused.json["error"]["message"]
    assert len(asked) == 1


PRIVATE = [
    "127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254",
    "100.64.0.1", "100.100.100.200", "192.0.0.192", "168.63.129.16", "224.0.0.1", "255.255.255.255",
    "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1",
    "::ffff:10.0.0.1", "::ffff:127.0.0.1", "64:ff9b::a00:1", "64:ff9b:1::a00:1",
    "2002:7f00:1::", "2001:0:1::", "2001:db8::1",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_an_address_within_the_network_is_not_public(address: str):
    assert not fetch._is_public(address)


@pytest.mark.parametrize("address", ["93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"])
def test_an_internet_address_is_public(address: str):
    assert fetch._is_public(address)


@EACH
@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f.1", "127.1", "[::ffff:127.0.0.1]", "0"],
)
def test_no_spelling_of_an_address_leads_into_the_network(
    fetches: Live, asked: list[Any], sender: Any, host: str
):
    send, where = sender
    answer = send(fetches, f"http://{host}:{fetches.port}/v1/models")
    assert answer.status == 400, answer.body
    shown = answer.json["error"]["message"]
    assert shown.startswith(f"{where}: ")
    # A system may not know these forms, or have no IPv6; then there is no such machine.
    assert "from public machines only" in shown or "cannot be reached" in shown
    assert not asked


def test_a_name_with_a_public_and_a_private_address(
    fetches: Live, asked: list[Any], monkeypatch: pytest.MonkeyPatch
):
    """Which one a second look-up names is the choice of who owns the name."""
    kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
    addresses = [(*kind, ("93.184.215.14", 80)), (*kind, ("10.0.0.1", 80))]
    look_up = socket.getaddrinfo

    def getaddrinfo(host: Any, *more: Any, **options: Any) -> Any:
        return addresses if host == "rebinds.example" else look_up(host, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    answer = chat(fetches, image_url("http://rebinds.example/a.png"))
    assert "from public machines only" in answer.json["error"]["message"]
    assert not asked


def test_the_connections_own_address_is_checked(
    fetches: Live, asked: list[Any], monkeypatch: pytest.MonkeyPatch
):
    """An address that was public when it was looked up is no excuse."""
    seen: list[str] = []

    def is_public(address: str) -> bool:
        seen.append(address)
        return len(seen) == 1

    monkeypatch.setattr(fetch, "_is_public", is_public)
    with site(whole()) as url:
        answer = chat(fetches, image_url(url))
    assert "from public machines only" in answer.json["error"]["message"]
    assert seen == [ELSEWHERE, ELSEWHERE]
    assert not asked


def test_this_machine_is_not_asked_by_its_public_address(
    fetches: Live, asked: list[Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fetch, "_is_public", lambda _: True)
    answer = chat(fetches, image_url(f"http://127.0.0.1:{fetches.port}/health"))
    assert "from public machines only" in answer.json["error"]["message"]
    assert not asked


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http://user:password@example.org/",
        "http://example.org:99999/",
        "http://ex\xe4mple.org/",
    ],
)
def test_invalid_addresses_are_refused(fetches: Live, url: str):
    answer = chat(fetches, image_url(url))
    assert "is no address of a picture" in answer.json["error"]["message"]


@pytest.mark.parametrize("path", ["/a b", "/\x00", "/\u007f"])
def test_invalid_paths_are_refused(fetches: Live, elsewhere_is_public: None, path: str):
    with site(whole()) as url:
        answer = chat(fetches, image_url(url.partition("/picture")[0] + path))
    assert answer.status == 400, answer.body


def test_a_data_uri_stays_what_it_is(fetches: Live, asked: list[Any]):
    assert chat(fetches, image_url(uri(PICTURE))).status == 200
    assert asked[0].prompt[0]["content"][0]["image"] == PICTURE


def test_fetched_bytes_count_as_the_bodies_of_their_client(
    sees_bundle: Path, elsewhere_is_public: None
):
    """So that many small requests do not fill the memory."""
    bounds: dict[str, Any] = {"max_body_bytes": 20_000, "max_inflight_body_bytes": 40_000}
    with (
        running(sees_bundle, RealEngine(), image_urls=True, **bounds) as live,
        site(whole(b"x" * 60_000)) as url,
    ):
        answer = chat(live, image_url(url))
    assert (answer.status, answer.json["error"]["code"]) == (429, "bodies_full")
