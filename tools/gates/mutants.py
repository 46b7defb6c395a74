"""Breaks the code on purpose, one edit at a time, and checks whether a test notices.

The edits are in tests/mutants.toml, each with the tests that must fail. A test that cannot fail
proves nothing; whoever loosens a test sees here which mistakes it lets through from then on.

Nothing happens in the checkout: files that git knows or would add are copied, as they are now. Each
copy must import its own packages, since the environment's are those of the checkout. First all
tests run without an edit. An edit whose code or test is gone is reported and fails nothing. Then
two copies take one edit after the other. A noticed edit is kept in .mutants/results.json and not
tried again, so an interrupted run resumes. Its key is a hash of the edit, the edited file, the
files of its tests and what all tests share. Remove the file to try all.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import hashlib
import importlib.util
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn
from xml.etree import ElementTree

import msgspec

from edge_serve.config_file import read_toml

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "tests" / "mutants.toml"
NUM_COPIES = 2
LIMIT_S = 180.0
"""Limit for the tests of one edit, which take seconds; an edit may make them wait for ever."""
UNCHANGED_LIMIT_S = 1800.0
_FEW = 8  # tests: so few end before further processes have begun
_ALL_PASSED, _SOME_FAILED = 0, 1  # exit codes of pytest
# Hypothesis tries the same examples each time, so that no mutant is noticed by luck. It does not
# look for the shortest failing example, which takes longer than all else. This is set before any
# conftest.py, whose own profile is made from this one.
_PYTEST = """
import sys
import pytest

class Brief:
    @pytest.hookimpl(tryfirst=True)
    def pytest_load_initial_conftests(self):
        from hypothesis import Phase, settings

        phases = [Phase.explicit, Phase.generate]
        settings.register_profile("brief", phases=phases, database=None, derandomize=True)
        settings.load_profile("brief")

sys.exit(pytest.main(sys.argv[1:], [Brief()]))
"""

Kind = Literal["killed", "hung", "survived", "not run", "stale", "error"]


class MutantError(Exception):
    """An edit cannot be made, or its tests prove nothing."""


class StaleError(MutantError):
    """The code or the tests that a mutant names are no longer there."""


class Mutant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An edit that breaks the code.

    Attributes:
        id: its name.
        file: the file to edit, from the root of the checkout.
        breaks: the property that no longer holds.
        before: text that occurs in the file exactly once. If the code has moved, the one file of
            the package that has it exactly once is edited instead.
        after: text to put in its place.
        tests: pytest's ids of tests, one of which must fail.
    """

    id: str
    file: str
    breaks: str
    before: str
    after: str
    tests: tuple[str, ...]

    def edited(self, text: str) -> str:
        """Return the file's text with the edit.

        Raises:
            StaleError: ``before`` is not there, or more than once.
            MutantError: the result is no Python, or nothing that runs has changed.
        """
        if (count := text.count(self.before)) != 1:
            raise StaleError(
                f"`before` occurs {count} times in {self.file}: the code has changed; write the "
                "mutant anew or take it out"
            )
        result = text.replace(self.before, self.after)
        try:
            tree = ast.dump(ast.parse(result))
        except SyntaxError as error:
            raise MutantError(f"{self.file} is no Python with it: {error}") from error
        if tree == ast.dump(ast.parse(text)):
            raise MutantError(f"it changes nothing of {self.file} that runs")
        return result

    def found(self, root: Path) -> Mutant:
        """Return the mutant with the file to which its code has moved, if it has."""
        path = root / self.file
        if path.is_file() and self.before in path.read_text("utf-8"):
            return self
        package = root / Path(self.file).parts[0]
        others = [file for file in package.rglob("*.py") if self.before in file.read_text("utf-8")]
        if len(others) == 1:
            return msgspec.structs.replace(self, file=others[0].relative_to(root).as_posix())
        if not path.is_file():
            raise StaleError(f"{self.file} is gone, and {len(others)} files have `before`")
        return self

    def key(self, root: Path) -> str:
        """Hash the edit, the edited file, the files of its tests, and what all tests share."""
        tests = dict.fromkeys(root / test.partition("::")[0] for test in self.tests)
        found = hashlib.sha256(msgspec.json.encode(self) + _shared(root))
        for file in (root / self.file, *tests):
            found.update(hashlib.sha256(file.read_bytes()).digest())
        return found.hexdigest()


