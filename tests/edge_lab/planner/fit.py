"""The fit of `speed.FITTED` to published figures, and the error of every prediction.

The models of the figures are described as their publishers ran them: INT4 in groups of 128, an FP16
lm_head, and tied tables where the model has them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import msgspec
import numpy as np

from edge.bundle import io_spec
from edge.bundle.linears import linear_layers
from edge.bundle.weights import Linear
from edge.model.spec import ModelSpec
from edge_lab.planner.devices import MODULES, PowerMode
from edge_lab.planner.memory import Deployment, plan_process_memory
from edge_lab.planner.models import BUILT_IN, decoder_spec
from edge_lab.planner.published import (
    DEFAULT_CONTEXT,
    EDGE_09,
    SPEED_FIGURES,
    TRT_LLM,
    Figure,
    Precision,
)
from edge_lab.planner.speed import FITTED, Efficiency, Work, decode_s, prefill_s, work_of
from edge_make.recipe import Recipe, recipe_linears

MODELS: dict[str, ModelSpec] = {
    "R1-Distill-Qwen-1.5B": BUILT_IN["deepseek-r1:1.5b"].spec,
    "R1-Distill-Llama-8B": BUILT_IN["deepseek-r1:8b"].spec,
    "R1-Distill-Qwen-14B": decoder_spec("qwen2", 5120, 48, (40, 8, 128), 13824, 152064),
    "Qwen3-0.6B": decoder_spec("qwen3", 1024, 28, (16, 8, 128), 3072, 151936, tied=True),
    "Qwen3-1.7B": decoder_spec("qwen3", 2048, 28, (16, 8, 128), 6144, 151936, tied=True),
    "Qwen3-4B": decoder_spec("qwen3", 2560, 36, (32, 8, 128), 9728, 151936, tied=True),
    "Qwen3-8B": BUILT_IN["deepseek-r1:8b-0528"].spec,
    "Qwen3-32B": decoder_spec("qwen3", 5120, 64, (64, 8, 128), 25600, 151936),
    "Qwen2.5-0.5B": decoder_spec("qwen2", 896, 24, (14, 2, 64), 4864, 151936, tied=True),
    "Qwen2.5-3B": decoder_spec("qwen2", 2048, 36, (16, 2, 128), 11008, 151936, tied=True),
    "Qwen2.5-7B": BUILT_IN["deepseek-r1:7b"].spec,
    "Llama-2-7B": decoder_spec("llama", 4096, 32, (32, 32, 128), 11008, 32000),
    "Llama-2-13B": decoder_spec("llama", 5120, 40, (40, 40, 128), 13824, 32000),
    "Llama-3-8B": BUILT_IN["deepseek-r1:8b"].spec,
    "Llama-3.3-70B": decoder_spec("llama", 8192, 80, (64, 8, 128), 28672, 128256),
    "Llama-3.2-1B": decoder_spec("llama", 2048, 16, (32, 8, 64), 8192, 128256, tied=True),
    "Llama-3.2-3B": decoder_spec("llama", 3072, 28, (24, 8, 128), 8192, 128256, tied=True),
    "SmolLM2-1.7B": decoder_spec("llama", 2048, 24, (32, 32, 64), 8192, 49152, tied=True),
}
# The publishers' INT8 leaves the lm_head in FP16 and has one scale per group; ours does neither.
_FP16_HEAD = (("lm_head", "float"),)
_RECIPES: dict[Precision, Recipe] = {
    "fp16": Recipe("fp16"),
    "int8": Recipe("int8", keep=_FP16_HEAD),
    "int4": Recipe("int4", 128, _FP16_HEAD),
}

NOT_PREDICTED: tuple[tuple[str, str], ...] = (
    ("TensorRT-Edge-LLM EAGLE3: Qwen3-1.7B 128.2, Qwen3-8B 59.3 tok/s", "speculative decoding"),
    (
        "Qwen3.5-2B: AGX 82.0, Orin Nano 30.0 tok/s",
        "layers of linear attention: no such model here",
    ),
    ("Qwen3.5-35B-A3B: vLLM 31.4, llama.cpp 22.5 tok/s", "mixture of experts: no such model here"),
    (
        "EdgeReasoning: 0.62, 2.84 and 5.30 J per token",
        "energy is measured by edge-llm bench, not predicted",
    ),
    (
        "FlashHead: Qwen3-1.7B 134.6, Llama-3.2-3B 75.4 tok/s",
        "a search in place of the lm_head's product",
    ),
)
"""Published figures that the model does not cover, and why."""


@dataclass(frozen=True)
class MemoryFigure:
    """Published memory of a process, in bytes; its KV capacity is assumed to be 4,096."""

    source: str
    model: str
    precision: Precision
    value: int


MEMORY_FIGURES: tuple[MemoryFigure, ...] = (
    MemoryFigure(f"{EDGE_09}, AGX Orin", "Qwen3-1.7B", "int4", 3_302_000_000),
    MemoryFigure(f"{EDGE_09}, Orin Nano", "Qwen3-1.7B", "int4", 3_234_000_000),
    MemoryFigure(f"{EDGE_09}, AGX Orin", "Qwen3-8B", "int4", 8_221_000_000),
    MemoryFigure(f"{TRT_LLM}, low", "Llama-3-8B", "int4", 6_800_000_000),
    MemoryFigure(f"{TRT_LLM}, high", "Llama-3-8B", "int4", 7_800_000_000),
)


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
