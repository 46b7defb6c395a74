"""Tries a release before it gets its name: a newcomer's way, without a checkout.

It runs in an environment that knows nothing of the checkout. It runs the commands of the release's
own ``INSTALL.md``, then the verbs, the README's Python, an export of SmolLM2 and a served answer.
For a Jetson, pip resolves and hashes what it would install there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

from tools.models.smollm2 import smollm2_gguf

from .targets import DISTRIBUTION, OWN_LOCK, SUMS, TARGETS, ReleaseError, Target

PYTHONS = ("3.10", "3.12", "3.13")
"""JetPack 6's, JetPack 7's and the newest."""

LIMIT_S = 900.0
"""Limit of a single step; SmolLM2 takes half a minute on two idle cores."""

_SETTINGS = re.compile(r"(https?_proxy|no_proxy|ssl_cert_file|pip_\w+)", re.IGNORECASE)
_BUNDLE = "bundles/deepseek-r1-distill-qwen-1.5b-int4"  # the README's Python opens it


@dataclass(frozen=True)
class Row:
    """Result of one proof.

    Attributes:
        name: name for people.
        python: its Python's version, ``3.12``.
        seconds: wall clock time.
        reason: why it failed, or empty.
    """

    name: str
    python: str
    seconds: float
    reason: str


class ProofError(Exception):
    """A proof failed."""


@dataclass(frozen=True)
class Machine:
    """A newcomer's machine: a home, one Python, and an index; nothing of this checkout.

    Attributes:
        home: its home directory, which is empty at first.
        folder: the release.
    """

    home: Path
    folder: Path

    def environment(self) -> dict[str, str]:
        """Return all variables."""
        kept = {name: value for name, value in os.environ.items() if _SETTINGS.fullmatch(name)}
        path = f"{self.home}/bin:/usr/bin:/bin"
        return {**kept, "PATH": path, "HOME": str(self.home), "LANG": "C.UTF-8"}

    def run(self, command: str | Sequence[str], place: Path | None = None) -> str:
        """Run a command, or a script of bash, at home or elsewhere, and return its output.

        Raises:
            ProofError: it fails or does not end.
        """
        words = ["bash", "-euo", "pipefail", "-c", command] if isinstance(command, str) else command
        try:
            done = subprocess.run(
                words,
                cwd=place or self.home,
                env=self.environment(),
                check=False,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=LIMIT_S,
            )
        except subprocess.TimeoutExpired:
            raise ProofError(f"{words[-1]!r} does not end in {LIMIT_S:.0f} s") from None
        if done.returncode:
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
            raise ProofError(f"{words[-1]!r} ends with {done.returncode}:\n{tail}")
        return done.stdout

    @property
    def edge_llm(self) -> str:
        return f"{self.home}/edge-llm/bin/edge-llm"


def find_pythons(versions: Sequence[str] = PYTHONS) -> dict[str, Path]:
    """Find an interpreter of each version, on the path or in pyenv.

    Raises:
        ReleaseError: one is missing here.
    """
    found = {}
    for version in versions:
        name = f"python{version}"
        root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
        candidates = [shutil.which(name), *sorted(root.glob(f"versions/{version}.*/bin/{name}"))]
        for candidate in filter(None, candidates):
            # A shim of pyenv runs only a version that somebody chose.
            show = [str(candidate), "-c", "import sys; print(sys.executable)"]
            done = subprocess.run(show, check=False, capture_output=True, text=True)
            if done.returncode == 0:
                found[version] = Path(done.stdout.strip())
                break
        else:
            raise ReleaseError(
                f"the wheel is tried in Python {', '.join(versions)}, and {name} is not here;"
                f" install it, e.g. pyenv install {version}"
            )
    return found


def read_commands(page: str) -> list[str]:
    """Return the scripts of a Markdown page, in its order."""
    return re.findall(r"^```sh\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def is_whole(machine: Machine) -> None:
    """Check the checksums as ``INSTALL.md`` says, and that they name every file."""
    check = read_commands((machine.folder / "INSTALL.md").read_text("utf-8"))[0].splitlines()
    machine.run(check[-1], machine.folder)  # minisign verified it when it signed
    named = {line[66:] for line in (machine.folder / SUMS).read_text("utf-8").splitlines()}
    there = {
        path.relative_to(machine.folder).as_posix()
        for path in machine.folder.rglob("*")
        if path.is_file()
    } - {SUMS, f"{SUMS}.minisig"}
    if named != there:
        raise ProofError(f"{SUMS} and the folder differ in {sorted(named ^ there)}")


def installs(machine: Machine) -> None:
    """Run the commands of ``INSTALL.md`` for a laptop."""
    page = (machine.folder / "INSTALL.md").read_text("utf-8")
    machine.run(read_commands(page)[1], machine.folder)
    machine.run("edge-llm/bin/python -m pip check")


def is_alone(machine: Machine) -> None:
    """Check that all packages come from the environment, and no path leads to a checkout."""
    own = f"{machine.home}/edge-llm/"
    script = (
        "import edge, edge_fleet, edge_lab, edge_make, edge_serve, engines, export, sys\n"
        "for package in (edge, edge_fleet, edge_lab, edge_make, edge_serve, engines, export):\n"
        f"    assert package.__file__.startswith({own!r}), package\n"
    )
    machine.run(["edge-llm/bin/python", "-c", script])


def shows_help(machine: Machine) -> None:
    """Run the help of the command and of every verb, and the manual page."""
    says = machine.run([machine.edge_llm, "--version"])
    (wheel,) = machine.folder.glob("*.whl")
    if wheel.name.split("-")[1] not in says.split():
        raise ProofError(f"edge-llm --version says {says!r}, and the wheel is {wheel.name}")
    page = machine.run([machine.edge_llm, "--help"])
    verbs = re.findall(r"^  ([a-z][a-z-]+)  ", page, re.MULTILINE)
    if len(verbs) < 20:
        raise ProofError(f"edge-llm --help lists {verbs} only")
    for verb in verbs:
        machine.run([machine.edge_llm, verb, "--help"])
    manual = machine.run([machine.edge_llm, "man"])
    if manual != (machine.home / "edge-llm/share/man/man1/edge-llm.1").read_text("utf-8"):
        raise ProofError("edge-llm man and share/man/man1/edge-llm.1 differ")


def names_what_is_missing(machine: Machine) -> None:
    """Check that the cure of an error is for an installation, not for a checkout."""
    script = "from edge.errors import install_command; print(install_command('report'))"
    command = machine.run(["edge-llm/bin/python", "-c", script])
    if "vl-convert-python" not in command or "-e " in command or str(machine.folder) in command:
        raise ProofError(f"an error says {command!r}, which is for a checkout")


def exports(machine: Machine) -> None:
    """Export SmolLM2, under the name of the bundle that the README's Python opens."""
    options = ["--quant", "int4", "--method", "rtn", "--kv-capacity", "256"]  # it ends answers
    # The export's own warning says so: the newest ONNX Runtime for Python 3.10 is too old.
    if "3.10." in machine.run(["edge-llm/bin/python", "--version"]):
        options += ["--dialect", "portable"]
    machine.run([machine.edge_llm, "export", str(smollm2_gguf()), "-o", _BUNDLE, *options])
    machine.run([machine.edge_llm, "inspect", _BUNDLE])


