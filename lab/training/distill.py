"""Let a teacher answer questions, and write the answers as texts to fine-tune a student on.

usage: python3 -m lab distill TEACHER_BUNDLE QUESTIONS -o ANSWERS.jsonl [--max-tokens 512] ...

This is distillation by sequences (Kim and Rush, arXiv:1606.07947), the way in which the R1 distills
themselves were made: the student learns the teacher's text, so teacher and student may have
different tokenizers, as Llama-8B and Qwen-7B do, and the reasoning is learned with the answer.

QUESTIONS is a text with one question per line, or JSONL of ``{"messages": [...]}`` that end with
the user's turn. ANSWERS.jsonl gets each chat with the teacher's turn. Answers that a limit cut off
are left out, and counted; ``--keep-cut`` keeps them, for python3 -m lab train-eagle3, whose head
learns each token by itself. An interrupted run resumes after the last answer.
"""

from __future__ import annotations

import argparse
import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edge import LLM, SamplingParams
from edge.errors import ConfigError
from edge.runtime.stream import Generation, GenerationResult
from tools.command import run_main, say

Messages = Sequence[Mapping[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(
        "python3 -m lab distill", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("teacher", type=Path, metavar="TEACHER_BUNDLE")
    parser.add_argument("questions", type=Path, metavar="QUESTIONS")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="ANSWERS.jsonl")
    parser.add_argument("--max-tokens", type=int, default=512, help="of an answer (default 512)")
    parser.add_argument("--temperature", type=float, help="default: the model's own")
    parser.add_argument("--num-slots", type=int, default=4, help="answers at once (default 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep-cut", action="store_true", help="also what --max-tokens cut")
    options = parser.parse_args()
    distill(
        options.teacher,
        read_questions(options.questions),
        options.output,
        SamplingParams(temperature=options.temperature, max_tokens=options.max_tokens),
        num_slots=options.num_slots,
        seed=options.seed,
        keep_cut=options.keep_cut,
    )


def read_questions(path: Path) -> list[Messages]:
    """Read the chats that wait for an answer.

    Raises:
        ConfigError: the file cannot be read, is empty, or a line is no such chat.
    """
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text: {error}") from error
    chats: list[Messages] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            is_json = path.suffix.lower() in (".jsonl", ".ndjson")
            chats.append(_chat(line, f"{path}: line {number}") if is_json else [_user(line)])
    if not chats:
        raise ConfigError(f"{path} is empty; give one question per line")
    return chats


def _user(text: str) -> Mapping[str, Any]:
    return {"role": "user", "content": text.strip()}


def _chat(line: str, where: str) -> Messages:
    try:
        messages = json.loads(line)["messages"]
        asks: bool = messages[-1]["role"] == "user"
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ConfigError(f'{where} must be {{"messages": [...]}}') from error
    if not asks:
        raise ConfigError(f"{where} must end with the user's turn, which the teacher answers")
    chat: Messages = messages
    return chat


def distill(
    teacher: Path,
    chats: Sequence[Messages],
    output: Path,
    params: SamplingParams,
    *,
    num_slots: int = 4,
    seed: int = 0,
    keep_cut: bool = False,
) -> tuple[int, int]:
    """Write the teacher's answers to ``output``, in the order of the questions.

    What an earlier run wrote stays, and its questions are not asked again.

    Args:
        teacher: a bundle.
        chats: chats to answer.
        output: JSONL of ``{"messages": [...]}``.
        params: sampling; question ``i`` has the seed plus i.
        num_slots: answers that are computed at once.
        seed: seed of question 0, added to for the others.
        keep_cut: whether to keep answers that ``max_tokens`` cut.

    Returns:
        How many answers this run wrote, and how many it left out because they were cut.

    Raises:
        EdgeError: the bundle cannot be opened, or a question cannot be answered.
        ConfigError: ``output`` has answers to other questions.
    """
    questions = list(enumerate(chats))
    for answered in _answered(output):
        at = next((i for i, (_, chat) in enumerate(questions) if list(chat) == answered), None)
        if at is None:
            raise ConfigError(
                f"{output} has an answer to a question that is not among these; give another output"
            )
        questions.pop(at)
    counts = {"written": 0, "left out": 0}
    reasons = ("stop", "length") if keep_cut else ("stop",)
    running: deque[tuple[Messages, Generation]] = deque()
    with LLM(teacher, num_slots=num_slots) as llm, output.open("a", encoding="utf-8") as file:

        def take() -> None:
            chat, generation = running.popleft()
            result = generation.result()
            line = _line(chat, result) if result.finish_reason in reasons else None
            counts["written" if line else "left out"] += 1
            if line:
                file.write(line + "\n")
                file.flush()
            say(f"{counts['written']} written, {counts['left out']} left out of {len(questions)}")

        for index, chat in questions:
            generation = llm.submit(chat, replace(params, seed=seed + index))
            running.append((chat, generation))
            if len(running) == 4 * num_slots:  # so many wait that a long answer leaves no slot idle
                take()
        while running:
            take()
    return counts["written"], counts["left out"]


def _line(chat: Messages, result: GenerationResult) -> str:
    """Write a line of the output."""
    turn = {"role": "assistant", "content": result.text}
    if result.reasoning:
        turn["reasoning"] = result.reasoning
    return json.dumps({"messages": [*chat, turn]}, ensure_ascii=False)


def _answered(output: Path) -> list[list[Any]]:
    """Read the questions that an earlier run answered; cut off half a line at the end."""
    if not output.exists():
        return []
    data = output.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        output.write_bytes(whole)
    try:
        # A text's own line separators, such as U+2028, are in the JSON as they are.
        return [json.loads(line)["messages"][:-1] for line in whole.split(b"\n")[:-1]]
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{output} is no output of this script; give another one") from error


if __name__ == "__main__":
    run_main(main)
