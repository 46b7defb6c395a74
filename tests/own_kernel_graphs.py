"""Computes graphs with own kernels: the plugins by NumPy, the rest by ``onnx``'s reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from edge.backends.tensorrt.launch_rules import (
    JOIN,
    NAMESPACE,
    PARTS,
    PRODUCT,
    number_of_parts,
    room,
)
from edge.bundle import io_spec
from edge.bundle.manifest import Manifest
from engines.kernels.layout import unpack_weights
from engines.kernels.reference import w4_gemv
from engines.kernels.variants import LEAST_PART


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


W4Linear.__name__ = PRODUCT.name


class AttentionParts(OpRun):  # type: ignore[misc]
    """The plugin: a row of FP32 sums for each part, sequence, token and head; others are NaN."""

    op_domain = NAMESPACE

    def _run(
        self,
        query: Any,
        keys: Any,
        values: Any,
        new_keys: Any,
        new_values: Any,
        positions: Any,
        **_attributes: Any,
    ) -> Any:
        assert {each.dtype for each in (query, keys, values, new_keys, new_values)} == {
            np.dtype(np.float16)
        }
        assert positions.dtype == np.int32
        batch, heads, tokens, width = query.shape
        rows, groups = batch * heads * tokens, keys.shape[1]
        parts = number_of_parts(rows)
        partial = np.full((room(rows), width), np.nan, np.float32)
        stats = np.full((room(rows), 2), np.nan, np.float32)
        for part, sequence, token, head in np.ndindex(parts, batch, tokens, heads):
            past = int(positions[sequence, 0])
            start, end = _range_of(part, parts, past, tokens, token)
            if start >= end:
                continue
            group = head * groups // heads
            both = [
                np.concatenate((old[sequence, group, :past], new[sequence, group]))[start:end]
                for old, new in ((keys, new_keys), (values, new_values))
            ]
            scores = both[0].astype(np.float64) @ query[sequence, head, token] / np.sqrt(width)
            weights = np.exp(scores - scores.max())
            line = ((part * batch + sequence) * tokens + token) * heads + head
            partial[line] = weights @ both[1]
            stats[line] = scores.max() * np.log2(np.e), weights.sum()
        return partial, stats


class AttentionJoin(OpRun):  # type: ignore[misc]
    """The plugin."""

    op_domain = NAMESPACE

    def _run(self, partial: Any, stats: Any, positions: Any, query: Any, **_attributes: Any) -> Any:
        assert (partial.dtype, stats.dtype) == (np.float32, np.float32)
        batch, heads, tokens, width = query.shape
        parts = number_of_parts(batch * heads * tokens)
        found = np.zeros((batch, tokens, heads, width))
        for sequence, token, head in np.ndindex(batch, tokens, heads):
            past = int(positions[sequence, 0])
            lines = [
                ((part * batch + sequence) * tokens + token) * heads + head
                for part in range(parts)
                if np.less(*_range_of(part, parts, past, tokens, token))
            ]
            shares = np.exp2(stats[lines, 0] - stats[lines, 0].max())
            total = shares @ stats[lines, 1]
            found[sequence, token, head] = shares @ partial[lines] / total
        return (found.astype(np.float16).reshape(batch, tokens, heads * width),)


def _range_of(part: int, parts: int, past: int, tokens: int, token: int) -> tuple[int, int]:
    """The rows of a part that a token sees."""
    each = max(-(-(past + tokens) // parts), 1)
    each = -(-each // LEAST_PART) * LEAST_PART
    return part * each, min((part + 1) * each, past + token + 1)


AttentionParts.__name__, AttentionJoin.__name__ = PARTS.name, JOIN.name


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
    return compute_all(data, directory, feed)[output]


def compute_all(data: bytes, directory: Path, feed: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """All outputs of a graph by name."""
    operators = [W4Linear, AttentionParts, AttentionJoin]
    session = ReferenceEvaluator(load(data, directory), new_ops=operators)
    known = {name: value for name, value in feed.items() if name in session.input_names}
    return dict(zip(session.output_names, session.run(None, known), strict=True))
