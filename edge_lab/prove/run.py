"""Runs ``edge-llm prove``: plans its steps, resumes an earlier run, and writes the report.

A finished step leaves its answer in ``work/steps``. A run that was interrupted or ran out of time
goes on with the missing steps; a step that failed is tried again. The answers are thrown away if
they come from another machine, JetPack, power mode or edge-llm. Once every step has passed,
``work`` is removed.
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from edge._version import __version__
from edge.cli import to_json
from edge.device.nodes import find_gpu_node
from edge.errors import EXIT_GATE_MISSED, DependencyError
from edge.files import MALFORMED
from edge_lab.telemetry import read_cpu_name, read_snapshot
from edge_make.atomic_swap import check_free_space
from edge_make.target import locked, write_durably

from . import power
from .report import SCHEMA, seal
from .steps import (
    ENGINE_CELLS,
    NOT_BEGUN,
    Done,
    Run,
    cell,
    check_engine,
    has_gpu,
    logged_run,
    read_tensorrt,
    skip_rest,
)

REPORT, PAGE = "report.json", "report.md"
DISK_BYTES = 5_000_000_000
"""Disk for the checkpoint, the bundle and its engines, with `ProofPlan.layers` layers of 1.5B."""
LAYERS, SHAPE = 4, "1.5b"
ENGINES: dict[str, tuple[str, ...]] = {
    "tensorrt": ("--kernels", "tensorrt"),
    "own-python": ("--kernels", "own", "--plugins", "python"),
    "own": ("--kernels", "own"),
}
"""Options of ``edge-llm build`` for each engine; the last one is measured in every power mode."""
_AHEAD_OF_TIME = (10, 13)  # since then TensorRT also takes plugins compiled into the engine
CPU = "cpu"
_CPU_PROMPTS, _CPU_TOKENS, _CPU_SECONDS = 120, 32, 400


@dataclass(frozen=True)
class ProofStep:
    """A step, and the time that it may take.

    Attributes:
        name: name of its log and its answer.
        minutes: expected minutes on an AGX Orin; predicted, since none has run it yet.
        limit_s: seconds after which it is ended.
    """

    name: str
    minutes: float
    limit_s: float


@dataclass(frozen=True)
class ProofPlan:
    """Settings of a run.

    Attributes:
        output: directory of the report.
        gpu: whether engines are built; else the CPU proves what it can.
        minutes: time after which no step begins.
        power_modes: whether to measure in every mode that needs no reboot, too.
        shape, layers: shape and layers of the model, as in `edge_lab.prove.checkpoint`.
    """

    output: Path
    gpu: bool
    minutes: float = 15.0
    power_modes: bool = False
    shape: str = SHAPE
    layers: int = LAYERS

    @property
    def steps(self) -> list[ProofStep]:
        """Every step in order, those of the power modes aside."""
        engines = ENGINES if self.gpu else (CPU,)
        return [
            ProofStep("doctor", 0.5, 600),
            *([ProofStep("tensorrt", 0.1, 120)] if self.gpu else []),
            ProofStep("checkpoint", 0.3, 600),
            ProofStep("export", 1.5, 1800),
            *(
                ProofStep(f"{name}-{part}", minutes, limit_s)
                for name in engines
                for part, minutes, limit_s in _ENGINE_STEPS
                if self.gpu or part in ("verify", "bench", "soak")
            ),
        ]

    def limit_s(self, step: str) -> float:
        """Return after how many seconds a step is ended; steps of power modes have a limit, too."""
        return {each.name: each.limit_s for each in self.steps}.get(step, _OTHER_LIMIT_S)


_ENGINE_STEPS = (
    ("build", 1.9, 1800.0),
    ("verify", 0.8, 1800.0),
    ("bench", 0.3, 600.0),
    ("inspect", 0.1, 120.0),
    ("layers", 0.2, 600.0),
    ("soak", 0.8, 600.0),
)
_OTHER_LIMIT_S = 600.0


def has_tensorrt() -> bool:
    """Return whether TensorRT's Python package is installed, without importing it."""
    from importlib.util import find_spec

    return find_spec("tensorrt") is not None


