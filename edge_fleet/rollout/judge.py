"""Judges a new bundle by what it computes: how well it predicts texts, then what it answers.

The texts come first, since they take seconds. They are of different kinds, and each is judged: the
same damage may raise the perplexity of one kind by a tenth, and of another by half. A new bundle is
compared with the one that serves and with the first that was accepted: each roll-out may lose a
little, but the losses must not add up.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edge.bundle.manifest import Manifest, read_manifest
from edge.engine_config import EngineConfig
from edge.errors import ConfigError, NonFiniteError
from edge_lab.measure.defaults import GATE_TEXTS, GOLDEN_SET, MAX_TOKENS, WINDOW
from edge_lab.measure.evaluate import EvalText, cut_windows, read_text
from edge_lab.measure.watch import (
    Baseline,
    BundleAnswerer,
    GoldenItem,
    ItemResult,
    Limits,
    compare_runs,
    perplexity,
    read_golden,
    run_golden,
)
from edge_make.progress import Progress, prefixed

from . import PERPLEXITY_RATIO
from .service import Service

if TYPE_CHECKING:
    from edge.runtime.llm import LLM

LEAST_RIGHT = 6
"""Fewest right answers of the old bundle: by McNemar's test six flips are unlikely (p = 0.031)."""
_TEXT_CHARS = 8000  # characters and not tokens, so that bundles of two tokenizers read the same
_MAX_OWN_LOSS = 1.25
_JUDGED = "judged"  # what the adapter that is judged is called in this process
_LIMITS = Limits(length_ratio=2.0)  # what a new calibration may do to the lengths of greedy answers


@dataclass(frozen=True)
class Gate:
    """The measure that a bundle is judged by.

    Attributes:
        texts: UTF-8 texts; the beginning of each is predicted.
        perplexity_ratio: ratio to the perplexity of the old or first bundle that counts as worse.
        golden: file of the golden set; None leaves it out.
        max_tokens: most tokens of an answer to it.
    """

    texts: tuple[Path, ...] = GATE_TEXTS
    perplexity_ratio: float = PERPLEXITY_RATIO
    golden: Path | None = GOLDEN_SET
    max_tokens: int = MAX_TOKENS


class Measure(msgspec.Struct, frozen=True):
    """Measurements of a bundle.

    Attributes:
        bundle: name of its directory.
        texts_sha256: hash of the beginnings of the texts.
        nats: negative log-probability of each text; infinite if a logit is not finite.
        tokens: predicted tokens of each text, counted by the bundle's own tokenizer.
        own_loss: perplexity over that of its float model, measured by its export and written into
            the manifest; 1 if the manifest has none.
        golden: its answers to the golden set; None if it was not asked.
    """

    bundle: str
    texts_sha256: str
    nats: tuple[float, ...]
    tokens: tuple[int, ...]
    own_loss: float
    golden: Baseline | None = None


class WorseError(Exception):
    """The new bundle is worse; says by how much."""


@dataclass(frozen=True)
class Candidate:
    """A bundle that can be asked: by the service that serves it, else in this process.

    With ``adapter``, the directory of one, it is asked in this process and answers with that.
    """

    bundle: Path
    engine: EngineConfig
    service: Service | None
    adapter: Path | None = None

    @property
    def name(self) -> str:
        """The name of what is measured, for a person and a journal."""
        return self.bundle.name + (f":{self.adapter.name}" if self.adapter else "")

    def read(self, texts: Sequence[str], progress: Progress) -> list[tuple[float, int]]:
        """Predict texts; returns nats and tokens of each."""
        if self.service is not None:
            server = self.service.server
            capacity = server.tokenize("")[1] - 1  # an answer has one token, which nobody reads
            return [
                _read(
                    text,
                    lambda part: server.tokenize(part)[0],
                    capacity,
                    lambda windows: server.perplexity(windows, progress),
                )
                for text in texts
            ]
        with self._open() as llm:
            return [
                _read(
                    text,
                    llm.encode,
                    llm.kv_capacity,
                    lambda windows: perplexity(llm, windows, progress),
                )
                for text in texts
            ]

    def answer(
        self, items: list[GoldenItem], max_tokens: int, progress: Progress
    ) -> tuple[ItemResult, ...]:
        """Answer a golden set."""
        if self.service is not None:
            return run_golden(self.service.answerer, items, max_tokens, progress)
        with self._open() as llm:
            answerer = BundleAnswerer(llm, adapter=_JUDGED if self.adapter else None)
            return run_golden(answerer, items, max_tokens, progress)

    @contextmanager
    def _open(self) -> Iterator[LLM]:
        from edge.runtime.llm import LLM

        with LLM(self.bundle, self.engine) as llm:
            if self.adapter is not None:
                weights = llm.adapters.find(llm.load_adapter(self.adapter, _JUDGED))
                llm.call(lambda: llm.backend.set_adapter(0, weights))  # texts are no requests
            yield llm


def _read(
    text: str,
    encode: Callable[[str], list[int]],
    capacity: int,
    score: Callable[[EvalText], float],
) -> tuple[float, int]:
    prefix = encode("")
    ids = encode(text)[len(prefix) :]
    windows = EvalText(cut_windows(ids, min(WINDOW, capacity), prefix), "", "")
    try:
        return math.log(score(windows)) * windows.num_scored, windows.num_scored
    except (OverflowError, NonFiniteError):
        return math.inf, windows.num_scored


