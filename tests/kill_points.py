"""Kill what writes a file with SIGKILL before each of its operations, and within its writes.

Run as ``python -m tests.kill_points ROOT SCENARIO ARGUMENT...``. For every point it copies
``ROOT/start`` to ``ROOT/POINT`` and forks a child that does the scenario there and dies at the
point: ``op-N`` before operation number N (Python's audit events, and ``fsync``), ``byte-N`` in the
write that would pass N bytes of a file, where the kernel ends it. It ends with the first operation
that the child survives, so the last place is a whole run.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from edge.bundle.manifest import read_manifest
from edge.runtime.prefix_store import PrefixStore
from edge_lab.measure.drift import write_atomic
from edge_serve.stored.store import ResponseStore
from export.resume import Finished, resumable_work
from tests.edge_serve.stored.records import make_record
from tests.export.kill_child import EVENTS
from tests.standins.slot_rows import LAYOUT, filled_rows

NUM_WRITES, NUM_WRITES_OF_VERB = 20, 4  # the verb opens a model each time; its writer is "prefix"
Scenario = Callable[[Path], object]


def save_prefix(place: Path, bundle: str) -> None:
    rows = filled_rows(600, 2)
    PrefixStore(place, read_manifest(Path(bundle)), LAYOUT).save("a", [2] * 600, rows)


def write_state(place: Path) -> None:
    write_atomic(place / "state.json", b"new" * 100_000)


def build_cache(place: Path, bundle: str, text: str) -> None:
    from edge.cli import cli

    arguments = ["cache", "build", bundle, "a", "--text", text, "--prefix-dir", str(place)]
    cli.main(arguments, standalone_mode=False)


def calibrate(place: Path, num_layers: str = "3") -> None:
    """Go on with a calibrated export of layers that are 64 KiB each, up to this many.

    What `BundleWriter` removes is removed here: unfinished files first, and the layers at the end.
    """
    shape = (1 << 14,)
    (place / "x.data").unlink(missing_ok=True)
    with resumable_work(place / "work", "key", [place / "x.data"]) as work:
        for layer in range(work.finished.blocks, int(num_layers)):
            values = np.full(shape, layer, np.float32)
            work.files[0].add(f"w{layer}", 1, shape, values)
            work.save(Finished(layer + 1, hidden=np.full((1, 64, 1024), layer, np.float32)))
        if num_layers != "3":
            raise KeyboardInterrupt
    shutil.rmtree(place / "work")


def save_response(place: Path) -> None:
    """Put a response away that was begun, with its rows."""
    data = np.full(LAYOUT.num_bytes(600), 2, np.uint8)
    store = ResponseStore(place / "stored")
    store.save_with_rows(make_record(1 << 40, rows=600, data=data), data)
    store.close()


SCENARIOS: dict[str, Callable[..., object]] = {
    "prefix": save_prefix,
    "state": write_state,
    "response": save_response,
    "cache": build_cache,
    "calibration": calibrate,
}


def die_before(last: int, place: Path) -> None:
    """Let this process die before its operation number ``last`` in a place."""
    seen = 0
    fsync, inside = os.fsync, os.fspath(place)

    def step(event: str, args: tuple[object, ...]) -> None:
        nonlocal seen
        if event not in EVENTS:
            return
        if event == "fcntl.flock" or str(args[0]).startswith(inside):
            seen += 1
            if seen == last:
                os.kill(os.getpid(), signal.SIGKILL)

    def counted_fsync(descriptor: int) -> None:
        step("open", (inside,))
        fsync(descriptor)

    os.fsync = counted_fsync  # type: ignore[assignment]
    sys.addaudithook(step)


def die_at_byte(last: int) -> None:
    """Let the kernel end this process when a file of it gets longer than this."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (last, last))


def run(root: Path, point: str, arm: Callable[[Path], None], work: Scenario) -> bool:
    """Do the work at a point; whether it survived.

    Raises:
        SystemExit: it failed in another way.
    """
    place = root / point
    shutil.copytree(root / "start", place)
    child = os.fork()
    if child == 0:
        arm(place)
        work(place)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False
    if code := os.waitstatus_to_exitcode(status):
        sys.exit(code)
    return True


def main(root: Path, scenario: str, *arguments: str) -> None:
    def work(place: Path) -> None:
        SCENARIOS[scenario](place, *arguments)

    for last in range(1, 1000):
        if run(root, f"op-{last:03}", partial(die_before, last), work):
            break
    files = [path for path in (root / f"op-{last:03}").rglob("*") if path.is_file()]
    size = max(path.stat().st_size for path in files)
    num_writes = NUM_WRITES_OF_VERB if scenario == "cache" else NUM_WRITES
    for number in range(num_writes):
        limit = number * size // num_writes
        if run(root, f"byte-{limit}", lambda _: die_at_byte(limit), work):  # noqa: B023
            sys.exit(f"nothing passed {limit} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
