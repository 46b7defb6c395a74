"""Lists where a thought can be ended, by family of models, and how the answer then begins."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """How models of one kind think.

    Attributes:
        turns: words with which a thought changes direction; it can be ended before each.
        close: text that ends the thought and begins the answer, which a closing brace ends.
    """

    turns: tuple[str, ...]
    close: str


BLANK_LINE = "\n\n"
"""Ends a paragraph; a thought of any family can be ended there."""

_TURNS = (
    "Wait",
    "Alternatively",
    "Hmm",
    "But let me",
    "Let me double",
    "\u7b49\u7b49",  # wait
    "\u7b49\u4e00\u4e0b",  # wait a moment
    "\u6216\u8005",  # or
    "\u53e6\u4e00\u79cd",  # another way
    "\u518d\u68c0\u67e5",  # check again
)
THINKING = Family(_TURNS, "\n</think>\n\n**Final Answer**\n\\boxed{")
"""Describes models that think between tags, as R1 does."""
PLAIN = Family(_TURNS, "\n\nThe final answer is \\boxed{")
"""Describes models that think in the answer itself."""
