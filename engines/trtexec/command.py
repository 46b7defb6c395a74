"""Makes and runs the command of NVIDIA's ``trtexec`` that builds the same engine as our builder.

Order matters in one place: each ``--profile=N`` is followed directly by its ``--minShapes``,
``--optShapes`` and ``--maxShapes``. A name in a list may hold one ``*``, which stands for anything;
exact names win. So one entry serves the caches of all layers
(``matchStringWithOneWildcard`` and ``getOptimizationProfiles`` in ``samples/common`` of
github.com/NVIDIA/TensorRT, the same in 10.3, 10.16 and 11.1).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edge.backends.cuda.errors import is_out_of_memory
from edge.bundle import io_spec
from edge.bundle.manifest import ENGINES_DIR, Manifest
from edge.bundle.trust import open_manifest
from edge.bundle.verified_files import verify_files
from edge.errors import BackendError, ConfigError, DependencyError, EdgeError, ResourceError
from engines.build_plan import BuildPlan, plan_build
from engines.config import TIMINGS, BuildConfig
from engines.graph.adapt import write_graph
from engines.profiles import Profile, Shape
from engines.rules.table import Release

from .options import TRT_VERSIONS, show

_MIB = 1 << 20
# Where JetPack, the TensorRT packages and NVIDIA's containers install it; often not on the PATH.
_PLACES = ("/usr/src/tensorrt/bin", "/opt/tensorrt/bin", "/usr/bin")
_CACHE_PATTERN = f"{io_spec.PAST_PREFIX}*"
_ADAPTER = re.compile(r"^(adapters\.layers\.)\d+(\..*)$")
_DECOMPOSABLE_SINCE: Release = (10, 14)
_ALWAYS_STRONGLY_TYPED: Release = (11, 0)
_PLAN, _TIMING_CACHE = "engine.plan", "timing.cache"


def parse_version(text: str) -> Release:
    """Read the value of ``--trt``, one of the versions that Jetsons have.

    Raises:
        ConfigError: the text is none of these versions.
    """
    if text not in TRT_VERSIONS:
        raise ConfigError(f"--trt {text} is none of {', '.join(TRT_VERSIONS)}")
    return TRT_VERSIONS[text]


def trtexec_command(
    build: BuildPlan,
    version: Release,
    *,
    onnx: Path | None = None,
    plan: Path | None = None,
    timing_cache: Path | None = None,
    layers: Path | None = None,
    profiles: Sequence[Profile] | None = None,
) -> list[str]:
    """Make the ``trtexec`` command of a build.

    Args:
        build: the plan of the build.
        version: TensorRT's version, 10.0 or newer.
        onnx: the graph, with its weights beside it; the bundle's own by default. A capacity or
            ``kv_read`` that differs from the bundle's needs the graph from `write_graph` here.
        plan: file to write the engine to; ``engine.plan`` in the current directory by default.
        timing_cache: file of timings; the config's by default, else ``timing.cache`` beside
            ``plan``.
        layers: file to write the engine inspector's JSON of the layers to; None writes none.
        profiles: profiles for a graph that is not the decoder.

    Raises:
        ConfigError: the options contradict the version, or the capacity is not the bundle's and
            `onnx` is missing.
    """
    config, manifest = build.config, build.manifest
    _check_version(config, manifest, version)
    if onnx is None:
        if build.changes_graph:
            raise ConfigError(
                f"the graph in {config.bundle} is not the one for KV capacity "
                f"{build.shapes.capacity} and --kv-read {build.kv_read}; write that one first "
                "and give its path"
            )
        onnx = config.bundle / manifest.graphs.decoder
    plan = Path(_PLAN) if plan is None else plan
    timing_cache = timing_cache or config.timing_cache or plan.parent / _TIMING_CACHE

    line = ["trtexec", f"--onnx={onnx}", f"--saveEngine={plan}"]
    if version < _ALWAYS_STRONGLY_TYPED:
        line.append("--stronglyTyped")
    for index, profile in enumerate(build.profiles if profiles is None else profiles):
        ranges = profile.inputs.items()
        line += [
            f"--profile={index}",
            "--minShapes=" + _shapes((name, shape.min) for name, shape in ranges),
            "--optShapes=" + _shapes((name, shape.opt) for name, shape in ranges),
            "--maxShapes=" + _shapes((name, shape.max) for name, shape in ranges),
        ]
    line += [
        f"--memPoolSize=workspace:{_pool_size(config.workspace_bytes)}",
        f"--builderOptimizationLevel={config.opt_level}",
        f"--avgTiming={TIMINGS}",
        "--profilingVerbosity=detailed",
        f"--timingCacheFile={timing_cache}",
    ]
    if layers is not None:
        line.append(f"--exportLayerInfo={layers}")
    if profiles is None and manifest.dialect == "native" and version >= _DECOMPOSABLE_SINCE:
        line.append("--decomposableAttentions=*")
    return [*line, "--skipInference"]


def format_command(line: Sequence[str]) -> str:
    """Quote a command for a shell, one option per row; a profile's shapes stay with it."""
    return " \\\n  ".join(shlex.quote(part) for part in line)


