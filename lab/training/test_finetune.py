"""`lab distill` and `scripts/finetune`: what a teacher answers, and what a student learns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge import LLM, EdgeError, SamplingParams
from edge.errors import ConfigError
from export.pipeline import ExportConfig, export_checkpoint
from export.sources.opening import open_checkpoint
from tests.conftest import TINY_KV_CAPACITY, Bundles, Checkpoints
from tests.makers.tiny_models import BOS_ID, CONTROL_IDS, EOS_ID

from .distill import distill, read_questions
from .finetune import NOT_LEARNED, encode, finetune

PARAMS = SamplingParams(temperature=1.0, max_tokens=40, logit_bias={EOS_ID: 6.0})
QUESTIONS = [[{"role": "user", "content": f"what {i}"}] for i in range(7)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


# ------------------------------------------------------------------------------- distillation


@pytest.fixture
def answers(tiny_bundles: Bundles, tmp_path: Path) -> Path:
    output = tmp_path / "answers.jsonl"
    written, left_out = distill(tiny_bundles("qwen2"), QUESTIONS, output, PARAMS, seed=3)
    assert written + left_out == len(QUESTIONS)
    assert written > 2
    assert written == len(lines(output))
    return output


def test_the_answers_are_the_teachers_and_have_ended(tiny_bundles: Bundles, answers: Path):
    asked = [line["messages"][:-1] for line in lines(answers)]
    assert asked == [chat for chat in QUESTIONS if chat in asked]  # in order, some left out
    with LLM(tiny_bundles("qwen2"), num_threads=1) as llm:
        for line in lines(answers):
            *chat, answer = line["messages"]
            seed = 3 + QUESTIONS.index(chat)
            expected = llm.generate(chat, SamplingParams(**{**vars(PARAMS), "seed": seed}))
            assert expected.finish_reason == "stop"
            assert answer["content"] == expected.text
            assert answer.get("reasoning", "") == expected.reasoning


def test_a_draft_head_learns_from_cut_answers_too(tiny_bundles: Bundles, tmp_path: Path):
    output = tmp_path / "cut.jsonl"
    bundle, params = tiny_bundles("qwen2"), SamplingParams(temperature=1.0, max_tokens=5)
    assert distill(bundle, QUESTIONS, output, params, keep_cut=True) == (len(QUESTIONS), 0)
    with LLM(bundle, num_threads=1) as llm:
        results = [llm.generate(q, replace(params, seed=i)) for i, q in enumerate(QUESTIONS)]
    assert "length" in [result.finish_reason for result in results]
    assert [line["messages"][-1]["content"] for line in lines(output)] == [
        result.text for result in results
    ]


def test_an_interrupted_run_goes_on(tiny_bundles: Bundles, answers: Path):
    whole = answers.read_bytes()
    first, second = whole.split(b"\n")[:2]
    answers.write_bytes(first + b"\n" + second[:20])  # killed while it wrote
    distill(tiny_bundles("qwen2"), QUESTIONS, answers, PARAMS, seed=3)
    assert answers.read_bytes() == whole
    with pytest.raises(ConfigError, match="not among these"):
        distill(tiny_bundles("qwen2"), QUESTIONS[-1:], answers, PARAMS)
    answers.write_text("{}\n")
    with pytest.raises(ConfigError, match="no output of this script"):
        distill(tiny_bundles("qwen2"), QUESTIONS, answers, PARAMS)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_run_goes_on_after_texts_with_other_line_separators(
    separator: str, tiny_bundles: Bundles, answers: Path
):
    first, rest = lines(answers)[0], answers.read_bytes().split(b"\n", 1)[1]
    first["messages"][-1]["content"] = f"one{separator}two"
    whole = json.dumps(first, ensure_ascii=False).encode() + b"\n" + rest
    answers.write_bytes(whole)
    distill(tiny_bundles("qwen2"), QUESTIONS, answers, PARAMS, seed=3)
    assert answers.read_bytes() == whole


def test_questions_are_lines_or_chats(tmp_path: Path):
    text, chats = tmp_path / "questions.txt", tmp_path / "questions.jsonl"
    text.write_text("what 0\n\n  what 1 \n", "utf-8")
    assert read_questions(text) == QUESTIONS[:2]
    chats.write_text("\n".join(json.dumps({"messages": chat}) for chat in QUESTIONS), "utf-8")
    assert read_questions(chats) == QUESTIONS
    for content, message in (
        ("", "is empty"),
        ("what", "line 1 must be"),
        ('{"messages": []}', "line 1 must be"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "end with the user's turn"),
    ):
        chats.write_text(content)
        with pytest.raises(ConfigError, match=message):
            read_questions(chats)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_questions(tmp_path / "absent")


# --------------------------------------------------------------------------------- fine-tuning


def test_only_the_answer_is_learned_in_the_models_own_form(
    tiny_checkpoints: Checkpoints, tiny_bundles: Bundles
):
    turn = {"role": "assistant", "content": "the world", "reasoning": "hm <think>"}
    with open_checkpoint(str(tiny_checkpoints("qwen2"))) as checkpoint:
        chat, text = encode(
            checkpoint, [{"messages": [*QUESTIONS[0], turn]}, {"text": "hello"}], 999
        )
    with LLM(tiny_bundles("qwen2"), num_threads=1) as llm:
        prompt = llm.encode(QUESTIONS[0])
        plain = llm.tokenizer.encode
    learned = [*plain("hm <think>\n"), CONTROL_IDS["</think>"], *plain("\n\nthe world"), EOS_ID]
    assert chat.ids == prompt + learned
    assert chat.labels == [NOT_LEARNED] * len(prompt) + learned
    assert text.ids == text.labels == [BOS_ID, *plain("hello\n\n")]
    assert text.num_learned == len(text.ids) - 1


def test_texts_that_teach_nothing(tiny_checkpoints: Checkpoints, tmp_path: Path):
    source = str(tiny_checkpoints("qwen2"))
    with open_checkpoint(source) as checkpoint:
        long = {"messages": [*QUESTIONS[0], {"role": "assistant", "content": "a"}]}
        assert encode(checkpoint, [long], 3) == []
        with pytest.raises(ConfigError, match="text 1 does not end with the assistant's turn"):
            encode(checkpoint, [{"messages": QUESTIONS[0]}], 99)
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "hello"}\n' * 9)
    options: dict[str, Any] = {
        "epochs": 1, "learning_rate": 1e-3, "rank": 2, "batch_size": 2, "accumulate": 1,
        "max_tokens": 64, "seed": 0,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="has 9 texts with something to learn; give 10"):
        finetune(source, texts, tmp_path / "adapter", **options)
    for name, value in (("rank", 0), ("epochs", float("nan")), ("batch_size", -1)):
        option = name.replace("_", "-")
        with pytest.raises(ConfigError, match=f"--{option} {value} must be a number above 0"):
            finetune(source, texts, tmp_path / "adapter", **{**options, name: value})
    with pytest.raises(ConfigError, match="is not empty"):
        finetune(source, texts, tmp_path, **options)


@pytest.mark.slow
@pytest.mark.parity
def test_a_trained_adapter_changes_the_bundle(tiny_checkpoints: Checkpoints, tmp_path: Path):
    """From texts to a bundle that answers with what they say."""
    for module in ("torch", "transformers", "peft"):
        pytest.importorskip(module, reason="live parity needs torch, transformers and peft")
    texts, adapter = tmp_path / "texts.jsonl", tmp_path / "adapter"
    chat = {"messages": [*QUESTIONS[0], {"role": "assistant", "content": "the hello world"}]}
    texts.write_text((json.dumps(chat) + "\n") * 20)
    # In a process of its own: torch brings threads, and warnings that are errors here.
    done = subprocess.run(
        [sys.executable, "-m", "lab.training.finetune", tiny_checkpoints("qwen2"), texts,
         "-o", adapter, "--epochs", "8", "--learning-rate", "0.02", "--rank", "8"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["loss_after"] < 0.5 * report["loss_before"]
    export_checkpoint(
        ExportConfig(
            source=str(tiny_checkpoints("qwen2")), output=tmp_path / "bundle", quant="fp16",
            lora=adapter, kv_capacity=TINY_KV_CAPACITY, dialect="portable",
        )
    )  # fmt: skip
    with LLM(tmp_path / "bundle", num_threads=1) as llm:
        params = SamplingParams(temperature=0, max_tokens=20)
        answer = llm.generate(QUESTIONS[0], params, thinking=False)
    # Control tokens have rows of their own in the lm_head, which the adapter leaves as they are:
    # the end of the reasoning, which the texts have before the answer, is in the prompt.
    assert answer.text.startswith("the hello world")


def test_a_missing_library_says_what_to_run(
    tiny_checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "peft", None)
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "hello"}\n' * 10)
    with pytest.raises(EdgeError, match="peft is missing; run scripts/finetune"):
        finetune(
            str(tiny_checkpoints("qwen2")), texts, tmp_path / "adapter", epochs=1,
            learning_rate=1e-3, rank=2, batch_size=2, accumulate=1, max_tokens=64, seed=0,
        )  # fmt: skip
