"""What a GPU shows: doctor, the tests marked ``gpu``, and the benchmark, in one report.

``scripts/gpu-check`` makes the environment and calls this. The output directory gets
``report.json``, ``report.txt``, and the whole output of every step as ``<step>.log``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Done(NamedTuple):
    """A step's exit code and standard output."""

    code: int
    output: str


Run = Callable[[str, Sequence[str]], Done]
BACKENDS = ("tensorrt", "ort-cuda", "ort-cpu")


def main(arguments: Sequence[str] | None = None, run: Run | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu-report"), help="a new directory")
    parser.add_argument("--bundle", type=Path, help="to measure; SmolLM2-135M INT4 by default")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    report = make_report(options.output, options.bundle, run or logged_run(options.output))
    (options.output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    text = render(report)
    (options.output / "report.txt").write_text(text)
    print(text)
    return 0 if report["passed"] else 1


def make_report(output: Path, bundle: Path | None, run: Run) -> dict[str, Any]:
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    commit = run("commit", ["git", "describe", "--always", "--dirty"]).output.strip()
    export = None
    if bundle is None:
        bundle = output / "smollm2-135m-int4"
        source = run("source", [sys.executable, "scripts/smollm2.py"]).output.strip()
        command = ["edge-llm", "export", source, "-o", str(bundle), "--quant", "int4", "--force"]
        command += ["--method", "rtn", "--no-verify"]  # fast: what is checked here is the engine
        export = run("export", command).code
    doctor = run("doctor", ["edge-llm", "doctor", str(bundle), "--wait-gpu", "0", "--json"])
    junit = output / "tests.xml"
    junit.unlink(missing_ok=True)  # so that an old result does not count
    pytest = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        f"--junitxml={junit}",
        "-p",
        "no:cacheprovider",
    ]
    code = run("tests", pytest).code
    report: dict[str, Any] = {
        "started": started,
        "commit": commit,
        "bundle": bundle.name,
        "export_code": export,
        "doctor": last_json(doctor.output),
        "tests": {"code": code, **read_junit(junit)},
        "bench": {name: bench(name, bundle, run) for name in BACKENDS},
    }
    tests = report["tests"]
    report["passed"] = (
        not export
        and doctor.code == 0
        and code == 0
        and tests["passed"] > 0  # all skipped proves nothing
        and any(found["code"] == 0 for name, found in report["bench"].items() if name != "ort-cpu")
    )
    return report


def bench(backend: str, bundle: Path, run: Run) -> dict[str, Any]:
    command = ["edge-llm", "bench", str(bundle), "--backend", backend, "--json"]
    done = run(f"bench-{backend}", command)
    return {"code": done.code, "result": last_json(done.output)}


def read_junit(path: Path) -> dict[str, Any]:
    """Counts, and the names of what failed, from pytest's XML; all 0 if there is none."""
    found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}
    if not path.is_file():
        return found
    for case in ElementTree.parse(path).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            found["failed"] += 1
            found["failures"].append(f"{case.get('classname')}::{case.get('name')}")
        elif case.find("skipped") is not None:
            found["skipped"] += 1
        else:
            found["passed"] += 1
    return found


def last_json(output: str) -> Any:
    """The JSON of the last line that is an object; None if none is."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except ValueError:
                continue
    return None


def render(report: dict[str, Any]) -> str:
    lines = [
        f"gpu-check of {report['commit']} at {report['started']}, bundle {report['bundle']}",
        "",
    ]
    doctor = report["doctor"] or {"summary": "no answer, see doctor.log", "checks": []}
    lines.append(f"doctor: {doctor['summary']}")
    lines += [f"  {c['status']:<5}{c['name']}: {c['detail']}" for c in doctor["checks"]]
    tests = report["tests"]
    lines += [
        "",
        f"tests: {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped",
        *(f"  failed: {name}" for name in tests["failures"]),
        "",
    ]
    for name, found in report["bench"].items():
        if found["code"] == 0:
            lines.append(f"bench {name}: {figures(found['result'] or {})}")
        else:
            lines.append(f"bench {name}: exit code {found['code']}, see bench-{name}.log")
    lines += ["", "passed" if report["passed"] else "NOT passed"]
    return "\n".join(lines) + "\n"


def figures(result: dict[str, Any]) -> str:
    """What a reader looks for first; the rest is in the JSON."""
    units = {
        "decode_tps": "tokens/s in decode",
        "prefill_tps": "tokens/s in prefill",
        "decode_watts": "W in decode",
        "decode_joules_per_token": "J per token",
    }
    found = [f"{result[key]:.4g} {unit}" for key, unit in units.items() if result.get(key)]
    return ", ".join(found) or "no figures, see report.json"


def logged_run(output: Path) -> Run:
    """Runs a command; its output goes to ``<step>.log``."""

    def run(step: str, command: Sequence[str]) -> Done:
        print(f"gpu-check: {step}", file=sys.stderr)
        with (output / f"{step}.log").open("w") as log:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=log, text=True, check=False
            )
            log.write(done.stdout)
        return Done(done.returncode, done.stdout)

    return run


if __name__ == "__main__":
    sys.exit(main())
