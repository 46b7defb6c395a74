"""Checks a GPU: TensorRT on every precision, doctor, the tests marked ``gpu``, one report.

``scripts/gpu-check`` makes the environment and calls this. The output directory gets
``report.json``, which holds everything and can be sent as it is, ``report.txt`` for people, and the
whole output of every step as ``<step>.log``. It passes only if TensorRT ran and every cell of the
matrix, precision by step, has passed; a skipped cell has not.
"""

from __future__ import annotations

import argparse
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge.cli import to_json
from edge_lab.prove.steps import (
    ENGINE_CELLS,
    Run,
    cell,
    check_engine,
    has_gpu,
    last_json,
    logged_run,
    read_tensorrt,
    skip_rest,
)

PRECISIONS: dict[str, tuple[str, ...]] = {
    # Recipes that export fast, since this checks the engine and not the quality.
    "fp16": (),
    "int4": ("--method", "rtn"),
    "int8": (),
    "int8-w8a8": ("--calibration-tokens", "512"),
}
CELLS = ("export", *ENGINE_CELLS)
OTHER_BACKENDS = ("ort-cuda", "ort-cpu")
GPU_WAITS = ("spin", "yield", "block")
_NATIVE_SINCE = (10, 15)  # TensorRT with the operators of dialect native
_NOT_OF_THIS_DIALECT = "dialect native"  # words in the reason of a skipped test


