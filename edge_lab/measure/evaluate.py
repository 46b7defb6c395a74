"""Computes how far a bundle is from its reference, teacher-forced on a text new to both.

The text is cut into independent windows, which `edge_lab.measure.compare` runs. Confidence
intervals are bootstrap percentiles over blocks of up to 64 consecutive positions, since the errors
of neighbours depend on each other (Künsch, 1989, without overlap).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edge.bundle.manifest import Manifest
from edge.errors import ConfigError, DependencyError
from edge.files import MALFORMED
from edge_make.text_file import read_text_file

from .compare import Comparison, Positions, num_scored

_RESAMPLES = 1000
_CONFIDENCE = 0.95
_CURVE_POINTS = 32
_MAX_TEXT_BYTES = 1 << 28


# ------------------------------------------------------------------------------- pure figures


def bits_per_weight(manifest: Manifest, *, lm_head: bool) -> float:
    """Compute the stored bits per weight of the linear layers, scales included."""
    chosen = [
        info for name, info in manifest.quantization.linears.items() if lm_head or name != "lm_head"
    ]
    return 8 * sum(info.num_bytes for info in chosen) / sum(math.prod(i.shape) for i in chosen)


def summarize(positions: Positions) -> dict[str, float | None]:
    """Compute the figures of a set of positions; some are None without a reference."""
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
    """Compute 95 % bootstrap intervals of the figures of `summarize`; a seed fixes them.

    A single block has no spread, so it gives no intervals.
    """
    starts = np.flatnonzero(np.diff(positions.block, prepend=-1))
    members = np.split(np.arange(len(positions)), starts[1:])
    if len(members) < 2:
        return {}
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


# ------------------------------------------------------------------------------- the text


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
        return num_scored(self.windows)


def read_text(path: Path) -> str:
    """Read a UTF-8 text.

    Raises:
        ConfigError: the file cannot be read, or is not UTF-8.
    """
    try:
        return read_text_file(path, _MAX_TEXT_BYTES)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; name a UTF-8 text") from error


def cut_windows(
    ids: Sequence[int], window: int, prefix: Sequence[int] = (), limit: int | None = None
) -> list[list[int]]:
    """Cut a text into windows of at most ``window`` tokens, ``prefix`` (the begin token) included.

    Args:
        ids: the text's tokens.
        window: tokens per window; more than the prefix and at least 2.
        prefix: tokens to put before each window.
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


# ------------------------------------------------------------------------------- report


def measure(
    result: Comparison,
    manifest: Manifest,
    reference: Manifest | None,
    text: EvalText,
    *,
    window: int,
    engine: str,
    seed: int = 0,
) -> dict[str, Any]:
    """Sum up a comparison in plain values, as ``edge-llm eval`` prints and a manifest stores them.

    Args:
        result: the comparison.
        manifest: manifest of the bundle.
        reference: manifest of the reference, if there was one.
        text: the text that was read.
        window: most tokens of a window.
        engine: name of the engine that computed.
        seed: seed of the bootstrap.

    Returns:
        The figures of `summarize`, and ``tokens``; ``bits_per_weight`` (linear layers without the
        lm_head) and ``bits_per_weight_with_lm_head``; ``num_bytes`` (linear layers with the
        lm_head); ``confidence`` (95 % intervals), ``layers`` and ``kl_by_position``; and the text,
        window, seed and engine they were measured with.
    """
    linears = manifest.quantization.linears.values()
    return {
        "name": manifest.name,
        "quantization": manifest.quantization.name,
        "reference": None if reference is None else describe(reference),
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
        "engine": engine,
    }


def describe(manifest: Manifest) -> dict[str, str]:
    """Return the keys that identify a bundle in a report."""
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


def gate_of_recipe(recipe: str) -> str:
    """Name the built-in gate for a recipe, if there is one."""
    # Kept integers lose nothing, but INT8 inputs may be among them.
    return {"source": "int8", "bf16": "fp16"}.get(recipe, recipe.split("-")[0])


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
        kind = gate_of_recipe(recipe)
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
    """Yield a sentence for each threshold that the figures miss; call `check_gate` first.

    A built-in gate says whether an export did damage, and says the same on every machine: it judges
    ``bundle_alone`` where that exists. A gate from a file limits what is served, even with the same
    thresholds as a built-in one.
    """
    if any(gate is built_in for built_in in GATES.values()):
        figures = figures.get("bundle_alone", figures)
    for name in gate.__struct_fields__:
        limit = getattr(gate, name)
        if limit is None:
            continue
        found, at_least = figures[name], name in _AT_LEAST
        if found < limit if at_least else found > limit:
            yield f"{name} {found:.6g} is {'below' if at_least else 'above'} {limit:g}"