@dataclass(frozen=True)
class TrtexecResult:
    """The report of a run of ``trtexec``.

    Attributes:
        seconds: wall time of the whole run.
        version: TensorRT's version as ``trtexec`` names it (``10.16.1``); None if it does not.
        build_s: seconds that it took to build the engine.
        peak_host_bytes: peak host memory of the build (not every version reports it).
    """

    seconds: float
    version: str | None = None
    build_s: float | None = None
    peak_host_bytes: int | None = None


def find_trtexec(places: Sequence[str] = _PLACES) -> Path:
    """Find the binary, on the PATH or where NVIDIA's packages put it.

    Raises:
        DependencyError: it is in none of these places.
    """
    found = shutil.which("trtexec") or shutil.which("trtexec", path=os.pathsep.join(places))
    if found is None:
        raise DependencyError(
            f"trtexec is neither on the PATH nor in {', '.join(places)}; on a Jetson install it "
            "with: sudo apt install tensorrt (JetPack 6: libnvinfer-bin), or build with the Python "
            "API: edge-llm build without --with trtexec; --print-trtexec --trt VERSION needs none"
        )
    return Path(found)


def trtexec_version(binary: Path) -> Release:
    """Ask a ``trtexec`` for its release (`full_version`)."""
    major, minor = full_version(binary).split(".")[:2]
    return int(major), int(minor)