def main(arguments: Sequence[str] | None = None, run: Run | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu-report"), help="a new directory")
    parser.add_argument(
        "--bundle", type=Path, help="to measure instead; SmolLM2-135M in four precisions by default"
    )
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    report = make_report(options.output, options.bundle, run or _logged(options.output))
    (options.output / "report.json").write_text(to_json(report, indent=1) + "\n")
    text = render(report)
    (options.output / "report.txt").write_text(text)
    print(text)
    return 0 if report["passed"] else 1


def make_report(output: Path, bundle: Path | None, run: Run) -> dict[str, Any]:
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    commit = run("commit", ["git", "describe", "--always", "--dirty"]).output.strip()
    tensorrt = read_tensorrt(run)
    target = choose_target(tensorrt)
    doctor = run("doctor", ["edge-llm", "doctor", "--wait-gpu", "0", "--json"])
    if bundle is None:
        source = run("source", [sys.executable, "-m", "tools.models.smollm2"]).output.strip()
        matrix = {
            name: check_row(name, output / f"smollm2-135m-{name}", run, export)
            for name, export in exports(source, target).items()
        }
        measured = output / "smollm2-135m-int4"
    else:
        matrix = {bundle.name: check_row(bundle.name, bundle, run, None)}
        measured = bundle
    report: dict[str, Any] = {
        "started": started,
        "commit": commit,
        "tensorrt": tensorrt,
        "target": target,
        "doctor_code": doctor.code,
        "doctor": last_json(doctor.output),
        "matrix": matrix,
        "tune": tune(measured, matrix, run),
        "gpu_wait": compare_waits(measured, matrix, run),
        "tests": run_tests(output, run),
        "bench": {name: bench(name, measured, run) for name in OTHER_BACKENDS},
    }
    report["problems"] = find_problems(report)
    report["passed"] = not report["problems"]
    return report


def choose_target(tensorrt: str | None) -> str:
    """Return the ``--target`` of an export for a TensorRT; the oldest if its version is unknown."""
    parts = (tensorrt or "0.0").split(".")
    release = tuple(int(part) for part in parts[:2] if part.isdigit())
    if release < _NATIVE_SINCE:
        return "jetpack6"
    return "jetpack7" if release < (11, 0) else "trt11"


def exports(source: str, target: str) -> dict[str, list[str]]:
    """Return the options of ``edge-llm export`` by precision."""
    return {
        name: [source, "--quant", name, "--target", target, "--force", "--no-verify", *options]
        for name, options in PRECISIONS.items()
    }


def check_row(
    name: str, bundle: Path, run: Run, export: Sequence[str] | None
) -> dict[str, dict[str, Any]]:
    """Export, build, verify, measure and look into one bundle: a verdict per cell.

    Args:
        name: name of the row, which names the logs.
        bundle: path of the bundle, which may not exist yet.
        run: runs a step.
        export: options that export it; None if it exists.
    """
    row: dict[str, dict[str, Any]] = {}
    if export is not None:
        row["export"] = cell(
            run(f"{name}-export", ["edge-llm", "export", *export, "-o", f"{bundle}"])
        )
        if row["export"]["verdict"] != "passed":
            return skip_rest(row, "the export failed", CELLS)
    row.update(check_engine(name, bundle, run))
    return row


def tune(bundle: Path, matrix: dict[str, dict[str, dict[str, Any]]], run: Run) -> dict[str, Any]:
    """Find whose kernels and which ways are fastest here; each engine is timed and compared."""
    if not has_engine(matrix):
        return {"verdict": "skipped", "reason": "the build failed"}
    command = ["edge-llm", "build", str(bundle), "--kv-read", "auto", "--kernels", "auto"]
    command += ["--tune", "--json"]
    return cell(run("tune", command), json_needed=True)


def compare_waits(
    bundle: Path, matrix: dict[str, dict[str, dict[str, Any]]], run: Run
) -> dict[str, dict[str, Any]]:
    """Run the benchmark with each way to wait for the GPU: a step's time, and its CPU time."""
    if not has_engine(matrix):
        return {wait: {"verdict": "skipped", "reason": "the build failed"} for wait in GPU_WAITS}
    command = ["edge-llm", "bench", str(bundle), "--backend", "tensorrt", "--json", "--gpu-wait"]
    return {
        wait: cell(run(f"gpu-wait-{wait}-bench", [*command, wait]), json_needed=True)
        for wait in GPU_WAITS
    }


def has_engine(matrix: dict[str, dict[str, dict[str, Any]]]) -> bool:
    """Return whether the bundle that is measured beyond the matrix was built."""
    row = matrix.get("int4") or next(iter(matrix.values()))
    return bool(row["build"]["verdict"] == "passed")


def run_tests(output: Path, run: Run) -> dict[str, Any]:
    """Run the tests marked ``gpu``."""
    junit = output / "tests.xml"
    junit.unlink(missing_ok=True)  # so that an old result does not count
    # Other tests import what this environment lacks; one such file keeps pytest from running any.
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", f"--junitxml={junit}"]
    code = run("tests", [*command, "-p", "no:cacheprovider"]).code
    return {"code": code, **read_junit(junit)}


def bench(backend: str, bundle: Path, run: Run) -> dict[str, Any]:
    command = ["edge-llm", "bench", str(bundle), "--backend", backend, "--json"]
    done = run(f"bench-{backend}", command)
    return {"code": done.code, "result": last_json(done.output)}


def find_problems(report: dict[str, Any]) -> list[str]:
    """Say why the report has not passed, a sentence each; empty if it has."""
    problems = []
    if report["doctor_code"] != 0:
        summary = (report["doctor"] or {}).get("summary", "no answer, see doctor.log")
        problems.append(f"doctor: {summary}")
    if not has_gpu(report["doctor"]):
        problems.append("doctor found no GPU that works")
    if report["tensorrt"] is None:
        problems.append("TensorRT is not here, so nothing of it ran")
    for name, row in report["matrix"].items():
        for part, found in row.items():
            if found["verdict"] == "failed":
                problems.append(f"{name} {part}: {found['reason']}")
            elif found["verdict"] == "skipped":
                problems.append(f"{name} {part} was skipped: {found['reason']}")
    if report["tune"]["verdict"] != "passed":
        problems.append(f"tune {report['tune']['verdict']}: {report['tune']['reason']}")
    for wait, found in report["gpu_wait"].items():
        if found["verdict"] != "passed":
            problems.append(f"gpu_wait {wait} {found['verdict']}: {found['reason']}")
    tests = report["tests"]
    if tests["code"] != 0 or not tests["passed"]:
        problems.append(f"tests: {tests['passed']} passed, {tests['failed']} failed")
    problems += [
        f"{len(names)} tests were skipped: {reason}"
        for reason, names in tests["skips"].items()
        if report["target"] != "jetpack6" or _NOT_OF_THIS_DIALECT not in reason
    ]
    return problems


def read_junit(path: Path) -> dict[str, Any]:
    """Read pytest's XML: counts, names of failures, and of skipped tests by their reason."""
    found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": [], "skips": {}}
    if not path.is_file():
        return found
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            found["failed"] += 1
            found["failures"].append(name)
        elif skipped is not None:
            found["skipped"] += 1
            found["skips"].setdefault(skipped.get("message") or "no reason", []).append(name)
        else:
            found["passed"] += 1
    return found


def render(report: dict[str, Any]) -> str:
    lines = [
        f"gpu-check of {report['commit']} at {report['started']}: TensorRT "
        f"{report['tensorrt'] or 'is missing'}, target {report['target']}",
        "",
    ]
    doctor = report["doctor"] or {"summary": "no answer, see doctor.log", "checks": []}
    lines.append(f"doctor: {doctor['summary']}")
    lines += [f"  {c['status']:<5}{c['name']}: {c['detail']}" for c in doctor["checks"]]
    lines += ["", *render_matrix(report["matrix"]), "", *render_tune(report["tune"]), ""]
    lines += ["waiting for the GPU:", *render_waits(report["gpu_wait"]), ""]
    tests = report["tests"]
    lines += [
        f"tests: {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped",
        *(f"  failed: {name}" for name in tests["failures"]),
        *(f"  skipped {len(names)}: {reason}" for reason, names in tests["skips"].items()),
        "",
    ]
    for name, found in report["bench"].items():
        if found["code"] == 0:
            lines.append(f"bench {name}: {figures(found['result'] or {})}")
        else:
            lines.append(f"bench {name}: exit code {found['code']}, see bench-{name}.log")
    lines += ["", *(f"problem: {problem}" for problem in report["problems"])]
    lines.append("passed" if report["passed"] else "NOT passed")
    return "\n".join(lines) + "\n"


def render_matrix(matrix: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """Write a line of verdicts per precision, and what was seen in it."""
    width = max(map(len, matrix))
    lines = [f"{'':<{width}}  " + "  ".join(f"{name:<7}" for name in CELLS)]
    for name, row in matrix.items():
        verdicts = (row[part]["verdict"] if part in row else "-" for part in CELLS)
        lines.append(f"{name:<{width}}  " + "  ".join(f"{each:<7}" for each in verdicts))
        if row["bench"]["verdict"] == "passed":
            lines.append(f"{'':<{width}}    {figures(row['bench']['result'])}")
        for profile in row["layers"].get("result", {}).get("compiled", ()):
            products = ", ".join(f"{n} {dtype}" for dtype, n in profile["products"].items())
            lines.append(
                f"{'':<{width}}    {profile['profile']}: products {products or 'none seen'}, "
                f"attention {profile['attention']}, {profile['reformats']} reformats"
            )
    return lines


def render_tune(found: dict[str, Any]) -> list[str]:
    """Write a line per variant that was tried."""
    result = found.get("result", {})
    tried = [(each, each["reason"]) for each in result.get("refused", ())]
    for each in result.get("tuned", ()):
        seconds = each["decode_s"]
        tried.append((each, f"{seconds * 1e3:.2f} ms per step" if seconds else each["problem"]))
    return [
        f"tune: {found['verdict']}",
        *(f"  {each['kv_read']}, attention {each['attention']}: {what}" for each, what in tried),
    ]


def render_waits(found: dict[str, dict[str, Any]]) -> list[str]:
    """Write a line per way to wait."""
    lines = []
    for wait, each in found.items():
        what = each["verdict"]
        if what == "passed":
            result = each["result"]
            step_s, cpu_s = result["tpot_s"]["median"], result["cpu_s_per_step"]
            what = f"{step_s * 1e3:.2f} ms per step, {cpu_s * 1e3:.2f} ms of CPU time in it, "
            what += figures(result)
        lines.append(f"  {wait}: {what}")
    return lines


def figures(result: dict[str, Any]) -> str:
    """Write the figures that a reader looks for first; the rest is in the JSON."""
    units = {
        "decode_tps": "tokens/s in decode",
        "prefill_tps": "tokens/s in prefill",
        "decode_watts": "W in decode",
        "decode_joules_per_token": "J per token",
    }
    found = [f"{result[key]:.4g} {unit}" for key, unit in units.items() if result.get(key)]
    return ", ".join(found) or "no figures, see report.json"


def _logged(output: Path) -> Run:
    return logged_run(output, lambda step: print(f"gpu-check: {step}", file=sys.stderr))


if __name__ == "__main__":
    sys.exit(main())
