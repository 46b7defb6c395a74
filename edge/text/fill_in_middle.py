"""Fill-in-the-middle: the tokens that ask a code model for what stands between two texts.

Each family has three control tokens of its own. All of them put the text before the gap first, then
the text after it, then the mark after which the model writes the middle.
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
        before: comes before the text in front of the gap.
        after: comes before the text behind the gap.
        middle: the model goes on from here.
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
        """Return the ids of a prompt that asks for what stands between two texts.

        Control tokens in the texts stay text. Either text may be empty.

        Args:
            tokenizer: the tokenizer that the ids are of.
            prefix: the text in front of the gap.
            suffix: the text behind it.
            on_piece: see `Tokenizer.encode`.

        Raises:
            RequestError: see `Tokenizer.encode`.
        """
        ids = [self.before, *tokenizer.encode(prefix, on_piece=on_piece)]
        ids += [self.after, *tokenizer.encode(suffix, goes_on=True, on_piece=on_piece)]
        ids.append(self.middle)
        if tokenizer.tokens.add_bos and tokenizer.tokens.bos is not None:
            ids.insert(0, tokenizer.tokens.bos)
        return ids


@dataclass(frozen=True)
class _Family:
    """Texts of the tokens of one family; ``ends`` are used as far as they exist."""

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

    They say that its vocabulary was made for that, not that the model was trained on it.

    Raises:
        RequestError: the vocabulary has none.
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
