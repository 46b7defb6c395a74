"""Replace the engine of a bundle, and be killed before the N-th file operation in ``engines/``.

Run as ``python -m tests.engines.kill_child BUNDLE N``. Operations are seen through Python's audit
events.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import msgspec

from edge.bundle.engine_file import find_engines, read_engine_info
from engines.builder.store import EngineStore

EVENTS = {"open", "os.rename", "os.remove", "os.listdir", "os.scandir", "os.mkdir"}


def main(bundle: Path, last: int) -> None:
    seen = 0

    def step(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in EVENTS and "engines" in str(args[0] if args else ""):
            seen += 1
            if seen == last:
                os.kill(os.getpid(), signal.SIGKILL)

    (directory,) = find_engines(bundle)
    info = read_engine_info(directory)
    store = EngineStore(bundle, directory.name)
    sys.addaudithook(step)
    with store.locked(lambda: None):
        store.commit(
            b"new plan" * 1000,
            lambda name, num_bytes, sha256: msgspec.structs.replace(
                info, key="new", plan=name, plan_bytes=num_bytes, plan_sha256=sha256
            ),
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
