"""`python3 -m lab train-vision`: its pictures, its score, and the checkpoint that it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from edge.errors import ConfigError

from .vision_pictures import (
    ANSWERS,
    COLOURS,
    NUMBERS,
    PLACES,
    QUESTIONS,
    SHAPES,
    Split,
    draw,
    is_held_out,
)
from .vision_score import Question, beside_another, held_out_questions, main, score

SPLITS: tuple[Split, Split] = ("train", "held-out")


# ---------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_asked_for_in_both_splits(split: Split):
    facts = [draw(split, number).facts for number in range(500)]
    for kind, answers in ANSWERS.items():
        seen = Counter(f[kind] for f in facts if kind in f)
        assert set(seen) == set(answers)
        # No answer is so frequent that saying it always would pass for seeing.
        assert max(seen.values()) < 3 * sum(seen.values()) / len(answers)


def test_a_held_out_colour_of_a_shape_is_never_learned():
    pairs = {
        split: {
            (f["colour"], f.get("shape", f.get("digit")))
            for f in (draw(split, number).facts for number in range(2000))
        }
        for split in SPLITS
    }
    everything = set(product(COLOURS, (*SHAPES, *NUMBERS)))
    assert pairs["train"].isdisjoint(pairs["held-out"])
    assert pairs["train"] | pairs["held-out"] == everything
    for what in (*SHAPES, *NUMBERS):  # each is seen in most colours, and held out in some
        assert 1 <= sum(is_held_out(colour, what) for colour in COLOURS) <= 2


def test_a_picture_follows_from_its_number_alone():
    pictures = [draw("held-out", number).png() for number in range(20)]
    assert pictures == [draw("held-out", number).png() for number in range(20)]
    assert len(set(pictures)) == 20
    assert draw("train", 3).png() != pictures[3]


def test_a_picture_shows_what_is_said_of_it():
    for number in range(100):
        drawing = draw("train", number)
        edge_px = drawing.image.width
        pixels = drawing.image.load()
        assert pixels is not None
        background = pixels[0, 0]
        third = edge_px / 3
        ink_px = Counter(
            int(y / third) * 3 + int(x / third)
            for y in range(edge_px)
            for x in range(edge_px)
            if pixels[x, y] != background
        )
        # The largest shapes reach a pixel over the border.
        drawn = {place for place, count in ink_px.items() if count > 0.03 * third**2}
        assert drawn == set(drawing.places)
        if "count" in drawing.facts:
            assert drawing.facts["count"] == NUMBERS[len(drawn)]
        if "place" in drawing.facts:
            assert drawn == {PLACES.index(drawing.facts["place"])}


# ------------------------------------------------------------------------------------- score


def who_sees(questions: Sequence[Question]) -> list[str]:
    """Answers what the picture shows; a question says its kind by its text."""
    kinds = {text: kind for kind, texts in QUESTIONS.items() for text in texts}
    facts = [q.drawing.facts.get(kinds[q.text], "everywhere") for q in questions]
    return [f" {fact.capitalize()}.\n" for fact in facts]


def test_who_sees_is_right_and_beside_another_picture_hardly_ever():
    counted = score(who_sees, 200)
    assert counted["right"] == counted["asked"] > 400
    for kind, of_kind in counted["kinds"].items():
        assert of_kind["right"] == of_kind["asked"] > 50
        chance = 1 / len(ANSWERS[kind])
        assert of_kind["right_beside_another"] / of_kind["asked"] < 2 * chance


def test_who_guesses_is_right_as_often_as_beside_another_picture():
    counted = score(lambda questions: ["red"] * len(questions), 200)
    assert 0 < counted["right"] == counted["right_beside_another"] < 0.1 * counted["asked"]
    assert counted["kinds"]["shape"]["right"] == 0


def test_an_answer_that_goes_on_is_wrong():
    question = held_out_questions([draw("held-out", 0)])[0]
    assert question.is_right(f"{question.answer.upper()}.")
    for answer in ("", f"{question.answer} and blue", "It is unclear"):
        assert not question.is_right(answer)


def test_the_other_picture_shows_shapes_or_a_digit_as_the_first_does():
    drawings = [draw("held-out", number) for number in range(60)]
    others = beside_another(drawings)
    assert sorted(d.number for d in others) == list(range(60))
    for drawing, other in zip(drawings, others, strict=True):
        assert other.number != drawing.number
        assert ("digit" in other.facts) == ("digit" in drawing.facts)


def test_what_cannot_be_scored_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["score", str(tmp_path)])
    with pytest.raises(ConfigError, match="neither a bundle nor a checkpoint"):
        main()
    monkeypatch.setattr(sys, "argv", ["score", str(tmp_path), "--pictures", "4"])
    with pytest.raises(ConfigError, match="--pictures 4 must be 5 or more"):
        main()


# ---------------------------------------------------------------------------------- training

IN_TRANSFORMERS = """
import json, sys
import torch, transformers
from lab.training.train_vision import Training, pixels_of
from lab.training.vision_checkpoint import AFTER_QUESTION, BEFORE_QUESTION
from lab.training.vision_pictures import draw
from lab.training.vision_score import _message, held_out_questions
from pathlib import Path
from typing import Any