def runs_the_python_of_the_readme(machine: Machine) -> None:
    """Run each block, which prints an answer."""
    readme = (machine.folder / "README.md").read_text("utf-8")
    sources = re.findall(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    if not sources:
        raise ProofError("README.md has no Python")
    for source in sources:
        if not machine.run(["edge-llm/bin/python", "-c", source]).strip():
            raise ProofError(f"this prints nothing:\n{source}")


@contextmanager
def served(machine: Machine, port: int) -> Iterator[None]:
    """Run ``edge-llm serve`` until the end of the block, and check that it ends well."""
    command = [machine.edge_llm, "serve", _BUNDLE, "--port", str(port)]
    log = machine.home / "serve.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            command,
            cwd=machine.home,
            env=machine.environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        end = time.monotonic() + LIMIT_S
        while not _is_ready(port):
            if server.poll() is not None or time.monotonic() > end:
                raise ProofError(f"edge-llm serve is not ready:\n{log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield
        server.terminate()
        if code := server.wait(timeout=60):
            raise ProofError(f"edge-llm serve ends with {code}:\n{log.read_text()[-2000:]}")
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()


def _is_ready(port: int) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


def answers_over_http(machine: Machine) -> None:
    """Serve the bundle, and get a chat answered."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    body = {
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 24,
        "temperature": 0,
    }
    request = Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with served(machine, port), urlopen(request, timeout=LIMIT_S) as answer:
        text = json.load(answer)["choices"][0]["message"]["content"]
    if "Paris" not in text:
        raise ProofError(f"the server answers {text!r}")


def resolves(machine: Machine, version: str, target: Target, *, is_offline: bool) -> None:
    """Have pip choose, hash and resolve everything that it would install on a target's machine.

    It runs without ``--no-deps``: a requirement of a package that the lock does not name is an
    error.
    """
    own = (machine.folder / OWN_LOCK).read_text("utf-8")
    with_extras = machine.home / f"{target.lock}.txt"
    extras = "[cpu,export,images,serve,registry]=="
    with_extras.write_text(own.replace(f"{DISTRIBUTION}==", f"{DISTRIBUTION}{extras}"), "utf-8")
    where = ["--find-links", "."]
    if is_offline:
        where += ["--no-index", "--find-links", f"wheels/{target.lock}"]
    pip = [
        f"{machine.home}/bin/python3",
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--quiet",
        "--require-hashes",
    ]
    pip += ["--target", str(machine.home / "nowhere"), *where, *target.pip_arguments(version)]
    pip += ["-r", f"requirements/{target.lock}.txt", "-r", str(with_extras)]
    machine.run(pip, machine.folder)


STEPS: tuple[tuple[str, Callable[[Machine], None]], ...] = (
    ("checksums", is_whole),
    ("install by INSTALL.md", installs),
    ("nothing of a checkout", is_alone),
    ("help of every verb, man", shows_help),
    ("cures name packages", names_what_is_missing),
    ("export of SmolLM2", exports),
    ("Python of the README", runs_the_python_of_the_readme),
    ("answer over HTTP", answers_over_http),
)


def _try(name: str, version: str, proof: Callable[[], None]) -> Row:
    print(f"release: Python {version}: {name}", file=sys.stderr, flush=True)
    began = time.monotonic()
    reason = ""
    try:
        proof()
    except (ProofError, OSError, subprocess.SubprocessError) as error:
        reason = str(error)
    return Row(name, version, time.monotonic() - began, reason)


def prove(folder: Path, work: Path, pythons: dict[str, Path], *, is_offline: bool) -> list[Row]:
    """Try a release in every Python; after a failure, the rest of that Python is left out.

    Args:
        folder: the release.
        work: where environments are made.
        pythons: interpreters, as `find_pythons` finds them.
        is_offline: whether it has its libraries in ``wheels/``.
    """
    rows: list[Row] = []
    for version, python in pythons.items():
        machine = Machine(work / f"home-{version}", folder)
        (machine.home / "bin").mkdir(parents=True)
        (machine.home / "bin/python3").symlink_to(python)
        for name, step in STEPS:
            rows.append(_try(name, version, partial(step, machine)))
            if rows[-1].reason:
                break
        for target in TARGETS:
            if target.machine == "aarch64" and version in target.pythons:
                proof = partial(resolves, machine, version, target, is_offline=is_offline)
                rows.append(_try(f"pip resolves {target.lock}", version, proof))
        shutil.rmtree(machine.home)
    return rows


def render(rows: Sequence[Row]) -> str:
    """Return the rows as a table for a terminal."""
    width = max(len(row.name) for row in rows)
    lines = [f"{row.name:<{width}}  {row.python:>4}  {row.seconds:6.1f} s  " for row in rows]
    ends = ["FAILED" if row.reason else "ok" for row in rows]
    return "\n".join(map(str.__add__, lines, ends))
