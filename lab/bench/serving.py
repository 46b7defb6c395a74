"""Benchmark many requests at once on one bundle; prints one JSON line.

usage: bench_serving.py BUNDLE [--streams 1,2,4,8] [--tokens 128] [--num-threads 2] [--backend auto]

It measures, each with greedy answers of a fixed length:

- streams: 1, 2, 4, 8 answers at once: tokens/s, TTFT, inter-token latency P50 and P99;
- mixed: two streams that decode while long prompts come: the gaps between their tokens, and how
  long the prompts took;
- prefix: 50 questions after one 400-token system prompt, and a chat of many turns: the share of
  prompt tokens that was not computed again, and whether the answers are those without reuse;
- batch: how many answers change when they run together instead of alone;
- speculation: text that repeats itself and text that does not, with drafts and without.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from edge import LLM, SamplingParams, __version__
from edge.runtime.stream import Generation, GenerationResult
from tools.command import say

SYSTEM_TOKENS = 400
NUM_QUESTIONS = 50
NUM_TURNS = 8
LONG_PROMPT = 700
PROSE = (
    "The harbour town woke slowly. Fishermen mended nets while gulls quarrelled over scraps, and "
    "the baker carried warm loaves across the square. By noon a hard wind had come up from the "
    "west, and the boats that were still out turned for home, one after another, low in the water. "
)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        "python3 -m lab bench-serving", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--streams", default="1,2,4,8", help="numbers of streams")
    parser.add_argument("--tokens", type=int, default=128, help="tokens per answer")
    parser.add_argument("--kv-capacity", type=int, default=1024)
    parser.add_argument("--num-threads", type=int)
    parser.add_argument("--backend", default="auto")
    parser.add_argument(
        "--only", default="streams,mixed,prefix,batch,speculation", help="parts to measure"
    )
    options = parser.parse_args()
    counts = [int(count) for count in options.streams.split(",")]
    parts = {
        "streams": lambda: streams(options, counts),
        "mixed": lambda: mixed(options),
        "prefix": lambda: prefix(options),
        "batch": lambda: batch(options, max(counts)),
        "speculation": lambda: speculation(options),
    }
    result: dict[str, Any] = {
        "bundle": options.bundle.name,
        "edge_llm": __version__,
        "cores": os.cpu_count(),
    }
    for name in options.only.split(","):
        say(name)
        result[name] = parts[name]()
    result["loadavg"] = round(os.getloadavg()[0], 2)
    print(json.dumps(result))


def open_llm(options: argparse.Namespace, **more: Any) -> LLM:
    """Open the bundle with the options of the command line and of a part."""
    return LLM(
        options.bundle,
        backend=options.backend,
        kv_capacity=options.kv_capacity,
        num_threads=options.num_threads,
        **more,
    )


def greedy(num_tokens: int) -> SamplingParams:
    """Return the parameters of an answer of exactly this many tokens."""
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)


def prompts(llm: LLM, count: int, num_tokens: int) -> list[list[int]]:
    """Make prompts of prose that share only the beginning of every prompt."""
    every = []
    for index in range(count):
        ids = llm.encode(f"Part {index * 7919}. " + PROSE * (num_tokens // 50 + 1))
        every.append(ids[:num_tokens])
    return every


def finish(generations: Sequence[Generation]) -> list[GenerationResult]:
    """Wait for all answers."""
    return [generation.result() for generation in generations]


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return median and 99th percentile in milliseconds."""
    p50, p99 = np.percentile(seconds, [50, 99]) * 1e3
    return {"p50_ms": round(float(p50), 2), "p99_ms": round(float(p99), 2)}


