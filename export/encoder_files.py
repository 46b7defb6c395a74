"""Writes a vision encoder beside the decoder: two graphs, and the weights that they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge.bundle.manifest import FloatType, Manifest, TensorScheme
from edge.errors import EdgeError
from edge.vision.section import IMAGE_ROWS, PIXEL_VALUES, SECTION, VisionQuant, VisionSection
from edge_lab.measure.pictures import drawn_tile, relative_error
from edge_make.progress import Progress

from .bundle import BundleWriter
from .config import ExportRecipe
from .decoder_files import Output, store_linear
from .graph.data_file import open_data_file
from .graph.encoder import EncoderTensors, build_encoder
from .graph.graph_builder import NUMPY_TYPE
from .graph.linear_nodes import StoredLinear
from .quantize.linear import convert
from .quantize.plan import LinearPlan, nearest_rows
from .sources.checkpoint import Checkpoint, Transformed
from .sources.picture_encoder import Vision

Array = NDArray[np.float32]
_INT8 = TensorScheme("int8")  # one scale for each output, which every TensorRT takes


def write_encoder(
    writer: BundleWriter,
    recipe: ExportRecipe,
    checkpoint: Checkpoint,
    vision: Vision,
    progress: Progress,
) -> VisionSection:
    """Write an encoder's files; return the manifest's section.

    Both graphs share the weights. Their loss against float weights is measured on the CPU with a
    drawn tile, if this machine has an ONNX Runtime.

    Args:
        writer: writer of the bundle.
        recipe: how the numbers are stored.
        checkpoint: the model, rotated if its decoder is.
        vision: its encoder.
        progress: called with the weights done.

    Raises:
        CheckpointError: a weight is not finite, or the graph's type cannot hold it.
    """
    section, scheme = vision.section, TensorScheme("float")
    quant: VisionQuant = recipe.float_type
    if recipe.vision_quant == "int8":
        scheme, quant = _INT8, "int8"
    files = (writer.path(section.graph), writer.path(section.cpu_graph))
    types: tuple[FloatType, FloatType] = (recipe.float_type, "fp32")
    done, total = 0, vision.weights

    def count(weights: int) -> None:
        nonlocal done
        done += weights
        progress("vision encoder", done, total, "weights")

    weight_bytes = _write(files, types, checkpoint, vision, scheme, count)
    loss = None
    try:
        import onnxruntime
    except ImportError:
        pass  # without ONNX Runtime no bundle runs here, and none is measured
    else:
        exact = writer.scratch() / "vision.fp32.onnx"
        _write([exact], ["fp32"], checkpoint, vision, TensorScheme("float"), lambda weights: None)
        pixels = drawn_tile(section.tile_px)
        found, wanted = (_run(onnxruntime, path, pixels) for path in (files[1], exact))
        loss = relative_error(found, wanted)
    return msgspec.structs.replace(section, quant=quant, loss=loss, weight_bytes=weight_bytes)


def _write(
    paths: Sequence[Path],
    types: Sequence[FloatType],
    checkpoint: Checkpoint,
    vision: Vision,
    scheme: TensorScheme,
    count: Callable[[int], None],
) -> int:
    """Write the graphs of one encoder, the first with the weights; return the weights' bytes."""
    scale_type = NUMPY_TYPE[types[0]]
    flat = _Flat(checkpoint, f"{vision.patches}.weight")
    with ExitStack() as stack:
        outputs = [
            Output(stack.enter_context(open_data_file(path.with_name(f"{path.name}.data"))), kind)
            for path, kind in zip(paths, types, strict=True)
        ]
        linears: list[dict[str, StoredLinear]] = [{} for _ in outputs]
        for layer in vision.linears():
            plan = LinearPlan(layer, scheme, flat, nearest_rows(scheme, "mse", scale_type))
            tensors = convert(plan, scale_type, count)
            stored = store_linear(plan, tensors, outputs, wide_input_scales=False)
            for each, one in zip(linears, stored, strict=True):
                each[layer.name] = one
        parts = [
            EncoderTensors(own, *_store_floats(checkpoint, vision, output))
            for own, output in zip(linears, outputs, strict=True)
        ]
        weight_bytes = outputs[0].file.sync()
    for path, kind, part in zip(paths, types, parts, strict=True):
        path.write_bytes(build_encoder(vision.spec, kind, part).SerializeToString())
    return weight_bytes


def _store_floats(checkpoint: Checkpoint, vision: Vision, output: Output) -> Any:
    """Store everything but the linear layers: the other arguments of `EncoderTensors`."""
    positions = output.add("positions", vision.positions(checkpoint))
    norms = {
        name: tuple(
            output.add(f"{name}.{part}", checkpoint.tensor(f"{module}.{part}"))
            for part in ("weight", "bias")
        )
        for name, module in vision.norms().items()
    }
    scales = {
        name: output.add(f"{name}.scale", checkpoint.tensor(tensor))
        for name, tensor in vision.scales().items()
    }
    return norms, positions, scales


class _Flat(Transformed):
    """A model that shows its convolution of patches as the matrix of a linear layer."""

    def __init__(self, checkpoint: Checkpoint, convolution: str) -> None:
        super().__init__(checkpoint)
        self._convolution = convolution

    def tensor(self, name: str) -> NDArray[Any]:
        """Read a tensor; see `Checkpoint.tensor`."""
        tensor = super().tensor(name)
        return tensor.reshape(len(tensor), -1) if name == self._convolution else tensor


def with_vision(manifest: Manifest, section: VisionSection, legal: Sequence[str]) -> Manifest:
    """Add the section to a manifest; keep only versions of TensorRT that take both graphs."""
    return msgspec.structs.replace(
        manifest,
        tensorrt=tuple(name for name in manifest.tensorrt or () if name in legal),
        extras={**manifest.extras, SECTION: msgspec.to_builtins(section)},
    )


def _run(ort: Any, graph: Path, pixels: Array) -> Array:
    """Run a graph of FP32 activations on the CPU.

    Raises:
        EdgeError: ONNX Runtime refuses the graph.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        rows: Array = session.run([IMAGE_ROWS], {PIXEL_VALUES: pixels})[0]
    except Exception as error:  # its errors have no common class
        raise EdgeError(f"{graph.name} does not run in ONNX Runtime: {error}") from error
    return rows
