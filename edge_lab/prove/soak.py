"""Runs many random prompts in one process, and tells whether memory grows with them.

``python -m edge_lab.prove.soak BUNDLE`` opens a bundle once and answers prompts of random lengths
one after the other. After each it reads the free bytes of ``cuMemGetInfo``, the kernel's
``MemAvailable``, and the process's resident memory. It prints one JSON line, and exits with 3 if
memory grows.

Growth is the slope of the bytes in use over the prompts, by Theil and Sen: the median of the slopes
of all pairs, which a few outliers do not bend. It is computed for both halves of the prompts, and
the lesser one counts: a leak goes on, while a program that starts makes one step. The first
prompts, which fill caches, are left out. On a Jetson GPU and CPU share the memory, and the driver
counts the page cache as used, so there the kernel's figure decides. Both also see other programs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edge.backends import Backend
from edge.backends.step import prefill, step_after
from edge.bundle.embeddings import EmbeddingTable
from edge.cli import to_json
from edge.device.memory import read_mem_available_bytes
from edge.errors import EXIT_GATE_MISSED, EdgeError
from edge_lab.telemetry import EnergyMeter, read_power_watts, read_snapshot
from edge_make.resident_memory import read_rss_bytes

PROMPTS, ANSWER_TOKENS = 500, 16
LEAST_PROMPTS = 100
"""Fewest prompts for a verdict."""
_WARM = 0.2
_METER_S = 0.2
_MOST_TOKENS = 1024
_KEPT = 50
MAX_GROWTH_BYTES = 64 << 10
"""Most growth per prompt. A plugin that leaks its module with each shape loses 3 MB per prompt."""


@dataclass
class Memory:
    """Bytes after each prompt; None if they could not be read.

    Attributes:
        device_free: free bytes by ``cuMemGetInfo``.
        available: ``MemAvailable`` of the kernel.
        rss: resident memory of this process.
    """

    device_free: list[int | None] = field(default_factory=list)
    available: list[int | None] = field(default_factory=list)
    rss: list[int | None] = field(default_factory=list)


@dataclass(frozen=True)
class Growth:
    """How memory changed over the prompts that count.

    Attributes:
        source: the bytes that decide: ``device_free``, ``available`` or ``rss``.
        bytes_per_prompt: the lesser slope of both halves; above 0 if memory is lost.
        prompts: number of prompts that counted.
        grows: whether it is more than `MAX_GROWTH_BYTES`; None if too few prompts counted.
    """

    source: str
    bytes_per_prompt: float
    prompts: int
    grows: bool | None


def judge(memory: Memory, *, integrated: bool) -> Growth:
    """Tell whether memory grows with the prompts.

    Args:
        memory: the bytes after each prompt.
        integrated: whether CPU and GPU share the memory, or there is no GPU.
    """
    source, sign = "rss", 1
    if memory.device_free and memory.device_free[0] is not None:
        source, sign = ("available" if integrated else "device_free"), -1
    used = [None if value is None else sign * value for value in getattr(memory, source)]
    counted = [value for value in used[int(len(used) * _WARM) :] if value is not None]
    half = len(counted) // 2
    slope = min(theil_sen(counted[:half]), theil_sen(counted[half:]))
    enough = len(used) >= LEAST_PROMPTS and len(counted) > 1
    return Growth(source, slope, len(counted), slope > MAX_GROWTH_BYTES if enough else None)


def theil_sen(values: Sequence[float]) -> float:
    """Compute the median slope of all pairs of a series; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    array = np.asarray(values, dtype=np.float64)
    first, second = np.triu_indices(len(array), k=1)
    return float(np.median((array[second] - array[first]) / (second - first)))


