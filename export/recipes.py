"""Names the ways to export: what each of them stands for is written here only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .quantize.calibrated import Method

RecipeName = Literal["default", "fast"]


@dataclass(frozen=True)
class NamedRecipe:
    """What an export does where no option says otherwise.

    Attributes:
        method: how INT4 layers are rounded, in the groups of `edge.bundle.schemes.INT4_GROUP_SIZE`.
        measures: whether what the quantization cost is measured at the end.
        loss: what is known of its loss, for who gets it unmeasured.
    """

    method: Method
    measures: bool
    loss: str = ""


RECIPES: dict[RecipeName, NamedRecipe] = {
    "default": NamedRecipe("awq+gptq", measures=True),
    # Of what needs no calibration, groups of 32 lose least, and measuring takes as long again. The
    # figures are of "The 1.5B on four texts" in docs/quantization.md and of SmolLM2 in
    # docs/quantization-measured.md.
    "fast": NamedRecipe(
        "rtn",
        measures=False,
        loss="rounded to nearest, which loses about what llama.cpp's Q4_0 does: twice the default "
        "at 1.5B (KL 0.042 against 0.021), five times at 135M (0.29 against 0.06)",
    ),
}
"""What each name of a recipe stands for; docs/quantization.md has what they cost and lose."""
