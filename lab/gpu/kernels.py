"""``scripts/gpu-check kernels``: checks edge-llm's own kernels on this GPU, without TensorRT.

Each kernel is loaded by the CUDA driver, compared with NumPy at the shapes of R1-Distill-Qwen-1.5B,
and timed. Its bytes per second are printed beside those of a copy on the card. A product of many
rows, and an attention of many tokens, has its operations per second instead. There are so many
inputs that no cache holds them from one run to the next.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.backends.cuda import Device, DeviceMemory, PinnedMemory, Stream
from edge.backends.cuda.kernels import Kernel
from edge.errors import EdgeError
from engines.kernels import launch, reference
from engines.kernels.attention import attention as attention_job
from engines.kernels.layout import pack_weights
from engines.kernels.package import Cubin, load_cubins
from engines.kernels.top_k import top_k
from engines.kernels.variants import MAX_ROWS

Arrays = dict[str, NDArray[Any]]
_COPY_BYTES = 256 << 20
_MOST_COPIES = 32
_RUNS = 20
_ATTENDED = ("query", "keys", "values", "new_keys", "new_values", "positions")
_COLUMNS = 4096  # columns of a reference product at once, since it is in FP64


@dataclass(frozen=True)
class Case:
    """An operation at one shape.

    Attributes:
        name: its name in the model.
        job: the kernels.
        make_inputs: makes the job's inputs; they are large, so only one case has them at a time.
        num_bytes: bytes that must be read and written at least.
        operations: multiplications and additions, if these are what counts.
    """

    name: str
    job: launch.Job
    make_inputs: Callable[[], Arrays]
    num_bytes: int
    operations: int = 0

    def find_fault(self, inputs: Arrays, outputs: Arrays) -> str | None:
        """Say what is wrong with the outputs, or return None."""
        if "y" in outputs:
            (only,) = self.job.launches
            return _product_fault(getattr(reference, only.variant.function), inputs, outputs["y"])
        if "output" in outputs:
            found = reference.attention(**{name: inputs[name] for name in _ATTENDED})
            # The second product has weights in FP16.
            largest = max(np.abs(inputs[name]).max() for name in ("values", "new_values"))
            bound = 2.5e-3 * float(largest) + 1e-6
            return _fault(np.abs(outputs["output"] - found), np.full(found.shape, bound))
        best, places, rest = reference.top_k(inputs["logits"], len(inputs["keep"]))
        if not (outputs["places"] == places).all() or not (outputs["values"] == best).all():
            return "other logits are the largest"
        return _fault(np.abs(outputs["rest"][:, 0] - rest), reference.top_k_error() * rest)


def _fault(error: NDArray[Any], bound: NDArray[Any]) -> str | None:
    wrong = ~(error <= bound)  # NaN is wrong
    if not wrong.any():
        return None
    return f"{int(wrong.sum())} of {wrong.size} values are off by up to {np.max(error):.3g}"


def _product_fault(
    compute: Callable[..., tuple[NDArray[Any], NDArray[Any]]], inputs: Arrays, y: NDArray[Any]
) -> str | None:
    errors, bounds = [], []
    for first in range(0, y.shape[1], _COLUMNS):
        part = slice(first, first + _COLUMNS)
        exact, bound = compute(
            inputs["x"],
            [inputs[name][:, part] for name in ("low", "high") if name in inputs],
            inputs["scales"][:, part],
            inputs["bias"][part] if "bias" in inputs else None,
        )
        errors.append(np.abs(y[:, part] - exact))
        bounds.append(bound)
    return _fault(np.concatenate(errors, 1), np.concatenate(bounds, 1))


def product(
    name: str, rows: int, columns: int, depth: int, group: int, planes: int, *, bias: bool = False
) -> Case:
    """Make a product with random weights, on tensor cores if there are many rows."""
    many = rows > MAX_ROWS
    make = launch.w4_gemm if many else launch.w4_gemv
    job = make(rows, columns, depth, group=group, planes=planes, bias=bias)
    return Case(
        name,
        job,
        lambda: _product_inputs(rows, columns, depth, group, planes, bias),
        _bytes_of(job, ("x", "weights", "scales", "y")),
        2 * rows * columns * depth if many else 0,
    )


def _product_inputs(
    rows: int, columns: int, depth: int, group: int, planes: int, bias: bool
) -> Arrays:
    random = np.random.default_rng(0)
    weights = [random.integers(-8, 8, (depth, columns), np.int8) for _ in range(planes)]
    inputs: Arrays = {
        "x": random.standard_normal((rows, depth)).astype(np.float16),
        "weights": pack_weights(weights),
        "scales": (random.uniform(0.5, 2, (depth // group, columns)) * 0.01).astype(np.float16),
        **dict(zip(("low", "high"), weights, strict=False)),
    }
    if bias:
        inputs["bias"] = random.standard_normal(columns).astype(np.float16)
    return inputs


def attention(
    name: str, starts: list[int], groups: int, heads: int, tokens: int, width: int, capacity: int
) -> Case:
    """Make attention over a cache of random rows, this many per sequence, and the step's own."""
    job = attention_job(len(starts), groups, heads, tokens, width, capacity)

    def make_inputs() -> Arrays:
        random = np.random.default_rng(0)
        inputs: Arrays = {
            each: random.standard_normal(job.buffers[each][0]).astype(np.float16)
            for each in _ATTENDED
            if each != "positions"
        }
        inputs["positions"] = (np.array(starts)[:, None] + np.arange(tokens)).astype(np.int32)
        return inputs

    seen = sum(start * tokens + tokens * (tokens + 1) // 2 for start in starts)
    rows = sum(starts) + len(starts) * tokens
    return Case(
        name,
        job,
        make_inputs,
        4 * rows * groups * width,
        4 * seen * groups * heads * width if tokens > MAX_ROWS else 0,
    )


def logits(name: str, rows: int, columns: int, keep: int) -> Case:
    """Make a search for the largest of random logits."""

    def make_inputs() -> Arrays:
        random = np.random.default_rng(0)
        values = (random.standard_normal((rows, columns)) * 5).astype(np.float16)
        return {"logits": values, "keep": np.zeros(keep, np.float32)}

    return Case(name, top_k(rows, columns, keep), make_inputs, 2 * rows * columns)


def _bytes_of(job: launch.Job, names: Sequence[str]) -> int:
    found = (job.buffers[name] for name in names)
    return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in found)


