"""Defines the named recipes of an export; no other module says what a name stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .quantize.calibrated import Method
from .sources.documents import BUILT_IN_TOKENS

RecipeName = Literal["default", "fast", "best"]


@dataclass(frozen=True)
class NamedRecipe:
    """Defaults of an export where no option says otherwise.

    Attributes:
        method: how INT4 layers are rounded, in the groups of `edge.bundle.schemes.INT4_GROUP_SIZE`.
        calibration_tokens: most tokens to calibrate INT4 layers with.
        measures: whether the loss by quantization is measured at the end.
        loss: known loss, for a user whose bundle is not measured.
    """

    method: Method
    calibration_tokens: int
    measures: bool
    loss: str = ""


RECIPES: dict[RecipeName, NamedRecipe] = {
    # The knee of loss over time in docs/measured.md.
    "default": NamedRecipe("awq+gptq", calibration_tokens=8192, measures=True),
    "best": NamedRecipe("awq+gptq", calibration_tokens=BUILT_IN_TOKENS, measures=True),
    # Without calibration, groups of 32 lose least; measuring would take as long again. The figures
    # are from "Measured: 1.5B" in docs/quantization.md and of SmolLM2 from
    # docs/measured.md.
    "fast": NamedRecipe(
        "rtn",
        calibration_tokens=0,
        measures=False,
        loss="rounded to nearest, which loses about what llama.cpp's Q4_0 does: at 1.5B twice what "
        "--best did (KL 0.042 against 0.021), at 135M 3.6 times the default (0.36 against 0.10)",
    ),
}
"""Recipes by name; docs/quantization.md compares their costs and losses."""
