"""Sampling where the source states none: the family's published values, and the family is named."""

from __future__ import annotations

import pytest

from edge.bundle.manifest import SamplingDefaults
from edge_make.manifest_text import describe_sampling
from export.sources.assumed_sampling import assume_sampling
from export.sources.checkpoint_text import sampling_defaults

CHATML = "{{'<|im_start|>' + message['role']}}"
R1 = "{{'<｜Assistant｜>' + message['content'].split('</think>')[-1]}}"
QWEN3 = CHATML + "{% if enable_thinking is false %}<think>\n\n</think>{% endif %}"
LLAMA = "<|start_header_id|>{{ message['role'] }}<|end_header_id|>{{ content }}<|eot_id|>"
SMOLLM = CHATML + "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QWEN25 = CHATML + "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


def assumed(names: list[str | None], template: str | None, **stated: float) -> SamplingDefaults:
    return assume_sampling(sampling_defaults(stated, "g"), stated, names, template)


@pytest.mark.parametrize(
    ("names", "template", "family", "values"),
    [
        # By name, as general.name of a GGUF, a hub id or a file name spells it.
        (["DeepSeek R1 Distill Qwen 1.5B"], CHATML, "DeepSeek-R1", (0.6, 0, 0.95, 1.0)),
        (["deepseek-ai/DeepSeek-R1-Distill-Llama-8B"], LLAMA, "DeepSeek-R1", (0.6, 0, 0.95, 1.0)),
        ([None, "qwen3-4b-q4_k_m"], CHATML, "Qwen3", (0.6, 20, 0.95, 1.0)),
        (["Qwen3-4B-Instruct-2507"], CHATML, "Qwen3-Instruct-2507", (0.7, 20, 0.8, 1.0)),
        (
            ["Qwen2.5 Coder 1.5B Instruct GGUF"],
            CHATML,
            "Qwen2.5-Instruct 0.5B and 1.5B",
            (0.7, 20, 0.8, 1.1),
        ),
        (["Qwen2.5-7B-Instruct"], CHATML, "Qwen2.5-Instruct", (0.7, 20, 0.8, 1.05)),
        (["Meta-Llama-3.1-8B-Instruct"], CHATML, "Llama-3-Instruct", (0.6, 0, 0.9, 1.0)),
        (["Smollm2 135M 8k Lc100K Mix1 Ep2"], CHATML, "SmolLM2-Instruct", (0.2, 0, 0.9, 1.0)),
        # By template, where the name tells nothing.
        (["model"], R1, "DeepSeek-R1", (0.6, 0, 0.95, 1.0)),
        (["model"], QWEN3, "Qwen3", (0.6, 20, 0.95, 1.0)),
        (["model"], QWEN25, "Qwen2.5-Instruct", (0.7, 20, 0.8, 1.05)),
        (["model"], LLAMA, "Llama-3-Instruct", (0.6, 0, 0.9, 1.0)),
        (["model"], SMOLLM, "SmolLM2-Instruct", (0.2, 0, 0.9, 1.0)),
        # What was taught to reason keeps the name of what it was made from.
        (["Qwen2.5-1.5B-reasoner"], R1, "DeepSeek-R1", (0.6, 0, 0.95, 1.0)),
    ],
    ids=str,
)
def test_a_family_gets_what_its_authors_published(names, template, family, values):
    temperature, top_k, top_p, repetition_penalty = values
    assert assumed(names, template) == SamplingDefaults(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        assumed=family,
    )


@pytest.mark.parametrize(
    ("names", "template"),
    [
        (["model"], CHATML),
        (["Qwen3.5-4B"], CHATML),  # another family, of which nothing is known here
        (["Qwen2.5-Math-1.5B-Instruct"], CHATML),  # published as greedy
        (["SmolLM2-135M"], None),  # a base model: the values are for chats
    ],
    ids=str,
)
def test_any_other_model_is_cut_off_moderately(names, template):
    assert assumed(names, template) == SamplingDefaults(
        temperature=0.7, top_p=0.95, min_p=0.05, assumed="no known family"
    )


@pytest.mark.parametrize("key", ["temperature", "top_p", "min_p", "top_k"])
def test_a_source_that_states_how_to_choose_is_followed(key):
    stated = {key: 1}
    assert assumed(["DeepSeek-R1"], R1, **stated) == sampling_defaults(stated, "g")


def test_a_stated_penalty_alone_is_kept_beside_assumed_values():
    found = assumed(["Qwen2.5-1.5B-Instruct"], QWEN25, repetition_penalty=1.2)
    assert (found.temperature, found.repetition_penalty) == (0.7, 1.2)
    assert found.assumed == "Qwen2.5-Instruct 0.5B and 1.5B"


def test_a_person_reads_that_it_was_assumed():
    assert describe_sampling(SamplingDefaults(0.6, 0, 0.95, assumed="DeepSeek-R1")) == (
        "temperature 0.6, top_k 0, top_p 0.95, min_p 0, repetition_penalty 1, assumed (DeepSeek-R1)"
    )
    assert "assumed" not in describe_sampling(SamplingDefaults(0.6))
