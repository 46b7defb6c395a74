"""Measures how far a bundle is from its reference, teacher-forced on a text that neither has seen.

The text is cut into windows that stand alone. Both models read the same tokens, a chunk of 64 at a
time, side by side: their logits are compared in float64 while they are there, and only a few
numbers per position are kept. So the figures are exact over the whole vocabulary and memory is
bounded: two chunks of logits (78 MB at a vocabulary of 151,936), whatever the text's length.

Confidence intervals are bootstrap percentiles over blocks of up to 64 consecutive positions, since
the errors of neighbours depend on each other (Künsch, 1989, without overlap).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge.backends import Backend, Floats
from edge.backends.step import all_tokens, prefill
from edge.bundle.embeddings import EmbeddingTable
from edge.bundle.manifest import Manifest
from edge.errors import ConfigError, DependencyError
from edge.figures import cosine_similarity, kl_divergence, log_softmax
from edge.files import MALFORMED, read_text_file
from edge.progress import Progress, silent

CHUNK_TOKENS = 64
"""Positions whose logits are in memory at once, and the length of a bootstrap block."""
EVAL_TEXT = Path(__file__).parent / "data" / "eval_text.txt"
"""Held-out text written for this project; calibration never reads it."""

_ROWS = 4  # rows compared at a time in float64: 5 MB each at a vocabulary of 151,936
_RESAMPLES = 1000
_CONFIDENCE = 0.95
_CURVE_POINTS = 32

Vector = NDArray[np.float64]
_MAX_TEXT_BYTES = 1 << 28


class Model(Protocol):
    """What evaluation needs of an `edge.runtime.llm.LLM`."""

    backend: Backend
    embeddings: EmbeddingTable
    manifest: Manifest


@dataclass(frozen=True)
class Positions:
    """Numbers for each scored position, float64 ``[n]`` unless stated otherwise.

    Attributes:
        block: bootstrap block that the position belongs to, int64.
        offset: place in its window, int64.
        nll: negative log-probability of the token that follows, in nats.
        reference_nll: the same for the reference; NaN without one, like everything below.
        kl: KL(reference || bundle) of the distributions of the next token, in nats.
        agrees: 1 where both find the same token most probable.
        cosine: cosine of both rows of logits.
    """

    block: NDArray[np.int64]
    offset: NDArray[np.int64]
    nll: Vector
    reference_nll: Vector
    kl: Vector
    agrees: Vector
    cosine: Vector

    def __len__(self) -> int:
        return len(self.nll)

    def take(self, rows: NDArray[np.int64]) -> Positions:
        """Select rows of every array."""
        return Positions(*(getattr(self, item.name)[rows] for item in fields(self)))


@dataclass(frozen=True)
class LayerError:
    """Relative error of what a layer has written into the KV cache, over the whole text.

    Keys and values are linear in the layer's input, so this is the error of everything before the
    layer and of its own projections, on any backend.

    Attributes:
        layer: from 0.
        key_error: ``|K - K_ref| / |K_ref|`` (Frobenius norms).
        value_error: the same for values, after the linear map per head that fits best: a recipe
            may scale or rotate a head's values and undo it in the next matrix. None where the
            text has too few tokens to tell such a map from the error.
    """

    layer: int
    key_error: float
    value_error: float | None


@dataclass(frozen=True)
class Comparison:
    """Everything that was measured of one bundle."""

    positions: Positions
    layers: list[LayerError]


# ------------------------------------------------------------------------------- pure figures


def bits_per_weight(manifest: Manifest, *, lm_head: bool) -> float:
    """Compute the stored bits per weight of the linear layers, scales included."""
    chosen = [
        info for name, info in manifest.quantization.linears.items() if lm_head or name != "lm_head"
    ]
    return 8 * sum(info.num_bytes for info in chosen) / sum(math.prod(i.shape) for i in chosen)


def summarize(positions: Positions) -> dict[str, float | None]:
    """Compute the figures of a set of positions; what needs a reference is None without one."""
    nll = float(positions.nll.mean())
    figures: dict[str, float | None] = {"perplexity": math.exp(nll)}
    if np.isnan(positions.kl).any():
        names = ("perplexity_reference", "perplexity_ratio", "kl_mean", "kl_p99")
        return figures | dict.fromkeys((*names, "top1_agreement", "cosine_mean"))
    reference_nll = float(positions.reference_nll.mean())
    return figures | {
        "perplexity_reference": math.exp(reference_nll),
        "perplexity_ratio": math.exp(nll - reference_nll),
        "kl_mean": float(positions.kl.mean()),
        "kl_p99": float(np.quantile(positions.kl, 0.99)),
        "top1_agreement": float(positions.agrees.mean()),
        "cosine_mean": float(positions.cosine.mean()),
    }


def confidence_intervals(positions: Positions, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Compute 95 % bootstrap intervals of the figures of `summarize`; a seed fixes them."""
    starts = np.flatnonzero(np.diff(positions.block, prepend=-1))
    members = np.split(np.arange(len(positions)), starts[1:])
    random = np.random.default_rng(seed)
    samples = [
        summarize(positions.take(np.concatenate([members[i] for i in chosen])))
        for chosen in random.integers(len(members), size=(_RESAMPLES, len(members)))
    ]
    tail = (1 - _CONFIDENCE) / 2
    result = {}
    for name, first in samples[0].items():
        if first is not None:
            low, high = np.quantile([sample[name] for sample in samples], [tail, 1 - tail])
            result[name] = (float(low), float(high))
    return result


