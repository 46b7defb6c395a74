"""Tactics that were skipped, in the words of real logs."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from edge.bundle.engine_file import SkippedTactics, read_engine_info
from edge.errors import BuildError
from engines.builder.build import build_engine
from engines.builder.target import Target
from engines.compiler import compat
from engines.compiler.skipped_tactics import skipped_tactics
from engines.config import BuildConfig
from tests.conftest import Bundles

MIB = 1 << 20
REQUEST = (
    "Tactic Device request: {}MB Available: {}MB. Device memory is insufficient to use tactic."
)
IN_BYTES = (
    "UNSUPPORTED_STATE: Skipping tactic 0 due to insufficient memory on requested size of "
    "150405120 detected for tactic 0x0000000000000009."
)
IN_MIB = (
    "Skipping tactic 3 due to insuficient memory on requested size of 538 detected for tactic 4."
)


@pytest.mark.parametrize(
    ("log", "found"),
    [
        ([], None),
        (["[MemUsageStats] Peak memory usage of TRT CPU/GPU memory: CPU 9 MiB, GPU 9 MiB"], None),
        # TensorRT 10.3, isaac_ros_common#223: both lines for each
        (
            2 * [f"warning: {REQUEST.format(143, 112)}", f"warning: {IN_BYTES}"],
            SkippedTactics(2, 150405120, 112 * MIB),
        ),
        # ultralytics#17338: requests alone
        (
            [f"[W] {REQUEST.format(950, 690)}", f"[W] {REQUEST.format(952, 688)}"],
            SkippedTactics(2, 952 * MIB, 688 * MIB),
        ),
        # ultralytics#14751: a size in MiB
        (["[11/24/2026-10:00:31] [W] [TRT] " + IN_MIB], SkippedTactics(1, 538 * MIB, None)),
    ],
)
def test_they_are_counted_with_the_largest_and_the_least(
    log: list[str], found: SkippedTactics | None
) -> None:
    assert skipped_tactics(log) == found


@pytest.fixture
def bundle(tiny_bundles: Bundles, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundles("qwen2", "native", "int4"), tmp_path / "bundle"))


@pytest.mark.parametrize("fails", [False, True])
def test_a_build_says_what_was_skipped_and_the_engine_keeps_it(
    fails: bool, bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And where none was left, that is the cause, which TensorRT's last error does not name."""
    pytest.importorskip("tensorrt_rtx")
    make, build = compat.Compiler.__init__, compat.Compiler.build

    def listen(compiler: Any, rt: Any, log: Any) -> None:
        make(compiler, rt, log)
        compiler.said = log

    def skip(compiler: Any, *args: Any, **options: Any) -> Any:
        for text in (REQUEST.format(1000, 302), IN_BYTES):
            compiler.said("warning", text)
        if fails:
            raise BuildError("Could not find any implementation for node")
        return build(compiler, *args, **options)

    monkeypatch.setattr(compat.Compiler, "__init__", listen)
    monkeypatch.setattr(compat.Compiler, "build", skip)
    caplog.set_level(logging.WARNING)
    said = r"tactics skipped for lack of memory: 1 \(1,049 MB asked for, 317 MB were free\)"
    config = BuildConfig(bundle, max_prefill=32)
    target = Target(compat.load("tensorrt-rtx"), None, "8.6")
    if fails:
        with pytest.raises(BuildError, match=f"any implementation .*; {said}: .*drop_caches"):
            build_engine(config, target=target)
        return
    result = build_engine(config, target=target)
    assert read_engine_info(result.directory).skipped_tactics == result.info.skipped_tactics
    assert result.info.skipped_tactics == SkippedTactics(1, 1000 * MIB, 302 * MIB)
    (line,) = [each.getMessage() for each in caplog.records if "skipped" in each.getMessage()]
    assert re.match(said, line)
    assert "drop_caches" in line
    assert "build with --again" in line
