"""Both graphs of a vision encoder compute what its checkpoint's published model does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from edge.bundle import io_spec
from edge.bundle.manifest import Manifest, read_manifest
from edge.errors import CheckpointError, ConfigError
from edge.vision.section import IMAGE_ROWS, PIXEL_VALUES, read_vision
from edge_lab.measure.pictures import drawn_tile, relative_error
from export.pipeline import ExportConfig, export_checkpoint
from tests.makers.tiny_models import write_checkpoint
from tests.makers.tiny_vision import encoder_rows, vision_weights, write_vision_checkpoint

Array = NDArray[np.float32]
PIXELS = np.random.RandomState(0).uniform(-1, 1, (3, 3, 32, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vision_checkpoint(tmp_path_factory.mktemp("checkpoints") / "smolvlm")


def _export(checkpoint: Path, output: Path, **options: Any) -> Manifest:
    return export_checkpoint(ExportConfig(str(checkpoint), output=output, **options))


def _wanted(checkpoint: Path, pixels: Array = PIXELS) -> NDArray[np.float64]:
    config = json.loads((checkpoint / "config.json").read_text())
    return encoder_rows(config, vision_weights(config, 5), pixels)


def _run(graph: Path, pixels: Array = PIXELS) -> Array:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    kind = np.float16 if "float16" in session.get_inputs()[0].type else np.float32
    rows: Array = session.run([IMAGE_ROWS], {PIXEL_VALUES: pixels.astype(kind)})[0]
    return rows


def test_float_graphs_compute_the_published_models_rows(checkpoint: Path, tmp_path: Path):
    manifest = _export(checkpoint, tmp_path / "b", quant="fp16")
    section = read_vision(manifest)
    assert section is not None
    assert (section.quant, section.loss) == ("fp16", 0.0)  # the weights are exact in fp16
    wanted = _wanted(checkpoint)
    found = _run(tmp_path / "b" / section.cpu_graph)
    assert found.shape == (3, 4, 64)
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    half = _run(tmp_path / "b" / section.graph)
    assert half.dtype == np.float16
    assert relative_error(half, wanted.astype(np.float32)) < 2e-3
    # A tile's rows do not depend on those beside it.
    np.testing.assert_allclose(
        _run(tmp_path / "b" / section.cpu_graph, PIXELS[1:2]), found[1:2], atol=1e-6
    )


def test_the_files_are_hashed_and_take_what_the_section_says(checkpoint: Path, tmp_path: Path):
    manifest = _export(checkpoint, tmp_path / "b", quant="int4", method="rtn", vision_quant="int8")
    section = read_vision(manifest)
    assert section is not None
    data = manifest.files[f"{section.graph}.data"]
    assert section.weight_bytes == data.num_bytes
    assert f"{section.cpu_graph}.data" in manifest.files
    assert manifest.tensorrt is not None
    assert "11.4" in manifest.tensorrt


def test_int8_weights_lose_what_the_manifest_says(checkpoint: Path, tmp_path: Path):
    manifest = _export(checkpoint, tmp_path / "b", quant="fp16", vision_quant="int8")
    section = read_vision(manifest)
    assert section is not None
    assert section.quant == "int8"
    tile = drawn_tile(32)
    wanted = _wanted(checkpoint, tile).astype(np.float32)
    loss = relative_error(_run(tmp_path / "b" / section.cpu_graph, tile), wanted)
    assert section.loss == pytest.approx(loss, rel=1e-3)
    assert 1e-3 < loss < 0.05
    # Integers, and floats for scales, norms and biases only.
    floats = read_vision(_export(checkpoint, tmp_path / "floats", quant="fp16"))
    assert floats is not None
    assert section.weight_bytes < 0.9 * floats.weight_bytes


def test_rows_are_rotated_as_the_token_table_is(checkpoint: Path, tmp_path: Path):
    """What rotations leave alone: the products of rows with embeddings."""
    products = {}
    for name, rotate in (("plain", False), ("rotated", True)):
        bundle = tmp_path / name
        manifest = _export(checkpoint, bundle, quant="int8", rotate=rotate)
        assert manifest.quantization.rotated is rotate
        table = load_file(bundle / io_spec.EMBEDDINGS_NAME)[io_spec.EMBEDDINGS_TENSOR].astype(
            np.float32
        )
        products[name] = _run(bundle / "vision.cpu.onnx") @ table[:304].T
    np.testing.assert_allclose(products["rotated"], products["plain"], atol=5e-3)
    assert np.abs(products["plain"]).max() > 1


def test_an_export_is_the_same_bytes_again(checkpoint: Path, tmp_path: Path):
    options = {"quant": "fp16", "vision_quant": "int8"}
    first, again = (_export(checkpoint, tmp_path / name, **options) for name in "ab")
    assert first.files == again.files
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_text_model_has_no_encoder_to_store(tmp_path: Path):
    directory = write_checkpoint(tmp_path / "text", "llama")
    with pytest.raises(ConfigError, match="text has no vision encoder"):
        _export(directory, tmp_path / "b", quant="fp16", vision_quant="int8")
    assert "vision" not in _export(directory, tmp_path / "b", quant="fp16").extras


def test_floats_have_the_type_of_the_graph(checkpoint: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="--vision-quant fp16 contradicts --dtype bf16"):
        _export(checkpoint, tmp_path / "b", quant="bf16", vision_quant="fp16")
    section = read_vision(_export(checkpoint, tmp_path / "b", quant="bf16"))
    assert section is not None
    assert section.quant == "bf16"
    assert read_vision(read_manifest(tmp_path / "b")) == section


def test_a_weight_that_is_no_number_is_named(tmp_path: Path):
    name = "model.vision_model.post_layernorm.bias"
    broken = np.zeros(64, np.float32)
    broken[3] = np.inf
    directory = write_vision_checkpoint(tmp_path / "vlm", extra={name: broken})
    with pytest.raises(CheckpointError, match=r"final_norm.bias holds NaN or infinite"):
        _export(directory, tmp_path / "b", quant="fp16")
    assert not (tmp_path / "b").exists()
