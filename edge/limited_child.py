"""Runs untrusted work in a process of its own, with limits on its time and memory.

Some libraries cannot be stopped from within: they hold the interpreter, or running out of memory
ends the process. So a child does the work; the kernel can end it, and the parent continues. The
child is also confined (`edge.confine`) before its first task: code that takes it over can open
nothing.

The child imports a module and calls its function with bytes for each task, one at a time. A frame
on its pipes is a letter, a length of eight bytes (little-endian), and that many bytes.
"""

from __future__ import annotations

import json
import logging
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from edge.errors import ResourceError

_RESULT, _FAILURE, _NO_MEMORY, _UNCONFINED = b"r", b"f", b"m", b"u"
_LENGTH_BYTES = 8
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from edge.limited_child import serve; serve(*sys.argv[2:])"
)
_WALL_FACTOR = 10  # wall clock per CPU second, since the child may have to wait for a core
_MIN_WALL_S = 10.0
_HELD_UP = "RDTt"  # states of a process that waits for a core or a disk, or was stopped
_LEAST_SHARE = 0.01  # share of a core; a child that is held up and gets less is given up
_log = logging.getLogger(__name__)
_warned: list[str] = []  # so that the log says only once that nothing can be confined here


@dataclass(frozen=True)
class Limits:
    """Limits of one task.

    Attributes:
        cpu_s: CPU seconds. The wall clock may show ten times as many, and at least 10; longer only
            if the child did not sleep and got less CPU time, as on a busy machine.
        memory_bytes: address space of the child, the interpreter included (about 40 MB).
        answer_bytes: longest answer.
        nice: added to the child's niceness.
        tasks: a child may use this many times ``cpu_s`` in its life. Then the kernel ends it,
            whatever its code does; normally another has taken its place before.
        confined: whether to refuse tasks if the kernel cannot confine a process; otherwise that is
            only logged as a warning.
    """

    cpu_s: float
    memory_bytes: int
    answer_bytes: int = 1 << 26
    nice: int = 0
    tasks: int = 10
    confined: bool = False

    @property
    def life_s(self) -> int:
        """Return the CPU seconds that a child may use in its life, with its start."""
        return math.ceil(self.tasks * self.cpu_s) + 1

    def __str__(self) -> str:
        return f"{self.cpu_s:g} s of CPU time or {self.memory_bytes >> 20} MiB"


class LimitError(Exception):
    """A task reached a limit, and its child was ended; the caller's message names the task."""


class ChildError(Exception):
    """The child failed for another reason than a limit; the message is the child's."""


class LimitedChild:
    """A child that does tasks for any thread, one after the other.

    It starts with the first task, and again after each task that reached a limit (about 0.1 s). It
    ends with this object or this process. Use it as a context manager for a single task.
    """

    def __init__(self, function: str, limits: Limits) -> None:
        """Prepare the child without starting it.

        Args:
            function: ``module:name`` of a function from bytes to bytes. If its module has a
                function ``prepare``, the child calls that first, to import and open what tasks
                need; once confined, they cannot.
            limits: limits of each task.
        """
        self._function = function
        self._limits = limits
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] = _nothing
        self._owner = 0

    def ask(self, task: bytes) -> bytes:
        """Do a task and return its answer.

        Raises:
            LimitError: the task reached a limit before it answered.
            ChildError: the function raised an exception, which it should not.
            ResourceError: no process could be started; this machine is too busy to tell whether the
                task would reach its limits; or it must be confined and cannot be.
        """
        with self._lock:
            process = self._started()
            try:
                kind, answer = self._exchange(process, task)
                if kind == _UNCONFINED:
                    self._take_unconfined(answer.decode())
                    kind, answer = self._exchange(process, task)
            except BaseException:
                self._stop()
                raise
            if kind != _RESULT:
                self._stop()
        if kind == _NO_MEMORY:
            raise LimitError
        if kind == _FAILURE:
            raise ChildError(answer.decode("utf-8", "replace"))
        return answer

    def close(self) -> None:
        """End the child; the next task starts another."""
        with self._lock:
            self._stop()

    def __enter__(self) -> LimitedChild:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._owner == os.getpid():
            if self._process.poll() is None and self._has_time(self._process):
                return self._process
            self._stop()
        # Isolated and without site, so that the environment does not change what the child imports.
        path = [str(Path(__file__).resolve().parent.parent), *sys.path]
        limits = self._limits
        command = [sys.executable, "-I", "-S", "-c", _START, json.dumps(path), self._function]
        command += [str(limits.cpu_s), str(limits.memory_bytes), str(limits.nice)]
        command.append(str(limits.life_s))
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # errors come in a frame
                bufsize=0,
            )
        except OSError as error:
            raise ResourceError(
                f"cannot start a process for {self._function}: {error}; free memory or raise the "
                "limit of processes"
            ) from error
        self._process, self._owner = process, os.getpid()
        self._end = weakref.finalize(self, _end, process, self._owner)
        return process

    def _has_time(self, process: subprocess.Popen[bytes]) -> bool:
        """Whether the kernel leaves a child the CPU time of one more task."""
        return _state(process.pid)[1] + self._limits.cpu_s < self._limits.life_s

    def _take_unconfined(self, why: str) -> None:
        if self._limits.confined:
            raise ResourceError(f"what strangers wrote is not run here: {why}")
        if not _warned:
            _warned.append(why)
            _log.warning("what strangers wrote runs with limits on time and memory only: %s", why)

    def _stop(self) -> None:
        self._end()
        self._process, self._end = None, _nothing

    def _exchange(self, process: subprocess.Popen[bytes], task: bytes) -> tuple[bytes, bytes]:
        assert process.stdin is not None
        assert process.stdout is not None
        clock = _Clock(process, self._limits.cpu_s)
        target, source = process.stdin.fileno(), process.stdout.fileno()
        os.set_blocking(target, False)
        os.set_blocking(source, False)
        frame = memoryview(b"".join((b"t", len(task).to_bytes(_LENGTH_BYTES, "little"), task)))
        try:
            while frame:
                clock.wait(target, select.POLLOUT)
                frame = frame[os.write(target, frame) :]
        except BrokenPipeError:
            pass  # the reason is in the answer, or in how the child ended
        head = self._read(process, source, 1 + _LENGTH_BYTES, clock)
        length = int.from_bytes(head[1:], "little")
        if length > self._limits.answer_bytes:
            raise LimitError
        return bytes(head[:1]), bytes(self._read(process, source, length, clock))

    def _read(
        self, process: subprocess.Popen[bytes], source: int, count: int, clock: _Clock
    ) -> bytearray:
        data = bytearray()
        while len(data) < count:
            clock.wait(source, select.POLLIN)
            try:
                part = os.read(source, min(count - len(data), 1 << 20))
            except BlockingIOError:
                continue
            if not part:
                self._explain(process, clock)
            data += part
        return data

    @staticmethod
    def _explain(process: subprocess.Popen[bytes], clock: _Clock) -> NoReturn:
        """Raise the error for a child that closed its pipe; a signal means a limit."""
        while True:
            try:
                code = process.wait(_MIN_WALL_S)
            except subprocess.TimeoutExpired:
                clock.extend()
                continue
            if code < 0:
                raise LimitError
            raise ChildError(f"it ended with exit code {code} before it answered")


