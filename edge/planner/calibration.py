"""The JSON of ``edge-llm bench`` as a measurement of a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from edge.errors import ConfigError
from edge.files import read_file

from .plan import CPU, Device, find_device
from .speed import FITTED, Efficiency, Measured, Work, calibrate

BENCH_SCHEMA = 1
_MAX_BYTES = 1 << 24


class Center(msgspec.Struct, frozen=True):
    """The middle of repeated measurements; other keys are for people."""

    median: float


class BenchDevice(msgspec.Struct, frozen=True):
    """Where the benchmark ran; ``name`` is a module, ``cpu``, or None for another GPU."""

    name: str | None
    power_mode: str | None
    bytes_per_s: float | None


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


def read_bench(path: Path) -> BenchFile:
    """Read what ``edge-llm bench --json`` printed.

    Raises:
        ConfigError: it cannot be read, or is no such file.
    """
    try:
        found = msgspec.json.decode(read_file(path, _MAX_BYTES), type=BenchFile)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not what edge-llm bench --json prints ({error}); run it again"
        ) from error
    if found.schema != BENCH_SCHEMA:
        raise ConfigError(
            f"{path} has schema {found.schema}, this edge-llm reads {BENCH_SCHEMA}; run "
            "edge-llm bench --json again"
        )
    return found


def calibrated(path: Path, device: str | None, power_mode: str | None) -> tuple[Device, Efficiency]:
    """Read a device, and the share of its figures that a benchmark reached there.

    Args:
        path: JSON of ``edge-llm bench``.
        device: what the user asked for; None is the benchmark's.
        power_mode: what the user asked for; None is the benchmark's.

    Raises:
        ConfigError: no such file, or it was measured on another device or in another mode.
    """
    bench = read_bench(path)
    name = bench.device.name
    if name is None:
        raise ConfigError(
            f"--calibrate {path}: it was measured on a device that no table describes"
        )
    for option, asked, found in (
        ("--device", device, name),
        ("--power-mode", power_mode, bench.device.power_mode),
    ):
        if asked is not None and found is not None and asked.lower() != found.lower():
            raise ConfigError(
                f"--calibrate {path}: it was measured with {option} {found}, not {asked}"
            )
    target = (
        find_device(CPU, cpu_bytes_per_s=bench.device.bytes_per_s)
        if name == CPU
        else find_device(name, power_mode or bench.device.power_mode)
    )
    if target.mode is None:
        raise ConfigError(f"--calibrate {path}: it has no bandwidth; run edge-llm bench again")
    try:
        work = msgspec.convert(bench.work, Work)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"--calibrate {path}: its work does not fit: {error}") from error
    measured = Measured(
        batch=bench.batch,
        context=bench.context,
        tpot_s=bench.tpot_s.median,
        prompt_tokens=bench.prompt_tokens,
        max_prefill=bench.max_prefill,
        prefill_s=bench.prefill_s.median,
        where=path.name,
    )
    return target, calibrate(work, target.mode, FITTED, measured)
