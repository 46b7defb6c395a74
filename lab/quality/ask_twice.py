"""Ask each prompt of the golden set twice, and name those whose answers differ.

    python3 -m lab ask-twice BUNDLE --deterministic
    python3 -m lab ask-twice --server http://127.0.0.1:8000

Both times the temperature is 0. The second time most of the prompt's rows come from the cache,
which should change nothing. The exit status is 1 if an answer differs, and that of `edge-llm` if
the script cannot ask.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from edge.engine_config import EngineConfig
from edge.runtime.llm import LLM
from edge_lab.measure.defaults import GOLDEN_SET
from edge_lab.measure.watch import Answerer, BundleAnswerer, GoldenItem, read_golden
from edge_lab.measure.watch_server import ServerAnswerer
from tools.command import run_main

TOKENS = 32


def find_differing(
    answerer: Answerer, items: Sequence[GoldenItem], max_tokens: int = TOKENS
) -> list[str]:
    """Return the ids of items that are answered differently when they are asked again at once.

    Raises:
        EdgeError: the answerer could not answer.
    """

    def ask(item: GoldenItem) -> tuple[str, str]:
        answer = answerer.answer(item.prompt, max_tokens)
        return answer.reasoning, answer.text

    return [item.id for item in items if ask(item) != ask(item)]


def main() -> None:
    """Ask, and print the ids that differ."""
    parser = argparse.ArgumentParser(
        "python3 -m lab ask-twice", description=__doc__.splitlines()[0]
    )
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("bundle", nargs="?", type=Path)
    asked.add_argument("--server", metavar="URL", help="a running server")
    parser.add_argument("--deterministic", action="store_true", help="open the bundle so")
    parser.add_argument("--max-tokens", type=int, default=TOKENS, help="of each answer")
    options = parser.parse_args()
    if options.server and options.deterministic:
        parser.error("--deterministic is an option of the server: start it so")
    items, _ = read_golden(GOLDEN_SET)
    if options.server:
        found = find_differing(ServerAnswerer(options.server), items, options.max_tokens)
    else:
        with LLM(options.bundle, EngineConfig(deterministic=options.deterministic)) as llm:
            found = find_differing(BundleAnswerer(llm), items, options.max_tokens)
    print(f"{len(found)} of {len(items)} answers differ when asked again: {', '.join(found)}")
    if found:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
