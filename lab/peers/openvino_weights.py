"""Round a checkpoint's linear layers to INT4 as OpenVINO does, and write the resulting weights.

usage: python3 -m lab openvino-weights SOURCE OUTPUT [--sym] [--group-size 128] [--ratio 1.0]
                                [--group-size-fallback error] [--embeddings]
       python3 -m lab openvino-weights --check       its tests

SOURCE is a GGUF file or a Hugging Face directory, OUTPUT a new one of the same kind with floats for
``python3 -m lab quality --checkpoint``. NNCF's own ``compress_weights`` rounds each linear of the
decoder layers, and OpenVINO reads it back. The options are those of ``optimum-cli export openvino
--weight-format int4`` with the defaults of optimum-intel 2.2 for a model that it has no entry for.
Embeddings, norms, biases and lm_head stay as they are, so it shows what the rounding costs the
layers that every recipe quantizes; ``--embeddings`` rounds embeddings and lm_head to INT8, one
scale and zero point per row, as OpenVINO does.

Only methods that need no more than weights are used. AWQ (which optimum-intel's entries for the R1
distills of 1.5B, 7B and 8B ask for), scale estimation and GPTQ look at the whole graph or at data.
A linear is a small model of its own. ``--ratio`` below 1 holds all their floats at once, since NNCF
compares them to choose which get INT8.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import nncf
import numpy as np
import openvino
import pytest
from numpy.typing import NDArray
from openvino import opset13

from edge.bundle.linears import linear_layers
from edge.model.names import TOKEN_TABLE
from edge_make.checkpoint_tensors import expected_tensors
from export.sources.opening import open_checkpoint

from .genai_weights import start_directory, write_floats
from .gguf_rivals import is_linear, rewrite

_GGUF_HEADS = ("token_embd.weight", "output.weight")
_HF_HEADS = (TOKEN_TABLE, "lm_head.weight")
_Read = Callable[[str], NDArray[np.float32]]


def main() -> None:
    if sys.argv[1:] == ["--check"]:
        # Without conftest.py, which needs all of the tests' libraries.
        tests = Path(__file__).with_name("test_openvino_weights.py")
        sys.exit(pytest.main(["--noconftest", "-p", "no:cacheprovider", "-q", str(tests)]))
    parser = argparse.ArgumentParser(
        "python3 -m lab openvino-weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--sym", action="store_true", help="no zero points")
    parser.add_argument("--group-size", type=int, default=128, help="-1: one group per row")
    parser.add_argument("--ratio", type=float, default=1.0, help="of the weights in INT4")
    parser.add_argument(
        "--group-size-fallback",
        choices=["error", "adjust"],
        default="error",
        help="adjust: where it does not divide a row, the largest power of two from 32 that does",
    )
    parser.add_argument("--embeddings", action="store_true")
    options = parser.parse_args()
    nncf.set_log_level(30)  # logging.WARNING: no table for each linear
    settings = int4(
        sym=options.sym,
        group_size=options.group_size,
        ratio=options.ratio,
        fallback=options.group_size_fallback,
    )
    done = write(options.source, options.output, settings, embeddings=options.embeddings)
    for part, rounded in done.items():
        bits = 8 * rounded.num_bytes / rounded.num_weights
        print(f"{part}: {rounded.num_weights:,} weights, {bits:.2f} bits per weight")


def int4(
    *, sym: bool = False, group_size: int = 128, ratio: float = 1.0, fallback: str = "error"
) -> dict[str, Any]:
    """Return arguments of ``nncf.compress_weights``; every linear counts as the decoder's."""
    kind = nncf.CompressWeightsMode.INT4_SYM if sym else nncf.CompressWeightsMode.INT4_ASYM
    advanced = nncf.AdvancedCompressionParameters(
        group_size_fallback_mode=nncf.GroupSizeFallbackMode(fallback)
    )
    return {
        "mode": kind,
        "group_size": group_size,
        "ratio": ratio,
        "all_layers": True,
        "advanced_parameters": advanced,
    }


