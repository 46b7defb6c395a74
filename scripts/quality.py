"""Export a model by every recipe, compare each bundle with the float one, print Markdown tables.

usage: scripts/quality [--model smollm2] [--recipe NAME ...] [--text NAME ...] [--tokens 1536]
                       [--task NAME ...] [--limit 60] [--max-tokens 300]

Each recipe has a directory below ``--work``, with the commit, the seconds and the peak of resident
memory of its export, and the result of ``edge-llm eval`` for each text and task. What is there is
not done again, unless its options were others; delete a recipe's directory to measure it anew.
The bundle is deleted once all is measured (``--keep-bundles`` keeps it).

``--checkpoint LABEL=PATH`` adds a rival's weights of the same model, e.g. a Q4_0 of llama-quantize
or what scripts/genai_weights.py, scripts/openvino_weights and scripts/auto_round_weights write:
dequantized into a float bundle, so only the loss of the weights counts, as with all other rows.
``--rival Q4_0`` makes such a file of the model's linear layers (scripts/gguf_rivals.py).

``--task`` also asks questions with right answers, of the float bundle too, so each recipe's answers
are paired with the float model's; without names it asks all tasks, which takes hours per recipe.

Standard output has the tables of all recipes that are there, asked for this time or before.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from edge_lab.measure.tasks import loss_interval, mcnemar_exact, wilson_interval
from scripts.gguf_rivals import bits_per_weight, requantize
from scripts.real_models import DIRECTORY, MODELS
from scripts.smollm2 import smollm2_gguf

_DATA = Path("edge_lab/measure/data")
# Defaults were chosen by what they lose on these.
DEVELOPMENT_TEXTS = {
    "built-in": _DATA / "eval_text.txt",
    "prose": _DATA / "prose.txt",
    "code": _DATA / "code.txt",
    "Chinese": _DATA / "chinese.txt",
}
# Nothing was chosen by these; quality_texts/README.md has their origins.
TEXTS = {
    name: Path("scripts/quality_texts") / f"{name}.txt"
    for name in (
        *("story", "report-chinese", "chat", "proofs", "javascript"),
        *("german", "law", "tables", "logs", "config"),
    )
}
_ALL_TEXTS = TEXTS | DEVELOPMENT_TEXTS
TOKENS = 1536
"""Of each text, so that each counts as much as any other; none is shorter."""
TASKS = {
    name: _DATA / "tasks" / f"{name}.jsonl"
    for name in ("choices", "chinese", "arithmetic", "programs")
}
_CHOICES = ("choices", "chinese")  # nothing is generated
_INT4 = ("--quant", "int4")
RECIPES: dict[str, tuple[str, ...]] = {
    "int8": ("--quant", "int8"),
    "int8-w8a8": ("--quant", "int8-w8a8"),
    "int8-w8a8-all": ("--quant", "int8-w8a8", "--keep", "lm_head=w8a8"),
    "int4": _INT4,
    **{
        f"int4-{method}-g{size}": (*_INT4, "--method", method, "--group-size", str(size))
        for method in ("rtn", "awq", "gptq", "awq+gptq")
        for size in (32, 64, 128)
    },
    # Bits where they count most for rounding to nearest; about as many as in groups of 32 at 1.5B.
    "int4-qkv-int8": (
        *(*_INT4, "--keep", "*.qkv=int8-g64"),
        *("--keep", "*.gate_up=int4-g64", "--keep", "*.down=int4-g128"),
    ),
    "int4-head-int4": (*_INT4, "--keep", "lm_head=int4"),
    "int4-head-fp16": (*_INT4, "--keep", "lm_head=float"),
}
RIVALS = ("Q4_0", "Q4_1", "Q5_0", "Q8_0")
_REFERENCE, _FLOAT = "fp16", ("--quant", "fp16")


def main() -> None:
    options = parse()
    source = model_file(options)
    work: Path = options.work / options.model
    reference = work / _REFERENCE / "bundle"
    if not reference.is_dir():
        export(str(source), _FLOAT, work / _REFERENCE)
    ask(work / _REFERENCE, reference, options)
    rivals = dict(each.split("=", 1) for each in options.checkpoint)
    jobs = [(name, str(source), RECIPES[name]) for name in options.recipe]
    jobs += [(label, file, _FLOAT) for label, file in rivals.items()]
    for name in options.rival:
        file = work / f"{name}.gguf"
        if not file.exists():
            requantize(source, file, name)
        jobs.append((name, str(file), _FLOAT))
    for name, checkpoint, recipe in jobs:
        measure(work / name, checkpoint, recipe, reference, options)
    print(table(work, options.model))
    if answered := task_table(work, options.model):
        print(f"\n{answered}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", choices=["smollm2", *MODELS])
    parser.add_argument("--models", type=Path, default=DIRECTORY, help="of scripts/real-models")
    parser.add_argument("--recipe", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--text", nargs="*", default=list(TEXTS), choices=list(_ALL_TEXTS))
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each text, at most")
    parser.add_argument("--window", type=int, help="tokens per window, as of edge-llm eval")
    parser.add_argument("--task", nargs="*", default=[], choices=list(TASKS))
    parser.add_argument("--limit", type=int, help="questions of each task; by default all")
    parser.add_argument("--max-tokens", type=int, help="of a generated answer, as of edge-llm eval")
    parser.add_argument("--batch", type=int, help="answers written together, as of edge-llm eval")
    parser.add_argument("--checkpoint", action="append", default=[], metavar="LABEL=PATH")
    parser.add_argument("--rival", nargs="*", default=[], choices=list(RIVALS))
    parser.add_argument("--keep-bundles", action="store_true")
    parser.add_argument("--work", type=Path, default=Path(".quality"))
    options = parser.parse_args()
    if "--task" in sys.argv and not options.task:
        options.task = list(TASKS)
    for each in options.checkpoint:
        label, _, path = each.partition("=")
        if not (label and path and Path(path).exists()) or label in (*RECIPES, *RIVALS, _REFERENCE):
            parser.error(f"--checkpoint {each}: give a new name and what is there, LABEL=PATH")
    return options


def model_file(options: argparse.Namespace) -> Path:
    if options.model == "smollm2":
        return smollm2_gguf()
    path: Path = options.models / f"{options.model}.gguf"
    if not path.is_file():
        sys.exit(f"error: {path} is not there; scripts/real-models {options.model} fetches it")
    return path


def measure(
    place: Path, source: str, recipe: tuple[str, ...], reference: Path, options: argparse.Namespace
) -> None:
    """Export one recipe, read the texts and answer the questions that are still missing."""
    asked = {name: getattr(options, name) for name in ("tokens", "window")}
    missing = [name for name in options.text if read_result(place, name).get("asked") != asked]
    if not missing and not unanswered(place, options):
        return
    bundle = place / "bundle"
    if not bundle.is_dir():
        export(source, recipe, place)
    for name in missing:
        line = ["eval", bundle, "--against", reference, "--text", _ALL_TEXTS[name], "--json"]
        for option, value in asked.items():
            line += [] if value is None else [f"--{option}", value]
        result = {"asked": asked, **json.loads(run(line).stdout)}
        (place / f"{name}.json").write_text(json.dumps(result))
    ask(place, bundle, options)
    if not options.keep_bundles:
        shutil.rmtree(bundle)


def unanswered(place: Path, options: argparse.Namespace) -> dict[str, dict[str, int | None]]:
    """The tasks that a bundle has not answered yet, each with its options."""
    wanted: dict[str, dict[str, int | None]] = {}
    for name in options.task:
        asked = {"limit": options.limit}
        if name not in _CHOICES:
            asked |= {"max_tokens": options.max_tokens, "batch": options.batch}
        if read_result(place, f"task-{name}").get("asked") != asked:
            wanted[name] = asked
    return wanted


def ask(place: Path, bundle: Path, options: argparse.Namespace) -> None:
    """Let a bundle answer the tasks that are still missing."""
    for name, asked in unanswered(place, options).items():
        line: list[Any] = ["eval", bundle, "--task", TASKS[name], "--json"]
        for option, value in asked.items():
            line += [] if value is None else [f"--{option.replace('_', '-')}", value]
        result = {"asked": asked, **json.loads(run(line).stdout)}
        (place / f"task-{name}.json").write_text(json.dumps(result))


def read_result(place: Path, name: str) -> dict[str, Any]:
    """What a recipe lost on a text, or its answers to ``task-NAME``; empty if it has neither."""
    path = place / f"{name}.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def export(source: str, recipe: tuple[str, ...], place: Path) -> None:
    """Export and note what it took; the bundle appears whole or not at all."""
    place.mkdir(parents=True, exist_ok=True)
    before, started = cpu_seconds(), time.perf_counter()
    # Without the export's own report: the texts say more, and time and memory are the export's.
    line = ["export", source, "-o", place / "bundle", *recipe, "--no-verify"]
    peak = run_measured(line)
    cost = {
        "commit": commit(),
        "recipe": " ".join(recipe),
        "seconds": time.perf_counter() - started,
        "cpu_s": cpu_seconds() - before,
        "peak_bytes": peak,
    }
    (place / "export.json").write_text(json.dumps(cost))


def commit() -> str:
    line = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(line: list[Any]) -> subprocess.CompletedProcess[str]:
    """Run a verb of edge-llm; what it says beside its result goes to this script's stderr."""
    return _run(line)


