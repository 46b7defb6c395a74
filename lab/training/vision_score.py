"""Count the right answers of a model that `python3 -m lab train-vision` made, on pictures held out.

usage: python3 -m lab vision-score MODEL... [--pictures 500] [-o SCORE.json]

MODEL is the checkpoint, which transformers then runs, or a bundle of it, which `edge.LLM` runs.
Each picture is asked every kind of question that it allows, and each question is asked a second
time beside another picture: the answers that are right then show what a blind guess achieves.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edge.errors import ConfigError
from edge_lab.telemetry import read_cpu_name
from tools.command import run_main, say

from .vision_pictures import ANSWERS, Drawing, draw

MAX_TOKENS = 8
_BATCH = 32  # batch size in transformers


@dataclass(frozen=True)
class Question:
    """A question to ask beside a picture.

    Attributes:
        drawing: the picture.
        kind: one of `ANSWERS`.
        text: the question.
        answer: the right answer.
    """

    drawing: Drawing
    kind: str
    text: str
    answer: str

    def is_right(self, answer: str) -> bool:
        """Return whether an answer is right, apart from its case and a full stop."""
        return answer.strip().rstrip(".").lower() == self.answer


# Takes questions and returns greedy answers in their order.
Answerer = Callable[[Sequence[Question]], list[str]]


def main() -> None:
    parser = argparse.ArgumentParser(
        "python3 -m lab vision-score", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--pictures", type=int, default=500, help="default 500")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("-o", "--output", type=Path, metavar="SCORE.json")
    options = parser.parse_args()
    if options.pictures < len(ANSWERS):
        raise ConfigError(f"--pictures {options.pictures} must be {len(ANSWERS)} or more")
    scores = []
    for model in options.models:
        with ExitStack() as opened:
            answer = open_answerer(model, options.threads, opened)
            scores.append({"model": model.name, **score(answer, options.pictures)})
        say(as_line(scores[-1]))
    report = {
        "cpu": read_cpu_name(),
        "threads": options.threads,
        "pictures": options.pictures,
        "scores": scores,
    }
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    print(json.dumps(report))


def as_line(counted: dict[str, Any]) -> str:
    """Write one model's score for a reader."""
    kinds = ", ".join(
        f"{kind} {100 * n['right'] / n['asked']:.1f} % (another picture: "
        f"{100 * n['right_beside_another'] / n['asked']:.1f} %)"
        for kind, n in counted["kinds"].items()
    )
    return f"{counted['model']}: {kinds}"


def score(answer: Answerer, pictures: int) -> dict[str, Any]:
    """Ask everything and count.

    Returns:
        For each kind, how many questions were asked and how many answered right, beside their
        picture and beside another one; the seconds for the questions beside their pictures.
    """
    drawings = [draw("held-out", number) for number in range(pictures)]
    questions = held_out_questions(drawings)
    others = dict(zip(range(pictures), beside_another(drawings), strict=True))
    started_s = time.perf_counter()
    given = answer(questions)
    took_s = time.perf_counter() - started_s
    blind = answer([replace(q, drawing=others[q.drawing.number]) for q in questions])
    asked = Counter(q.kind for q in questions)
    right = Counter(q.kind for q, a in zip(questions, given, strict=True) if q.is_right(a))
    guessed = Counter(q.kind for q, a in zip(questions, blind, strict=True) if q.is_right(a))
    return {
        "kinds": {
            kind: {
                "asked": asked[kind],
                "right": right[kind],
                "right_beside_another": guessed[kind],
                "answers": len(ANSWERS[kind]),
            }
            for kind in ANSWERS
        },
        "asked": sum(asked.values()),
        "right": sum(right.values()),
        "right_beside_another": sum(guessed.values()),
        "seconds": round(took_s, 1),
    }


def held_out_questions(drawings: Sequence[Drawing]) -> list[Question]:
    """List everything that can be asked about pictures."""
    return [
        Question(drawing, kind, drawing.question(kind, drawing.number), answer)
        for drawing in drawings
        for kind, answer in drawing.facts.items()
    ]


def beside_another(drawings: Sequence[Drawing]) -> list[Drawing]:
    """Pair each picture with the next one, in a circle, that has shapes or a digit as it has."""
    after: dict[int, int] = {}
    for has_digit in (False, True):
        places = [
            p for p, drawing in enumerate(drawings) if ("digit" in drawing.facts) is has_digit
        ]
        after.update(zip(places, [*places[1:], *places[:1]], strict=True))
    return [drawings[after[place]] for place in range(len(drawings))]


def open_answerer(model: Path, threads: int, opened: ExitStack) -> Answerer:
    """Open a checkpoint in transformers, or a bundle in edge-llm.

    Raises:
        ConfigError: it is neither.
    """
    if (model / "manifest.json").is_file():
        return _open_bundle(model, threads, opened)
    if (model / "preprocessor_config.json").is_file():
        return open_checkpoint(model, threads)
    raise ConfigError(
        f"{model} is neither a bundle nor a checkpoint that python3 -m lab train-vision made"
    )


def _open_bundle(bundle: Path, threads: int, opened: ExitStack) -> Answerer:
    from edge import LLM, SamplingParams

    llm = opened.enter_context(LLM(bundle, num_threads=threads))
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)

    def answer(questions: Sequence[Question]) -> list[str]:
        return [llm.generate([_message(q, q.drawing.png())], params).text for q in questions]

    return answer


def open_checkpoint(checkpoint: Path, threads: int, backend: str = "pil") -> Answerer:
    """A checkpoint in transformers, whose processor resizes by Pillow or by ``torchvision``."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        checkpoint, dtype=torch.float32
    ).eval()
    processor = transformers.AutoProcessor.from_pretrained(checkpoint, backend=backend)

    def answer(questions: Sequence[Question]) -> list[str]:
        # Prompts of one text have one length, so nothing is padded.
        answers: dict[int, str] = {}
        places = sorted(range(len(questions)), key=lambda place: questions[place].text)
        while places:
            text = questions[places[0]].text
            batch = [place for place in places[:_BATCH] if questions[place].text == text]
            del places[: len(batch)]
            prompt = processor.apply_chat_template(
                [_message(questions[batch[0]], None)], add_generation_prompt=True
            )
            inputs = processor(
                text=[prompt] * len(batch),
                images=[[questions[place].drawing.image] for place in batch],
                return_tensors="pt",
            )
            with torch.inference_mode():
                ids = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
            written = ids[:, inputs["input_ids"].shape[1] :]
            said = processor.batch_decode(written, skip_special_tokens=True)
            answers.update(zip(batch, said, strict=True))
        return [answers[place] for place in range(len(questions))]

    return answer


def _message(question: Question, image: bytes | None) -> dict[str, Any]:
    picture = {"type": "image"} if image is None else {"type": "image", "image": image}
    return {"role": "user", "content": [picture, {"type": "text", "text": question.text}]}


if __name__ == "__main__":
    run_main(main)