def engines_of(tensorrt: str | None) -> tuple[str, ...]:
    """Name the engines to prove; before 10.13 own kernels are Python plugins in any case."""
    parts = (tensorrt or "").split(".")[:2]
    both = [int(part) for part in parts if part.isdigit()] >= [*_AHEAD_OF_TIME]
    return tuple(name for name in ENGINES if both or name != "own-python")


def make_plan(output: Path, *, minutes: float, power_modes: bool) -> ProofPlan:
    """Plan for this machine.

    Raises:
        DependencyError: power modes are asked for where there is no GPU to measure.
    """
    gpu = find_gpu_node() is not None and has_tensorrt()
    if power_modes and not gpu:
        raise DependencyError(
            "--power-modes measures an engine in each mode, and there is no NVIDIA GPU with "
            "TensorRT here; leave it out"
        )
    return ProofPlan(output, gpu, minutes, power_modes)


def prove(plan: ProofPlan, say: Callable[[str], None], run: Run | None = None) -> dict[str, Any]:
    """Run the missing steps, write the report, and return its content.

    Args:
        plan: the steps to run.
        say: called with a line for every step and for anything noteworthy.
        run: function that runs a step, for tests.

    Raises:
        ConfigError: another run writes there, or the power modes cannot be changed.
        ResourceError: the disk is too full.
    """
    before = power.check_rights() if plan.power_modes else []
    modes = power.modes_without_reboot() if plan.power_modes else {}
    with locked(plan.output, "run of edge-llm prove"):
        work, note = plan.output / "work", plan.output / "power-mode-before"
        power.restore(note, before, say)
        _begin(plan, work, say)
        run = run or logged_run(work, say, directory=work, limit_s=plan.limit_s)
        resumed = _Resumed(plan, work, run)
        content = _content(plan, resumed, work / "bundle")
        guard = power.mode_restored(note, before, say) if modes else nullcontext()
        with guard:
            content["power_modes"] = {
                name: _measure_mode(resumed, work / "bundle", before, number, name)
                for number, name in modes.items()
            }
        content["steps"] = resumed.records()
        content["problems"] = find_problems(content)
        content["passed"] = not content["problems"]
        content = _without_places(content, plan.output)
        write_durably(plan.output / REPORT, (to_json(seal(content), indent=1) + "\n").encode())
        if not resumed.left:
            shutil.rmtree(work)
    return content


def exit_code(content: dict[str, Any]) -> int:
    """Return 0 if all was proven, 69 if nothing could be proven on a GPU, else 3."""
    if not content["gpu"]:
        return DependencyError.exit_code
    return 0 if content["passed"] else EXIT_GATE_MISSED


