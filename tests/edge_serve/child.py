"""A service with a scripted engine in a process of its own, for tests that send signals.

``python -m tests.edge_serve.child BUNDLE DELAY_S SETTING=VALUE...``; ``open_delay_s=S`` says how
long a model takes to open, ``close_s=S`` how long the end waits for an engine, ``max_files=N`` is
the limit of open files, ``answer=TEXT`` what every chat is answered.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

from edge.errors import EdgeError
from edge.runtime.llm import LLM
from edge_serve import run
from edge_serve.config_file import load_settings
from edge_serve.observe.logs import configure_logging
from edge_serve.settings import ServerSettings
from tests.edge_serve.scripted import CAPACITY, ScriptedEngine


def main(bundle: str, delay_s: str, *pairs: str) -> int:
    engine = ScriptedEngine()
    engine.delay_s = float(delay_s)
    flags: dict[str, Any] = dict(pair.split("=", 1) for pair in pairs)
    engine.default = flags.pop("answer", "x" * 40)
    open_delay_s = float(flags.pop("open_delay_s", 0))
    run._CLOSE_S = float(flags.pop("close_s", run._CLOSE_S))
    if max_files := int(flags.pop("max_files", 0)):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max_files, max_files))
    flags |= {"model": {"tiny": bundle}, "port": "0"}
    settings = load_settings(ServerSettings, flags=flags).settings
    configure_logging(settings.log_format, settings.log_level)

    def open_one(path: Path) -> LLM:
        time.sleep(open_delay_s)
        capacity = settings.kv_capacity or CAPACITY
        return engine.open(path, num_slots=4, queue_capacity=64, kv_capacity=capacity)

    try:
        return run.serve(settings, open_one)
    except EdgeError as error:
        sys.stderr.write(f"Error: {error}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
