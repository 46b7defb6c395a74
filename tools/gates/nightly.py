"""Runs the steps that a commit need not wait for, and keeps a record of when each passed.

A step names the tracked files that decide its outcome, and the record has a hash of them. A step is
overdue when these files have changed since it passed, or when that is a month ago: ``.ci/run`` says
so loudly, and fails nothing. Standard library only; see ``scripts/nightly`` for its use.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path(".ci/nightly.json")
LOGS = Path(".nightly")
STALE = timedelta(days=30)
TAIL_LINES = 60
REPORT = "report: "
"""Begins a line of a step's output that the night repeats, though the step has passed."""

PYPROJECT = "pyproject.toml"
DEPENDENCIES = tuple(
    f"{PYPROJECT}[{section}]"
    for section in ("project", "project.optional-dependencies", "dependency-groups")
)
CODE = ("edge/**", "edge_*/**", "engines/**", "export/**", "tests/**", *DEPENDENCIES)
NEWEST = "CI=true PYTHON=python3.13 EDGE_LLM_VERSIONS=newest scripts/test"
# A browser for the page, systemd for the units, Prometheus for the alerts, groff for the man page,
# a registry and minisign for bundles, HAProxy and nginx for devices behind them.
PROGRAMS = """\
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        chromium chromium-driver systemd prometheus shellcheck groff-base docker-registry \
        minisign iproute2 haproxy nginx-light >/dev/null
else
    export EDGE_LLM_NO_PROGRAMS=1 # tests of those that are missing may skip: tests/skips.py
fi
"""
# What a library's lowest version may change, and every verb. The rest is the same on every Python.
OLDEST = """\
tests/test_import.py tests/test_packaging.py tests/edge/backends/ort tests/edge/bundle \
tests/edge/cli tests/edge/runtime/test_llm*.py tests/edge/runtime/test_structured_output.py \
tests/edge/text tests/edge_fleet/cli tests/edge_fleet/registry tests/edge_fleet/test_signing.py \
tests/edge_lab/cli tests/edge_make tests/edge_serve/api tests/edge_serve/cli \
tests/edge_serve/http/test_guard.py tests/edge_serve/observe tests/export"""


class InputError(Exception):
    """A step names files that do not exist."""


@dataclass(frozen=True)
class Step:
    """A command, and the tracked files that decide how it ends.

    Attributes:
        name: its name in the record and on the command line.
        command: command for bash, in the root of the checkout.
        inputs: git's glob patterns, or a section of a TOML file as ``pyproject.toml[project]``.
    """

    name: str
    command: str
    inputs: tuple[str, ...]


