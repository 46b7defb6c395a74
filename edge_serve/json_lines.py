"""Writes JSON that every reader of lines takes for one line."""

from __future__ import annotations

from typing import Any

import msgspec

# Characters that `str.splitlines`, and so httpx, takes for line ends; JSON escapes all others.
_ENDS = {end.encode(): f"\\u{ord(end):04x}".encode() for end in "\x85\u2028\u2029"}
_encode = msgspec.json.Encoder().encode


def json_line(value: Any) -> bytes:
    """Encode a value, and end the line."""
    data = _encode(value)
    for end, escape in _ENDS.items():
        data = data.replace(end, escape)
    return data + b"\n"
