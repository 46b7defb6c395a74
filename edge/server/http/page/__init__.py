"""The web page at ``/``: one file that needs no build and asks no other machine for anything."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

CONTENT_TYPE = "text/html; charset=utf-8"

_INLINE = {
    "script": re.compile(rb"<script>(.*?)</script>", re.DOTALL),
    "style": re.compile(rb"<style>(.*?)</style>", re.DOTALL),
}


@cache
def load_page() -> bytes:
    """Read the page, UTF-8."""
    return (Path(__file__).parent / "index.html").read_bytes()


@cache
def page_headers() -> dict[str, str]:
    """Return the headers that the page is sent with, in lower case.

    The policy names the page's own script and style by their hashes, so nothing that a model or a
    client writes can run, and nothing is loaded from or sent to another machine.
    """
    sources = {
        kind: " ".join(f"'sha256-{_sha256(part)}'" for part in pattern.findall(load_page()))
        for kind, pattern in _INLINE.items()
    }
    policy = (
        f"default-src 'none'; script-src {sources['script']}; style-src {sources['style']}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return {
        "content-type": CONTENT_TYPE,
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cache-control": "no-cache",
    }


def _sha256(data: bytes) -> str:
    return base64.b64encode(hashlib.sha256(data).digest()).decode()
