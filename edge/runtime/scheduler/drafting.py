"""Makes the drafter read and guess, and tracks whether drafts pay."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.errors import EdgeError
from edge.runtime.kv_cache import Slot

from .delivery import Delivery
from .draft_policy import DecodeRun, Draft, DraftPolicy
from .drafter import DraftContext, Drafter
from .policy import Policy
from .sequence import SequenceState, slot_of

_log = logging.getLogger(__name__)
_NEWEST_VERDICT = 0.01  # weight of the newest verdict in the acceptance of new sequences
_FIRST_VERDICTS = 4  # this many verdicts weigh as much as the belief before any
_FIRST_SPREAD = 0.2  # of acceptance between sequences, before any is known
_NEWEST_SPREAD = 0.1
_MOST_HOPE = 0.95  # most acceptance that a sequence starts with
_TRIALS = 0.03  # share of plain steps' time that may be lost on trials of drafts
_SAVED_STEPS = 40  # most time saved up for trials, in plain steps


class Drafting:
    """The drafter of all sequences, and figures about its guesses.

    Args:
        drafter: guesses tokens.
        max_tokens: the most tokens of a draft.
        policy: knows the times of plain steps.
        delivery: counts drafts and verdicts, and knows the time and who runs.

    Attributes:
        drafter: None after it has failed.
        enabled: whether it is used; anyone may set it at any time.
        in_round: whether it is used in this round.
        costs: times of drafts.
    """

    def __init__(
        self,
        drafter: Drafter,
        max_tokens: int,
        policy: Policy,
        delivery: Delivery,
    ) -> None:
        self.drafter: Drafter | None = drafter
        self.max_tokens = max_tokens
        self.counts = delivery.counts
        self.policy = DraftPolicy(policy)
        self.costs = self.policy.costs
        self._delivery = delivery
        delivery.on_end = self.end
        self.enabled = self.in_round = True
        self.acceptance = drafter.first_guess
        self.spread = _FIRST_SPREAD  # of acceptance from sequence to sequence, running mean
        self.trial_s = 0.0  # seconds that may be lost on drafts that do not seem to pay
        self.saved_s = 0.0
        self.failed: str | None = None

    def begin_round(self) -> None:
        """Fix ``in_round`` for a round, since others may switch ``enabled`` in the middle."""
        self.in_round = self.drafter is not None and self.enabled

    @property
    def is_free(self) -> bool:
        """Whether guesses take no time that counts; true without a drafter."""
        return self.drafter is None or self.drafter.is_free

    # ------------------------------------------------------------------ the life of a sequence

    def begin(self, sequence: SequenceState) -> None:
        """Start a sequence, which has its slot, or continue it in another one."""
        if self.drafter is None:
            return
        slot, salt = slot_of(sequence).index, sequence.salt
        self._let(lambda drafter: drafter.begin(slot, salt))
        if sequence.stats.has_started:
            return
        sequence.acceptance = self.acceptance
        if not self.is_free:
            # Texts differ: drafting for one ends by its own guesses, not by those of others.
            sequence.acceptance = min(self.acceptance + self.spread, _MOST_HOPE)

    def end(self, sequence: SequenceState) -> None:
        """Learn from an ended sequence how far texts differ."""
        if sequence.verdicts:
            spread = abs(sequence.acceptance - self.acceptance)
            self.spread += _NEWEST_SPREAD * (spread - self.spread)

    def slide(self, slot: int, before: list[int], after: list[int]) -> None:
        """Tell the drafter that a full slot has other tokens now."""
        if self.drafter is not None:
            self._let(lambda drafter: drafter.slide(slot, before, after))

    def show_hidden(
        self, slots: list[Slot], tokens: list[list[int]], hidden: NDArray[np.float32]
    ) -> None:
        """Let the drafter see the hidden states of the step that has just run."""
        for slot, row, states in zip(slots, tokens, hidden, strict=True):
            if self.drafter is not None:
                took_s = self._let(
                    lambda drafter, *seen: drafter.saw(*seen), slot.index, slot.ids, row, states
                )
                self.saved_s -= took_s or 0.0

    # ------------------------------------------------------------------ one decode step

    def context(self, sequence: SequenceState) -> DraftContext:
        """Return the drafter's view of a sequence."""
        slot = slot_of(sequence)
        limit = min(self.max_tokens, slot.remaining - 1)
        left = sequence.tokens_left
        if left is not None:
            # The token after the last right draft is sampled, too.
            limit = min(limit, left - 1)
        rows = sequence.ids if slot.shareable else [*slot.ids, *sequence.pending]
        return DraftContext(slot.index, sequence.ids, rows, max(limit, 0), sequence.sampler)

    def offers(self, sequences: list[SequenceState], contexts: list[DraftContext]) -> list[Draft]:
        """Ask how much could be drafted; one sequence is read first if that is worth it.

        Args:
            sequences: sequences that decode.
            contexts: the drafter's view of each.
        """
        found: list[Draft] = []
        has_read = False
        for sequence, context in zip(sequences, contexts, strict=True):
            length = 0
            if self.drafter is not None and context.limit:
                behind = self._ask(lambda drafter, of: drafter.behind(of), context)
                if (
                    behind
                    and not has_read
                    and self._reads(sequence, context, behind, len(contexts))
                ):
                    has_read = True
                    self._read(context, behind)
                    behind = self._ask(lambda drafter, of: drafter.behind(of), context)
                if not behind:
                    length = self._ask(lambda drafter, of: drafter.offer(of), context)
            sequence.offered = length
            found.append(Draft(length, sequence.acceptance))
        return found

    def plan(self, drafts: list[Draft]) -> tuple[list[DecodeRun], bool]:
        """Return the runs of a decode step, and whether they are a trial, which may lose time."""
        plan = self.policy.draft_plan(drafts)
        if not (self.is_free or any(run.drafted for run in plan)):
            trial = self.policy.trial(drafts, self.trial_s)
            if trial is not None:
                return trial, True
        return plan, False

    def propose(
        self, sequences: list[SequenceState], contexts: list[DraftContext], count: int
    ) -> float:
        """Let the drafter guess for these sequences; returns the seconds that it took."""
        if self.drafter is None:
            return 0.0
        able = [i for i, sequence in enumerate(sequences) if sequence.offered]
        if not able:
            return 0.0
        if self.drafter.is_free:
            count = self.max_tokens  # tokens that are not run are learnt from, too
        worth = self.policy.draft_worth(len(sequences))
        found: list[list[int]] = []
        took_s = self._let(
            lambda drafter: found.extend(drafter.propose([contexts[i] for i in able], count, worth))
        )
        if took_s is None:
            return 0.0
        for i, draft in zip(able, found, strict=True):
            sequences[i].draft = draft[: contexts[i].limit]
        if not self.is_free:
            # The guess at which it stopped took time, too.
            guesses = min(max(map(len, found)) + 1, count)
            self.costs.guess.observe(len(sequences), took_s / guesses)
        return took_s

    def judge(self, sequence: SequenceState, right: bool) -> None:
        """Count one drafted token as right or wrong."""
        if self.drafter is None:
            return
        newest = self.drafter.newest
        if not self.drafter.is_free:
            sequence.verdicts += 1
            newest = max(newest, 1 / (sequence.verdicts + _FIRST_VERDICTS))
            self.counts["verdicts"] += 1
            of_all = max(_NEWEST_VERDICT, 1 / (self.counts["verdicts"] + _FIRST_VERDICTS))
            self.acceptance += of_all * (right - self.acceptance)
        sequence.acceptance += newest * (right - sequence.acceptance)

    def observe(self, slot: int, proposed: int, accepted: int) -> None:
        """Count a draft that was run, and tell the drafter the result."""
        if self.drafter is not None:
            self.counts["drafted"] += proposed
            self.counts["accepted"] += accepted
            self._let(lambda drafter: drafter.observe(slot, proposed, accepted))

    def count_step(self, tokens: int, took_s: float, batch: int, *, is_trial: bool) -> None:
        """Compare the tokens of a decode step with drafts with plain steps of all its sequences."""
        self.counts["draft_steps"] += 1
        plain_s = self.policy.plain.costs.mean_plain_s(batch) or took_s
        saved_s = plain_s * tokens / batch - took_s
        self.saved_s += saved_s
        if is_trial:
            self.trial_s += min(saved_s, 0.0)

    def count_plain(self, took_s: float) -> None:
        """Save up a share of a decode step without drafts, for trials."""
        if not self.is_free:
            self.trial_s = min(self.trial_s + _TRIALS * took_s, _SAVED_STEPS * took_s)

    # ------------------------------------------------------------------ the drafter's reading

    def _ask(self, question: Callable[[Drafter, DraftContext], int], context: DraftContext) -> int:
        """Ask the drafter for a number of tokens; 0 if it failed."""
        found: list[int] = []
        if self.drafter is not None:
            self._let(lambda drafter: found.append(question(drafter, context)))
        return found[0] if found else 0

    def _reads(
        self, sequence: SequenceState, context: DraftContext, behind: int, batch: int
    ) -> bool:
        """Whether the drafter should read on in a sequence, or may, to learn whether it pays."""
        written, left = sequence.stats.completion_tokens, sequence.tokens_left
        expected = self._delivery.mean_tokens - written
        if left is not None:
            written, expected = min(written, left), min(expected, left)
        draft = Draft(context.limit, sequence.acceptance)
        if self.policy.reads(behind, draft, batch, written=written, expected=expected):
            return True
        price_s = self.costs.reading_s(behind)
        if price_s > self.trial_s:
            return False
        self.trial_s -= price_s
        return True

    def _read(self, context: DraftContext, behind: int) -> None:
        """Let the drafter read a chunk of what it lacks, as long as a stream may wait for it."""
        plain, costs = self.policy.plain, self.costs
        most = plain.step_tokens
        if plain.target_itl_s is not None:  # running sequences wait while the drafter reads
            decode_s = plain.costs.decode.estimate(len(self._delivery.roster.running)) or 0.0
            most = costs.reading.largest(plain.target_itl_s - decode_s, most)
        took_s = self._let(lambda drafter: drafter.read(context, most))
        if took_s is not None:
            costs.reading.observe(min(behind, most), took_s)
            self.saved_s -= took_s

    def _let(self, work: Callable[..., None], *arguments: Any) -> float | None:
        """Let the drafter do something; returns its seconds, or None if it failed.

        Answers do not need it, so they continue without drafts, and the log and the stats say so.
        """
        assert self.drafter is not None
        started = self._delivery.now()
        try:
            work(self.drafter, *arguments)
        except Exception as error:  # noqa: BLE001 - whatever it is, answers do not need it
            expected = isinstance(error, EdgeError)
            self.failed = str(error) if expected else f"{type(error).__name__}: {error}"
            _log.error(
                "no more drafts, answers go on without: %s", self.failed, exc_info=not expected
            )
            self.drafter = None
            return None
        ended_s = self._delivery.times.ended_s = self._delivery.now()
        return ended_s - started
