from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from edge import files
from edge.bundle.engine_file import open_plan, read_engine_info
from edge.errors import BundleError
from tests.cached_pages import cached_pages, require_page_cache
from tests.conftest import Bundles
from tests.standins.tensorrt import write_engine

BUILD = r"build the engine again with: edge-llm build .* --max-batch 2"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2, "new": 1}, rf"schema version 2, this edge-llm reads 1; .*{BUILD}"),
        ({"new": 1}, rf"of a newer edge-llm \(Object contains unknown field `new`\).*{BUILD}"),
        ({"plan_bytes": 0}, rf"is damaged \(.*`\$.plan_bytes`\); {BUILD}"),
        ({"schema_version": "two"}, r"is damaged \(.*; build the engine again$"),
    ],
)
def test_an_engine_of_a_newer_edge_llm_is_not_called_damaged(
    tiny_bundles: Bundles, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    bundle = shutil.copytree(tiny_bundles("qwen2", "native", "fp16"), tmp_path / "bundle")
    engine = write_engine(Path(bundle), max_prefill=32)
    path = engine / "engine.json"
    known = json.loads(path.read_bytes())
    path.write_text(json.dumps({**known, "options": {"max_batch": 2}, **changes}))
    with pytest.raises(BundleError, match=message):
        read_engine_info(engine)


@pytest.mark.parametrize("jetson", [False, True])
def test_a_plan_that_was_hashed_leaves_no_page_cache_on_a_jetson(
    jetson: bool, tiny_bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not when it is about to be loaded, and not when it has been; elsewhere both are wanted."""
    require_page_cache(tmp_path)
    monkeypatch.setattr(files, "is_jetson", lambda _: jetson)
    bundle = shutil.copytree(tiny_bundles("qwen2", "native", "fp16"), tmp_path / "bundle")
    engine = write_engine(Path(bundle), max_prefill=32)
    info = read_engine_info(engine)
    with open_plan(engine, info) as plan:
        assert (cached_pages(engine / info.plan) == 0) is jetson
        data = bytes(plan)
        assert cached_pages(engine / info.plan) > 0
    assert (cached_pages(engine / info.plan) == 0) is jetson
    assert data == (engine / info.plan).read_bytes()