def kl_by_position(positions: Positions, num_points: int = _CURVE_POINTS) -> list[dict[str, float]]:
    """Average KL over equal stretches of the window: ``{"position", "kl_mean"}`` of each."""
    width = max(1, math.ceil((int(positions.offset.max()) + 1) / num_points))
    stretch = positions.offset // width
    return [
        {
            "position": float(positions.offset[stretch == i].mean()),
            "kl_mean": float(positions.kl[stretch == i].mean()),
        }
        for i in np.unique(stretch)
    ]


# ------------------------------------------------------------------------------- the loop


@dataclass(frozen=True)
class EvalText:
    """A text as token windows.

    Attributes:
        windows: token ids; the first of each window is given, all others are scored.
        name: the file's name.
        sha256: hash of the text's UTF-8 bytes.
    """

    windows: list[list[int]]
    name: str
    sha256: str = field(repr=False)

    @property
    def num_scored(self) -> int:
        """Number of positions that get figures."""
        return sum(len(window) - 1 for window in self.windows)


def read_text(path: Path) -> str:
    """Read a UTF-8 text.

    Raises:
        ConfigError: the file cannot be read, or is not UTF-8.
    """
    try:
        return read_text_file(path, _MAX_TEXT_BYTES)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; name a text file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 (byte {error.start}); convert it first") from error


def cut_windows(
    ids: Sequence[int], window: int, prefix: Sequence[int] = (), limit: int | None = None
) -> list[list[int]]:
    """Cut a text into windows of at most ``window`` tokens, ``prefix`` (the begin token) included.

    Args:
        ids: the text's tokens.
        window: tokens per window; more than the prefix and at least 2.
        prefix: put before each window.
        limit: tokens of the text to use at most.

    Raises:
        ConfigError: nothing is left to score.
    """
    step = window - len(prefix)
    used = ids if limit is None else ids[:limit]
    cut = [[*prefix, *used[at : at + step]] for at in range(0, len(used), step)]
    windows = [tokens for tokens in cut if len(tokens) > 1]
    if not windows:
        raise ConfigError(f"the text has {len(used)} tokens; at least 2 are needed to score one")
    return windows


def compare(
    bundle: Model, reference: Model | None, text: EvalText, progress: Progress = silent
) -> Comparison:
    """Run a bundle, and a reference beside it, over a text.

    Args:
        bundle: a bundle with room for a window. Where its steps, or those of the reference, take
            fewer than `CHUNK_TOKENS` tokens, the blocks of the bootstrap are as short.
        reference: a model with the same vocabulary; None measures the perplexity alone.
        text: windows of tokens of both.
        progress: called with the tokens scored (step ``score``).

    Raises:
        RequestError: a token is outside the table.
        BackendError: an engine failed, or its logits are not finite.
    """
    parts: list[Positions] = []
    cache_errors = _CacheErrors(bundle.manifest.model.num_layers)
    num_blocks = done = 0
    progress("score", 0, text.num_scored, "tokens")
    for window in text.windows:
        ids = np.asarray(window, dtype=np.int64)
        for part, ours, theirs in _run_window(bundle, reference, ids):
            columns = _compare_chunk(ours, theirs, ids[1:][part])
            places = np.arange(part.start, part.stop)
            parts.append(Positions(np.full(len(places), num_blocks), places, *columns))
            num_blocks += 1
            done += len(places)
            progress("score", done, text.num_scored, "tokens")
        if reference is not None:
            cache_errors.add(
                reference.backend.read_slot(0, len(ids) - 1),
                bundle.backend.read_slot(0, len(ids) - 1),
            )
    joined = [[getattr(block, item.name) for block in parts] for item in fields(Positions)]
    positions = Positions(*(np.concatenate(column) for column in joined))
    return Comparison(positions, [] if reference is None else cache_errors.result())


