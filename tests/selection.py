"""Which tests a run leaves out, and which of the others are too slow for it.

The gate is for every commit, so it has what is quick and depends on nothing but the code. Two marks
take a test out of it: ``live`` for what starts a server, a browser, systemd, HAProxy, Prometheus, a
registry, a container or another program of Debian's, or compares wall-clock times (``timing``
implies it); ``slow`` for what takes more than two seconds on two cores. A file that is named on the
command line, ``--all`` and ``-m`` leave nothing out.

A test without ``live`` that starts a server or such a program fails. One service, which most tests
of `edge_serve` ask, is excepted by `shared_server`.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

LEFT_OUT = ("live", "slow")
NOTED_S = 3.0
"""Time after which a test without a mark is named, so that somebody looks at it."""

PROGRAMS = frozenset(
    [
        "chromedriver",
        "chromium",
        "docker-registry",
        "groff",
        "haproxy",
        "minisign",
        "nginx",
        "nsenter",
        "openssl",
        "prometheus",
        "promtool",
        "setpriv",
        "shellcheck",
        "systemd",
        "systemd-analyze",
        "systemd-tmpfiles",
        "unshare",
    ]
)
"""Programs of Debian's that only a live test may start."""

_OUTPUT = "edge_llm_left_out"


def pytest_addoption(parser: pytest.Parser) -> None:
    with contextlib.suppress(ValueError):  # a second conftest.py has the same hooks
        parser.addoption("--all", action="store_true", help="also the tests marked slow or live")


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.get_closest_marker("timing"):
        item.add_marker("live")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what the gate does not wait for, unless it is asked for."""
    if config.option.all or config.option.markexpr:
        return
    named = {config.invocation_params.dir / argument.partition("::")[0] for argument in config.args}
    files = {path.resolve() for path in named if path.is_file()}
    left: dict[str, list[pytest.Item]] = {mark: [] for mark in LEFT_OUT}
    kept = []
    for item in items:
        mark = next((mark for mark in LEFT_OUT if item.get_closest_marker(mark)), None)
        if mark is None or item.path.resolve() in files:
            kept.append(item)
        else:
            left[mark].append(item)
    for mark, some in left.items():
        if some:
            config.hook.pytest_deselected(items=some)
        _counts(config)[mark] += len(some)
    items[:] = kept


class _Guard:
    """Fails what a test without ``live`` starts, also while a fixture is made for it."""

    def __init__(self) -> None:
        self.forbids = False

    def refuse(self, what: str) -> None:
        if self.forbids:
            raise AssertionError(f"this test starts {what}: mark it live (tests/selection.py)")


_guard = _Guard()


@contextlib.contextmanager
def shared_server() -> Iterator[None]:
    """Let a fixture of the session start a server for tests of the gate."""
    before, _guard.forbids = _guard.forbids, False
    try:
        yield
    finally:
        _guard.forbids = before


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Guard a test that is not marked."""
    _guard.forbids = item.get_closest_marker("live") is None
    try:
        return (yield)
    finally:
        _guard.forbids = False


def _guarded(patch: pytest.MonkeyPatch) -> None:
    listen, start = socket.socket.listen, subprocess.Popen.__init__

    @functools.wraps(listen)
    def guarded_listen(self: socket.socket, *backlog: int) -> None:
        if self.family != socket.AF_UNIX:
            _guard.refuse("a server")
        return listen(self, *backlog)

    @functools.wraps(start)
    def guarded_start(self: Any, args: Any, *rest: Any, **named: Any) -> None:
        program = Path(str(args if isinstance(args, str) else next(iter(args)))).name
        if program in PROGRAMS:
            _guard.refuse(program)
        start(self, args, *rest, **named)

    patch.setattr(socket.socket, "listen", guarded_listen)
    patch.setattr(subprocess.Popen, "__init__", guarded_start)


@pytest.fixture(scope="session", autouse=True)
def only_live_tests_start_servers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        _guarded(patch)
        yield


def _counts(config: pytest.Config) -> dict[str, int]:
    """Return what this process left out; a worker of xdist reports it to the one that prints."""
    output: dict[str, Any] = getattr(config, "workeroutput", config.stash.setdefault(_key, {}))
    counts: dict[str, int] = output.setdefault(_OUTPUT, dict.fromkeys(LEFT_OUT, 0))
    return counts


_key = pytest.StashKey[dict[str, Any]]()


class Summary:
    """Says at the end what was left out, how to run it, and what was slow without a mark."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._slow: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.duration > NOTED_S and not any(mark in report.keywords for mark in LEFT_OUT):
            name = report.nodeid if report.when == "call" else f"{report.when} of {report.nodeid}"
            self._slow[name] = report.duration

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        # Each worker collects all tests, so one of them is enough.
        _counts(self._config).update(getattr(node, "workeroutput", {}).get(_OUTPUT, {}))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for name, seconds in sorted(self._slow.items(), key=lambda each: -each[1]):
            terminalreporter.line(f"slow without a mark: {seconds:5.1f} s  {name}")
        if counts := {mark: n for mark, n in _counts(self._config).items() if n}:
            what = " and ".join(f"{n:,} tests marked {mark}" for mark, n in counts.items())
            terminalreporter.line(
                f"left out: {what}; scripts/test --all runs everything, scripts/test -m live one "
                "mark, scripts/test FILE a file; scripts/nightly runs and records what is overdue"
            )


def pytest_configure(config: pytest.Config) -> None:
    """Report in the process to which the workers of xdist report."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Summary(config), "edge-llm-selection")