def full_version(binary: Path) -> str:
    """Ask a ``trtexec`` for its version, e.g. ``10.16.1``; needs no GPU.

    Raises:
        BackendError: it does not run, or does not name its version.
    """
    try:
        answer = subprocess.run(
            [binary, "--help"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=60,
            check=False,
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendError(f"{binary} --help does not run: {error}") from error
    log = _Log()
    for line in answer.splitlines():
        log.read(line)
    if log.version is None:
        first = next(iter(answer.splitlines()), "nothing")
        raise BackendError(
            f"{binary} does not name its TensorRT version; it said: {first}; "
            "give the version with --trt"
        )
    return log.version


class CrashError(BackendError):
    """``trtexec`` died from a signal."""


def run_trtexec(argv: Sequence[str], on_line: Callable[[str], None]) -> TrtexecResult:
    """Run a ``trtexec`` command to its end.

    Args:
        argv: the command; if it starts with plain ``trtexec``, `find_trtexec` finds the binary.
        on_line: called with each line of the output as it comes. If it raises, or the caller is
            interrupted, ``trtexec`` is stopped.

    Raises:
        DependencyError: there is no ``trtexec``.
        ResourceError: it ran out of memory, or was killed.
        CrashError: it died from another signal.
        BackendError: it failed otherwise; the message has its error lines and what to do.
    """
    binary = find_trtexec() if argv[0] == "trtexec" else Path(argv[0])
    log = _Log()
    start = time.perf_counter()
    try:
        process = subprocess.Popen(
            [str(binary), *argv[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise DependencyError(f"{binary} does not run: {error.strerror}") from error
    try:
        assert process.stdout is not None
        for raw in process.stdout:
            line = raw.rstrip()
            log.read(line)
            on_line(line)
        code = process.wait()
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    if code != 0 or not log.passed:
        raise _failure(code, log)
    seconds = time.perf_counter() - start
    return TrtexecResult(seconds, log.version, log.build_s, log.peak_host_bytes)


def _check_version(config: BuildConfig, manifest: Manifest, version: Release) -> None:
    if version < (10, 0):
        raise ConfigError(
            f"TensorRT {show(version)} cannot build this engine: strongly typed networks start "
            "with 10.0 (JetPack 6.1)"
        )
    needed = io_spec.DIALECTS["native"].min_tensorrt
    if manifest.dialect == "native" and version < needed:
        raise ConfigError(
            f"dialect native needs TensorRT {show(needed)}, asked for is {show(version)}; "
            "export again with --dialect portable"
        )
    for option, given in (
        (f"--kernels {config.kernels}", config.kernels != "tensorrt"),
        (f"--plugins {config.plugins}", config.plugins != "auto"),
        ("--tune", config.tune),
        ("--kv-read auto", config.kv_read == "auto"),
        (f"--attention {config.attention}", config.attention != "auto"),
    ):
        if not given:
            continue
        raise ConfigError(
            f"{option} needs the Python API, which trtexec does not go through; build with it, or "
            "leave the option out"
        )
    if config.kv_read == "lengths":
        raise ConfigError(
            "--kv-read lengths changes the network after it is parsed, which trtexec cannot; "
            "build with the Python API, or choose --kv-read slice"
        )


def _shapes(shapes: Iterable[tuple[str, Shape]]) -> str:
    """Format ``name:1x2x3,...`` with one entry for inputs of the same shape in all layers."""
    entries: dict[str, str] = {}
    for name, shape in shapes:
        pattern = _CACHE_PATTERN if name.startswith(_CACHE_PATTERN[:-1]) else name
        pattern = _ADAPTER.sub(r"\1*\2", pattern)
        text = "x".join(map(str, shape))
        assert entries.setdefault(pattern, text) == text
    return ",".join(f"{name}:{text}" for name, text in entries.items())


def _pool_size(num_bytes: int) -> str:
    mib, rest = divmod(num_bytes, _MIB)
    return f"{num_bytes}B" if rest else f"{mib}M"


_ERROR = re.compile(r"^(?:\[[0-9/]+-[0-9:]+\] )?\[E\] (?:\[TRT\] )?")
_BANNER = re.compile(r"^&&&& (RUNNING|PASSED|FAILED) TensorRT\.trtexec(?: \[TensorRT v(\d+)\])?")
_VERSION = re.compile(r"TensorRT version: (\d+\.\d+\.\d+)")
_BUILT = re.compile(r"Engine built in ([0-9.]+(?:e[+-]?[0-9]+)?) sec")
_HOST_PEAK = re.compile(
    r"Peak memory usage during Engine building and serialization: CPU: (\d+) MiB"
)
_MAX_SHOWN = 8


@dataclass
class _Log:
    """Reads the output of ``trtexec`` line by line."""

    version: str | None = None
    passed: bool = False
    errors: list[str] = field(default_factory=list)
    last: deque[str] = field(default_factory=lambda: deque(maxlen=_MAX_SHOWN))
    build_s: float | None = None
    peak_host_bytes: int | None = None

    def read(self, line: str) -> None:
        if line.strip():
            self.last.append(line)
        if banner := _BANNER.match(line):
            self.passed = banner[1] == "PASSED"
            if banner[2] and self.version is None:
                self.version = _decode_version(int(banner[2]))
            return
        if (error := _ERROR.match(line)) and (text := line[error.end() :]):
            self.errors.append(text)
        if version := _VERSION.search(line):
            self.version = version[1]
        if built := _BUILT.search(line):
            self.build_s = float(built[1])
        if peak := _HOST_PEAK.search(line):
            self.peak_host_bytes = int(peak[1]) * _MIB


def _decode_version(number: int) -> str:
    """Decode ``NV_TENSORRT_VERSION``: 8601 is 8.6.1; from 10 on 101600 is 10.16.0."""
    base = 1000 if number < 10000 else 10000
    return f"{number // base}.{number % base // 100}.{number % 100}"


def _failure(code: int, log: _Log) -> EdgeError:
    """Make the error of a run that failed."""
    shown = log.errors or list(log.last)
    details = "".join(f"\n  {text}" for text in shown[:_MAX_SHOWN])
    if len(shown) > _MAX_SHOWN:
        details += f"\n  and {len(shown) - _MAX_SHOWN} more"
    text = "\n".join(shown)
    less = (
        "build with less: --workspace 512MiB, --max-prefill 256, --kv-capacity 2048; close other "
        "programs or add swap"
    )
    if code == -signal.SIGKILL:
        return ResourceError(f"trtexec was killed, most likely for want of memory; {less}{details}")
    if is_out_of_memory(text):
        return ResourceError(f"trtexec ran out of memory; {less}{details}")
    kind = BackendError
    if code < 0:
        kind, what = CrashError, f"trtexec died from {signal.Signals(-code).name}"
    elif code == 0:
        what = "trtexec ended without saying PASSED"
    else:
        what = f"trtexec failed with exit code {code}"
    return kind(f"{what}; {_advice(text, log.version)}{details}")


def _advice(text: str, version: str | None) -> str:
    if "Unknown option" in text:
        own = f"TensorRT {version}" if version else "another TensorRT"
        return (
            f"it belongs to {own}, so give that version with --trt (edge-llm trtexec-explain says "
            "more)"
        )
    if "Cannot find input tensor" in text:
        return "the graph is not the one that the line was made for; export the bundle again"
    if re.search(
        r"Failed to open file|could not open|No such file|weights? .*file", text, re.IGNORECASE
    ):
        return "a file is missing; the weights (.onnx.data) must be beside the .onnx"
    if re.search(r"no importer|UNSUPPORTED_NODE|Plugin not found|opset", text, re.IGNORECASE):
        return (
            "this TensorRT's parser lacks an operator of the graph; TensorRT before 10.15 needs a "
            "bundle exported with --dialect portable"
        )
    if re.search(r"no CUDA-capable device|Cuda failure: 100\b|libcuda", text, re.IGNORECASE):
        return "no GPU was found; in a container start it with --runtime nvidia"
    return "what it reported:"


def command_for_bundle(config: BuildConfig, version: Release) -> list[str]:
    """Make the command of ``--print-trtexec``, ready to run.

    If capacity or ``kv_read`` differ from the bundle's, the graph is first written into a folder
    ``trtexec-...`` among the bundle's engines.

    Raises:
        BundleError: there is no bundle, or its graph is damaged.
        ConfigError: the options do not fit `trtexec_command` or `plan_build`.
    """
    manifest = open_manifest(config.bundle)
    _check_version(config, manifest, version)
    build = plan_build(config, manifest)
    if not build.changes_graph:
        return trtexec_command(build, version)
    verify_files(config.bundle, manifest, [manifest.graphs.decoder])
    name = f"trtexec-kv{build.shapes.capacity}-{config.kv_read}"
    if build.shapes.best_logits:
        name += f"-best{build.shapes.best_logits}"
    onnx = write_graph(build, config.bundle / ENGINES_DIR / name)
    return trtexec_command(build, version, onnx=onnx)
