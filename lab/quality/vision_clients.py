"""Ask a bundle the same questions about drawn pictures in every way that there is to ask.

usage: python3 -m lab vision-clients BUNDLE [--pictures 30] [--no-page] [--threads N]
                              [-o CLIENTS.json]

BUNDLE is of a checkpoint that `python3 -m lab train-vision` made. The pictures are of those held
out. The ways are Python, the command line, a batch, the clients that others wrote for each
protocol, and the page in a browser. All take the most probable tokens, so each must give the text
that `LLM.generate` gives; a text that differs is printed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

from edge.errors import ConfigError, EdgeError
from edge_lab.telemetry import read_cpu_name
from lab.training.vision_pictures import draw
from lab.training.vision_score import (
    MAX_TOKENS,
    Answerer,
    Question,
    held_out_questions,
    open_answerer,
)
from tools.command import run_main, say
from tools.pages.pictures import ROOT, opened_page, served, wait_for_answer

FIRST = "LLM.generate"
PAGE = "the page in chromium"
CLIENTS = ("openai", "anthropic", "ollama", "selenium")


def main() -> None:
    parser = argparse.ArgumentParser(
        "python3 -m lab vision-clients", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--pictures", type=int, default=30, help="default 30")
    parser.add_argument("--no-page", action="store_true", help="do without a browser")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("-o", "--output", type=Path, metavar="CLIENTS.json")
    options = parser.parse_args()
    if options.pictures < 1:
        raise ConfigError(f"--pictures {options.pictures} must be 1 or more")
    if not (options.bundle / "manifest.json").is_file():
        raise ConfigError(f"{options.bundle} is no bundle; make one with edge-llm export")
    questions = held_out_questions([draw("held-out", at) for at in range(options.pictures)])
    bundle = options.bundle.resolve()
    said = ask_all(bundle, questions, options.threads, in_page=not options.no_page)
    report = {
        "cpu": read_cpu_name(),
        "threads": options.threads,
        "bundle": options.bundle.name,
        "pictures": options.pictures,
        "clients": {name: metadata.version(name) for name in CLIENTS},
        **compare(questions, said),
    }
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(json.dumps(report))
    if report["differences"]:
        raise EdgeError(f"{len(report['differences'])} answers are not those of {FIRST}")


def compare(questions: Sequence[Question], said: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Count the answers of each way that are `LLM.generate`'s, and those that are right.

    Args:
        said: the answers of each way, in the order of the questions; `FIRST` is among them.

    Returns:
        How many were asked; for each way how many are equal and right; the texts that differ.
    """
    ways, differences = {}, []
    for way, texts in said.items():
        # The page shows a text without the spaces around it, which most answers begin with.
        wanted = [text.strip() if way == PAGE else text for text in said[FIRST]]
        rows = list(zip(questions, texts, wanted, strict=True))
        ways[way] = {
            "equal": sum(text == expected for _, text, expected in rows),
            "right": sum(question.is_right(text) for question, text, _ in rows),
        }
        differences += [
            {"way": way, "picture": question.drawing.number, "question": question.text,
             "text": text, "expected": expected}
            for question, text, expected in rows
            if text != expected
        ]  # fmt: skip
        say(f"{way}: {ways[way]['equal']} of {len(rows)} equal, {ways[way]['right']} right")
    for difference in differences:
        say(f"differs: {difference}")
    return {"questions": len(questions), "ways": ways, "differences": differences}


def ask_all(
    bundle: Path, questions: Sequence[Question], threads: int, *, in_page: bool
) -> dict[str, list[str]]:
    """Ask every question in every way, the page perhaps apart.

    Raises:
        EdgeError: a way does not answer, or there is no browser.
    """
    said = {}
    with ExitStack() as opened:
        said[FIRST] = open_answerer(bundle, threads, opened)(questions)
    engine = ("--num-threads", str(threads))
    with tempfile.TemporaryDirectory() as directory:
        files = write_pictures(questions, Path(directory))
        command = _CommandLine(bundle, engine, files)
        ways: dict[str, Answerer] = {
            "edge-llm run --image": command.run,
            "edge-llm batch": command.batch,
        }
        for way, answer in ways.items():
            say(f"asking by {way}")
            said[way] = answer(questions)
        with served(bundle, *engine, "--log-level", "warning") as url, ExitStack() as opened:
            for way, ask in _clients(url.rstrip("/"), bundle.name, opened).items():
                say(f"asking by {way}")
                said[way] = [ask(question) for question in questions]
            if in_page:
                say(f"asking by {PAGE}")
                said[PAGE] = ask_page(url, questions, files)
    return said


def write_pictures(questions: Sequence[Question], directory: Path) -> Mapping[int, Path]:
    """Write each picture as a PNG; its number names its file."""
    files = {}
    for drawing in {q.drawing.number: q.drawing for q in questions}.values():
        files[drawing.number] = directory / f"{drawing.number}.png"
        files[drawing.number].write_bytes(drawing.png())
    return files


def _uri(question: Question) -> str:
    return "data:image/png;base64," + base64.b64encode(question.drawing.png()).decode()


def _chat(question: Question) -> list[Any]:
    """Return the messages of OpenAI's Chat Completions."""
    picture = {"type": "image_url", "image_url": {"url": _uri(question)}}
    return [{"role": "user", "content": [picture, {"type": "text", "text": question.text}]}]