def _begin(plan: ProofPlan, work: Path, say: Callable[[str], None]) -> None:
    """Keep the answers of an earlier run, or delete them if they come from another machine."""
    mark = work / "of.json"
    is_of = {**_versions(), "plan": [plan.gpu, plan.shape, plan.layers], **_present()}
    try:
        known = json.loads(mark.read_text())
    except (OSError, *MALFORMED):
        known = None
    if known == is_of:
        say(f"goes on where the run in {plan.output} has stopped")
        return
    if work.exists():
        say(f"what is in {work} was made by another edge-llm, JetPack or power mode; begins anew")
        shutil.rmtree(work)
    (work / "steps").mkdir(parents=True)
    if plan.shape == SHAPE:
        check_free_space(work, DISK_BYTES, "this proof")
    write_durably(mark, to_json(is_of).encode())


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"edge_llm": __version__, "python": platform.python_version()}
    for name in ("tensorrt", "onnxruntime", "onnxruntime-gpu", "cuda-bindings", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _present() -> dict[str, str | None]:
    snapshot = read_snapshot()
    return {
        "module": snapshot.module,
        "processor": read_cpu_name(),
        "l4t": snapshot.l4t,
        "jetpack": snapshot.jetpack,
        "power_mode": snapshot.power_mode,
    }


class _Resumed:
    """A `Run` that knows the answers of an earlier run, and begins no step when time is over.

    Attributes:
        left: steps that did not begin or failed.
    """

    def __init__(self, plan: ProofPlan, work: Path, run: Run) -> None:
        self._answers, self._run = work / "steps", run
        self._until = time.monotonic() + plan.minutes * 60
        self._names: list[str] = []
        self.left: list[str] = []

    def __call__(self, step: str, command: Sequence[str]) -> Done:
        self._names.append(step)
        path = self._answers / f"{step}.json"
        known = _read_answer(path)
        if known is not None and known["command"] == list(command) and known["code"] == 0:
            return Done(0, known["output"], known["error"])
        if time.monotonic() > self._until:
            self.left.append(step)
            return Done(NOT_BEGUN, "", "error: the time was over; run the same command again")
        started = time.monotonic()
        done = self._run(step, command)
        snapshot = read_snapshot()
        if done.code != 0:
            self.left.append(step)
        record = {
            "command": list(command),
            **done._asdict(),
            "seconds": time.monotonic() - started,
            "after": {
                "gpu_clock_hz": snapshot.gpu_clock_hz,
                "gpu_clock_max_hz": snapshot.gpu_clock_max_hz,
                "celsius": max(snapshot.temperatures_celsius.values(), default=None),
                "throttled": snapshot.throttled,
                "over_current_events": snapshot.over_current_events,
                "memory_available_bytes": snapshot.memory_available_bytes,
            },
        }
        write_durably(path, to_json(record).encode())
        return done

    def records(self) -> list[dict[str, Any]]:
        """List each step's code, time and the machine's state after it, without its output."""
        found = []
        for name in self._names:
            record = _read_answer(self._answers / f"{name}.json")
            if record is not None:
                kept = {key: record[key] for key in ("code", "seconds", "after")}
                found.append({"step": name, **kept})
        return found


def _read_answer(path: Path) -> dict[str, Any] | None:
    """Read a step's answer; None if a power cut spoilt it."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, *MALFORMED):
        return None
    return found if isinstance(found, dict) else None


def _content(plan: ProofPlan, run: Run, bundle: Path) -> dict[str, Any]:
    doctor = cell(run("doctor", ["edge-llm", "doctor", "--json"]), json_needed=True)
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "gpu": plan.gpu and has_gpu(doctor.get("result")),
        "edge_llm": __version__,
        "versions": _versions(),
        "tensorrt": read_tensorrt(run) if plan.gpu else None,
        "machine": {**_present(), "snapshot": msgspec.to_builtins(read_snapshot())},
        "model": {"shape": plan.shape, "layers": plan.layers, "weights": "random"},
        "doctor": doctor,
        "measured": [*ENGINES][-1] if plan.gpu else CPU,
    }
    names = engines_of(content["tensorrt"]) if content["gpu"] else (CPU,)
    content["checkpoint"], content["export"] = _make_bundle(plan, run, bundle)
    if content["export"]["verdict"] != "passed":
        reason = "there is no bundle"
        cells = (*ENGINE_CELLS, "soak") if content["gpu"] else ("verify", "bench", "soak")
        content["engines"] = {name: skip_rest({}, reason, cells) for name in names}
        return content
    content["engines"] = {
        name: _check_on_gpu(name, bundle, run) if content["gpu"] else _check_on_cpu(bundle, run)
        for name in names
    }
    return content


def _make_bundle(plan: ProofPlan, run: Run, bundle: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write random weights, and export them as a newcomer would."""
    skipped = {"verdict": "skipped", "reason": "there is no checkpoint"}
    checkpoint = bundle.with_name("checkpoint")
    module = [sys.executable, "-m", f"{__package__}.checkpoint", checkpoint.name]
    shape = ["--shape", plan.shape, "--layers", str(plan.layers)]
    made = cell(run("checkpoint", [*module, *shape]))
    if made["verdict"] != "passed":
        return made, skipped
    options = ["-o", bundle.name, "--fast", "--target", "here", "--force", "--json"]
    return made, cell(run("export", ["edge-llm", "export", checkpoint.name, *options]))


def _check_on_gpu(name: str, bundle: Path, run: Run) -> dict[str, dict[str, Any]]:
    row = check_engine(name, Path(bundle.name), run, ENGINES[name], bundle.parent)
    if row["build"]["verdict"] != "passed":
        return skip_rest(row, row["verify"]["reason"], ("soak",))
    row["soak"] = _soak(name, bundle, run, "tensorrt", ())
    return row


def _check_on_cpu(bundle: Path, run: Run) -> dict[str, dict[str, Any]]:
    on_cpu = [bundle.name, "--backend", "ort-cpu", "--json"]
    short = ["--prompt-tokens", "128", "--output-tokens", "32", "--repeats", "3"]
    small = ["--prompts", str(_CPU_PROMPTS), "--most-tokens", str(_CPU_TOKENS)]
    small += ["--seconds", str(_CPU_SECONDS)]
    return {
        "verify": cell(run(f"{CPU}-verify", ["edge-llm", "verify", *on_cpu]), json_needed=True),
        "bench": cell(run(f"{CPU}-bench", ["edge-llm", "bench", *on_cpu, *short]), True),
        "soak": _soak(CPU, bundle, run, "ort-cpu", small),
    }


def _soak(
    name: str, bundle: Path, run: Run, backend: str, options: Sequence[str]
) -> dict[str, Any]:
    command = [sys.executable, "-m", f"{__package__}.soak", bundle.name, "--backend", backend]
    return cell(run(f"{name}-soak", [*command, *options]), json_needed=True)


def _measure_mode(
    run: Run, bundle: Path, before: list[str], number: int, name: str
) -> dict[str, Any]:
    """Measure the engine that was built last in another power mode."""
    problem = power.set_mode(before, number)
    if problem is not None:
        return {"verdict": "failed", "reason": f"nvpmodel -m {number}: {problem}"}
    command = ["edge-llm", "bench", bundle.name, "--backend", "tensorrt", "--json"]
    return cell(run(f"mode-{number}", command), json_needed=True)


def find_problems(content: dict[str, Any]) -> list[str]:
    """Say what was missed in a sentence each; empty if everything was proven."""
    problems = []
    doctor = content["doctor"]
    if doctor["verdict"] != "passed":
        summary = (doctor.get("result") or {}).get("summary") or doctor["reason"]
        problems.append(f"doctor: {summary}")
    if not content["gpu"]:
        problems.append(
            "no NVIDIA GPU with TensorRT works here: engines, own kernels, power and GPU memory "
            "are not proven; the CPU's figures are"
        )
    cells = {"checkpoint": content["checkpoint"], "export": content["export"]}
    for name, row in content["engines"].items():
        cells |= {f"{name} {part}": found for part, found in row.items()}
    cells |= {f"power mode {name}": found for name, found in content["power_modes"].items()}
    problems += [
        f"{where} {'failed' if found['verdict'] == 'failed' else 'is missing'}: {found['reason']}"
        for where, found in cells.items()
        if found["verdict"] != "passed"
    ]
    return problems


def _without_places(content: dict[str, Any], output: Path) -> dict[str, Any]:
    """Remove the sender's paths, which may name people; make numbers that are not finite null."""
    text = to_json(content)
    for path, short in (
        (output.resolve(), "OUTPUT"),
        (Path(sys.prefix), "PYTHON"),
        (Path.home(), "~"),
    ):
        if len(path.parts) > 1:
            text = text.replace(json.dumps(str(path))[1:-1], short)
    found: dict[str, Any] = json.loads(text)
    return found
