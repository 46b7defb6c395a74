"""Fetches pictures that requests name by an address, from public machines only.

The server is in a network that its clients must not see. So names are resolved here, the
connection goes to an address that was checked, and no redirect is followed. A fetched picture
replaces its address in the request, as if the client had sent it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import ssl
from base64 import b64encode
from collections.abc import Iterator
from typing import Any
from urllib.parse import SplitResult, urlsplit

import h11

from edge._version import __version__
from edge_serve.http.errors import APIError, invalid
from edge_serve.http.guard import Receive
from edge_serve.http.threads import while_there
from edge_serve.settings import ServerSettings

from .forms import Base64Source, ImageBlock, URLSource

FETCH_S = 10.0
"""Seconds that one picture may take, from resolving its machine's name to its last byte."""

_MOST_AT_ONCE = 16
_CONNECT_S = 3.0  # for one of several addresses of a name
_READ_BYTES = 64 * 2**10
_PORTS = {"http": 80, "https": 443}
# Addresses that not every Python's `ipaddress` knows as private. The first three contain an IPv4
# address (NAT64, 6to4, Teredo); at the others clouds tell a machine about itself.
_NOT_PUBLIC = [
    ipaddress.ip_network(each)
    for each in ("64:ff9b::/32", "2002::/16", "2001::/23", "192.0.0.0/24", "168.63.129.16")
]


class PictureFetcher:
    """Replaces addresses of pictures in requests by the pictures.

    Args:
        settings: settings that limit pictures.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._at_once = asyncio.Semaphore(_MOST_AT_ONCE)

    async def fetch_all(self, body: object, receive: Receive) -> None:
        """Fetch the pictures of a request of any type, and change the request.

        Args:
            body: the request.
            receive: reads from the client's connection; the pictures count as its body.

        Raises:
            APIError: 400, a picture cannot or must not be fetched; 429, there is no room for it.
            ClientGoneError: the client left.
        """
        places = list(_places(body, ""))
        if len(places) > self._settings.max_images:
            where = places[self._settings.max_images][3]
            raise invalid(
                f"{where}: a request may have {self._settings.max_images} pictures, and this is "
                "one more; send fewer",
                where,
            )
        total = 0
        for holder, key, url, where in places:
            left = self._settings.max_image_bytes - total
            data = await while_there(self._fetch(url, where, left), receive)
            total += len(data)
            if (account := getattr(receive, "account", None)) is not None:
                account.grow_to(getattr(receive, "num_bytes", 0) + total)
            text = b64encode(data).decode()
            if isinstance(holder, ImageBlock):
                holder.source = Base64Source(text, "image/png")
            else:
                holder[key] = f"data:image/*;base64,{text}"

    async def _fetch(self, url: str, where: str, most_bytes: int) -> bytes:
        try:
            parts = urlsplit(url)
            port = parts.port or _PORTS[parts.scheme.lower()]
            if not parts.hostname or parts.username is not None or not url.isascii():
                raise ValueError("it needs a host and no user, in ASCII")
        except (ValueError, KeyError) as error:
            raise invalid(f"{where}: this is no address of a picture: {error}", where) from None
        try:
            async with self._at_once:
                return await asyncio.wait_for(_get(parts, port, where, most_bytes), FETCH_S)
        except asyncio.TimeoutError:
            why = f"it took more than {FETCH_S:g} s"
        except (OSError, h11.ProtocolError, UnicodeError) as error:
            # The error's text may contain addresses of this network.
            why = f"its machine cannot be reached or breaks off ({type(error).__name__})"
        raise invalid(
            f"{where}: the picture cannot be fetched: {why}; send it as a data URI", where
        )


def _places(value: Any, where: str) -> Iterator[tuple[Any, str, str, str]]:
    """Find the addresses of pictures: the holder of each, its key, the address, and its path."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _places(item, f"{where}[{index}]")
    elif isinstance(value, ImageBlock):
        if isinstance(value.source, URLSource):
            yield value, "source", value.source.url, f"{where}.source.url"
    elif isinstance(value, dict) and value.get("type") in ("image_url", "input_image"):
        holder, key, path = value, "image_url", f"{where}.image_url"
        if isinstance(value.get(key), dict):
            holder, key, path = value[key], "url", f"{path}.url"
        url = holder.get(key)
        if isinstance(url, str) and url[:5].lower() in ("http:", "https"):
            yield holder, key, url, path
    else:
        for key in ("messages", "input", "content", "output"):
            under = value.get(key) if isinstance(value, dict) else getattr(value, key, None)
            if isinstance(under, list):
                yield from _places(under, f"{where}.{key}".lstrip("."))


async def _get(url: SplitResult, port: int, where: str, most_bytes: int) -> bytes:
    """Ask a public machine for a picture, with HTTP/1.1.

    Raises:
        APIError: 400, the machine is not public, or answers with something else.
        OSError, h11.ProtocolError: the connection fails.
    """
    host = url.hostname or ""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    # Check all: a name that also has a private address does not belong to a public machine.
    if not addresses or not all(map(_is_public, addresses)):
        raise _not_public(where)
    reader, writer = await _connect(addresses, host, port, is_tls=url.scheme.lower() == "https")
    try:
        peer, own = (writer.get_extra_info(each)[0] for each in ("peername", "sockname"))
        if not _is_public(peer) or peer == own:
            raise _not_public(where)
        connection = h11.Connection(h11.CLIENT)
        target = (url.path or "/") + (f"?{url.query}" if url.query else "")
        name = f"[{host}]" if ":" in host else host
        headers = [
            ("host", name if port == _PORTS[url.scheme.lower()] else f"{name}:{port}"),
            ("user-agent", f"edge-llm/{__version__}"),
            ("accept", "image/*"),
            ("connection", "close"),
        ]
        request = h11.Request(method="GET", target=target, headers=headers)
        writer.write(connection.send(request) or b"")
        writer.write(connection.send(h11.EndOfMessage()) or b"")
        return await _read(connection, reader, where, most_bytes)
    finally:
        writer.close()


async def _connect(
    addresses: list[str], host: str, port: int, *, is_tls: bool
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    tls = ssl.create_default_context() if is_tls else None
    for address in addresses[:-1]:
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            opening = asyncio.open_connection(
                address, port, ssl=tls, server_hostname=host if tls else None
            )
            return await asyncio.wait_for(opening, _CONNECT_S)
    return await asyncio.open_connection(
        addresses[-1], port, ssl=tls, server_hostname=host if tls else None
    )


async def _read(
    connection: h11.Connection, reader: asyncio.StreamReader, where: str, most_bytes: int
) -> bytes:
    data = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(_READ_BYTES))
        elif isinstance(event, h11.Response) and event.status_code != 200:
            why = f"the answer has status {event.status_code}"
            if 300 <= event.status_code < 400:
                why = "it leads to another address, and that one is to be sent"
            raise invalid(f"{where}: the picture cannot be fetched: {why}", where)
        elif isinstance(event, h11.Data):
            data += event.data
            if len(data) > most_bytes:
                raise invalid(
                    f"{where}: the picture has more than the {most_bytes} bytes that are left for "
                    "pictures of this request; make it smaller",
                    where,
                )
        elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
            return bytes(data)


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if any(ip in network for network in _NOT_PUBLIC):
        return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


def _not_public(where: str) -> APIError:
    return invalid(
        f"{where}: pictures are fetched from public machines only, and this is none; send the "
        "picture as a data URI",
        where,
    )
