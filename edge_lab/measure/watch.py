"""Tells whether a bundle is still what it was, by a golden set of prompts asked on a schedule.

Every prompt is answered greedily, so a bundle on one engine gives the same answers each time. A
change after an update of the engine, the system or the bundle shows as flips of single items. Four
things are judged: whether the expected answer is there, whether the model refuses, whether it
loops, and how long it writes. The perplexity of a text is judged as well.

A rate is an alarm if it got worse by more than `Limits.rate` and McNemar's exact test, on the items
that differ, finds that unlikely to be chance (`Limits.p_value`). So twenty items decide nothing.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from edge.errors import ConfigError
from edge.files import MALFORMED, read_file
from edge.runtime.llm import LLM
from edge.runtime.sampling_params import SamplingParams
from edge.votes.numbers import find_number, parse_number
from edge_make.progress import Progress, silent

from . import compare, evaluate
from .defaults import MAX_TOKENS, TEXT_TOKENS
from .drift import write_atomic
from .tasks import ask_question, mcnemar_exact

BASELINE_VERSION = 1
_WINDOW_TOKENS = 512
_LOOP_CHARS = 160  # a shorter repetition may be a table or a list
_MAX_PERIOD_CHARS = 400

_REFUSAL = re.compile(
    r"\b(?:i(?:'m| am) (?:sorry|unable|not able)|i must decline"
    r"|i (?:can(?: ?not|'t)|will not|won't)(?! (?:(?:help|wait|find|see|remember|believe|imagine"
    r"|overstate|stress|emphasi[sz]e|use|need|go|think of|tell (?:if|whether|apart)"
    r"|be (?:sure|certain))\b(?! (?:you|with)\b)))"
    r"|as an ai(?: language)? model|against my (?:guidelines|programming))\b"
    r"|(?:我[^，,。！？\n]{0,5}|(?:抱歉|对不起|遗憾)[^。！？\n]{0,20})(?:无法|不能|不便)"
    r"[^，,。！？\n]{0,4}(?:回答|提供|讨论|谈论|评论|协助|帮助|帮[你您]|满足|生成|透露)"
    r"|作为(?:一[个名款种])? ?(?:人工智能|AI) ?(?:语言模型|模型|助手|助理)[，,]? ?"
    r"我[^，,。！？\n]{0,3}(?:没有|无法|不能|不会|不具|不便|不应)",
    re.IGNORECASE,
)
_WORDS = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+")  # Chinese puts no spaces between words
_NUMBER = re.compile(r"-?\d[\d.,/]*")
_MAX_BASELINE_BYTES = 1 << 26


class GoldenItem(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of a golden set.

    Attributes:
        id: its name in reports, unique.
        prompt: the user's message.
        answer: text that a right answer holds; None is not judged.
    """

    id: str
    prompt: str
    answer: str | None = None


class ModelAnswer(msgspec.Struct, frozen=True):
    """A model's answer.

    Attributes:
        text: the answer without the reasoning.
        reasoning: the text inside ``<think>``.
        tokens: number of sampled tokens.
        finish_reason: ``stop`` or ``length``.
        tpot_s: seconds per token after the first, by the server's clock; None if it did not say.
    """

    text: str
    reasoning: str
    tokens: int
    finish_reason: str
    tpot_s: float | None = None


class ItemResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Result of one item; ``correct`` is None where no answer was expected."""

    id: str
    correct: bool | None
    refused: bool
    looped: bool
    tokens: int


class Baseline(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A run of the golden set: the one to compare with, or the one that is compared.

    Attributes:
        version: version of this layout.
        bundle: name of the bundle, for people.
        golden_sha256: hash of the golden set's file.
        max_tokens: most tokens of each answer.
        thinking: whether the model was allowed to reason.
        items: results in the order of the file.
        perplexity: perplexity of the text; None where it was not measured.
        text_sha256, text_tokens: hash and length of the text that the perplexity was measured on.
    """

    bundle: str
    golden_sha256: str
    max_tokens: int
    items: tuple[ItemResult, ...]
    thinking: bool = False
    perplexity: float | None = None
    text_sha256: str = ""
    text_tokens: int = 0
    version: int = BASELINE_VERSION


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Changes that are still no alarm.

    Attributes:
        rate: how much worse a rate may get, as a share of the items.
        p_value: p-value of McNemar's or the sign test above which a change may be chance.
        perplexity_ratio: largest ratio to the baseline's perplexity.
        length_ratio: ratio of tokens per answer, up or down, as the geometric mean of all answers;
            a larger one is an alarm only if a sign test finds it unlikely to be chance.
    """

    rate: float = 0.02
    p_value: float = 0.05
    perplexity_ratio: float = 1.02
    length_ratio: float = 1.5


class Check(msgspec.Struct, frozen=True):
    """One figure against the baseline.

    Attributes:
        name: the figure's name.
        value: its value now.
        baseline: its value in the baseline.
        alarm: whether it is too far off.
        p_value: p-value of McNemar's test; None for a figure that is not a rate.
        flips: ids of the items that got worse.
    """

    name: str
    value: float
    baseline: float
    alarm: bool
    p_value: float | None = None
    flips: tuple[str, ...] = ()


class Answerer(Protocol):
    """Something that answers a prompt greedily: a bundle, or a server."""

    def answer(self, prompt: str, max_tokens: int) -> ModelAnswer:
        """Return the whole answer to one message of a user."""
        ...


class BundleAnswerer:
    """Answers with a bundle in this process.

    Args:
        llm: the bundle, opened.
        thinking: whether it may reason before it answers; that takes many more tokens.
        adapter: name of the adapter that answers; None is the model alone.
    """

    def __init__(self, llm: LLM, *, thinking: bool = False, adapter: str | None = None) -> None:
        self._llm = llm
        self._options = {"thinking": thinking, "adapter": adapter}

    def answer(self, prompt: str, max_tokens: int) -> ModelAnswer:
        """Answer through the bundle's chat template, where it has one."""
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        result = ask_question(self._llm, prompt, params, **self._options)
        return ModelAnswer(
            result.text, result.reasoning, result.stats.completion_tokens, result.finish_reason
        )


