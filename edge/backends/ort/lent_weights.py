"""New weights in files in memory, each of which ONNX Runtime gives back once it has packed it.

Values that a session is given (`SessionOptions.add_external_initializers`) it copies, and both stay
until all are packed. A file it maps, tensor by tensor, and each map ends with the packing of it.
The files have names only while the session looks for them: then the kernel frees a weight with
its last map, and nothing is left in memory if the process is killed. Names have to be real ones:
ONNX Runtime takes no link that leads elsewhere, such as those in ``/proc/self/fd``.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edge.bundle.onnx_file import OnnxFile

_FOLDER = "/dev/shm"
_POLL_S = 0.02
_MOST_COPIED_BYTES = 1 << 26  # of norms and biases


def has_room(num_bytes: int) -> bool:
    """Whether files of so many bytes can be made in memory."""
    try:
        os.close(_open_file())
        return shutil.disk_usage(_FOLDER).free > num_bytes
    except (OSError, AttributeError):  # no such folder, no right to write there, or no Linux
        return False


class _Map(mmap.mmap):
    file: int  # a descriptor, which ends with the map


def map_file(num_bytes: int) -> mmap.mmap:
    """Memory that is a file without a name; `lend` gives it one.

    Raises:
        OSError: there is no room, which no page that is written to could say.
    """
    file = _open_file()
    try:
        os.posix_fallocate(file, 0, num_bytes)
        memory = _Map(file, num_bytes)
    except BaseException:
        os.close(file)
        raise
    memory.file = file
    weakref.finalize(memory, os.close, file)
    return memory


@contextlib.contextmanager
def lend(graph: OnnxFile, bundle: Path) -> Iterator[Path]:
    """Where a session on a graph, which is serialized already, finds its weights as it opens.

    Args:
        graph: nothing is in its memory then, unless none of it is of `map_file`.
        bundle: where the other weights are.
    """
    tensors = graph.external_tensors()
    others = {name: tensor for name, tensor in tensors.items() if name not in graph.in_memory}
    too_much = sum(tensor.num_bytes for tensor in others.values()) > _MOST_COPIED_BYTES
    found = {name: _file_of(value) for name, value in graph.in_memory.items()}
    files = {name: file for name, file in found.items() if file is not None}
    if not files or too_much or any("/" in tensor.file for tensor in tensors.values()):
        yield bundle
        return
    names = list(graph.in_memory)
    with tempfile.TemporaryDirectory(dir=_FOLDER) as directory:
        folder = Path(directory)
        for tensor in others.values():
            (folder / tensor.file).touch(0o600)
            with (
                (bundle / tensor.file).open("rb") as source,
                (folder / tensor.file).open("rb+") as to,
            ):
                source.seek(tensor.offset)
                to.seek(tensor.offset)
                to.write(source.read(tensor.num_bytes))
        for name in names:
            if name in files:  # Given a descriptor, `link` follows the link to the file.
                os.link(f"/proc/self/fd/{files[name]}", folder / name, src_dir_fd=files[name])
            else:
                graph.in_memory[name].tofile(folder / name)
        graph.in_memory.clear()
        opened = threading.Event()

        def unlink_mapped() -> None:
            while not opened.wait(_POLL_S):
                maps = Path("/proc/self/maps").read_text()
                if all(f"{folder}/{name}\n" in maps for name in names):
                    for name in names:
                        (folder / name).unlink()
                    return

        watcher = threading.Thread(target=unlink_mapped)
        watcher.start()
        try:
            yield folder
        finally:
            opened.set()
            watcher.join()


def _file_of(value: object) -> int | None:
    while isinstance(value, np.ndarray | memoryview):
        value = value.base if isinstance(value, np.ndarray) else value.obj
    return value.file if isinstance(value, _Map) else None


def _open_file() -> int:
    return os.open(_FOLDER, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
