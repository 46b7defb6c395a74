"""Sections of optional rooms survive what the manifest does not know of them."""

from __future__ import annotations

import msgspec
import pytest

from edge.bundle.extras import read_extra
from edge.bundle.manifest import decode_manifest
from edge.errors import BundleError
from edge_make.manifest_bytes import encode_manifest
from tests.makers.manifests import make_manifest


class Pictures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    graph: str
    rows: tuple[int, ...]
    scale: float = 1.0


def test_a_section_comes_back_as_it_was_written():
    written = Pictures("vision.onnx", (64, 1088))
    manifest = make_manifest(
        extras={"pictures": msgspec.to_builtins(written), "unknown": {"a": []}}
    )
    read = decode_manifest(encode_manifest(manifest))
    assert read_extra(read, "pictures", Pictures) == written
    assert read_extra(read, "adapters", Pictures) is None
    assert read.extras["unknown"] == {"a": []}  # of a newer edge-llm: kept, and nobody reads it
    assert make_manifest().extras == {}


@pytest.mark.parametrize(
    ("section", "complaint"),
    [
        ({"graph": "v"}, "missing required field `rows`"),
        ({"graph": 1, "rows": []}, "Expected `str`, got `int` - at `$.graph`"),
        ({"graph": "v", "rows": [], "new": 1}, "contains unknown field `new`"),
    ],
)
def test_a_section_that_does_not_fit_names_itself(section: dict[str, object], complaint: str):
    manifest = make_manifest(extras={"pictures": section})
    with pytest.raises(BundleError) as caught:
        read_extra(manifest, "pictures", Pictures)
    assert complaint in str(caught.value)
    assert "section pictures" in str(caught.value)
