"""Export a model by every recipe, compare each bundle with the float one, print Markdown tables.

usage: python3 -m lab quality [--model smollm2] [--recipe NAME ...] [--rival [NAME ...]]
                       [--off-grid] [--text NAME ...] [--tokens 1536] [--served] [--record]
                       [--task NAME ...] [--limit 60] [--max-tokens 300]

Each recipe has a directory below ``--work``, with the commit, the seconds and the peak of resident
memory of its export, and its figures for each text and task. Existing figures are not measured
again unless the options or the text changed; delete a recipe's directory to measure it anew. The
bundle is deleted once all is measured (``--keep-bundles`` keeps it). The float model's logits are
kept too (lab/quality/score.py says how large they are), under ``fp16/logits``.

The texts are ten by which nothing was chosen (lab/quality/texts/README.md) and ``own-answers``:
the float model's own answers to some questions, sampled by its own defaults with fixed seeds.
``--text german law tables logs config`` reads the five that were among the ten until calibration
got documents of their kinds. They have a column of their own and no part in the means of the ten.

``--rival`` adds llama.cpp's formats, ``IQ4_XS+imatrix`` with an importance matrix
(lab/peers/gguf_rivals.py), by llama.cpp's own programs, which are compiled once where python3 -m
lab peers has them. ``--checkpoint LABEL=PATH`` adds any weights of the same model, e.g. what
lab/peers/genai_weights.py, python3 -m lab openvino-weights and python3 -m lab auto-round-weights
write. Both are dequantized into a float bundle, so only the loss of the weights counts, as in all
other rows. ``--served`` also measures recipes with activations as the CPU serves them.

The files at hand were stored in 4 bits, on a grid of one scale and one offset for 32 weights.
``--off-grid`` first merges an adapter of rank 64 that scripts/finetune trains on the development
texts, so that no format finds its own grid in the weights; the float model is the merged one then.

``--task`` also asks questions with right answers, of the float bundle too, so each recipe's answers
are paired with the float model's; without names it asks all tasks, which takes hours per recipe.

Standard output has the tables of all recipes that are there, asked for this time or before;
``--record`` writes their figures to docs/measured, from which lab/quality/table.py makes the
tables of docs/measured.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edge.device.process import count_usable_cpus
from edge.runtime.llm import LLM
from edge.runtime.sampling_params import SamplingParams
from edge_lab.measure.defaults import WINDOW
from edge_lab.measure.tasks import loss_interval, mcnemar_exact, wilson_interval
from lab.peers.gguf_rivals import (
    RIVALS,
    WITH_MATRIX,
    file_bits,
    matrix_command,
    quantize_command,
    write_calibration_text,
    write_floats,
)
from lab.peers.peers import LLAMA_CPP_PYTHON, build_llama_cpp
from tools.models.real_models import DIRECTORY, MODELS
from tools.models.smollm2 import smollm2_gguf

from .score import (
    DEVELOPMENT_TEXTS,
    FORMER_TEXTS,
    OWN_ANSWERS,
    TEXTS,
    TOKENS,
    keep_logits,
    score,
    text_digest,
)
from .table import collect, record, tables

_DATA = Path("edge_lab/measure/data")
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
    "int4-best": (*_INT4, "--best"),
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
_REFERENCE, _FLOAT = "fp16", ("--quant", "fp16")
_OFF_GRID, _SERVED = "-off-grid", "served-"
_FLATTERED = "Q4_K"
# As many steps and as fast as moves weights by a good part of a step of 4 bits.
_LESSON = (
    *("--rank", "64", "--learning-rate", "2e-3", "--epochs", "3"),
    *("--batch-size", "1", "--accumulate", "1", "--max-tokens", "320"),
)
_ANSWER_TOKENS = 800
_QUESTIONS = (
    "Explain step by step how a refrigerator moves heat out of a cold box.",
    "Write a short story about a lighthouse keeper who collects clocks.",
    "Write a Python class for a priority queue with tests, and explain it.",
    "用中文介绍一下长城的历史。",
    "A shop sells pens at 3 for 2 euros and pencils at 5 for 1 euro. What do 20 euros buy?",
    "What should a small town do before a flood, during it and after it?",
    "Compare the French and the American revolution.",
    "Describe a day in the life of a nurse in a hospital at night.",
)


def main() -> None:
    options = parse()
    name = options.model + (_OFF_GRID if options.off_grid else "")
    source, work = model_file(options), options.work / name
    work.mkdir(parents=True, exist_ok=True)
    if options.off_grid:
        source = off_grid_file(source, work)
    reference = work / _REFERENCE / "bundle"
    if not reference.is_dir():
        export(str(source), _FLOAT, work / _REFERENCE)
    ask(work / _REFERENCE, reference, options)
    texts = {text: text_file(text, reference, work) for text in options.text}
    logits = work / _REFERENCE / "logits"
    keep_logits(reference, texts, logits, options.tokens, options.window, options.threads)
    for recipe in options.recipe:
        place = work / recipe

        def make(place: Path = place, recipe: str = recipe) -> None:
            export(str(source), RECIPES[recipe], place)

        measure(place, make, texts, options)
    for label, _, file in (each.partition("=") for each in options.checkpoint):
        place = work / label
        measure(place, lambda place=place, file=file: export(file, _FLOAT, place), texts, options)  # type: ignore[misc]
    for rival in options.rival:
        place = work / rival
        measure(place, lambda rival=rival: make_rival(rival, source, work, options), texts, options)  # type: ignore[misc]
    found = collect(work, name, [*RECIPES, *RIVALS])
    print(tables([found]))
    if answered := task_table(work, name):
        print(f"\n{answered}")
    if options.record:
        print(record(found), file=sys.stderr)


def parse() -> argparse.Namespace:
    known = [*TEXTS, *FORMER_TEXTS, OWN_ANSWERS, *DEVELOPMENT_TEXTS]
    parser = argparse.ArgumentParser(
        "python3 -m lab quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="smollm2", choices=["smollm2", *MODELS])
    parser.add_argument("--models", type=Path, default=DIRECTORY, help="of scripts/real-models")
    parser.add_argument("--recipe", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--rival", nargs="*", default=None, choices=list(RIVALS))
    parser.add_argument("--off-grid", action="store_true")
    parser.add_argument("--text", nargs="*", default=[*TEXTS, OWN_ANSWERS], choices=known)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each text, at most")
    parser.add_argument("--window", type=int, default=WINDOW, help="tokens that see each other")
    parser.add_argument("--served", action="store_true", help="as the CPU serves recipes, too")
    parser.add_argument("--record", action="store_true", help="write the figures to docs/measured")
    parser.add_argument("--task", nargs="*", default=[], choices=list(TASKS))
    parser.add_argument("--limit", type=int, help="questions of each task; by default all")
    parser.add_argument("--max-tokens", type=int, help="of a generated answer, as of edge-llm eval")
    parser.add_argument("--batch", type=int, help="answers written together, as of edge-llm eval")
    parser.add_argument("--checkpoint", action="append", default=[], metavar="LABEL=PATH")
    parser.add_argument("--keep-bundles", action="store_true")
    parser.add_argument("--work", type=Path, default=Path(".quality"))
    parser.add_argument(
        "--threads", type=int, default=count_usable_cpus(), help="of llama.cpp and to read texts"
    )
    parser.add_argument("--peers", type=Path, default=Path(".peers"), help="where llama.cpp is")
    options = parser.parse_args()
    if "--task" in sys.argv and not options.task:
        options.task = list(TASKS)
    options.rival = chosen_rivals(options.rival, options.off_grid)
    for each in options.checkpoint:
        label, _, path = each.partition("=")
        if not (label and path and Path(path).exists()) or label in (*RECIPES, *RIVALS, _REFERENCE):
            parser.error(f"--checkpoint {each}: give a new name and what is there, LABEL=PATH")
    return options


def chosen_rivals(given: list[str] | None, off_grid: bool) -> list[str]:
    """The rivals of ``--rival``: none without the option, all that are fair without a name."""
    if given is None or off_grid:
        return list(RIVALS) if given == [] else given or []
    flattered = [name for name in given or RIVALS if name.startswith(_FLATTERED)]
    if flattered:
        print(
            f"{', '.join(flattered)}: this model's file was stored on the grid of that format, so "
            "it finds its own values again, and its figures say nothing of other weights; "
            + ("measured since it was named" if given else "left out")
            + ", --off-grid has fair ones",
            file=sys.stderr,
        )
    return given or [name for name in RIVALS if name not in flattered]


def model_file(options: argparse.Namespace) -> Path:
    if options.model == "smollm2":
        return smollm2_gguf()
    path: Path = options.models / f"{options.model}.gguf"
    if not path.is_file():
        sys.exit(f"error: {path} is not there; scripts/real-models {options.model} fetches it")
    return path


def off_grid_file(source: Path, work: Path) -> Path:
    """The model with a trained adapter merged, so that its weights are on no grid of 4 bits."""
    output = work / "off-grid.gguf"
    if output.exists():
        return output
    adapter = work / "adapter"
    trained = work / "adapter.json"
    if not trained.exists():
        lesson = work / "lesson.jsonl"
        lines = (json.dumps({"text": text}, ensure_ascii=False) for text in lesson_texts())
        lesson.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        shutil.rmtree(adapter, ignore_errors=True)
        line = ["scripts/finetune", source, lesson, "-o", adapter, *_LESSON]
        trained.write_text(_call(line).splitlines()[-1])
    moved = write_floats(source, output, adapter)
    about = {**json.loads(trained.read_text()), "moved_steps": moved}
    (work / "off-grid.json").write_text(json.dumps(about))
    print(f"{output}: weights moved by {moved:.2f} steps of their grid", file=sys.stderr)
    return output


def lesson_texts() -> list[str]:
    """The development texts in pieces of some paragraphs, of 900 characters or 400 Chinese ones."""
    pieces = []
    for name, path in DEVELOPMENT_TEXTS.items():
        size, piece = 400 if name == "Chinese" else 900, ""
        for paragraph in path.read_text("utf-8").split("\n\n"):
            piece += f"{paragraph}\n\n"
            if len(piece) >= size:
                pieces.append(piece)
                piece = ""
        if piece:
            pieces.append(piece)
    return pieces


def text_file(name: str, reference: Path, work: Path) -> Path:
    """A text's file; the model's own answers are written on first use."""
    if name != OWN_ANSWERS:
        return {**DEVELOPMENT_TEXTS, **FORMER_TEXTS, **TEXTS}[name]
    path = work / f"{OWN_ANSWERS}.txt"
    if not path.exists():
        write_answers(reference, work / f"{OWN_ANSWERS}.jsonl", path)
    return path


def write_answers(reference: Path, answers: Path, output: Path) -> None:
    """Have the float model answer questions until there are `TOKENS` tokens, and join its text.

    Args:
        reference: its bundle.
        answers: JSONL, a line for each question with ``question``, ``ids`` and ``text``; questions
            that are answered there are not asked again.
        output: where the joined text goes.
    """
    lines = answers.read_text("utf-8").splitlines() if answers.exists() else []
    done = [json.loads(line) for line in lines]
    with LLM(reference) as llm:
        for number, question in enumerate(_QUESTIONS):
            # A text that is joined and cut into tokens anew may have some tokens less.
            if sum(len(answer["ids"]) for answer in done) >= 1.1 * TOKENS:
                break
            if number < len(done):
                continue
            params = SamplingParams(max_tokens=_ANSWER_TOKENS, seed=number)
            result = llm.generate([{"role": "user", "content": question}], params)
            ids = [token.id for token in result.tokens]
            done.append({"question": question, "ids": ids, "text": llm.tokenizer.decode(ids)})
            with answers.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done[-1], ensure_ascii=False) + "\n")
            print(f"{len(ids)} tokens: {question}", file=sys.stderr)
    output.write_text("\n\n".join(answer["text"] for answer in done), encoding="utf-8")


def measure(
    place: Path, make: Callable[[], None], texts: Mapping[str, Path], options: argparse.Namespace
) -> None:
    """Make a bundle, read the texts and answer the questions that are still missing."""
    wanted = {
        f"{kind}{name}": {
            **{option: getattr(options, option) for option in ("tokens", "window")},
            "text": text_digest(path),
        }
        for kind in (("", _SERVED) if options.served else ("",))
        for name, path in texts.items()
    }
    missing = {
        name: asked
        for name, asked in wanted.items()
        if read_result(place, name).get("asked") != asked
    }
    if not missing and not unanswered(place, options):
        return
    bundle = place / "bundle"
    if not bundle.is_dir():
        make()
    logits = place.parent / _REFERENCE / "logits"
    for kind in ("", _SERVED):
        left = {name: path for name, path in texts.items() if f"{kind}{name}" in missing}
        if not left:
            continue
        size = options.tokens, options.window, options.threads
        found = score(bundle, left, logits, *size, served=kind == _SERVED)
        for name, figures in found:
            result = {"asked": missing[f"{kind}{name}"], **figures}
            (place / f"{kind}{name}.json").write_text(json.dumps(result))
            print(f"{place.name}, {kind}{name}: KL {figures['kl_mean']:.4f}", file=sys.stderr)
    ask(place, bundle, options)
    if not options.keep_bundles:
        shutil.rmtree(bundle)


def make_rival(rival: str, source: Path, work: Path, options: argparse.Namespace) -> None:
    """Quantize by llama.cpp's programs and note what that took; the bundle has its weights."""
    programs = build_llama_cpp(options.peers, ("llama-quantize", "llama-imatrix"))
    place, floats, matrix = work / rival, work / "floats.gguf", work / "imatrix.gguf"
    place.mkdir(exist_ok=True)
    if not floats.exists():
        write_floats(source, floats)
    cost = {"cpu_s": 0.0, "peak_bytes": 0}
    if rival.endswith(WITH_MATRIX):
        noted = work / "imatrix.json"
        if not noted.exists():
            text = work / "calibration.txt"
            tokens = write_calibration_text(source, text)
            used = run_measured(matrix_command(programs, floats, text, matrix, options.threads))
            noted.write_text(json.dumps({"tokens": tokens, **used}))
        cost = json.loads(noted.read_text())
    file = place / "weights.gguf"
    threads = options.threads
    used = run_measured(quantize_command(programs, floats, file, rival, matrix, threads))
    export(str(file), _FLOAT, place)
    bits = file_bits(file)
    about = {
        "commit": commit(),
        "recipe": f"llama.cpp of llama-cpp-python {LLAMA_CPP_PYTHON}",
        "cpu_s": used["cpu_s"] + cost["cpu_s"],
        "peak_bytes": max(used["peak_bytes"], cost["peak_bytes"]),
        "bits_per_weight": bits.layers,
        "bits_per_weight_with_lm_head": bits.with_lm_head,
        "types": bits.types,
    }
    (place / "export.json").write_text(json.dumps(about))
    file.unlink()


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
        result = {"asked": asked, **json.loads(_call(_edge_llm(*line)))}
        (place / f"task-{name}.json").write_text(json.dumps(result))


