"""Kill an export with SIGKILL before each of its file-system operations, in turn.

Run as ``python -m tests.export.kill_child ROOT SCENARIO``. For every N it copies ``ROOT/start`` to
``ROOT/N``, forks, and lets the child export to ``ROOT/N/bundle`` and kill itself before its N-th
operation; it stops at the first N that the export survives. Operations are seen through Python's
audit events; ``fsync`` and a manifest half written, which have none, are added here.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
from pathlib import Path

from edge.bundle.manifest import read_manifest
from edge_make import atomic_swap as bundle_place
from edge_make import target as bundle_target
from edge_make.atomic_swap import update_manifest
from export import bundle
from export.bundle import BundleWriter
from tests.makers.manifests import make_manifest

EVENTS = {
    "open", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.scandir",
    "os.truncate", "shutil.rmtree", "fcntl.flock", "ctypes.dlopen", "ctypes.dlsym",
}  # fmt: skip
NEW_FILES = {
    "decoder.onnx": b"new graph",
    "decoder.cpu.onnx": b"new twin",
    "decoder.onnx.data": b"new weights" * 5000,
}


def refuse(one: Path, other: Path) -> None:
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def arm(last: int) -> None:
    """Let this process die before its operation number ``last``."""
    seen = 0
    fsync, write = os.fsync, bundle_target.write_durably

    def step(event: str, args: object) -> None:
        nonlocal seen
        if event in EVENTS:
            seen += 1
            if seen == last:
                os.kill(os.getpid(), signal.SIGKILL)

    def counted_fsync(descriptor: int) -> None:
        step("open", None)
        fsync(descriptor)

    def write_half_first(path: Path, data: bytes) -> None:
        path.write_bytes(data[: len(data) // 2])
        step("open", None)
        write(path, data)

    for module in (bundle, bundle_place):  # the name that each of them calls it by
        vars(module)["write_durably"] = write_half_first
    os.fsync = counted_fsync  # type: ignore[assignment]
    sys.addaudithook(step)


def export_new(target: Path) -> None:
    with BundleWriter(target, required_bytes=1000, overwrite=True) as writer:
        for name, data in NEW_FILES.items():
            writer.write_bytes(name, data)
        writer.commit(make_manifest(name="new"))


def main(root: Path, scenario: str) -> None:
    if scenario == "fallback":
        bundle_place.exchange = refuse
    for last in range(1, 1000):
        place = root / str(last)
        shutil.copytree(root / "start", place)
        child = os.fork()
        if child == 0:
            arm(last)
            if scenario == "update":
                manifest = read_manifest(place / "bundle")
                files = manifest.files
                update_manifest(place / "bundle", make_manifest(name="new", files=files))
            else:
                export_new(place / "bundle")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            sys.exit(os.waitstatus_to_exitcode(status))
    sys.exit("the export never ended")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
