"""Servers in processes of their own, for tests of signals, memory and file descriptors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.control_groups import Group


class Child:
    """A server process; its log is read as it comes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.log: list[str] = []
        self._seen = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()
        line = self.wait_for(r"listening on \S+ port (\d+)")
        self.port = int(line[1])

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._seen:
                self.log.append(line)
                self._seen.notify_all()

    def wait_for(self, pattern: str, timeout_s: float = 30) -> re.Match[str]:
        def find() -> re.Match[str] | None:
            return next((m for line in self.log if (m := re.search(pattern, line))), None)

        with self._seen:
            assert self._seen.wait_for(find, timeout_s), "".join(self.log)
            found = find()
        assert found is not None
        return found

    @property
    def resident_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) * 1024

    def ask(self, path: str = "/v1/chat/completions", body: Any = None) -> tuple[int, Any, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data=data)
        if data is not None:
            request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers, error.read()


@contextmanager
def child(*arguments: str, group: Group | None = None, **environment: str) -> Iterator[Child]:
    command = [sys.executable, *arguments]
    process = subprocess.Popen(
        command if group is None else group.command(*command),
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield Child(process)
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


@contextmanager
def scripted_child(
    bundle: Path, delay_s: float = 0.0, *, wait: bool = True, **settings: Any
) -> Iterator[Child]:
    """A service with a scripted engine; it is ready, unless ``wait`` is false."""
    pairs = [f"{name}={value}" for name, value in settings.items()]
    with child("-m", "tests.edge_serve.child", str(bundle), str(delay_s), *pairs) as opened:
        if wait:
            opened.wait_for("ready: tiny")
        yield opened


def comply(form: str, url: str, key: str, cases: str) -> Any:
    """What llm-comply says of a server, in these cases of a protocol."""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "llm_comply.cli", "run", "--format", form, "-u", url,
         "-k", key, "-m", "tiny", "--json", "-f", cases],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ran.stdout, ran.stderr
    report = json.loads(ran.stdout)
    failed = [result for result in report["results"] if result["status"] == "failed"]
    assert not failed, failed
    return report
