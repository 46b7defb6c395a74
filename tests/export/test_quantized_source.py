"""Exports of checkpoints that others quantized: the bundle holds their integers, and says so."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from edge.backends.ort import cpu
from edge.backends.ort.join_planes import join_planes
from edge.backends.step import step_after
from edge.bundle.linears import LinearSpec, linear_layers
from edge.bundle.manifest import Dialect, Manifest, read_manifest
from edge.bundle.schemes import HIGH_PLANE, stored_bytes
from edge.cli import cli
from edge.errors import ConfigError
from edge_make.manifest_text import describe_from_source
from export import pipeline
from export.bundle import BundleWriter
from export.pipeline import ExportConfig, export_checkpoint
from export.quantize import from_source
from export.quantize.packing import unpack_int4
from export.sources.opening import open_checkpoint
from export.sources.quantization_config import Inputs, WeightFormat
from tests.conftest import require_kernels
from tests.edge.backends.runner import Runner
from tests.makers.quantized_golden import (
    IDS,
    NAMES,
    NUM_LOGITS,
    QuantizedGolden,
    change_config,
    read_raw,
    write_base,
    write_raw,
)
from tests.makers.tiny_adapters import write_adapter

FLOATS = ("ct-fp8", "ct-nvfp4", "modelopt-fp8", "modelopt-nvfp4")
KEPT = tuple(name for name in NAMES if name not in FLOATS)


def export(source: Path, output: Path, **options: Any) -> Manifest:
    options.setdefault("dialect", "portable")
    return export_checkpoint(ExportConfig(source=str(source), output=output, **options))


def stored_matrix(bundle: Path, name: str) -> NDArray[np.float32]:
    """What a linear of the engine's graph multiplies its inputs with, ``[in, out]``."""
    model = onnx.load(str(bundle / "decoder.onnx"))
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}

    def array(part: str) -> NDArray[np.float32] | None:
        tensor = tensors.get(f"{name}.{part}")
        if tensor is None:
            return None
        if tensor.data_type == onnx.TensorProto.INT4:
            packed = np.frombuffer(tensor.raw_data, np.uint8)
            return unpack_int4(packed, tuple(tensor.dims)).astype(np.float32)
        floats: NDArray[np.float32] = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        return floats

    def spread(scale: NDArray[np.float32]) -> NDArray[np.float32]:
        rows = np.atleast_2d(scale)
        return rows.repeat(width // len(rows), axis=0)

    weight, scale, high = array("weight"), array("scale"), array("high_weight")
    assert weight is not None
    width = len(weight)
    if scale is None:
        return weight
    if high is not None:
        high_scale = array("high_scale")
        assert high_scale is not None
        assert_array_equal(high_scale, scale * HIGH_PLANE)
        weight = weight + HIGH_PLANE * high
    matrix = weight * spread(scale)
    if (offset := array("offset")) is not None:
        matrix = matrix + spread(offset)
    order = tensors.get(f"{name}.input_order")
    if order is not None:
        result = np.empty_like(matrix)
        result[onnx.numpy_helper.to_array(order)] = matrix
        return result
    return matrix


def source_matrix(source: Path, name: str) -> NDArray[np.float32]:
    with open_checkpoint(str(source)) as checkpoint:
        (layer,) = (each for each in linear_layers(checkpoint.spec) if each.name == name)
        parts = [checkpoint.tensor(weight).astype(np.float32) for weight in layer.weights]
    matrix: NDArray[np.float32] = np.concatenate(parts).T
    return matrix


@pytest.mark.parametrize("name", KEPT)
def test_the_bundle_holds_the_weights_of_the_source(name: str, tmp_path: Path) -> None:
    source = QuantizedGolden.load(name).write(tmp_path / name)
    bundle = tmp_path / "bundle"
    manifest = export(source, bundle)
    assert (manifest.quantization.name, manifest.quantization.method) == ("source", "source")
    kept = 0
    for layer, info in manifest.quantization.linears.items():
        found, exact = stored_matrix(bundle, layer), source_matrix(source, layer)
        if info.from_source is None:
            assert info.scheme.kind == "float"
            continue
        kept += 1
        assert info.from_source.treatment == "kept"
        assert (info.from_source.changed_groups, info.from_source.relative_error) == (0, 0.0)
        # Offsets are rounded to fp16; they are less than four times the largest weight.
        assert_allclose(found, exact, rtol=0, atol=2**-10 * np.abs(exact).max() * info.offsets)
        if info.scheme.kind == "int4" and not info.offsets:
            assert_array_equal(found, exact)
    assert kept == {"ct-w8a16": 2, "ct-w8a8-static": 3}.get(name, 4)


@pytest.mark.parametrize("dialect", ["portable", "native"])
@pytest.mark.parametrize("name", NAMES)
def test_the_bundle_answers_as_the_dequantized_model(
    name: str, dialect: Dialect, tmp_path: Path
) -> None:
    require_kernels(dialect)
    golden = QuantizedGolden.load(name)
    export(golden.write(tmp_path / name), tmp_path / "bundle", dialect=dialect)
    # Some tools round the weights of their own reference: GPTQModel and AutoRound to fp16, NVFP4 of
    # compressed-tensors to bf16. In ours float layers are fp16.
    atol = {"float32": 1e-4, "float16": 0.01, "bfloat16": 0.06}[golden.weights_type]
    if name in FLOATS:
        atol = max(atol, 0.04)
    with Runner(tmp_path / "bundle", int8_activations=False) as runner:
        logits = runner.step(IDS[None])[0, -1, :NUM_LOGITS]
    assert np.abs(golden.logits).max() > 5
    assert_allclose(logits, golden.logits, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["awq", "ct-w8a16", "gptq-asym-act-order"])
def test_every_way_to_run_it_on_a_cpu_answers_alike(name: str, tmp_path: Path) -> None:
    """Rounded activations, prompts in INT8, and ONNX Runtime's own products of joined planes."""
    golden = QuantizedGolden.load(name)
    export(golden.write(tmp_path / name), tmp_path / "bundle")
    expected = golden.logits / np.linalg.norm(golden.logits)
    ways: list[dict[str, Any]] = [{}, {"int8_prompts": True}, {"int8_activations": True}]
    for options in ways:
        with Runner(tmp_path / "bundle", **options) as runner:
            step = step_after([0], [0], runner.table[IDS[None]], np.array([[len(IDS) - 1]]))
            logits = np.array(runner.backend.forward(step))[0, -1, :NUM_LOGITS]
        assert expected @ logits / np.linalg.norm(logits) > 0.998, options


def test_planes_with_offsets_that_stay_products_of_floats_answer_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ONNX Runtime gets them on CUDA, and on a CPU where a layer's outputs are odd in number."""
    golden = QuantizedGolden.load("ct-w8a16")
    manifest = export(golden.write(tmp_path / "source"), tmp_path / "bundle")
    linears = manifest.quantization.linears.values()
    assert any(linear.scheme.planes and linear.offsets for linear in linears)
    monkeypatch.setattr(cpu, "join_planes", lambda *given, **_options: join_planes(*given))
    with Runner(tmp_path / "bundle", int8_activations=True) as runner:
        step = step_after([0], [0], runner.table[IDS[None]], np.array([[len(IDS) - 1]]))
        logits = np.array(runner.backend.forward(step))[0, -1, :NUM_LOGITS]
    cosine = golden.logits @ logits / np.linalg.norm(golden.logits) / np.linalg.norm(logits)
    assert cosine > 0.998


def test_asymmetric_groups_take_four_bits_and_an_offset(tmp_path: Path) -> None:
    source = QuantizedGolden.load("awq").write(tmp_path / "awq")
    linears = export(source, tmp_path / "bundle").quantization.linears
    info = linears["layers.0.gate_up"]
    assert str(info.scheme) == "int4-g32"
    assert info.offsets
    weight, scales = 64 * 128 // 2, 2 * 128 * 2
    assert info.num_bytes == weight + 2 * scales


@pytest.mark.parametrize("name", ["awq", "auto-round-gptq", "ct-w8a16", "gptq"])
def test_the_disk_space_that_is_asked_for_has_room_for_offsets(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the fixed margin, which is larger than these models."""
    asked = []

    class Recording(BundleWriter):
        def __init__(self, *args: Any, **options: Any) -> None:
            asked.append(options["required_bytes"])
            super().__init__(*args, **options)

    monkeypatch.setattr(pipeline, "BundleWriter", Recording)
    source = QuantizedGolden.load(name).write(tmp_path / "source")
    manifest = export(source, tmp_path / "bundle", report=False)
    model, linears = manifest.model, manifest.quantization.linears.values()
    # What is no weight is in the CPU twin once more, in FP32.
    stored = sum(
        3 * info.num_bytes - 2 * stored_bytes(info.shape, info.scheme)[0] for info in linears
    )
    stored += 2 * model.vocab_size * model.hidden_size
    stored += 6 * manifest.rope_positions * model.attentions()[0].dim
    assert any(info.offsets for info in linears) == (name != "gptq")
    assert stored <= asked[0] - (64 << 20) < 1.1 * stored


def test_act_order_reorders_the_inputs_where_all_parts_agree(tmp_path: Path) -> None:
    golden = QuantizedGolden.load("gptq-asym-act-order")
    source = golden.write(tmp_path / "source")
    linears = export(source, tmp_path / "bundle").quantization.linears
    assert {name for name, info in linears.items() if info.reordered} == {
        "layers.0.qkv",
        "layers.0.o",
        "layers.0.gate_up",
        "layers.0.down",
    }
    # Another order of one part: no order of the inputs fits both.
    path = source / "model.safetensors"
    tensors = read_raw(path)
    kind, shape, raw = tensors["model.layers.0.mlp.up_proj.g_idx"]
    groups = np.roll(np.frombuffer(raw, np.int32), 1)
    tensors["model.layers.0.mlp.up_proj.g_idx"] = (kind, shape, groups.tobytes())
    write_raw(path, tensors)
    manifest = export(source, tmp_path / "other")
    found = manifest.quantization.linears["layers.0.gate_up"].from_source
    assert found is not None
    assert found.treatment == "requantized"
    assert found.note == "its parts do not share an act-order"
    assert 0.01 < found.relative_error < 0.2
    line = describe_from_source(manifest)
    assert line is not None
    assert "1 of 4 layers rounded anew" in line
    assert "do not share an act-order" in line
    exact = source_matrix(source, "layers.0.gate_up")
    error = np.linalg.norm(stored_matrix(tmp_path / "other", "layers.0.gate_up") - exact)
    assert np.isclose(error / np.linalg.norm(exact), found.relative_error, rtol=0.01)


def test_int8_inputs_are_rounded_as_in_the_source_or_stay_float(tmp_path: Path) -> None:
    golden = QuantizedGolden.load("ct-w8a8-static")
    source = golden.write(tmp_path / "source")
    quantization = export(source, tmp_path / "bundle").quantization
    assert not quantization.smoothed
    info = quantization.linears["layers.0.qkv"]
    with open_checkpoint(str(source)) as checkpoint:
        weight = checkpoint.quantized_weight("model.layers.0.self_attn.q_proj.weight")
    assert weight is not None
    assert info.scheme.kind == "w8a8"
    assert info.activation_scale == weight.input_scale

    golden = QuantizedGolden.load("ct-w8a8-dynamic")
    source = golden.write(tmp_path / "per-token")
    linears = dict(export(source, tmp_path / "per-token-bundle").quantization.linears)
    assert linears.pop("lm_head").scheme.kind == "float"
    assert {(each.scheme.kind, each.per_token) for each in linears.values()} == {("w8a8", True)}
    assert {each.rotation_block for each in linears.values()} == {0}

    group = golden.config["config_groups"]["group_0"]
    changed = {**group["input_activations"], "strategy": "tensor"}
    groups = {"group_0": {**group, "input_activations": changed}}
    change_config(source, quantization_config={**golden.config, "config_groups": groups})
    info = export(source, tmp_path / "dynamic").quantization.linears["layers.0.qkv"]
    assert (info.scheme.kind, info.scheme.planes) == ("int8", True)
    assert info.from_source is not None
    assert info.from_source.note is not None
    assert "inputs stay float" in info.from_source.note


@pytest.mark.parametrize(
    ("inputs", "bits", "kind"),
    [
        (("per-token", "per-token"), 8, "w8a8"),
        (("static", "static"), 8, "w8a8"),
        (("static", "per-token"), 8, "int8"),  # the parts of a layer read the same inputs
        (("dynamic", "dynamic"), 8, "int8"),
        (("per-token", "per-token"), 4, "int4"),
    ],
)
def test_a_layer_is_w8a8_only_if_its_parts_are_alike(
    inputs: tuple[Inputs, Inputs], bits: int, kind: str
) -> None:
    formats = {
        name: WeightFormat("int8" if bits == 8 else "packed", bits, inputs=each)
        for name, each in zip("qk", inputs, strict=True)
    }
    checkpoint: Any = SimpleNamespace(weight_format=formats.get)
    layer = LinearSpec("layers.0.qkv", ("q", "k"), (), (128, 128), (64, 64))
    assert from_source._scheme(checkpoint, layer).kind == kind


def test_fp8_and_nvfp4_become_fp16_and_that_is_said(tmp_path: Path) -> None:
    for name in FLOATS:
        num_layers = 3 if name == "ct-fp8" else 4  # down is not quantized there
        source = QuantizedGolden.load(name).write(tmp_path / name)
        manifest = export(source, tmp_path / f"{name}.bundle")
        assert {str(info.scheme) for info in manifest.quantization.linears.values()} == {"float"}
        line = describe_from_source(manifest)
        assert line is not None
        assert f"{num_layers} of {num_layers} layers dequantized to fp16" in line
        assert ("stored in different ways" in line) == (name == "ct-fp8")  # gate is not quantized
        exact = source_matrix(source, "layers.0.down")
        found = stored_matrix(tmp_path / f"{name}.bundle", "layers.0.down")
        assert_array_equal(found, exact.astype(np.float16))


def test_another_quant_quantizes_anew_and_says_so(tmp_path: Path) -> None:
    source = QuantizedGolden.load("awq").write(tmp_path / "awq")
    manifest = export(source, tmp_path / "bundle", quant="int8", rotate=False)
    assert {info.from_source for info in manifest.quantization.linears.values()} == {None}
    assert describe_from_source(manifest) == (
        "awq, 4 bits, groups of 32, asymmetric; dequantized, then exported as int8"
    )
    exact = source_matrix(source, "layers.0.down")
    error = np.linalg.norm(stored_matrix(tmp_path / "bundle", "layers.0.down") - exact)
    assert error < 0.01 * np.linalg.norm(exact)


def test_keep_overrides_single_layers(tmp_path: Path) -> None:
    source = QuantizedGolden.load("gptq").write(tmp_path / "gptq")
    keep = (("lm_head", "int8"), ("*.down", "float"))
    linears = export(source, tmp_path / "bundle", keep=keep).quantization.linears
    assert linears["lm_head"].scheme.kind == "int8"
    assert linears["lm_head"].from_source is None
    down, qkv = linears["layers.0.down"].from_source, linears["layers.0.qkv"].from_source
    assert down is not None
    assert (down.treatment, down.note) == ("dequantized", "as --keep asks")
    assert qkv is not None
    assert qkv.treatment == "kept"


def test_an_adapter_is_merged_into_dequantized_weights(tmp_path: Path) -> None:
    source = QuantizedGolden.load("gptq").write(tmp_path / "gptq")
    # The tiny adapters are written for a float base of the same shapes.
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "tuned", base, {"target_modules": ["down_proj"]})
    manifest = export(source, tmp_path / "bundle", lora=adapter)
    linears = manifest.quantization.linears
    down, qkv = linears["layers.0.down"].from_source, linears["layers.0.qkv"].from_source
    assert down is not None
    assert (down.treatment, down.note) == ("requantized", "an adapter is merged into it")
    assert str(linears["layers.0.down"].scheme) == "int4-g32"
    assert qkv is not None
    assert qkv.treatment == "kept"


def test_groups_shorter_than_the_graphs_are_rounded_anew(tmp_path: Path) -> None:
    """Groups of 16: the scales of the golden file, each twice."""
    golden = QuantizedGolden.load("gptq")
    source = golden.write(tmp_path / "gptq")
    path = source / "model.safetensors"
    tensors = read_raw(path)
    for name, (kind, shape, raw) in tensors.items():
        if name.endswith((".scales", ".qzeros")):
            rows = np.frombuffer(raw, np.uint8).reshape(shape[0], -1).repeat(2, axis=0)
            tensors[name] = (kind, (2 * shape[0], shape[1]), rows.tobytes())
        if name.endswith(".g_idx"):
            tensors[name] = (kind, shape, (np.arange(64, dtype=np.int32) // 16).tobytes())
    write_raw(path, tensors)
    change_config(source, quantization_config={**golden.config, "group_size": 16})
    found = export(source, tmp_path / "bundle").quantization.linears["layers.0.down"].from_source
    assert found is not None
    assert found.treatment == "requantized"
    assert found.note == "no groups of 16 in the graph"


def test_a_reduced_vocabulary_keeps_the_integers(tmp_path: Path) -> None:
    source = QuantizedGolden.load("awq").write(tmp_path / "awq")
    keep = tmp_path / "keep.txt"
    keep.write_text("hello world, what is in the world")
    manifest = export(source, tmp_path / "bundle", vocab_keep=keep)
    treatments = [
        info.from_source.treatment
        for info in manifest.quantization.linears.values()
        if info.from_source is not None
    ]
    assert treatments == ["kept"] * 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "awq"}, "--method awq has no effect on .*--quant source"),
        ({"group_size": 32}, "--group-size 32 has no effect"),
        ({"clip": "absmax"}, "--clip absmax has no effect on .*--quant source"),
        ({"rotate": True}, "--rotate has no effect"),
        ({"seed": 1}, "--seed has no effect"),
        ({"keep": (("*.down", "w8a8"),)}, r"--keep \.\.\.=w8a8 has no effect"),
    ],
)
def test_options_that_round_are_refused_where_nothing_is_rounded(
    options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    source = QuantizedGolden.load("gptq").write(tmp_path / "gptq")
    with pytest.raises(ConfigError, match=words):
        export(source, tmp_path / "bundle", quant="source", **options)
    with pytest.raises(ConfigError, match=words):
        export(source, tmp_path / "bundle", **options)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("options", [{"workers": 4}, {"clip": "absmax"}])
def test_the_default_method_is_for_sources_that_are_rounded(
    options: dict[str, Any], tmp_path: Path
) -> None:
    config = ExportConfig("r1", tmp_path, **options)
    with pytest.raises(ConfigError, match="--method"):
        config.resolved("r1", is_quantized=False)
    if "workers" in options:
        assert config.resolved("r1", is_quantized=True).quant == "source"
    else:
        with pytest.raises(ConfigError, match="--clip absmax has no effect on r1") as refusal:
            config.resolved("r1", is_quantized=True)
        assert "--method" not in str(refusal.value)


def test_float_checkpoints_have_no_integers_to_keep(tmp_path: Path) -> None:
    source = write_base(tmp_path / "base")
    with pytest.raises(ConfigError, match="--quant source keeps the integers of a quantized"):
        export(source, tmp_path / "bundle", quant="source")


def test_export_and_inspect_say_what_was_done(tmp_path: Path) -> None:
    source = QuantizedGolden.load("gptq").write(tmp_path / "gptq")
    bundle = tmp_path / "bundle"
    arguments = ["export", str(source), "-o", str(bundle), "--dialect", "portable"]
    done = CliRunner().invoke(cli, [*arguments, "--no-verify"])
    assert done.exit_code == 0, done.output
    line = "gptq, 4 bits, groups of 32, symmetric; 4 of 4 layers kept code for code"
    assert f"the source is quantized: {line}" in done.output
    assert f"{bundle}: gptq, source, " in done.output
    shown = CliRunner().invoke(cli, ["inspect", str(bundle)], env={"COLUMNS": "200"})
    assert line in shown.output
    facts = json.loads(CliRunner().invoke(cli, ["inspect", str(bundle), "--json"]).output)
    assert facts["source"]["quantization"] == {
        "method": "gptq",
        "details": "4 bits, groups of 32, symmetric",
    }
    assert facts["quantization"]["linears"]["layers.0.o"]["from_source"]["treatment"] == "kept"


@pytest.mark.slow
def test_a_kept_bundle_passes_its_gate(tmp_path: Path) -> None:
    source = QuantizedGolden.load("auto-round-gptq").write(tmp_path / "source")
    manifest = export(source, tmp_path / "bundle", verify=True)
    assert manifest == read_manifest(tmp_path / "bundle")
    assert manifest.quality is not None
    # Against the dequantized source: what rounding to fp16 leaves, and INT8 activations.
    assert manifest.quality["text"]["kl_mean"] < 0.01
