"""Roll out, and die by SIGKILL: ``python -m tests.edge_fleet.rollout.killed ARGUMENT...``.

Reads points on standard input, one a line; each is done by a fork, whose end is written on standard
output. So a whole row of them costs one start of Python.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge.engine_config import EngineConfig
from edge_fleet.registry.reference import parse_reference
from edge_fleet.rollout import journal, service, steps
from edge_fleet.rollout.judge import Gate
from edge_lab.measure.watch_server import ServerAnswerer


def make_gate(golden: Path) -> Gate:
    return Gate((golden.with_name("text.txt"),), golden=golden, max_tokens=12)


def make_plan(arguments: list[str], **changes: Any) -> steps.Plan:
    reference, link, url, reload, golden, *staging = arguments
    options: dict[str, Any] = {
        "link": Path(link),
        "service": service.Service(ServerAnswerer(url), None),
        "reload": None if staging else reload,
        "staging": Path(staging[0]) if staging else None,
        "watch_s": 0.2,
        "gate": make_gate(Path(golden)),
        "build": False,
        "engine": EngineConfig(backend="ort-cpu", num_slots=1, kv_capacity=128),
        "switch_timeout_s": 60.0,
    }
    return steps.Plan(parse_reference(reference), **{**options, **changes})


def arm(point: str) -> None:
    """Let this process die before or after a call, e.g. ``after steps._Run._note=pulled``."""
    when, _, name = point.partition(" ")
    *path, last = name.split(".")
    owner: Any = {"steps": steps, "journal": journal, "service": service}[path[0]]
    for part in path[1:]:
        owner = getattr(owner, part)
    last, _, only = last.partition("=")
    real: Callable[..., Any] = getattr(owner, last)

    def die(*args: Any, **options: Any) -> Any:
        counts = not only or only in args
        if counts and when == "before":
            os.kill(os.getpid(), 9)
        result = real(*args, **options)
        if counts:
            os.kill(os.getpid(), 9)
        return result

    setattr(owner, last, die)


def main(arguments: list[str]) -> None:
    # A tiny model on a machine that does something else has no pace to speak of.
    service.MAX_SLOWDOWN = 1000.0
    plan = make_plan(arguments)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            arm(line.strip())
            steps.roll_out(plan)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
