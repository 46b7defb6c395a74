"""Reads numbers as models write them, and finds the one that an answer ends with."""

from __future__ import annotations

import re
from contextlib import suppress
from fractions import Fraction

_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?|\.\d+)")
_UNSIGNED = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
_ARGUMENT = rf"\s*(\{{-?{_UNSIGNED}\}}|\d)"  # without braces, LaTeX takes one digit
_FRACTION = re.compile(rf"(?:(?<![\d,.])({_UNSIGNED})[ \t]*)?\\[dt]?frac{_ARGUMENT}{_ARGUMENT}")
_THIN_SPACE = re.compile(r"(?<=\d)(?:\\[,:; ]|[~\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
_POWER = re.compile(
    rf"(?<![\d,.])(?:({_UNSIGNED})\s*(?:\\times|\\cdot|[x*\u00d7\u00b7])\s*)?"
    r"10\^(?:(-?\d{1,3})(?!\d)|\{(-?\d{1,3})\})"
)
_STEP = re.compile(r"\d+[.:)]\s+\S")  # the number of a heading
# These may precede an answer's number: signs, currencies, "The final answer is".
_LEAD = re.compile(
    r"(?:[^\w]|(?:the|final|answer|result|total|is|about|rs|us|usd|eur)\b)*", re.IGNORECASE
)
_ASIDE = re.compile(r"[.,;]\s|(?<!=)\s\(")  # text after it is not part of an equation
_EQUALS = re.compile(r"=|\u2248|approx")
_SPACED_MINUS = re.compile(r"(?<![\w)\s])\s*-\s+(?=[\d.])")


def parse_number(text: str) -> Fraction | None:
    r"""Read a number such as ``1,234.50``, ``$3``, ``1/2``, ``50\%`` or ``\frac{1}{2}``, else None.

    A percent sign, a currency and a unit after the number are ignored. In an equation such as
    ``x_1 = 4`` the last side counts.
    """
    plain = _SPACED_MINUS.sub("-", _without_latex(text).replace("\\", "").replace("$", ""))
    sides = (side for part in _ASIDE.split(plain) for side in reversed(_EQUALS.split(part)))
    match = next(filter(None, map(_NUMBER.search, sides)), None)
    if match is None:
        return None
    with suppress(ZeroDivisionError, ValueError):
        top, _, bottom = match.group().replace(",", "").partition("/")
        return Fraction(top) / Fraction(bottom or "1")
    return None


def find_number(text: str) -> str | None:
    r"""Find an answer's final number: in the last box, else after ``####``, else the last one.

    An empty ``\boxed{}`` is ignored, since it repeats the instruction. ``####`` also begins
    headings in Markdown. So a number counts only directly after it, or where the text calls it the
    answer, and if there are several ``####``, the number of a heading does not count.
    """
    boxes = [boxed(part) for part in text.split("\\boxed{")[1:]]
    for inner in reversed(boxes):
        if inner.strip():
            return inner if parse_number(inner) is not None else None
    tails = text.split("####")[1:]
    for tail in reversed(tails):
        line = tail.strip().split("\n", 1)[0]
        plain = _LEAD.sub("", _without_latex(line), count=1)
        is_step = len(tails) > 1 and _STEP.match(plain)
        if _NUMBER.match(plain) and not is_step and parse_number(line) is not None:
            return line
    numbers: list[str] = _NUMBER.findall(_without_latex(text))
    return numbers[-1] if numbers else None


def _without_latex(text: str) -> str:
    r"""Write ``1{,}234``, ``1\,234``, ``1\frac12`` and ``3 \times 10^4`` as plain numbers."""
    for latex, plain in (("\\!", ""), ("{,}", ","), ("\u2212", "-")):
        text = text.replace(latex, plain)
    text = _THIN_SPACE.sub("", text)
    with suppress(ValueError):  # more digits than Python parses
        return _POWER.sub(_power, _FRACTION.sub(_mixed_number, text))
    return text


def _mixed_number(match: re.Match[str]) -> str:
    parts = (part or "0" for part in match.groups())
    whole, top, bottom = (Fraction(part.strip("{}").replace(",", "")) for part in parts)
    return str(whole + top / bottom) if bottom else f"{top}/0"


def _power(match: re.Match[str]) -> str:
    factor, exponent, braced = match.groups()
    return str(Fraction((factor or "1").replace(",", "")) * Fraction(10) ** int(exponent or braced))


def boxed(text: str) -> str:
    """Return the text up to the brace that closes an open one."""
    depth = 1
    for at, char in enumerate(text):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return text[:at]
    return text
