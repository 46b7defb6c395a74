"""Chooses a model and its precision by the decision tree of the tutorials, with computed numbers.

Tutorials on DeepSeek-R1 on Orin end in a drawing: under 1 GB of memory, the 1.5B model quantized;
else under 100 ms, the 7B model quantized; else the 8B model. Here every model in every precision is
a candidate. It is dropped if its memory, its time per output token (TPOT) with a full KV cache, its
time to first token or its quality misses the wish. Of the rest the best in quality is taken, and
among equals the fastest. The drawing's own leaf is checked against the same numbers.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from edge.bundle.linears import linear_layers
from edge.bundle.model_names import nearest_model
from edge.errors import ConfigError

from .commands import bundle_path, export_commands
from .memory import Deployment
from .models import BUILT_IN, PlannedModel, find_built_in
from .plan import ModelPlan, Option, PlanDevice, make_plan
from .speed import Efficiency, prefill_s

Benchmark = Literal["aime-2024", "math-500", "gpqa-diamond", "livecodebench"]
MemoryOf = Literal["process", "weights"]

# pass@1 in percent: DeepSeek-R1's README for the distills, the model card of R1-0528-Qwen3-8B for
# the last. That card has no MATH-500, and its LiveCodeBench is of later months (2408-2505).
QUALITY: dict[str, dict[Benchmark, float]] = {
    "deepseek-r1:1.5b": {
        "aime-2024": 28.9,
        "math-500": 83.9,
        "gpqa-diamond": 33.8,
        "livecodebench": 16.9,
    },
    "deepseek-r1:7b": {
        "aime-2024": 55.5,
        "math-500": 92.8,
        "gpqa-diamond": 49.1,
        "livecodebench": 37.6,
    },
    "deepseek-r1:8b": {
        "aime-2024": 50.4,
        "math-500": 89.1,
        "gpqa-diamond": 49.0,
        "livecodebench": 39.6,
    },
    "deepseek-r1:8b-0528": {"aime-2024": 86.0, "gpqa-diamond": 61.1, "livecodebench": 60.5},
}
MMLU_MEASURED = 41.0  # R1-Distill-Qwen-1.5B, EdgeReasoning (arXiv 2511.01866), 3,000 questions

# Share of the score that is left, on average: Neural Magic's evaluation of quantized R1 distills
# (2025-02-27), W8A8 and W4A16 with GPTQ in groups of 128 and a calibrated method. Weight-only INT8
# and the smaller groups of our INT4 lose no more. Below 7B the models are more fragile.
_RECOVERY: dict[str, tuple[float, float]] = {
    "fp16": (1.0, 1.0),
    "int8": (0.97, 1.0),
    "int8-w8a8": (0.97, 1.0),
    "int4": (0.94, 0.97),
}
_LARGE_PARAMETERS = 5e9  # parameters in the layers

TUTORIAL_MEMORY_BYTES, TUTORIAL_LATENCY_S = 1_000_000_000, 0.100
TUTORIAL_TPOT_S = 0.012


@dataclass(frozen=True)
class Wish:
    """Wishes for a model; None is no limit.

    Attributes:
        memory_bytes: most memory that it may take.
        memory_of: whether this limits the whole process with a full cache, or the weights alone.
        tpot_s: longest time per output token, with a full KV cache.
        ttft_s: longest time to first token, for a prompt of ``prompt_tokens``.
        prompt_tokens: tokens of the prompt whose first token ``ttft_s`` bounds.
        quality: least score, in percent.
        benchmark: the benchmark of ``quality``, by which models are ranked.
    """

    memory_bytes: int | None = None
    memory_of: MemoryOf = "process"
    tpot_s: float | None = None
    ttft_s: float | None = None
    prompt_tokens: int = 512
    quality: float | None = None
    benchmark: Benchmark = "aime-2024"


@dataclass(frozen=True)
class Candidate:
    """A model in a quantization, and why it was taken or dropped.

    Attributes:
        model: the model.
        option: memory and bytes of the quantization.
        memory_bytes: memory to compare with the limit.
        tpot_s: predicted time per output token with a full KV cache.
        ttft_s: predicted time to first token for the wished prompt.
        score: published score times the quantization's recovery; None if it is not published.
        reasons: why it was dropped; empty if it meets every wish.
    """

    model: PlannedModel
    option: Option
    memory_bytes: int
    tpot_s: float
    ttft_s: float
    score: float | None
    reasons: tuple[str, ...]

    @property
    def name(self) -> str:
        """Model and quantization, as a name."""
        return f"{self.model.name} {self.option.name}"


@dataclass(frozen=True)
class Recommendation:
    """The choice, and how it came about.

    Attributes:
        taken: the best candidate, or None if none meets every wish.
        candidates: all of them: those that meet every wish, best first, then the dropped.
        leaf: leaf of the tutorials' tree for the same wish.
        verdict: verdict of the numbers on that leaf.
        commands: export and build of ``taken``, by their ``--target``.
        remark: remark on what a build of ``taken`` lacks, or None.
    """

    taken: Candidate | None
    candidates: tuple[Candidate, ...]
    leaf: str
    verdict: str
    commands: dict[str, tuple[str, ...]]
    remark: str | None


def recommend(
    wish: Wish,
    device: PlanDevice,
    deployment: Deployment,
    efficiency: Efficiency,
    models: Sequence[str] = tuple(BUILT_IN),
) -> Recommendation:
    """Choose among models and quantizations.

    Raises:
        ConfigError: an unknown model, a number out of range, a device without a bandwidth.
    """
    if device.mode is None:
        raise ConfigError(
            f"--device {device.name} has no known bandwidth; measure it with edge-llm bench BUNDLE "
            "--json and give the file to --calibrate"
        )
    if wish.prompt_tokens > deployment.kv_capacity:
        raise ConfigError(
            f"--prompt-tokens {wish.prompt_tokens} exceeds the KV capacity "
            f"{deployment.kv_capacity}; give a larger --kv-capacity"
        )
    candidates = [
        _candidate(wish, plan, option)
        for model in dict.fromkeys(map(_model, models))
        for plan in [
            make_plan(
                model,
                device,
                deployment,
                efficiency,
                quants=list(_RECOVERY),
                contexts=[deployment.kv_capacity],
            )
        ]
        for option in plan.options
    ]
    ranked = sorted(candidates, key=lambda c: (bool(c.reasons), -(c.score or 0.0), c.tpot_s))
    taken = ranked[0] if not ranked[0].reasons else None
    leaf, verdict = _tutorial(wish, candidates)
    commands = {} if taken is None else _commands(taken, device, deployment)
    remark = None if taken is None else _remark(taken, device)
    return Recommendation(taken, tuple(ranked), leaf, verdict, commands, remark)


def _model(name: str) -> PlannedModel:
    model = find_built_in(name)
    if model is None:
        raise ConfigError(f"--model {name} is unknown; {nearest_model(name)}")
    return model


def score(model: str, quant: str, benchmark: Benchmark) -> float | None:
    """Return the published score times the quantization's recovery, in percent; None if unknown."""
    published = QUALITY[model].get(benchmark)
    if published is None:
        return None
    layers = linear_layers(BUILT_IN[model].spec)
    parameters = sum(math.prod(layer.shape) for layer in layers if layer.name != "lm_head")
    small, large = _RECOVERY[quant]
    return published * (large if parameters >= _LARGE_PARAMETERS else small)


