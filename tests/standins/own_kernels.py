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
    NUMBERS,
    PART_LOGITS,
    PARTS,
    PRODUCT,
    TOP_K_MERGE,
    TOP_K_PARTS,
    number_of_parts,
    room,
)
from edge.bundle import io_spec
from edge.bundle.manifest import Manifest
from engines.kernels.layout import unpack_weights
from engines.kernels.reference import top_k, w4_gemv
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


class TopKParts(OpRun):  # type: ignore[misc]
    """The plugin: of each part its best, in order of place."""

    op_domain = NAMESPACE

    def _run(self, logits: Any, keep: Any, **_attributes: Any) -> Any:
        assert (logits.dtype, keep.dtype) == (np.float16, np.float32)
        shape = TOP_K_PARTS.output_shapes([logits.shape, keep.shape], NUMBERS)
        keys = np.full(shape[0], NO_KEY, np.int32)
        stats = np.empty(shape[1], np.float32)
        for at in np.ndindex(*shape[0][:-1]):
            row, part = at[:-1], at[-1]
            found = logits[row][part * PART_LOGITS : (part + 1) * PART_LOGITS]
            count = min(len(keep), len(found))
            best, places, rest = top_k(found[None], count)
            order = np.argsort(places[0])
            bits = best[0, order].view(np.int16).astype(np.int32)
            ordered = np.where(bits < 0, bits ^ 0x7FFF, bits)
            keys[at][:count] = ordered << 16 | places[0, order]
            stats[at] = best[0, 0], rest[0]
        return keys, stats


class TopKMerge(OpRun):  # type: ignore[misc]
    """The plugin."""

    op_domain = NAMESPACE

    def _run(self, keys: Any, stats: Any, **_attributes: Any) -> Any:
        assert (keys.dtype, stats.dtype) == (np.int32, np.float32)
        shapes = TOP_K_MERGE.output_shapes([keys.shape, stats.shape], NUMBERS)
        values = np.empty(shapes[0], np.float16)
        ids, rest = np.empty(shapes[1], np.int32), np.empty(shapes[2], np.float32)
        for row in np.ndindex(keys.shape[:-2]):
            ordered = keys[row] >> 16
            bits = np.where(ordered < 0, ordered ^ 0x7FFF, ordered).astype(np.int16)
            there = keys[row] != NO_KEY
            kept = bits.view(np.float16)[there]
            places = (keys[row] & 0xFFFF) + np.arange(len(keys[row]))[:, None] * PART_LOGITS
            best, order, others = top_k(kept[None], keys.shape[-1])
            values[row], ids[row] = best[0], places[there][order[0]]
            far = np.exp(stats[row][:, 0] - best[0, 0].astype(np.float32)) @ stats[row][:, 1]
            rest[row] = others + far
        return values, ids, rest


AttentionParts.__name__, AttentionJoin.__name__ = PARTS.name, JOIN.name
TopKParts.__name__, TopKMerge.__name__ = TOP_K_PARTS.name, TOP_K_MERGE.name
NO_KEY = -0x80000000


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
    operators = [W4Linear, AttentionParts, AttentionJoin, TopKParts, TopKMerge]
    session = ReferenceEvaluator(load(data, directory), new_ops=operators)
    known = {name: value for name, value in feed.items() if name in session.input_names}
    return dict(zip(session.output_names, session.run(None, known), strict=True))