@functools.cache
def _shared(root: Path) -> bytes:
    """Hash fixtures, stand-ins and other modules of the tests that have no tests."""
    files = sorted(path for path in (root / "tests").rglob("*.py") if path.name[:5] != "test_")
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).digest()


class Result(msgspec.Struct, frozen=True):
    """How a mutant fared.

    Attributes:
        kind: ``killed`` if a test failed, ``hung`` if they did not end, ``survived`` if all passed;
            ``not run`` if some of them cannot run on this machine, ``stale`` if its code or tests
            are gone, ``error`` if nothing is proven.
        detail: the test that failed, or the reason.
        seconds: time of its tests.
        key: hash from `Mutant.key`.
    """

    kind: Kind
    detail: str
    seconds: float
    key: str


class _Table(msgspec.Struct, forbid_unknown_fields=True):
    mutant: list[Mutant]


def read_table(path: Path = TABLE) -> list[Mutant]:
    """Read the mutants of a TOML file.

    Raises:
        MutantError: its layout is wrong, or an id occurs twice.
    """
    try:
        mutants = msgspec.convert(read_toml(path), _Table).mutant
    except msgspec.ValidationError as error:
        raise MutantError(f"{path}: {error}") from error
    again = [name for name, count in Counter(each.id for each in mutants).items() if count > 1]
    if again:
        raise MutantError(f"{path} has more than one mutant {', '.join(again)}; number them anew")
    return mutants


@dataclass(frozen=True)
class _Report:
    """Outcome of a run of pytest; `code` is None if its time was over."""

    code: int | None
    failed: tuple[str, ...]
    skipped: frozenset[str]
    output: str
    seconds: float


class _Copy:
    """The files of a checkout in another directory, where tests run."""

    def __init__(self, root: Path, directory: Path) -> None:
        self.root = directory / "checkout"
        self._directory = directory
        self._environment = {
            name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
        }
        # Children with another working directory must find the copy, too.
        self._environment["PYTHONPATH"] = str(self.root)
        self._process: subprocess.Popen[bytes] | None = None
        for name in _files(root):
            target = self.root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target, follow_symlinks=False)

    def check_imports(self, packages: Iterable[str]) -> None:
        """Make sure that the copy's own packages are tested.

        Raises:
            MutantError: another package is found.
        """
        for package in packages:
            command = [sys.executable, "-c", f"import {package}; print({package}.__path__[0])"]
            done = subprocess.run(
                command, cwd=self._directory, env=self._environment, capture_output=True, text=True
            )
            if not done.stdout.startswith(str(self.root)):
                raise MutantError(
                    f"the copy would test {package} of {done.stdout.strip() or done.stderr}"
                )

    def write(self, file: str, text: str) -> None:
        """Write a file and drop its compiled form: two edits may fall into one second."""
        path = self.root / file
        path.write_text(text, "utf-8")
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)

    def run(self, arguments: Sequence[str], limit_s: float) -> _Report:
        """Run pytest."""
        xml, log = self._directory / "report.xml", self._directory / "log"
        xml.unlink(missing_ok=True)
        command = [sys.executable, "-c", _PYTEST, "-q", "-p", "no:cacheprovider"]
        command += [f"--basetemp={self._directory / 't'}", f"--junitxml={xml}", *arguments]
        began = time.monotonic()
        code: int | None = None
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                cwd=self.root,
                env=self._environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(limit_s)
        self.kill()
        failed, skipped = _read_report(xml)
        text = log.read_text("utf-8", "replace")
        return _Report(code, failed, skipped, text, time.monotonic() - began)

    def kill(self) -> None:
        """End the tests and the processes that they left running."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _files(root: Path) -> Iterator[str]:
    """Yield the files that git knows or would add, if they exist."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True).stdout
    for name in dict.fromkeys(listed.decode().split("\0")):
        path = root / name
        if path.is_file() or path.is_symlink():
            yield name