def _run(line: list[Any], *before: str) -> subprocess.CompletedProcess[str]:
    print("+ edge-llm", *line, file=sys.stderr)
    command = [*before, sys.executable, "-m", "edge.cli", *map(str, line)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        sys.exit(f"error: edge-llm {line[0]} ended with exit code {result.returncode}")
    return result


def run_measured(line: list[Any]) -> int:
    """Run a verb in a process of its own parent; returns its peak of resident memory in bytes."""
    code = (
        "import resource, subprocess, sys; "
        "done = subprocess.run(sys.argv[1:], stdout=sys.stderr); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10); "
        "sys.exit(done.returncode)"
    )
    return int(_run(line, sys.executable, "-c", code).stdout)


def _places(work: Path) -> list[Path]:
    """The directories of all recipes that were exported, in the order of `RECIPES`."""
    order = {name: index for index, name in enumerate(RECIPES)}
    places = [path.parent for path in work.glob("*/export.json") if path.parent.name != _REFERENCE]
    return sorted(places, key=lambda path: (order.get(path.name, len(order)), path.name))


def table(work: Path, model: str) -> str:
    """What was measured of a model, as Markdown; rows in the order of `RECIPES`."""
    places = _places(work)
    texts = [name for name in _ALL_TEXTS if any(read_result(path, name) for path in places)]
    heads = " / ".join(texts)
    lines = [
        f"{model}, on {heads}:",
        "",
        "| Recipe | Bits per weight (with lm_head) | KL, as the CPU serves it | KL "
        "| KL, 99th percentile | Perplexity over float's | Top-1 agreement, % | Tokens | Export "
        "| Commit |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for place in places:
        read = {name: found for name in texts if (found := read_result(place, name))}
        if not read:
            continue
        one = next(iter(read.values()))
        cost = json.loads((place / "export.json").read_text())
        # A rival's weights are served by another program; the other columns are of weights alone.
        alone = {name: found | found.get("bundle_alone", {}) for name, found in read.items()}
        served = [f"{found['kl_mean']:.4f}" for found in read.values() if found["int8_activations"]]
        figures = [" / ".join(served)]
        for key, factor, form in (
            ("kl_mean", 1, "{:.4f}"),
            ("kl_p99", 1, "{:.2f}"),
            ("perplexity_ratio", 1, "{:.3f}"),
            ("top1_agreement", 100, "{:.1f}"),
            ("tokens", 1, "{}"),
        ):
            values = (
                form.format(factor * alone[name][key]) if name in alone else "" for name in texts
            )
            figures.append(" / ".join(values))
        bits = f"{one['bits_per_weight']:.2f} ({one['bits_per_weight_with_lm_head']:.2f})"
        took = f"{cost['cpu_s']:.0f} CPU s, {cost['peak_bytes'] / 1e9:.1f} GB"
        if cost["recipe"] == " ".join(_FLOAT):
            # A rival's weights, which are floats here.
            took = ""
            bits = f"{bits_per_weight(place.name):.2f}" if place.name in RIVALS else ""
        lines.append(
            f"| `{place.name}` | {bits} | {' | '.join(figures)} | {took} | {cost['commit']} |"
        )
    return "\n".join(lines)


def task_table(work: Path, model: str) -> str:
    """Accuracy of each recipe beside the float model's, on the same questions, as Markdown."""
    theirs = {name: read_result(work / _REFERENCE, f"task-{name}") for name in TASKS}
    names = [name for name in TASKS if theirs[name]]
    if not names:
        return ""
    lines = [
        f"{model}, right answers of the float bundle: "
        + ", ".join(f"{name} {_share(theirs[name])}" for name in names)
        + ". By recipe, right answers and what was lost of the float model's (negative: won), in % "
        "of the questions, with 95 % intervals and McNemar's p:",
        "",
        f"| Recipe | {' | '.join(names)} | all of these: lost |",
        "|---" * (len(names) + 2) + "|",
    ]
    for place in _places(work):
        ours = {name: read_result(place, f"task-{name}") for name in names}
        pairs = {
            name: _flips(ours[name], theirs[name])
            for name in names
            if ours[name].get("asked") == theirs[name]["asked"]
        }
        if not pairs:
            continue
        cells = [
            f"{_share(ours[name])}; {_loss(*pairs[name])}" if name in pairs else ""
            for name in names
        ]
        total = _loss(*(sum(column) for column in zip(*pairs.values(), strict=True)))
        lines.append(f"| `{place.name}` | {' | '.join(cells)} | {total} |")
    return "\n".join(lines)


def _share(result: dict[str, Any]) -> str:
    low, high = wilson_interval(result["correct"], result["items"])
    share = f"{100 * result['accuracy']:.1f} ({100 * low:.0f} to {100 * high:.0f})"
    return share + (f", {result['cut']} cut" if result.get("cut") else "")


def _flips(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[int, int, int]:
    """Questions that only the float bundle got right, that only ours did, and all."""
    wrong, wrong_there = set(ours["wrong"]), set(theirs["wrong"])
    return len(wrong - wrong_there), len(wrong_there - wrong), ours["items"]


def _loss(lost: int, won: int, items: int) -> str:
    low, high = (100 * end for end in loss_interval(lost, won, items))
    share = 100 * (lost - won) / items
    p = mcnemar_exact(lost, won)
    return f"{share:+.1f} ({low:+.1f} to {high:+.1f}), p {p:.2g}"


if __name__ == "__main__":
    main()