STEPS = (
    Step("slow", f"{NEWEST} -m 'slow and not live'", CODE),
    Step("live", f"{PROGRAMS}{NEWEST} -m live", (*CODE, "docs/monitoring/**", "scripts/**")),
    Step(
        "oldest",
        "CI=true PYTHON=python3.10 EDGE_LLM_VERSIONS=lowest scripts/test"
        f" -m 'not once and not live' {OLDEST}",
        CODE,
    ),
    Step(
        "locks",
        "tools/lock --check",
        ("requirements/**", "tools/lock", *DEPENDENCIES),
    ),
    Step(
        "trt-bindings",
        "tools/trt-bindings",
        (
            "edge/backends/tensorrt/**",
            "engines/**/*.py",
            "tools/trt-bindings",
            "tools/trt/**",
        ),
    ),
    Step(
        "bare-machine",
        "tools/bare-machine",
        (
            "requirements/**",
            "scripts/_venv",
            "tools/bare-machine",
            "scripts/quickstart",
            "scripts/test",
        ),
    ),
    Step(
        "release",
        # Made from a clone, since this run writes its record into the checkout.
        'here=$(mktemp -d); trap \'rm -rf "$here"\' EXIT; git clone --quiet . "$here/clone";'
        ' cd "$here/clone"; python3 -m tools release --out "$here"',
        (
            "docker/jetson/**",
            "requirements/**",
            "scripts/_venv",
            "tools/environments.py",
            "tools/release/**",
            "tools/sbom",
            *DEPENDENCIES,
        ),
    ),
    Step(
        "kernels",
        "python3 -m tools kernels --check",
        (
            "edge/backends/tensorrt/launch_rules.py",
            "engines/kernels/**",
            "requirements/kernels.txt",
            "tools/kernels/**",
            "tests/engines/kernels/interpreted.py",
            "tests/engines/kernels/test_interpreter.py",
        ),
    ),
    Step(
        "parity",
        "EDGE_LLM_PARITY=1 scripts/test -m parity",
        (
            "edge/bundle/rope.py",
            "edge/model/**",
            "edge/runtime/sampling_reference.py",
            "edge/vision/decode_child.py",
            "edge/vision/layout.py",
            "edge_make/families/**",
            "edge_make/model_config.py",
            "export/graph/**",
            "tools/goldens/references.py",
            "tests/data/golden/**",
            "tests/edge/vision/**",
            "tests/integration/**",
            "tests/makers/**",
        ),
    ),
    Step(
        "quality",
        "EDGE_LLM_QUALITY=1 scripts/test tests/export/test_documented_quality.py",
        (
            "docs/measured/quantization.json",
            "export/quantize/**",
            "export/sources/calibration_text/**",
            "tests/export/test_documented_quality.py",
        ),
    ),
    Step(
        "fleet",
        "EDGE_LLM_FLEET=1 EDGE_LLM_TEST_PROCESSES=0 scripts/test --all tests/edge_fleet/devices",
        (
            "edge_fleet/devices/**",
            "edge_fleet/kubernetes/**",
            "requirements/fleet.txt",
            "tests/edge_fleet/devices/**",
        ),
    ),
    Step(
        "python-3.12",  # of JetPack 7, with the locked versions
        "PYTHON=python3.12 scripts/test -m 'not slow and not live' tests/test_import.py"
        " tests/test_packaging.py"
        " tests/test_docs.py tests/edge/cli tests/edge/runtime/test_llm*.py tests/edge/backends/ort"
        " tests/edge_serve/api/test_chat.py tests/export/test_pipeline.py"
        " tests/engines/builder/test_build.py",
        ("requirements/dev.txt", "requirements/jetpack7.txt", "scripts/_venv"),
    ),
    Step(
        "openvino",
        "python3 -m lab openvino-weights --check",
        ("lab/peers/*openvino_weights.py",),
    ),
    Step(
        "lab",
        "EDGE_LLM_PARITY=1 scripts/test --all lab",
        (
            "edge/backends/batching.py",
            "edge_lab/doctor/**",
            "edge_lab/prove/**",
            "lab/**",
        ),
    ),
    Step(
        "mutants",  # of all code, so a commit tries them only after a change of the table
        "python3 -m tools mutants",
        ("tools/gates/mutants.py", "tests/mutants.toml"),
    ),
)


@dataclass(frozen=True)
class Passed:
    """When a step passed.

    Attributes:
        commit: the commit that was checked out.
        date: its end, ISO 8601 in UTC.
        minutes: how long it took.
        inputs: hash of its inputs, from `hash_inputs`.
    """

    commit: str
    date: str
    minutes: float
    inputs: str

    def age(self) -> timedelta:
        return datetime.now(timezone.utc) - datetime.fromisoformat(self.date)

    def __str__(self) -> str:
        age = self.age()
        ago = f"{age.days} days" if age.days >= 2 else f"{age / timedelta(hours=1):.1f} hours"
        return f"passed {ago} ago, {self.date}, commit {self.commit}, {self.minutes} min"


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def _section(text: str, name: str) -> str | None:
    """Return a table of a TOML file, as it is written."""
    found = re.search(rf"^\[{re.escape(name)}\]\n(?:(?!\[\w).*\n?)*", text, re.MULTILINE)
    return found[0] if found else None


def _parts(step: Step) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents of a step's inputs, in the order of its patterns."""
    for pattern in step.inputs:
        path, _, section = pattern.removesuffix("]").partition("[")
        listed = _git("ls-files", "-z", "--", f":(glob){path}")
        names = [name for name in listed.split("\0") if name and (ROOT / name).is_file()]
        if not names:
            raise InputError(
                f"step {step.name} names {pattern}, which no tracked file matches; mend its inputs "
                "in tools/gates/nightly.py"
            )
        for name in names:
            content = (ROOT / name).read_bytes()
            if section:
                table = _section(content.decode(), section)
                if table is None:
                    raise InputError(
                        f"step {step.name} names {pattern}, and {name} has no such table; mend its "
                        "inputs in tools/gates/nightly.py"
                    )
                yield pattern, table.encode()
            else:
                yield name, content


def hash_inputs(step: Step) -> str:
    """Return the SHA-256 of a step's command, and of paths and contents of its inputs.

    Raises:
        InputError: a pattern matches no tracked file.
    """
    digest = hashlib.sha256(step.command.encode())
    for name, content in sorted(set(_parts(step))):
        for part in (name.encode(), content):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def read_record() -> dict[str, Passed]:
    """Read the steps that passed; none if there is no record."""
    path = ROOT / RECORD
    if not path.exists():
        return {}
    return {name: Passed(**passed) for name, passed in json.loads(path.read_text("utf-8")).items()}


