"""Keep a pool of answers to word problems, from which rules of stopping and voting are computed.

usage: python3 -m lab answer-pool 0.5b|1.5b [--directory .pool] [--minutes N] [--threads N]
       python3 -m lab answer-pool pack FILE [--directory .pool]

The 1.5B answers the 150 problems of ``arithmetic.jsonl``, the 0.5B 600 further ones of the same
kinds, each 16 times by fixed seeds and once greedily, 800 tokens at most. Problems come in an order
drawn by a seed, so the first of them are a fair sample of all.

At boundaries of each answer there is a trial: the text so far, then the answer's beginning, and the
model's greedy continuation. It tells whether a rule would have stopped there, and with what answer.

A run appends one JSON line per problem to ``DIRECTORY/SIZE.jsonl`` and resumes where it stopped.
`pack` adds new answers to ``FILE``, without tokens and their log-probabilities. Problems in
``docs/measured/answer-pool.jsonl.xz`` are not answered again.
"""

from __future__ import annotations

import argparse
import base64
import json
import lzma
import random
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edge.runtime.llm import LLM
from edge.runtime.sampling_params import SamplingParams
from edge.runtime.stream import GenerationResult
from edge.votes.numbers import find_number, parse_number
from lab.bundles import coder_bundle
from tools.command import run_main, say
from tools.goldens.tasks import further_problems, make_problems

PACKED = Path("docs/measured/answer-pool.jsonl.xz")
ANSWERS = 16
LIMIT = 800
_INSTRUCTION = "\nPut your final answer, a number, within \\boxed{}."
TRIAL = "\n\nThe final answer is \\boxed{"
TRIAL_TOKENS = 10
_SPACING = 20  # least tokens between two trials
_FURTHER = 600
_SEED = 48
_SAMPLING = SamplingParams(temperature=0.7, top_p=0.95, top_k=0, repetition_penalty=1.0)
_KEPT = 6  # log-probabilities of a trial's tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        "python3 -m lab answer-pool",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=["0.5b", "1.5b", "pack"])
    parser.add_argument("output", type=Path, nargs="?", help="of pack")
    parser.add_argument("--directory", type=Path, default=Path(".pool"))
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    if options.what == "pack":
        if options.output is None:
            parser.error("pack needs the file to write")
        pack(options.directory, options.output)
    else:
        fill(options.what, options.directory, 60 * options.minutes, options.threads)


def fill(size: str, directory: Path, seconds: float, threads: int) -> None:
    """Answer problems until all are answered or the time is over."""
    output = directory / f"{size}.jsonl"
    done = {item["number"] for item in read_lines(output)}
    done |= {item["number"] for item in read_packed(PACKED) if item["size"] == size}
    began = time.monotonic()
    left = [(number, each) for number, each in problems(size) if number not in done]
    bundle = coder_bundle(size)
    with LLM(
        bundle, backend="ort-cpu", num_slots=24, max_batch=17, kv_capacity=1152, num_threads=threads
    ) as llm:
        for number, problem in left:
            if time.monotonic() - began > seconds:
                return
            line = answer(llm, number, problem)
            with output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            right = sum(each["right"] for each in line["answers"])
            say(f"{size} {len(done) + 1}: {right} of {ANSWERS} right, {line['seconds']:.0f} s")
            done.add(number)


def problems(size: str) -> list[tuple[int, dict[str, str]]]:
    """Return a model's problems with their numbers, in the order in which they are answered."""
    each = make_problems() if size == "1.5b" else further_problems(_FURTHER)
    numbered = list(enumerate(each))
    random.Random(_SEED).shuffle(numbered)
    return numbered


def answer(llm: LLM, number: int, problem: dict[str, str]) -> dict[str, Any]:
    """Return all answers to a problem with their trials."""
    began = time.monotonic()
    expected = problem["answer"].removeprefix("#### ")
    prompt = llm.encode([{"role": "user", "content": problem["question"] + _INSTRUCTION}])
    seeded = replace(_SAMPLING, seed=_SEED * 1000, max_tokens=LIMIT, logprobs=2)
    greedy = replace(seeded, temperature=0.0)
    generations = [*llm.submit(prompt, seeded, n=ANSWERS), llm.submit(prompt, greedy)]
    results = [generation.result() for generation in generations]
    generated_s = time.monotonic() - began
    all_trials = try_answers(llm, prompt, results)
    answers = [
        _answer(result, trials, expected)
        for result, trials in zip(results, all_trials, strict=True)
    ]
    return {
        "number": number,
        "question": problem["question"],
        "expected": expected,
        "prompt_tokens": len(prompt),
        "answers": answers[:-1],
        "greedy": answers[-1],
        "generated_s": round(generated_s, 2),
        "seconds": round(time.monotonic() - began, 2),
    }


