"""Which tests may be skipped. Where ``CI`` is set, any other skip fails the run.

A skip hides what it skips: a fixture that asks for too much or a package that no group names looks
like a green run.
"""

from __future__ import annotations

import os
import platform
import re
import sys

import pytest

NO_PROGRAMS = os.environ.get("EDGE_LLM_NO_PROGRAMS", "0") == "1"
"""Whether ``scripts/nightly`` could not install Debian's programs, as it sets where that is so."""

ALLOWED: dict[str, tuple[str, bool]] = {
    r"no NVIDIA GPU here .*": ("continuous integration has none; scripts/gpu-check has", True),
    r"no Jetson here .*": ("continuous integration has none", True),
    r"there is a GPU here": ("the other way round: it tests what a machine without one says", True),
    r"needs systemd(-analyze)? \(Debian: systemd\)": (
        "the unit's files are looked at without it",
        NO_PROGRAMS,
    ),
    r"no namespaces for a systemd here: .*": ("a container without rights gives none", True),
    r"no file system can be mounted here": (
        "a container without rights; files of limited size stand in",
        True,
    ),
    r"needs root to give a file to another user": ("ours are refused in all other ways", True),
    r"no memory control group can be made here": ("likewise; fake trees stand in", True),
    r"this file system is in memory": (
        "TMPDIR is a tmpfs; on most machines it is not",
        True,
    ),
    r"this kernel gives no huge pages": ("Linux before 6.1, or built without them", True),
    r"needs ONNX Runtime >= 1\.26 for dialect native": (
        "1.23 is the newest for Python 3.10",
        sys.version_info < (3, 11),
    ),
    r"needs ONNX Runtime >= 1\.28 for an 8-bit cache in dialect native": (
        "1.26, the oldest for dialect native, has none, and that of 1.27 is wrong",
        True,
    ),
    r"deterministic answers hold on x86-64 only": (
        "elsewhere they are refused, which is tested",
        platform.machine() != "x86_64",
    ),
    r"needs Debian's package prometheus": (
        "the metrics' names are tested without it",
        NO_PROGRAMS,
    ),
    r"needs Debian's package (docker-registry|minisign|openssl)": (
        "parsers, policy and journal are tested without them",
        NO_PROGRAMS,
    ),
    r"needs HAProxy \(Debian: haproxy\)": (
        "what its configuration says is tested without it",
        NO_PROGRAMS,
    ),
    r"needs nginx \(Debian: nginx-light\)": (
        "HAProxy passes the same streams on",
        NO_PROGRAMS,
    ),
    r"manifests need kubernetes-validate": (
        "the schemas of all versions are large; EDGE_LLM_FLEET=1 installs them",
        os.environ.get("EDGE_LLM_FLEET", "0") != "1",
    ),
    r"needs groff": ("its warnings are the test", NO_PROGRAMS),
    r"needs Triton: .*": (
        "it is in an environment of its own; python3 -m tools kernels --check has it",
        True,
    ),
    r"needs NNCF: .*": (
        "it is in an environment of its own; python3 -m lab openvino-weights --check has it",
        True,
    ),
    r"needs vllm-router; .*": (
        "its libraries are large; EDGE_LLM_FLEET=1 installs them",
        os.environ.get("EDGE_LLM_FLEET", "0") != "1",
    ),
    r"no network namespace can be made here: .*": ("a container without rights gives none", True),
    r"what calibrates takes five minutes; .*": (
        "scripts/nightly exports it, and after a change of what rounds",
        os.environ.get("EDGE_LLM_QUALITY", "0") != "1",
    ),
    r"live parity needs .*": (
        "the group parity is large; EDGE_LLM_PARITY=1 installs it",
        os.environ.get("EDGE_LLM_PARITY", "0") != "1",
    ),
}
"""Pattern of the whole reason: why it may be, and whether it may be here."""


def is_allowed(reason: str) -> bool:
    """Whether a test may be skipped on this machine for this reason."""
    return any(here and re.fullmatch(pattern, reason) for pattern, (_, here) in ALLOWED.items())


class SkipGuard:
    """Fails a run of pytest whose skips are not all allowed; hears what xdist's workers report."""

    def __init__(self) -> None:
        self._offences: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            where = report.longrepr
            reason = str(where[2] if isinstance(where, tuple) else where)
            reason = reason.removeprefix("Skipped: ")
            if not is_allowed(reason):
                self._offences[report.nodeid] = reason

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._offences and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._offences:
            terminalreporter.section("skips that tests/skips.py does not allow", red=True)
            for test, reason in sorted(self._offences.items()):
                terminalreporter.line(f"{test}: {reason}")


def pytest_configure(config: pytest.Config) -> None:
    """Guard a run on continuous integration; workers of xdist report to the process that does."""
    if os.environ.get("CI", "").lower() not in ("", "0", "false") and not hasattr(
        config, "workerinput"
    ):
        config.pluginmanager.register(SkipGuard(), "edge-llm-skips")