class Rounded:
    """Weights as OpenVINO decompresses them, by name, and their size.

    Attributes:
        num_weights: number of all weights read.
        num_bytes: bytes of their integers, scales and zero points, as OpenVINO stores them.
    """

    def __init__(self, names: Iterable[str], read: _Read, settings: Mapping[str, Any]) -> None:
        self.names = list(names)
        self.num_weights = self.num_bytes = 0
        self._read, self._settings = read, settings
        self._whole: openvino.Model | None = None

    def __call__(self, name: str) -> NDArray[np.float16]:
        """Return the ``[out, in]`` weights of a linear."""
        if self._settings.get("ratio", 1) < 1:
            if self._whole is None:
                floats = {each: self._read(each) for each in self.names}
                self._whole = compress(floats, self._settings)
            model, index = self._whole, self.names.index(name)
        else:
            model, index = compress({name: self._read(name)}, self._settings), 0
        values, num_bytes = decompress(model, index)
        self.num_weights += values.size
        self.num_bytes += num_bytes
        return values.astype(np.float16)


def compress(
    weights: Mapping[str, NDArray[np.float32]], settings: Mapping[str, Any]
) -> openvino.Model:
    """Make a model of products side by side, ``[batch, in]`` by ``[out, in]``, compressed by NNCF.

    Raises:
        SystemExit: the group size does not divide the columns of a weight.
    """
    inputs = [opset13.parameter([-1, rows.shape[1]], np.float32) for rows in weights.values()]
    products = [
        opset13.matmul(x, opset13.constant(rows), False, True, name=name)
        for x, (name, rows) in zip(inputs, weights.items(), strict=True)
    ]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # a bar for each linear
            return nncf.compress_weights(openvino.Model(products, inputs), **settings)
    except nncf.InvalidGroupSizeError as error:
        raise SystemExit(
            f"error: {error}\ngive a --group-size that divides it, or --group-size-fallback adjust"
        ) from None


def decompress(model: openvino.Model, index: int) -> tuple[NDArray[np.float32], int]:
    """Return a product's weights as OpenVINO computes them, and the bytes of their constants."""
    weights = model.output(index).get_node().input_value(0).get_node().input_value(1)
    alone = openvino.compile_model(openvino.Model([weights], []), "CPU")
    num_bytes, nodes = 0, [weights.get_node()]
    while nodes:
        node = nodes.pop()
        nodes += [source.get_node() for source in node.input_values()]
        # The 64-bit constant is the shape of a reshape.
        if node.get_type_name() == "Constant" and node.get_element_type() != openvino.Type.i64:
            num_bytes += node.get_byte_size()
    return alone({})[0], num_bytes


def write(
    source: Path, output: Path, settings: Mapping[str, Any], *, embeddings: bool = False
) -> dict[str, Rounded]:
    """Write ``output``; return what was rounded, by part of the model.

    Raises:
        SystemExit: ``output`` exists, or a weight cannot have such groups.
    """
    if source.suffix.lower() == ".gguf":
        return _write_gguf(source, output, settings, embeddings)
    start_directory(source, output)
    with open_checkpoint(str(source)) as checkpoint:
        stored = expected_tensors(checkpoint.spec)
        linears = [
            name
            for layer in linear_layers(checkpoint.spec)
            if layer.name != "lm_head"
            for name in layer.weights
        ]
        heads = [name for name in _HF_HEADS if embeddings and name in stored]
        parts = _parts(
            linears, heads, lambda name: checkpoint.tensor(name).astype(np.float32), settings
        )
        replaced = {
            name: lambda part=part, name=name: part(name)
            for part in parts.values()
            for name in part.names
        }
        write_floats(checkpoint, output, replaced)
    return parts


def _write_gguf(
    source: Path, output: Path, settings: Mapping[str, Any], embeddings: bool
) -> dict[str, Rounded]:
    if output.exists():
        raise SystemExit(f"error: {output} exists; remove it, or name another file")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}

    def read(name: str) -> NDArray[np.float32]:
        tensor = stored[name]
        rows: NDArray[np.float32] = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return rows

    linears = [name for name, each in stored.items() if is_linear(each)]
    heads = [name for name in _GGUF_HEADS if embeddings and name in stored]
    parts = _parts(linears, heads, read, settings)

    def convert(tensor: Any) -> tuple[Any, Any]:
        for part in parts.values():
            if tensor.name in part.names:
                return part(tensor.name), gguf.GGMLQuantizationType.F16
        return tensor.data, tensor.tensor_type

    rewrite(source, output, convert)
    return parts


def _parts(
    linears: list[str], heads: list[str], read: _Read, settings: Mapping[str, Any]
) -> dict[str, Rounded]:
    parts = {"decoder layers": Rounded(linears, read, settings)}
    if heads:
        int8 = {"mode": nncf.CompressWeightsMode.INT8_ASYM}
        parts["embeddings and lm_head"] = Rounded(heads, read, int8)
    return parts


if __name__ == "__main__":
    main()
