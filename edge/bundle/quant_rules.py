"""Lists the schemes of the layers by the rules of each ``--quant``."""

from __future__ import annotations

from typing import Literal

from .manifest import SchemeKind

Quant = Literal["fp16", "bf16", "int8", "int8-w8a8", "int4"]

# INT4 in the lm_head, one matrix, adds up to two fifths of the loss of all INT4 layers together
# (docs/measured.md). INT8 inputs do not help the lm_head, which runs for only one of a prompt's
# tokens.
RULES: dict[Quant, tuple[tuple[str, SchemeKind], ...]] = {
    "fp16": (("*", "float"),),
    "bf16": (("*", "float"),),
    "int8": (("*", "int8"),),
    "int8-w8a8": (("*", "w8a8"), ("lm_head", "int8")),
    "int4": (("*", "int4"), ("lm_head", "int8")),
}
"""Lists the scheme of layers whose names match a shell wildcard; the last match wins."""


def fold_quant(name: str) -> str:
    """Normalise a precision to a name of `RULES`: ``INT8_W8A8``, ``w8a8`` are ``int8-w8a8``."""
    folded = name.strip().lower().replace("_", "-")
    return {"w8a8": "int8-w8a8", "float16": "fp16", "bfloat16": "bf16"}.get(folded, folded)
