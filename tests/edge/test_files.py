"""Files: page cache is given back on a Jetson, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge.files import drop_cached
from tests.cached_pages import cached_pages, require_page_cache


@pytest.mark.parametrize("node", ["dev/nvmap", "dev/nvidia0"])
def test_a_file_is_dropped_where_memory_is_shared(node: str, tmp_path: Path):
    require_page_cache(tmp_path)
    root, path = tmp_path / "root", tmp_path / "file"
    (root / node).parent.mkdir(parents=True)
    (root / node).touch()
    path.write_bytes(bytes(8 << 20))  # not on the disk yet, so it cannot be dropped before it is
    with path.open("rb") as file:
        drop_cached(file.fileno(), root)
    assert (cached_pages(path) == 0) is (node == "dev/nvmap")
