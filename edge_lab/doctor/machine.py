"""The machine that ``edge-llm doctor`` asks: every access to the system that a check needs.

Tests pass an object with the same methods instead, which has planted faults.
"""

from __future__ import annotations

import grp
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from edge.device.nodes import JETSON_NODES, SLOT_NODES, may_open
from edge.errors import ResourceError
from edge.limited_child import ChildError, LimitedChild, LimitError, Limits
from edge_lab.telemetry import Snapshot, read_power_modes, read_snapshot

from .scheme_probe import WIDE, Verdict

_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")  # colours
# Packages of PyPI and of NVIDIA's index for Jetson that all are ``onnxruntime`` when imported.
_ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")
_NOT_LOADED = re.compile(r"Failed to load library \S+ with error: ")  # ONNX Runtime's words
_PLUGIN_PROBE = "engines.check.plugin_probe"  # run by name, since that package imports this one
_TIMEOUT_S = 120.0  # the first use of CUDA on a Jetson may take half a minute


class Node(msgspec.Struct, frozen=True):
    """A device node that exists: its group, and whether this process may read and write it."""

    usable: bool
    group: str
    gid: int


class CudaProbe(msgspec.Struct, frozen=True):
    """Result of `probe.probe_cuda`; ``failure`` says why there is none."""

    failure: str | None = None
    library_error: str | None = None
    driver_version: int | None = None
    init_code: int | None = None
    num_devices: int | None = None
    name: str | None = None
    compute_capability: str | None = None
    integrated: bool | None = None
    context_code: int | None = None
    memory_free_bytes: int | None = None
    memory_total_bytes: int | None = None

    @property
    def works(self) -> bool:
        """Whether a context could be made on a GPU."""
        return self.context_code == 0


class Library(msgspec.Struct, frozen=True):
    """A library that was imported and tried.

    Attributes:
        missing: whether it is not installed.
        error: what went wrong; None if it works.
        version: the library's version.
        providers: ONNX Runtime's execution providers.
    """

    missing: bool = False
    error: str | None = None
    version: str | None = None
    providers: tuple[str, ...] = ()


