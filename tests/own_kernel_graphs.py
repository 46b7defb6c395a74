"""Computes graphs with own kernels: the plugin by its NumPy reference, the rest by ``onnx``'s."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from edge.backends.tensorrt.plugins import NAME, NAMESPACE
from edge.bundle import io_spec
from edge.bundle.manifest import Manifest
from engines.kernels.layout import unpack_weights
from engines.kernels.reference import w4_gemv


class W4Linear(OpRun):  # type: ignore[misc]
    """The plugin."""

    op_domain = NAMESPACE

    def _run(self, x: Any, weights: Any, scales: Any, bias: Any, **_attributes: Any) -> Any:
        assert (x.dtype, weights.dtype, scales.dtype, bias.dtype) == (
            *(np.float16, np.int32, np.float16, np.float16),
        )
        columns = weights.shape[2]
        flat = x.reshape(-1, x.shape[-1])
        added = bias if bias.shape == (columns,) else None
        exact, _ = w4_gemv(flat, unpack_weights(weights), scales, added)
        return (exact.astype(np.float16).reshape(*x.shape[:-1], columns),)


W4Linear.__name__ = NAME


def load(data: bytes, directory: Path) -> onnx.ModelProto:
    """A graph with its weights in it; links are followed."""
    model = onnx.load_from_string(data)
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        facts = {entry.key: entry.value for entry in tensor.external_data}
        with (directory / facts["location"]).open("rb") as file:
            file.seek(int(facts["offset"]))
            tensor.raw_data = file.read(int(facts["length"]))
        tensor.ClearField("external_data")
        tensor.data_location = onnx.TensorProto.DEFAULT
    return model


def inputs_of(manifest: Manifest, tokens: int, rows: int) -> dict[str, NDArray[Any]]:
    """A prompt at the beginning of an empty cache of some rows."""
    random = np.random.default_rng(0)
    sizes = {
        io_spec.BATCH: 1,
        io_spec.SEQ: tokens,
        io_spec.NUM_LOGITS: tokens,
        io_spec.KV: rows,
    }
    feed: dict[str, Any] = {}
    spec = (manifest.model, manifest.dialect, manifest.dtype, rows, manifest.int8_layers)
    for each in io_spec.decoder_inputs(*spec):
        shape = [sizes[size] if isinstance(size, str) else size for size in each.shape]
        whole = each.dtype.startswith("int")
        values = np.zeros(shape) if whole else random.standard_normal(shape) / 4
        feed[each.name] = values.astype(each.dtype.replace("fp", "float"))
    for name in (io_spec.POSITION_IDS, io_spec.LOGITS_INDICES):
        feed[name] = np.arange(tokens)[None]
    feed[io_spec.KV_POSITIONS] = np.arange(rows)
    return feed


def compute(data: bytes, directory: Path, feed: dict[str, Any], output: str) -> NDArray[Any]:
    """One output of a graph."""
    session = ReferenceEvaluator(load(data, directory), new_ops=[W4Linear])
    known = {name: value for name, value in feed.items() if name in session.input_names}
    found: NDArray[Any] = session.run([output], known)[0]
    return found
