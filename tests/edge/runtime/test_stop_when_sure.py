"""Thoughts that end once their answer stands, on an engine whose words a test writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge import LLM, SamplingParams
from edge.errors import ConfigError, RequestError
from edge.runtime.structured_output import OutputFormat
from edge.votes.boundaries import PLAIN, THINKING
from tests.conftest import Bundles
from tests.edge.runtime.test_llm import GREEDY, QUESTION, Scripted
from tests.makers.tiny_models import EOS_ID

PARAGRAPH = "the world is what the world is, and that is what the others said to an inner one.\n\n"
ANSWER = "\n</think>\n\nIt is so."


class Thinker(Scripted):
    """An LLM that thinks in paragraphs, and when asked for its answer says what a test wants.

    Attributes:
        thought: what it writes if nobody ends it.
        close: text after which it answers.
        answer: returns the answer after so many characters of thought.
        certainty: probability of each token of such an answer.
        asked: characters of thought before each answer, in order.
        ending: what it writes after a thought that was ended.
    """

    def __init__(self, bundle: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        options = {"num_slots": 2, "kv_capacity": 2048, **options}
        super().__init__(bundle, monkeypatch, **options)
        self.thought = PARAGRAPH * 12 + ANSWER
        self.close = THINKING.close
        self.ending = "It ends."
        self.answer: Callable[[int], str] = lambda _: "42"
        self.certainty = 0.999
        self.asked: list[int] = []
        self.start = len(self.llm.encode(QUESTION))
        self.backend.script = self.script

    def script(self, seen: tuple[int, ...]) -> int | NDArray[np.float32]:
        encode, decode = self.llm.tokenizer.encode, self.llm.tokenizer.decode
        written = list(seen[self.start :])
        asking = encode(self.close, control=True, goes_on=True)
        for at in range(len(written) - len(asking), -1, -1):
            if written[at : at + len(asking)] == asking:
                said = len(written) - at - len(asking)
                place = len(decode(written[:at]))
                if not said:
                    self.asked.append(place)
                said_ids = [*encode(self.answer(place) + "} and more", goes_on=True), EOS_ID]
                return self._likely(said_ids[min(said, len(said_ids) - 1)])
        thought = encode(self.thought, control=True)
        if written == thought[: len(written)]:
            return [*thought, EOS_ID][len(written)]
        # After the end that was forced.
        ended = next(n for n in range(len(written), 0, -1) if written[: n - 1] == thought[: n - 1])
        end = [*encode(self.ending, goes_on=True), EOS_ID]
        forced = len(encode("</think>\n\n", control=True, goes_on=True))
        return end[min(max(len(written) - ended + 1 - forced, 0), len(end) - 1)]

    def _likely(self, token_id: int) -> NDArray[np.float32]:
        size = self.llm.manifest.model.vocab_size
        rest = np.log((1 - self.certainty) / (size - 1))
        logits = np.full(size, rest, np.float32)
        logits[token_id] = np.log(self.certainty)
        return logits


@pytest.fixture
def thinker(tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> Iterator[Thinker]:
    made = Thinker(tiny_bundles("qwen2"), monkeypatch)
    yield made
    made.llm.close()


def test_a_thought_ends_once_two_trials_give_one_answer(thinker: Thinker):
    free = thinker.llm.generate(QUESTION, GREEDY)
    assert free.reasoning == (PARAGRAPH * 12).rstrip("\n")
    assert thinker.asked == []
    sure = thinker.llm.generate(QUESTION, GREEDY, stop_when_sure=0.9)
    assert sure.text == "It ends."
    assert sure.reasoning.startswith(PARAGRAPH)
    assert len(sure.reasoning) < len(free.reasoning) / 1.5
    assert len(thinker.asked) == 2
    assert all(place % len(PARAGRAPH) == 0 for place in thinker.asked), "it was tried elsewhere"
    assert thinker.llm.stop_counts["tried"] == 2
    assert thinker.llm.stop_counts["stopped"] == 1


@pytest.mark.parametrize("doubts", ["changes", "unlikely", "empty", "endless"])
def test_a_thought_continues_while_its_answer_changes(thinker: Thinker, doubts: str):
    if doubts == "changes":
        thinker.answer = str
    elif doubts == "unlikely":
        thinker.certainty = 0.9  # of each of three tokens
    elif doubts == "empty":
        thinker.answer = lambda _: ""
    else:
        thinker.answer = lambda _: "1" * 40
    result = thinker.llm.generate(QUESTION, GREEDY, stop_when_sure=0.9)
    assert (result.text, result.reasoning) == ("It is so.", (PARAGRAPH * 12).rstrip("\n"))
    assert len(thinker.asked) > 2
    assert thinker.llm.stop_counts["stopped"] == 0


def test_trials_cost_a_twentieth_of_the_steps_at_most(thinker: Thinker):
    thinker.answer = str
    result = thinker.llm.generate(QUESTION, GREEDY, stop_when_sure=0.9)
    asking = len(thinker.llm.tokenizer.encode(THINKING.close, control=True, goes_on=True))
    rows = len(thinker.asked) * (asking + 10)
    assert 0.02 * result.stats.completion_tokens < 0.1 * rows
    assert 0.1 * rows <= 0.05 * result.stats.completion_tokens
    assert thinker.llm.stop_counts["too_expensive"] > 0
    # The rows of the thought were shared: a trial read its question alone.
    stats = thinker.llm.scheduler.stats()
    assert stats.prompt_tokens - stats.cached_tokens < thinker.start + 2 * rows


def test_without_a_free_slot_there_is_no_trial(thinker: Thinker):
    both = thinker.llm.submit(QUESTION, GREEDY, n=2, stop_when_sure=0.9)
    assert [each.result().text for each in both] == ["It is so."] * 2
    assert thinker.asked == []
    assert thinker.llm.stop_counts["no_slot"] > 2


def test_a_thought_without_tags_is_ended_by_its_answer(
    tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    thinker = Thinker(tiny_bundles("qwen2"), monkeypatch)
    thinker.llm.reasons = False
    thinker.thought, thinker.close = PARAGRAPH * 12, PLAIN.close
    result = thinker.llm.generate(QUESTION, GREEDY, stop_when_sure=0.9)
    assert result.text.endswith("\n\nThe final answer is \\boxed{42} and more")
    assert result.text.startswith(PARAGRAPH)
    assert len(result.text) < len(thinker.thought) / 1.5
    assert len(thinker.asked) == 3  # two trials, and the answer itself
    thinker.llm.close()


def test_a_turn_is_tried_before_its_first_word(thinker: Thinker):
    before = "the world is what the world is and the others said so. " * 3
    thinker.thought = f"{before}Wait, no. {before}等等，{before}" + ANSWER
    thinker.llm.generate(QUESTION, GREEDY, stop_when_sure=0.9)
    assert len(thinker.asked) == 2
    texts = [thinker.thought[place:].lstrip() for place in thinker.asked]
    assert texts[0].startswith("Wait")
    assert texts[1].startswith("等等")


def test_the_engine_decides_for_requests_that_say_nothing(
    tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    thinker = Thinker(tiny_bundles("qwen2"), monkeypatch, stop_when_sure=0.9)
    assert thinker.llm.generate(QUESTION, GREEDY).text == "It ends."
    assert thinker.llm.generate(QUESTION, GREEDY, stop_when_sure=0).text == "It is so."
    form = OutputFormat("regex", "[0-9]{3}x")
    thinker.llm.submit("what", SamplingParams(max_tokens=1), output=form).result()
    thinker.llm.close()


@pytest.mark.parametrize("value", [1.5, -1, True, "yes", float("nan")])
def test_a_wrong_confidence_is_refused(thinker: Thinker, value: Any):
    with pytest.raises(RequestError, match="stop_when_sure must be a confidence above 0"):
        thinker.llm.generate(QUESTION, GREEDY, stop_when_sure=value)


def test_what_cannot_be_is_refused(tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="stop_when_sure tries answers in slots"):
        LLM(tiny_bundles("qwen2"), deterministic=True, stop_when_sure=0.9)
    for options, message in (
        ({"deterministic": True}, "without deterministic"),
        ({"reuse_prefix": False}, "with reuse_prefix"),
        ({"max_batch": 1}, "raise num_slots and max_batch"),
    ):
        thinker = Thinker(tiny_bundles("qwen2"), monkeypatch, **options)
        with pytest.raises(RequestError, match=message):
            thinker.llm.generate(QUESTION, GREEDY, stop_when_sure=0.9)
        thinker.llm.close()
    thinker = Thinker(tiny_bundles("qwen2"), monkeypatch)
    form = OutputFormat("regex", "[0-9]+")
    with pytest.raises(RequestError, match="leaves no thought to end"):
        thinker.llm.generate("what", GREEDY, stop_when_sure=0.9, output=form)
    thinker.llm.close()
