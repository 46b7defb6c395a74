"""Reads how fast a device was measured: JSON of ``edge-llm bench``, or of ``scripts/gpu-check``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from edge.errors import ConfigError
from edge.files import MALFORMED, read_file

from .devices import find_module
from .plan import CPU, PlanDevice, find_device
from .speed import FITTED, Efficiency, Measured, Work, calibrate

BENCH_SCHEMA = 1
_MAX_BYTES = 1 << 24


class Center(msgspec.Struct, frozen=True):
    """Median of repeated measurements; the other keys in the file are for people."""

    median: float


class BenchDevice(msgspec.Struct, frozen=True):
    """The device that a benchmark ran on.

    Attributes:
        name: a module, ``cpu``, or None for another GPU, or one that a container hid.
        module: the board's own name; None if nothing tells it.
        l4t: its Jetson Linux; None if it is no Jetson.
        power_mode: the mode of the table that it was compared with, if it ran in that mode.
        nvpmodel: nvpmodel's name of its mode; older files and containers do not tell.
    """

    name: str | None
    power_mode: str | None
    bytes_per_s: float | None
    nvpmodel: str | None = None
    module: str | None = None
    l4t: str | None = None

    @property
    def mode(self) -> str | None:
        """The name of its power mode, if it is known."""
        return self.nvpmodel or self.power_mode


class BenchFile(msgspec.Struct, frozen=True):
    """The part of a benchmark's JSON that calibration and comparison read."""

    schema: int
    device: BenchDevice
    work: dict[str, Any]
    batch: int
    context: float
    prompt_tokens: int
    max_prefill: int
    tpot_s: Center
    prefill_s: Center


class Cell(msgspec.Struct, frozen=True):
    """A cell of the report's matrix, with the JSON that its command printed."""

    verdict: str
    result: msgspec.Raw = msgspec.Raw(b"null")


class GpuReport(msgspec.Struct, frozen=True):
    """The part of ``scripts/gpu-check``'s ``report.json`` that calibration reads: rows of cells."""

    matrix: dict[str, dict[str, Cell]]


def read_runs(path: Path) -> dict[str, BenchFile]:
    """Read a benchmark, or by name those that passed in a report of ``scripts/gpu-check``.

    Raises:
        ConfigError: it cannot be read, is no such file, or no benchmark in it has passed.
    """
    data = _read(path)
    try:
        report = msgspec.json.decode(data, type=GpuReport)
    except MALFORMED:
        return {path.name: _bench(data, f"{path}")}
    found = {
        f"{path.name} ({name})": _bench(cells["bench"].result, f"{path}, bench of {name},")
        for name, cells in report.matrix.items()
        if "bench" in cells and cells["bench"].verdict == "passed"
    }
    if not found:
        raise ConfigError(f"{path}: no benchmark in this report has passed; see its report.txt")
    return found


def _read(path: Path) -> bytes:
    try:
        return read_file(path, _MAX_BYTES)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def _bench(data: bytes | msgspec.Raw, where: str) -> BenchFile:
    try:
        found = msgspec.json.decode(data, type=BenchFile)
    except MALFORMED as error:
        raise ConfigError(
            f"{where} is not what edge-llm bench --json prints ({error}); run it again"
        ) from error
    if found.schema != BENCH_SCHEMA:
        raise ConfigError(
            f"{where} has schema {found.schema}, this edge-llm reads {BENCH_SCHEMA}; run "
            "edge-llm bench --json again"
        )
    return found


def calibrated(path: Path, device: str | None, mode: str | None) -> tuple[PlanDevice, Efficiency]:
    """Read a device, and the share of its figures that benchmarks reached there.

    Args:
        path: JSON of ``edge-llm bench``, or ``report.json`` of ``scripts/gpu-check``.
        device: the device that the user asked for; None is the benchmark's. Needed where that is
            not known.
        mode: the power mode that was asked for; None is the benchmark's. Needed where that is not
            known.

    Raises:
        ConfigError: no such file, or it was measured on another or an unknown device, or in
            another or an unknown mode.
    """
    benches = read_runs(path)
    place = next(iter(benches.values())).device
    if len({(bench.device.name, bench.device.mode) for bench in benches.values()}) > 1:
        raise ConfigError(
            f"--calibrate {path}: its benchmarks are of several devices or modes; give a report "
            "of one"
        )
    if place.name is None and (place.module is not None or place.l4t is None):
        where = place.module or "a GPU of no Jetson"
        raise ConfigError(
            f"--calibrate {path}: it was measured on {where}, which no table describes"
        )
    asked = None if device is None else find_device(device).name
    name = place.name or asked
    if name is None:
        raise ConfigError(
            f"--calibrate {path}: it does not say on which module it was measured, as in a "
            "container; give --device, if that is in the table"
        )
    if asked is not None and asked != name:
        raise ConfigError(f"--calibrate {path}: it was measured with --device {name}, not {device}")
    target = (
        find_device(CPU, cpu_bytes_per_s=place.bytes_per_s)
        if name == CPU
        else _module(path, name, place.mode, mode)
    )
    if target.mode is None:
        raise ConfigError(f"--calibrate {path}: it has no bandwidth; run edge-llm bench again")
    runs = [_measured(where, bench) for where, bench in benches.items()]
    return target, calibrate(target.mode, FITTED, runs, f"measured: {path.name}")


def _module(path: Path, name: str, mode: str | None, asked: str | None) -> PlanDevice:
    """Find the module in the mode it was measured in, or in ``asked`` if that is not known."""
    if mode is None and asked is None:
        raise ConfigError(
            f"--calibrate {path}: it does not say in which power mode it was measured, as in a "
            "container; give --power-mode"
        )
    module = find_module(name)
    if mode is not None and not any(known.is_called(mode) for known in module.modes):
        raise ConfigError(
            f"--calibrate {path}: it was measured in power mode {mode}, whose clocks are not known "
            f"for {name}; measure in one of {', '.join(known.name for known in module.modes)}"
        )
    target = find_device(name, mode or asked)
    if asked is not None and find_device(name, asked) != target:
        raise ConfigError(
            f"--calibrate {path}: it was measured with --power-mode {mode}, not {asked}"
        )
    return target


def _measured(where: str, bench: BenchFile) -> Measured:
    try:
        work = msgspec.convert(bench.work, Work)
    except MALFORMED as error:
        raise ConfigError(f"--calibrate {where}: its work does not fit: {error}") from error
    return Measured(
        work=work,
        batch=bench.batch,
        context=bench.context,
        tpot_s=bench.tpot_s.median,
        prompt_tokens=bench.prompt_tokens,
        max_prefill=bench.max_prefill,
        prefill_s=bench.prefill_s.median,
        where=where,
    )
