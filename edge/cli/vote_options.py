"""Adds the options of a verb that can hold a vote."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

from edge.errors import RequestError

from .sections import option

if TYPE_CHECKING:
    from edge.runtime.stream import GenerationChunk
    from edge.votes.tally import VoteRule

_Command = TypeVar("_Command", bound=Callable[..., Any])
_MOST_SLOTS = 8
_VOTE = "Draw samples until one answer has won, this many at most; needs a temperature above 0."
_ANSWERS = "What --vote compares: number (default), choice, boxed, json:FIELD or regex:PATTERN."


def vote_options(command: _Command) -> _Command:
    """Add ``--vote`` and ``--answers``; `take_vote` reads them."""
    command = option("Answer", "--answers", metavar="KIND", help=_ANSWERS)(command)
    return option("Answer", "--vote", metavar="N", type=int, help=_VOTE)(command)


def take_vote(options: dict[str, Any]) -> tuple[VoteRule | None, int]:
    """Move the options of a vote out of a verb's keyword arguments, and count the slots it takes.

    Raises:
        RequestError: a number or kind is wrong, or a kind of answer is given without a vote.
    """
    most, answers = options.pop("vote"), options.pop("answers")
    if most is None:
        if answers is not None:
            raise RequestError("--answers says what --vote compares; give --vote, too")
        return None, 1
    from edge.votes.tally import VoteRule

    rule = VoteRule(most=most, answers="number" if answers is None else answers)
    return rule, min(rule.most, _MOST_SLOTS)


def answer_json(chunks: Iterable[GenerationChunk]) -> dict[str, Any]:
    """Wait for an answer and return it for JSON, with the result of the vote if there was one."""
    from edge.runtime.stream import join_chunks

    all_chunks = list(chunks)
    result, vote = join_chunks(iter(all_chunks)), all_chunks[-1].vote
    return {
        "text": result.text,
        "reasoning": result.reasoning,
        "finish_reason": result.finish_reason,
        "stats": result.stats.as_dict(),
        **({} if vote is None else {"vote": asdict(vote)}),
    }
