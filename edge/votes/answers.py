r"""Finds the answer of a sample, normalised so that equal answers are equal texts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from edge.errors import RequestError

from .numbers import boxed, find_number, parse_number

AnswerFinder = Callable[[str], str | None]
KINDS = "number, choice, boxed, json:FIELD or regex:PATTERN"
_MOST_PATTERN = 1024  # characters
_LETTER = r"\s*\*{0,2}\(?([A-J])(?![\w'])"
_SAID = re.compile(rf"(?i:answer|option|choice)(?:\s+is)?\s*:?{_LETTER}")
_CHINESE = re.compile(
    rf"(?:\u7b54\u6848|\u9009\u9879|\u9009)\s*[\u662f\u4e3a]?\s*[:\uff1a]?{_LETTER}"
)
_ALONE = re.compile(r"(?<![\w'])\(?([A-J])(?:[).:]|\*\*|\s*$)")


def answer_finder(rule: str) -> AnswerFinder:
    r"""Return a function that returns the answer in a sample's text, or None.

    Args:
        rule: ``number`` takes the last box, else the number after ``####``, else the last
            number. ``choice`` takes a letter from A to J, ``boxed`` the text in the last
            ``\boxed{}``. ``json:FIELD`` takes that field of the last JSON object.
            ``regex:PATTERN`` takes the first group of the last match, or the whole match, and
            runs in a limited process.

    Raises:
        RequestError: there is no such rule, or the pattern is wrong.
    """
    given: Any = rule
    if not isinstance(given, str):
        raise RequestError(f"vote: answers must be {KINDS}, not {given!r:.80}")
    kind, colon, detail = rule.partition(":")
    plain: dict[str, AnswerFinder] = {"number": _number, "choice": _choice, "boxed": _boxed}
    if not colon and kind in plain:
        return plain[kind]
    if kind == "json" and detail:
        return lambda text: _field(text, detail)
    if kind == "regex" and detail:
        if len(detail) > _MOST_PATTERN:
            raise RequestError(f"vote: the pattern has more than {_MOST_PATTERN} characters")
        from .pattern_child import pattern_finder

        return pattern_finder(detail)
    raise RequestError(f"vote: answers must be {KINDS}, not {rule!r:.80}")


def _number(text: str) -> str | None:
    found = find_number(text)
    value = None if found is None else parse_number(found)
    if value is None:
        return None
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest != 1 or value.denominator == 1:
        return str(value)
    # A denominator of twos and fives gives a finite decimal; with more digits it is a fraction.
    decimal = Decimal(value.numerator) / Decimal(value.denominator)
    exact = decimal * value.denominator == value.numerator
    return format(decimal.normalize(), "f") if exact else str(value)


def _choice(text: str) -> str | None:
    box = _boxed(text)
    for part in (box or "", text):
        for pattern in (_SAID, _CHINESE, _ALONE):
            if found := pattern.findall(part):
                return str(found[-1])
    return None


def _boxed(text: str) -> str | None:
    boxes = [" ".join(box.split()).strip("$") for box in map(boxed, text.split("\\boxed{")[1:])]
    return next((box for box in reversed(boxes) if box), None)


def _field(text: str, name: str) -> str | None:
    """Return a field of the last JSON object in a text that has it."""
    decoder, found, at = json.JSONDecoder(), None, text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            if name in value:
                found = value[name]
        at = text.find("{", end)
    if found is None:
        return None
    return found.strip() if isinstance(found, str) else json.dumps(found, sort_keys=True)