def _answer(result: GenerationResult, trials: list[Any], expected: str) -> dict[str, Any]:
    found = find_number(result.text)
    tops = [token.top_logprobs or () for token in result.tokens]
    margins = [top[0][1] - top[1][1] if len(top) > 1 else 0.0 for top in tops]
    logprobs = [token.logprob or 0.0 for token in result.tokens]
    return {
        "ids": _packed(np.array([token.id for token in result.tokens], np.uint32)),
        "logprobs": _packed(np.array(logprobs, np.float16)),
        "margins": _packed(np.array(margins, np.float16)),
        "tokens": len(result.tokens),
        "finish": result.finish_reason,
        "answer": found,
        "right": _is_right(found, expected),
        "trials": [
            {
                "at": at,
                "answer": text,
                "right": _is_right(text, expected),
                "tokens": len(confidence),
                "logprobs": [round(each, 3) for each in confidence[:_KEPT]],
            }
            for at, text, confidence in trials
        ],
    }


def try_answers(
    llm: LLM, prompt: Sequence[int], results: Sequence[GenerationResult]
) -> list[list[tuple[int, str | None, list[float]]]]:
    """Run the trials of each answer: place, answer, and log-probabilities of its tokens.

    All answers try their last boundary at once, then the one before: each goes on in the slot that
    has its rows, and gives up the tail.
    """
    suffix = llm.tokenizer.encode(TRIAL, goes_on=True)
    params = SamplingParams(
        temperature=0.0, repetition_penalty=1.0, max_tokens=TRIAL_TOKENS, logprobs=0, stop=("}",)
    )
    found: list[list[tuple[int, str | None, list[float]]]] = [[] for _ in results]
    all_ids = [[token.id for token in result.tokens] for result in results]
    places = [list(boundaries(llm, ids)) for ids in all_ids]
    while any(places):
        tries = [(index, left.pop()) for index, left in enumerate(places) if left]
        generations = [
            llm.submit([*prompt, *all_ids[index][:at], *suffix], params) for index, at in tries
        ]
        for (index, at), generation in zip(tries, generations, strict=True):
            tried = generation.result()
            text = tried.text.strip()
            number = text if parse_number(text) is not None else None
            found[index].insert(0, (at, number, [token.logprob or 0.0 for token in tried.tokens]))
    return found


def boundaries(llm: LLM, ids: Sequence[int]) -> Iterator[int]:
    """Yield token counts where a paragraph ended, not close to one another nor to the end."""
    last = 0
    text = b""
    for at, token_id in enumerate(ids[:-1], 1):
        text = (text + llm.tokenizer.token_bytes(token_id))[-8:]
        if b"\n\n" in text:
            text = text.rpartition(b"\n\n")[2]
            if at - last >= _SPACING and len(ids) - at > TRIAL_TOKENS:
                last = at
                yield at


def pack(directory: Path, output: Path) -> None:
    """Write everything that the rules need as one xz file of JSON lines."""
    lines = [json.dumps(item, separators=(",", ":")) for item in read_packed(output)]
    known = {(item["size"], item["number"]) for item in read_packed(output)}
    for size in ("0.5b", "1.5b"):
        for item in read_lines(directory / f"{size}.jsonl"):
            if (size, item["number"]) in known:
                continue
            for each in [*item["answers"], item["greedy"]]:
                logprobs = unpacked(each.pop("logprobs"), np.float16).astype(np.float32)
                margins = unpacked(each.pop("margins"), np.float16).astype(np.float32)
                each["logprob"] = round(float(logprobs.mean()), 4) if len(logprobs) else 0.0
                each["margin"] = round(float(margins.mean()), 3) if len(margins) else 0.0
                each["weakest"] = round(weakest(logprobs), 4)
                del each["ids"]
            lines.append(json.dumps({"size": size, **item}, separators=(",", ":")))
    data = "".join(f"{line}\n" for line in lines).encode()
    output.write_bytes(lzma.compress(data, preset=9))
    say(f"{output}: {len(lines)} problems, {output.stat().st_size / 1e6:.2f} MB")


def read_packed(path: Path) -> list[dict[str, Any]]:
    """Read the problems of a file that `pack` wrote; none if there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in lzma.decompress(path.read_bytes()).splitlines()]


def weakest(logprobs: np.ndarray[Any, Any], window: int = 64) -> float:
    """Return the lowest mean log-probability of any ``window`` consecutive tokens."""
    if not len(logprobs):
        return 0.0
    window = min(window, len(logprobs))
    sums = np.convolve(logprobs, np.ones(window, np.float32), "valid")
    return float(sums.min()) / window


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read the problems of a file; cut off a last line that is not whole."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole, _, rest = data.rpartition(b"\n")
    if rest:
        path.write_bytes(whole + b"\n" if whole else b"")
    for line in whole.splitlines():
        yield json.loads(line)


def _is_right(found: str | None, expected: str) -> bool:
    return found is not None and parse_number(found) == parse_number(expected)


def _packed(values: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(zlib.compress(values.tobytes(), 9)).decode()


def unpacked(text: str, dtype: Any) -> np.ndarray[Any, Any]:
    """Read an array that `_packed` wrote."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype)


if __name__ == "__main__":
    run_main(main)