def _nothing() -> None:
    """Do nothing, since there is nothing to end."""


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    process.stdout.close()
    if owner == os.getpid():  # after a fork, the child belongs to another process
        process.kill()
        process.wait()


class _Clock:
    """Waits for a child until its time for a task is over."""

    def __init__(self, process: subprocess.Popen[bytes], cpu_s: float) -> None:
        """Begin a task.

        Args:
            process: the child.
            cpu_s: CPU seconds of the task, as in `Limits`.
        """
        self._process = process
        self._wall_s = max(_WALL_FACTOR * cpu_s, _MIN_WALL_S)
        self._deadline = time.monotonic() + self._wall_s
        self._seen_s = _state(process.pid)[1]
        self._end_s = self._seen_s + cpu_s

    def wait(self, descriptor: int, event: int) -> None:
        """Wait for an event of the child's pipes; raises the errors of `extend`."""
        poll = select.poll()
        poll.register(descriptor, event)
        while not poll.poll(max(0.0, self._deadline - time.monotonic()) * 1e3):
            self.extend()

    def extend(self) -> None:
        """Give more time to a child that was held up and makes progress.

        Raises:
            LimitError: it was not held up: it has used its CPU time, or sleeps.
            ResourceError: it makes no progress.
        """
        state, spent_s = _state(self._process.pid)
        if spent_s >= self._end_s or state not in _HELD_UP:
            raise LimitError
        got_s = spent_s - self._seen_s
        if got_s < _LEAST_SHARE * self._wall_s:
            raise ResourceError(
                f"a process with a limit on its time had {got_s:.2f} s of CPU time in "
                f"{self._wall_s:g} s; this machine is too busy: run less beside it"
            )
        self._seen_s = spent_s
        self._deadline = time.monotonic() + self._wall_s


def _state(pid: int) -> tuple[str, float]:
    """Return a process' state, a letter of proc(5), and the CPU seconds that it has used."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("latin-1")
    except OSError:
        return "unknown", 0.0
    fields = text.rpartition(")")[2].split()
    return fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ------------------------------------------------------------------------------- in the child


def serve(function: str, cpu_s: str, memory_bytes: str, nice: str, life_s: str) -> None:
    """Do tasks from standard input until it ends; runs in the child.

    Args:
        function: ``module:name`` of the function, as in `LimitedChild`.
        cpu_s: field of `Limits`, as text like the others.
        memory_bytes: field of `Limits`.
        nice: field of `Limits`.
        life_s: field of `Limits`.
    """
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this child
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # the default ends the process
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    os.nice(int(nice))
    resource.setrlimit(resource.RLIMIT_AS, (int(memory_bytes), int(memory_bytes)))
    resource.setrlimit(resource.RLIMIT_CPU, (int(life_s), int(life_s)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, target = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # standard output carries frames only
    work: Callable[[bytes], bytes] | None = None
    while len(head := source.read(1 + _LENGTH_BYTES)) == 1 + _LENGTH_BYTES:
        kind, answer = _RESULT, b""
        signal.setitimer(signal.ITIMER_PROF, float(cpu_s))
        try:
            task = source.read(int.from_bytes(head[1:], "little"))
            if work is None:
                work, unconfined = _prepare(function)
                kind, answer = (_UNCONFINED, unconfined) if unconfined else (kind, answer)
            if kind == _RESULT:
                answer = work(task)
        except MemoryError:
            kind = _NO_MEMORY
        except Exception as error:  # noqa: BLE001 - the parent raises it
            kind, answer = _FAILURE, f"{type(error).__name__}: {error}"[:2000].encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        target.write(kind + len(answer).to_bytes(_LENGTH_BYTES, "little") + answer)
        target.flush()
        if kind not in (_RESULT, _UNCONFINED):
            return


def _prepare(function: str) -> tuple[Callable[[bytes], bytes], bytes]:
    """Import the function and confine this process; also returns why it could not be confined."""
    from edge.confine import confine

    name, _, function = function.partition(":")
    module = import_module(name)
    work: Callable[[bytes], bytes] = getattr(module, function)
    getattr(module, "prepare", _nothing)()
    try:
        confine()
    except ResourceError as error:
        return work, str(error).encode()
    return work, b""
