"""Serves the web page at ``/``: files that need no build and load nothing from other machines."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PAGE = "/"

TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".mjs": "text/javascript; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
    ".woff2": "font/woff2",
}
"""Media types of files by their suffix; files of other suffixes are not sent."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "font-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
"""Scripts and styles come only from files of this package. Text of a model can be neither, since
every other answer of the server has another type and ``nosniff``. No text becomes HTML by
``innerHTML`` and the like (trusted types), and no other machine is contacted."""

_ROOT = Path(__file__).parent
_MARK = "{files}"  # in index.html: the path of the other files


@dataclass(frozen=True)
class PageFile:
    """A file as the server sends it.

    Attributes:
        body: its content, text in UTF-8.
        headers: headers of the answer, in lower case.
    """

    body: bytes
    headers: Mapping[str, str]

    def is_known(self, if_none_match: str | None) -> bool:
        """Whether the client has exactly this content, by its header ``If-None-Match``."""
        if if_none_match is None:
            return False
        tags = {tag.strip().removeprefix("W/") for tag in if_none_match.split(",")}
        return self.headers["etag"] in tags or "*" in tags


@cache
def page_files() -> dict[str, PageFile]:
    """Read all files of the page; return them by path of the URL.

    Clients ask again only for ``/``. The other files are under a path that names their content, so
    clients keep them forever, and a page of one version never runs scripts of another.
    """
    sources = {
        path.relative_to(_ROOT).as_posix(): path.read_bytes()
        for path in sorted(_ROOT.rglob("*"))
        if path.suffix in TYPES
    }
    digest = hashlib.sha256()
    for name, body in sources.items():
        digest.update(f"{name} {len(body)} ".encode() + body)
    folder = f"page/{digest.hexdigest()[:16]}"
    index = sources.pop("index.html").replace(_MARK.encode(), folder.encode())
    files = {PAGE: _page_file(index, ".html", "no-cache")}
    for name, body in sources.items():
        suffix = Path(name).suffix
        files[f"/{folder}/{name}"] = _page_file(body, suffix, "public, max-age=31536000, immutable")
    return files


def _page_file(body: bytes, suffix: str, caching: str) -> PageFile:
    headers = {
        "content-type": TYPES[suffix],
        "cache-control": caching,
        "etag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
        "x-content-type-options": "nosniff",
        "cross-origin-resource-policy": "same-origin",
    }
    if suffix == ".html":
        headers |= {
            "content-security-policy": POLICY,
            "referrer-policy": "no-referrer",
            "cross-origin-opener-policy": "same-origin",
        }
    return PageFile(body, headers)