def _read_report(path: Path) -> tuple[tuple[str, ...], frozenset[str]]:
    """Return the names of the tests that failed, and of those that were skipped."""
    failed, skipped = [], set()
    if path.exists():
        for case in ElementTree.parse(path).iter("testcase"):
            name = f"{case.get('classname')}.{case.get('name')}"
            if case.find("failure") is not None or case.find("error") is not None:
                failed.append(str(case.get("name")))
            elif case.find("skipped") is not None:
                skipped.add(name)
    return tuple(failed), frozenset(skipped)


class Run:
    """Tries mutants, and keeps the noticed ones.

    Args:
        root: the checkout.
        mutants: the mutants to try.
        limit_s: seconds that the tests of each may take.

    Raises:
        MutantError: the results of earlier runs cannot be read.
    """

    def __init__(self, root: Path, mutants: Sequence[Mutant], limit_s: float = LIMIT_S) -> None:
        self._root, self._mutants, self._limit_s = root, mutants, limit_s
        self._state = root / ".mutants" / "results.json"
        self._known: dict[str, Result] = {}
        if self._state.exists():
            try:
                self._known = msgspec.json.decode(self._state.read_bytes(), type=dict[str, Result])
            except msgspec.DecodeError as error:
                raise MutantError(f"{self._state} is damaged, remove it: {error}") from error
        self._lock = threading.Lock()
        self._free: queue.SimpleQueue[_Copy] = queue.SimpleQueue()
        self._skipped: frozenset[str] = frozenset()
        self._interrupted = threading.Event()

    def run(self) -> dict[str, Result]:
        """Try all; return each result by id.

        Raises:
            MutantError: the tests fail without any edit, or test other packages.
        """
        results: dict[str, Result] = {}
        left: list[tuple[Mutant, str]] = []
        for mutant in self._mutants:
            try:
                if gone := [test for test in mutant.tests if not _is_there(self._root, test)]:
                    raise StaleError(f"there is no {', '.join(gone)}")
                mutant = mutant.found(self._root)
                text = mutant.edited((self._root / mutant.file).read_text("utf-8"))
                key = mutant.key(self._root)
            except (MutantError, OSError) as error:
                kind: Kind = "stale" if isinstance(error, StaleError) else "error"
                results[mutant.id] = _say(mutant, Result(kind, str(error), 0.0, ""))
                continue
            known = self._known.get(mutant.id)
            if known is not None and known.key == key:
                results[mutant.id] = _say(mutant, known, "earlier")
            else:
                left.append((mutant, text))
        if left:
            with tempfile.TemporaryDirectory(prefix="mutants-") as place:
                results |= self._try_all(left, Path(place))
        return results

    def _try_all(self, left: list[tuple[Mutant, str]], place: Path) -> dict[str, Result]:
        copies = []
        for number in range(NUM_COPIES):
            (place / str(number)).mkdir()
            copies.append(_Copy(self._root, place / str(number)))
        with ThreadPoolExecutor(NUM_COPIES) as pool:
            try:
                stale = self._run_unchanged(copies[0], [mutant for mutant, _ in left])
                for copy in copies:
                    self._free.put(copy)
                tries: dict[str, Future[Result]] = {
                    mutant.id: pool.submit(self._try, mutant, text)
                    for mutant, text in left
                    if mutant.id not in stale
                }
                return stale | {name: each.result() for name, each in tries.items()}
            except BaseException:
                self._interrupted.set()
                pool.shutdown(wait=False, cancel_futures=True)
                for copy in copies:
                    copy.kill()
                raise

    def _run_unchanged(self, copy: _Copy, mutants: list[Mutant]) -> dict[str, Result]:
        """Run the tests without an edit; return the mutants whose tests have other names now."""
        copy.check_imports(dict.fromkeys(Path(mutant.file).parts[0] for mutant in mutants))
        files = dict.fromkeys(
            test.partition("::")[0] for mutant in mutants for test in mutant.tests
        )
        ids = copy.run(["--collect-only", *files], UNCHANGED_LIMIT_S).output.splitlines()
        names = {*ids, *(line.partition("[")[0] for line in ids)}
        stale: dict[str, Result] = {}
        tests: dict[str, None] = {}
        for mutant in mutants:
            if gone := [test for test in mutant.tests if "::" in test and test not in names]:
                reason = f"there is no {', '.join(gone)}"
                stale[mutant.id] = _say(mutant, Result("stale", reason, 0.0, ""))
            else:
                tests |= dict.fromkeys(mutant.tests)
        print(f"{len(tests)} tests without an edit", flush=True)
        processes = NUM_COPIES if len(tests) > _FEW else 0
        arguments = ["-n", str(processes), "--dist", "loadgroup", *tests]
        report = copy.run(arguments, UNCHANGED_LIMIT_S)
        if report.code != _ALL_PASSED:
            how = f"with {report.code}" if report.code is not None else "too late"
            raise MutantError(
                f"the tests end {how} without any edit, so nothing can be proven:\n"
                f"{report.output[-4000:]}"
            )
        self._skipped = report.skipped
        print(f"passed in {report.seconds:.0f} s, {len(report.skipped)} skipped", flush=True)
        return stale

    def _try(self, mutant: Mutant, text: str) -> Result:
        copy = self._free.get()
        original = (copy.root / mutant.file).read_text("utf-8")
        try:
            key = mutant.key(copy.root)  # of the copy, as the checkout may have changed since
            copy.write(mutant.file, text)
            report = copy.run(["-x", *mutant.tests], self._limit_s)
        finally:
            copy.write(mutant.file, original)
            self._free.put(copy)
        if self._interrupted.is_set():
            raise MutantError("its tests were ended")
        kind, detail = self._judge(report)
        result = _say(mutant, Result(kind, detail, round(report.seconds, 1), key))
        if kind in ("killed", "hung"):
            self._keep(mutant, result)
        return result

    def _judge(self, report: _Report) -> tuple[Kind, str]:
        if report.code is None:
            return "hung", f"its tests did not end in {self._limit_s:g} s"
        if report.code == _SOME_FAILED and report.failed:
            return "killed", report.failed[0]
        if report.code == _ALL_PASSED and self._skipped & report.skipped:
            return "not run", f"skipped here: {', '.join(sorted(self._skipped & report.skipped))}"
        if report.code == _ALL_PASSED:
            return "survived", "all of its tests pass"
        return "error", f"pytest ended with {report.code}:\n{report.output[-2000:]}"

    def _keep(self, mutant: Mutant, result: Result) -> None:
        with self._lock:
            self._known[mutant.id] = result
            self._state.parent.mkdir(exist_ok=True)
            new = self._state.with_suffix(".new")
            new.write_bytes(msgspec.json.format(msgspec.json.encode(self._known)))
            new.replace(self._state)


