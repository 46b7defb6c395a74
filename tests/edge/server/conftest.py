"""One service for most tests, and a bundle that takes tools."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from edge.bundle.manifest import FileInfo, encode_manifest, read_manifest
from tests.conftest import Bundles
from tests.edge.server.scripted import HERMES_TEMPLATE, Live, running


@pytest.fixture(scope="session")
def live(tiny_bundles: Bundles) -> Iterator[Live]:
    with running(tiny_bundles("qwen2"), max_body_bytes=300_000, max_choices=8) as service:
        yield service


@pytest.fixture(scope="session")
def tool_bundle(tiny_bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with a template that takes tools."""
    bundle = tmp_path_factory.mktemp("tools") / "tiny"
    shutil.copytree(tiny_bundles("qwen2"), bundle)
    template = HERMES_TEMPLATE.encode()
    (bundle / "chat_template.jinja").write_bytes(template)
    manifest = read_manifest(bundle)
    info = FileInfo(len(template), hashlib.sha256(template).hexdigest())
    files = {**manifest.files, "chat_template.jinja": info}
    changed = msgspec.structs.replace(manifest, files=files)
    (bundle / "manifest.json").write_bytes(encode_manifest(changed))
    return bundle
