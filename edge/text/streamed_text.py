"""Turns a stream of token ids into text: `Detokenizer`, and `StopMatcher` for stop strings."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from edge.errors import RequestError

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

MAX_STOPS = 16
MAX_STOP_CHARS = 1024


class Detokenizer:
    """Turns a stream of token ids into text, whole characters at a time.

    Joined, the returns of `push` and `flush` are what `Tokenizer.decode` returns for the ids.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip: Collection[int] = (), *, goes_on: bool = False
    ) -> None:
        """Start a stream.

        Args:
            tokenizer: the tokenizer that made the ids.
            skip: ids that leave no text (e.g. the end of the answer).
            goes_on: whether the text is the rest of a longer one, so its first space stays.
        """
        self._tokenizer = tokenizer
        self._skip = frozenset(skip)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = not goes_on

    def push(self, token_id: int) -> str:
        """Add one token; return the characters that it completes, perhaps none.

        Raises:
            RequestError: the id is negative or exceeds 31 bits.
        """
        if token_id in self._skip:
            return ""
        return self._checked(self._decoder.decode(self._tokenizer.token_bytes(token_id)))

    def flush(self) -> str:
        """End the stream; return the rest of an incomplete character as U+FFFD."""
        return self._checked(self._decoder.decode(b"", final=True))

    def _checked(self, text: str) -> str:
        if self._at_start and text:
            self._at_start = False
            return self._tokenizer.without_first_space(text)
        return text


class StopMatcher:
    """Finds stop strings in streamed text, across the borders of tokens.

    The stop that is complete first wins; of several that end together, the longest. One automaton
    for all of them (Aho and Corasick, 1975, doi:10.1145/360825.360855) reads each character once.
    Its depth is the length of the longest suffix that could still become a stop, so that many
    characters are held back.

    Attributes:
        matched: the stop that was found; None before.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Build the automaton.

        Args:
            stops: at most `MAX_STOPS` strings of 1 to `MAX_STOP_CHARS` characters.

        Raises:
            RequestError: too many stops, or one that is empty, too long or no string.
        """
        if isinstance(stops, str) or len(stops) > MAX_STOPS:
            raise RequestError(
                f"stop: give a list of at most {MAX_STOPS} strings, not {stops!r:.80}"
            )
        self._children: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._match_length = [0]  # length of the longest stop that ends at each node, else 0
        stop: Any  # given by a client, perhaps of the wrong type
        for index, stop in enumerate(stops):
            if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_CHARS:
                raise RequestError(
                    f"stop[{index}]: give a string of 1 to {MAX_STOP_CHARS} characters, "
                    f"not {stop!r:.80}"
                )
            self._add(stop)
        self._fallback = self._link()
        self._node = 0
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> tuple[str, bool]:
        """Add text.

        Returns:
            The text that is safe to emit, and whether a stop was found. The stop and all text after
            it are dropped; later calls return ``("", True)``.
        """
        if self.matched is not None:
            return "", True
        node = self._node
        start = len(self._held)
        buffer = self._held + text
        for end, char in enumerate(text, start + 1):
            while node and char not in self._children[node]:
                node = self._fallback[node]
            node = self._children[node].get(char, 0)
            if self._match_length[node]:
                begin = end - self._match_length[node]
                self._held, self.matched = "", buffer[begin:end]
                return buffer[:begin], True
        self._node = node
        safe = len(buffer) - self._depth[node]
        self._held = buffer[safe:]
        return buffer[:safe], False

    def flush(self) -> str:
        """End the text; return what was held back, since it did not become a stop."""
        held, self._held, self._node = self._held, "", 0
        return held

    def _add(self, stop: str) -> None:
        node = 0
        for char in stop:
            child = self._children[node].get(char)
            if child is None:
                child = self._children[node][char] = len(self._children)
                self._children.append({})
                self._depth.append(self._depth[node] + 1)
                self._match_length.append(0)
            node = child
        self._match_length[node] = len(stop)

    def _link(self) -> list[int]:
        """Return each node's longest proper suffix node, found breadth first."""
        fallback = [0] * len(self._children)
        queue = deque(self._children[0].values())
        while queue:
            node = queue.popleft()
            for char, child in self._children[node].items():
                suffix = fallback[node]
                while suffix and char not in self._children[suffix]:
                    suffix = fallback[suffix]
                fallback[child] = self._children[suffix].get(char, 0)
                queue.append(child)
            own, shorter = self._match_length[node], self._match_length[fallback[node]]
            self._match_length[node] = max(own, shorter)
        return fallback
