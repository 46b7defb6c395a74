"""Defines `Piece`: the part that a chunk of text adds to one answer, with tool calls apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge.runtime.sampling import SampledToken

from .answers import ToolCall
from .tools import ToolParser, WholeCall

if TYPE_CHECKING:
    from edge.runtime.generation import GenerationStats, PromptProgress
    from edge.runtime.stream import GenerationChunk
    from edge.votes.tally import VoteResult

MakeParser = Callable[[], ToolParser | WholeCall]


@dataclass
class Piece:
    """A part of one answer, or all of it.

    Attributes:
        text: text of the answer, without tool calls.
        reasoning: text of the reasoning.
        calls: tool calls that are now complete.
        tokens: tokens of this piece: those of an echoed prompt, then the sampled ones.
        finish_reason: on the last piece: ``stop``, ``length``, ``cancelled`` or ``tool_calls``.
        progress: progress of the prompt, if the request wants it.
        stop: on the last piece, the stop string that ended the answer, if one did.
        stats: on the last piece, time and tokens that the answer took.
        echoed: how many of the tokens belong to the prompt.
        vote: on the last piece, the result of a vote.
    """

    text: str = ""
    reasoning: str = ""
    calls: Sequence[ToolCall] = ()
    tokens: Sequence[SampledToken] = ()
    finish_reason: str | None = None
    stop: str | None = None
    stats: GenerationStats | None = None
    progress: PromptProgress | None = None
    echoed: int = 0
    vote: VoteResult | None = None


def join_pieces(pieces: Sequence[Piece]) -> Piece:
    """Join all pieces of an answer into one."""
    return Piece(
        "".join(piece.text for piece in pieces),
        "".join(piece.reasoning for piece in pieces),
        [call for piece in pieces for call in piece.calls],
        [token for piece in pieces for token in piece.tokens],
        pieces[-1].finish_reason,
        pieces[-1].stop,
        pieces[-1].stats,
        echoed=sum(piece.echoed for piece in pieces),
        vote=pieces[-1].vote,
    )


class ChoiceReader:
    """Turns the chunks of one answer into pieces as they come.

    Args:
        make_parser: makes the parser that finds tool calls; None leaves the text alone.
        one_call: whether the answer ends with its first call.
        echo: piece that the answer begins with.

    Attributes:
        is_cut: whether the one call has come, so that the rest is not needed.
    """

    def __init__(self, make_parser: MakeParser | None, *, one_call: bool, echo: Piece) -> None:
        self._parser = None if make_parser is None else make_parser()
        self._one_call = one_call
        self._echo = echo
        self._called = False
        self.is_cut = False

    def read(self, chunk: GenerationChunk) -> Piece:
        """Turn the next chunk into a piece."""
        echo, self._echo = self._echo, Piece()
        text, calls = self._find_calls(chunk)
        return Piece(
            echo.text + text,
            chunk.reasoning,
            calls,
            (*echo.tokens, *chunk.tokens),
            self._finish_reason(chunk),
            chunk.stop,
            chunk.stats,
            chunk.progress,
            len(echo.tokens),
            chunk.vote,
        )

    def _find_calls(self, chunk: GenerationChunk) -> tuple[str, list[ToolCall]]:
        if self._parser is None:
            return chunk.text, []
        if self.is_cut:
            return "", []
        text, calls = self._parser.push(chunk.text)
        self._called = self._called or bool(calls)
        if self._called and self._one_call:
            self.is_cut = True
            return text, calls[:1]
        if chunk.finish_reason is not None:
            rest, last_calls = self._parser.flush(is_cut=chunk.finish_reason != "stop")
            self._called = self._called or bool(last_calls)
            text, calls = text + rest, [*calls, *last_calls]
        return text, calls

    def _finish_reason(self, chunk: GenerationChunk) -> str | None:
        reason = chunk.finish_reason
        if reason is not None and self._called and (self.is_cut or reason == "stop"):
            return "tool_calls"
        return reason
