"""Prints the output error of one decoder layer by method and calibration text, on unseen texts.

usage: python3 -m lab layer-error SOURCE [--layer 1] [--calibration FILE ...] [--damping 0.3]

A whole export and its evaluation take minutes to hours, one early layer a minute. So it quickly
shows what a method fits only to its calibration text. Each figure is ``|X (W - Q)|^2 / |X W|^2``
over the tokens of a held-out text, with inputs X of the float model. INT4 is in groups of 32.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge.bundle.linears import LinearSpec, linear_layers
from edge.bundle.manifest import TensorScheme
from edge.text.chat_template import ChatTemplate
from edge.text.tokenizer import Tokenizer
from edge_lab.measure.evaluate import read_text
from export.quantize.awq import awq_factors
from export.quantize.calibrated import shared_channels
from export.quantize.calibration import LayerRunner
from export.quantize.gptq import gptq_factor, gptq_rows
from export.quantize.rtn import QuantizedRows, dequantize_rows, quantize_rows
from export.quantize.statistics import mean_square, second_moment
from export.sources.checkpoint import Checkpoint
from export.sources.documents import SEQ_LEN, calibration_batches, read_calibration_text
from export.sources.opening import open_checkpoint

from .score import DEVELOPMENT_TEXTS as TEXTS

Array = NDArray[np.float32]
_SCHEME, _SCALES = TensorScheme(kind="int4", group_size=32), np.dtype(np.float16)


class Row(NamedTuple):
    """One method's errors in one linear, by held-out text."""

    linear: str
    method: str
    calibration: str
    errors: tuple[float, ...]


def main() -> None:
    parser = argparse.ArgumentParser(
        "python3 -m lab layer-error",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source")
    parser.add_argument("--layer", type=int, default=1)
    parser.add_argument("--calibration", type=Path, nargs="*", default=[], help="beside built-in")
    parser.add_argument("--tokens", type=int, default=8192, help="of each calibration text")
    parser.add_argument("--held-out", type=int, default=1024, help="tokens of each held-out text")
    parser.add_argument("--damping", type=float, nargs="*", default=[0.3])
    options = parser.parse_args()
    print(f"| Linear | Method | Calibration | Error, % ({' / '.join(TEXTS)}) |\n|---|---|---|---|")
    for row in measure(
        options.source,
        options.layer,
        [None, *options.calibration],
        options.tokens,
        options.held_out,
        options.damping,
    ):
        errors = " / ".join(f"{100 * error:.3f}" for error in row.errors)
        print(f"| {row.linear} | {row.method} | {row.calibration} | {errors} |", flush=True)


def measure(
    source: str,
    index: int,
    calibration: list[Path | None],
    num_tokens: int,
    held_out: int,
    dampings: list[float],
    seq_len: int = SEQ_LEN,
) -> Iterator[Row]:
    """Quantize the linears of decoder layer ``index`` by every method and yield their errors.

    Args:
        source: a checkpoint, as for `edge-llm export`.
        index: number of the decoder layer, from 0.
        calibration: texts to calibrate with; None is the built-in one.
        num_tokens: most tokens of each calibration text.
        held_out: most tokens of each held-out text.
        dampings: dampings of GPTQ, as for `gptq_factor`.
        seq_len: tokens of a sequence.
    """
    with open_checkpoint(source) as checkpoint:
        ids = _tokens(checkpoint, calibration, num_tokens, held_out, seq_len)
        ends = np.cumsum([rows.size for rows in ids.values()])
        places = {
            name: slice(end - rows.size, end)
            for (name, rows), end in zip(ids.items(), ends, strict=True)
        }
        runner = LayerRunner(checkpoint, np.concatenate(list(ids.values())))
        seen = runner.run(0, None)
        for number in range(1, index + 1):
            seen = runner.run(number, seen.hidden)
        for layer in linear_layers(checkpoint.spec):
            short = layer.name.rpartition(".")[2]
            if layer.name == f"layers.{index}.{short}":
                yield from _linear(checkpoint, layer, seen.inputs.pop(short), places, dampings)


def _tokens(
    checkpoint: Checkpoint,
    calibration: list[Path | None],
    num_tokens: int,
    held_out: int,
    seq_len: int,
) -> dict[str, NDArray[np.int64]]:
    """Encode every held-out and every calibration text, by name, the held-out ones first."""
    text = checkpoint.text
    tokenizer = Tokenizer.from_bytes(text.tokenizer_json, text.tokens)
    template = None if text.chat_template is None else ChatTemplate(text.chat_template, text.tokens)
    ids = {}
    for name, path in TEXTS.items():
        row = tokenizer.encode(read_text(path))[:held_out]
        ids[name] = np.array(row[: len(row) // seq_len * seq_len]).reshape(-1, seq_len)
    for place in calibration:
        documents = read_calibration_text(place)
        name = f"calibration {documents.name}"
        ids[name] = calibration_batches(tokenizer, template, documents, num_tokens, seq_len)
    return ids


def _linear(
    checkpoint: Checkpoint,
    layer: LinearSpec,
    inputs: Array,
    places: dict[str, slice],
    dampings: list[float],
) -> Iterator[Row]:
    short = layer.name.rpartition(".")[2]
    weights = np.concatenate([checkpoint.tensor(name).astype(np.float32) for name in layer.weights])
    shared = shared_channels(checkpoint.spec, layer.name)

    def row(method: str, calibration: str, found: QuantizedRows, factors: Array | None) -> Row:
        change = dequantize_rows(found) / (1 if factors is None else factors) - weights
        errors = []
        for name in TEXTS:
            x = inputs[places[name]]
            lost, whole = x @ change.T, x @ weights.T
            errors.append(float(np.square(lost).sum() / np.square(whole).sum()))
        return Row(short, method, calibration, tuple(errors))

    yield row("rtn", "", quantize_rows(weights, _SCHEME, "mse", _SCALES), None)
    for name in places:
        kind, _, text = name.partition("calibration ")
        if kind:
            continue
        x = inputs[places[name]]
        factors = awq_factors(weights, x, _SCHEME, _SCALES, shared)
        scaled = weights * factors
        importance = mean_square(x)
        importance /= np.square(factors)
        found = quantize_rows(scaled, _SCHEME, "mse", _SCALES, importance)
        yield row("awq", text, found, factors)
        moments = second_moment(x)
        moments /= factors
        moments /= factors[:, None]
        for damping in dampings:
            found = gptq_rows(scaled, _SCHEME, gptq_factor(moments.copy(), damping), _SCALES)
            yield row(f"awq+gptq, damping {100 * damping:g} %", text, found, factors)


if __name__ == "__main__":
    main()
