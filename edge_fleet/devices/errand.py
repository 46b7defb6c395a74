"""Runs a device's own roll-out as a process, and tells a fleet how that is.

What happens on the device is `edge-llm bundle rollout`'s: its journal, its gate, its way back. This
only starts the command that the fleet's file names, without a shell, and reads how it ended.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Literal

import msgspec

from edge.errors import ConfigError
from edge.files import MALFORMED
from edge_fleet.registry.reference import parse_reference
from edge_fleet.rollout import WATCH_S

_MAX_READ = 1 << 16
_MAX_SAID = 600
_ERROR = "edge-llm: error: "
_NOT_HANDED_ON = ("OMP_NUM_THREADS", "PYTHONBREAKPOINT")  # Ray sets them for its workers
Gate = Literal["golden", "none"]


class Order(msgspec.Struct, frozen=True):
    """What a device is asked to roll out.

    Attributes:
        reference: HOST[:PORT]/NAME@sha256:DIGEST, so that all devices get the same content.
        gate: as for ``edge-llm bundle rollout``.
        watch_s: seconds for which the device watches the new bundle.
        retry: also try a bundle that the device has rejected before.
        plain_http: speak HTTP without TLS to the registry; None leaves that to the device.
        allow_older: also take a release that has expired or is older than what the device had.
    """

    reference: str
    gate: Gate = "golden"
    watch_s: float = WATCH_S
    retry: bool = False
    plain_http: bool | None = None
    allow_older: bool = False

    @property
    def digest(self) -> str:
        """The digest of the reference."""
        return self.reference.rpartition("@")[2]

    @property
    def arguments(self) -> list[str]:
        """What is appended to a device's command.

        Raises:
            ConfigError: the reference is none, or has no digest.
        """
        if parse_reference(self.reference).digest is None:
            raise ConfigError(f"{self.reference} has no digest; a fleet rolls out one content")
        found = [self.reference, "--gate", self.gate, "--watch-s", f"{self.watch_s:g}", "--json"]
        found += ["--retry"] if self.retry else []
        found += ["--allow-older"] if self.allow_older else []
        if self.plain_http is not None:
            found.append("--plain-http" if self.plain_http else "--tls")
        return found


class Report(msgspec.Struct, frozen=True):
    """How a roll-out on a device is.

    Attributes:
        run: another one for each process that was started.
        order: what it was asked.
        code: its exit code; None while it runs.
        changed: whether the device has another bundle than before; None unless it ended well.
        said: its last words: what it does, or what was wrong.
    """

    run: str
    order: Order
    code: int | None = None
    changed: bool | None = None
    said: str = ""


class Errand:
    """The roll-outs of one device, one at a time.

    Args:
        command: what `edge-llm fleet rollout` appends its arguments to; None refuses.
    """

    def __init__(self, command: Sequence[str] | None) -> None:
        self._command = command
        self._numbers = itertools.count(1)
        self._process: subprocess.Popen[bytes] | None = None
        self._drivers: set[str] = set()
        self._report: Report | None = None
        self._output: tuple[IO[bytes], IO[bytes]] | None = None

    def ask(self, driver: str, order: Order) -> Report:
        """Start a roll-out, or tell how the one is that this driver asked for or has joined.

        Whoever asks for what runs already joins it, so that a driver that was killed can be
        started again.

        Args:
            driver: its name, another one for each.
            order: what to roll out.

        Raises:
            ConfigError: another one runs, or the command cannot be started.
        """
        found = self.look()
        if found is not None and found.order == order:
            if found.code is None:
                self._drivers.add(driver)
            if driver in self._drivers:
                return found
        if found is not None and found.code is None:
            raise ConfigError(f"it is being brought to {found.order.reference} by another roll-out")
        self._start(order)
        self._drivers = {driver}
        report = self.look()
        assert report is not None
        return report

    def look(self) -> Report | None:
        """Tell how the last roll-out is; None if there was none since the agent began."""
        report, process = self._report, self._process
        if report is None or process is None or self._output is None:
            return report
        code = process.poll()
        said = _last_line(self._output[1])
        if code is None:
            return msgspec.structs.replace(report, said=said)
        changed = None
        if code == 0:
            changed, code, said = _read_answer(self._output[0], report.order.digest)
        elif code < 0:
            said = f"it was ended by signal {-code}; {said}"
        for file in self._output:
            file.close()
        self._process = self._output = None
        self._report = msgspec.structs.replace(report, code=code, changed=changed, said=said)
        return self._report

    def _start(self, order: Order) -> None:
        if not self._command:
            raise ConfigError("its rollout in fleet.toml names no command")
        name = self._command[0]
        # A bare `edge-llm` is that of this very installation, wherever PATH leads.
        beside = str(Path(sys.executable).parent)
        program = shutil.which(name, path=f"{beside}:{os.environ.get('PATH', os.defpath)}")
        if program is None:
            raise ConfigError(f"there is no command {name!r} on it; see its rollout in fleet.toml")
        arguments = [program, *self._command[1:], *order.arguments]
        output = (tempfile.TemporaryFile(), tempfile.TemporaryFile())  # noqa: SIM115 - closed at its end
        try:
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=output[0],
                stderr=output[1],
                cwd="/",
                env={
                    key: value
                    for key, value in os.environ.items()
                    if not key.startswith("RAY_") and key not in _NOT_HANDED_ON
                },
            )
        except OSError as error:
            for file in output:
                file.close()
            raise ConfigError(f"cannot start {program}: {error.strerror}") from error
        self._output = output
        self._report = Report(f"{os.getpid()}-{next(self._numbers)}", order)


class _Answer(msgspec.Struct):
    digest: str
    changed: bool
    notes: list[str] = []


def _read_answer(file: IO[bytes], digest: str) -> tuple[bool | None, int, str]:
    """Read what a roll-out that ended with 0 has printed; changed, code and words."""
    lines = _tail(file).strip().splitlines()
    try:
        answer = msgspec.json.decode(lines[-1] if lines else b"", type=_Answer)
    except MALFORMED as error:
        return None, 70, f"its command ended with 0 and printed no JSON of a roll-out: {error}"
    if answer.digest != digest:
        return None, 70, f"its command ended with 0 and brought it to {answer.digest}"
    return answer.changed, 0, "; ".join(answer.notes)


def _last_line(file: IO[bytes]) -> str:
    text = _tail(file).decode("utf-8", "replace").strip()
    _, found, error = text.rpartition(_ERROR)
    if found:
        return error[:_MAX_SAID]
    return text.rpartition("\n")[2][-_MAX_SAID:]


def _tail(file: IO[bytes]) -> bytes:
    # The process writes at the place that this shares with it: read without moving that.
    size = os.fstat(file.fileno()).st_size
    with contextlib.suppress(OSError):
        return os.pread(file.fileno(), _MAX_READ, max(0, size - _MAX_READ))
    return b""


def plain(report: Report | None) -> dict[str, Any] | None:
    """Make plain data of a report, for another version of edge-llm at the other end."""
    if report is None:
        return None
    data: dict[str, Any] = msgspec.to_builtins(report)
    return data
