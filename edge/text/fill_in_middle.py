"""Encodes fill-in-the-middle prompts: they ask a code model for the text between two texts.

Each family has three control tokens for it. All families put the text before the gap first, then
the text after it, then the token after which the model writes the middle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edge.errors import RequestError

from .tokenizer import Tokenizer


@dataclass(frozen=True)
class FillInMiddle:
    """Token ids that frame the two texts.

    Attributes:
        before: id before the text that precedes the gap.
        after: id before the text that follows the gap.
        middle: id after which the model writes the middle.
        ends: ids that end the middle, besides the model's own end tokens.
    """

    before: int
    after: int
    middle: int
    ends: frozenset[int]

    def encode(
        self,
        tokenizer: Tokenizer,
        prefix: str,
        suffix: str,
        on_piece: Callable[[], None] | None = None,
    ) -> list[int]:
        """Return the ids of a prompt that asks for the text between two texts.

        Control tokens in the texts stay text. Either text may be empty.

        Args:
            tokenizer: the tokenizer of the ids.
            prefix: the text before the gap.
            suffix: the text after the gap.
            on_piece: called before each piece of a long text, as in `Tokenizer.encode`.

        Raises:
            RequestError: `Tokenizer.encode` refuses a text.
        """
        ids = [self.before, *tokenizer.encode(prefix, on_piece=on_piece)]
        ids += [self.after, *tokenizer.encode(suffix, goes_on=True, on_piece=on_piece)]
        ids.append(self.middle)
        if tokenizer.tokens.add_bos and tokenizer.tokens.bos is not None:
            ids.insert(0, tokenizer.tokens.bos)
        return ids


@dataclass(frozen=True)
class _Family:
    """The texts of one family's tokens; those of ``ends`` that the vocabulary has are used."""

    before: str
    after: str
    middle: str
    ends: tuple[str, ...]


_FAMILIES = (
    # Qwen2.5-Coder (technical report, arXiv:2409.12186) and CodeGemma.
    _Family(
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|fim_middle|>",
        ("<|endoftext|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|file_separator|>"),
    ),
    # StarCoder (arXiv:2305.06161), StarCoder2 and Granite code models.
    _Family(
        "<fim_prefix>",
        "<fim_suffix>",
        "<fim_middle>",
        ("<|endoftext|>", "<fim_pad>", "<repo_name>", "<file_sep>", "<filename>"),
    ),
    # README of deepseek-ai/DeepSeek-Coder, code insertion.
    _Family("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", ("<|EOT|>",)),
    # CodeLlama (arXiv:2308.12950, section 2.3); the space belongs to the token.
    _Family("▁<PRE>", "▁<SUF>", "▁<MID>", ("▁<EOT>",)),
)


def fill_in_middle(tokenizer: Tokenizer) -> FillInMiddle:
    """Find the tokens with which a model fills a gap.

    They show that the vocabulary was made for it, not that the model was trained on it.

    Raises:
        RequestError: the vocabulary has no such tokens.
    """
    known = tokenizer.control_tokens
    for family in _FAMILIES:
        marks = [known.get(text) for text in (family.before, family.after, family.middle)]
        before, after, middle = marks
        if before is None or after is None or middle is None:
            continue
        ends = {before, after, middle, *(known[text] for text in family.ends if text in known)}
        return FillInMiddle(before, after, middle, frozenset(ends))
    names = ", ".join(family.before for family in _FAMILIES)
    raise RequestError(
        "suffix: this model has no tokens to fill a gap with (its vocabulary has none of "
        f"{names}); leave suffix out, or use a code model that has them, such as Qwen2.5-Coder"
    )
