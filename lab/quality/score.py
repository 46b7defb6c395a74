"""Score bundles on texts, beside a reference whose logits are computed once and kept.

The figures are those of ``edge-llm eval BUNDLE --against REFERENCE``, which runs both models side
by side each time. Here the reference's logits are in files, float32 ``[tokens, vocabulary]``: half
the time, for 0.3 GB of disk for each text of 1,536 tokens with SmolLM2's vocabulary, 0.9 with
Qwen's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.backends.ort.session import rounds_activations
from edge.backends.step import all_tokens, prefill
from edge.bundle.manifest import read_manifest
from edge.runtime.llm import LLM
from edge_lab.measure.compare import Positions, compare_chunk
from edge_lab.measure.defaults import WINDOW
from edge_lab.measure.evaluate import bits_per_weight, cut_windows, read_text, summarize

_DATA = Path("edge_lab/measure/data")
# Defaults were chosen by the losses on these.
DEVELOPMENT_TEXTS = {
    "built-in": _DATA / "eval_text.txt",
    "prose": _DATA / "prose.txt",
    "code": _DATA / "code.txt",
    "Chinese": _DATA / "chinese.txt",
}
_FOLDER = Path("lab/quality/texts")
# Nothing was chosen by these; quality_texts/README.md has their origins. Calibration has other
# documents of the first five kinds, and none of the last five.
TEXTS = {
    name: _FOLDER / f"{name}.txt"
    for name in (
        *("story", "report-chinese", "chat", "proofs", "javascript"),
        *("play", "assembler", "chess", "ship-log", "dictionary"),
    )
}
# These were the last five until calibration got documents of their kinds.
FORMER_TEXTS = {
    name: _FOLDER / f"{name}.txt" for name in ("german", "law", "tables", "logs", "config")
}
OWN_ANSWERS = "own-answers"
TOKENS = 1536
"""Tokens of each text, so that each counts the same; no text is shorter."""
_CHUNK_TOKENS = 128


def keep_logits(
    reference: Path,
    texts: Mapping[str, Path],
    folder: Path,
    tokens: int,
    window: int = WINDOW,
    threads: int | None = None,
) -> None:
    """Compute the reference's logits of the texts that have none in ``folder`` yet."""
    missing = [
        name for name in texts if not _logits_file(folder, texts[name], tokens, window).exists()
    ]
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with LLM(
        reference, kv_capacity=window, prefill_chunk=_CHUNK_TOKENS, num_threads=threads
    ) as llm:
        for name in missing:
            windows = _windows(llm, texts[name], tokens, window)
            shape = sum(len(ids) - 1 for ids in windows), llm.manifest.model.vocab_size
            output = _logits_file(folder, texts[name], tokens, window)
            part = output.with_name(f"{output.name}.part")
            kept = np.lib.format.open_memmap(part, "w+", np.float32, shape)
            for rows, _, logits in _run(llm, windows):
                kept[rows] = logits
            kept.flush()
            part.rename(output)


def score(
    bundle: Path,
    texts: Mapping[str, Path],
    folder: Path,
    tokens: int,
    window: int = WINDOW,
    threads: int | None = None,
    *,
    served: bool = False,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure a bundle on texts whose logits of the reference `keep_logits` has kept.

    Args:
        bundle: the bundle to measure.
        texts: files of the texts, by name.
        folder: folder of the reference's logits.
        tokens: most tokens of each text.
        window: tokens of a window.
        threads: CPU threads; None leaves it to the engine.
        served: whether activations are as the CPU serves the bundle, instead of float.

    Yields:
        A text's name and its figures, as `edge_lab.measure.evaluate.summarize` names them, with
        ``tokens`` and the bits per weight.
    """
    manifest = read_manifest(bundle)
    float_only = rounds_activations(manifest) and not served
    with LLM(
        bundle,
        kv_capacity=window,
        prefill_chunk=_CHUNK_TOKENS,
        num_threads=threads,
        int8_activations=False if float_only else None,
    ) as llm:
        for name, path in texts.items():
            windows = _windows(llm, path, tokens, window)
            kept = np.load(_logits_file(folder, path, tokens, window), mmap_mode="r")
            columns = [
                compare_chunk(logits, kept[rows], targets)
                for rows, targets, logits in _run(llm, windows)
            ]
            joined = np.concatenate(columns, axis=1)
            none = np.zeros(joined.shape[1], np.int64)
            yield (
                name,
                {
                    **summarize(Positions(none, none, *joined)),
                    "tokens": joined.shape[1],
                    "bits_per_weight": bits_per_weight(manifest, lm_head=False),
                    "bits_per_weight_with_lm_head": bits_per_weight(manifest, lm_head=True),
                },
            )


def text_digest(path: Path) -> str:
    """Hash a text, to tell it from another one or from an earlier version."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def _logits_file(folder: Path, path: Path, tokens: int, window: int) -> Path:
    return folder / f"{path.stem}-{text_digest(path)}-{tokens}-{window}.npy"


def _windows(llm: LLM, path: Path, tokens: int, window: int) -> list[list[int]]:
    """Cut a text as `edge_lab.measure.evaluator` does."""
    known = llm.manifest.tokens
    prefix = [known.bos] if known.add_bos and known.bos is not None else []
    return cut_windows(llm.tokenizer.encode(read_text(path)), window, prefix, tokens)


def _run(
    llm: LLM, windows: Sequence[Sequence[int]]
) -> Iterator[tuple[slice, NDArray[np.int64], NDArray[np.float32]]]:
    """Yield rows within the text, the tokens that follow, and the logits that predict them."""
    start = 0
    for window in windows:
        ids = np.asarray(window, dtype=np.int64)
        parts = prefill(
            llm.backend, llm.embeddings, ids[:-1], max_tokens=_CHUNK_TOKENS, wanted=all_tokens
        )
        for part, logits in parts:
            yield slice(start + part.start, start + part.stop), ids[1:][part], logits
        start += len(ids) - 1