def make_cases() -> list[Case]:
    """Make cases of the shapes of R1-Distill-Qwen-1.5B, so that every compiled kernel runs."""
    return [
        product("q, INT4 g32, bias", 1, 1536, 1536, 32, 1, bias=True),
        *(product(f"gate and up, INT4 g32, {n} rows", n, 17920, 1536, 32, 1) for n in (1, 2, 4, 8)),
        product("down, INT4 g128", 1, 1536, 8960, 128, 1),
        *(product(f"lm_head, INT8 g64, {n} rows", n, 37984, 1536, 64, 2) for n in (1, 2, 4, 8)),
        product("gate and up, INT4 g32, 512 rows", 512, 17920, 1536, 32, 1),
        product("down, INT4 g128, 512 rows", 512, 1536, 8960, 128, 1),
        product("q, INT8 g64, bias, 500 rows", 500, 1536, 1536, 64, 2, bias=True),
        attention("attention, 1 x 4095 of 8192", [4095], 2, 6, 1, 128, 8192),
        attention("attention, 8 tokens, 4 x 700", [700] * 4, 2, 6, 8, 128, 1024),
        attention("attention, 700 tokens after 800", [800], 2, 6, 700, 128, 4096),
        attention("attention, width 64, 2 x 1000", [1000, 999], 3, 3, 1, 64, 1024),
        attention("attention, width 64, 8 tokens", [1000, 8], 3, 3, 8, 64, 1024),
        attention("attention, width 64, 1024 tokens", [0], 3, 3, 1024, 64, 1024),
        logits("best 256 of 151,936", 1, 151_936, 256),
        logits("best 1024 of 8 x 151,936", 8, 151_936, 1024),
    ]


