from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.errors import ConfigError
from edge_fleet.registry.reference import Reference, is_reference, parse_reference

DIGEST = "sha256:" + "0a" * 32


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("localhost:5000/r1", Reference("localhost:5000", "r1", "latest")),
        ("ghcr.io/team/r1-7b:v1.2_x", Reference("ghcr.io", "team/r1-7b", "v1.2_x")),
        (f"a.b/c/d@{DIGEST}", Reference("a.b", "c/d", None, DIGEST)),
        (f"a.b/c:t@{DIGEST}", Reference("a.b", "c", "t", DIGEST)),
        ("[::1]:5000/r1:x", Reference("[::1]:5000", "r1", "x")),
    ],
)
def test_a_reference_is_read(text: str, found: Reference):
    assert parse_reference(text) == found
    assert is_reference(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "r1",
        "host/",
        "host/R1:v1",
        "host/r1:",
        "host/r1@sha256:abc",
        f"host/r1@{DIGEST[:-1]}G",
        "https://host/r1:v1",
        "user:secret@host/r1",
        "host:99999/r1",
        "host:0/r1",
        "host/a..b",
        "host/../etc",
        "host/r1:v1\n",
        "host/" + "a" * 600,
        "-x/r1",
    ],
)
def test_invalid_references_are_refused(text: str):
    with pytest.raises(ConfigError, match=r"no reference to a registry|ports are 1 to 65535"):
        parse_reference(text)


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        ("localhost", True),
        ("localhost:5000", True),
        ("127.0.0.1", True),
        ("127.8.9.1:5000", True),
        ("[::1]:5000", True),
        ("[::1]", True),
        ("localhost.example.com", False),
        ("127.0.0.1.example.com", False),
        ("10.0.0.1:5000", False),
        ("0.0.0.0", False),
    ],
)
def test_plain_http_is_for_this_machine(host: str, is_loopback: bool):
    assert parse_reference(f"{host}/r1").is_loopback is is_loopback


@given(
    st.text(max_size=60) | st.from_regex(r"[a-z0-9.:\[\]-]{1,20}/[a-z0-9/_.-]{1,20}(:[\w.-]{1,9})?")
)
def test_a_reference_survives_writing_and_reading(text: str):
    try:
        found = parse_reference(text)
    except ConfigError:
        return
    assert parse_reference(str(found)) == found
    assert "\n" not in str(found)
    assert ".." not in found.repository
