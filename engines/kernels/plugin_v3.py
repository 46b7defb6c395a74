"""The plugin of `edge.backends.tensorrt.plugins` as TensorRT builds with it, before 10.13.

Its tactics are those of the plugin that is compiled into engines (`plugin`), in the same order.
The number of planes is an attribute in the graph, since all that a plugin is made of must be known
when it is made: what it serializes, and by what TensorRT finds its timings again
(NvInferRuntime.h of 10.3, ``getTimingCacheID``).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from edge.backends.tensorrt import plugins
from edge.backends.tensorrt.plugins import (
    INPUTS,
    OwnKernels,
    ProductKernel,
    pack,
    product_class,
    told,
    unpack,
)

from .launch import w4_tactics
from .package import Ptx


def register(trt: Any, ptx: Mapping[str, Ptx]) -> None:
    """Make the plugin known to TensorRT, for builds too.

    Args:
        trt: the module ``tensorrt``.
        ptx: kernels by variant, from `package.load_ptx`.

    Raises:
        DependencyError: this TensorRT takes no such plugin, or cuda-bindings is missing.
    """
    own_kernels = plugins.register(trt)
    packed = {planes: pack_kernels(planes, ptx) for planes in (1, 2)}
    for each in packed.values():
        own_kernels.add(each)
    own_kernels.for_build = lambda planes: _build_class(trt)(packed[planes], own_kernels)


def pack_kernels(planes: int, ptx: Mapping[str, Ptx]) -> bytes:
    """The kernels of weights in one or two planes; a tactic's number is the place plus one."""
    found = []
    for tactic in w4_tactics(planes):
        kernel = ptx[tactic.variant.name]
        found.append(
            ProductKernel(
                kernel.text,
                kernel.entry,
                kernel.threads,
                kernel.shared_bytes,
                tactic.rows,
                tactic.columns,
            )
        )
    return pack(found)


@functools.cache
def _build_class(trt: Any) -> Any:
    class BuildProduct(product_class(trt), trt.IPluginV3OneBuild):  # type: ignore[misc]
        def __init__(self, packed: bytes, own_kernels: OwnKernels) -> None:
            super().__init__(packed, own_kernels)
            trt.IPluginV3OneBuild.__init__(self)
            self.num_outputs = 1
            # Without it TensorRT would time each layer anew, those of the same shapes too.
            self.timing_cache_id = hashlib.sha256(packed).hexdigest()

        @told
        def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
            return [input_types[0]]

        @told
        def get_output_shapes(self, inputs: Any, shape_inputs: Any, sizes: Any) -> list[Any]:
            x, weights = inputs[0], inputs[1]
            leading = [x[axis] for axis in range(len(x) - 1)]
            return [trt.DimsExprs([*leading, weights[2]])]

        @told
        def supports_format_combination(
            self, pos: int, in_out: Sequence[Any], num_inputs: int
        ) -> bool:
            words = INPUTS.index("weights")
            wanted = trt.DataType.INT32 if pos == words else trt.DataType.HALF
            found = in_out[pos].desc
            return bool(found.type == wanted and found.format == trt.TensorFormat.LINEAR)

        @told
        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            # What follows may be captured: TensorRT 10.10 was seen to time plugins in a CUDA graph
            # (autowarefoundation/autoware_universe#13158), where the driver loads nothing.
            if self.own_kernels.in_context:
                self.load()

        @told
        def get_valid_tactics(self) -> list[int]:
            return [place + 1 for place, _ in enumerate(unpack(self.packed))]

    return BuildProduct
