"""Writes an EAGLE-3 head beside the decoder: two graphs, their weights, the ids of its tokens."""

from __future__ import annotations

import json

import numpy as np

from edge.bundle.manifest import Dialect, DraftHead, FloatType, Graphs
from edge_make.recipe import Recipe

from .bundle import BundleWriter
from .config import ExportRecipe
from .decoder_files import Output, linear_info, store_linear, store_ropes
from .graph.data_file import open_data_file
from .graph.decoder import DecoderTensors
from .graph.graph_builder import NUMPY_TYPE
from .graph.head import build_head
from .graph.linear_nodes import StoredLinear
from .quantize.linear import convert
from .quantize.plan import LinearPlan, nearest_rows
from .sources.eagle3 import Eagle3Head, head_linears, head_norms

_GRAPHS = Graphs(decoder="eagle3.onnx", cpu="eagle3.cpu.onnx")
_VOCABULARY = "eagle3.vocabulary.json"


def write_head(
    writer: BundleWriter,
    recipe: ExportRecipe,
    dialect: Dialect,
    head: Eagle3Head,
    positions: int,
    kv_capacity: int,
) -> DraftHead:
    """Write a head's files; return what the manifest says about it.

    Its weights are INT8, rounded to nearest, if the model's are integers: every guess reads all of
    them, and a wrong guess changes no answer. Otherwise they are floats.

    Args:
        writer: writer of the bundle.
        recipe: how the model's numbers are stored.
        dialect: dialect of the graph.
        head: the head to write.
        positions: rows of the RoPE tables, as many as the model's: the cache may be as long.
        kv_capacity: rows of its cache, as many as the model's.

    Raises:
        ConfigError: no group size divides its widths.
        CheckpointError: a weight is not finite, or the graph's type cannot hold it.
    """
    is_float = recipe.quant in ("fp16", "bf16")
    schemes = Recipe("fp16" if is_float else "int8").schemes(head.spec)
    scale_type = NUMPY_TYPE[recipe.float_type]
    types: tuple[FloatType, FloatType] = (recipe.float_type, "fp32")
    names = (_GRAPHS.decoder, _GRAPHS.cpu)
    infos = {}
    linears: list[dict[str, StoredLinear]] = [{}, {}]
    with (
        open_data_file(writer.path(f"{names[0]}.data")) as decoder,
        open_data_file(writer.path(f"{names[1]}.data")) as cpu,
    ):
        outputs = [Output(file, kind) for file, kind in zip((decoder, cpu), types, strict=True)]
        for layer in head_linears(head.spec):
            scheme = schemes[layer.name]
            rounding = nearest_rows(scheme, "mse", scale_type)
            plan = LinearPlan(layer, scheme, head, rounding)
            tensors = convert(plan, scale_type, lambda weights: None)
            stored = store_linear(plan, tensors, outputs, wide_input_scales=False)
            for each, one in zip(linears, stored, strict=True):
                each[layer.name] = one
            infos[layer.name] = linear_info(plan, stored[0], tensors)
        parts = [
            DecoderTensors(
                own,
                {
                    norm.name: output.add(f"{norm.name}.weight", head.tensor(norm.source))
                    for norm in head_norms(head.spec)
                },
                store_ropes(head.spec, positions, output),
            )
            for own, output in zip(linears, outputs, strict=True)
        ]
    norm_first = head.norm_before_residual
    for name, kind, part in zip(names, types, parts, strict=True):
        graph = build_head(
            head.spec, dialect, kind, part, kv_capacity, norm_before_residual=norm_first
        )
        writer.write_bytes(name, graph.SerializeToString())
    if head.vocabulary is not None:
        writer.write_bytes(_VOCABULARY, _encode(head.vocabulary))
    return DraftHead(
        name=head.name,
        sha256=head.sha256,
        model=head.spec,
        layers=head.layers,
        norm_before_residual=head.norm_before_residual,
        linears=infos,
        vocabulary=None if head.vocabulary is None else _VOCABULARY,
        graphs=_GRAPHS,
    )


def _encode(ids: np.ndarray) -> bytes:
    return json.dumps(ids.tolist(), separators=(",", ":")).encode()
