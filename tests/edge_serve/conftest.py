"""One service for most tests, a bundle that takes tools, and a file of keys."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import RUNNABLE, Bundles, write_secret
from tests.edge_serve.scripted import HERMES_TEMPLATE, KEY, Live, running
from tests.makers.manifests import replace_file
from tests.makers.tiny_vision import write_vision_checkpoint
from tests.selection import shared_server


@pytest.fixture(scope="session")
def live(tiny_bundles: Bundles) -> Iterator[Live]:
    bundle = tiny_bundles("qwen2")
    with contextlib.ExitStack() as stack:
        with shared_server():
            service = stack.enter_context(running(bundle, max_body_bytes=300_000, max_choices=8))
        yield service


@pytest.fixture(scope="session")
def tool_bundle(tiny_bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with a template that takes tools."""
    bundle = tmp_path_factory.mktemp("tools") / "tiny"
    shutil.copytree(tiny_bundles("qwen2"), bundle)
    replace_file(bundle, "chat_template.jinja", HERMES_TEMPLATE.encode())
    return bundle


@pytest.fixture(scope="session")
def client_keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with `KEY`."""
    return write_secret(tmp_path_factory.mktemp("keys") / "keys", f"client:{KEY}\n")


@pytest.fixture(scope="session")
def sees_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle in SmolVLM's layout, which reads pictures."""
    from export.pipeline import ExportConfig, export_checkpoint

    root = tmp_path_factory.mktemp("sees")
    source, output = write_vision_checkpoint(root / "checkpoint"), root / "tiny"
    config = ExportConfig(
        source=str(source), output=output, quant="fp16", dialect=RUNNABLE, kv_capacity=640
    )
    export_checkpoint(config)
    return output
