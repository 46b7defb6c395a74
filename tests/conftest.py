"""Fixtures for every test: tiny models, no network, and skips for absent devices."""

from __future__ import annotations

import fcntl
import functools
import ipaddress
import itertools
import logging
import mmap
import os
import platform
import re
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from edge.backends.ort.session import onnxruntime_version
from edge.bundle.engine_records import RECORDS_VARIABLE
from edge.bundle.io_spec import needed_onnxruntime
from edge.bundle.manifest import Dialect
from edge.device.huge_pages import HUGE_PAGE_BYTES, MADV_COLLAPSE
from edge.device.nodes import GPU_NODES, find_gpu_node
from edge.model.spec import Task
from edge_serve.observe.logs import CONFIGURED
from tests import second_try, selection, skips
from tests.makers.manifests import replace_file
from tests.makers.tiny_models import Kind, write_checkpoint
from tests.makers.tiny_pooling import write_embedder, write_judge
from tests.second_try import pytest_runtest_protocol  # noqa: F401  a hook of pytest
from tests.selection import pytest_addoption  # noqa: F401
from tools.models.smollm2 import smollm2_gguf

# Programs that a test starts buffer what they print, as with most users; a container may say no.
os.environ.pop("PYTHONUNBUFFERED", None)


@pytest.fixture(scope="session", autouse=True)
def engine_records(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Records of engines go here, and not to the machine's own."""
    with pytest.MonkeyPatch.context() as patch:
        directory = tmp_path_factory.mktemp("engine-records")
        patch.setenv(RECORDS_VARIABLE, str(directory))
        yield directory


class FirstTest:
    """Says how long a user of ``scripts/test`` waited for the first test."""

    def __init__(self, started_s: int) -> None:
        self._started_s = started_s
        self._waited_s: float | None = None

    def pytest_runtest_logstart(self) -> None:
        if self._waited_s is None:
            self._waited_s = time.time() - self._started_s

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._waited_s is not None:
            terminalreporter.write_line(f"first test after {self._waited_s:.0f} s")


def pytest_configure(config: pytest.Config) -> None:
    skips.pytest_configure(config)
    second_try.pytest_configure(config)
    if not config.pluginmanager.is_registered(selection):
        config.pluginmanager.register(selection)
    started_s = os.environ.get("EDGE_LLM_TEST_STARTED_S")
    if started_s is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(FirstTest(int(started_s)))


def _runs(dialect: Dialect, *, int8_cache: bool = False) -> bool:
    try:
        import onnxruntime
    except ImportError:
        return True  # nothing runs a bundle, so any will do
    needed = needed_onnxruntime(dialect, int8_cache=int8_cache)
    return onnxruntime_version(onnxruntime) >= needed


RUNNABLE: Dialect = "native" if _runs("native") else "portable"
"""The dialect of a bundle that the installed ONNX Runtime is to run, where either will do."""


class Checkpoints(Protocol):
    def __call__(self, kind: Kind) -> Path: ...


class Bundles(Protocol):
    def __call__(
        self, kind: Kind, dialect: str = RUNNABLE, quant: str = "fp16", kv_cache: str = "float"
    ) -> Path: ...


TINY_KV_CAPACITY = 128
FEW_TOKENS = 512
"""To calibrate with, where what a test looks at does not depend on it: the default is thousands."""
FILL_MARKS = {
    "<think>": "<|fim_prefix|>",
    "</think>": "<|fim_suffix|>",
    "<|EOT|>": "<|fim_middle|>",
    "<｜User｜>": "<|file_sep|>",
}
"""Control tokens of the tiny models, and what `code_bundle` calls them."""

# How long an example takes is the machine's load, not the code.
settings.register_profile("load", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("load")


def write_secret(path: Path, text: str) -> Path:
    """Write a file that only its owner can read, as a file of API keys must be."""
    path.touch(mode=0o600)
    path.write_text(text)
    path.chmod(0o600)
    return path


def require_kernels(dialect: str) -> None:
    """Skip where ONNX Runtime cannot run a dialect: the newest one for Python 3.10 is 1.23."""
    if dialect == "native" and RUNNABLE != "native":
        pytest.skip("needs ONNX Runtime >= 1.26 for dialect native")


def require_even_rows() -> None:
    """Skip where deterministic answers cannot be had; a test holds that they are refused there."""
    require_kernels("native")
    if platform.machine() != "x86_64":
        pytest.skip("deterministic answers hold on x86-64 only")


def require_int8_cache(dialect: str) -> None:
    """Skip where ONNX Runtime cannot run a dialect with an 8-bit cache."""
    require_kernels(dialect)
    if dialect == "native" and not _runs("native", int8_cache=True):
        pytest.skip("needs ONNX Runtime >= 1.28 for an 8-bit cache in dialect native")


def require_huge_pages() -> None:
    """Skip where the kernel makes no huge pages of small ones."""
    block = mmap.mmap(-1, 2 * HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block[:] = b"x" * len(block)
    block_address = np.frombuffer(block, np.uint8, 1).ctypes.data
    first = -block_address % HUGE_PAGE_BYTES
    try:
        block.madvise(MADV_COLLAPSE, first, HUGE_PAGE_BYTES)
    except OSError:
        pytest.skip("this kernel gives no huge pages")
    # qemu says yes to the advice and does nothing.
    address, inside = block_address + first, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= address < int(match[2], 16)
        elif inside and line.startswith("AnonHugePages:") and int(line.split()[1]):
            return
    pytest.skip("this kernel gives no huge pages")


@pytest.fixture(autouse=True)
def _restored_logger() -> Iterator[None]:
    """A server configures these loggers, which would then hide records from later tests."""
    loggers = [logging.getLogger(name) for name in CONFIGURED]
    before = [(list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate


@pytest.fixture(autouse=True)
def _restored_signals() -> Iterator[None]:
    """``serve`` blocks signals until it has handlers, and children would inherit that."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Makes a tiny checkpoint directory, once per kind; treat it as read-only."""
    root = tmp_path_factory.mktemp("checkpoints")

    @functools.cache
    def make(kind: Kind) -> Path:
        return write_checkpoint(root / kind, kind)

    return make


@pytest.fixture(scope="session")
def tiny_bundles(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_checkpoints: Checkpoints,
) -> Bundles:
    """Exports a tiny bundle, once per kind, dialect and scheme; treat it as read-only."""
    # Not at the top: the runtime's own tests run where the exporter is not installed.
    from export.pipeline import ExportConfig, export_checkpoint

    root = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        root = root.parent  # which all workers share
    root = root / "bundles"
    root.mkdir(exist_ok=True)

    @functools.cache
    def export(kind: Kind, dialect: Any, quant: Any, kv_cache: Any) -> Path:
        output = root / f"{kind}-{dialect}-{quant}-{kv_cache}"
        config = ExportConfig(
            source=str(tiny_checkpoints(kind)),
            output=output,
            quant=quant,
            group_size=None if quant in ("fp16", "bf16") else 32,
            rotate=False if quant == "int8" else None,  # tests read the checkpoint's own weights
            method="rtn" if quant == "int4" else None,
            calibration_tokens=FEW_TOKENS if quant == "int8-w8a8" else None,
            dialect=dialect,
            kv_cache=kv_cache,
            kv_capacity=TINY_KV_CAPACITY,
        )
        with output.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may be at it
            if not output.exists():
                export_checkpoint(config)
        return output

    def bundle(
        kind: Kind, dialect: str = RUNNABLE, quant: str = "fp16", kv_cache: str = "float"
    ) -> Path:
        return export(kind, dialect, quant, kv_cache)

    return bundle


class PoolingBundles(Protocol):
    def __call__(self, task: Task, dialect: str = RUNNABLE, quant: str = "fp16") -> Path: ...


@pytest.fixture(scope="session")
def pooling_bundles(tmp_path_factory: pytest.TempPathFactory) -> PoolingBundles:
    """Exports a tiny bundle that embeds or judges, once per kind; treat it as read-only."""
    from export.pipeline import ExportConfig, export_checkpoint

    root = tmp_path_factory.mktemp("pooling")

    @functools.cache
    def export(task: Any, dialect: Any, quant: Any) -> Path:
        source = root / task
        if not source.exists():
            (write_embedder if task == "embed" else write_judge)(source)
        output = root / f"{task}-{dialect}-{quant}"
        export_checkpoint(
            ExportConfig(
                source=str(source),
                output=output,
                quant=quant,
                method="rtn" if quant == "int4" else None,
                dialect=dialect,
                kv_capacity=250,  # a judge's prompt has 200 bytes of its own
                task=None if task == "embed" else task,  # one is recognised
            )
        )
        return output

    def bundle(task: Task, dialect: str = RUNNABLE, quant: str = "fp16") -> Path:
        return export(task, dialect, quant)

    return bundle


@pytest.fixture(scope="session")
def code_bundle(tiny_bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with Qwen2.5-Coder's marks in place of R1's; treat it as read-only."""
    bundle = tmp_path_factory.mktemp("code") / "tiny"
    shutil.copytree(tiny_bundles("qwen2"), bundle)
    tokenizer = (bundle / "tokenizer.json").read_text("utf-8")
    for old, new in FILL_MARKS.items():
        tokenizer = tokenizer.replace(f'"{old}"', f'"{new}"')
    replace_file(bundle, "tokenizer.json", tokenizer.encode())
    return bundle


@pytest.fixture(scope="session")
def smollm2_bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """SmolLM2-135M exported to fp16 from the GGUF file; skips where the package is missing."""
    from export.pipeline import ExportConfig, export_checkpoint

    try:
        source = smollm2_gguf()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    output = tmp_path_factory.mktemp("smollm2") / "bundle"
    export_checkpoint(
        ExportConfig(
            source=str(source), output=output, quant="fp16", dialect=RUNNABLE, kv_capacity=1024
        )
    )
    yield output
    shutil.rmtree(output)  # 300 MB, and pytest keeps the folders of three runs


SMOLLM2_LAYERS = 6
"""Of SmolLM2's 30, whose shapes are the same."""


@pytest.fixture(scope="session")
def short_smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A GGUF file of SmolLM2's first layers; skips where the package is missing."""
    from lab.peers.gguf_rivals import rewrite

    def of_first_layers(tensor: Any) -> tuple[Any, Any] | None:
        layer = re.match(r"blk\.(\d+)\.", tensor.name)
        kept = layer is None or int(layer[1]) < SMOLLM2_LAYERS
        return (tensor.data, tensor.tensor_type) if kept else None

    try:
        source = smollm2_gguf()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    output = tmp_path_factory.mktemp("smollm2") / "short.gguf"
    rewrite(source, output, of_first_layers, {"llama.block_count": SMOLLM2_LAYERS})
    yield output
    output.unlink()


@pytest.fixture
def slow_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every step of a verb seem long: 11 seconds go by whenever its progress asks."""
    seconds = itertools.count(0, 11)
    monkeypatch.setattr("edge_lab.cli.progress._clock", lambda: float(next(seconds)))


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the home away, as from a user of a container whom the system does not know."""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", home)


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    """A test that needs the network is a test that fails on the train: only loopback is open."""

    def guard(connect: Any) -> Any:
        @functools.wraps(connect)
        def guarded(self: socket.socket, address: Any) -> Any:
            if self.family != socket.AF_UNIX and not _is_loopback(address[0]):
                raise RuntimeError(f"a test tried to reach {address[0]} over the network")
            return connect(self, address)

        return guarded

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, guard(getattr(socket.socket, name)))
        yield


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def pytest_itemcollected(item: pytest.Item) -> None:
    """Keep what needs SmolLM2 on one worker, which exports it once."""
    if {"smollm2_bundle", "short_smollm2"} & set(getattr(item, "fixturenames", ())):
        item.add_marker(pytest.mark.xdist_group("smollm2"))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse a pytest whose ids hide groups from pytest-xdist: their tests would be scattered."""
    if not getattr(config.option, "loadgroup", False):
        return
    for item in items:
        if item.get_closest_marker("xdist_group") and "@" not in item.nodeid.rpartition("]")[2]:
            raise pytest.UsageError(
                f"pytest {pytest.__version__} and this pytest-xdist do not keep the group of "
                f"{item.nodeid} together; install the versions of requirements/dev.txt"
            )


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a device that is not here."""
    if item.get_closest_marker("jetson") and not _device_model().startswith("NVIDIA Jetson"):
        pytest.skip("no Jetson here (/proc/device-tree/model does not name one)")
    if item.get_closest_marker("gpu") and find_gpu_node() is None:
        pytest.skip(f"no NVIDIA GPU here ({', '.join(GPU_NODES[:3])} and the like are missing)")


@functools.cache
def _device_model() -> str:
    path = Path("/proc/device-tree/model")
    return path.read_text(encoding="utf-8").rstrip("\0") if path.is_file() else ""
