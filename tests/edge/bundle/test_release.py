"""Which release a bundle is, as its manifest says it."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import msgspec
import pytest

from edge.bundle.manifest import decode_manifest
from edge.bundle.release import RELEASE, Release, read_release
from edge.errors import BundleError
from edge_make.manifest_bytes import encode_manifest
from tests.makers.manifests import make_manifest

SIGNED = datetime(2026, 11, 30, 10, 0, tzinfo=timezone.utc)


def test_a_release_comes_back_as_it_was_signed():
    written = Release(12, SIGNED, SIGNED + timedelta(days=90), "acme/r1-7b")
    manifest = make_manifest(extras={RELEASE: msgspec.to_builtins(written)})
    assert read_release(decode_manifest(encode_manifest(manifest))) == written
    assert read_release(make_manifest()) is None
    assert str(written) == (
        "12 of acme/r1-7b, signed 2026-11-30 10:00 UTC, expires 2027-02-28 10:00 UTC"
    )
    assert str(Release(1, SIGNED)) == "1, signed 2026-11-30 10:00 UTC"


@pytest.mark.parametrize(
    "changes",
    [
        {"number": 0},
        {"number": 1 << 51},
        {"number": "12"},
        {"expires": "2027-01-01T00:00:00"},  # of which zone?
        {"expires": "tomorrow"},
        {"name": "Acme/r1"},
        {"name": "acme//r1"},
        {"name": "acme/r1\n"},
        {"name": "../r1"},
        {"name": ""},
        {"until": "2027-01-01T00:00:00Z"},  # of a newer edge-llm, and perhaps a condition
    ],
)
def test_a_malformed_release_is_refused(changes: dict[str, Any]):
    section = {"number": 1, "signed": "2026-11-30T10:00:00Z", **changes}
    with pytest.raises(BundleError, match="section release does not fit"):
        read_release(make_manifest(extras={RELEASE: section}))