def read_result(place: Path, name: str) -> dict[str, Any]:
    """Read a recipe's loss on a text, or its answers to ``task-NAME``; empty if it has neither."""
    path = place / f"{name}.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def export(source: str, recipe: tuple[str, ...], place: Path) -> None:
    """Export and note what it took; the bundle appears whole or not at all."""
    place.mkdir(parents=True, exist_ok=True)
    # Without the export's own report: the texts say more, and time and memory are the export's.
    line = ["export", source, "-o", place / "bundle", *recipe, "--no-verify"]
    cost = {"commit": commit(), "recipe": " ".join(recipe), **run_measured(_edge_llm(*line))}
    (place / "export.json").write_text(json.dumps(cost))


def commit() -> str:
    return _call(["git", "describe", "--always", "--dirty"]).strip()


def _edge_llm(*words: object) -> list[object]:
    return [sys.executable, "-m", "edge.cli", *words]


def _call(command: Sequence[object], *before: str) -> str:
    """Run a command; what it says beside its result goes to this script's stderr."""
    print("+", *command, file=sys.stderr)
    words = [*before, *map(str, command)]
    result = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        sys.exit(f"error: {command[0]} ended with exit code {result.returncode}")
    return result.stdout


def run_measured(command: Sequence[object]) -> dict[str, float]:
    """Run a command in a process of its own parent.

    Returns:
        ``cpu_s`` of all its threads, ``seconds``, and ``peak_bytes`` of resident memory.
    """
    code = (
        "import json, resource, subprocess, sys, time; "
        "started = time.perf_counter(); "
        "done = subprocess.run(sys.argv[1:], stdout=sys.stderr); "
        "used = resource.getrusage(resource.RUSAGE_CHILDREN); "
        "print(json.dumps({'cpu_s': used.ru_utime + used.ru_stime, "
        "'seconds': time.perf_counter() - started, 'peak_bytes': used.ru_maxrss << 10})); "
        "sys.exit(done.returncode)"
    )
    found: dict[str, float] = json.loads(_call(command, sys.executable, "-c", code))
    return found


def _places(work: Path) -> list[Path]:
    """The directories of all recipes that were exported, in the order of `RECIPES`."""
    order = {name: index for index, name in enumerate(RECIPES)}
    places = [path.parent for path in work.glob("*/export.json") if path.parent.name != _REFERENCE]
    return sorted(places, key=lambda path: (order.get(path.name, len(order)), path.name))


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
