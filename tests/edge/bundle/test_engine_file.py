from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from edge.bundle.engine_file import read_engine_info
from edge.errors import BundleError
from tests.conftest import Bundles
from tests.fake_tensorrt import write_engine

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
