"""Draws pictures and makes questions about them, for `python3 -m lab train-vision` and its score.

A picture shows one to six equal shapes of one colour, or one digit. Everything follows from a
split and a number, so a set of pictures needs no files. The colours that go with a shape or a
digit differ between the two splits: the score asks only about pairs that were never drawn before.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image, ImageDraw, ImageFont

Split = Literal["train", "held-out"]

COLOURS = {
    "red": (220, 30, 30),
    "orange": (255, 140, 0),
    "yellow": (250, 225, 30),
    "green": (30, 150, 50),
    "blue": (30, 70, 220),
    "purple": (125, 35, 160),
    "pink": (255, 150, 195),
    "brown": (115, 65, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MOST_SHAPES = 6
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom",
          "bottom right")  # fmt: skip

# The answer to every question of a kind is one of these.
ANSWERS: Mapping[str, Sequence[str]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "count": NUMBERS[1 : MOST_SHAPES + 1],
    "place": PLACES,
    "digit": NUMBERS,
}
QUESTIONS: Mapping[str, Sequence[str]] = {
    "colour": (
        "What colour is it?",
        "Which colour do you see?",
        "What color is in the picture?",
        "Name the colour.",
    ),
    "shape": (
        "What shape is it?",
        "Which shape do you see?",
        "What shape is in the picture?",
        "Name the shape.",
    ),
    "count": (
        "How many shapes are there?",
        "How many do you see?",
        "How many shapes are in the picture?",
        "Count the shapes.",
    ),
    "place": (
        "Where is it?",
        "Where do you see it?",
        "Where in the picture is it?",
        "Name the place.",
    ),
    "digit": (
        "Which digit is it?",
        "Which digit do you see?",
        "What number is in the picture?",
        "Name the digit.",
    ),
}
_SIZES_PX = (128, 192, 256, 320)


@dataclass(frozen=True)
class Drawing:
    """One picture and the facts about it.

    Attributes:
        image: RGB, square, 128 to 320 pixels wide.
        facts: the answer of each kind of question that can be asked about the picture.
        places: the `PLACES` at which something is drawn.
        number: its number within its split.
    """

    image: Image.Image
    facts: Mapping[str, str]
    places: Sequence[int]
    number: int

    def png(self) -> bytes:
        """Return the picture as a PNG file."""
        file = io.BytesIO()
        self.image.save(file, "PNG")
        return file.getvalue()

    def question(self, kind: str, phrasing: int) -> str:
        """Return a question of a kind; any number names one of its phrasings."""
        return QUESTIONS[kind][phrasing % len(QUESTIONS[kind])]


def is_held_out(colour: str, what: str) -> bool:
    """Return whether a colour is drawn with a shape or a digit only in held-out pictures.

    A sixth of the colours of each shape and a fifth of those of each digit are.
    """
    place = list(COLOURS).index(colour)
    if what in SHAPES:
        return SHAPES.index(what) == (place + 2) % len(SHAPES)
    return NUMBERS.index(what) % 5 == (3 * place + 1) % 5


def draw(split: Split, number: int) -> Drawing:
    """Draw a picture.

    Args:
        split: use of the picture.
        number: number of the picture; another number gives another picture.
    """
    chance = random.Random(f"{split} {number}")
    shown = NUMBERS if chance.random() < 1 / 3 else SHAPES
    pairs = [
        (c, w) for c in COLOURS for w in shown if is_held_out(c, w) == (split == "held-out")
    ]  # fmt: skip
    colour, what = chance.choice(pairs)
    count = chance.randint(2, MOST_SHAPES) if shown is SHAPES and chance.random() < 0.8 else 1
    places = chance.sample(range(len(PLACES)), count)
    edge_px = chance.choice(_SIZES_PX)
    image = Image.new("RGB", (edge_px, edge_px), _background(chance))
    pen = ImageDraw.Draw(image)
    ink = _near(COLOURS[colour], 14, chance)
    radius_px = edge_px * chance.uniform(0.105, 0.15)
    for place in places:
        row, column = divmod(place, 3)
        x, y = (edge_px * ((at + 0.5) / 3 + chance.uniform(-0.02, 0.02)) for at in (column, row))
        if what in SHAPES:
            _draw_shape(pen, what, x, y, radius_px, ink)
        else:
            font = ImageFont.load_default(size=3 * radius_px)
            pen.text((x, y), str(NUMBERS.index(what)), fill=ink, font=font, anchor="mm")
    facts = {"colour": colour}
    if what in SHAPES:
        facts |= {"shape": what, "count": NUMBERS[count]}
    else:
        facts["digit"] = what
    if count == 1:
        facts["place"] = PLACES[places[0]]
    return Drawing(image, facts, places, number)


def _background(chance: random.Random) -> tuple[int, int, int]:
    """Return a colour near white, or near black."""
    return _near((236, 236, 236) if chance.random() < 0.7 else (18, 18, 18), 16, chance)


def _near(colour: tuple[int, int, int], levels: int, chance: random.Random) -> tuple[int, int, int]:
    red, green, blue = (
        min(max(value + chance.randint(-levels, levels), 0), 255) for value in colour
    )  # fmt: skip
    return red, green, blue


def _draw_shape(
    pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, ink: Any
) -> None:
    """Draw a shape within ``r`` pixels of a point."""
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=ink)
    elif shape == "square":
        pen.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=ink)
    elif shape == "cross":
        pen.rectangle((x - r, y - 0.3 * r, x + r, y + 0.3 * r), fill=ink)
        pen.rectangle((x - 0.3 * r, y - r, x + 0.3 * r, y + r), fill=ink)
    elif shape == "heart":
        turns = [2 * math.pi * step / 40 for step in range(40)]
        pen.polygon(
            [
                (
                    x + r * math.sin(t) ** 3,
                    y - r * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t)
                             - math.cos(4 * t)) / 16,
                )
                for t in turns
            ],
            fill=ink,
        )  # fmt: skip
    else:
        corners, inner = {"triangle": (3, 0.5), "star": (5, 0.4)}[shape]
        points = []
        for step in range(2 * corners):
            turn = math.pi * step / corners
            reach = r * (inner if step % 2 else 1.0)
            points.append((x + reach * math.sin(turn), y - reach * math.cos(turn)))
        pen.polygon(points, fill=ink)
