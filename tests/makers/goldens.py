"""Golden references and comparisons for the parity tests; numpy only.

``tools/goldens/references.py`` writes the files, with `transformers` in float32.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

GOLDEN_DIR = Path(__file__).parents[1] / "data" / "golden"
_SMOLLM2 = "smollm2"
_TOP = 20

FP16_KERNELS = platform.machine() == "aarch64"
"""Whether ONNX Runtime's CPU computes FP16 in FP16, rounding after each operator as the graph says.
On x86 it computes in FP32 and leaves out roundings between one operator and the next; each alone
gives the same bits on both machines."""


@dataclass(frozen=True)
class Golden:
    """One sequence of a tiny model: a prompt and its greedy continuation.

    Attributes:
        ids: the sequence, ``[n]``.
        num_prompt: how many of ``ids`` are the prompt.
        logits: of every token but the last, ``[n - 1, vocab]`` float32.
        cache: keys (after RoPE) and values as `Backend.read_slot` returns them,
            ``[2 * layers, kv_heads, n - 1, head_dim]`` float32.
        versions: of the libraries that computed it.
    """

    ids: NDArray[np.int64]
    num_prompt: int
    logits: NDArray[np.float32]
    cache: NDArray[np.float32]
    versions: str

    @property
    def prompt(self) -> NDArray[np.int64]:
        return self.ids[: self.num_prompt]

    @property
    def continuation(self) -> NDArray[np.int64]:
        return self.ids[self.num_prompt :]

    @property
    def margins(self) -> NDArray[np.float32]:
        """Best minus second-best logit at each step of the continuation."""
        best = np.sort(self.logits[self.num_prompt - 1 :], axis=-1)
        margins: NDArray[np.float32] = best[:, -1] - best[:, -2]
        return margins

    def save(self, kind: str) -> None:
        _save(kind, _as_dict(self))

    @classmethod
    def load(cls, kind: str) -> Golden:
        return cls(**_load(kind))


@dataclass(frozen=True)
class PoolingGolden:
    """The tiny models that embed and that judge, on the texts of `tests.makers.tiny_pooling`.

    Attributes:
        vectors: of ``TEXTS``, of length 1, ``[n, hidden]`` float32.
        scores: of ``PAIRS``, ``[m]`` float32.
        versions: of the libraries that computed it.
    """

    vectors: NDArray[np.float32]
    scores: NDArray[np.float32]
    versions: str

    def save(self) -> None:
        _save("pooling", _as_dict(self))

    @classmethod
    def load(cls) -> PoolingGolden:
        return cls(**_load("pooling"))


@dataclass(frozen=True)
class SmolGolden:
    """SmolLM2-135M on one chat prompt; what is too big to commit is sampled.

    Attributes:
        prompt: the user's message.
        ids: the templated prompt and its greedy continuation, ``[n]``.
        num_prompt: how many of ``ids`` are the prompt.
        margins: best minus second-best logit at each step of the continuation.
        positions: where the logits below were taken, ``[p]``.
        top_ids, top_logits: the 20 best at each of ``positions``, ``[p, 20]``.
        log_sum_exp: over the whole vocabulary, ``[p]``.
        cache_positions: rows of the cache below, ``[r]``.
        cache_layers: layers of the cache below, ``[l]``.
        cache: their keys and values, ``[l, 2, kv_heads, r, head_dim]``.
        cache_norms: root mean square of each layer's keys and values over all ``n - 1`` rows,
            ``[2 * layers]``.
        versions: of the libraries that computed it.
    """

    prompt: str
    ids: NDArray[np.int64]
    num_prompt: int
    margins: NDArray[np.float32]
    positions: NDArray[np.int64]
    top_ids: NDArray[np.int64]
    top_logits: NDArray[np.float32]
    log_sum_exp: NDArray[np.float32]
    cache_positions: NDArray[np.int64]
    cache_layers: NDArray[np.int64]
    cache: NDArray[np.float32]
    cache_norms: NDArray[np.float32]
    versions: str

    @property
    def prompt_ids(self) -> NDArray[np.int64]:
        return self.ids[: self.num_prompt]

    @property
    def continuation(self) -> NDArray[np.int64]:
        return self.ids[self.num_prompt :]

    @classmethod
    def build(
        cls,
        prompt: str,
        ids: NDArray[np.int64],
        num_prompt: int,
        logits: NDArray[np.float32],
        cache: NDArray[np.float32],
        margins: NDArray[np.float32],
        versions: str,
    ) -> SmolGolden:
        """Sample a whole forward pass over ``ids[:-1]``."""
        rows = len(ids) - 1
        positions = np.array([1, num_prompt // 2, num_prompt - 1, rows - 1])
        cache_positions = np.array([0, num_prompt - 1, rows - 1])
        num_layers = len(cache) // 2
        layers = np.array([0, num_layers // 2, num_layers - 1])
        top_ids = np.argsort(-logits[positions], axis=-1, kind="stable")[:, :_TOP]
        by_layer = cache.reshape(num_layers, 2, *cache.shape[1:])
        return cls(
            prompt=prompt,
            ids=ids,
            num_prompt=num_prompt,
            margins=margins,
            positions=positions,
            top_ids=top_ids,
            top_logits=np.take_along_axis(logits[positions], top_ids, axis=-1),
            log_sum_exp=log_sum_exp(logits[positions]),
            cache_positions=cache_positions,
            cache_layers=layers,
            cache=by_layer[layers][:, :, :, cache_positions],
            cache_norms=root_mean_square(cache),
            versions=versions,
        )

    @staticmethod
    def save_all(goldens: Sequence[SmolGolden]) -> None:
        _save(
            _SMOLLM2,
            {f"{i}.{key}": x for i, one in enumerate(goldens) for key, x in _as_dict(one).items()},
        )

    @classmethod
    def load_all(cls) -> list[SmolGolden]:
        data = _load(_SMOLLM2)
        count = 1 + max(int(key.split(".")[0]) for key in data)
        names = [field.name for field in fields(cls)]
        return [cls(**{name: data[f"{i}.{name}"] for name in names}) for i in range(count)]


def log_sum_exp(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """``log(sum(exp(logits)))`` over the last axis, computed in float64."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=-1)
    total = np.exp(wide - top[..., None]).sum(axis=-1)
    result: NDArray[np.float32] = (top + np.log(total)).astype(np.float32)
    return result


