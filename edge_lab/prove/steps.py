"""Runs the steps of a proof: a command in a process of its own, its verdict, an engine's cells.

``edge-llm prove`` and ``scripts/gpu-check`` are built on them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

NOT_BEGUN = 75
"""Exit code of a step that did not begin because the time was over (``EX_TEMPFAIL``)."""
TIMED_OUT = 124
_ERROR_LINES = 30


class Done(NamedTuple):
    """A step's exit code, standard output, and the last lines of its standard error."""

    code: int
    output: str
    error: str = ""


Run = Callable[[str, Sequence[str]], Done]
"""Runs a command under a step's name; ``edge-llm`` is the one of this Python."""


def logged_run(
    output: Path,
    say: Callable[[str], None],
    *,
    directory: Path | None = None,
    limit_s: Callable[[str], float | None] = lambda _: None,
) -> Run:
    """Make a `Run` that writes what a step prints to ``<step>.log``.

    A step that takes too long, or whose caller is interrupted, is ended with all processes that it
    started.

    Args:
        output: existing directory of the logs.
        say: called with each step's name before it begins.
        directory: where commands run; None is the working directory.
        limit_s: function from a step's name to the seconds it may take; None is no limit.
    """

    def run(step: str, command: Sequence[str]) -> Done:
        say(step)
        if command[0] == "edge-llm":
            command = [sys.executable, "-m", "edge.cli", *command[1:]]
        path, limit = output / f"{step}.log", limit_s(step)
        with path.open("w") as log:
            child = subprocess.Popen(
                command,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            late, printed = False, ""
            try:
                printed, _ = child.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                late = True
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
            if late:
                printed, _ = child.communicate()
                log.write(f"\nit was ended after {limit:.0f} s\n")
        errors = path.read_text(errors="replace").splitlines()[-_ERROR_LINES:]
        with path.open("a") as log:
            log.write(printed)
        return Done(TIMED_OUT if late else child.returncode, printed, "\n".join(errors))

    return run


def cell(done: Done, json_needed: bool = False) -> dict[str, Any]:
    """Judge one command: its verdict, its reason and its JSON."""
    found: dict[str, Any] = {"verdict": "passed", "code": done.code, "reason": ""}
    result = last_json(done.output)
    if done.code != 0:
        lines = [line for line in done.error.splitlines() if line.strip()]
        errors = [line for line in lines if "error: " in line]
        found["verdict"] = "skipped" if done.code == NOT_BEGUN else "failed"
        found["reason"] = (errors or lines or [f"exit code {done.code}"])[-1].strip()
        found["stderr"] = lines
    elif json_needed and result is None:
        found["verdict"], found["reason"] = "failed", "it printed no JSON"
    if result is not None:
        found["result"] = result
    return found


def last_json(output: str) -> Any:
    """Return the JSON of the last line that is an object; None if none is."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except ValueError:
                continue
    return None


ENGINE_CELLS = ("build", "verify", "bench", "layers")


def check_engine(
    name: str,
    bundle: Path,
    run: Run,
    options: Sequence[str] = (),
    directory: Path = Path(),
) -> dict[str, dict[str, Any]]:
    """Build an engine, compare it with the CPU, measure it and look into it: a verdict each.

    The engine that was built last is the one that runs, so check the engines of a bundle one after
    the other.

    Args:
        name: name of the row, which names the logs.
        bundle: directory of the bundle.
        run: runs a step.
        options: options for ``edge-llm build``.
        directory: directory in which commands run.
    """
    row: dict[str, dict[str, Any]] = {}
    build = run(f"{name}-build", ["edge-llm", "build", str(bundle), *options, "--json"])
    row["build"] = cell(build, json_needed=True)
    if row["build"]["verdict"] != "passed":
        return skip_rest(row, "the build failed", ENGINE_CELLS)
    engine = row["build"]["result"]["engine"]
    row["build"]["scratch_bytes"] = read_scratch(directory / engine / "build.log")
    on_engine = [str(bundle), "--backend", "tensorrt", "--json"]
    verify = run(f"{name}-verify", ["edge-llm", "verify", *on_engine])
    row["verify"] = cell(verify, json_needed=True)
    row["bench"] = cell(run(f"{name}-bench", ["edge-llm", "bench", *on_engine]), json_needed=True)
    row["layers"] = check_layers(name, engine, on_engine, run)
    return row


def read_scratch(log: Path) -> list[int]:
    """Read the scratch memory of each profile, in bytes, from what the builder logged."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return []
    words = [
        line.split("Max Scratch Memory: ")[1].split() for line in lines if "Max Scratch" in line
    ]
    return [int(found[0]) for found in words if found and found[0].isdigit()]


def skip_rest(
    row: dict[str, dict[str, Any]], reason: str, cells: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Mark the cells that are skipped because an earlier one failed."""
    for name in cells:
        row.setdefault(name, {"verdict": "skipped", "reason": reason})
    return row


def check_layers(name: str, engine: str, on_engine: list[str], run: Run) -> dict[str, Any]:
    """Ask which layers the engine has, and how long each takes."""
    inspect = ["edge-llm", "inspect", engine, "--layers", "--json", "--no-verify"]
    table = cell(run(f"{name}-inspect", inspect), json_needed=True)
    if table["verdict"] != "passed":
        return table
    compiled = table["result"].get("compiled")
    table["skipped_tactics"] = (table["result"].get("skipped_tactics") or {"count": 0})["count"]
    if not compiled:
        reason = table["result"].get("compiled_unknown") or "the engine has no table of layers"
        return {**table, "verdict": "failed", "reason": reason}
    short = ["--layers", "--repeats", "1", "--output-tokens", "17"]
    found = cell(run(f"{name}-layers", ["edge-llm", "bench", *on_engine, *short]), json_needed=True)
    found["skipped_tactics"] = table["skipped_tactics"]
    if found["verdict"] == "passed":
        times = found["result"].get("layers") or {}
        found["result"] = {
            "compiled": compiled,
            "attention": table["result"].get("attention"),
            "times": times,
        }
        unpacking = sum(profile["unpacking"] for profile in compiled)
        if unpacking:
            found["verdict"] = "failed"
            found["reason"] = f"{unpacking} layers unpack weights each time that they run"
        elif not (times.get("decode") or {}).get("layers"):
            found["verdict"], found["reason"] = "failed", "the profiler timed no layer of decode"
    return found


def has_gpu(doctor: dict[str, Any] | None) -> bool:
    """Whether doctor made a context on a GPU."""
    checks = (doctor or {}).get("checks", ())
    return any(check["name"] == "GPU" and check["status"] in ("ok", "warn") for check in checks)


def read_tensorrt(run: Run) -> str | None:
    """Ask which TensorRT this Python imports; None without one."""
    code = "import tensorrt; print(tensorrt.__version__)"
    done = run("tensorrt", [sys.executable, "-c", code])
    lines = done.output.split()
    return lines[-1] if done.code == 0 and lines else None