def _run_window(
    bundle: Model, reference: Model | None, ids: NDArray[np.int64]
) -> Iterator[tuple[slice, NDArray[np.float32], NDArray[np.float32] | None]]:
    """Run both models side by side; yields parts of ``ids[:-1]`` and logits ``[n, vocab]`` of each.

    The last token of a window has no successor to score.
    """
    models = [bundle] if reference is None else [bundle, reference]
    chunk = min(CHUNK_TOKENS, *(model.backend.max_step_tokens for model in models))
    runs = [
        prefill(model.backend, model.embeddings, ids[:-1], max_tokens=chunk, wanted=all_tokens)
        for model in models
    ]
    for (part, ours), *others in zip(*runs, strict=True):
        yield part, ours, others[0][1] if others else None


def _compare_chunk(
    logits: NDArray[np.float32],
    reference: NDArray[np.float32] | None,
    targets: NDArray[np.int64],
) -> list[Vector]:
    """Compute the last five arrays of `Positions` for a chunk."""
    result = np.full((5, len(targets)), np.nan)
    for at in range(0, len(targets), _ROWS):
        rows = slice(at, at + _ROWS)
        chosen = targets[rows, None]
        log_q = log_softmax(logits[rows])
        result[0, rows] = -np.take_along_axis(log_q, chosen, axis=1)[:, 0]
        if reference is None:
            continue
        log_p = log_softmax(reference[rows])
        result[1, rows] = -np.take_along_axis(log_p, chosen, axis=1)[:, 0]
        result[2, rows] = kl_divergence(log_p, log_q)
        result[3, rows] = log_p.argmax(axis=1) == log_q.argmax(axis=1)
        result[4, rows] = cosine_similarity(reference[rows], logits[rows])
    return list(result)


class _CacheErrors:
    """Sums over windows, from which the errors of keys and values are computed."""

    def __init__(self, num_layers: int) -> None:
        self._keys = np.zeros((num_layers, 2))
        self._values: list[list[Vector]] = [[] for _ in range(num_layers)]
        self._num_tokens = 0

    def add(self, reference: Floats, bundle: Floats) -> None:
        """Count one window's caches, ``[2 * layers, kv_heads, tokens, head_dim]``."""
        self._num_tokens += reference.shape[2]
        for layer, sums in enumerate(self._values):
            keys, found = (c[2 * layer].astype(np.float64) for c in (reference, bundle))
            self._keys[layer] += ((found - keys) ** 2).sum(), (keys**2).sum()
            values, found = (c[2 * layer + 1].astype(np.float64) for c in (reference, bundle))
            turned = found.transpose(0, 2, 1)
            grams = [values.transpose(0, 2, 1) @ values, turned @ found, turned @ values]
            sums[:] = [a + b for a, b in zip(sums, grams, strict=True)] if sums else grams

    def result(self) -> list[LayerError]:
        return [
            LayerError(layer, math.sqrt(difference / norm), self._value_error(layer))
            for layer, (difference, norm) in enumerate(self._keys.tolist())
        ]

    def _value_error(self, layer: int) -> float | None:
        """Least squares per head from sums: |R - B M|² = tr(R'R) - tr((B'R)' (B'B)^-1 (B'R))."""
        own, bundle, cross = self._values[layer]
        spare = self._num_tokens - own.shape[-1]
        if spare < own.shape[-1]:
            return None
        total = float(np.trace(own, axis1=1, axis2=2).sum())
        fitted = np.linalg.pinv(bundle, rcond=1e-12, hermitian=True) @ cross
        explained = float((cross * fitted).sum())
        # A fit with head_dim parameters per column hides that share of the error.
        return math.sqrt(max(total - explained, 0.0) / total * self._num_tokens / spare)


# ------------------------------------------------------------------------------- report


