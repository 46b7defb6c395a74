"""Runs tasks with right answers from a local JSONL file: accuracy, and a paired test of bundles.

Three layouts, one JSON object per line; other keys are ignored:

- multiple choice (MMLU): ``{"question", "choices": [...], "answer": 2}``; the answer is an index
  or a letter.
- generation (GSM8K): ``{"question", "answer": "... #### 42"}``; the answer ends in a number.
- programs (HumanEval): ``{"question": "def f(x): ...", "tests": "assert f(1) == 2"}``.

Multiple choice compares log-probabilities of the choices after one prompt; nothing is sampled.
A generated answer is right if its final number equals the expected one, exactly; a program if its
tests pass (`edge_lab.measure.programs`).
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge.backends.step import all_tokens, prefill
from edge.errors import ConfigError, ContextLengthError, RequestError
from edge.files import MALFORMED
from edge.logprobs import check_finite, token_logprobs
from edge.runtime.llm import LLM, Prompt
from edge.runtime.sampling_params import SamplingParams
from edge.runtime.stream import GenerationResult
from edge.votes.numbers import find_number, parse_number

from .compare import CHUNK_TOKENS
from .evaluate import read_text
from .programs import (
    ProgramItem,
    chat_request,
    check_program,
    function_name,
    program_of_answer,
    program_of_continuation,
)

Scoring = Literal["letter", "text"]

_Z_95 = 1.959963984540054  # 97.5 % quantile of the normal distribution
_NEXT_QUESTION = "\nQuestion:"
_INSTRUCTION = "\nPut your final answer, a number, within \\boxed{}."


class ChoiceItem(msgspec.Struct, frozen=True):
    """A question with choices; ``answer`` is the index of the right one."""

    question: str
    choices: tuple[str, ...]
    answer: int | str

    @property
    def expected(self) -> str:
        """The letter of the right choice."""
        if isinstance(self.answer, str):
            return self.answer.strip().upper()
        return string.ascii_uppercase[self.answer]


class NumberItem(msgspec.Struct, frozen=True):
    """A question with a numeric answer."""

    question: str
    answer: str

    @property
    def expected(self) -> str:
        """The number as it is written in the file."""
        return self.answer.rsplit("####", 1)[-1].strip()


Item = ChoiceItem | NumberItem | ProgramItem


@dataclass(frozen=True)
class ItemResult:
    """A bundle's answer to one item.

    Attributes:
        line: the item's line in the file, from 1.
        expected: the right letter or number; ``passes`` for a program.
        answer: the letter or number that was found, ``passes``, or the failure of a program; None
            if the text holds no number or no program.
        correct: whether it is right.
        cut: whether a limit of tokens or a full KV cache ended the text.
    """

    line: int
    expected: str
    answer: str | None
    correct: bool
    cut: bool = False


# ------------------------------------------------------------------------------- the file


def read_task(path: Path, limit: int | None = None) -> list[tuple[int, Item]]:
    """Read the items of a task file with their line numbers; blank lines are skipped.

    Raises:
        ConfigError: a line fits no layout (it is named), layouts are mixed, or there is no item.
    """
    items: list[tuple[int, Item]] = []
    # Not splitlines: JSON strings may hold U+2028.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            item = _parse_item(line)
        except MALFORMED as error:
            raise ConfigError(
                f'{path}, line {number}: {error}; a line is {{"question", "choices", '
                '"answer": 2}, {"question", "answer": "... #### 42"} or {"question", "tests"}'
            ) from error
        if items and type(item) is not type(items[0][1]):
            raise ConfigError(
                f"{path}, line {number}: line {items[0][0]} has another layout; keep questions "
                "with choices, with numbers and with tests in files of their own"
            )
        items.append((number, item))
    if not items:
        raise ConfigError(f"{path} holds no question")
    return items[:limit]


def _parse_item(line: str) -> Item:
    raw = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
    if "tests" in raw:
        return _checked_program(msgspec.json.decode(line, type=ProgramItem))
    if "choices" not in raw:
        number = msgspec.json.decode(line, type=NumberItem)
        if parse_number(number.expected) is None:
            raise ValueError(f"the answer {number.expected!r} does not end in a number")
        return number
    item = msgspec.json.decode(line, type=ChoiceItem)
    letters = string.ascii_uppercase[: len(item.choices)]
    if not 2 <= len(item.choices) <= len(string.ascii_uppercase):
        raise ValueError(f"2 to 26 choices are needed, found {len(item.choices)}")
    if isinstance(item.answer, int):
        known = 0 <= item.answer < len(item.choices)
    else:
        known = len(item.expected) == 1 and item.expected in letters
    if not known:
        raise ValueError(f"the answer {item.answer!r} is none of {len(item.choices)} choices")
    return item


def _checked_program(item: ProgramItem) -> ProgramItem:
    if function_name(item) is None:
        raise ValueError("the question has no line that begins with 'def '")
    if not item.tests.strip():
        raise ValueError("the tests are empty, so any program would pass")
    try:
        compile(item.tests, "tests", "exec")
    except (SyntaxError, MemoryError, RecursionError) as error:  # the last two: nested too deep
        raise ValueError(f"the tests are no Python: {error}") from error
    return item


# ------------------------------------------------------------------------------- running


def check_item(llm: LLM, item: Item, where: str, scoring: Scoring = "letter") -> None:
    """Refuse a question that a bundle cannot answer, before its turn comes.

    Args:
        llm: the bundle.
        item: the question.
        where: its file and line.
        scoring: how choices are compared, as in `answer_item`.

    Raises:
        ConfigError: the question does not fit into the KV cache, or cannot be encoded.
    """
    try:
        if isinstance(item, ChoiceItem):
            _encode_choices(llm, item, scoring)
            return
        prompt = _prompt(llm, item if isinstance(item, ProgramItem) else _question(item))
        ids = llm.encode(prompt, max_tokens=llm.kv_capacity)
        if len(ids) >= llm.kv_capacity:
            raise ContextLengthError(len(ids), llm.kv_capacity)
    except RequestError as error:
        raise ConfigError(f"{where}: {error}") from error


def answer_item(
    llm: LLM,
    line: int,
    item: Item,
    *,
    scoring: Scoring = "letter",
    params: SamplingParams | None = None,
) -> ItemResult:
    """Let a bundle answer an item.

    Args:
        llm: the bundle.
        line: the item's line, as `read_task` returned it.
        item: the question.
        scoring: how choices are compared: their letters, or their texts by log-probability per
            byte.
        params: how answers are generated.

    Raises:
        ContextLengthError: the question does not fit into the KV cache.
        BackendError: the engine failed.
        ResourceError: this machine cannot keep a program from files and network.
    """
    if isinstance(item, ChoiceItem):
        scores = choice_scores(llm, item, scoring)
        choice = string.ascii_uppercase[int(np.argmax(scores))]
        return ItemResult(line, item.expected, choice, choice == item.expected)
    if isinstance(item, ProgramItem):
        written = llm.generate(_prompt(llm, item), params)
        answer = _check_program(item, written.text, is_chat=llm.template is not None)
        correct = answer == item.expected
    else:
        written = ask_question(llm, _question(item), params)
        answer = find_number(written.text)
        correct = answer is not None and parse_number(answer) == parse_number(item.expected)
    return ItemResult(line, item.expected, answer, correct, written.finish_reason == "length")


def choice_scores(llm: LLM, item: ChoiceItem, scoring: Scoring) -> list[float]:
    """Compute each choice's log-probability after the prompt: its letter's, or its text's per byte.

    The choices share the cache rows of the longest common prefix of their tokens, so the prompt
    runs once.
    """
    ids = _encode_choices(llm, item, scoring)
    sizes = [max(1, len(text.encode())) if scoring == "text" else 1 for text in item.choices]
    shared = 0
    while all(len(row) > shared + 1 and row[shared] == ids[0][shared] for row in ids):
        shared += 1

    def run() -> list[float]:
        # Run the token before the first difference again with each choice, for its logits.
        for _, logits in prefill(llm.backend, llm.embeddings, ids[0][: shared - 1]):
            check_finite(logits)
        return [_continuation(llm, row, shared) for row in ids]

    return [score / size for score, size in zip(llm.call(run), sizes, strict=True)]


def _encode_choices(llm: LLM, item: ChoiceItem, scoring: Scoring) -> list[NDArray[np.int64]]:
    """Encode the prompt with each choice."""
    prompt = f"Question: {item.question.strip()}\n"
    texts: Sequence[str] = item.choices
    if scoring == "letter":
        texts = string.ascii_uppercase[: len(texts)]
        listed = zip(texts, item.choices, strict=True)
        prompt += "".join(f"{letter}. {text}\n" for letter, text in listed)
    ids = [np.asarray(llm.encode(f"{prompt}Answer: {text}"), dtype=np.int64) for text in texts]
    if max(map(len, ids)) >= llm.kv_capacity:
        raise ContextLengthError(max(map(len, ids)), llm.kv_capacity)
    return ids


def _continuation(llm: LLM, ids: NDArray[np.int64], shared: int) -> float:
    """Sum the log-probabilities of ``ids[shared:]``; rows up to ``shared - 1`` are in the cache."""
    past, score = shared - 1, 0.0
    for part, logits in prefill(
        llm.backend,
        llm.embeddings,
        ids[past:-1],
        past=past,
        max_tokens=CHUNK_TOKENS,
        wanted=all_tokens,
    ):
        score += float(token_logprobs(logits, ids[shared:][part]).sum())
    return score


def ask_question(
    llm: LLM, question: str, params: SamplingParams | None = None, **options: Any
) -> GenerationResult:
    """Let a bundle answer a question, through its chat template where it has one.

    A model without one goes on after the answer with the next question; that part is cut off.

    Args:
        llm: the bundle.
        question: the question.
        params: how the answer is generated.
        **options: options of `LLM.submit`, for a chat; a model without one takes ``adapter`` only.

    Raises:
        ContextLengthError: the question does not fit into the KV cache.
        BackendError: the engine failed.
    """
    if llm.template is None:
        params = params or SamplingParams()
        params = replace(params, stop=(*params.stop, _NEXT_QUESTION))
        options = {"adapter": name} if (name := options.get("adapter")) else {}
    return llm.generate(_prompt(llm, question), params, **options)


def _question(item: NumberItem) -> str:
    return item.question.strip() + _INSTRUCTION


def _prompt(llm: LLM, asked: str | ProgramItem) -> Prompt:
    """Make a chat, or the text to go on with if the bundle has no chat template."""
    if isinstance(asked, ProgramItem):
        text, message = asked.question.rstrip() + "\n", chat_request(asked)
    else:
        text, message = f"Question: {asked}\nAnswer:", asked
    return text if llm.template is None else [{"role": "user", "content": message}]


def _check_program(item: ProgramItem, text: str, *, is_chat: bool) -> str | None:
    """Return a program's failure, or ``item.expected``; None if the answer has no program."""
    program = program_of_answer(item, text) if is_chat else program_of_continuation(item, text)
    if program is None:
        return None
    return check_program(item, program) or item.expected


