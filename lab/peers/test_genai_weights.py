"""What onnxruntime-genai's INT4 weights are, read as ONNX Runtime's own kernel reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.sources.opening import open_checkpoint
from tests.conftest import Checkpoints

from .genai_weights import write

_LAYERS, _GROUP = 2, 32
Array = NDArray[np.float32]


def fused(checkpoint: dict[str, Array]) -> dict[str, Array]:
    """The products of the builder's graph, ``[in, out]`` by its names."""
    found = {}
    for layer in range(_LAYERS):
        old, new = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.attn"
        rows = [checkpoint[f"{old}.{part}_proj.weight"] for part in "qkv"]
        found[f"{new}.qkv_proj"] = np.concatenate(rows).T
        found[f"{new}.o_proj"] = checkpoint[f"{old}.o_proj.weight"].T
        for part in ("gate", "up", "down"):
            name = f"model.layers.{layer}.mlp.{part}_proj"
            found[name] = checkpoint[f"{name}.weight"].T
    return found


def quantized(products: dict[str, Array], *, zero_points: bool = False) -> onnx.ModelProto:
    """Products of these shapes side by side, with any INT4 weights in groups of 32."""
    random = np.random.default_rng(0)
    nodes, inputs, outputs, stored = [], [], [], []
    for index, (name, weight) in enumerate(products.items()):
        width, rows = weight.shape
        groups = -(-width // _GROUP)
        packed = random.integers(0, 256, (rows, groups, _GROUP // 2), dtype=np.uint8)
        scales = random.uniform(0.01, 0.02, (rows, groups)).astype(np.float32)
        names = [f"{name}.MatMul.weight_Q4", f"{name}.MatMul.weight_scales"]
        stored += [
            numpy_helper.from_array(value, each)
            for value, each in zip((packed, scales), names, strict=True)
        ]
        if zero_points:
            names.append(f"{name}.MatMul.zero_points")
            stored.append(numpy_helper.from_array(packed[:, : -(-groups // 2), 0], names[-1]))
        x, y = f"x{index}", f"y{index}"
        shape = {"K": width, "N": rows, "bits": 4, "block_size": _GROUP}
        node = helper.make_node(
            "MatMulNBits", [x, *names], [y], name=f"/{name}", domain="com.microsoft", **shape
        )
        nodes.append(node)
        inputs.append(helper.make_tensor_value_info(x, TensorProto.FLOAT, [None, width]))
        outputs.append(helper.make_tensor_value_info(y, TensorProto.FLOAT, None))
    graph = helper.make_graph(nodes, "genai", inputs, outputs, stored)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def tensors(directory: Path) -> dict[str, Array]:
    with open_checkpoint(str(directory)) as checkpoint:
        assert checkpoint.spec.num_layers == _LAYERS
        return {
            name: checkpoint.tensor(name).astype(np.float32)
            for name in (
                "model.embed_tokens.weight",
                "model.norm.weight",
                *(
                    f"model.layers.{layer}.{part}.weight"
                    for layer in range(_LAYERS)
                    for part in (
                        *(f"self_attn.{each}_proj" for each in "qkvo"),
                        *(f"mlp.{each}_proj" for each in ("gate", "up", "down")),
                        "input_layernorm",
                    )
                ),
            )
        }


def test_the_checkpoint_has_the_weights_that_the_kernel_computes_with(
    tiny_checkpoints: Checkpoints, tmp_path: Path
):
    source = tiny_checkpoints("qwen2")
    before = tensors(source)
    products = fused(before)
    model = quantized(products)
    (tmp_path / "genai").mkdir()
    onnx.save(model, tmp_path / "genai" / "model.onnx")
    write(tmp_path / "genai", source, tmp_path / "floats")
    after = tensors(tmp_path / "floats")

    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    # Rows of the unit matrix give the weights themselves.
    feed = {f"x{i}": np.eye(len(w), dtype=np.float32) for i, w in enumerate(products.values())}
    kernel = dict(zip(products, session.run(None, feed), strict=True))
    for name, weight in fused(after).items():
        np.testing.assert_allclose(weight, kernel[name], rtol=2e-3, atol=1e-6)
    for name, value in after.items():
        if "proj" not in name:
            np.testing.assert_array_equal(value, before[name])


def test_what_the_builder_does_not_write_is_refused(tiny_checkpoints: Checkpoints, tmp_path: Path):
    source = tiny_checkpoints("qwen2")
    products = fused(tensors(source))
    (tmp_path / "genai").mkdir()
    onnx.save(quantized(products, zero_points=True), tmp_path / "genai" / "model.onnx")
    with pytest.raises(SystemExit, match="has zero points"):
        write(tmp_path / "genai", source, tmp_path / "asymmetric")
    with pytest.raises(SystemExit, match="exists; remove it"):
        write(tmp_path / "genai", source, tmp_path / "asymmetric")
    del products["model.layers.1.mlp.up_proj"]
    onnx.save(quantized(products), tmp_path / "genai" / "model.onnx")
    with pytest.raises(SystemExit, match=r"no INT4 layer model\.layers\.1\.mlp\.up_proj"):
        write(tmp_path / "genai", source, tmp_path / "missing")