def _is_there(root: Path, test: str) -> bool:
    return (root / test.partition("::")[0]).is_file()


def _say(mutant: Mutant, result: Result, when: str = "") -> Result:
    took = when or f"{result.seconds:.1f} s"
    told = result.detail if result.kind == "killed" else f"{mutant.breaks}: {result.detail}"
    line = f"{mutant.id:4} {result.kind:8} {took:>7}  {told}\n"
    print(line, end="", flush=True)  # in one piece: the other copy's thread prints, too
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m tools mutants", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("ids", nargs="*", metavar="ID", help="only these; all by default")
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    options = parser.parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    began = time.monotonic()
    try:
        mutants = {mutant.id: mutant for mutant in read_table()}
        if unknown := [name for name in options.ids if name not in mutants]:
            parser.error(f"there is no mutant {', '.join(unknown)}; --list says which there are")
        chosen = [mutants[name] for name in options.ids or mutants]
        if options.list:
            for mutant in chosen:
                print(f"{mutant.id:4} {mutant.file}: {mutant.breaks}")
            return 0
        results = Run(ROOT, chosen).run()
    except MutantError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    counts = Counter(result.kind for result in results.values())
    said = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    print(f"{len(results)} mutants in {time.monotonic() - began:.0f} s: {said}")
    if stale := [name for name, result in results.items() if result.kind == "stale"]:
        print(f"report: write anew or take out of tests/mutants.toml: {', '.join(stale)}")
    return 1 if counts["survived"] or counts["error"] else 0


def _end(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