def measure(
    bundle: Model,
    reference: Model | None,
    text: EvalText,
    *,
    window: int,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Compare, and sum up in plain values, as ``edge-llm eval`` prints and a manifest stores them.

    Returns:
        The figures of `summarize`, ``tokens``, ``bits_per_weight`` (linear layers without the
        lm_head), ``bits_per_weight_with_lm_head``, ``num_bytes`` (linear layers with the lm_head),
        ``confidence`` (95 % intervals), ``layers``, ``kl_by_position``, and which text, window,
        seed and engine they were measured with.
    """
    result = compare(bundle, reference, text, progress)
    manifest = bundle.manifest
    linears = manifest.quantization.linears.values()
    return {
        "name": manifest.name,
        "quantization": manifest.quantization.name,
        "reference": None if reference is None else describe(reference.manifest),
        **summarize(result.positions),
        "tokens": len(result.positions),
        "bits_per_weight": bits_per_weight(manifest, lm_head=False),
        "bits_per_weight_with_lm_head": bits_per_weight(manifest, lm_head=True),
        "num_bytes": sum(info.num_bytes for info in linears),
        "confidence": confidence_intervals(result.positions, seed),
        "layers": [
            {
                "layer": error.layer,
                "key_error": error.key_error,
                "value_error": error.value_error,
            }
            for error in result.layers
        ],
        "kl_by_position": [] if reference is None else kl_by_position(result.positions),
        "text": {"name": text.name, "sha256": text.sha256},
        "window": window,
        "seed": seed,
        "engine": bundle.backend.name,
    }


def describe(manifest: Manifest) -> dict[str, str]:
    """Return what identifies a bundle in a report."""
    return {
        "name": manifest.name,
        "quantization": manifest.quantization.name,
        "files_sha256": hashlib.sha256(
            "".join(info.sha256 for _, info in sorted(manifest.files.items())).encode()
        ).hexdigest(),
    }


# ------------------------------------------------------------------------------- gates


class Gate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Thresholds of a bundle's quality; one that is None is not checked.

    Attributes:
        kl_mean, kl_p99, perplexity_ratio: the largest value that passes.
        top1_agreement, cosine_mean: the smallest value that passes.
        accuracy_loss: the largest loss on a task that passes, as a share of its questions.
    """

    kl_mean: float | None = None
    kl_p99: float | None = None
    perplexity_ratio: float | None = None
    top1_agreement: float | None = None
    cosine_mean: float | None = None
    accuracy_loss: float | None = None


GATES = {
    "fp16": Gate(cosine_mean=0.9999, top1_agreement=0.99, perplexity_ratio=1.005),
    "int8": Gate(cosine_mean=0.99, top1_agreement=0.95, perplexity_ratio=1.02),
    "int4": Gate(cosine_mean=0.97, top1_agreement=0.90, perplexity_ratio=1.06),
}
"""Proposals for models of 1.5B parameters and more; smaller ones lose more."""
_AT_LEAST = ("top1_agreement", "cosine_mean")
_OF_TASKS = ("accuracy_loss",)


def load_gate(name: str, recipe: str) -> Gate:
    """Find a gate.

    Args:
        name: name of a built-in gate, ``recipe`` for the one that fits the bundle's own scheme, or
            the path of a TOML or JSON file with the fields of `Gate`.
        recipe: name of the bundle's quantization, e.g. ``int8``.

    Raises:
        ConfigError: there is no such gate, or the file is not one.
        DependencyError: the file is TOML, on Python 3.10 without ``tomli``.
    """
    if name in GATES:
        return GATES[name]
    if name == "recipe":
        # Kept integers lose nothing, but INT8 inputs may be among them.
        kind = "int8" if recipe == "source" else recipe.split("-")[0]
        if kind not in GATES:
            raise ConfigError(
                f"no built-in gate fits the recipe {recipe!r}; use --gate with one of "
                f"{', '.join(GATES)} or with a file"
            )
        return GATES[kind]
    path = Path(name)
    if path.suffix not in (".toml", ".json"):
        raise ConfigError(
            f"unknown gate {name!r}; use {', '.join(GATES)}, recipe, or a .toml or .json file"
        )
    data = read_text(path)
    try:
        decode = msgspec.toml.decode if path.suffix == ".toml" else msgspec.json.decode
        gate = decode(data, type=Gate)
    except ImportError as error:
        raise DependencyError(
            f"reading {path} needs tomli on this Python; pip install tomli, or write it as .json"
        ) from error
    except MALFORMED as error:
        raise ConfigError(
            f"{path} is not a gate: {error}; its fields are those of --help"
        ) from error
    if gate == Gate():
        raise ConfigError(f"{path} has no threshold; give at least one, e.g. kl_mean = 0.1")
    return gate


def check_gate(gate: Gate, *, task: bool, reference: bool) -> None:
    """Refuse a gate that the run cannot decide, before it runs.

    Args:
        gate: a result of `load_gate`.
        task: whether the run answers a task's questions; otherwise it reads a text.
        reference: whether the run has a reference.

    Raises:
        ConfigError: there is no reference, or a threshold belongs to the other kind of run.
    """
    if not reference:
        raise ConfigError("a gate limits what is lost against a reference; add --against")
    given = [name for name in gate.__struct_fields__ if getattr(gate, name) is not None]
    alien = [name for name in given if (name in _OF_TASKS) != task]
    if alien:
        raise ConfigError(
            f"the gate checks {', '.join(alien)}, which "
            + ("no task measures; use a file with accuracy_loss" if task else "needs --task")
        )


def missed_thresholds(gate: Gate, figures: dict[str, Any]) -> Iterator[str]:
    """Yield a sentence for each threshold that the figures miss; call `check_gate` first."""
    for name in gate.__struct_fields__:
        limit = getattr(gate, name)
        if limit is None:
            continue
        found, at_least = figures[name], name in _AT_LEAST
        if found < limit if at_least else found > limit:
            yield f"{name} {found:.6g} is {'below' if at_least else 'above'} {limit:g}"
