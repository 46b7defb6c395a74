"""Runs decode steps that verify the guesses of a drafter."""

from __future__ import annotations

from edge.runtime.kv_cache import Slot

from .draft_policy import DecodeRun
from .drafting import Drafting
from .sequence import SequenceState, slot_of
from .steps import Rows, Steps


class DraftedSteps(Steps):
    """`Steps` in which a sequence runs its drafted tokens together with its next one.

    Attributes:
        drafting: guesses tokens, and learns which of them were right.
    """

    drafting: Drafting

    def decode(self, decoding: list[SequenceState], rider: SequenceState | None) -> bool:
        """Run the next token of each sequence with its draft, as `Steps.decode` does."""
        drafting, times = self.drafting, self.delivery.times
        if not drafting.in_round:
            return super().decode(decoding, rider)
        ready = [sequence for sequence in decoding if self._has_room(sequence)]
        if not ready:
            return False
        ridden = False
        contexts = [drafting.context(sequence) for sequence in ready]
        plan, is_trial = drafting.plan(drafting.offers(ready, contexts))
        before = drafting.counts["completion"]
        took_s = 0.0
        for run in plan:
            rows = [ready[i] for i in run.rows]
            guessing_s = 0.0
            if run.drafted or drafting.is_free:
                guessing_s = drafting.propose(rows, [contexts[i] for i in run.rows], run.drafted)
                if not drafting.is_free:
                    times.model_s += guessing_s
            if rider is not None and not run.drafted:
                rows.append(rider)
                rider, ridden = None, True
            self._run(rows, run, guessing_s)
            took_s += guessing_s + times.newest_s
        tokens = drafting.counts["completion"] - before
        if any(run.drafted for run in plan):
            drafting.count_step(tokens, took_s, len(ready), is_trial=is_trial)
        else:
            drafting.count_plain(took_s)
        return ridden

    def _run(self, sequences: list[SequenceState], run: DecodeRun, guessing_s: float) -> None:
        """Run one token of each sequence and its drafted ones; shorter drafts are padded.

        Rows of padding and of wrong drafts are not counted, so later tokens overwrite them.
        """
        # A drafter may stop early, and padding must not pass the end of any slot.
        longest = max(len(sequence.draft) for sequence in sequences)
        rooms = (slot_of(sequence).remaining - 1 for sequence in sequences)
        drafted = min([run.drafted, longest, *rooms])
        rows = []
        for sequence in sequences:
            sequence.offered = min(sequence.offered, run.drafted)
            tail, first = sequence.draft[:drafted], sequence.pending[:1]
            rows.append([*first, *tail, *first * (drafted - len(tail))])
        logits = self.forward(sequences, rows, [list(range(1 + drafted))] * len(rows))
        if logits is None:
            return
        self._advance(sequences, logits)
        if run.drafted and not self.drafting.is_free:
            took_s = guessing_s + self.delivery.times.newest_s
            self.drafting.costs.observe_drafted(len(sequences), run.drafted, took_s)

    def _account(
        self, slots: list[Slot], tokens: list[list[int]], places: int, seconds: float
    ) -> None:
        if (hidden := self._backend.hidden_states) is not None:
            self.drafting.show_hidden(slots, tokens, hidden)
        super()._account(slots, tokens, places, seconds)
        if places > 1:
            self.drafting.costs.observe_verify(len(tokens), len(tokens[0]), seconds)

    def _sample(self, sequence: SequenceState, logits: Rows) -> None:
        """Draw a token at each place, as long as the draft equals the token drawn."""
        draft, offered, drafted = sequence.draft, sequence.offered, len(logits) - 1
        sequence.draft, sequence.offered = [], 0
        accepted = 0
        slot = slot_of(sequence).index
        for place, row in enumerate(logits):
            token = self._draw(sequence, row)
            if token is None or not self.delivery.deliver(sequence, token):
                break
            right = place < len(draft) and token.id == draft[place]
            if place < len(draft):
                # A drafted token that was not run is still a guess to learn from.
                self.drafting.judge(sequence, right)
            elif place < offered and not self.drafting.is_free:
                # It made no further guess, which ends a draft just as well.
                self.drafting.judge(sequence, False)
            if not right or place == drafted:
                sequence.pending = [token.id]
                break
            slot_of(sequence).extend([token.id])
            accepted += 1
        if draft:
            self.drafting.observe(slot, min(len(draft), drafted), accepted)

    def _slide(self, slot: Slot, ids: list[int]) -> None:
        before = slot.ids
        super()._slide(slot, ids)
        self.drafting.slide(slot.index, before, ids)
