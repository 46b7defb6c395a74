"""Turns weights that only own kernels read into inputs of the engine, in a file beside its plan.

TensorRT would copy such weights into the plan, hold them several times while it builds, and load
them again with each engine. Of inputs it sees only the shapes. An engine's inputs have static
shapes and types that TensorRT takes there: words of INT4 are INT32 (NvInferRuntimeBase.h, DataType:
INT4 and UINT8 have limits of their own), scales and tables FP16. Any tensor may be a plugin's input
(INetworkDefinition::addPluginV3), and one of fewer than 2^31 elements an engine's.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from edge._version import __version__
from edge.backends.tensorrt.launch_rules import BLOCK
from edge.bundle import io_spec
from edge.bundle.engine_file import (
    ENGINE_JSON,
    OutsideTensor,
    OutsideWeights,
    read_engine_bytes,
    read_engine_info,
    read_outside,
)
from edge.bundle.engine_records import why_unrecorded
from edge.bundle.onnx_file import ELEMENT_NUMBERS, OnnxFile, tensor_info
from edge.bundle.onnx_values import Constant, read_constant
from edge.bundle.sizes import ALIGNMENT
from edge.bundle.update import fsync
from edge.errors import BundleError, ResourceError
from edge.files import drop_cached
from edge_make.graph_edits import add_inputs
from engines.kernels.layout import pack_weights

_log = logging.getLogger(__name__)

SUFFIX = ".weights"
PRODUCER = f"edge-llm {__version__}"
_CHUNK = 1 << 22
"""Weights to re-order, or bytes to copy, in one go; a weight takes some ten bytes meanwhile."""


@dataclass(frozen=True)
class Outside:
    """Weights that an engine takes as inputs; nothing is written yet.

    Attributes:
        directory: directory of the graph's weights.
        sources: constants that each tensor is made of: one as it is, or the planes of INT4 that
            `pack_weights` joins.
        tensors: description of each tensor, as ``engine.json`` stores it.
        num_bytes: size of the file.
    """

    directory: Path
    sources: Mapping[str, tuple[Constant, ...]]
    tensors: dict[str, OutsideTensor]
    num_bytes: int

    def write(self, target: BinaryIO) -> str:
        """Write the file, some rows at a time.

        Returns:
            The file's SHA-256.

        Raises:
            BundleError: the graph's weights end too early.
            OSError: the file cannot be written.
        """
        digest, at = hashlib.sha256(), 0
        for name, tensor in self.tensors.items():
            padding = bytes(tensor.offset - at)
            for piece in chain([padding], _pieces(self.sources[name], self.directory)):
                target.write(piece)
                digest.update(piece)
            at = tensor.end
        return digest.hexdigest()


def lay_out(directory: Path, sources: Mapping[str, tuple[Constant, ...]]) -> Outside:
    """Give each tensor its place in the file.

    Args:
        directory: directory of the graph's weights.
        sources: constants that each tensor is made of, as in `Outside`.
    """
    tensors, end = {}, 0
    for name, constants in sources.items():
        first = constants[0]
        dtype: io_spec.ElementType = first.dtype  # type: ignore[assignment]
        shape = first.shape
        if dtype not in io_spec.ELEMENT_BYTES:
            depth, columns = shape
            dtype, shape = "int32", (depth // BLOCK, len(constants), columns, 4)
        tensors[name] = OutsideTensor(dtype, shape, -(-end // ALIGNMENT) * ALIGNMENT)
        end = tensors[name].end
    return Outside(directory, sources, tensors, end)


def constants_inside(graph: bytes) -> dict[str, int]:
    """Return the bytes of each constant that a graph still has, the largest first.

    Raises:
        BundleError: the graph is not valid.
    """
    found = {each.name: each.num_bytes for each in map(read_constant, OnnxFile(graph).initializers)}
    return dict(sorted(found.items(), key=lambda each: -each[1]))


def make_inputs(graph: OnnxFile, outside: Outside) -> None:
    """Make the tensors inputs of a graph; constants of the same names are removed."""
    add_inputs(
        graph,
        (
            tensor_info(name, ELEMENT_NUMBERS[each.dtype], each.shape)
            for name, each in outside.tensors.items()
        ),
    )


def place(outside: Outside, directory: Path, sources: Mapping[str, str]) -> OutsideWeights:
    """Put the weights beside an engine's plan.

    If another engine that this machine built for the bundle has the same weights, both share the
    file by a hard link, on the disk and in the page cache.

    Args:
        outside: the weights.
        directory: the engine's directory.
        sources: SHA-256 of the graph and of its weights.

    Returns:
        The description that ``engine.json`` stores.

    Raises:
        BundleError: the graph's weights end too early.
        ResourceError: there is too little room on the disk.
        OSError: the file cannot be written.
    """
    for record in sorted(directory.parent.glob(f"*/{ENGINE_JSON}")):
        try:
            if why_unrecorded(read_engine_bytes(record.parent)) is not None:
                continue
            info = read_engine_info(record.parent)
            made = info.outside
            known = info.producer, info.sources, made and made.tensors
            if made is None or known != (PRODUCER, sources, outside.tensors):
                continue
            buffer = memoryview(bytearray(2 << 20))
            deque(read_outside(record.parent, info, made, buffer), maxlen=0)
            _link(record.parent / made.file, directory / made.file)
        except (BundleError, OSError) as error:
            _log.debug("the weights of %s are not taken: %s", record.parent, error)
        else:
            return made
    return _write(outside, directory)


def _link(source: Path, target: Path) -> None:
    if target.exists() and target.samefile(source):
        return
    target.unlink(missing_ok=True)
    os.link(source, target)


def _write(outside: Outside, directory: Path) -> OutsideWeights:
    free = shutil.disk_usage(directory).free
    if free < outside.num_bytes:
        raise ResourceError(
            f"the weights of own kernels need {outside.num_bytes:,} bytes in {directory}, {free:,} "
            "are free; make room and build again"
        )
    temp = directory / f".weights{os.getpid()}.tmp"
    temp.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(temp, flags, 0o666), "wb") as file:
            sha256 = outside.write(file)
            file.flush()
            os.fsync(file.fileno())
            drop_cached(file.fileno())
        path = directory / f"engine-{sha256[:12]}{SUFFIX}"
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)
    fsync(directory)
    return OutsideWeights(path.name, outside.num_bytes, sha256, outside.tensors)


def _pieces(constants: tuple[Constant, ...], directory: Path) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a tensor in pieces."""
    first = constants[0]
    if first.raw is not None:
        yield first.raw
        return
    assert first.location is not None
    with (directory / first.location).open("rb") as source:
        if first.dtype in io_spec.ELEMENT_BYTES:
            for start in range(0, first.num_bytes, _CHUNK):
                yield _read(source, first, start, min(_CHUNK, first.num_bytes - start))
        else:
            for begin, end in _row_ranges(*first.shape):
                rows = [_read_rows(each, source, begin, end) for each in constants]
                yield pack_weights(rows).data
        drop_cached(source.fileno())


def _row_ranges(depth: int, columns: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows, each a multiple of a block."""
    step = max(_CHUNK // columns // BLOCK, 1) * BLOCK
    for begin in range(0, depth, step):
        yield begin, min(begin + step, depth)


def _read_rows(plane: Constant, source: BinaryIO, begin: int, end: int) -> NDArray[np.int8]:
    """Read rows of INT4, packed by ONNX row by row, the first of two in the low nibble."""
    columns = plane.shape[1]
    # Rows come in whole blocks, so no byte belongs to two ranges.
    data = _read(source, plane, begin * columns // 2, (end - begin) * columns // 2)
    pairs = np.frombuffer(data, np.uint8)
    nibbles = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(end - begin, columns)
    rows: NDArray[np.int8] = (nibbles.astype(np.int8) ^ np.int8(8)) - np.int8(8)
    return rows


def _read(source: BinaryIO, constant: Constant, start: int, num_bytes: int) -> bytes:
    source.seek(constant.offset + start)
    data = source.read(num_bytes)
    if len(data) != num_bytes:
        raise BundleError(
            f"the weights of {constant.name} end too early; copy or export the bundle again"
        )
    return data
