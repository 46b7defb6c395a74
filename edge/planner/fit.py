"""The fit of `speed.FITTED` to published figures, and the error of every prediction.

The models of the figures are described as their publishers ran them: INT4 in groups of 128, an FP16
lm_head, and tied tables where the model has them.
"""

from __future__ import annotations

import dataclasses

import msgspec
import numpy as np

from edge.bundle import io_spec
from edge.bundle.linears import linear_layers
from edge.bundle.manifest import ModelSpec
from edge.bundle.schemes import Recipe

from .devices import MODULES, PowerMode
from .memory import Deployment, plan_process_memory
from .published import (
    DEFAULT_CONTEXT,
    MODELS,
    SPEED_FIGURES,
    Figure,
    MemoryFigure,
    Precision,
)
from .speed import FITTED, Efficiency, Work, decode_s, prefill_s, work_of
from .weights import Linear, recipe_linears

# The publishers' INT8 leaves the lm_head in FP16 and has one scale per group; ours does neither.
_FP16_HEAD = (("lm_head", "float"),)
_RECIPES: dict[Precision, Recipe] = {
    "fp16": Recipe("fp16"),
    "int8": Recipe("int8", keep=_FP16_HEAD),
    "int4": Recipe("int4", 128, _FP16_HEAD),
}


def predicted_memory(figure: MemoryFigure) -> int:
    """Bytes that our plan says, and the token table, which those engines hold on the device."""
    model = MODELS[figure.model]
    linears = _linears(model, figure.precision)
    plan = plan_process_memory(model, linears, io_spec.rope_positions(model), Deployment())
    return plan.process_bytes + 2 * model.vocab_size * model.hidden_size


def predicted(figure: Figure, efficiency: Efficiency = FITTED) -> float:
    """Predict a figure, in its unit."""
    work, mode = _work(figure), _mode(figure)
    if figure.kind == "prefill":
        return prefill_s(work, mode, efficiency, figure.tokens)
    return figure.batch / decode_s(work, mode, efficiency, figure.batch, figure.tokens)


def error(figure: Figure, efficiency: Efficiency = FITTED) -> float:
    """Relative error of the predicted speed: above 0 where the prediction is too fast."""
    ratio = predicted(figure, efficiency) / figure.value
    return (1 / ratio if figure.kind == "prefill" else ratio) - 1


def fit() -> Efficiency:
    """Least squares of relative errors of time over the fitted figures.

    Three steps, each linear: ``1/weights`` and ``layer_s`` from the decode figures at batch 1,
    then ``batch`` from those at batch 8, then ``1/compute`` from the prefills.
    """
    fitted = [figure for figure in SPEED_FIGURES if figure.fitted]
    base = FITTED
    rows, targets = [], []
    for figure in (f for f in fitted if f.kind == "decode" and f.batch == 1):
        work, mode = _work(figure), _mode(figure)
        seconds = 1 / figure.value
        read_s = work.weights_bytes("decode") / mode.bytes_per_s
        rows.append((read_s / seconds, work.num_layers / seconds))
        targets.append(1 - _cache_share(figure, work, base))
    solution = np.linalg.lstsq(np.array(rows), np.array(targets), rcond=None)[0]
    base = dataclasses.replace(base, weights=float(1 / solution[0]), layer_s=float(solution[1]))

    batches = [f for f in fitted if f.kind == "decode" and f.batch > 1]
    base = dataclasses.replace(base, batch=_fit_batch(batches, base))
    prefills = [f for f in fitted if f.kind == "prefill"]
    return dataclasses.replace(base, compute=_fit_compute(prefills, base))


def _fit_batch(figures: list[Figure], base: Efficiency) -> float:
    plain = dataclasses.replace(base, batch=0.0)
    x, y = [], []
    for figure in figures:
        work, mode = _work(figure), _mode(figure)
        seconds = figure.batch / figure.value
        without_cache = decode_s(work, mode, plain, 1, 0)
        x.append((figure.batch - 1) * without_cache / seconds)
        y.append(1 - decode_s(work, mode, plain, figure.batch, figure.tokens) / seconds)
    return float(np.dot(x, y) / np.dot(x, x))


def _fit_compute(figures: list[Figure], base: Efficiency) -> float:
    at_peak, twice = (dataclasses.replace(base, compute=value) for value in (1.0, 0.5))
    x, y = [], []
    for figure in figures:
        work, mode = _work(figure), _mode(figure)
        first = prefill_s(work, mode, at_peak, figure.tokens)
        peak = prefill_s(work, mode, twice, figure.tokens) - first
        x.append(peak / figure.value)
        y.append(1 - (first - peak) / figure.value)
    return float(np.dot(x, x) / np.dot(x, y))


def _cache_share(figure: Figure, work: Work, base: Efficiency) -> float:
    mode = _mode(figure)
    with_cache = decode_s(work, mode, base, 1, figure.tokens)
    return (with_cache - decode_s(work, mode, base, 1, 0)) * figure.value


def _linears(model: ModelSpec, precision: Precision) -> list[Linear]:
    recipe = _RECIPES[precision]
    size = recipe.group_size
    if size and any(layer.shape[0] % size for layer in linear_layers(model)):
        recipe = dataclasses.replace(recipe, group_size=None)
    return [
        linear._replace(scheme=msgspec.structs.replace(linear.scheme, planes=False))
        for linear in recipe_linears(model, recipe)
    ]


def _work(figure: Figure) -> Work:
    model = MODELS[figure.model]
    linears = _linears(model, figure.precision)
    plan = plan_process_memory(model, linears, DEFAULT_CONTEXT, Deployment())
    # Those engines have kernels of their own for INT8 weights, which unpack nothing.
    return dataclasses.replace(
        work_of(model, linears, plan.weights, Deployment()), unpacked_bytes=0
    )


def _mode(figure: Figure) -> PowerMode:
    return MODULES[figure.device].mode(figure.mode)
