"""Keeps the waiting sequences, and gives clients their turns.

Turns are by deficit round robin over tokens (Shreedhar and Varghese, "Efficient Fair Queuing using
Deficit Round Robin", 1995). Its surplus form is used (Adiseshu, Parulkar and Varghese, "A Reliable
and Scalable Striping Protocol", 1996). A client starts sequences until they have cost a quantum,
and the surplus of the last one is deducted from its next turns. So the cost need not be known
before a sequence has found its cached rows, and a sequence that costs more than a quantum need not
wait for rounds. A client that comes anew is at most one turn of each other client behind; mostly it
leads them (`FairQueue`).

Deficit round robin takes constant work if the quantum is no less than the largest packet. Here it
is one chunk of a prompt, far less than a slot holds, since a newcomer waits for a turn. So turns
that a client has used up in advance are counted instead of skipped one by one.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Container, Iterator

from .sequence import SequenceState, slot_of

FEW = 16
"""Tokens after which a running sequence may have to give way to a newcomer."""


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

    A newcomer is the first sequence of a client that has nothing else here and runs nothing.
    Newcomers come before the others, those that ask for least first, so that a short question need
    not wait for turns of a quantum. Together they start at most a quantum in advance, plus as much
    as the others have started since. An answer counts as the few tokens after which it may have to
    give way. So however many newcomers come, the others get their turns, too.

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
        self._led = 0  # tokens that newcomers have started in advance
        self.changes = 0

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[SequenceState]:
        """Iterate over all of them as they are now, in order of arrival."""
        return iter(list(self._all))

    def add(self, sequence: SequenceState, busy: Container[str] = ()) -> None:
        """Put a sequence after those of its client, and a new client after the others.

        A sequence that comes back after it was preempted gets its old place among its client's.

        Args:
            sequence: the sequence that waits.
            busy: clients of which a sequence runs.
        """
        request, returns = sequence.request, sequence.arrival is not None
        sequence.is_newcomer = not (
            returns
            or request.client in busy
            or any(request.client in each for each in self._lines.values())
        )
        if sequence.arrival is None:
            sequence.arrival = next(self._places)
        lines = self._lines.setdefault(request.priority, {})
        if (line := lines.get(request.client)) is None:
            now = min((each.turn[0] for each in lines.values()), default=0)
            line = lines[request.client] = _Line((now, next(self._places)))
        line.sequences[sequence] = self._all[sequence] = None
        if returns:
            line.sequences = dict.fromkeys(sorted(line.sequences, key=lambda s: s.arrival or 0))
        self.changes += 1

    def remove(self, sequence: SequenceState) -> None:
        """Take a sequence out; a client without waiting sequences has no debt any more."""
        request = sequence.request
        lines = self._lines[request.priority]
        del self._all[sequence], lines[request.client].sequences[sequence]
        if not lines[request.client].sequences:
            del lines[request.client]
        if not lines:
            del self._lines[request.priority]
        self.changes += 1

    def first(self, busy: Container[str], *, preempted_first: bool = False) -> SequenceState:
        """Return the sequence that starts next, of a client that is not ``busy`` if one waits.

        Args:
            busy: clients of which a sequence runs.
            preempted_first: whether preempted sequences come before others that have not started.
        """
        lines = self._lines[min(self._lines)]
        idle = [line for client, line in lines.items() if client not in busy]
        may_lead = self._led < self._quantum

        def turn(line: _Line) -> tuple[bool, int, tuple[int, int]]:
            head = next(iter(line.sequences))
            if head.is_newcomer and may_lead:
                return False, self._cost(head, self._quantum), line.turn
            return True, preempted_first and not (head.saved_rows or head.is_newcomer), line.turn

        return next(iter(min(idle or lines.values(), key=turn).sequences))

    def charge(self, sequence: SequenceState) -> None:
        """Count the cost of a sequence that was taken out: the tokens to read, and its answer.

        An answer counts as a quantum at most: few get as long as they may, and a caller without a
        limit would pay for a whole slot.
        """
        request, cost = sequence.request, self._cost(sequence, self._quantum)
        if sequence.is_newcomer and any(not other.is_newcomer for other in self._all):
            self._led = min(self._led + self._cost(sequence, FEW), self._quantum)
        else:  # the sequence led nobody
            self._led = max(self._led - cost, 0)
        line = self._lines.get(request.priority, {}).get(request.client)
        if line is None:
            return
        rounds, line.used = divmod(line.used + cost, self._quantum)
        if rounds:
            line.turn = (line.turn[0] + rounds, next(self._places))

    def _cost(self, sequence: SequenceState, most: int) -> int:
        """Return the tokens that a sequence has to read, and at most ``most`` of its answer."""
        left = sequence.tokens_left
        return len(sequence.pending) + (most if left is None else min(left, most))

    def gives_way(
        self, sequence: SequenceState, running: Collection[SequenceState], room: int
    ) -> SequenceState | None:
        """Return the running sequence that gives its slot to a waiting one; None if none does.

        It is of no higher priority and of another client. If that client runs at least two more
        than the waiting one, any of its sequences may give way. If the waiting client runs nothing,
        a sequence gives way that has had its turn: a quantum of tokens since it started or went on.
        For a newcomer, a few tokens that it sampled, or that it read of a longer prompt, are
        enough. But it stays if it has at most two thirds left of what the newcomer asks for: equal
        requests would only delay each other. Nobody gives way twice without a token in between, so
        newcomers cannot have rows moved back and forth.

        Args:
            sequence: the waiting sequence.
            running: the running sequences.
            room: rows that preempted sequences may have.
        """
        counts = Counter(each.request.client for each in running)
        client, priority = sequence.request.client, sequence.request.priority
        own = counts[client]

        def may(other: SequenceState) -> bool:
            if other.request.client == client or other.request.priority < priority:
                return False
            if slot_of(other).length > room:
                return False
            if counts[other.request.client] >= own + 2:
                return other.ran > 0 or not other.came_back
            if own:
                return False
            if not sequence.is_newcomer:
                return other.ran >= self._quantum
            left, cost = other.tokens_left, self._cost(sequence, self._quantum)
            if left is not None and 3 * (len(other.pending) + left) <= 2 * cost:
                return False
            is_longer = len(other.pending) > len(sequence.pending)
            sampled = min(other.ran, other.stats.completion_tokens)
            return (other.ran if is_longer else sampled) >= FEW

        return min(
            filter(may, running),
            key=lambda other: (-counts[other.request.client], slot_of(other).length),
            default=None,
        )

    def order(self, busy: set[str], *, preempted_first: bool = False) -> Iterator[SequenceState]:
        """Yield the sequences in the order in which they start, if none comes or ends meanwhile."""
        rest, busy = FairQueue(self._quantum), set(busy)
        rest._places, rest._led = itertools.count(next(self._places)), self._led
        for priority, lines in self._lines.items():
            for client, line in lines.items():
                copied = rest._lines.setdefault(priority, {})[client] = _Line(line.turn, line.used)
                copied.sequences = dict(line.sequences)
        rest._all = dict(self._all)
        while rest:
            sequence = rest.first(busy, preempted_first=preempted_first)
            rest.remove(sequence)
            rest.charge(sequence)
            busy.add(sequence.request.client)
            yield sequence
