"""Passes new weights to ONNX Runtime as files in memory; it releases each once it is packed.

ONNX Runtime copies values that a session is given (`SessionOptions.add_external_initializers`), and
both copies stay until all are packed. Files it maps, tensor by tensor, and each map ends when the
tensor is packed. The files have names only while the session looks for them, so the kernel frees a
weight with its last map. If a process is killed meanwhile, the next one removes its files. The
names have to be real: ONNX Runtime follows no link out of the folder, such as those in
``/proc/self/fd``.
"""

from __future__ import annotations

import contextlib
import fcntl
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
_PREFIX = "edge-llm-weights-"
_POLL_S = 0.02
_MOST_COPIED_BYTES = 1 << 26  # of norms and biases


def has_room(num_bytes: int) -> bool:
    """Whether files of this many bytes can be made in memory."""
    try:
        os.close(_open_file())
        return shutil.disk_usage(_FOLDER).free > num_bytes
    except (OSError, AttributeError):  # the folder is missing or not writable, or not Linux
        return False


class _Map(mmap.mmap):
    file: int  # a descriptor, closed with the map


def map_file(num_bytes: int) -> mmap.mmap | None:
    """Make memory that is a file without a name; `lend` names it.

    Returns:
        None if there is no room for it (any more); writing to a page could not report that.
    """
    try:
        file = _open_file()
    except OSError:
        return None
    try:
        os.posix_fallocate(file, 0, num_bytes)
        memory = _Map(file, num_bytes)
    except OSError:
        os.close(file)
        return None
    memory.file = file
    weakref.finalize(memory, os.close, file)
    return memory


@contextlib.contextmanager
def lend(graph: OnnxFile, bundle: Path) -> Iterator[Path]:
    """Provide the path at which a session on an already serialized graph finds its weights.

    Args:
        graph: the graph. Afterwards its memory is empty, unless none of it is of `map_file` or the
            folder has become full.
        bundle: directory of the other weights.
    """
    with contextlib.ExitStack() as stack:
        yield _fill_folder(graph, bundle, stack) or bundle


def _fill_folder(graph: OnnxFile, bundle: Path, stack: contextlib.ExitStack) -> Path | None:
    """Give all weights names in a folder until the stack ends; None if that is impossible."""
    tensors = graph.external_tensors()
    others = {name: tensor for name, tensor in tensors.items() if name not in graph.in_memory}
    too_much = sum(tensor.num_bytes for tensor in others.values()) > _MOST_COPIED_BYTES
    found = {name: _file_of(value) for name, value in graph.in_memory.items()}
    files = {name: file for name, file in found.items() if file is not None}
    if not files or too_much or any("/" in tensor.file for tensor in tensors.values()):
        return None
    names = list(graph.in_memory)
    try:
        with contextlib.ExitStack() as made:
            folder = made.enter_context(_make_folder())
            for tensor in others.values():
                (folder / tensor.file).touch(0o600)
                with (
                    (bundle / tensor.file).open("rb") as source,
                    (folder / tensor.file).open("rb+") as to,
                ):
                    source.seek(tensor.offset)
                    to.seek(tensor.offset)
                    to.write(source.read(tensor.num_bytes))
            for name, value in graph.in_memory.items():
                if name in files:  # given a descriptor, `link` follows the link to the file
                    os.link(f"/proc/self/fd/{files[name]}", folder / name, src_dir_fd=files[name])
                else:
                    value.tofile(folder / name)
            stack.enter_context(made.pop_all())
    except OSError:  # another process has used the room since `has_room`, or there is no /proc
        return None
    graph.in_memory.clear()
    stack.enter_context(_unlinking(folder, names))
    return folder


@contextlib.contextmanager
def _unlinking(folder: Path, names: list[str]) -> Iterator[None]:
    """Remove the names once a session has mapped all of the files."""
    opened = threading.Event()

    def unlink_mapped() -> None:
        while not opened.wait(_POLL_S):
            maps = Path("/proc/self/maps").read_text(errors="replace")
            if all(f"{folder}/{name}\n" in maps for name in names):
                for name in names:
                    (folder / name).unlink()
                return

    watcher = threading.Thread(target=unlink_mapped)
    watcher.start()
    try:
        yield
    finally:
        opened.set()
        watcher.join()


@contextlib.contextmanager
def _make_folder() -> Iterator[Path]:
    """Make a folder that is locked while its process lives, and remove those of killed ones."""
    for path in Path(_FOLDER).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), _locked(path, fcntl.LOCK_NB) as left:
            names = [entry.name for entry in os.scandir(left)]
            for name in names:
                os.unlink(name, dir_fd=left)  # by descriptor: the path may lead elsewhere by now
            if names:  # another process may be about to lock an empty one
                path.rmdir()
    with tempfile.TemporaryDirectory(dir=_FOLDER, prefix=_PREFIX) as made, _locked(made):
        yield Path(made).resolve()


@contextlib.contextmanager
def _locked(directory: str | Path, how: int = 0) -> Iterator[int]:
    folder = os.open(directory, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | how)
        yield folder
    finally:
        os.close(folder)


def _file_of(value: object) -> int | None:
    while isinstance(value, np.ndarray | memoryview):
        value = value.base if isinstance(value, np.ndarray) else value.obj
    return value.file if isinstance(value, _Map) else None


def _open_file() -> int:
    return os.open(_FOLDER, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
