"""Computes the table of recipes and TensorRT versions in docs/support-matrix.md by checking.

Each recipe is exported from a tiny model, and its graph is checked by `engines.rules` for every
version. A model's size changes nothing that a rule sees.

::

    python3 -m tools support-matrix           # writes the table into the page
    python3 -m tools support-matrix --check   # says whether the page is up to date
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge.bundle.schemes import SCHEMES
from edge.errors import ConfigError
from engines.rules.bundle import check_bundle_rules
from engines.rules.check import Verdict
from engines.rules.table import VERSIONS
from export.pipeline import ExportConfig, export_checkpoint
from tests.export.quantize.loud_checkpoint import loud_by_token, write_loud_checkpoint

PAGE = Path(__file__).parents[2] / "docs" / "support-matrix.md"
BEGIN = "<!-- Written by tools/pages/support_matrix.py -->"
END = "<!-- End of what tools/pages/support_matrix.py writes -->"
# Neither rounding nor calibration changes what a rule sees, except for the inputs of down: in every
# real model they are rotated and have a range per token, so they are here.
_QUICK: dict[str, Any] = {"method": "rtn", "clip": "absmax"}
_W8A8: dict[str, Any] = {"quant": "int8-w8a8", "clip": "absmax", "calibration_tokens": 512}


@dataclass(frozen=True)
class Recipe:
    """A recipe as the options of ``edge-llm export``, and the same for `ExportConfig`."""

    options: str
    config: dict[str, Any]


RECIPES: tuple[Recipe, ...] = (
    Recipe("--quant fp16", {"quant": "fp16"}),
    Recipe("--quant bf16", {"quant": "bf16"}),
    Recipe("--quant int8", {"quant": "int8", "clip": "absmax"}),
    Recipe("--quant int8-w8a8", _W8A8),
    Recipe("--quant int8-w8a8 --keep '*=w8a8'", {**_W8A8, "keep": (("*", "w8a8"),)}),
    Recipe("--quant int4", {"quant": "int4", **_QUICK}),
    Recipe(
        "--quant int4 --keep lm_head=int4",
        {"quant": "int4", "keep": (("lm_head", "int4"),), **_QUICK},
    ),
    Recipe(
        "--quant int4 --keep lm_head=float",
        {"quant": "int4", "keep": (("lm_head", "float"),), **_QUICK},
    ),
)
GRAPHS: tuple[Recipe, ...] = (
    Recipe("--dialect native", {"dialect": "native"}),
    Recipe("--target jetpack7", {"target": "jetpack7"}),
    Recipe("--dialect portable", {"dialect": "portable"}),
)
"""Ways to write a graph; ``jetpack7`` differs from ``native`` only if inputs are INT8."""


def checked(root: Path) -> Iterator[tuple[Recipe, Recipe, list[Verdict] | None]]:
    """Export every recipe in every way and check it; None if the target refuses the recipe.

    Args:
        root: an empty directory for the bundles.
    """
    source = write_loud_checkpoint(root / "model", "qwen2", layers=(0, 1))
    for number, recipe in enumerate(RECIPES):
        for graph in GRAPHS:
            if "target" in graph.config and not _rounds_inputs(recipe):
                continue
            output = root / f"{number}{graph.options}"
            config = ExportConfig(
                source=str(source), output=output, kv_capacity=64, **recipe.config, **graph.config
            )
            try:
                with loud_by_token():
                    export_checkpoint(config)
            except ConfigError:
                if config.target is None:
                    raise
                yield recipe, graph, None
            else:
                yield recipe, graph, check_bundle_rules(output, list(VERSIONS))


def _rounds_inputs(recipe: Recipe) -> bool:
    return any(name in recipe.options and facts.int8_inputs for name, facts in SCHEMES.items())


def table(root: Path) -> str:
    """Return the table in Markdown; recipes of equal verdicts share a row."""
    grouped: dict[tuple[str, ...], list[str]] = {}
    for recipe, graph, verdicts in checked(root):
        told = ["not written"] * len(VERSIONS) if verdicts is None else map(cell, verdicts)
        grouped.setdefault((graph.options, *told), []).append(f"`{recipe.options}`")
    header = ["Graph", "Recipes", *(version.name for version in VERSIONS)]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for (options, *cells), recipes in sorted(grouped.items()):
        lines.append(f"| `{options}` | {', '.join(recipes)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(verdict: Verdict) -> str:
    """Return the table's cell for one graph and one version."""
    if not verdict.legal:
        return f"no: {', '.join(finding.rule for finding in verdict.refusals)}"
    warnings = [finding.rule for finding in verdict.findings]
    return f"yes; {', '.join(warnings)}" if warnings else "yes"


def with_table(page: str, text: str) -> str:
    """Return the page with another table between the two marks.

    Raises:
        ValueError: a mark is missing.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE} lacks the line {BEGIN!r} or {END!r}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main() -> int:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(
        "python3 -m tools support-matrix", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if out of date")
    check = parser.parse_args().check
    page = PAGE.read_text("utf-8")
    with tempfile.TemporaryDirectory() as root:
        wanted = with_table(page, table(Path(root)))
    if wanted == page:
        print(f"{PAGE.name} is up to date")
        return 0
    if check:
        print(f"{PAGE.name} is out of date: run python3 -m tools support-matrix", file=sys.stderr)
        return 1
    PAGE.write_text(wanted, "utf-8")
    print(f"{PAGE.name} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
