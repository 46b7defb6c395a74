"""Holds a vote: samples of one question, drawn until one answer has won."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from queue import SimpleQueue

from edge.errors import EdgeError, OverloadError, RequestError
from edge.votes.answers import answer_finder
from edge.votes.tally import Tally, VoteResult, VoteRule, VoteSample

from .ask import Ask
from .generation import FinishReason, GenerationStats, PromptProgress
from .sampling import SampledToken
from .sampling_params import SamplingParams
from .scheduler import Request, Scheduler, SequenceState
from .scheduler.delivery import caused_by
from .stream import Generation, GenerationChunk, GenerationResult, OutputStream


class VotedGeneration(Generation):
    """A vote, presented as one coming answer.

    It yields one chunk of reasoning for each sample that ends. The last chunk is the best sample's
    text, with `GenerationChunk.vote` and the figures of all samples together.
    """

    _vote: _Vote

    def cancel(self) -> None:
        """End all samples within one step; the last chunk has the result so far."""
        self._vote.cancel()

    def to_suspend(self) -> SequenceState:
        """Refuse: a vote is several sequences, and begins anew if it is interrupted."""
        raise RequestError("a vote cannot be suspended; cancel it, and ask again later")


def voting(ask: Ask, n: int) -> tuple[Ask, int, Callable[..., list[Generation]]]:
    """Return the `Ask` of each sample of a vote, the most samples, and a function to queue them.

    Raises:
        RequestError: there are several votes at once, an answer to continue, an invalid rule, or a
            temperature of 0, at which all samples are the same.
    """
    rule: object = ask.vote
    if not isinstance(rule, VoteRule):
        raise RequestError(f"vote must be a VoteRule, not {rule!r:.80}")
    if n != 1 or ask.resumed is not None:
        raise RequestError("n: a vote is one answer, of as many samples as it takes; leave n at 1")
    params = ask.params or SamplingParams()
    if params.logprobs is None:
        ask = replace(ask, params=replace(params, logprobs=0))
    return ask, rule.most, partial(submit_vote, rule)


def submit_vote(
    rule: VoteRule,
    scheduler: Scheduler,
    requests: Sequence[Request],
    streams: Sequence[OutputStream],
) -> list[Generation]:
    """Queue the first samples of a vote; a thread starts more as they are needed.

    Args:
        rule: how the vote is held.
        scheduler: runs the samples.
        requests: one for each sample that may be drawn, in order.
        streams: for each, the stream that turns its tokens into text.

    Returns:
        One generation, a `VotedGeneration`.

    Raises:
        RequestError: the temperature is 0, at which all samples are the same.
        EdgeError: any error of `Scheduler.submit`.
    """
    if not requests[0].params.temperature:
        raise RequestError(
            "vote: at temperature 0 all samples are the same; set one above 0, or do not vote"
        )
    vote = _Vote(scheduler, requests, streams, rule)
    vote.start()
    generation = VotedGeneration(scheduler, vote.running[0].sequence, vote.stream)
    generation._vote = vote
    threading.Thread(target=vote.run, name="edge-llm-vote", daemon=True).start()
    return [generation]


class _Watched:
    """A sink that tells the vote when its sample has ended."""

    def __init__(self, stream: OutputStream, index: int, vote: _Vote) -> None:
        self._stream, self._index, self._vote = stream, index, vote

    def progress(self, progress: PromptProgress) -> None:
        if self._index == 0:
            self._vote.stream.progress(progress)

    def push(self, token: SampledToken, reason: FinishReason | None) -> FinishReason | None:
        return self._stream.push(token, reason)

    def finish(self, reason: FinishReason, stats: GenerationStats) -> None:
        self._stream.finish(reason, stats)
        self._vote.ended.put(self._index)

    def fail(self, error: EdgeError) -> None:
        self._stream.fail(error)
        self._vote.ended.put(self._index)


class _Vote:
    """A vote that is held; `run` has a thread of its own, since a pattern may take its time."""

    def __init__(
        self,
        scheduler: Scheduler,
        requests: Sequence[Request],
        streams: Sequence[OutputStream],
        rule: VoteRule,
    ) -> None:
        self._scheduler = scheduler
        self._requests, self._streams = requests, streams
        self._find = answer_finder(rule.answers)
        self._tally = Tally(rule)
        self._began_s = time.monotonic()
        self._is_cancelled, self._started = False, 0
        self._samples: dict[int, VoteSample] = {}
        self._results: dict[int, GenerationResult] = {}
        self.stream = _VoteStream()
        self.ended: SimpleQueue[int] = SimpleQueue()
        self.running: dict[int, Generation] = {}

    def start(self) -> None:
        """Queue the samples that are missing, all of them or none."""
        number = self._tally.missing(len(self.running))
        chosen = range(self._started, min(self._started + number, len(self._requests)))
        if not chosen:
            return
        spent_s = time.monotonic() - self._began_s
        requests = [_later(self._requests[index], spent_s) for index in chosen]
        sinks = [_Watched(self._streams[index], index, self) for index in chosen]
        sequences = self._scheduler.submit(requests, sinks)
        for index, sequence in zip(chosen, sequences, strict=True):
            generation = Generation(self._scheduler, sequence, self._streams[index], index)
            self.running[index] = generation
        self._started = chosen.stop
        if self._is_cancelled:
            self.cancel()

    def cancel(self) -> None:
        """End all samples; `run` ends with the last of them."""
        self._is_cancelled = True
        for generation in list(self.running.values()):
            generation.cancel()

    def run(self) -> None:
        """Count samples as they end, start more, and pass the result on."""
        try:
            while self.running:
                self._take(self.ended.get())
                if self._tally.is_decided:
                    self.cancel()
                elif not self._is_cancelled:
                    # A full queue ends the vote with the samples that it has, undecided.
                    with contextlib.suppress(OverloadError):
                        self.start()
            self._finish()
        except BaseException as error:  # noqa: BLE001 - the reader is told
            self.cancel()
            self.stream.fail(caused_by("a vote failed", error))

    def _take(self, index: int) -> None:
        """Count a sample that has ended; one that made room for other clients is not counted."""
        try:
            result = self.running.pop(index).result()
        except OverloadError:
            if self.running or self._results:
                return
            raise
        logprobs = [token.logprob for token in result.tokens if token.logprob is not None]
        confidence = math.exp(sum(logprobs) / len(logprobs)) if logprobs else 0.0
        is_whole = result.finish_reason != "cancelled"
        answer = self._find(result.text) if is_whole else None
        self._results[index] = result
        self._samples[index] = VoteSample(
            answer,
            confidence,
            result.text,
            result.reasoning,
            result.stats.completion_tokens,
            result.finish_reason,
        )
        if is_whole:
            self._tally.add(answer, confidence)
            found = "no answer" if answer is None else answer
            self.stream.tell(f"{self._tally.samples}: {found}\n")

    def _finish(self) -> None:
        tally, samples = self._tally, self._samples
        order = sorted(samples)
        vote = VoteResult(
            tally.leader,
            tally.agreed,
            tally.samples,
            tally.is_decided,
            tuple(samples[index] for index in order),
        )
        whole = [i for i in order if samples[i].finish_reason != "cancelled"]
        agreeing = [i for i in whole if samples[i].answer == vote.answer]
        best = self._results[max(agreeing or order, key=lambda i: samples[i].confidence)]
        stopped = self._is_cancelled and not vote.decided
        stats = _together([self._results[index].stats for index in order], best.stats)
        self.stream.end(vote, best, "cancelled" if stopped else best.finish_reason, stats)


class _VoteStream(OutputStream):
    """The stream that the reader of a vote gets."""

    def tell(self, text: str) -> None:
        """Queue the state of the vote, as reasoning."""
        self._put(GenerationChunk(reasoning=text))

    def end(
        self, vote: VoteResult, best: GenerationResult, reason: FinishReason, stats: GenerationStats
    ) -> None:
        """Queue the last chunk: the best sample, and the figures of all of them."""
        end = "" if vote.decided else ": undecided, the likeliest is shown"
        said = f"{vote.agreed} of {vote.counted} answers agree{end}\n"
        reasoning = said + best.reasoning
        self._put(GenerationChunk(best.text, reasoning, best.tokens, reason, stats, vote=vote))


def _together(all_stats: Sequence[GenerationStats], best: GenerationStats) -> GenerationStats:
    """Sum the figures of all samples; the prompt counts once."""
    first = all_stats[0]
    return replace(
        first,
        completion_tokens=sum(stats.completion_tokens for stats in all_stats),
        total_s=max(stats.total_s for stats in all_stats),
        itl_s=[gap for stats in all_stats for gap in stats.itl_s],
        model_s=max(stats.model_s for stats in all_stats),
        context_left=best.context_left,
    )


def _later(request: Request, spent_s: float) -> Request:
    left_s = None if request.deadline_s is None else max(request.deadline_s - spent_s, 1e-3)
    return replace(request, deadline_s=left_s)