def streams(options: argparse.Namespace, counts: list[int]) -> dict[str, Any]:
    """Measure throughput and latency by the number of answers at once."""
    result: dict[str, Any] = {}
    with open_llm(options, num_slots=max(counts), reuse_prefix=False) as llm:
        finish(llm.submit("warm up", greedy(8), n=max(counts)))
        for count in counts:
            batch = prompts(llm, count, 32)
            started = time.perf_counter()
            done = finish([llm.submit(ids, greedy(options.tokens)) for ids in batch])
            seconds = time.perf_counter() - started
            gaps = [gap for each in done for gap in each.stats.itl_s]
            # While all decode: after the last first token.
            steady = [gap for each in done for gap in each.stats.itl_s[-options.tokens // 2 :]]
            result[str(count)] = {
                "tokens_per_s": round(count * options.tokens / seconds, 2),
                "decode_tokens_per_s": round(count / float(np.mean(steady)), 2),
                "ttft_ms": round(median(each.stats.ttft_s for each in done) * 1e3, 1),
                "itl": percentiles(gaps),
                "own_ms_per_token": round(
                    sum(each.stats.own_s for each in done) / count / options.tokens * 1e3, 3
                ),
            }
    return result


def mixed(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the gaps between tokens of running streams, with long prompts coming and without."""
    result: dict[str, Any] = {}
    with open_llm(options, num_slots=4, reuse_prefix=False) as llm:
        finish(llm.submit(prompts(llm, 1, 256)[0], greedy(8), n=2))
        size = min(LONG_PROMPT, options.kv_capacity // 2)
        (alone,) = finish([llm.submit(prompts(llm, 1, size)[0], greedy(1))])
        result["long_prompt_alone_ttft_ms"] = round(alone.stats.ttft_s * 1e3)
        num_tokens = 3 * options.tokens
        for name, num_long in (("without", 0), ("with", 2)):
            short = [llm.submit(ids, greedy(num_tokens)) for ids in prompts(llm, 2, 32)]
            long: list[GenerationResult] = []

            def send(count: int = num_long, to: list[GenerationResult] = long) -> None:
                for ids in prompts(llm, count, size):
                    time.sleep(alone.stats.ttft_s / 2)
                    to += finish([llm.submit(ids, greedy(1))])

            sender = threading.Thread(target=send)
            sender.start()
            done = finish(short)
            sender.join()
            gaps = [gap for each in done for gap in each.stats.itl_s[4:]]
            figures: dict[str, Any] = {"itl": percentiles(gaps)}
            figures["p99_to_p50"] = round(figures["itl"]["p99_ms"] / figures["itl"]["p50_ms"], 2)
            if long:
                figures["long_ttft_ms"] = round(median(e.stats.ttft_s for e in long) * 1e3)
            result[name] = figures
    return result


def prefix(options: argparse.Namespace) -> dict[str, Any]:
    """Count the prompt tokens that a shared system prompt and a chat's turns save."""
    found: dict[bool, Any] = {}
    for reuse in (False, True):
        with open_llm(options, num_slots=4, reuse_prefix=reuse) as llm:
            (system,) = prompts(llm, 1, SYSTEM_TOKENS)
            questions = [
                [*system, *llm.encode(f"\nWhat is {i} plus {i + 3}?")] for i in range(NUM_QUESTIONS)
            ]
            done = finish([llm.submit(ids, greedy(4)) for ids in questions])
            stats = llm.scheduler.stats()
            shared = stats.cached_tokens / stats.prompt_tokens
            ttft_ms = 1e3 * median(each.stats.ttft_s - each.stats.queue_s for each in done)
            turns: list[int] = []
            answers = [[token.id for token in each.tokens] for each in done]
            for turn in range(NUM_TURNS):
                turns += llm.encode(f"\nTell me more about the harbour, part {turn}.")
                answer = [t.id for t in llm.generate(turns, greedy(16)).tokens]
                answers.append(answer)
                turns += answer
            after = llm.scheduler.stats()
            chat = (after.cached_tokens - stats.cached_tokens) / (
                after.prompt_tokens - stats.prompt_tokens
            )
            found[reuse] = shared, ttft_ms, chat, answers
    changed = sum(a != b for a, b in zip(found[False][3], found[True][3], strict=True))
    return {
        "shared_prefix_saved": round(found[True][0], 3),
        "shared_prefix_ttft_ms": [round(found[reuse][1], 1) for reuse in (False, True)],
        "chat_saved": round(found[True][2], 3),
        "answers_changed": f"{changed} of {len(found[True][3])}",
    }


def batch(options: argparse.Namespace, count: int) -> dict[str, Any]:
    """Count how often an answer depends on what else runs, by the last bits of its logits."""
    with open_llm(options, num_slots=count, reuse_prefix=False) as llm:
        every = prompts(llm, 4 * count, 48)
        params = [greedy(options.tokens)] * len(every)
        seeded = SamplingParams(
            temperature=0.7, top_p=0.9, seed=1, max_tokens=options.tokens, ignore_eos=True
        )
        params[len(every) // 2 :] = [seeded] * (len(every) - len(every) // 2)
        pairs = list(zip(every, params, strict=True))
        alone = [llm.generate(ids, each).tokens for ids, each in pairs]
        again = [llm.generate(ids, each).tokens for ids, each in pairs]
        together = finish([llm.submit(ids, each) for ids, each in pairs])
        firsts = [
            next((at for at, (x, y) in enumerate(zip(a, b.tokens, strict=True)) if x != y), None)
            for a, b in zip(alone, together, strict=True)
        ]
        different = [at for at in firsts if at is not None]
        half = len(every) // 2
        return {
            "answers": len(every),
            "alone_twice_differ": sum(a != b for a, b in zip(alone, again, strict=True)),
            "greedy_changed": sum(at is not None for at in firsts[:half]),
            "sampled_changed": sum(at is not None for at in firsts[half:]),
            "tokens_before_the_change": different,
        }


def speculation(options: argparse.Namespace) -> dict[str, Any]:
    """Measure decode with drafts against decode without, where they are right and where not."""
    result: dict[str, Any] = {}
    times: dict[tuple[str, int], float] = {}
    answers: dict[tuple[str, int], Any] = {}
    # A bias steers the answer, so it holds for any model: the answer repeats, or never does.
    rng = np.random.default_rng(0)
    llms = [open_llm(options, num_slots=1, speculative=drafts) for drafts in (0, 8)]
    try:
        vocab_size = llms[0].manifest.model.vocab_size
        some = rng.integers(100, vocab_size - 100, 3).tolist()
        few = SamplingParams(
            temperature=0,
            logit_bias=dict.fromkeys(some, 100.0),
            max_tokens=4 * options.tokens,
            ignore_eos=True,
        )
        free = SamplingParams(
            temperature=1.5, top_p=1.0, seed=3, max_tokens=4 * options.tokens, ignore_eos=True
        )
        for _ in range(3):
            for name, params in (("repeats", few), ("varied", free)):
                for llm, drafts in zip(llms, (0, 8), strict=True):
                    done = llm.generate(prompts(llm, 1, 64)[0], params)
                    key = name, drafts
                    times[key] = min(times.get(key, np.inf), done.stats.tpot_s)
                    answers[key] = done.tokens
        for name in ("repeats", "varied"):
            result[name] = {
                "tpot_ms": [round(times[name, drafts] * 1e3, 2) for drafts in (0, 8)],
                "speedup": round(times[name, 0] / times[name, 8], 2),
                "same_answer": answers[name, 0] == answers[name, 8],
            }
        stats = llms[1].scheduler.stats()
        result["accepted"] = f"{stats.accepted_tokens} of {stats.drafted_tokens}"
    finally:
        for llm in llms:
            llm.close()
    return result


if __name__ == "__main__":
    main()