# ------------------------------------------------------------------------------- golden set


def read_golden(path: Path) -> tuple[list[GoldenItem], str]:
    """Read a golden set; return its items and the file's SHA-256.

    Raises:
        ConfigError: it cannot be read, a line is not an item, or two have the same id.
    """
    text = evaluate.read_text(path)
    items: dict[str, GoldenItem] = {}
    # Not splitlines: JSON strings may hold U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            item = msgspec.json.decode(line, type=GoldenItem)
        except MALFORMED as error:
            raise ConfigError(
                f'{path}, line {number}: {error}; write {{"id": ..., "prompt": ..., "answer": ...}}'
            ) from error
        if not item.prompt.strip():
            raise ConfigError(f"{path}, line {number}: the prompt is empty")
        if item.id in items:
            raise ConfigError(f"{path}, line {number}: the id {item.id!r} is there twice")
        items[item.id] = item
    if not items:
        raise ConfigError(f"{path} holds no prompt")
    return list(items.values()), hashlib.sha256(text.encode()).hexdigest()


def is_match(answer: str, expected: str) -> bool:
    """Return whether an answer gives the expected one.

    A number must equal the answer's final number; words must all appear, in order and side by side,
    in its last line that is not empty. Case and punctuation do not count.
    """
    wanted = _WORDS.findall(expected.casefold())
    if _NUMBER.fullmatch(expected.strip()):
        number = find_number(answer)
        return number is not None and parse_number(number) == parse_number(expected)
    lines = [line for line in answer.splitlines() if _WORDS.search(line)]
    found = _WORDS.findall(lines[-1].casefold()) if lines else []
    return any(found[at : at + len(wanted)] == wanted for at in range(len(found)))


def is_refusal(answer: str) -> bool:
    """Return whether an answer declines, by the usual phrases in its beginning."""
    return _REFUSAL.search(answer.replace("’", "'")[:300]) is not None


def is_loop(text: str) -> bool:
    """Return whether a text ends in the same piece at least four times."""
    for period in range(1, _MAX_PERIOD_CHARS + 1):
        tail = text[-max(4 * period, _LOOP_CHARS) :]
        if len(tail) < max(4 * period, _LOOP_CHARS):
            return False
        if tail[period:] == tail[:-period]:
            return True
    return False


def run_golden(
    answerer: Answerer,
    items: Sequence[GoldenItem],
    max_tokens: int = MAX_TOKENS,
    progress: Progress = silent,
) -> tuple[ItemResult, ...]:
    """Ask every item.

    Args:
        answerer: the model to ask.
        items: the golden set.
        max_tokens: most tokens of each answer.
        progress: called with the prompts answered (step ``ask``).

    Raises:
        EdgeError: the answerer could not answer.
    """
    results = []
    progress("ask", 0, len(items), "prompts")
    for done, item in enumerate(items, start=1):
        answer = answerer.answer(item.prompt, max_tokens)
        results.append(
            ItemResult(
                item.id,
                None if item.answer is None else is_match(answer.text, item.answer),
                is_refusal(answer.text),
                answer.finish_reason == "length" and is_loop(answer.reasoning + answer.text),
                answer.tokens,
            )
        )
        progress("ask", done, len(items), "prompts")
    return tuple(results)


def eval_text(llm: LLM, path: Path, tokens: int = TEXT_TOKENS) -> evaluate.EvalText:
    """Cut the beginning of a text into windows of the bundle's tokens.

    Raises:
        ConfigError: it cannot be read, or is too short.
    """
    return cut_text(path, llm.encode, llm.kv_capacity, tokens)


def cut_text(
    path: Path, encode: Callable[[str], list[int]], capacity: int, tokens: int
) -> evaluate.EvalText:
    """Cut the beginning of a text into windows.

    Args:
        path: UTF-8 text.
        encode: turns text into token ids, the begin token included where the model wants one.
        capacity: the most tokens of a window.
        tokens: the most tokens of the text.

    Raises:
        ConfigError: it cannot be read, or is too short.
    """
    text = evaluate.read_text(path)
    prefix = encode("")
    ids = encode(text)[len(prefix) :]
    windows = evaluate.cut_windows(ids, min(_WINDOW_TOKENS, capacity), prefix, limit=tokens)
    return evaluate.EvalText(windows, path.name, hashlib.sha256(text.encode()).hexdigest())