checkpoint, state = map(Path, sys.argv[1:])
processor = transformers.AutoProcessor.from_pretrained(checkpoint, backend="pil")
model = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
question = held_out_questions([draw("held-out", 0)])[0]
text = processor.apply_chat_template([_message(question, None)], add_generation_prompt=True)
inputs = processor(text=[text], images=[[question.drawing.image]], return_tensors="pt")
training = Training(state, deadline_s=0, seed=0)
ids = training.ids(BEFORE_QUESTION + question.text + AFTER_QUESTION)
drawings = [draw("held-out", number) for number in range(8)]
pixels = processor.image_processor([[d.image] for d in drawings], return_tensors="pt").pixel_values
saved = torch.load(state / "answers.pt", weights_only=True)
training.sight.load_state_dict(saved["sight"])
with torch.inference_mode():
    expected = model(**inputs).logits[0, -1]
    rows, _ = training.sight(pixels_of([question.drawing]))
    packed = training.pack(question.drawing, None)
    kinds = list(question.drawing.facts)
    states = training.decode(
        torch.tensor([packed.ids]), rows, torch.tensor([packed.positions]),
        torch.tensor([packed.blocks]),
    )
    logits = training.logits(states[0])
first = next(
    place for place, (block, label) in enumerate(zip(packed.blocks, packed.labels))
    if block == 1 + kinds.index(question.kind) and label >= 0
)
assert packed.labels[first:first + 1] == training.ids(f" {question.answer}")[:1]
print(json.dumps({
    "ids_equal": ids == inputs["input_ids"][0].tolist(),
    "pixels_apart": float((pixels[:, 0] - pixels_of(drawings)).abs().max()),
    "logits_apart": float((logits[first] - expected).norm() / expected.norm()),
    "top": [int(expected.argmax()), int(logits[first].argmax())],
}))
"""


@pytest.mark.slow
@pytest.mark.parity
def test_what_is_learned_is_what_transformers_loads(tmp_path: Path):
    """Prompt, pixels and logits of the training are those of the checkpoint that it writes."""
    for module in ("torch", "transformers"):
        pytest.importorskip(module, reason="live parity needs torch and transformers")
    checkpoint, state = tmp_path / "checkpoint", tmp_path / "state"
    environment = {**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}

    def run(*arguments: str | Path) -> tuple[dict[str, Any], str]:
        # In a process of its own: torch brings threads, and warnings that are errors here.
        done = subprocess.run(
            [sys.executable, *arguments], cwd=Path(__file__).parents[2], env=environment,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return report, done.stderr

    command = (
        "-m", "lab.training.train_vision", "-o", checkpoint, "--state", state,
        "--label-steps", "3", "--answer-steps", "2", "--threads", "1", "--pictures", "5",
    )  # fmt: skip
    report, _ = run(*command)
    assert report["seen"] == {"labels": 96, "answers": 8}
    assert report["held_out"]["colour"]["asked"] == 5
    weights = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").unlink()
    again, said = run(*command)
    assert again == report
    assert "labels: 3 steps of 3 are done" in said
    assert "answers: 2 steps of 2 are done" in said
    assert (checkpoint / "model.safetensors").read_bytes() == weights

    compared, _ = run("-c", IN_TRANSFORMERS, checkpoint, state)
    assert compared["ids_equal"]
    assert compared["pixels_apart"] < 1e-6
    assert compared["logits_apart"] < 0.05