class Machine:
    """The machine that this process runs on.

    Args:
        root: where ``sys``, ``proc``, ``etc``, ``var`` and ``dev`` are.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root

    def snapshot(self) -> Snapshot:
        """Clocks, temperatures, memory, releases."""
        return read_snapshot(self.root)

    def power_modes(self) -> dict[int, str]:
        """Names of the power modes, by number."""
        return read_power_modes(self.root)

    def architecture(self) -> str:
        """The processor's architecture, e.g. ``aarch64``."""
        return platform.machine()

    def in_container(self) -> bool:
        """Whether Docker or Podman left its mark here."""
        marks = (".dockerenv", "run/.containerenv")
        return any((self.root / mark).exists() for mark in marks)

    def unconfined(self) -> str | None:
        """Say why the child that reads strangers' templates could open files; None if it cannot."""
        limits = Limits(5.0, 256 << 20, confined=True)
        try:
            with LimitedChild("builtins:bytes", limits) as child:
                child.ask(b"")
        except (ResourceError, LimitError, ChildError) as error:
            return str(error) or f"it takes more than {limits}"
        return None

    def nodes(self) -> dict[str, Node]:
        """The GPU's device nodes that exist."""
        found = {}
        for name in JETSON_NODES + SLOT_NODES:
            path = self.root / name[1:]
            try:
                gid = path.stat().st_gid
            except OSError:
                continue
            found[name] = Node(may_open(path), _group_name(gid), gid)
        return found

    def user(self) -> str:
        """Name or number of this process's user."""
        return os.environ.get("USER") or str(os.getuid())

    def groups(self) -> frozenset[str]:
        """Names of the groups of this process."""
        return frozenset(_group_name(gid) for gid in {os.getegid(), *os.getgroups()})

    def cuda(self) -> CudaProbe:
        """Ask the driver, in a child process."""
        found, failure = _run_probe("cuda")
        return CudaProbe(failure=failure) if failure else msgspec.convert(found, CudaProbe)

    def tensorrt(self) -> Library:
        """Import TensorRT and build a tiny engine, in a child process."""
        return _library(*_run_probe("tensorrt"))

    def pycuda(self) -> Library:
        """Import PyCUDA and start the driver through it, in a child process."""
        return _library(*_run_probe("pycuda"))

    def cuda_bindings(self) -> Library:
        """Import cuda-bindings and start the driver through them, in a child process."""
        return _library(*_run_probe("cuda-bindings"))

    def onnxruntime_packages(self) -> list[tuple[str, str, str]]:
        """Name, version and directory of every installed ONNX Runtime, as Python finds them."""
        found = [
            (name, one.version, os.path.realpath(str(one.locate_file(""))))
            for one in metadata.distributions()
            # A broken installation may have no name.
            if (name := str(one.name)).lower().replace("_", "-") in _ONNXRUNTIMES
        ]
        return list(dict.fromkeys(found))  # a directory may be on the path under two names

    def schemes(self, widths: tuple[int, int] = WIDE) -> tuple[list[Verdict], str | None]:
        """Build an engine of one layer per scheme, in a child process.

        Args:
            widths: inputs and outputs of the INT4 layers, as for `scheme_probe.probe_schemes`.

        Returns:
            The verdicts, and why there are no more if the process failed on the way.
        """
        return _run_verdicts("edge_lab.doctor.probe", "schemes", *map(str, widths))

    def own_plugins(self, widths: tuple[int, int] = WIDE) -> tuple[list[Verdict], str | None]:
        """Build an engine of one plugin per kind of own plugins, in a child process.

        Args:
            widths: inputs and outputs of the layer.

        Returns:
            The verdicts and the failure, as `schemes` returns them.
        """
        return _run_verdicts(_PLUGIN_PROBE, *map(str, widths))

    def onnxruntime(self, provider: str) -> Library:
        """Import ONNX Runtime and run a tiny graph, in a child process."""
        return _library(*_run_probe("onnxruntime", provider))

    def clock(self) -> float:
        """The time in seconds, from a clock that never goes back."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait this many seconds."""
        time.sleep(seconds)


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:  # a group of the host, unknown in a container
        return str(gid)


def _run_probe(*arguments: str) -> tuple[dict[str, Any], str | None]:
    """Return the JSON of a probe, or why there is none."""
    output, lines, failure = _spawn_probe(*arguments)
    if failure is not None:
        return {}, failure
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    if "error" in found:
        # The library's own message says more: it names the library that could not be loaded.
        missing = [_NOT_LOADED.split(line)[1] for line in lines if _NOT_LOADED.search(line)]
        found["error"] += "".join(f"; {line}" for line in missing[-1:] or lines[-1:])
    return found, None


def _run_verdicts(module: str, *arguments: str) -> tuple[list[Verdict], str | None]:
    output, _, failure = _spawn_probe(*arguments, module=module)
    lines = output.splitlines(keepends=True)
    # A killed process leaves whole lines, and perhaps a part of one.
    whole = [line for line in lines if line.startswith("{") and line.endswith("\n")]
    return [msgspec.json.decode(line, type=Verdict) for line in whole], failure


def _spawn_probe(
    *arguments: str, module: str = "edge_lab.doctor.probe"
) -> tuple[str, list[str], str | None]:
    """Run a probe; return its output, the lines of its standard error, and why it failed, if so."""
    command = [sys.executable, "-m", module, *arguments]
    # Let the child find this package even if it is not installed.
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            timeout=_TIMEOUT_S,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        printed = (error.stdout or b"").decode(errors="replace")
        return printed, [], f"no answer within {_TIMEOUT_S:.0f} s"
    output = done.stdout.decode(errors="replace")
    if done.returncode < 0:
        return output, [], f"it crashed with {signal.Signals(-done.returncode).name}"
    printed = _ESCAPES.sub("", done.stderr.decode(errors="replace"))
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    if done.returncode != 0:
        return output, lines, lines[-1] if lines else f"exit code {done.returncode}"
    return output, lines, None


def _library(found: dict[str, Any], failure: str | None) -> Library:
    if failure is None:
        return msgspec.convert(found, Library)
    return Library(missing=failure.startswith("ModuleNotFoundError"), error=failure)
