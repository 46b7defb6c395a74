"""Reads the field ``vote`` of a chat, an extension, and writes the result into the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from msgspec import Meta, Struct, convert
from msgspec.structs import asdict

from edge.errors import RequestError
from edge_serve.http.errors import invalid

if TYPE_CHECKING:
    from edge.votes.tally import VoteResult, VoteRule

    from .protocol import ChatRequest


class VoteField(Struct, forbid_unknown_fields=True):
    """How to hold a vote; `edge.votes.tally.VoteRule` has the details."""

    answers: Annotated[str, Meta(min_length=1, max_length=1100)] = "number"
    first: Annotated[int, Meta(ge=2, le=64)] | None = None
    most: Annotated[int, Meta(ge=2, le=64)] = 8
    error: Annotated[float, Meta(gt=0, le=0.5)] = 0.1


class VotedSample(Struct):
    """One answer of a vote."""

    answer: str | None
    confidence: float
    text: str
    reasoning: str
    tokens: int
    finish_reason: str


class VoteAnswer(Struct):
    """The result of a vote: ``agreed`` of ``counted`` samples gave the answer."""

    answer: str | None
    agreed: int
    counted: int
    decided: bool
    samples: list[VotedSample]


def read_vote(body: ChatRequest, max_choices: int) -> VoteRule | None:
    """Return how a request votes; None if it does not.

    Raises:
        APIError: the rule is wrong, it has more samples than a request may have choices, or another
            field cannot be combined with a vote.
    """
    if (field := body.vote) is None:
        return None
    for name, given in (("n", (body.n or 1) > 1), ("tools", bool(body.tools))):
        if given:
            raise invalid(f"vote: a vote is one answer in text; leave {name} out", "vote")
    if field.most > max_choices:
        raise invalid(
            f"vote: {field.most} samples are more than the {max_choices} that a request may have "
            "here; lower most",
            "vote",
        )
    from edge.votes.tally import VoteRule

    try:
        return VoteRule(**asdict(field))
    except RequestError as error:
        raise invalid(str(error), "vote") from error


def shown_vote(vote: VoteResult) -> VoteAnswer:
    """Convert the result of a vote for JSON."""
    return convert(vote, VoteAnswer, from_attributes=True)
