"""Talks to a registry: the OCI distribution API 1.1 over urllib3.

Blobs are small (`artifact.MAX_CHUNK_BYTES`), so a broken transfer costs only one of them. Size and
digest of what a registry sends are checked as it arrives. The `oras` package (0.2.43) does not do:
it reads a blob whole to upload it, does not check the digest of one that it downloads,
and sends its token wherever a redirect leads.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote, urlencode, urljoin, urlsplit

from edge._version import __version__
from edge.errors import ConfigError, DependencyError, IntegrityError, RegistryError, install_command

from .credentials import Credentials, find_credentials
from .reference import Reference, is_digest, is_loopback

if TYPE_CHECKING:
    import urllib3

MAX_MANIFEST_BYTES = 4 << 20
"""The largest manifest that registries take (OCI distribution spec, "Pushing Manifests")."""
MANIFEST_TYPE: Literal["application/vnd.oci.image.manifest.v1+json"] = (
    "application/vnd.oci.image.manifest.v1+json"
)
NUM_CONNECTIONS = 4
_CONNECT_S, _READ_S = 10.0, 60.0
_TRIES = 4
_PATIENCE_S = 120.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 8.0
_LONGEST_WISH_S = 30.0
_MAX_REDIRECTS = 4
_MAX_ERROR_BYTES = 1 << 16
_READ_BYTES = 1 << 16  # to read at once from what has arrived
# As git's http.lowSpeedLimit and http.lowSpeedTime, but for all connections together, since several
# on one slow line would each be too slow.
_SLOW_S, _LEAST_BYTES_PER_S = 60.0, 1024
_SENT_BYTES = 1 << 16  # to send at once; a slow line has to take them within the connect timeout
_RETRIED = (408, 429, 500, 502, 503, 504)
_BROKEN_UPLOAD = (404, 416)  # a registry's answers for an upload that holds half a blob
_PORTS = {"http": 80, "https": 443}
_PARAMETER = re.compile(r'([A-Za-z_]+)="((?:[^"\\]|\\.)*)"')


class _BusyError(RegistryError):
    """The registry is busy; retrying may succeed.

    Attributes:
        wait_s: seconds that the registry wants to be left alone.
    """

    def __init__(self, message: str, wait_s: float) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class NotThereError(ConfigError):
    """The registry has nothing under this name."""


class DeniedError(ConfigError):
    """The registry wants credentials, or refuses these."""


class Registry:
    """One repository of a registry; any thread may call it.

    Args:
        reference: names registry and repository.
        plain_http: speak HTTP without TLS; None does so only with this machine itself.
        credentials: user and password; None looks for them (`find_credentials`).

    Attributes:
        patient: whether to keep retrying a lost connection for two minutes. It is set by the first
            answer: until then the address may be wrong.

    Raises:
        DependencyError: urllib3 is not installed.
        ConfigError: stored credentials cannot be used (`find_credentials`).
    """

    def __init__(
        self,
        reference: Reference,
        *,
        plain_http: bool | None = None,
        credentials: Credentials | None = None,
    ) -> None:
        self._http = _import_urllib3()
        plain = reference.is_loopback if plain_http is None else plain_http
        self._root = f"{'http' if plain else 'https'}://{reference.registry}"
        self._repository = reference.repository
        self._name = f"{reference.registry}/{reference.repository}"
        self._credentials = credentials or find_credentials(
            reference.registry, repository=reference.repository
        )
        self.patient = False
        self._authorization: str | None = None
        self._lock = threading.Lock()
        self._arrived_bytes = 0
        self._pools: dict[str | None, urllib3.PoolManager] = {}  # by proxy

    def close(self) -> None:
        """Close the connections."""
        for pool in self._pools.values():
            pool.clear()

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def manifest(self, wanted: str) -> tuple[bytes, str]:
        """Get a manifest, and the digest of its bytes; retry a broken transfer.

        Args:
            wanted: a tag, or the digest that it must have.

        Raises:
            ConfigError: it is not there (`NotThereError`), or the registry refuses the credentials.
            IntegrityError: it does not match the digest, or is too large.
            RegistryError: the registry cannot be reached or fails.
        """
        data = self._get(f"manifests/{wanted}", MAX_MANIFEST_BYTES, {"Accept": MANIFEST_TYPE})
        digest = digest_of(data)
        if is_digest(wanted) and digest != wanted:
            raise IntegrityError(
                f"{self._name} answers {digest} where {wanted} was asked for; the registry is "
                "broken, or somebody changes what it sends"
            )
        return data, digest

    def put_manifest(self, data: bytes, wanted: str) -> None:
        """Store a manifest under a tag or its digest.

        Raises:
            ConfigError: the registry refuses it or the credentials.
            RegistryError: the registry cannot be reached or fails.
        """
        self._finish(
            self._request(
                "PUT",
                f"/v2/{self._repository}/manifests/{wanted}",
                headers={"Content-Type": MANIFEST_TYPE},
                body=data,
                push=True,
            )
        )

    def has_blob(self, digest: str) -> bool:
        """Whether the repository has a blob.

        Raises:
            ConfigError: the registry refuses the credentials.
            RegistryError: the registry cannot be reached or fails.
        """
        response = self._request(
            "HEAD", f"/v2/{self._repository}/blobs/{digest}", push=True, also=(404,)
        )
        self._finish(response)
        return bool(response.status == 200)

    def put_blob(self, data: bytes, digest: str) -> None:
        """Store a blob; a broken transfer starts again in a new upload.

        Raises:
            ConfigError: the registry refuses it or the credentials.
            RegistryError: the registry cannot be reached or fails.
        """
        headers = {"Content-Type": "application/octet-stream"}
        for left in range(_TRIES - 1, -1, -1):
            start = self._request("POST", f"/v2/{self._repository}/blobs/uploads/", push=True)
            place = start.headers.get("Location", "")
            self._finish(start)
            if not place:
                raise RegistryError(f"{self._name} does not say where a blob is to go")
            url = self._upload_place(place)
            url += ("&" if urlsplit(url).query else "?") + urlencode({"digest": digest})
            try:
                self._finish(
                    self._request("PUT", url, headers=headers, body=data, push=True, once=True)
                )
            except RegistryError as error:
                if not left:
                    raise
                wait_s = error.wait_s if isinstance(error, _BusyError) else 0.0
                time.sleep(max(wait_s, _FIRST_PAUSE_S * 2 ** (_TRIES - 1 - left)))
            else:
                return

    def _upload_place(self, place: str) -> str:
        """Find the address for a blob's upload; behind a TLS proxy it often says ``http``.

        Raises:
            RegistryError: the blob would be sent without TLS, or the address is invalid.
        """
        url = urlsplit(self._address(self._root, place))
        own = urlsplit(self._root)
        if own.scheme == "https" and url.scheme == "http" and url.hostname == own.hostname:
            url = url._replace(scheme="https", netloc=own.netloc)
        if url.scheme not in ("https", own.scheme):
            raise RegistryError(f"{self._name} wants a blob at {place[:200]!r}, without TLS")
        return url.geturl()

    def blob(self, digest: str, num_bytes: int) -> bytes:
        """Get a blob, and check its size and digest; retry a broken transfer.

        Raises:
            IntegrityError: the registry has something else.
            ConfigError: it is not there, or the registry refuses the credentials.
            RegistryError: the registry cannot be reached or fails.
        """
        data = self._get(f"blobs/{digest}", num_bytes)
        if len(data) == num_bytes and digest_of(data) == digest:
            return data
        raise IntegrityError(
            f"{self._name}: blobs/{digest} came as {len(data)} bytes with {digest_of(data)}, and "
            f"{num_bytes} bytes were announced; the registry is damaged, or somebody changes what "
            "it sends"
        )

    # ------------------------------------------------------------------------------- wire

    def _pool(self, url: str) -> urllib3.PoolManager:
        """Return the connections to an address, through the environment's proxy if it has one."""
        parts = urlsplit(url)
        proxy = urllib.request.getproxies().get(parts.scheme)
        if is_loopback(parts.netloc) or urllib.request.proxy_bypass(parts.netloc):
            proxy = None
        with self._lock:
            if proxy not in self._pools:
                self._pools[proxy] = self._make_pool(proxy)
            return self._pools[proxy]

    def _make_pool(self, proxy: str | None) -> urllib3.PoolManager:
        timeout = self._http.Timeout(connect=_CONNECT_S, read=_READ_S)
        options: dict[str, Any] = {
            "maxsize": NUM_CONNECTIONS,
            "timeout": timeout,
            "retries": False,
            "headers": {"User-Agent": f"edge-llm/{__version__}"},
        }
        if proxy:
            proxy = proxy if "://" in proxy else f"http://{proxy}"
            # urllib3 does not take user and password from the address.
            user, at, _ = urlsplit(proxy).netloc.rpartition("@")
            key = self._http.util.make_headers(proxy_basic_auth=unquote(user)) if at else None
            pool = self._http.ProxyManager(proxy, proxy_headers=key, **options)
        else:
            pool = self._http.PoolManager(**options)
        pool.pool_classes_by_scheme = {
            scheme: type(kind.__name__, (kind,), {"ConnectionCls": _timed(kind.ConnectionCls)})
            for scheme, kind in pool.pool_classes_by_scheme.items()
        }
        return pool

    def _get(self, place: str, max_bytes: int, headers: Mapping[str, str] | None = None) -> bytes:
        """Get a body from the repository; retry a broken transfer."""
        for left in range(_TRIES - 1, -1, -1):
            response = self._request("GET", f"/v2/{self._repository}/{place}", headers=headers)
            try:
                return self._read(response, max_bytes, place)
            except (self._http.exceptions.HTTPError, OSError) as error:
                if not left:
                    raise self._unreachable(error) from error
                time.sleep(_FIRST_PAUSE_S)
        raise AssertionError("the last try returns or raises")

    def _request(
        self,
        method: str,
        place: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        push: bool = False,
        also: tuple[int, ...] = (),
        once: bool = False,
    ) -> Any:
        """Send a request; retry it where that may help, and follow redirects.

        With ``once`` this is a blob's upload, which only the caller can start again.

        Returns:
            The response, with a good status or one of ``also``; its body is not read yet.
        """
        url = urljoin(self._root, place)
        retried = (*_RETRIED, *_BROKEN_UPLOAD) if once else _RETRIED
        asked_again = False
        redirects = 0
        while True:
            sent = dict(headers or {})
            is_own = _origin(url) == _origin(self._root)
            if is_own and self._authorization is not None:
                sent["Authorization"] = self._authorization
            response = self._send(method, url, sent, body, once)
            status = response.status
            if 200 <= status < 300 or status in also:
                return response
            if status in (301, 302, 303, 307, 308) and method in ("GET", "HEAD"):
                url = self._follow(url, response, redirects)
                redirects += 1
                continue
            if status == 401 and is_own and not asked_again:
                challenge = response.headers.get("WWW-Authenticate", "")
                self._finish(response)
                asked_again = True
                self._authenticate(challenge, push)
                continue
            raise self._refusal(method, url, response, retried)

    def _send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | None = None,
        once: bool = False,
    ) -> Any:
        """Send a request; retry it if the line breaks or the other end is busy.

        Returns:
            The response; its body is not read yet.
        """
        sent = dict(headers) if body is None else {**headers, "Content-Length": str(len(body))}
        pause_s, tries = _FIRST_PAUSE_S, 0
        broke: float | None = None
        while True:
            tries += 1
            pieces = None if body is None else _pieces(body)
            try:
                response = self._pool(url).request(
                    method, url, body=pieces, headers=sent, preload_content=False, redirect=False
                )
            except self._http.exceptions.HTTPError as error:
                now = time.monotonic()
                broke = broke or now
                is_over = tries >= _TRIES and not (self.patient and now < broke + _PATIENCE_S)
                if once or is_over or _is_certificate(error):
                    raise self._unreachable(error) from error
                wait_s = pause_s
            else:
                self.patient = True
                if once or response.status not in _RETRIED or tries >= _TRIES:
                    return response
                wait_s = _retry_after(response.headers.get("Retry-After"), pause_s)
                self._finish(response)
            time.sleep(wait_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _follow(self, url: str, response: Any, redirects: int) -> str:
        place = response.headers.get("Location", "")
        self._finish(response)
        target = self._address(url, place)
        schemes = ("https",) if urlsplit(url).scheme == "https" else ("http", "https")
        if redirects >= _MAX_REDIRECTS or urlsplit(target).scheme not in schemes:
            raise RegistryError(f"{self._name} sends on to {target[:200]!r}, which is not followed")
        return target

    def _address(self, base: str, place: str) -> str:
        """Resolve the address that an answer points to.

        Raises:
            RegistryError: it is invalid.
        """
        try:
            url = urljoin(base, place)
            _origin(url)
        except ValueError as error:
            raise RegistryError(f"{self._name} points to {place[:200]!r}: {error}") from error
        return url

    def _authenticate(self, challenge: str, push: bool) -> None:
        """Get the authorization that the registry demands from now on.

        Raises:
            ConfigError: it wants credentials, and there are none, or it refuses them.
            RegistryError: it demands an unknown scheme.
        """
        scheme, _, rest = challenge.partition(" ")
        if scheme.lower() == "basic":
            if self._credentials is None:
                raise self._denied("wants a user and a password, and there are none")
            self._authorization = self._basic()
            return
        parameters = {key.lower(): value for key, value in _PARAMETER.findall(rest)}
        realm = self._address("", parameters.get("realm", ""))
        own, other = urlsplit(self._root), urlsplit(realm)
        # Without TLS only to a machine that is already asked without TLS.
        safe = other.scheme == "https" or (other.scheme, other.hostname) == ("http", own.hostname)
        safe = safe and own.scheme in ("http", other.scheme)
        if scheme.lower() != "bearer" or not safe:
            raise RegistryError(
                f"{self._name} asks for credentials in a way that is not known or not safe: "
                f"{challenge[:200]!r}"
            )
        actions = "pull,push" if push else "pull"
        query = {"scope": f"repository:{self._repository}:{actions}"}
        if "service" in parameters:
            query["service"] = parameters["service"]
        headers = {} if self._credentials is None else {"Authorization": self._basic()}
        url = realm + ("&" if urlsplit(realm).query else "?") + urlencode(query)
        response = self._send("GET", url, headers)
        try:
            body = self._read(response, _MAX_ERROR_BYTES, realm)
        except self._http.exceptions.HTTPError as error:
            raise self._unreachable(error) from error
        if response.status in (401, 403):
            raise self._denied(f"refuses the credentials ({urlsplit(realm).hostname})")
        try:
            found = json.loads(body) if response.status == 200 else {}
            token = found.get("token") or found.get("access_token")
        except (ValueError, AttributeError):
            token = None
        if not isinstance(token, str) or not token.isprintable() or not token:
            raise RegistryError(f"{realm} gave no token for {self._name} ({response.status})")
        with self._lock:
            self._authorization = f"Bearer {token}"

    def _basic(self) -> str:
        assert self._credentials is not None
        found = self._credentials
        made: dict[str, str] = self._http.util.make_headers(
            basic_auth=f"{found.user}:{found.password}"
        )
        return made["authorization"]

    def _denied(self, what: str) -> DeniedError:
        return DeniedError(
            f"{self._name} {what}; log in with docker login or podman login, or set "
            "DOCKER_AUTH_CONFIG"
        )

    def _refusal(self, method: str, url: str, response: Any, retried: tuple[int, ...]) -> Exception:
        status = response.status
        try:
            said = self._read(response, _MAX_ERROR_BYTES, url).decode("utf-8", "replace")
        except (self._http.exceptions.HTTPError, OSError, IntegrityError):
            said = ""
        path = urlsplit(url).path
        said = "".join(char if char.isprintable() else " " for char in said)[:200].strip()
        if status in (401, 403):
            return self._denied(f"refuses the credentials for {path} ({status})")
        if status in retried:
            return _BusyError(
                f"{self._name} fails: {method} {path} gives {status} {said}",
                _retry_after(response.headers.get("Retry-After"), 0.0),
            )
        if status == 404:
            name = path.rpartition("/")[2]
            return NotThereError(f"{self._name} has no {name} ({status} {said})")
        return ConfigError(f"{self._name} refuses {method} {path}: {status} {said}")

    def _unreachable(self, error: Exception) -> RegistryError:
        if _is_certificate(error):
            return RegistryError(
                f"{self._root}: a certificate is refused ({error}); is the clock of this machine "
                f"right, {time.strftime('%Y-%m-%d %H:%M %Z')}, and the certificate's issuer among "
                "those of the system?"
            )
        return RegistryError(
            f"{self._root} gives no answer ({error}); is the address right, and the network up? "
            "What has arrived is kept: run the same again"
        )

    def _finish(self, response: Any) -> None:
        """Read a short body to its end, so that the connection serves the next request."""
        # A broken or long body only costs the connection: whoever read it has closed it.
        with suppress(self._http.exceptions.HTTPError, OSError, IntegrityError):
            self._read(response, _MAX_ERROR_BYTES, "")

    def _read(self, response: Any, max_bytes: int, what: str) -> bytes:
        """Read a body up to its announced length, while enough arrives.

        Raises:
            IntegrityError: it is longer.
            RegistryError: the registry sends next to nothing.
            HTTPError, OSError: it breaks off.
        """
        data = bytearray()
        began, before = time.monotonic(), self._arrived_bytes
        try:
            while piece := response.read1(_READ_BYTES, decode_content=False):
                data += piece
                if len(data) > max_bytes:
                    raise IntegrityError(
                        f"{self._name}: {what} is longer than the {max_bytes} bytes it may have"
                    )
                with self._lock:
                    self._arrived_bytes += len(piece)
                passed_s = time.monotonic() - began
                if passed_s < _SLOW_S:
                    continue
                arrived = self._arrived_bytes - before
                if arrived < _LEAST_BYTES_PER_S * passed_s:
                    raise RegistryError(
                        f"{self._root} sends too slowly: {arrived} bytes in {passed_s:.0f} s, and "
                        f"less than {_LEAST_BYTES_PER_S} a second is not waited for. What has "
                        "arrived is kept: run the same again later"
                    )
                began, before = time.monotonic(), self._arrived_bytes
        except BaseException:
            response.close()
            raise
        response.release_conn()
        return bytes(data)


def digest_of(data: bytes) -> str:
    """Compute a digest as registries write it."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _timed(kind: Any) -> Any:
    """Make a urllib3 connection that hangs up if the head of an answer is late.

    urllib3's own limit is for each read, so a head that comes byte by byte would never exceed it.
    """

    def getresponse(self: Any) -> Any:
        is_late = threading.Event()

        def hang_up() -> None:
            is_late.set()
            if self.sock is not None:
                with suppress(OSError):  # a TLS layer's own shutdown would wait
                    socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

        timer = threading.Timer(_READ_S, hang_up)
        timer.daemon = True
        timer.start()
        try:
            response = kind.getresponse(self)
        finally:
            timer.cancel()
        if is_late.is_set():  # otherwise the part that came would count as the whole head
            response.close()
            raise TimeoutError(f"its answer did not begin within {_READ_S:g} s")
        return response

    return type(kind.__name__, (kind,), {"getresponse": getresponse})


def _retry_after(given: str | None, default_s: float) -> float:
    """Return the seconds to wait; a date is ignored, since a wrong clock would misread it."""
    is_number = given is not None and given.isascii() and given.isdigit()
    return min(float(given or 0) if is_number else default_s, _LONGEST_WISH_S)


def _is_certificate(error: Exception) -> bool:
    """Whether the other end's certificate is not valid: now, or for its name."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
        cause = cause.__cause__ or cause.__context__
    return cause is not None


def _pieces(body: bytes) -> Iterator[bytes]:
    for start in range(0, len(body), _SENT_BYTES):
        yield body[start : start + _SENT_BYTES]


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or _PORTS.get(parts.scheme)


def _import_urllib3() -> Any:
    try:
        import urllib3
    except ImportError as error:
        raise DependencyError(
            f"registries need urllib3; run: {install_command('registry')}"
        ) from error
    return urllib3
