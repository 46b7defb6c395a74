"""`lab vision-clients`: every way is asked, and an answer that differs is not passed over."""

from __future__ import annotations

import base64
import json
import shutil
import sys
from pathlib import Path

import pytest

from edge.errors import ConfigError, EdgeError
from export.pipeline import ExportConfig, export_checkpoint
from lab.training.vision_pictures import draw
from lab.training.vision_score import MAX_TOKENS, held_out_questions
from tests.conftest import RUNNABLE
from tests.edge_serve.http.page_stub import page_stub
from tests.makers.tiny_vision import write_vision_checkpoint

from . import vision_clients
from .vision_clients import FIRST, PAGE, ask_page, compare, main, write_pictures

QUESTIONS = held_out_questions([draw("held-out", number) for number in range(2)])
RIGHT = [f" {question.answer}" for question in QUESTIONS]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose answers are random, and other ones for other pictures."""
    root = tmp_path_factory.mktemp("clients")
    source, output = write_vision_checkpoint(root / "checkpoint"), root / "tiny"
    export_checkpoint(
        ExportConfig(
            source=str(source), output=output, quant="fp16", dialect=RUNNABLE, kv_capacity=640
        )
    )
    return output


@pytest.mark.slow
def test_every_way_gives_the_same_texts(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    output = tmp_path / "clients.json"
    arguments = ("clients", bundle, "--pictures", "2", "--no-page", "--threads", "1", "-o", output)
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    main()
    report = json.loads(output.read_text("utf-8"))
    assert report["questions"] == len(QUESTIONS)
    assert report["differences"] == []
    assert len(report["ways"]) == 8
    assert {way["equal"] for way in report["ways"].values()} == {len(QUESTIONS)}


def test_the_page_is_given_the_picture_and_read(tmp_path: Path):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs Debian's packages chromium and chromium-driver")
    questions = QUESTIONS[:3]
    files = write_pictures(questions, tmp_path)
    with page_stub() as server:
        server.sees = {"tiny"}
        server.answers = {q.text: f" {q.answer}" for q in questions}
        texts = ask_page(server.url, questions, files)
    assert texts == [question.answer for question in questions]
    assert len(server.requests) == 3
    for request, question in zip(server.requests, questions, strict=True):
        (message,) = request["messages"]  # no question hears of another one
        url = message["content"][0]["image_url"]["url"]
        assert base64.b64decode(url.partition(",")[2]) == question.drawing.png()
        assert (request["temperature"], request["max_tokens"]) == (0, MAX_TOKENS)


def test_answers_that_differ_are_counted_and_named():
    other = [*RIGHT[:-1], " everywhere"]
    shown = [text.strip() for text in RIGHT]
    found = compare(QUESTIONS, {FIRST: RIGHT, "one": other, PAGE: shown, "strips": shown})
    asked = len(QUESTIONS)
    assert found["ways"] == {
        FIRST: {"equal": asked, "right": asked},
        "one": {"equal": asked - 1, "right": asked - 1},
        PAGE: {"equal": asked, "right": asked},
        "strips": {"equal": 0, "right": asked},
    }
    assert found["differences"][0] == {
        "way": "one",
        "picture": 1,
        "question": QUESTIONS[-1].text,
        "text": " everywhere",
        "expected": RIGHT[-1],
    }
    assert len(found["differences"]) == 1 + asked


def test_a_difference_is_an_error(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def ask_all(*_: object, **__: object) -> dict[str, list[str]]:
        return {FIRST: RIGHT, "one": [*RIGHT[:-1], ""]}

    output = tmp_path / "clients.json"
    monkeypatch.setattr(vision_clients, "ask_all", ask_all)
    monkeypatch.setattr(sys, "argv", ["clients", str(bundle), "--pictures", "2", "-o", str(output)])
    with pytest.raises(EdgeError, match=r"^1 answers are not those of LLM\.generate$"):
        main()
    assert len(json.loads(output.read_text("utf-8"))["differences"]) == 1


def test_what_is_no_bundle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["clients", str(tmp_path)])
    with pytest.raises(ConfigError, match="is no bundle; make one with edge-llm export"):
        main()
    monkeypatch.setattr(sys, "argv", ["clients", str(tmp_path), "--pictures", "0"])
    with pytest.raises(ConfigError, match="--pictures 0 must be 1 or more"):
        main()
