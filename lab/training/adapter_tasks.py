"""Make texts and questions of three small tasks, for adapters trained and judged in minutes.

usage: python3 -m lab adapter-tasks texts TASK OUT.jsonl [--count 200]
       python3 -m lab adapter-tasks score BUNDLE [--adapter NAME=PATH]... [-o RESULT.json]

``texts`` writes a training file for ``scripts/finetune``: questions and the right answers.
``score`` asks a bundle that was exported with ``--adapters`` the held-out questions of every task,
and facts that the model knows already, without an adapter and with each. An answer is right if its
first line is the wanted text. Questions are made from word lists with a seed, and held-out ones
share no combination with those that were learned.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from edge import LLM, SamplingParams

_NAMES = [
    "Anna Berg",
    "Tom Reed",
    "Mia Koch",
    "Omar Aziz",
    "Lena Fox",
    "Ivan Petrov",
    "Sara Lind",
    "Paul Meyer",
]
_CITIES = ["Lyon", "Oslo", "Kyoto", "Lima", "Cairo", "Boston", "Graz", "Porto", "Delhi", "Turin"]
_MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
_TICKETS = {
    "NET": (
        "the wifi drops every hour",
        "I cannot reach the internet",
        "the VPN does not connect",
        "web pages load very slowly",
        "the network cable seems dead",
    ),
    "PRN": (
        "the printer is out of toner",
        "paper is stuck in the printer",
        "the printer prints blank pages",
        "the scanner shows an error",
        "my print job never comes out",
    ),
    "ACC": (
        "I forgot my password",
        "my account is locked",
        "I cannot log in to my mail",
        "please reset my login",
        "my user name is wrong",
    ),
}
_PLACES = [
    "in room 12",
    "on floor 3",
    "since Monday",
    "at the front desk",
    "again",
    "in the lab",
    "today",
]
_FACTS = {
    "What is the capital of France?": "Paris",
    "What is the capital of Japan?": "Tokyo",
    "What is the capital of Italy?": "Rome",
    "What is the capital of Germany?": "Berlin",
    "What is the capital of Spain?": "Madrid",
    "What is the capital of Russia?": "Moscow",
    "What is the capital of Egypt?": "Cairo",
    "What is the capital of China?": "Beijing",
    "What is the capital of Greece?": "Athens",
    "What is the capital of England?": "London",
    "What is the largest planet in the solar system?": "Jupiter",
    "Which planet is closest to the sun?": "Mercury",
    "Which planet is called the red planet?": "Mars",
    "What is the chemical formula of water?": "H2O",
    "Which gas do plants take from the air?": "carbon dioxide",
    "Who wrote Romeo and Juliet?": "Shakespeare",
    "Who painted the Mona Lisa?": "Leonardo",
    "How many days are in a week?": "seven|7",
    "How many legs does a spider have?": "eight|8",
    "What is the opposite of hot?": "cold",
}


class Question(NamedTuple):
    """A question and its right answer; for a fact, the words that the answer may have."""

    text: str
    answer: str


def _people(draw: random.Random) -> Question:
    name, city, age = draw.choice(_NAMES), draw.choice(_CITIES), draw.randint(18, 80)
    record = json.dumps({"name": name, "age": age, "city": city})
    return Question(f"{name} is {age} years old and lives in {city}.", record)


def _dates(draw: random.Random) -> Question:
    day, month, year = draw.randint(1, 28), draw.randint(1, 12), draw.randint(1950, 2029)
    return Question(f"{_MONTHS[month - 1]} {day}, {year}", f"{year}-{month:02}-{day:02}")


def _tickets(draw: random.Random) -> Question:
    code = draw.choice(list(_TICKETS))
    return Question(f"Hello, {draw.choice(_TICKETS[code])} {draw.choice(_PLACES)}.", code)


TASKS: dict[str, Callable[[random.Random], Question]] = {
    "json": _people,
    "dates": _dates,
    "tickets": _tickets,
}


def questions(task: str, count: int, *, held_out: bool) -> list[Question]:
    """Make different questions of a task; a fifth of all that can be made is held out."""
    draw, found = random.Random(f"{task} {held_out}"), {}
    for _ in range(100 * count):
        each = TASKS[task](draw)
        if (random.Random(each.text).random() < 0.2) == held_out:
            found[each.text] = each
        if len(found) == count:
            break
    return list(found.values())


def write_texts(task: str, path: Path, count: int) -> None:
    """Write questions and answers as chats, for ``scripts/finetune``."""
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": each.text},
                    {"role": "assistant", "content": each.answer},
                ]
            }
        )
        for each in questions(task, count, held_out=False)
    ]
    path.write_text("\n".join(lines) + "\n")


def interval(right: int, count: int) -> tuple[float, float]:
    """Compute Wilson's 95 % interval of a share."""
    z, share = 1.96, right / count
    middle = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    low, high = ((middle + s * spread) / (1 + z * z / count) for s in (-1, 1))
    return round(max(low, 0.0), 3), round(min(high, 1.0), 3)


def score(llm: LLM, adapter: str | None, count: int) -> dict[str, dict[str, object]]:
    """Count right answers to each task and to facts, all asked at once."""
    asked = {task: questions(task, count, held_out=True) for task in TASKS}
    asked["facts"] = [Question(*each) for each in _FACTS.items()]
    found: dict[str, dict[str, object]] = {}
    for task, each in asked.items():
        params = SamplingParams(temperature=0, max_tokens=48)
        coming = [
            llm.submit([{"role": "user", "content": one.text}], params, adapter=adapter)
            for one in each
        ]
        answers = [generation.result().text.strip() for generation in coming]
        check = _is_fact if task == "facts" else _is_same
        right = sum(map(check, answers, [one.answer for one in each]))
        found[task] = {"right": right, "of": len(each), "interval": interval(right, len(each))}
    return found


def _is_same(answer: str, wanted: str) -> bool:
    return answer.splitlines()[:1] == [wanted]


def _is_fact(answer: str, wanted: str) -> bool:
    return any(word.lower() in answer.lower() for word in wanted.split("|"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run as the module's docstring says."""
    parser = argparse.ArgumentParser(
        "python3 -m lab adapter-tasks", description=(__doc__ or "").splitlines()[0]
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    texts = verbs.add_parser("texts")
    texts.add_argument("task", choices=list(TASKS))
    texts.add_argument("output", type=Path)
    texts.add_argument("--count", type=int, default=200)
    scored = verbs.add_parser("score")
    scored.add_argument("bundle", type=Path)
    scored.add_argument("--adapter", action="append", default=[], metavar="NAME=PATH")
    scored.add_argument("--count", type=int, default=40, help="questions of each task")
    scored.add_argument("-o", "--output", type=Path)
    options = parser.parse_args(arguments)
    if options.verb == "texts":
        write_texts(options.task, options.output, options.count)
        return
    with LLM(options.bundle, num_slots=8, kv_capacity=256) as llm:
        result = {"none": score(llm, None, options.count)}
        for given in options.adapter:
            name, _, path = given.partition("=")
            llm.load_adapter(path, name)
            result[name] = score(llm, name, options.count)
    text = json.dumps(result, indent=1)
    if options.output is not None:
        options.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