def _candidate(wish: Wish, plan: ModelPlan, option: Option) -> Candidate:
    mode = plan.device.mode
    assert mode is not None
    memory = option.memory
    held = memory.process_bytes if wish.memory_of == "process" else memory.weights_bytes
    tpot_s = option.speeds[0].tpot_s
    ttft_s = prefill_s(
        option.work, mode, plan.efficiency, wish.prompt_tokens, plan.deployment.max_prefill
    )
    found = score(plan.model.name, option.name, wish.benchmark)
    reasons = []
    if wish.memory_bytes is not None and held > wish.memory_bytes:
        reasons.append(f"{_gb(held)} of {_held(wish)} exceed {_gb(wish.memory_bytes)}")
    if plan.device.usable_bytes is not None and memory.load_peak > plan.device.usable_bytes:
        reasons.append(
            f"{_gb(memory.load_peak)} do not fit {plan.device.name}, which leaves "
            f"{_gb(plan.device.usable_bytes)}"
        )
    if wish.tpot_s is not None and tpot_s > wish.tpot_s:
        reasons.append(f"TPOT {_ms(tpot_s)} exceeds {_ms(wish.tpot_s)}")
    if wish.ttft_s is not None and ttft_s > wish.ttft_s:
        reasons.append(f"TTFT {_ms(ttft_s)} exceeds {_ms(wish.ttft_s)}")
    if found is None:
        reasons.append(f"no published {wish.benchmark}")
    elif wish.quality is not None and found < wish.quality:
        reasons.append(f"{wish.benchmark} {found:.1f} is below {wish.quality:.1f}")
    return Candidate(plan.model, option, held, tpot_s, ttft_s, found, tuple(reasons))


