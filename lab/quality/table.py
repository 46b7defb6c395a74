"""Writes the tables of what python3 -m lab quality has measured and recorded.

usage: python3 -m lab quality-table        (writes them into docs/measured.md)
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from .score import FORMER_TEXTS, OWN_ANSWERS, TEXTS

RECORDS = Path("docs/measured")
PAGE = Path("docs/measured.md")
BEGIN = "<!-- Made of docs/measured by python3 -m lab quality-table; edits are lost. -->"
END = "<!-- The end of what is made. -->"
_FIGURES = ("kl_mean", "kl_p99", "perplexity_ratio", "top1_agreement", "tokens")
_COSTS = ("commit", "recipe", "cpu_s", "peak_bytes")
_BITS = ("bits_per_weight", "bits_per_weight_with_lm_head")
_HALF = 5  # number of texts whose kinds calibration knows; they come first


def main() -> None:
    PAGE.write_text(page(PAGE.read_text("utf-8"), records()), encoding="utf-8")


def records() -> list[dict[str, Any]]:
    """Return all records: a model first, and then the same model off its grid."""
    paths = sorted(RECORDS.glob("*.json"), key=lambda path: path.stem)
    found = [json.loads(path.read_text("utf-8")) for path in paths]
    # Files of other scripts have other rows.
    return [
        each for each in found if all("bits_per_weight" in row for row in each.get("rows", [{}]))
    ]


def page(text: str, found: Sequence[dict[str, Any]]) -> str:
    """Return the page with its tables made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables(found)}\n\n{END}{after}"


def collect(work: Path, name: str, order: Sequence[str]) -> dict[str, Any]:
    """Collect the figures in a work directory of python3 -m lab quality, as they are recorded.

    Args:
        work: a directory for each recipe, with ``export.json`` and a file of figures for each text.
        name: name of the model.
        order: names of rows; others come after them by name.
    """
    known = {each: number for number, each in enumerate(order)}
    places = [path.parent for path in work.glob("*/export.json")]
    rows = []
    for place in sorted(places, key=lambda path: (known.get(path.name, len(known)), path.name)):
        cost = json.loads((place / "export.json").read_text())
        read = {text: _read(place, text) for text in (*TEXTS, *FORMER_TEXTS, OWN_ANSWERS)}
        read = {text: figures for text, figures in read.items() if figures}
        if not read:
            continue
        one = next(iter(read.values()))
        row = {"name": place.name, **{key: cost[key] for key in _COSTS}}
        row |= {key: _rounded(cost.get(key, one[key])) for key in _BITS}
        if "types" in cost:
            row["types"] = cost["types"]
        row["texts"] = {
            text: {key: _rounded(figures[key]) for key in _FIGURES}
            | ({"kl_served": _rounded(served["kl_mean"])} if served else {})
            for text, figures in read.items()
            for served in [_read(place, f"served-{text}")]
        }
        row["cpu_s"], row["peak_bytes"] = round(row["cpu_s"]), round(row["peak_bytes"])
        rows.append(row)
    result: dict[str, Any] = {"model": name}
    if about := _read(work, "off-grid"):
        result["off_grid"] = about
    return {**result, "rows": rows}


def _read(place: Path, name: str) -> dict[str, Any]:
    path = place / f"{name}.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def record(found: dict[str, Any]) -> Path:
    """Write the collected figures to the folder of records."""
    RECORDS.mkdir(exist_ok=True)
    path = RECORDS / f"{found['model']}.json"
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def tables(found: Sequence[dict[str, Any]]) -> str:
    """Return a table for each model, as Markdown; the KL of each text is in the records alone.

    A mean over texts is an empty cell if the row lacks one of them, and a column of empty cells is
    left out.
    """
    return "\n\n".join(_of_model(one) for one in found)


def _of_model(found: dict[str, Any]) -> str:
    rows = found["rows"]
    if not rows:
        return f"{found['model']}: nothing is measured yet"
    title = f"**{found['model']}**"
    if about := found.get("off_grid"):
        title += (
            f", merged with an adapter of rank 64: {about['steps']} steps of training moved its "
            f"weights by {about['moved_steps']:.2f} steps of the grid (held-out loss "
            f"{about['loss_before']:.2f} before, {about['loss_after']:.2f} after)"
        )
    return "\n".join([f"{title}:", "", *_markdown([_summary(row) for row in rows])])


def _summary(row: dict[str, Any]) -> dict[str, str]:
    ten = list(TEXTS)
    ratio = ""
    if set(ten) <= set(row["texts"]):
        logs = [math.log(row["texts"][name]["perplexity_ratio"]) for name in ten]
        ratio = f"{math.exp(fmean(logs)):.3f}"
    return {
        "Format": f"`{row['name']}`",
        "Bits per weight (with lm_head)": (
            f"{row['bits_per_weight']:.2f} ({row['bits_per_weight_with_lm_head']:.2f})"
        ),
        "CPU minutes": f"{row['cpu_s'] / 60:.1f}",
        "KL, ten texts": _mean(row, "kl_mean", ten),
        "KL, five known kinds": _mean(row, "kl_mean", ten[:_HALF]),
        "KL, five unknown kinds": _mean(row, "kl_mean", ten[_HALF:]),
        "KL, former five": _mean(row, "kl_mean", list(FORMER_TEXTS)),
        "KL, own answers": _mean(row, "kl_mean", [OWN_ANSWERS]),
        "KL, p99": _mean(row, "kl_p99", ten, ".2f"),
        "Top-1, %": _mean(row, "top1_agreement", ten, ".1f", 100),
        "Perplexity over float's": ratio,
        "KL, as the CPU serves it": _mean(row, "kl_served", ten),
    }


def _mean(
    row: dict[str, Any], key: str, names: Sequence[str], form: str = ".4f", factor: float = 1
) -> str:
    """Return the mean of a figure over texts; empty if the row lacks it for one of them."""
    figures = [row["texts"].get(name, {}).get(key) for name in names]
    return "" if None in figures else format(factor * fmean(figures), form)


def _markdown(rows: Sequence[dict[str, str]]) -> list[str]:
    heads = [head for head in rows[0] if any(row[head] for row in rows)]
    lines = [heads, *([row[head] for head in heads] for row in rows)]
    first, *rest = (f"| {' | '.join(line)} |" for line in lines)
    return [first, "|" + "---|" * len(heads), *rest]


if __name__ == "__main__":
    main()
