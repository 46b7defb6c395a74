"""Votes of samples, on an engine whose words a test writes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import exp
from pathlib import Path
from typing import Any

import pytest

from edge import SamplingParams
from edge.errors import DeadlineError, OverloadError, RequestError
from edge.runtime.sampling import Sampler
from edge.runtime.scheduler.core import EngineCore
from edge.votes.tally import VoteRule
from tests.conftest import Bundles
from tests.edge.runtime.test_llm import QUESTION, Scripted
from tests.edge_serve.scripted import until
from tests.makers.tiny_models import EOS_ID

SEEDED = SamplingParams(temperature=1.0, top_p=1.0, seed=5, max_tokens=60)
TWO = VoteRule(first=2, error=0.15)  # two that agree are enough


class Voters(Scripted):
    """An LLM whose sample of seed 5 + i says the i-th of some texts.

    Attributes:
        started: seeds of the samples, in order.
        drawn: seeds of the samples that have drawn a token, in order.
        texts: what each says; the last of them goes for all others.
        pause_s: how long each token takes, so that who reads the stream keeps up on a busy machine.
    """

    def __init__(self, bundle: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        super().__init__(bundle, monkeypatch, **{"num_slots": 4, "kv_capacity": 512, **options})
        self.started: list[int] = []
        self.drawn: list[int] = []
        self.texts: Sequence[str] = ["</think>\n\n4"]
        self.pause_s = 0.0
        self.gate = threading.Event()
        self.gate.set()
        voters = self

        class Spoken(Sampler):
            """Draws the next token of its text, with a probability that falls with its seed."""

            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **options)
                number = self.seed - 5
                voters.started.append(self.seed)
                text = voters.texts[min(number, len(voters.texts) - 1)]
                self._left = [*voters.llm.tokenizer.encode(text, control=True), EOS_ID]

            def sample(self, *args: Any, **options: Any) -> Any:
                voters.gate.wait()
                time.sleep(voters.pause_s)
                if self.seed not in voters.drawn:
                    voters.drawn.append(self.seed)
                token = super().sample(*args, **options)
                logprob = -0.1 * (self.seed - 4)
                return token._replace(id=self._left.pop(0), logprob=logprob)

        monkeypatch.setattr(EngineCore, "sampler_type", Spoken)

    def say_answers(self, *answers: str) -> None:
        self.texts = [f"so {each}?\n</think>\n\nIt is {each}." for each in answers]


@pytest.fixture
def voters(tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> Iterator[Voters]:
    made = Voters(tiny_bundles("qwen2"), monkeypatch)
    yield made
    made.llm.close()


def test_two_that_agree_are_enough(voters: Voters):
    voters.say_answers("4")
    vote = voters.llm.vote(QUESTION, SEEDED, vote=TWO)
    assert (vote.answer, vote.agreed, vote.counted, vote.decided) == ("4", 2, 2, True)
    assert voters.started == [5, 6]
    assert [sample.text for sample in vote.samples] == ["It is 4."] * 2
    # The geometric mean, whatever the length.
    assert [each.confidence for each in vote.samples] == pytest.approx([exp(-0.1), exp(-0.2)])


def test_all_are_drawn_at_once_unless_told_otherwise(voters: Voters):
    vote = voters.llm.vote(QUESTION, SEEDED, vote=VoteRule(most=4))
    assert (vote.answer, vote.decided) == ("4", True)
    assert (voters.started, len(vote.samples)) == ([5, 6, 7, 8], 4)


def test_more_are_drawn_while_the_answer_is_open_and_the_rest_is_cancelled(voters: Voters):
    voters.say_answers("4", "5", "4", "4", "4", "4")
    vote = voters.llm.vote(QUESTION, SEEDED, vote=TWO)
    assert (vote.answer, vote.agreed, vote.counted, vote.decided) == ("4", 4, 5, True)
    assert voters.started == [5, 6, 7, 8, 9]
    voters.started.clear()
    voters.texts = [*voters.texts[:2], voters.texts[0], voters.texts[0], "x" * 50]
    rule = replace(TWO, error=0.2)  # 3 to 1 is enough
    vote = voters.llm.vote(QUESTION, SEEDED, vote=rule)
    assert (vote.agreed, vote.decided) == (3, True)


def test_the_rest_is_cancelled_once_it_is_decided(voters: Voters):
    long = "on and on " * 30
    voters.texts = ["</think>\n\n4", "</think>\n\n4", f"{long}</think>\n\n5"]
    voters.pause_s = 0.01
    params = replace(SEEDED, max_tokens=400)
    vote = voters.llm.vote(QUESTION, params, vote=VoteRule(most=3, error=0.15))
    assert (vote.answer, vote.agreed, vote.counted) == ("4", 2, 2)
    assert [s.finish_reason for s in vote.samples] == ["stop", "stop", "cancelled"]
    assert 0 < vote.samples[2].tokens < len(long) / 3
    assert vote.samples[2].answer is None
    assert voters.llm.scheduler.stats().running == 0


def test_the_most_samples_end_an_open_vote(voters: Voters):
    voters.say_answers("1", "2", "3", "4")
    vote = voters.llm.vote(QUESTION, SEEDED, vote=VoteRule(most=4))
    assert (vote.answer, vote.agreed, vote.counted, vote.decided) == ("1", 1, 4, False)
    voters.say_answers("1", "2", "3", "4")
    *_, last = voters.llm.stream(QUESTION, SEEDED, vote=VoteRule(most=4))
    said = last.reasoning.splitlines()[0]
    assert said == "1 of 4 answers agree: undecided, the likeliest is shown"


def test_samples_without_an_answer_come_back(voters: Voters):
    voters.texts = ["</think>\n\nI do not know."]
    vote = voters.llm.vote(QUESTION, SEEDED, vote=VoteRule(most=3))
    assert (vote.answer, vote.agreed, vote.counted, vote.decided) == (None, 0, 3, False)
    assert [s.text for s in vote.samples] == ["I do not know."] * 3


def test_a_stream_has_each_answer_and_then_the_best_sample(voters: Voters):
    voters.say_answers("5", "4", "4", "4", "4")
    chunks = list(voters.llm.stream(QUESTION, SEEDED, vote=TWO))
    reasoning = "".join(chunk.reasoning for chunk in chunks)
    lines = reasoning.splitlines()
    assert [line[:3] for line in lines[:5]] == ["1: ", "2: ", "3: ", "4: ", "5: "]
    assert sorted(line[3:] for line in lines[:5]) == ["4", "4", "4", "4", "5"]
    assert "4 of 5 answers agree" in lines
    assert lines[-1] == "so 4?"  # the best sample's own
    assert [chunk.text for chunk in chunks if chunk.text] == ["It is 4."]
    last = chunks[-1]
    assert last.finish_reason == "stop"
    assert last.vote is not None
    assert last.stats is not None
    assert last.stats.completion_tokens == sum(s.tokens for s in last.vote.samples)
    assert last.stats.prompt_tokens == len(voters.llm.encode(QUESTION))
    best = max((s for s in last.vote.samples if s.answer == "4"), key=lambda s: s.confidence)
    assert best is last.vote.samples[1]


def test_the_prompt_is_read_once(voters: Voters):
    voters.say_answers("4", "5", "4", "4", "4")
    question = [{"role": "user", "content": "what is the world? " * 5}]
    voters.llm.vote(question, SEEDED, vote=TWO)
    stats, size = voters.llm.scheduler.stats(), len(voters.llm.encode(question))
    assert stats.prompt_tokens == 5 * size
    assert stats.prompt_tokens - stats.cached_tokens < size + 5 * 2


def test_cancelling_ends_all_samples(voters: Voters):
    voters.texts = ["x" * 400]
    params = replace(SEEDED, max_tokens=400)
    generation = voters.llm.submit(QUESTION, params, vote=VoteRule(most=3))
    generation.cancel()
    last = list(generation)[-1]
    assert last.finish_reason == "cancelled"
    assert last.vote is not None
    assert [sample.finish_reason for sample in last.vote.samples] == ["cancelled"] * 3
    assert voters.llm.scheduler.stats().running == 0
    assert len(voters.started) == 3


def test_a_deadline_counts_for_the_whole_vote(voters: Voters):
    voters.gate.clear()
    generation = voters.llm.submit(QUESTION, SEEDED, vote=TWO, deadline_s=0.2)
    threading.Timer(0.5, voters.gate.set).start()
    with pytest.raises(DeadlineError):
        generation.result()


def test_asyncio_reads_a_vote_too(voters: Voters):
    voters.say_answers("4")

    async def read() -> Any:
        chunks = [c async for c in voters.llm.submit(QUESTION, SEEDED, vote=TWO)]
        return chunks[-1].vote

    assert asyncio.run(read()).answer == "4"


def test_a_full_queue_ends_the_vote_with_the_samples_so_far(
    tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    voters = Voters(tiny_bundles("qwen2"), monkeypatch, num_slots=4, queue_capacity=0)
    voters.say_answers("4", "5", "6")
    submit, sizes = voters.llm.scheduler.submit, []

    def full(requests: Any, sinks: Any) -> Any:
        sizes.append(len(requests))
        if len(sizes) == 1:
            return submit(requests, sinks)
        raise OverloadError("full", 1.0)

    monkeypatch.setattr(voters.llm.scheduler, "submit", full)
    vote = voters.llm.vote(QUESTION, SEEDED, vote=VoteRule(first=2, most=4))
    assert (vote.counted, vote.decided) == (2, False)
    assert sizes[0] == 2
    assert sizes[1:]
    voters.llm.close()


def test_what_cannot_be_voted_on_is_refused(voters: Voters):
    llm = voters.llm
    with pytest.raises(RequestError, match="at temperature 0 all samples are the same"):
        llm.vote(QUESTION, SamplingParams(temperature=0))
    with pytest.raises(RequestError, match="leave n at 1"):
        llm.submit(QUESTION, SEEDED, n=2, vote=VoteRule())
    with pytest.raises(RequestError, match="vote must be a VoteRule, not 3"):
        llm.vote(QUESTION, SEEDED, vote=3)  # type: ignore[arg-type]
    assert voters.started == []


def test_a_vote_cannot_be_put_away(voters: Voters):
    voters.gate.clear()
    vote = voters.llm.submit(QUESTION, SEEDED, vote=VoteRule(most=2))
    other = voters.llm.submit(QUESTION, replace(SEEDED, seed=7))
    try:
        with pytest.raises(RequestError, match="a vote cannot be suspended"):
            voters.llm.suspend([other, vote], 5)
    finally:
        voters.gate.set()
    assert vote.result().finish_reason == "stop"
    assert other.result().finish_reason == "stop"


def test_every_sample_waits_for_its_clients_turn(
    tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    voters = Voters(tiny_bundles("qwen2"), monkeypatch, num_slots=1, max_batch=1)
    voters.gate.clear()
    vote = voters.llm.submit(QUESTION, SEEDED, vote=VoteRule(most=4), client="voter")
    until(lambda: voters.llm.scheduler.stats().running == 1)
    single = voters.llm.submit(QUESTION, replace(SEEDED, seed=9), client="other")
    voters.gate.set()
    assert single.result().finish_reason == "stop"
    assert vote.result().finish_reason == "stop"
    assert voters.drawn.index(9) == 1, "the samples went before another client's request"
    voters.llm.close()


def test_samples_are_requests_of_their_caller(
    tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    voters = Voters(tiny_bundles("qwen2"), monkeypatch)
    voters.say_answers("1", "2", "3")
    submit, asked = voters.llm.scheduler.submit, []

    def watched(requests: Any, sinks: Any) -> Any:
        asked.extend(requests)
        time.sleep(0.05)
        return submit(requests, sinks)

    monkeypatch.setattr(voters.llm.scheduler, "submit", watched)
    options: dict[str, Any] = {"client": "me", "priority": 3, "deadline_s": 60.0}
    voters.llm.vote(QUESTION, SEEDED, vote=VoteRule(first=2, most=3), **options)
    assert [(each.client, each.priority) for each in asked] == [("me", 3)] * 3
    assert [each.params.seed for each in asked] == [5, 6, 7]
    first, second, third = (each.deadline_s for each in asked)
    assert first == second
    assert third < 60 - 0.05, "a sample that starts later has the whole time again"
    voters.llm.close()


def test_a_sample_that_makes_room_for_others_is_not_counted(
    tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    voters = Voters(tiny_bundles("qwen2"), monkeypatch, num_slots=1, max_batch=1, queue_capacity=2)
    voters.gate.clear()
    vote = voters.llm.submit(QUESTION, SEEDED, vote=VoteRule(most=3), client="voter")
    until(lambda: voters.llm.scheduler.stats().running == 1)
    single = voters.llm.submit(QUESTION, replace(SEEDED, seed=9), client="other")
    voters.gate.set()
    last = list(vote)[-1]
    assert last.vote is not None
    assert (last.vote.answer, last.vote.counted, last.vote.decided) == ("4", 1, False)
    assert len(last.vote.samples) == 1
    assert single.result().finish_reason == "stop"
    voters.llm.close()


def test_an_unstarted_vote_makes_room_as_a_whole(
    tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    voters = Voters(tiny_bundles("qwen2"), monkeypatch, num_slots=1, max_batch=1, queue_capacity=2)
    voters.gate.clear()
    runs = voters.llm.submit(QUESTION, SEEDED, client="first")
    until(lambda: voters.llm.scheduler.stats().running == 1)
    vote = voters.llm.submit(QUESTION, SEEDED, vote=VoteRule(most=2), client="voter")
    single = voters.llm.submit(QUESTION, replace(SEEDED, seed=9), client="other")
    voters.gate.set()
    with pytest.raises(OverloadError, match="made room for another's"):
        vote.result()
    assert [each.result().finish_reason for each in (runs, single)] == ["stop", "stop"]
    voters.llm.close()
