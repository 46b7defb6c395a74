"""Write the arithmetic word problems of the evaluation: ``python3 -m tools tasks OUTPUT``.

Each kind of problem is a text with places for numbers and their exact result, computed here. A
fixed seed draws the numbers, so the file can be made again, byte for byte, and a test does.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from fractions import Fraction
from itertools import product
from pathlib import Path

PROBLEMS = 150
_SEED = 20251125
Kind = tuple[str, dict[str, list[int]], Callable[..., Fraction]]

_SMALL, _TENS = list(range(3, 13)), list(range(20, 100, 5))
KINDS: tuple[Kind, ...] = (
    (
        "A baker fills {a} trays with {b} rolls each and sells {c} of the rolls before noon. How "
        "many rolls are left?",
        {"a": list(range(6, 13)), "b": list(range(12, 25)), "c": list(range(15, 70))},
        lambda a, b, c: Fraction(a * b - c),
    ),
    (
        "A train covers {d} km in {h} hours. At the same speed, how many kilometres does it cover"
        " in {k} hours?",
        {"d": [180, 240, 300, 360, 420], "h": [2, 3, 4], "k": [5, 6, 7, 9]},
        lambda d, h, k: Fraction(d * k, h),
    ),
    (
        "A jacket costs {p} euros. First its price rises by {r} %, then it falls by {s} %. What "
        "does it cost now, in euros?",
        {"p": [80, 120, 160, 200, 240], "r": [10, 20, 25, 50], "s": [10, 20, 25, 50]},
        lambda p, r, s: Fraction(p * (100 + r) * (100 - s), 10_000),
    ),
    (
        "Mia is {a} years older than her brother. In {n} years the two will be {t} years old "
        "together. How old is her brother today?",
        {"a": [2, 4, 6, 8], "n": [3, 5, 7], "t": [40, 44, 48, 52, 56]},
        lambda a, n, t: Fraction(t - 2 * n - a, 2),
    ),
    (
        "A tank holds {v} litres. One pipe fills {f} litres per minute, a leak loses {g} litres "
        "per minute. After how many minutes is the empty tank full?",
        {"v": [240, 360, 480, 600, 720], "f": [14, 17, 20, 22], "g": [2, 5, 8]},
        lambda v, f, g: Fraction(v, f - g),
    ),
    (
        "A class of {n} pupils takes a test. The mean of {m} of them is {x} points, the mean of "
        "the others is {y} points. How many points do all of them have together?",
        {"n": [24, 26, 28, 30], "m": _SMALL, "x": [60, 65, 70, 75], "y": [78, 80, 84, 88]},
        lambda n, m, x, y: Fraction(m * x + (n - m) * y),
    ),
    (
        "A rectangle is {a} cm longer than it is wide, and its perimeter is {p} cm. What is its "
        "area in square centimetres?",
        {"a": [2, 4, 6, 8, 10], "p": [40, 52, 64, 76, 88]},
        lambda a, p: Fraction((p - 2 * a) * (p + 2 * a), 16),
    ),
    (
        "{w} workers need {d} days to lay a floor. How many days do {v} workers need, if all work"
        " equally fast?",
        {"w": [3, 4, 6, 8], "d": [6, 9, 12, 15], "v": [2, 5, 9, 12]},
        lambda w, d, v: Fraction(w * d, v),
    ),
    (
        "A shop sells pens in packs of {k} at {p} cents a pack and single pens at {s} cents. What"
        " is the least that {n} pens cost, in cents, if exactly {n} are bought?",
        {"k": [4, 5, 6], "p": [180, 200, 220], "s": [55, 60, 65], "n": [17, 22, 27, 33]},
        lambda k, p, s, n: Fraction(min(i * p + (n - i * k) * s for i in range(n // k + 1))),
    ),
    (
        "Of {n} apples, {q} % are sold on Monday, and a third of what is left is sold on Tuesday."
        " How many apples are left then?",
        {"n": [120, 180, 240, 300, 360], "q": [25, 40, 50, 60]},
        lambda n, q: Fraction(n * (100 - q) * 2, 300),
    ),
    (
        "A cyclist rides {a} km at {u} km/h and then {b} km at {v} km/h. How many minutes does "
        "she ride in all?",
        {"a": [12, 18, 24, 30], "u": [18, 20, 24], "b": [10, 15, 20], "v": [12, 15, 30]},
        lambda a, u, b, v: Fraction(60 * a, u) + Fraction(60 * b, v),
    ),
    (
        "In a savings account {p} euros earn {r} % of interest each year, which is added to them "
        "at the end of the year. How many euros are there after two years?",
        {"p": [400, 600, 800, 1200, 1600, 2000], "r": [5, 10, 20, 50]},
        lambda p, r: Fraction(p * (100 + r) ** 2, 10_000),
    ),
    (
        "A number is multiplied by {a}, then {b} is added, and the result is {c}. What is the "
        "number?",
        {"a": [3, 4, 5, 6, 8], "b": _TENS, "c": [150, 185, 210, 246, 300]},
        lambda a, b, c: Fraction(c - b, a),
    ),
    (
        "A cinema sells {n} tickets for {t} euros in all. A child's ticket costs {k} euros and an"
        " adult's {e} euros. How many of the tickets are for adults?",
        {"n": [40, 50, 60, 70], "t": [420, 480, 540, 600], "k": [6, 7], "e": [10, 11, 12]},
        lambda n, t, k, e: Fraction(t - n * k, e - k),
    ),
    (
        "A hen house gives {a} eggs a day. The farmer keeps {b} eggs of each day and packs the "
        "others in boxes of {c}. How many full boxes does he have after {d} days, if leftovers "
        "wait for the next box?",
        {"a": [31, 38, 43, 52], "b": [2, 4, 5], "c": [6, 10, 12], "d": [5, 7, 9]},
        lambda a, b, c, d: Fraction((a - b) * d // c),
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser("python3 -m tools tasks", description=__doc__)
    parser.add_argument("output", type=Path)
    lines = (json.dumps(item) for item in make_problems())
    parser.parse_args().output.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def make_problems() -> list[dict[str, str]]:
    """Make the same number of problems of each kind, with positive whole answers, none twice."""
    draw = random.Random(_SEED)
    problems: list[dict[str, str]] = []
    texts: set[str] = set()
    while len(problems) < PROBLEMS:
        text, choices, solve = KINDS[len(problems) % len(KINDS)]
        numbers = {name: draw.choice(values) for name, values in choices.items()}
        answer = solve(**numbers)
        question = text.format(**numbers)
        if answer > 0 and answer.denominator == 1 and question not in texts:
            texts.add(question)
            problems.append({"question": question, "answer": f"#### {answer}"})
    return problems


def further_problems(count: int) -> list[dict[str, str]]:
    """Make this many problems that `make_problems` does not have, of each kind in turn."""
    draw = random.Random(_SEED + 1)
    taken = {problem["question"] for problem in make_problems()}
    kinds = []
    for text, choices, solve in KINDS:
        every = [dict(zip(choices, each, strict=True)) for each in product(*choices.values())]
        draw.shuffle(every)
        kinds.append((text, iter(every), solve))
    problems: list[dict[str, str]] = []
    while len(problems) < count:
        for text, numbers_left, solve in kinds:
            for numbers in numbers_left:
                question, answer = text.format(**numbers), solve(**numbers)
                if answer > 0 and answer.denominator == 1 and question not in taken:
                    taken.add(question)
                    problems.append({"question": question, "answer": f"#### {answer}"})
                    break
    return problems[:count]


if __name__ == "__main__":
    main()
