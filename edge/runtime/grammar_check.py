"""Compiles one untrusted grammar in a process of its own, which the caller can end.

Some small grammars take llguidance minutes and gigabytes whatever its own limits say (a
``multipleOf`` of a million, many patterns joined by ``allOf``), and its threads cannot be stopped.
This file runs as a script, so it imports nothing of the package. Standard input is JSON: ``path``
(``sys.path``), ``grammar``, ``control_tokens``, ``cpu_s`` and ``memory_bytes``. Standard output is
what is wrong with the grammar, empty if nothing is.

The compiler's work does not depend on the vocabulary, so single bytes and the control tokens, whose
names a grammar may use, replace it here.
"""

from __future__ import annotations

import json
import os
import resource
import sys


class _Bytes:
    """A tokenizer of single bytes, as `llguidance.TokenizerWrapper` wants it."""

    def __init__(self, control_tokens: list[str]) -> None:
        # No UTF-8 text has the byte 0xff.
        self.tokens = [bytes([value]) for value in range(255)]
        self.tokens += [name.encode() for name in ["<|end|>", *control_tokens]]
        self.special_token_ids = list(range(255, len(self.tokens)))
        self.eos_token_id = 255
        self.bos_token_id = None

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def main() -> None:
    """Check the grammar that standard input describes."""
    task = json.load(sys.stdin)
    sys.path[:] = task["path"]
    os.nice(10)  # the engine decodes for others meanwhile
    resource.setrlimit(resource.RLIMIT_CPU, (task["cpu_s"], task["cpu_s"]))
    resource.setrlimit(resource.RLIMIT_AS, (task["memory_bytes"], task["memory_bytes"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

    tokenizer = LLTokenizer(TokenizerWrapper(_Bytes(task["control_tokens"])), slices=[])
    limits = LLParserLimits(verbose_errors=False)
    matcher = LLMatcher(tokenizer, task["grammar"], log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    sys.stdout.write(matcher.get_error())


if __name__ == "__main__":
    main()
