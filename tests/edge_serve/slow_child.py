"""A service of a real bundle, on the CPU, whose steps take a while, in a process of its own.

``python -m tests.edge_serve.slow_child BUNDLE DELAY_S SETTING=VALUE...``; the effort ``minimal``
has 40 tokens, as the context of a tiny model is short.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge.backends.step import Step
from edge.errors import EdgeError
from edge.runtime.llm import LLM
from edge_serve import run
from edge_serve.api import chat
from edge_serve.config_file import load_settings
from edge_serve.observe.logs import configure_logging
from edge_serve.settings import ServerSettings


def slowed(forward: Callable[[Step], Any], delay_s: float) -> Callable[[Step], Any]:
    def slow(step: Step) -> Any:
        time.sleep(delay_s)
        return forward(step)

    return slow


def main(bundle: str, delay_s: str, *pairs: str) -> int:
    chat._EFFORT_TOKENS["minimal"] = 40
    flags: dict[str, Any] = dict(pair.split("=", 1) for pair in pairs)
    flags |= {"model": {"tiny": bundle}, "port": "0", "backend": "ort-cpu"}
    try:
        settings = load_settings(ServerSettings, flags=flags).settings
        configure_logging(settings.log_format, settings.log_level)

        def open_one(path: Path) -> LLM:
            llm = LLM(path, settings.engine)
            backend: Any = llm.backend
            backend.forward = slowed(backend.forward, float(delay_s))
            return llm

        return run.serve(settings, open_one)
    except EdgeError as error:
        sys.stderr.write(f"Error: {error}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
