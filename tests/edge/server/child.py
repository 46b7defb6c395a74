"""A service with a scripted engine in a process of its own, for tests that send signals.

``python -m tests.edge.server.child BUNDLE DELAY_S SETTING=VALUE...``
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from edge.config_file import load_settings
from edge.server.observe.logs import configure_logging
from edge.server.run import serve
from edge.server.settings import ServerSettings
from tests.edge.server.scripted import ScriptedEngine


def main(bundle: str, delay_s: str, *pairs: str) -> int:
    engine = ScriptedEngine()
    engine.default = "x" * 40
    engine.delay_s = float(delay_s)
    flags: dict[str, Any] = dict(pair.split("=", 1) for pair in pairs)
    flags |= {"model": {"tiny": bundle}, "port": "0"}
    settings = load_settings(ServerSettings, flags=flags).settings
    configure_logging(settings.log_format, settings.log_level)
    return serve(settings, lambda path: engine.open(Path(path), num_slots=4, queue_capacity=64))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
