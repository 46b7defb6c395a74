"""`w4_gemv` as a plugin of TensorRT: what its builder asks about a product, answered.

The plugin is compiled ahead of time: TensorRT puts the PTX and the launch rule into the engine,
which then needs neither Python nor a plugin library (NVIDIA's Python API, ``tensorrt.plugin`` and
its ``aot_impl``). It has no attributes: all numbers follow from shapes, so none has to survive a
way through ONNX, the parser and NumPy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import GenericAlias
from typing import Any

from edge.backends.tensorrt.plugins import INPUTS, NAME, NAMESPACE, product_launch

from .launch import w4_tactics
from .package import Ptx
from .variants import BLOCK

VERSION = "1"


def register(trtp: Any, ptx: Mapping[str, Ptx]) -> None:
    """Make the plugin known to TensorRT, once per process.

    Args:
        trtp: the module ``tensorrt.plugin``.
        ptx: kernels by variant, from `package.load_ptx`.
    """
    if hasattr(trtp.op, NAMESPACE) and hasattr(getattr(trtp.op, NAMESPACE), NAME):
        return

    def describe(x: Any, weights: Any, scales: Any, bias: Any) -> Any:
        leading = (x.shape_expr[axis] for axis in range(x.ndim - 1))
        return trtp.from_shape_expr((*leading, weights.shape_expr[2]), dtype=x.dtype)

    def tune(x: Any, weights: Any, scales: Any, bias: Any, outputs: Any) -> Any:
        numbers = [place + 1 for place, _ in enumerate(w4_tactics(_planes(weights)))]
        return [trtp.AutoTuneCombination("FP16, INT32, FP16, FP16, FP16", "LINEAR", numbers)]

    def implement(
        x: Any,
        weights: Any,
        scales: Any,
        bias: Any,
        outputs: Any,
        tactic: int,
    ) -> Any:
        chosen = w4_tactics(_planes(weights))[tactic - 1]
        kernel = ptx[chosen.variant.name]
        leading = (x.shape_expr[axis] for axis in range(x.ndim - 1))
        constants = [each.shape_expr for each in (weights, scales, bias)]
        shapes = [(*leading, constants[0][0] * BLOCK), *constants]
        grid, numbers = product_launch(shapes, chosen.rows, chosen.columns, trtp.cdiv)
        launch = trtp.KernelLaunchParams(
            grid_x=grid[0],
            grid_y=grid[1],
            block_x=kernel.threads,
            shared_mem=kernel.shared_bytes,
        )
        return kernel.entry, kernel.text, launch, trtp.SymIntExprs.from_tuple(numbers)

    register_compiled(trtp, NAME, INPUTS, 1, describe, tune, implement)


def register_compiled(
    trtp: Any,
    name: str,
    input_names: Sequence[str],
    num_outputs: int,
    describe: Any,
    tune: Any,
    implement: Any,
) -> None:
    """Give TensorRT the three functions of a plugin that is compiled ahead of time.

    Args:
        trtp: the module ``tensorrt.plugin``.
        name: of the plugin, in our namespace.
        input_names: as the functions name them.
        num_outputs: of the plugin.
        describe: shapes and types of the outputs, for ``register``.
        tune: the tactics, for ``autotune``.
        implement: the kernel and its launch, for ``aot_impl``.
    """
    # TensorRT reads the annotations as objects; its module is known here only.
    desc, text = trtp.TensorDesc, str | bytes
    inputs = dict.fromkeys(input_names, desc)
    outputs = GenericAlias(tuple, (desc,) * num_outputs)
    describe.__annotations__ = {**inputs, "return": outputs if num_outputs > 1 else desc}
    tune.__annotations__ = {
        **inputs,
        "outputs": outputs,
        "return": GenericAlias(list, (trtp.AutoTuneCombination,)),
    }
    implement.__annotations__ = {
        **inputs,
        "outputs": outputs,
        "tactic": int,
        "return": GenericAlias(tuple, (text, text, trtp.KernelLaunchParams, trtp.SymExprs)),
    }
    plugin_id = f"{NAMESPACE}::{name}"
    trtp.register(plugin_id)(describe)
    trtp.autotune(plugin_id)(tune)
    trtp.aot_impl(plugin_id)(implement)


def _planes(weights: Any) -> int:
    return int(weights.shape[1])
