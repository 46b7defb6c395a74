"""Decides which model answers, by rules for the model ``auto`` and by shares of an A/B split.

A rule is a condition of one or more comparisons, ``prompt_tokens<=500&kind=chat&waiting<4``;
``|`` separates alternatives; ``always`` always holds. Rules are tried in order, and the first that
holds gives its model. Everything here is pure. A comparison is about one of these:

=================  ================================================================================
``prompt_tokens``  tokens of all texts of the request as the rule's model counts them, without its
                   chat template
``kind``           ``tools``, ``json`` (any response format but text), ``chat`` or ``completion``
``running``        requests that the rule's model computes now
``waiting``        requests that wait for that model
=================  ================================================================================
"""

from __future__ import annotations

import hashlib
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edge.errors import ConfigError
from edge.runtime.scheduler.request import SchedulerStats

AUTO = "auto"
KINDS = ("tools", "json", "chat", "completion")
_NUMBERS = ("prompt_tokens", "running", "waiting")
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
}
_COMPARISON = re.compile(r" *(\w+) *(<=|>=|<|>|=) *(\w+) *", re.ASCII)


@dataclass(frozen=True)
class Facts:
    """Facts about a request that rules and splits may use.

    Attributes:
        prompt_tokens: tokens of the request's texts, by the model that counts them; needed for the
            models whose rules have a `Rule.most_tokens`.
        kind: one of `KINDS`.
        key: identifies the sender for an A/B split: the request's ``user``, else its id.
    """

    prompt_tokens: Mapping[str, int]
    kind: str
    key: str


@dataclass(frozen=True)
class Rule:
    """One rule of ``auto``.

    Attributes:
        model: the model that it chooses.
        text: text of the rule.
    """

    model: str
    text: str

    def __post_init__(self) -> None:
        for option in self.text.split("|"):  # read every part once, to find errors
            for part in option.split("&"):
                self._compare(part, Facts({}, "chat", ""), SchedulerStats())

    @property
    def most_tokens(self) -> int | None:
        """The largest number that ``prompt_tokens`` is compared with; None if there is none."""
        found = [
            int(match[3])
            for match in map(_COMPARISON.fullmatch, re.split(r"[&|]", self.text))
            if match is not None and match[1] == "prompt_tokens"
        ]
        return max(found, default=None)

    def holds(self, facts: Facts, stats: SchedulerStats) -> bool:
        """Whether the rule chooses its model, whose state is ``stats``.

        Raises:
            ConfigError: the rule cannot be read.
        """
        results = [
            [self._compare(part, facts, stats) for part in option.split("&")]
            for option in self.text.split("|")
        ]
        return any(all(option) for option in results)

    def _compare(self, part: str, facts: Facts, stats: SchedulerStats) -> bool:
        if part.strip() == "always":
            return True
        found = _COMPARISON.fullmatch(part)
        if found:
            name, sign, wanted = found.groups()
            if name == "kind" and sign == "=" and wanted in KINDS:
                return facts.kind == wanted
            if name in _NUMBERS and wanted.isdecimal():
                if name == "prompt_tokens":
                    value = facts.prompt_tokens.get(self.model, 0)
                else:
                    value = getattr(stats, name)
                return _OPERATORS[sign](value, int(wanted))
            if name == "prompt_chars":
                raise ConfigError(
                    f"auto: {part.strip()!r} of the rule for {self.model!r} counts characters, of "
                    "which a token has four in English and one or two in Chinese; write "
                    "prompt_tokens, which the model's own tokenizer counts"
                )
        raise ConfigError(
            f"auto: cannot read {part.strip()!r} of the rule for {self.model!r}; write "
            f"comparisons of {', '.join(_NUMBERS)} or kind={'/'.join(KINDS)}, joined by &; "
            "or always"
        )


@dataclass(frozen=True)
class Split:
    """A name that stands for several models, each with a share of the requests.

    Attributes:
        name: the name that requests use.
        shares: models and their weights, in order.
    """

    name: str
    shares: tuple[tuple[str, int], ...]

    @classmethod
    def parse(cls, name: str, text: str) -> Split:
        """Read ``a:90/b:10``.

        Raises:
            ConfigError: the text has another form.
        """
        shares = []
        for part in text.split("/"):
            model, _, weight = part.strip().rpartition(":")
            if not model or not weight.isdecimal() or not int(weight):
                raise ConfigError(
                    f"split: cannot read {part.strip()!r} of {name!r}; "
                    "write MODEL:SHARE/MODEL:SHARE"
                )
            shares.append((model, int(weight)))
        if len({model for model, _ in shares}) < max(2, len(shares)):
            raise ConfigError(f"split: {name!r} needs two or more different models")
        return cls(name, tuple(shares))

    def arm(self, key: str) -> str:
        """Choose the model for a key: the same every time, and by the shares over many keys."""
        digest = hashlib.sha256(f"{self.name}\0{key}".encode("utf-8", "replace")).digest()
        total = sum(weight for _, weight in self.shares)
        point = int.from_bytes(digest[:8], "big") * total >> 64
        for model, weight in self.shares:
            point -= weight
            if point < 0:
                return model
        raise AssertionError("a point beyond all shares")


def read_routes(
    auto: Mapping[str, str], split: Mapping[str, str], models: Mapping[str, Any]
) -> tuple[list[Rule], dict[str, Split]]:
    """Read the rules and splits of the settings and check them against the models.

    Raises:
        ConfigError: a rule or split cannot be read, names a model that is not served, or has a
            name that is taken.
    """
    rules = [Rule(model, text) for model, text in auto.items()]
    splits = {name: Split.parse(name, text) for name, text in split.items()}
    named = [("auto", rule.model) for rule in rules]
    named += [("split", model) for item in splits.values() for model, _ in item.shares]
    for where, model in named:
        if model not in models:
            raise ConfigError(f"{where}: {model!r} is not one of the models to serve")
    taken = {*splits, *([AUTO] if rules else [])} & set(models)
    if taken or AUTO in splits:
        raise ConfigError(f"the name {(taken or {AUTO}).pop()!r} means two things; rename one")
    return rules, splits
