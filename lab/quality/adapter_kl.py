"""Measure how far an adapter at run time is from peft, beside the same adapter merged at export.

usage: python3 -m lab adapter-kl SOURCE --pair NAME ADAPTER BUNDLE MERGED ... -o OUT.json

All bundles are exports of SOURCE by one recipe. ADAPTER is what peft saved, BUNDLE was exported
with ``--adapters`` and MERGED with ``--lora ADAPTER``. peft computes in FP32, so this runs where
torch and peft are: ``.venv-finetune/bin/python``.

The texts are held-out questions of `lab.training.adapter_tasks` with their answers, half of them of
the adapter's own task where NAME is one. At each place the Kullback-Leibler divergence of a
bundle's distribution from peft's is taken, with float and with INT8 activations. The paired
difference (run time less merged) has a 95 % interval by a bootstrap over texts: tokens of one text
are not independent.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge import LLM
from edge.runtime.ask import Ask
from edge.runtime.scheduler import Request
from edge.runtime.scheduler.pooling import NEUTRAL
from edge.runtime.stream import OutputStream, submit
from export.sources.opening import open_checkpoint
from lab.training.adapter_tasks import TASKS, questions
from lab.training.finetune import load_model

Floats = NDArray[np.float32]
Ids = list[int]
DRAWS = 10_000  # of the bootstrap


def texts(bundle: Path, task: str, count: int) -> list[Ids]:
    """Encode held-out questions with their answers, as chats."""
    others = [name for name in TASKS if name != task]
    asked = questions(task, count // 2, held_out=True) if task in TASKS else []
    for number, name in enumerate(others):
        left = count - len(asked)
        asked += questions(name, left // (len(others) - number), held_out=True)
    with LLM(bundle, num_threads=1) as llm:
        return [
            llm.encode([{"role": "user", "content": each.text}]) + llm.tokenizer.encode(each.answer)
            for each in asked
        ]


def peft_logits(source: str, adapter: Path, given: Sequence[Ids]) -> list[Floats]:
    """Compute the logits of every place as peft does, in FP32: ``[places, vocabulary]`` each."""
    import peft
    import torch

    with open_checkpoint(source) as checkpoint:
        base = load_model(source, checkpoint).float()
    model = peft.PeftModel.from_pretrained(base, str(adapter)).eval()
    with torch.inference_mode():
        return [model(torch.tensor([ids])).logits[0].cpu().numpy() for ids in given]


def divergences(
    bundle: Path,
    adapter: Path | None,
    given: Sequence[Ids],
    expected: Sequence[Floats],
    int8_activations: bool,
) -> list[NDArray[np.float64]]:
    """Return a bundle's divergence from ``expected`` at every place of every text, in nats."""
    with LLM(bundle, num_threads=1, int8_activations=int8_activations) as llm:
        name = None if adapter is None else llm.load_adapter(adapter)
        found = []
        for ids, reference in zip(given, expected, strict=True):
            logits = _logits(llm, ids, name)
            theirs, ours = _log_softmax(reference[:, : logits.shape[1]]), _log_softmax(logits)
            found.append((np.exp(theirs) * (theirs - ours)).sum(-1))
        return found


def _logits(llm: LLM, ids: Ids, adapter: str | None) -> Floats:
    parts: list[Floats] = []
    request = Request(
        ids=tuple(ids),
        params=NEUTRAL,
        end_ids=frozenset(),
        adapter=llm.adapter_of(Ask("", adapter=adapter)),
        on_logits=lambda _, logits: parts.append(logits.copy()),
    )
    (generation,) = submit(llm.scheduler, [request], [OutputStream()])
    generation.result()
    return np.concatenate(parts)


def _log_softmax(logits: Floats) -> NDArray[np.float64]:
    values = logits.astype(np.float64)
    values -= values.max(-1, keepdims=True)
    values -= np.log(np.exp(values).sum(-1, keepdims=True))
    return values


def compare(
    ours: Sequence[NDArray[np.float64]], merged: Sequence[NDArray[np.float64]]
) -> dict[str, Any]:
    """Compare two bundles on the same places, with an interval by texts."""
    sums = np.array([[a.sum(), b.sum(), len(a)] for a, b in zip(ours, merged, strict=True)])
    draws = np.random.default_rng(0).integers(len(sums), size=(DRAWS, len(sums)))
    a, b, count = np.moveaxis(sums[draws].sum(1), -1, 0)
    mean_a, mean_b = sums[:, :2].sum(0) / sums[:, 2].sum()
    interval = np.percentile((a - b) / count, [2.5, 97.5])
    return {
        "texts": len(sums),
        "places": int(sums[:, 2].sum()),
        "kl_run_time": round(float(mean_a), 5),
        "kl_merged": round(float(mean_b), 5),
        "difference": round(float(mean_a - mean_b), 5),
        "interval": [round(float(each), 5) for each in interval],
        "ratio": round(float(mean_a / mean_b), 3),
        "ratio_interval": [round(float(each), 3) for each in np.percentile(a / b, [2.5, 97.5])],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run as the module's docstring says."""
    parser = argparse.ArgumentParser(
        "python3 -m lab adapter-kl", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("source")
    parser.add_argument(
        "--pair",
        nargs=4,
        action="append",
        required=True,
        metavar=("NAME", "ADAPTER", "BUNDLE", "MERGED"),
    )
    parser.add_argument("--count", type=int, default=32, help="texts of each adapter")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(pair[0] for pair in options.pair):
        pairs = [tuple(map(Path, pair[1:])) for pair in options.pair if pair[0] == name]
        given = texts(pairs[0][1], name, options.count)
        references: dict[Path, list[Floats]] = {}
        for adapter, bundle, merged in pairs:
            if adapter not in references:
                references[adapter] = peft_logits(options.source, adapter, given)
                gc.collect()
            expected = references[adapter]
            for rounded in (False, True):
                ours = divergences(bundle, adapter, given, expected, rounded)
                theirs = divergences(merged, None, given, expected, rounded)
                row = {
                    "adapter": name,
                    "bundle": bundle.name,
                    "activations": "int8" if rounded else "float",
                    **compare(ours, theirs),
                }
                rows.append(row)
                print(json.dumps(row), flush=True)
                options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