# ------------------------------------------------------------------------- the command line


class _CommandLine:
    """Answers of the commands, each of which has an engine of its own."""

    def __init__(self, bundle: Path, engine: Sequence[str], files: Mapping[int, Path]) -> None:
        self._bundle, self._engine, self._files = bundle, engine, files

    def run(self, questions: Sequence[Question]) -> list[str]:
        """Answer each question in a process of its own."""
        texts = []
        for question in questions:
            picture = str(self._files[question.drawing.number])
            greedy = ("--temperature", "0", "--max-tokens", str(MAX_TOKENS), "--json")
            said = self._call(
                "run", str(self._bundle), question.text, "--image", picture, *greedy, *self._engine
            )
            texts.append(json.loads(said)["text"])
        return texts

    def batch(self, questions: Sequence[Question]) -> list[str]:
        """Answer all questions from one file of requests."""
        directory = next(iter(self._files.values())).parent
        requests, answers = directory / "requests.jsonl", directory / "answers.jsonl"
        rows = [
            {
                "custom_id": str(number), "method": "POST", "url": "/v1/chat/completions",
                "body": {"messages": _chat(q), "max_tokens": MAX_TOKENS, "temperature": 0},
            }
            for number, q in enumerate(questions)
        ]  # fmt: skip
        requests.write_text("\n".join(map(json.dumps, rows)), "utf-8")
        model = ("--model", str(self._bundle))
        self._call("batch", str(requests), "-o", str(answers), *model, *self._engine)
        found = {}
        for line in answers.read_text("utf-8").splitlines():
            row = json.loads(line)
            message = row["response"]["body"]["choices"][0]["message"]
            found[int(row["custom_id"])] = message["content"]
        return [found[number] for number in range(len(questions))]

    def _call(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "edge.cli", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise EdgeError(f"edge-llm {arguments[0]} ended with {done.returncode}: {done.stderr}")
        return done.stdout


# ------------------------------------------------------------------------------ the clients


def _clients(url: str, model: str, opened: ExitStack) -> dict[str, Callable[[Question], str]]:
    """Make functions that ask the server one question, by client and protocol."""
    import anthropic
    import ollama
    import openai

    options: dict[str, Any] = {"api_key": "none", "max_retries": 0}
    with_openai = opened.enter_context(openai.OpenAI(base_url=f"{url}/v1", **options))
    with_anthropic = opened.enter_context(anthropic.Anthropic(base_url=url, **options))
    with_ollama = opened.enter_context(ollama.Client(url))

    def chat(question: Question) -> str:
        answer = with_openai.chat.completions.create(
            model=model, messages=_chat(question), max_tokens=MAX_TOKENS, temperature=0
        )
        return answer.choices[0].message.content or ""

    def streamed(question: Question) -> str:
        chunks = with_openai.chat.completions.create(
            model=model,
            messages=_chat(question),
            max_tokens=MAX_TOKENS,
            temperature=0,
            stream=True,
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

    def responses(question: Question) -> str:
        picture = {"type": "input_image", "image_url": _uri(question)}
        parts = [picture, {"type": "input_text", "text": question.text}]
        asked: list[Any] = [{"role": "user", "content": parts}]
        answer = with_openai.responses.create(
            model=model, input=asked, max_output_tokens=MAX_TOKENS, temperature=0
        )
        return str(answer.output_text)

    def messages(question: Question) -> str:
        data = base64.b64encode(question.drawing.png()).decode()
        source = {"type": "base64", "media_type": "image/png", "data": data}
        picture = {"type": "image", "source": source}
        parts = [picture, {"type": "text", "text": question.text}]
        asked: list[Any] = [{"role": "user", "content": parts}]
        answer = with_anthropic.messages.create(
            model=model, messages=asked, max_tokens=MAX_TOKENS, extra_body={"temperature": 0}
        )
        return "".join(part.text for part in answer.content if part.type == "text")

    def ollama_chat(question: Question) -> str:
        asked = [{"role": "user", "content": question.text, "images": [question.drawing.png()]}]
        greedy = {"temperature": 0, "num_predict": MAX_TOKENS}
        return with_ollama.chat(model, asked, options=greedy).message.content or ""

    return {
        "openai, Chat Completions": chat,
        "openai, Chat Completions, streamed": streamed,
        "openai, Responses": responses,
        "anthropic, Messages": messages,
        "ollama, chat": ollama_chat,
    }


# --------------------------------------------------------------------------------- the page


def ask_page(url: str, questions: Sequence[Question], files: Mapping[int, Path]) -> list[str]:
    """Ask a server's page, with a conversation for each question.

    Raises:
        EdgeError: there is no browser, or no answer.
    """
    texts = []
    with opened_page(url) as page:
        for name, value in (("temperature", "0"), ("max_tokens", str(MAX_TOKENS))):
            page.one(f"[name={name}]").send_keys(value)
        # The button opens a window of the system, which no driver can use.
        page.driver.execute_script("document.getElementById('attach-file').hidden = false")
        for question in questions:
            file = files[question.drawing.number]
            page.one("#new").click()
            page.one("#attach-file").send_keys(str(file))
            page.until(lambda file=file: [n.text for n in page.all("#files .name")] == [file.name])
            page.ask(question.text)
            wait_for_answer(page)
            texts.append(page.one(".turn.assistant:last-child .body").text)
    return texts


if __name__ == "__main__":
    run_main(main)