class Judge:
    """Measures bundles and compares them.

    Args:
        gate: the measure.
        progress: called with the texts read and the items asked.

    Raises:
        ConfigError: a text or the golden set cannot be read.
    """

    def __init__(self, gate: Gate, progress: Progress) -> None:
        self._gate = gate
        self._progress = progress
        self._texts = [read_text(path)[:_TEXT_CHARS] for path in gate.texts]
        self._sha256 = hashlib.sha256("\0".join(self._texts).encode()).hexdigest()
        self._items: list[GoldenItem] = []
        self._golden_sha256 = ""
        if gate.golden is not None:
            self._items, self._golden_sha256 = read_golden(gate.golden)

    def known(self, measure: dict[str, Any] | None, bundle: str | None = None) -> Measure | None:
        """Read a journal's measurements; None unless they fit the bundle, if given, and texts."""
        if measure is None:
            return None
        try:
            found = msgspec.convert(measure, Measure)
        except msgspec.ValidationError:  # written by an older edge-llm
            return None
        fits = found.texts_sha256 == self._sha256 and bundle in (None, found.bundle)
        return found if fits else None

    def read(self, measure: dict[str, Any] | None, who: Candidate) -> Measure:
        """Measure the texts, unless that was done.

        Raises:
            EdgeError: the bundle or its service fails.
        """
        found = self.known(measure, who.name)
        if found is not None:
            return found
        progress = prefixed(self._progress, f"{who.name}: ")
        nats, tokens = zip(*who.read(self._texts, progress), strict=True)
        own = _own_loss(read_manifest(who.bundle))
        return Measure(who.name, self._sha256, nats, tokens, own)

    def ask(self, measure: Measure, who: Candidate) -> Measure:
        """Ask the golden set, unless that was done.

        Raises:
            EdgeError: the bundle or its service fails.
        """
        if self._gate.golden is None or self.asked(measure):
            return measure
        progress = prefixed(self._progress, f"{who.name}: ")
        answers = who.answer(self._items, self._gate.max_tokens, progress)
        run = Baseline(who.name, self._golden_sha256, self._gate.max_tokens, answers)
        return msgspec.structs.replace(measure, golden=run)

    def asked(self, measure: Measure) -> bool:
        """Whether a measure has all that the gate looks at."""
        run, gate = measure.golden, self._gate
        wanted = (self._golden_sha256, gate.max_tokens)
        return gate.golden is None or (
            run is not None and (run.golden_sha256, run.max_tokens) == wanted
        )

    def accepted(self, old: Measure, first: dict[str, Any] | None) -> list[Measure]:
        """The measures that a new bundle is held to: of the one that serves, and of the first."""
        known = self.known(first)
        return [old] if known is None or not self.asked(known) else [old, known]

    def check_set(self, old: Measure) -> None:
        """Refuse a golden set that could not tell noise from the old bundle.

        Raises:
            ConfigError: the old bundle has too few right answers.
        """
        if self._gate.golden is None or old.golden is None:
            return
        right = sum(item.correct is True for item in old.golden.items)
        if right < LEAST_RIGHT:
            raise ConfigError(
                f"{self._gate.golden} cannot reject anything: {old.bundle}, which serves, has "
                f"{right} right answers of {len(self._items)}, and with fewer than {LEAST_RIGHT} "
                "even noise is not told from chance; give --golden a set of which it answers more "
                "(the built-in one has 62 prompts), or --gate perplexity"
            )

    def compare_text(self, new: Measure, *before: Measure) -> None:
        """Compare how well a new bundle predicts each text with those before it.

        Raises:
            WorseError: it is worse.
        """
        for old in before:
            pairs = zip(new.nats, old.nats, old.tokens, strict=True)
            ratio, path = max(
                (_exp((now - was) / tokens), path)
                for (now, was, tokens), path in zip(pairs, self._gate.texts, strict=True)
            )
            # The manifest says what the export to fewer bits has lost.
            own = max(1.0, min(new.own_loss, _MAX_OWN_LOSS) / old.own_loss)
            if ratio > (bound := self._gate.perplexity_ratio * own):
                raise WorseError(
                    f"perplexity is {ratio:.4g} times that of {old.bundle} on {path.name}, at most "
                    f"{bound:.4g}; where that is meant, give --perplexity-ratio"
                )

    def compare(self, new: Measure, *before: Measure) -> None:
        """Compare all measurements of a new bundle with those before it.

        Raises:
            WorseError: it is worse.
        """
        self.compare_text(new, *before)
        for old in before:
            if new.golden is None or old.golden is None:
                continue
            found = compare_runs(new.golden, old.golden, _LIMITS)
            alarms = [check for check in found if check.alarm]
            if alarms:
                said = "; ".join(
                    f"{check.name} {check.value:.4g}, was {check.baseline:.4g}" for check in alarms
                )
                raise WorseError(f"golden set: {said} with {old.bundle}")


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))


def _own_loss(manifest: Manifest) -> float:
    """Read what the export measured: the perplexity over that of the float model."""
    found = ((manifest.quality or {}).get("text") or {}).get("perplexity_ratio")
    return max(1.0, found) if isinstance(found, float) else 1.0
