"""The token table in either type: what the runtime reads back, and what it costs."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from edge.bundle.embeddings import EmbeddingTable
from edge.bundle.io_spec import EMBEDDINGS_NAME
from edge.bundle.manifest import read_manifest
from edge.errors import CheckpointError, ConfigError
from edge_make.recipe import Recipe
from edge_make.safetensors_writer import write_safetensors
from export.forecast import estimated_bytes
from export.graph import embedding_table
from export.graph.embedding_table import EmbeddingType, embedding_tensors, quantize_table_rows
from export.pipeline import ExportConfig, export_checkpoint
from export.quantize.recipe import read_recipe
from tests.makers.manifests import make_model
from tests.makers.tiny_models import write_checkpoint

KINDS: tuple[EmbeddingType, ...] = ("fp16", "int8")
rows_of_floats = arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 9)),
    elements=st.floats(-65504, 65504, width=32),
)


@settings(max_examples=200, deadline=None)
@given(rows=rows_of_floats)
def test_rounding_is_within_half_a_step_of_each_row(rows: NDArray[np.float32]):
    integers, scales = quantize_table_rows(rows)
    assert integers.dtype == np.int8
    assert (scales > 0).all()
    assert np.isfinite(scales).all()
    largest = np.abs(rows).max(axis=1)
    error = np.abs(integers.astype(np.float64) * scales[:, None] - rows)
    assert (error <= largest[:, None] / 254 * 1.001 + 1e-35).all()
    reached = largest > 1e-30
    assert (np.abs(integers).max(axis=1)[reached] == 127).all()


def test_the_runtime_reads_what_was_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(embedding_table, "_CHUNK_ROWS", 7)  # 40 rows: the last chunk is short
    table = np.random.RandomState(0).randn(40, 24).astype(np.float32)
    table[11] = 0
    written: list[int] = []
    write_safetensors(tmp_path / "t", embedding_tensors(table, "int8", written.append))
    integers, scales = quantize_table_rows(table)
    with_library = pytest.importorskip("safetensors.numpy").load_file(tmp_path / "t")
    np.testing.assert_array_equal(with_library["token_embeddings"], integers)
    np.testing.assert_array_equal(with_library["token_embeddings.scale"], scales)
    runtime = EmbeddingTable(tmp_path / "t")
    expected = (integers * scales[:, None]).astype(np.float16)
    np.testing.assert_array_equal(runtime[np.arange(40)], expected)
    runtime.close()
    assert written == [24 * done for done in (7, 14, 21, 28, 35, 40)]


@pytest.mark.parametrize("kind", ["fp16", "int8"])
@pytest.mark.parametrize(("value", "message"), [(np.nan, "NaN or infinite"), (7e4, "FP16 ends")])
def test_values_that_the_table_cannot_hold_are_refused(
    tmp_path: Path, kind: Any, value: float, message: str
):
    table = np.ones((3, 4), np.float32)
    table[1, 2] = value
    with pytest.raises(CheckpointError, match=message):
        write_safetensors(tmp_path / "t", embedding_tensors(table, kind, lambda _: None))


def test_an_int8_table_in_a_bundle(tmp_path: Path):
    source = write_checkpoint(tmp_path / "model", "llama", vocab_size=2048)
    sizes, tables = {}, {}
    for kind in KINDS:
        config = ExportConfig(
            source=str(source), output=tmp_path / kind, quant="int8", embeddings=kind
        )
        manifest = export_checkpoint(config)
        assert manifest == read_manifest(config.output)
        assert manifest.quantization.embeddings == kind
        table = EmbeddingTable(config.output / EMBEDDINGS_NAME)
        tables[kind] = table[np.arange(2048)].astype(np.float64)
        table.close()
        sizes[kind] = manifest.files[EMBEDDINGS_NAME].num_bytes
    assert sizes["int8"] < 0.57 * sizes["fp16"]
    error = np.linalg.norm(tables["int8"] - tables["fp16"]) / np.linalg.norm(tables["fp16"])
    assert 0.001 < error < 0.01


def test_the_estimate_knows_the_type():
    model = make_model()
    schemes = Recipe("fp16").schemes(model)
    row_bytes = {
        kind: (estimated_bytes(model, schemes, 64, kind) - estimated_bytes(model, schemes, 64))
        for kind in KINDS
    }
    assert row_bytes["int8"] == -model.vocab_size * (model.hidden_size - 4)


def test_a_recipe_may_ask_for_it(tmp_path: Path):
    path = tmp_path / "recipe.toml"
    path.write_text('embeddings = "int8"\n')
    assert read_recipe(path) == {"embeddings": "int8"}
    path.write_text('embeddings = "int4"\n')
    with pytest.raises(ConfigError, match="embeddings"):
        read_recipe(path)
    with pytest.raises(ConfigError, match="--embeddings int4 is unknown; use fp16 or int8"):
        ExportConfig(source="x", output=tmp_path / "y", embeddings="int4")  # type: ignore[arg-type]


def test_the_table_streams_through(tmp_path: Path):
    table = np.ones((100_000, 64), np.float16)
    tracemalloc.start()
    write_safetensors(tmp_path / "t", embedding_tensors(table, "int8", lambda _: None))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < table.nbytes