def tutorial_leaf(wish: Wish) -> tuple[str, tuple[str, ...], bool]:
    """Return the leaf of the tutorials' tree: its words, the models, and whether quantized."""
    if wish.memory_bytes is not None and wish.memory_bytes <= TUTORIAL_MEMORY_BYTES:
        return "1.5B quantized", ("deepseek-r1:1.5b",), True
    if wish.tpot_s is not None and wish.tpot_s <= TUTORIAL_LATENCY_S:
        return "7B quantized", ("deepseek-r1:7b",), True
    return "8B", ("deepseek-r1:8b", "deepseek-r1:8b-0528"), False


def _tutorial(wish: Wish, candidates: Sequence[Candidate]) -> tuple[str, str]:
    leaf, models, quantized = tutorial_leaf(wish)
    there = [
        c
        for c in candidates
        if c.model.name in models and (not quantized or c.option.name != "fp16")
    ]
    if not there:
        return leaf, "cannot be checked: its model is not among the candidates"
    fitting = [c for c in there if not c.reasons]
    if not fitting:
        least = min(there, key=lambda c: c.memory_bytes)
        verdict = f"does not hold: even {least.name} is dropped ({'; '.join(least.reasons)})"
    else:
        best = max(fitting, key=lambda c: (c.score or 0.0, -c.tpot_s))
        verdict = (
            f"holds: {best.name} takes {_gb(best.memory_bytes)} of {_held(wish)}, TPOT "
            f"{_ms(best.tpot_s)}"
        )
    if models == ("deepseek-r1:1.5b",):
        verdict += ". " + _claims(there)
    return leaf, verdict


def _claims(there: Sequence[Candidate]) -> str:
    """Compare the figures that go with the drawing with the computed ones."""
    memory = sorted(c.option.memory.process_bytes for c in there)
    tpot = sorted(c.tpot_s for c in there)
    near = "in reach" if tpot[0] <= TUTORIAL_TPOT_S else "out of reach"
    return (
        "Of the 1.8 GB, 12 ms and 62.3 % MMLU that go with it: 1.8 GB is not under 1 GB, and the "
        f"process takes {_gb(memory[0])} to {_gb(memory[-1])}; 12 ms per token is {near} here "
        f"({_ms(tpot[0])} to {_ms(tpot[-1])}); MMLU was measured as {MMLU_MEASURED} %, "
        "unquantized (EdgeReasoning)"
    )


def _commands(
    taken: Candidate, device: PlanDevice, deployment: Deployment
) -> dict[str, tuple[str, ...]]:
    exports = export_commands(taken.model, taken.option, device, deployment)
    if deployment.backend != "tensorrt":
        return {target: (export,) for target, export in exports.items()}
    build = ["edge-llm", "build", str(bundle_path(taken.model, taken.option))]
    build += ["--max-batch", str(deployment.batch), "--max-prefill", str(deployment.max_prefill)]
    return {target: (export, shlex.join(build)) for target, export in exports.items()}


def _remark(taken: Candidate, device: PlanDevice) -> str | None:
    peak, usable = taken.option.memory.build_peak, device.usable_bytes
    if usable is None or peak <= usable:
        return None
    return (
        f"edge-llm build peaks at about {_gb(peak)}, but {device.name} leaves {_gb(usable)}: add "
        f"{_gb(peak - usable)} of swap for it, which serves what the builder takes, not the GPU"
    )


def _held(wish: Wish) -> str:
    return "process memory" if wish.memory_of == "process" else "weights"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
