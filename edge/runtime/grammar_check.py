"""Compiles one untrusted grammar, in a limited child of `structured_output`.

Some small grammars take llguidance minutes and gigabytes whatever its own limits say (a
``multipleOf`` of a million, many patterns joined by ``allOf``), and its threads cannot be stopped.

The compiler's work does not depend on the vocabulary. So here the vocabulary is single bytes and
the control tokens, whose names a grammar may use.
"""

from __future__ import annotations

import msgspec


class GrammarTask(msgspec.Struct):
    """A grammar for ``LLMatcher``, and the names of tokens that it may use."""

    grammar: str
    control_tokens: list[str]


class _Bytes:
    """A tokenizer of single bytes, with the methods that `llguidance.TokenizerWrapper` needs."""

    def __init__(self, control_tokens: list[str]) -> None:
        # No UTF-8 text contains the byte 0xff.
        self.tokens = [bytes([value]) for value in range(255)]
        self.tokens += [name.encode() for name in ["<|end|>", *control_tokens]]
        self.special_token_ids = list(range(255, len(self.tokens)))
        self.eos_token_id = 255
        self.bos_token_id = None

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def prepare() -> None:
    """Import the modules that `work` needs."""
    import llguidance  # noqa: F401 - it may be missing where nothing is compiled


def work(data: bytes) -> bytes:
    """Check the grammar of an encoded `GrammarTask`; return the fault in it, or nothing."""
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

    task = msgspec.json.decode(data, type=GrammarTask)
    tokenizer = LLTokenizer(TokenizerWrapper(_Bytes(task.control_tokens)), slices=[])
    limits = LLParserLimits(verbose_errors=False)
    matcher = LLMatcher(tokenizer, task.grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    error: str = matcher.get_error()
    return error.encode()
