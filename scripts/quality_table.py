"""Tables of what scripts/quality has measured and recorded.

usage: python -m scripts.quality_table        (writes them into docs/quantization-measured.md)
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from scripts.quality_score import OWN_ANSWERS, TEXTS

RECORDS = Path("docs/measured")
PAGE = Path("docs/quantization-measured.md")
BEGIN = "<!-- Made of docs/measured by python -m scripts.quality_table; edits are lost. -->"
END = "<!-- The end of what is made. -->"
_FIGURES = ("kl_mean", "kl_p99", "perplexity_ratio", "top1_agreement", "tokens")
_COSTS = ("commit", "recipe", "cpu_s", "peak_bytes")
_BITS = ("bits_per_weight", "bits_per_weight_with_lm_head")
_HALF = 5  # of the texts: those of more usual kinds come first


def main() -> None:
    PAGE.write_text(page(PAGE.read_text("utf-8"), records()), encoding="utf-8")


def records() -> list[dict[str, Any]]:
    """All that was recorded: a model first, and then the same off its grid."""
    paths = sorted(RECORDS.glob("*.json"), key=lambda path: path.stem)
    return [json.loads(path.read_text("utf-8")) for path in paths]


def page(text: str, found: Sequence[dict[str, Any]]) -> str:
    """The page with its tables made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables(found)}\n\n{END}{after}"


def collect(work: Path, name: str, order: Sequence[str]) -> dict[str, Any]:
    """What is in a work directory of scripts/quality, as it is recorded.

    Args:
        work: a directory for each recipe, with ``export.json`` and a file of figures for each text.
        name: of the model.
        order: names of rows; others come after them by name.
    """
    known = {each: number for number, each in enumerate(order)}
    places = [path.parent for path in work.glob("*/export.json")]
    rows = []
    for place in sorted(places, key=lambda path: (known.get(path.name, len(known)), path.name)):
        cost = json.loads((place / "export.json").read_text())
        read = {text: _read(place, text) for text in (*TEXTS, OWN_ANSWERS)}
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
    """Write what was collected to the folder of records."""
    RECORDS.mkdir(exist_ok=True)
    path = RECORDS / f"{found['model']}.json"
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def tables(found: Sequence[dict[str, Any]]) -> str:
    """Two tables for each model, as Markdown; a row without all ten texts is left out."""
    return "\n\n".join(_of_model(one) for one in found)


def _of_model(found: dict[str, Any]) -> str:
    rows = [row for row in found["rows"] if set(TEXTS) <= set(row["texts"])]
    if not rows:
        return f"{found['model']}: no row has all texts yet"
    title = f"**{found['model']}**"
    if about := found.get("off_grid"):
        title += (
            f", merged with an adapter of rank 64 ({about['steps']} steps of training, loss of "
            f"held-out texts {about['loss_before']:.2f} before, {about['loss_after']:.2f} after), "
            f"which moves weights by {about['moved_steps']:.2f} steps of the grid that they were "
            "stored on"
        )
    served = any(_is_served(row) for row in rows)
    heads = ["Format", "Bits per weight (with lm_head)", "CPU minutes", "KL, ten texts"]
    heads += ["KL, first five", "KL, last five", "KL, own answers", "KL, p99", "Top-1, %"]
    heads += ["Perplexity over float's", *(["KL, as the CPU serves it"] if served else [])]
    lines = [
        f"{title}: means over the ten texts, and over the first and the last five of them.",
        "",
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
    ]
    first, last = list(TEXTS)[:_HALF], list(TEXTS)[_HALF:]
    for row in rows:
        texts = row["texts"]

        def mean(key: str, names: Sequence[str] = tuple(TEXTS), texts: Any = texts) -> float:
            return fmean(texts[name][key] for name in names)

        own = texts.get(OWN_ANSWERS)
        ratio = math.exp(fmean(math.log(texts[name]["perplexity_ratio"]) for name in TEXTS))
        cells = [
            f"`{row['name']}`",
            f"{row['bits_per_weight']:.2f} ({row['bits_per_weight_with_lm_head']:.2f})",
            f"{row['cpu_s'] / 60:.1f}",
            f"{mean('kl_mean'):.4f}",
            f"{mean('kl_mean', first):.4f}",
            f"{mean('kl_mean', last):.4f}",
            f"{own['kl_mean']:.4f}" if own else "",
            f"{mean('kl_p99'):.2f}",
            f"{100 * mean('top1_agreement'):.1f}",
            f"{ratio:.3f}",
        ]
        if served:
            cells.append(f"{mean('kl_served'):.4f}" if _is_served(row) else "")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"| KL by text | {' | '.join(TEXTS)} |", "|" + "---|" * (1 + len(TEXTS))]
    for row in rows:
        values = " | ".join(f"{row['texts'][name]['kl_mean']:.4f}" for name in TEXTS)
        lines.append(f"| `{row['name']}` | {values} |")
    return "\n".join(lines)


def _is_served(row: dict[str, Any]) -> bool:
    return all("kl_served" in row["texts"][name] for name in TEXTS)


if __name__ == "__main__":
    main()
