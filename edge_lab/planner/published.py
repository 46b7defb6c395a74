"""Lists published figures of models on Orin; `tests/edge_lab/planner/fit.py` predicts them.

Every figure says who published it. ``fitted`` ones come from TensorRT engines on the AGX Orin
64 GB. All others are held out: they are predicted with the same factors, and
``docs/measured/planner.json`` has the errors. Where the publisher names no context, 256 tokens are
assumed; where none names a power mode, the fastest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .devices import MODULES

Precision = Literal["fp16", "int8", "int4"]
Kind = Literal["decode", "prefill"]
DEFAULT_CONTEXT = 256


@dataclass(frozen=True)
class Figure:
    """One published figure of speed.

    Attributes:
        source: who published it, and what engine it is.
        device, mode: names in `devices.MODULES`; None is the fastest mode.
        model, precision: the model that ran, and its precision.
        kind: ``decode`` in tokens per second, or ``prefill`` in seconds.
        value: the figure.
        tokens: context of a decode step, or tokens of the prompt.
        batch: sequences per step.
        fitted: whether the fit uses it.
    """

    source: str
    device: str
    mode: str | None
    model: str
    precision: Precision
    kind: Kind
    value: float
    tokens: int = DEFAULT_CONTEXT
    batch: int = 1
    fitted: bool = False


_AGX, _NX, _NANO = "agx-orin-64", "orin-nx-16", "orin-nano-8"
EDGE_09 = "TensorRT-Edge-LLM 0.9.0, performance-benchmarks.md (NVIDIA)"
_EDGE_08 = "TensorRT-Edge-LLM 0.8.0, performance-benchmarks.md (NVIDIA)"
_ISSUE_60 = "TensorRT-Edge-LLM issue 60, JetPack 6.2, TensorRT 10.7"
TRT_LLM = "TensorRT-LLM v0.12.0-jetson README4Jetson, MAXN (NVIDIA)"
_REASONING = "EdgeReasoning (arXiv 2511.01866), vLLM 0.8.6 BF16"
_EMBEDL = "embedl, vLLM (Hugging Face space)"
_AI_LAB = "jetson-ai-lab, vLLM (NVIDIA)"
_MLC = "NVIDIA blog on Orin Nano Super, MLC"
_MLC_ISSUE = "jetson-containers issue 532, MLC"
_LLAMA_CPP = "holohub 170 and MiniCPM 331, llama.cpp"
_OLLAMA = "jetson-copilot and others, ollama"


def _decode(
    source: str,
    device: str,
    rows: tuple[tuple[str, Precision, float], ...],
    *,
    mode: str | None = None,
    batch: int = 1,
    tokens: int = DEFAULT_CONTEXT,
    fitted: bool = False,
) -> tuple[Figure, ...]:
    return tuple(
        Figure(source, device, mode, model, precision, "decode", value, tokens, batch, fitted)
        for model, precision, value in rows
    )


def _prefill(
    source: str, rows: tuple[tuple[str, Precision, int, float], ...], *, fitted: bool = False
) -> tuple[Figure, ...]:
    return tuple(
        Figure(source, _AGX, None, model, precision, "prefill", seconds, tokens, fitted=fitted)
        for model, precision, tokens, seconds in rows
    )


SPEED_FIGURES: tuple[Figure, ...] = (
    *_decode(
        EDGE_09,
        _AGX,
        (
            ("Qwen3-0.6B", "int4", 186.4),
            ("Qwen3-1.7B", "int4", 98.6),
            ("Qwen3-4B", "int4", 53.1),
            ("Qwen3-8B", "int4", 32.5),
        ),
        fitted=True,
    ),
    *_decode(
        _EDGE_08, _AGX, (("Qwen3-1.7B", "int4", 95.5), ("Qwen3-8B", "int4", 32.1)), fitted=True
    ),
    *_decode(
        _ISSUE_60,  # the vision models' language part
        _AGX,
        (
            ("Qwen3-4B", "fp16", 20.2),
            ("Qwen3-4B", "int8", 35.5),
            ("Qwen3-4B", "int4", 52.2),
            ("Qwen2.5-3B", "fp16", 27.2),
            ("Qwen2.5-3B", "int8", 45.2),
            ("Qwen2.5-3B", "int4", 71.8),
        ),
        fitted=True,
    ),
    *_decode(TRT_LLM, _AGX, (("Llama-3-8B", "int4", 35.9),), tokens=192, fitted=True),
    *_decode(f"{TRT_LLM}, GPTQ", _AGX, (("Llama-3-8B", "int4", 34.5),), tokens=192, fitted=True),
    *_decode(
        EDGE_09,
        _AGX,
        (("Qwen3-1.7B", "int4", 465.5), ("Qwen3-8B", "int4", 151.5)),
        batch=8,
        fitted=True,
    ),
    *_prefill(EDGE_09, (("Qwen3-1.7B", "int4", 61, 0.0204),), fitted=True),
    *_prefill(
        _EDGE_08,
        (("Qwen3-1.7B", "int4", 370, 0.0635), ("Qwen3-8B", "int4", 370, 0.2739)),
        fitted=True,
    ),
    *_prefill(
        TRT_LLM,
        (("Llama-3-8B", "int4", 128, 0.091), ("Llama-3-8B", "int4", 512, 0.260)),
        fitted=True,
    ),
    *_decode(
        EDGE_09,
        _NX,
        (("Qwen3-1.7B", "int4", 60.4), ("Qwen3-4B", "int4", 31.6), ("Qwen3-8B", "int4", 19.0)),
    ),
    *_decode(
        EDGE_09, _NANO, (("Qwen3-0.6B", "int4", 72.8), ("Qwen3-1.7B", "int4", 37.4)), mode="15W"
    ),
    *_decode(
        _REASONING,
        _AGX,
        (
            ("R1-Distill-Qwen-1.5B", "fp16", 40.5),
            ("R1-Distill-Llama-8B", "fp16", 9.83),
            ("R1-Distill-Qwen-14B", "fp16", 5.34),
        ),
        tokens=1024,
    ),
    *_prefill(
        _REASONING,
        (
            ("R1-Distill-Qwen-1.5B", "fp16", 3, 0.0485),
            ("R1-Distill-Qwen-1.5B", "fp16", 513, 0.1009),
            ("R1-Distill-Qwen-1.5B", "fp16", 1153, 0.187),
            ("R1-Distill-Qwen-1.5B", "fp16", 4097, 0.648),
            ("R1-Distill-Llama-8B", "fp16", 3, 0.108),
            ("R1-Distill-Llama-8B", "fp16", 513, 0.543),
            ("R1-Distill-Llama-8B", "fp16", 1153, 1.016),
            ("R1-Distill-Llama-8B", "fp16", 4097, 3.512),
            ("R1-Distill-Qwen-14B", "fp16", 3, 0.194),
            ("R1-Distill-Qwen-14B", "fp16", 513, 0.997),
            ("R1-Distill-Qwen-14B", "fp16", 1153, 1.995),
            ("R1-Distill-Qwen-14B", "fp16", 4097, 6.631),
        ),
    ),
    *_decode(
        _EMBEDL,
        _AGX,
        (
            ("Qwen3-1.7B", "fp16", 45.8),
            ("Qwen3-1.7B", "int4", 101.0),
            ("Qwen3-0.6B", "fp16", 117.5),
            ("Llama-3.2-1B", "fp16", 65.0),
            ("Llama-3.2-3B", "fp16", 25.6),
            ("Llama-3.2-3B", "int4", 61.2),
        ),
    ),
    *_decode(_AI_LAB, _AGX, (("Qwen3-4B", "int4", 42.2),)),
    *_decode(_AI_LAB, _AGX, (("Qwen3-4B", "int4", 193.8),), batch=8),
    *_decode(_MLC_ISSUE, _AGX, (("Llama-2-7B", "int4", 47.0),)),
    *_decode(_MLC_ISSUE, "agx-orin-32", (("Llama-2-7B", "int4", 19.0),)),
    *(
        figure
        for mode, column in (("15W", 0), ("MAXN_SUPER", 1))
        for figure in _decode(
            _MLC,
            _NANO,
            tuple(
                (model, "int4", values[column])
                for model, values in (
                    ("Llama-3-8B", (14.0, 19.1)),
                    ("Llama-3.2-3B", (27.7, 43.1)),
                    ("Qwen2.5-7B", (14.2, 21.8)),
                    ("SmolLM2-1.7B", (41.0, 64.5)),
                )
            ),
            mode=mode,
        )
    ),
    *_decode(
        _LLAMA_CPP,
        _AGX,
        (("Llama-2-7B", "int4", 22.5), ("Llama-2-13B", "int4", 13.3), ("Llama-3-8B", "int4", 25.0)),
    ),
    *_decode(_OLLAMA, _AGX, (("Llama-3-8B", "int4", 14.0),)),
    *_decode(_OLLAMA, _NANO, (("Llama-3.2-1B", "int4", 62.0), ("Qwen2.5-0.5B", "int4", 50.0))),
)


def has_fitted(
    kind: Kind, device: str, mode: str, precision: Precision | None, batch: int = 1
) -> bool:
    """Return whether the fit has figures of this very case; elsewhere its factors carry over.

    Args:
        kind: kind of the figure.
        device: name in `devices.MODULES`.
        mode: name of its power mode.
        precision: precision of the layers; None is one that nobody published, or several.
        batch: sequences per decode step; a factor fitted at 1 and 8 holds from one to the other.
    """
    batches = [
        figure.batch
        for figure in SPEED_FIGURES
        if figure.fitted
        and (figure.kind, figure.device, figure.precision) == (kind, device, precision)
        and MODULES[device].mode(figure.mode).name == mode
    ]
    return bool(batches) and (kind == "prefill" or min(batches) <= batch <= max(batches))
