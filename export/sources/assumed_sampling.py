"""Assumes sampling for a source that states none: the values that the model's authors published.

GGUF files rarely carry a generation config. Nobody would choose temperature 1 with nothing cut off:
small models leave the subject within a sentence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from edge.bundle.manifest import SamplingDefaults

_TRUNCATION = ("temperature", "top_k", "top_p", "min_p")
_R1_TURN = "<｜Assistant｜>"


@dataclass(frozen=True)
class _Family:
    """A family of instruct models and the sampling that its authors published.

    Attributes:
        name: name in messages and in the manifest.
        pattern: pattern for the model's names, lower case, with ``-`` for ``_`` and blanks.
        sampling: values to use where the source states none.
        template: texts that all occur in the family's chat template, and in no other family's; a
            model without a telling name is recognised by them. Empty if none is unique.
        source: where the values are published.
    """

    name: str
    pattern: str
    sampling: SamplingDefaults
    template: tuple[str, ...] = ()
    source: str = ""

    def fits(self, names: Iterable[str], chat_template: str) -> bool:
        """Return whether a model of these names, in the form of ``pattern``, is of the family."""
        if any(re.search(self.pattern, name) for name in names):
            return True
        return bool(self.template) and all(text in chat_template for text in self.template)


def _qwen2(repetition_penalty: float) -> SamplingDefaults:
    return SamplingDefaults(
        temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=repetition_penalty
    )


# The first that fits by name or template wins: a reasoning template says more than the name of the
# model that was taught to reason.
_FAMILIES = (
    _Family(
        "DeepSeek-R1",
        r"deepseek-?r1",
        SamplingDefaults(temperature=0.6, top_p=0.95),
        (_R1_TURN, "</think>"),
        "README of deepseek-ai/DeepSeek-R1, usage recommendations",
    ),
    _Family(
        "Qwen3-Instruct-2507",
        r"qwen-?3(?![\d.]).*instruct-2507",
        SamplingDefaults(temperature=0.7, top_k=20, top_p=0.8),
        source="generation_config.json of Qwen/Qwen3-4B-Instruct-2507",
    ),
    _Family(
        "Qwen3",
        r"qwen-?3(?![\d.])",
        SamplingDefaults(temperature=0.6, top_k=20, top_p=0.95),
        ("<|im_start|>", "enable_thinking", "<think>"),
        "generation_config.json of Qwen/Qwen3-0.6B to 32B",
    ),
    _Family(
        "Qwen2.5-Instruct 0.5B and 1.5B",
        r"qwen-?2\.5(?!-math).*(?<![\d.])(0\.5|1\.5)b",
        _qwen2(1.1),
        source="generation_config.json of Qwen/Qwen2.5-0.5B-Instruct and 1.5B-Instruct",
    ),
    _Family(
        "Qwen2.5-Instruct",
        r"qwen-?2\.5(?!-math)",
        _qwen2(1.05),
        ("You are Qwen, created by Alibaba Cloud.",),
        "generation_config.json of Qwen/Qwen2.5-7B-Instruct and Qwen2.5-Coder-32B-Instruct",
    ),
    _Family(
        "Llama-3-Instruct",
        r"llama-?3",
        SamplingDefaults(temperature=0.6, top_p=0.9),
        ("<|start_header_id|>", "<|eot_id|>"),
        "generation_config.json of meta-llama/Llama-3.1-8B-Instruct and Llama-3.2-3B-Instruct",
    ),
    _Family(
        "SmolLM2-Instruct",
        r"smollm-?2",
        SamplingDefaults(temperature=0.2, top_p=0.9),
        ("You are a helpful AI assistant named SmolLM",),
        "model card of HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
)
_ANY = SamplingDefaults(temperature=0.7, top_p=0.95, min_p=0.05)
_ANY_NAME = "no known family"


def assume_sampling(
    sampling: SamplingDefaults,
    generation: Mapping[str, Any],
    names: Iterable[str | None],
    chat_template: str | None,
) -> SamplingDefaults:
    """Return the sampling of a model: its source's, or its family's if the source states none.

    Temperature, top-k, top-p and min-p are one choice. A source that states any of them is
    followed, and the others stay neutral, since nobody recommends a mixture. A repetition penalty
    alone cuts nothing off, so it is kept and the others are assumed.

    Args:
        sampling: sampling that the source states, neutral where it is silent.
        generation: content of the source's ``generation_config.json``.
        names: names that the source gives the model; None where it gives none.
        chat_template: Jinja source; a model without one is not an instruct model.

    Returns:
        ``sampling``, or assumed values whose ``assumed`` names the family.
    """
    if any(generation.get(key) is not None for key in _TRUNCATION):
        return sampling
    known = [re.sub(r"[\s_-]+", "-", name.lower()) for name in names if name]
    name, values = _ANY_NAME, _ANY
    if chat_template is not None:
        family = next((f for f in _FAMILIES if f.fits(known, chat_template)), None)
        if family is not None:
            name, values = family.name, family.sampling
    penalty = generation.get("repetition_penalty")
    return SamplingDefaults(
        temperature=values.temperature,
        top_k=values.top_k,
        top_p=values.top_p,
        min_p=values.min_p,
        repetition_penalty=(
            values.repetition_penalty if penalty is None else sampling.repetition_penalty
        ),
        assumed=name,
    )
