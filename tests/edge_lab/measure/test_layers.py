"""Which layer drifts first, and ``edge-llm verify --layers``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from edge.backends.ort.cpu import OrtBackend
from edge.backends.step import prefill
from edge.bundle import io_spec
from edge.bundle.embeddings import EmbeddingTable
from edge.bundle.manifest import read_manifest
from edge.bundle.onnx_file import OnnxFile, tensor_info
from edge.errors import BundleError, ConfigError
from edge_lab.cli.verify import verify
from edge_lab.measure.layers import CpuLayers, LayerReport, compare_layers
from edge_make.graph_edits import add_output
from tests.conftest import RUNNABLE, TINY_KV_CAPACITY, Bundles, Checkpoints, require_kernels
from tests.standins.cuda import FakeGpu
from tests.standins.tensorrt import write_engine

PROMPTS = [[5, 17, 200, 3, 90, 41, 8], [77]]
STEPS = 6


@pytest.fixture
def bundle(tiny_bundles: Bundles) -> Path:
    return tiny_bundles("qwen2")


@pytest.fixture(scope="module")
def rounded(tiny_checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """INT4 with a float head: the fast path rounds the activations of every layer."""
    from export.pipeline import ExportConfig, export_checkpoint

    output = tmp_path_factory.mktemp("rounded") / "bundle"
    export_checkpoint(
        ExportConfig(
            source=str(tiny_checkpoints("qwen2")),
            output=output,
            quant="int4",
            group_size=32,
            method="rtn",
            keep=(("lm_head", "float"),),
            dialect=RUNNABLE,
            kv_capacity=TINY_KV_CAPACITY,
        )
    )
    return output


def layers_of(bundle: Path, **options: Any) -> CpuLayers:
    options = {"fuse_attention": False, "int8_activations": False, "capacity": 16, **options}
    return CpuLayers(bundle, read_manifest(bundle), **options)


def compare(
    bundle: Path, candidate: CpuLayers, floor: float = 0.999, **options: Any
) -> LayerReport:
    table = EmbeddingTable(bundle / io_spec.EMBEDDINGS_NAME)
    options = {"decode_steps": STEPS, **options}
    return compare_layers(layers_of(bundle), candidate, PROMPTS, table, floor=floor, **options)


def spoil(bundle: Path, target: Path, tensor: str) -> Path:
    """Copy a bundle, with a weight of noise; nothing checks the hashes of what is open already."""
    copy = Path(shutil.copytree(bundle, target))
    graph = OnnxFile((copy / read_manifest(copy).graphs.cpu).read_bytes())
    stored = graph.external_tensors()[tensor]
    with (copy / stored.file).open("r+b") as file:
        file.seek(stored.offset)
        values = np.random.default_rng(0).standard_normal(stored.shape) * 0.1
        file.write(values.astype({"fp16": "f2", "fp32": "f4"}[stored.dtype]).tobytes())
    return copy


@pytest.mark.parametrize("kind", ["qwen2", "llama", "qwen3"])
@pytest.mark.parametrize("dialect", ["native", "portable"])
def test_the_rewritten_attention_drifts_in_no_layer(
    tiny_bundles: Bundles, kind: Any, dialect: str
) -> None:
    require_kernels(dialect)
    bundle = tiny_bundles(kind, dialect)
    report = compare(bundle, layers_of(bundle, fuse_attention=True), floor=0.99999, max_tokens=3)
    assert report.passed
    assert report.positions == 8 + 2 * STEPS
    assert [each.layer for each in report.layers] == [0, 1]
    assert all(each.max_error < 1e-3 for each in report.layers)


@pytest.mark.parametrize("dialect", ["native", "portable"])
@pytest.mark.parametrize("fused", [False, True])
def test_cpu_layers_compute_the_backends_logits(
    tiny_bundles: Bundles, dialect: str, fused: bool
) -> None:
    require_kernels(dialect)
    bundle = tiny_bundles("qwen2", dialect)
    backend = OrtBackend(bundle, read_manifest(bundle), fuse_attention=fused)
    table = EmbeddingTable(bundle / io_spec.EMBEDDINGS_NAME)
    layers = layers_of(bundle, fuse_attention=fused)
    ids = PROMPTS[0]
    for part, logits in prefill(backend, table, ids, max_tokens=3):
        found, ours = layers.run(part.start, table[np.array(ids[part])])
        width = read_manifest(bundle).model.hidden_size
        assert [rows.shape for rows in found.values()] == 2 * [(part.stop - part.start, width)]
        np.testing.assert_allclose(ours, logits[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("tensor", "first"), [("layers.0.qkv.weight", 0), ("layers.1.down.weight", 1)]
)
def test_the_first_layer_that_differs_is_named(
    bundle: Path, tmp_path: Path, tensor: str, first: int
) -> None:
    report = compare(bundle, layers_of(spoil(bundle, tmp_path / "spoilt", tensor)))
    assert report.first == first
    assert not report.passed
    sound = report.layers[:first]
    assert all(each.min_cosine == pytest.approx(1) and each.max_error < 1e-5 for each in sound)
    assert report.layers[first].max_error > 0.01


def test_values_that_are_no_numbers_are_below_every_floor(bundle: Path) -> None:
    class NotFinite(CpuLayers):
        def run(self, start: int, embeds: Any) -> Any:
            found, logits = super().run(start, embeds)
            found["1"][0, 0] = np.inf if start else 0
            return found, logits

    wrong = NotFinite(
        bundle, read_manifest(bundle), capacity=16, fuse_attention=False, int8_activations=False
    )
    report = compare(bundle, wrong, floor=-1)
    assert report.first == 1
    assert np.isnan(report.layers[1].min_cosine)


def test_unlike_runs_are_not_compared(bundle: Path) -> None:
    with pytest.raises(ConfigError, match="1 to 4 tokens"):
        compare(bundle, layers_of(bundle), decode_steps=12)
    graph = OnnxFile((bundle / "decoder.onnx").read_bytes())
    with pytest.raises(BundleError, match=r"no tensor 'layers\.9"):
        add_output(graph, tensor_info(io_spec.layer_output(9), 1, ("batch", "seq", 64)))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(verify, [str(argument) for argument in arguments])


def test_the_verb_measures_rounded_activations_by_layer(rounded: Path) -> None:
    options = "--layers", "--decode-steps", 4
    good = run(rounded, *options, "--json")
    assert good.exit_code == 0, good.output
    report = json.loads(good.stdout)
    assert (report["backend"], report["passed"], report["first"]) == ("ort-cpu", True, None)
    errors = [layer["max_error"] for layer in report["layers"]]
    assert len(errors) == 2
    assert all(1e-4 < error < 1 for error in errors)
    assert "passed: no layer is below 0.95" in run(rounded, *options).stdout
    missed = run(rounded, *options, "--min-cosine", 1)
    assert missed.exit_code == 3
    assert "MISSED: layer 0 is the first below 1" in missed.stdout
    assert json.loads(run(rounded, *options, "--min-cosine", 1, "--json").stdout)["first"] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-kl", "1"], "--max-kl has no effect with --layers"),
        (["--min-top1", "1"], "--min-top1 has no effect"),
        (["--min-cache-cosine", "1"], "--min-cache-cosine has no effect"),
        (["--decode-steps", "200"], "--kv-capacity"),
    ],
)
def test_options_that_do_not_go_with_layers(bundle: Path, options: list[str], words: str) -> None:
    refused = run(bundle, "--layers", *options).exception
    assert isinstance(refused, ConfigError)
    assert words in str(refused)


@pytest.mark.parametrize("dialect", ["native", "portable"])
def test_an_engine_is_compared_by_what_its_layers_cached(
    tiny_bundles: Bundles, tmp_path: Path, gpu: FakeGpu, dialect: str
) -> None:
    require_kernels(dialect)
    copy = Path(shutil.copytree(tiny_bundles("qwen2", dialect), tmp_path / "bundle"))
    write_engine(copy, max_prefill=24)
    result = run(copy, "--layers", "--decode-steps", 4, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["backend"], report["compared"]) == ("tensorrt", "cache")
    assert report["positions"] > 24  # more than one step
    assert all(layer["min_cosine"] > 0.9999 for layer in report["layers"])
    assert run(copy, "--layers", "--backend", "ort-cpu", "--decode-steps", 2).exit_code == 0


class _Cuda(OrtBackend):
    name = "ort-cuda"


@pytest.mark.parametrize(
    ("tensor", "first", "words"),
    [
        ("layers.0.qkv.weight", 0, "norm, projection or rotation"),
        ("layers.0.down.weight", 1, "or in layer 0 after it"),
    ],
)
def test_the_cache_names_the_layer_before_which_an_engine_drifts(
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tensor: str,
    first: int,
    words: str,
) -> None:
    wrong = spoil(bundle, tmp_path / "spoilt", tensor)
    monkeypatch.setattr(
        "edge.backends.choose.open_backend",
        lambda _bundle, manifest, _config: _Cuda(wrong, manifest, max_step_tokens=24),
    )
    # By itself, as where ONNX Runtime has CUDA and the bundle no engine; without CUDA it is not
    # opened, only to be closed for the CPU's layers.
    assert run(bundle, "--layers", "--decode-steps", 4).exit_code == 0
    monkeypatch.setattr("edge.backends.choose._has_cuda_provider", lambda: True)
    result = run(bundle, "--layers", "--decode-steps", 4)
    assert result.exit_code == 3
    assert f"MISSED: layer {first} is the first below" in result.stdout
    assert words in " ".join(result.stdout.split())
