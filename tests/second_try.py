"""A test marked ``timing`` that fails runs once more; it is named, and a run may have few of these.

Such a test holds a time of the wall clock, which other work on the machine can spoil. No other test
runs twice: a race that passes at the second try is still a race.
"""

from __future__ import annotations

import pytest
from _pytest.runner import runtestprotocol

MOST = 2
"""Second tries in one run, over all workers of xdist; one more fails it."""

_PROPERTY = "first try"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Run a test marked ``timing``, twice if its call fails, and report the last try."""
    if item.get_closest_marker("timing") is None:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = runtestprotocol(item, nextitem=nextitem, log=False)
    failed = [report for report in reports if report.failed]
    if failed and all(report.when == "call" for report in failed):
        # Reports carry this from a worker to the process that counts.
        item.user_properties.append((_PROPERTY, failed[0].longreprtext))
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


class SecondTries:
    """Counts the tests that ran twice, and fails a run that has too many."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, text in report.user_properties:
            if name == _PROPERTY:
                self._first[report.nodeid] = str(text)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if len(self._first) > MOST and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self._first:
            return
        failed = len(self._first) > MOST
        title = f"second tries: {len(self._first)}, and a run may have {MOST}"
        terminalreporter.section(title, red=failed, yellow=not failed)
        for test, text in sorted(self._first.items()):
            terminalreporter.line(f"{test}: its first try failed")
            terminalreporter.line(text)


def pytest_configure(config: pytest.Config) -> None:
    """Count in the process to which the workers of xdist report."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(SecondTries(), "edge-llm-second-tries")