def soak(
    backend: Backend,
    table: EmbeddingTable,
    vocab_size: int,
    *,
    prompts: int,
    seconds: float,
    most_tokens: int,
    read_device_free: Callable[[], int | None],
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Memory, dict[str, Any]]:
    """Answer random prompts greedily, and read the memory after each.

    Args:
        backend: the engine; its first slot is used.
        table: the bundle's token table.
        vocab_size: tokens to draw prompts from.
        prompts: most prompts to answer.
        seconds: time after which no prompt begins.
        most_tokens: most tokens of a prompt.
        read_device_free: reads the free bytes of the GPU; None where there is none.
        clock: gives the time in seconds.

    Returns:
        The memory, and a summary: prompts, tokens, seconds, and the clocks that were seen.
    """
    random = np.random.default_rng(0)
    most = max(1, min(most_tokens, backend.capacity - ANSWER_TOKENS))
    lengths = random.integers(1, most + 1, prompts)
    memory, clocks_hz, throttled = Memory(), set[int](), False
    started, first = clock(), np.zeros((1, 1), dtype=np.int64)
    prefilled = decoded = 0
    for length in lengths.tolist():
        if clock() - started > seconds:
            break
        ids = random.integers(0, vocab_size, length)
        [(_, logits)] = deque(prefill(backend, table, ids), maxlen=1)
        for past in range(length, length + ANSWER_TOKENS):
            token = int(logits[0].argmax())
            step = step_after([0], [past], table[np.array([[token]])], first)
            logits = backend.forward(step)[0]
        prefilled, decoded = prefilled + length, decoded + ANSWER_TOKENS
        memory.device_free.append(read_device_free())
        memory.available.append(read_mem_available_bytes(Path("/")))
        memory.rss.append(read_rss_bytes())
        if len(memory.rss) % 10 == 1:
            snapshot = read_snapshot()
            throttled |= bool(snapshot.throttled)
            if snapshot.gpu_clock_hz is not None:
                clocks_hz.add(snapshot.gpu_clock_hz)
    return memory, {
        "prompts": len(memory.rss),
        "prompt_tokens": prefilled,
        "answer_tokens": decoded,
        "seconds": clock() - started,
        "gpu_clock_hz": [min(clocks_hz), max(clocks_hz)] if clocks_hz else None,
        "throttled": throttled,
    }


def run(bundle: Path, backend_name: str, prompts: int, seconds: float, most: int) -> dict[str, Any]:
    """Open a bundle and soak it; return the JSON to print.

    Raises:
        EdgeError: the bundle or its engine cannot be opened, or failed.
    """
    from edge.backends.choose import open_backend
    from edge.bundle.embeddings import EMBEDDINGS_NAME
    from edge.bundle.trust import open_manifest
    from edge.bundle.verified_files import verify_files
    from edge.engine_config import EngineConfig

    manifest = open_manifest(bundle)
    verify_files(bundle, manifest)
    config = EngineConfig(backend=backend_name, num_slots=1)  # type: ignore[arg-type]
    with ExitStack() as stack:
        backend = stack.enter_context(closing(open_backend(bundle, manifest, config)))
        table = stack.enter_context(closing(EmbeddingTable(bundle / EMBEDDINGS_NAME)))
        read_device_free, integrated = _device_reader(backend.name)
        meters = {name: EnergyMeter(_rail_reader(name), _METER_S) for name in read_power_watts()}
        for meter in meters.values():
            stack.enter_context(meter)
        memory, done = soak(
            backend,
            table,
            manifest.model.vocab_size,
            prompts=prompts,
            seconds=seconds,
            most_tokens=most,
            read_device_free=read_device_free,
        )
    growth = judge(memory, integrated=integrated)
    thin = max(1, len(memory.rss) // _KEPT)
    return {
        "backend": backend.name,
        **done,
        "growth": asdict(growth),
        "joules": {name: meter.joules for name, meter in meters.items()},
        "bytes": {name: values[::thin] for name, values in asdict(memory).items()},
    }


def _rail_reader(name: str) -> Callable[[], float | None]:
    return lambda: read_power_watts().get(name)


def _device_reader(backend_name: str) -> tuple[Callable[[], int | None], bool]:
    """Make a reader of the GPU's free bytes, and tell whether they are the system's."""
    if backend_name == "ort-cpu":
        return lambda: None, True
    from edge.backends.cuda import Device

    device = Device()

    def read() -> int:
        with device.active():
            free, _ = device.call("ask for free memory", device.driver.mem_get_info)
        return int(free)

    return read, device.integrated


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as the module's docstring says; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m edge_lab.prove.soak")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--most-tokens", type=int, default=_MOST_TOKENS)
    given = parser.parse_args(arguments)
    try:
        found = run(given.bundle, given.backend, given.prompts, given.seconds, given.most_tokens)
    except EdgeError as error:
        sys.stderr.write(f"soak: error: {error}\n")
        return error.exit_code
    sys.stdout.write(to_json(found) + "\n")
    growth = found["growth"]
    if growth["grows"] is None:
        sys.stderr.write(
            f"soak: error: {found['prompts']} prompts in {found['seconds']:.0f} s are too few for "
            f"a verdict, which takes {LEAST_PROMPTS}\n"
        )
    elif growth["grows"]:
        sys.stderr.write(
            f"soak: error: memory grows by {growth['bytes_per_prompt'] / 1e3:,.0f} kB per prompt "
            f"({growth['source']}); stop other programs and try again to be sure that it is ours\n"
        )
    return 0 if growth["grows"] is False else EXIT_GATE_MISSED


if __name__ == "__main__":
    sys.exit(main())