def perplexity(llm: LLM, text: evaluate.EvalText, progress: Progress = silent) -> float:
    """Compute a bundle's perplexity, teacher-forced; ``progress`` is that of `compare.compare`.

    Raises:
        BackendError: the engine failed, or its logits are not finite.
    """
    result = llm.call(lambda: compare.compare(llm, None, text.windows, progress))
    return math.exp(float(result.positions.nll.mean()))


# ------------------------------------------------------------------------------- comparison


def check_asked(
    before: Baseline, sha256: str, ids: Sequence[str], max_tokens: int, *, thinking: bool
) -> None:
    """Refuse to compare a baseline with a run that asks something else.

    Raises:
        ConfigError: golden set, items, length of answers or thinking differ from the baseline's.
    """
    asked = (before.golden_sha256, before.max_tokens, before.thinking)
    if asked != (sha256, max_tokens, thinking) or [item.id for item in before.items] != list(ids):
        raise ConfigError(
            "the baseline was recorded with another golden set, --max-tokens or --thinking; "
            "record it again with --record"
        )


def compare_runs(now: Baseline, before: Baseline, limits: Limits | None = None) -> list[Check]:
    """Compare every figure of a run with the baseline.

    Raises:
        ConfigError: they did not ask the same questions.
    """
    bounds = limits or Limits()
    ids = [item.id for item in now.items]
    check_asked(before, now.golden_sha256, ids, now.max_tokens, thinking=now.thinking)
    pairs = list(zip(now.items, before.items, strict=True))
    checks = [
        _rate(name, [(bad(a), bad(b), a.id) for a, b in pairs if judged(a)], bounds)
        for name, judged, bad in _BAD
    ]
    # Compare answer by answer: a few that ramble to their limit would decide a ratio of means.
    logs = [math.log(max(a.tokens, 1) / max(b.tokens, 1)) for a, b in pairs]
    p_value = mcnemar_exact(sum(log > 0 for log in logs), sum(log < 0 for log in logs))
    far = abs(sum(logs)) / max(len(logs), 1) > math.log(bounds.length_ratio)
    mean_now, mean_before = (sum(i.tokens for i in run.items) / len(pairs) for run in (now, before))
    differs = far and p_value < bounds.p_value
    checks.append(Check("answer_tokens", mean_now, mean_before, differs))
    if now.perplexity is not None and before.perplexity is not None:
        if (now.text_sha256, now.text_tokens) != (before.text_sha256, before.text_tokens):
            raise ConfigError(
                "the baseline's perplexity is of another text; record it again with --record"
            )
        worse = now.perplexity > bounds.perplexity_ratio * before.perplexity
        checks.append(Check("perplexity", now.perplexity, before.perplexity, worse))
    return checks


_Test = Callable[[ItemResult], bool]
_BAD: tuple[tuple[str, _Test, _Test], ...] = (
    ("wrong", lambda item: item.correct is not None, lambda item: item.correct is False),
    ("refused", lambda _: True, lambda item: item.refused),
    ("looped", lambda _: True, lambda item: item.looped),
)
"""Each rate's name, which items count, and which of those are bad."""


def _rate(name: str, pairs: Sequence[tuple[bool, bool, str]], limits: Limits) -> Check:
    """Compute the share of items that are bad, and its paired test."""
    worse = tuple(item for now, before, item in pairs if now and not before)
    better = sum(before and not now for now, before, _ in pairs)
    total = max(len(pairs), 1)
    share_now = sum(now for now, _, _ in pairs) / total
    share_before = sum(before for _, before, _ in pairs) / total
    p_value = mcnemar_exact(len(worse), better)
    alarm = share_now - share_before > limits.rate and p_value < limits.p_value
    return Check(f"{name}_rate", share_now, share_before, alarm, p_value, worse)


# ------------------------------------------------------------------------------- files


def read_baseline(path: Path) -> Baseline:
    """Read a baseline that `write_baseline` wrote.

    Raises:
        ConfigError: it cannot be read, or is not a baseline of this version.
    """
    try:
        data = read_file(path, _MAX_BASELINE_BYTES)
    except OSError as error:
        raise ConfigError(
            f"cannot read the baseline {path}: {error.strerror}; record one with --record"
        ) from error
    try:
        baseline = msgspec.json.decode(data, type=Baseline)
    except MALFORMED as error:
        raise ConfigError(f"{path} is no baseline: {error}; record one with --record") from error
    if baseline.version != BASELINE_VERSION:
        raise ConfigError(
            f"{path} has version {baseline.version}, this is {BASELINE_VERSION}; "
            "record it again with --record"
        )
    return baseline


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Write a baseline whole or not at all.

    Raises:
        ConfigError: the file cannot be written.
    """
    write_atomic(path, msgspec.json.format(msgspec.json.encode(baseline), indent=1) + b"\n")