class Timer:
    """Measures the time on the device between two places of a stream.

    Raises:
        DependencyError: cuda-bindings is missing.
        DeviceError: the driver fails.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._events: list[Any] = []
        self._owned = ExitStack()  # frees the second, too, if freeing the first fails
        try:
            for _ in ("start", "end"):
                event = device.graph_call("make an event", "cuEventCreate", 0)
                self._owned.callback(device.graph_call, "destroy an event", "cuEventDestroy", event)
                self._events.append(event)
        except BaseException:
            self.close()
            raise

    def start(self, stream: Stream) -> None:
        """Begin after what is on the stream."""
        self._record(0, stream)

    def end(self, stream: Stream) -> None:
        """End after what is on the stream."""
        self._record(1, stream)

    def _record(self, which: int, stream: Stream) -> None:
        self._device.graph_call("note a time", "cuEventRecord", self._events[which], stream.handle)

    def read_s(self) -> float:
        """Return the seconds between both, once they have passed.

        Raises:
            DeviceError: the timed work failed.
        """
        self._device.graph_call("wait for an event", "cuEventSynchronize", self._events[1])
        milliseconds: float = self._device.graph_call(
            "read a time", "cuEventElapsedTime", *self._events
        )
        return milliseconds / 1e3

    def close(self) -> None:
        """Destroy both; twice is harmless."""
        self._owned.close()


class Bench:
    """Runs cases on a GPU.

    Args:
        device: device whose context is current.
        cubins: cubins of all kernels.
    """

    def __init__(self, device: Device, cubins: dict[str, Cubin]) -> None:
        self._device, self._cubins = device, cubins
        self._stack = ExitStack()
        self._stream = self._own(Stream(device))
        self._timer = self._own(Timer(device))
        self._kernels: dict[str, Kernel] = {}

    def _own(self, thing: Any) -> Any:
        return self._stack.enter_context(closing(thing))

    def close(self) -> None:
        """Release everything."""
        self._stack.close()

    def copy_bandwidth(self, num_bytes: int = _COPY_BYTES) -> float:
        """Return the bytes per second, read and written, of a copy on the device."""
        with ExitStack() as stack:
            source, target = (
                stack.enter_context(closing(DeviceMemory(self._device, num_bytes, "a copy")))
                for _ in range(2)
            )
            self._stream.clear(source.address, num_bytes)

            def copy() -> None:
                self._device.graph_call(
                    "copy on the GPU",
                    "cuMemcpyDtoDAsync",
                    target.address,
                    source.address,
                    num_bytes,
                    self._stream.handle,
                )

            copy()
            return 2 * num_bytes / self._time([copy])

    def run(self, case: Case) -> dict[str, Any]:
        """Check and time one case."""
        inputs = case.make_inputs()
        copies = max(1, min(_MOST_COPIES, _COPY_BYTES // case.num_bytes))
        with ExitStack() as stack:
            places = [self._allocate(stack, case, inputs) for _ in range(copies)]
            self._launch(case, places[0])
            fault = case.find_fault(inputs, self._read(stack, case, places[0]))
            seconds = self._time([lambda at=at: self._launch(case, at) for at in places])
        return {
            "case": case.name,
            "fault": fault,
            "us": seconds * 1e6,
            "gb_s": case.num_bytes / seconds / 1e9,
            "tflop_s": case.operations / seconds / 1e12,
        }

    def _time(self, runs: list[Any]) -> float:
        """Return the median seconds of one, over rounds of all."""
        found = []
        for _ in range(_RUNS):
            self._timer.start(self._stream)
            for run in runs:
                run()
            self._timer.end(self._stream)
            found.append(self._timer.read_s() / len(runs))
        return float(np.median(found))

    def _allocate(self, stack: ExitStack, case: Case, inputs: Arrays) -> dict[str, int]:
        places = {}
        for name, (shape, dtype) in case.job.buffers.items():
            num_bytes = int(np.prod(shape)) * dtype.itemsize
            memory = stack.enter_context(closing(DeviceMemory(self._device, num_bytes, name)))
            places[name] = memory.address
            if name in inputs:
                with closing(PinnedMemory(self._device, num_bytes, name, mapped=False)) as pinned:
                    pinned.array[...] = inputs[name].reshape(-1).view(np.uint8)
                    self._stream.upload(memory.address, pinned.array)
                    self._stream.synchronize()
            else:
                self._stream.clear(memory.address, num_bytes)
        return places

    def _launch(self, case: Case, places: dict[str, int]) -> None:
        for each in case.job.launches:
            name = each.variant.name
            cubin = self._cubins[name]
            if name not in self._kernels:
                self._kernels[name] = self._own(
                    Kernel(
                        self._device,
                        cubin.image,
                        cubin.entry,
                        threads=cubin.threads,
                        shared_bytes=cubin.shared_bytes,
                    )
                )
            values = tuple(
                (places[value], True) if isinstance(value, str) else (value, False)
                for value in each.arguments
            )
            self._kernels[name].launch(self._stream, each.grid, values)

    def _read(self, stack: ExitStack, case: Case, places: dict[str, int]) -> Arrays:
        found = {}
        for name in case.job.outputs:
            shape, dtype = case.job.buffers[name]
            num_bytes = int(np.prod(shape)) * dtype.itemsize
            pinned = stack.enter_context(
                closing(PinnedMemory(self._device, num_bytes, name, mapped=False))
            )
            self._stream.download(pinned.array, places[name])
            self._stream.synchronize()
            found[name] = pinned.array.view(dtype).reshape(shape).copy()
        return found


def check(cases: Sequence[Case], copy_bytes: int = _COPY_BYTES) -> dict[str, Any]:
    """Run cases on this machine's GPU.

    Raises:
        DependencyError: no GPU, no cuda-bindings, or no kernels for this GPU.
        DeviceError: a kernel failed.
    """
    device = Device()
    cubins = load_cubins(device.compute_capability)
    with device.active(), closing(Bench(device, cubins)) as bench:
        copied = bench.copy_bandwidth(copy_bytes)
        return {
            "device": device.name,
            "compute_capability": device.compute_capability,
            "copy_gb_s": copied / 1e9,
            "cases": [bench.run(case) for case in cases],
        }


def render(report: dict[str, Any]) -> str:
    """Write the report for people."""
    lines = [
        f"{report['device']}, compute capability {report['compute_capability']}: a copy on the "
        f"device moves {report['copy_gb_s']:.1f} GB/s"
    ]
    lines += [
        f"  {case['case']:<32}{case['us']:>10.1f} us {_render_rate(case, report['copy_gb_s']):<28}"
        f"{case['fault'] or 'right'}"
        for case in report["cases"]
    ]
    return "\n".join(lines)


def _render_rate(case: dict[str, Any], copy_gb_s: float) -> str:
    if case["tflop_s"]:
        return f"{case['tflop_s']:>8.2f} TFLOP/s"
    return f"{case['gb_s']:>8.1f} GB/s  {case['gb_s'] / copy_gb_s:>4.0%} of a copy"


def main(arguments: Sequence[str] | None = None, cases: Sequence[Case] | None = None) -> int:
    """Print the report; return 1 if a kernel differs from NumPy or fails."""
    parser = argparse.ArgumentParser(prog="gpu-check kernels", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(arguments)
    try:
        report = check(make_cases() if cases is None else cases)
    except EdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report) if options.json else render(report))
    return int(any(case["fault"] for case in report["cases"]))


if __name__ == "__main__":
    sys.exit(main())