def write_record(record: dict[str, Passed]) -> None:
    """Write the record atomically, in the order of the table and without steps that are gone."""
    rows = {step.name: asdict(record[step.name]) for step in STEPS if step.name in record}
    path = ROOT / RECORD
    new = path.with_suffix(".new")
    new.write_text(json.dumps(rows, indent=2) + "\n", "utf-8")
    new.replace(path)


def why_overdue(step: Step, record: dict[str, Passed]) -> str | None:
    """Say why a step is to run again; None if it passed lately with these files."""
    passed = record.get(step.name)
    if passed is None:
        return "never passed, or failed when it last ran"
    if passed.inputs != hash_inputs(step):
        return f"its files changed since it {passed}"
    return f"it {passed}" if passed.age() > STALE else None


def report_overdue(record: dict[str, Passed]) -> None:
    """Print a loud line for each step that is overdue, and the command that runs them."""
    overdue = {step.name: why for step in STEPS if (why := why_overdue(step, record))}
    for name, why in overdue.items():
        print(f"!!!!!! nightly: {name} is overdue: {why}")
    if overdue:
        print(f"!!!!!! nightly: run scripts/nightly and commit {RECORD}", flush=True)
    else:
        print("nightly: nothing is overdue", flush=True)


def run_step(step: Step) -> Passed | None:
    """Run a step; its output goes into its log, whose end is printed if it fails."""
    (ROOT / LOGS).mkdir(exist_ok=True)
    log = LOGS / f"{step.name}.log"
    print(f"nightly: {step.name} runs (output in {log})", flush=True)
    commit, inputs = _git("rev-parse", "--short=12", "HEAD").strip(), hash_inputs(step)
    began = time.monotonic()
    with (ROOT / log).open("wb") as output:
        bash = ["bash", "-euo", "pipefail", "-c", step.command]
        code = subprocess.run(
            bash, cwd=ROOT, check=False, stdout=output, stderr=subprocess.STDOUT
        ).returncode
    minutes = round((time.monotonic() - began) / 60, 1)
    if code == 0 and hash_inputs(step) != inputs:
        print(f"nightly: {step.name} does not count, as its inputs changed while it ran")
        return None
    lines = (ROOT / log).read_text("utf-8", errors="replace").splitlines()
    for line in lines:
        if line.startswith(REPORT):
            print(f"nightly: {step.name}: {line.removeprefix(REPORT)}")
    if code:
        print(*lines[-TAIL_LINES:], sep="\n")
        print(f"nightly: {step.name} FAILED after {minutes} min with exit code {code}", flush=True)
        return None
    print(f"nightly: {step.name} passed after {minutes} min", flush=True)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Passed(commit, date, minutes, inputs)


def run(steps: Sequence[Step], record: dict[str, Passed]) -> int:
    """Run these steps, and write the record after each."""
    failed = []
    for step in steps:
        passed = run_step(step)
        if passed is None:
            failed.append(step.name)
            record.pop(step.name, None)
        else:
            record[step.name] = passed
        write_record(record)
    report_overdue(record)
    if failed:
        print(f"nightly: failed: {', '.join(failed)}; the output is in {LOGS}/STEP.log")
    return bool(failed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and run."""
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser("scripts/nightly", description=description)
    parser.add_argument("steps", nargs="*", metavar="STEP", help="only these, in any case")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--all", action="store_true", help="all steps, in any case")
    how.add_argument(
        "--overdue", action="store_true", help="print what is overdue, and run nothing"
    )
    how.add_argument("--list", action="store_true", help="print the steps and when each passed")
    given = parser.parse_args(arguments)
    names = {step.name: step for step in STEPS}
    unknown = [name for name in given.steps if name not in names]
    if unknown:
        parser.error(f"no step is called {unknown[0]}; the steps are {', '.join(names)}")
    if given.steps and (given.all or given.overdue or given.list):
        parser.error("name steps, or give one of the options, but not both")
    record = read_record()
    try:
        for step in STEPS:
            hash_inputs(step)  # find a wrong pattern now and not after hours
        if given.list:
            for name in names:
                print(f"{name}: {record.get(name, 'never passed')}")
        if given.list or given.overdue:
            report_overdue(record)
            return 0
        chosen = [names[name] for name in given.steps]
        if not chosen:
            chosen = [step for step in STEPS if given.all or why_overdue(step, record)]
        return run(chosen, record)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 78
    except KeyboardInterrupt:
        print("nightly: interrupted; scripts/nightly goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
