"""Keeps the sequences that wait, and gives clients their turns.

Turns are by deficit round robin over tokens (Shreedhar and Varghese, "Efficient Fair Queuing using
Deficit Round Robin", 1995) in its surplus form (Adiseshu, Parulkar and Varghese, "A Reliable and
Scalable Striping Protocol", 1996): a client starts sequences until they have cost a quantum, and
what the last one cost beyond it comes off its next turns. So a price need not be known before a
sequence has found its cached rows, and one that is dearer than a quantum need not wait for rounds.
A client that comes anew is behind at most one turn of each other.

Deficit round robin takes constant work where the quantum is no less than the dearest packet. Here
it is one chunk of a prompt, far less than a slot holds, for a turn is what a newcomer waits for; so
turns that a client has used up in advance are counted instead of skipped one by one.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator

from .sequence import SequenceState


class _Line:
    """The waiting sequences of one client and priority, in order of arrival.

    Attributes:
        turn: its next turn: the round, and its place in that round.
        used: tokens that it has started in this turn.
    """

    def __init__(self, turn: tuple[int, int], used: int = 0) -> None:
        self.sequences: dict[SequenceState, None] = {}
        self.turn = turn
        self.used = used


class FairQueue:
    """Sequences that wait: by priority, then clients in turn, then in order of arrival.

    Other threads may ask for its length and iterate over it.

    Args:
        quantum: tokens that a client may start in one turn.

    Attributes:
        changes: how often it has changed.
    """

    def __init__(self, quantum: int) -> None:
        self._quantum = quantum
        self._all: dict[SequenceState, None] = {}
        self._lines: dict[int, dict[str, _Line]] = {}  # by priority and client
        self._places = itertools.count()
        self.changes = 0

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[SequenceState]:
        """All of them as they are now, in order of arrival."""
        return iter(list(self._all))

    def add(self, sequence: SequenceState) -> None:
        """Put a sequence behind those of its client, and a new client behind the others."""
        request = sequence.request
        lines = self._lines.setdefault(request.priority, {})
        if (line := lines.get(request.client)) is None:
            now = min((each.turn[0] for each in lines.values()), default=0)
            line = lines[request.client] = _Line((now, next(self._places)))
        line.sequences[sequence] = self._all[sequence] = None
        self.changes += 1

    def remove(self, sequence: SequenceState) -> None:
        """Take a sequence out; a client of which none is left has no debt any more."""
        request = sequence.request
        lines = self._lines[request.priority]
        del self._all[sequence], lines[request.client].sequences[sequence]
        if not lines[request.client].sequences:
            del lines[request.client]
        if not lines:
            del self._lines[request.priority]
        self.changes += 1

    def first(self, busy: Container[str]) -> SequenceState:
        """Return the sequence that starts next, of a client that is not ``busy`` if one waits."""
        lines = self._lines[min(self._lines)]
        idle = [line for client, line in lines.items() if client not in busy]
        return next(iter(min(idle or lines.values(), key=lambda line: line.turn).sequences))

    def charge(self, sequence: SequenceState) -> None:
        """Count what a sequence that was taken out costs: the rest of its prompt, and its answer.

        An answer counts as a quantum at most: few get as long as they may, and a caller who sets no
        limit would pay for a whole slot.
        """
        request = sequence.request
        line = self._lines.get(request.priority, {}).get(request.client)
        if line is None:
            return
        left = sequence.tokens_left
        answer = self._quantum if left is None else min(left, self._quantum)
        rounds, line.used = divmod(line.used + len(sequence.pending) + answer, self._quantum)
        if rounds:
            line.turn = (line.turn[0] + rounds, next(self._places))

    def order(self, busy: set[str]) -> Iterator[SequenceState]:
        """Say in which order they start, if none comes or ends meanwhile."""
        rest, busy = FairQueue(self._quantum), set(busy)
        rest._places = itertools.count(next(self._places))
        for priority, lines in self._lines.items():
            for client, line in lines.items():
                copied = rest._lines.setdefault(priority, {})[client] = _Line(line.turn, line.used)
                copied.sequences = dict(line.sequences)
        rest._all = dict(self._all)
        while rest:
            sequence = rest.first(busy)
            rest.remove(sequence)
            rest.charge(sequence)
            busy.add(sequence.request.client)
            yield sequence
