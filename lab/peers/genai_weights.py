"""Put the INT4 weights of an onnxruntime-genai model into its float checkpoint, dequantized.

usage: python3 -m lab genai-weights GENAI FLOAT OUTPUT

GENAI is a directory that onnxruntime-genai's model builder wrote with ``-p int4``, FLOAT the
Hugging Face directory that it read (python3 -m lab peers makes both). OUTPUT is a directory like
FLOAT whose decoder layers have GENAI's weights; embeddings, norms, biases and lm_head stay the
same. So it shows what the rounding costs in the layers that every recipe quantizes.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edge.bundle.linears import linear_layers
from edge_make.checkpoint_tensors import expected_tensors
from edge_make.safetensors_writer import TensorSource, write_safetensors
from export.sources.checkpoint import Checkpoint
from export.sources.opening import open_checkpoint

_ZERO = 8  # zero point of MatMulNBits if the node has none
_Read = Callable[[], NDArray[np.float32]]


def main() -> None:
    parser = argparse.ArgumentParser(
        "python3 -m lab genai-weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name in ("genai", "floats", "output"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args()
    write(options.genai, options.floats, options.output)


def write(genai: Path, floats: Path, output: Path) -> None:
    """Write ``output``, as the module's docstring says.

    Raises:
        SystemExit: a layer is not as the builder writes symmetric INT4, or ``output`` exists.
    """
    start_directory(floats, output)
    graph = onnx.load(genai / "model.onnx", load_external_data=False).graph
    products = {
        node.input[1].rpartition(".MatMul")[0]: node for node in graph.node if _is_int4(node)
    }
    stored = {tensor.name: tensor for tensor in graph.initializer}

    def rows(name: str) -> NDArray[np.float32]:
        if name not in products:
            raise SystemExit(
                f"error: {genai} has no INT4 layer {name}; it has {sorted(products)[:9]}"
            )
        return _dequantize(products[name], stored, genai)

    with open_checkpoint(str(floats)) as checkpoint:
        replaced: dict[str, _Read] = {}
        for layer in linear_layers(checkpoint.spec):
            if layer.name != "lm_head":
                replaced |= _parts(layer.weights, rows, checkpoint)
        write_floats(checkpoint, output, replaced)


def start_directory(floats: Path, output: Path) -> None:
    """Make ``output`` with everything in ``floats``, a Hugging Face directory, except its weights.

    Raises:
        SystemExit: ``output`` exists.
    """
    if output.exists():
        raise SystemExit(f"error: {output} exists; remove it, or name another directory")
    output.mkdir(parents=True)
    for file in floats.iterdir():
        if file.suffix in (".json", ".jinja") and "index" not in file.name:
            shutil.copy(file, output)


def write_floats(
    checkpoint: Checkpoint, output: Path, replaced: Mapping[str, Callable[[], NDArray[Any]]]
) -> None:
    """Write a checkpoint's tensors as fp16, one by one.

    Args:
        checkpoint: the model.
        output: an existing directory.
        replaced: readers of the tensors that are not the checkpoint's own, by HF name.
    """

    def read(name: str) -> Iterator[NDArray[np.generic]]:
        values = replaced[name]() if name in replaced else checkpoint.tensor(name)
        yield values.astype(np.float16).reshape(-1)

    tensors = {
        name: TensorSource("F16", shape, read(name))
        for name, shape in expected_tensors(checkpoint.spec).items()
    }
    write_safetensors(output / "model.safetensors", tensors)


def _parts(
    weights: tuple[str, ...], rows: Callable[[str], NDArray[np.float32]], checkpoint: Checkpoint
) -> dict[str, _Read]:
    """Return readers for the weights of a linear: q, k and v are one matrix, gate and up two."""
    names = [weight.removesuffix(".weight").replace(".self_attn.", ".attn.") for weight in weights]
    if not weights[0].endswith("q_proj.weight"):
        return {
            weight: lambda name=name: rows(name)  # type: ignore[misc]
            for weight, name in zip(weights, names, strict=True)
        }
    fused = names[0].replace("q_proj", "qkv_proj")
    result: dict[str, _Read] = {}
    start = 0
    for weight in weights:
        part = slice(start, start + len(checkpoint.tensor(weight)))
        result[weight] = lambda part=part: rows(fused)[part]  # type: ignore[misc]
        start = part.stop
    return result


def _is_int4(node: onnx.NodeProto) -> bool:
    return node.op_type == "MatMulNBits" and _attribute(node, "bits") == 4


def _attribute(node: onnx.NodeProto, name: str) -> int:
    return next(int(each.i) for each in node.attribute if each.name == name)


def _dequantize(
    node: onnx.NodeProto, stored: dict[str, onnx.TensorProto], place: Path
) -> NDArray[np.float32]:
    """Read ``[out, in]`` from a node; low nibbles come first, as in com.microsoft.MatMulNBits."""
    if len(node.input) > 3:
        raise SystemExit(f"error: {node.name} has zero points; build with symmetric INT4")
    size, width = _attribute(node, "block_size"), _attribute(node, "K")
    packed, scales = (
        numpy_helper.to_array(stored[name], str(place)).astype(kind)
        for name, kind in zip(node.input[1:3], (np.uint8, np.float32), strict=True)
    )
    rows, groups, _ = packed.shape
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(rows, groups, size)
    values: NDArray[np.float32] = (codes.astype(np.float32) - _ZERO) * scales.reshape(
        rows, groups, 1
    )
    return values.reshape(rows, -1)[:, :width]


if __name__ == "__main__":
    main()