def root_mean_square(cache: NDArray[np.floating]) -> NDArray[np.float32]:
    """Over everything but the first axis, computed in float64."""
    wide = cache.astype(np.float64).reshape(len(cache), -1)
    result: NDArray[np.float32] = np.sqrt((wide**2).mean(axis=1)).astype(np.float32)
    return result


def assert_close(
    actual: NDArray[np.floating],
    expected: NDArray[np.floating],
    *,
    atol: float,
    min_cosine: float = -1.0,
    what: str,
) -> None:
    """Compare two arrays and say how far apart they are, and where.

    Args:
        actual: what the code under test computed.
        expected: the reference.
        atol: largest absolute difference that passes.
        min_cosine: smallest cosine between vectors along the last axis that passes.
        what: names the comparison in the message.
    """
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    got, want = actual.astype(np.float64), expected.astype(np.float64)
    assert np.isfinite(got).all(), f"{what}: {np.count_nonzero(~np.isfinite(got))} not finite"
    difference = np.abs(got - want)
    worst = np.unravel_index(int(difference.argmax()), difference.shape)
    norms = np.linalg.norm(got, axis=-1) * np.linalg.norm(want, axis=-1)
    cosine = ((got * want).sum(axis=-1) / np.maximum(norms, 1e-300)).min()
    message = (
        f"{what}: differs by {difference.max():.4g} at {tuple(int(i) for i in worst)} "
        f"({got[worst]:.6g}, not {want[worst]:.6g}; allowed {atol:.4g}), "
        f"mean difference {difference.mean():.3g}, lowest cosine {cosine:.7f} "
        f"(allowed {min_cosine})"
    )
    assert difference.max() <= atol, message
    assert cosine >= min_cosine, message


def assert_same_ids(
    actual: Sequence[int] | NDArray[np.int64],
    expected: NDArray[np.int64],
    margins: NDArray[np.float32],
    what: str,
) -> None:
    """Compare greedy continuations; the message tells an arithmetic error from a near tie."""
    got, want = [int(i) for i in actual], [int(i) for i in expected]
    if got == want:
        return
    pairs = zip(got, want, strict=False)
    step = next((i for i, pair in enumerate(pairs) if pair[0] != pair[1]), None)
    assert step is not None, f"{what}: {len(got)} tokens, not {len(want)}; the common part agrees"
    raise AssertionError(
        f"{what}: step {step} of {len(want)} is token {got[step]}, not {want[step]}; the reference "
        f"prefers its token by {margins[step]:.4f} in the logits (narrowest: {margins.min():.4f})"
    )


def _as_dict(golden: Golden | SmolGolden | PoolingGolden) -> dict[str, Any]:
    return {field.name: getattr(golden, field.name) for field in fields(golden)}


def _save(name: str, values: dict[str, Any]) -> None:
    arrays: dict[str, Any] = {}
    for key, value in values.items():
        array = np.asarray(value)
        arrays[key] = array.astype(np.int32) if array.dtype == np.int64 else array
    np.savez_compressed(GOLDEN_DIR / f"{name}.npz", **arrays)


def _load(name: str) -> dict[str, Any]:
    with np.load(GOLDEN_DIR / f"{name}.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    widened = {
        key: array.astype(np.int64) if array.dtype == np.int32 else array
        for key, array in arrays.items()
    }
    return {key: array.item() if array.ndim == 0 else array for key, array in widened.items()}