# ------------------------------------------------------------------------------- statistics


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Compute the 95 % interval of a proportion (Wilson, 1927); sound also at 0 and at 1."""
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes} of {trials} is no proportion")
    share, z2 = successes / trials, _Z_95**2
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    spread = math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    half = _Z_95 * spread / (1 + z2 / trials)
    # Return exactly 0 and 1 at the ends, where rounding would leave 1e-17.
    low = 0.0 if successes == 0 else middle - half
    return low, 1.0 if successes == trials else middle + half


def mcnemar_exact(lost: int, won: int) -> float:
    """Compute the two-sided p-value of McNemar's exact test.

    Args:
        lost: items that the reference got right and the bundle wrong.
        won: the other way round.

    Returns:
        Probability of a split at least this uneven if both were equally good.
    """
    if min(lost, won) < 0:
        raise ValueError(f"counts cannot be negative: {lost}, {won}")
    flips = lost + won
    tail = ways = 1  # C(flips, 0)
    for k in range(min(lost, won)):
        ways = ways * (flips - k) // (k + 1)  # C(flips, k + 1), exactly
        tail += ways
    return min(1.0, float(Fraction(2 * tail, 2**flips)))


def loss_interval(lost: int, won: int, pairs: int) -> tuple[float, float]:
    """Compute the 95 % interval of ``(lost - won) / pairs``, a difference of paired proportions.

    Half an item is added to each cell of the table (Agresti and Min, Statistics in Medicine 2005,
    doi:10.1002/sim.1781), so the interval has a width even if nothing flipped.
    """
    if min(lost, won) < 0 or lost + won > pairs or pairs < 1:
        raise ValueError(f"{lost} lost and {won} won of {pairs} are no counts")
    down, up, total = lost + 0.5, won + 0.5, pairs + 2
    middle = (down - up) / total
    half = _Z_95 * math.sqrt(down + up - (down - up) ** 2 / total) / total
    return max(-1.0, middle - half), min(1.0, middle + half)


def summarize_task(results: Sequence[ItemResult]) -> dict[str, object]:
    """Compute accuracy with its interval.

    ``unanswered`` counts answers without a number or a program, ``cut`` those that a limit ended;
    ``wrong`` lists the lines of the items that were not right, so that results of separate runs
    can be paired.
    """
    correct = sum(result.correct for result in results)
    return {
        "items": len(results),
        "correct": correct,
        "accuracy": correct / len(results),
        "accuracy_interval": wilson_interval(correct, len(results)),
        "unanswered": sum(result.answer is None for result in results),
        "cut": sum(result.cut for result in results),
        "wrong": [result.line for result in results if not result.correct],
    }


def compare_task(
    results: Sequence[ItemResult], reference: Sequence[ItemResult]
) -> dict[str, object]:
    """Compare a bundle with its reference on the same items, pair by pair; every flip is listed."""
    pairs = list(zip(results, reference, strict=True))
    flips = [(ours, theirs) for ours, theirs in pairs if ours.correct != theirs.correct]
    lost = sum(theirs.correct for _, theirs in flips)
    return {
        "accuracy_loss": (2 * lost - len(flips)) / len(pairs),
        "accuracy_loss_interval": loss_interval(lost, len(flips) - lost, len(pairs)),
        "lost": lost,
        "won": len(flips) - lost,
        "mcnemar_p": mcnemar_exact(lost, len(flips) - lost),
        "flips": [
            {
                "line": ours.line,
                "expected": ours.expected,
                "answer": ours.answer,
                "answer_reference": theirs.answer,
            }
            for ours, theirs in flips
        ],
    }
