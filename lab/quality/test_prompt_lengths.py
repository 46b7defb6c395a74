"""Every length of a prompt from 1 to 2,048, padded to the steps that are captured, on the stand-in.

The tests of the runner hold this for steps of at most 24 tokens; these have an engine's real sizes.
All prompts are prefixes of one text, so that one pass over it, in steps that are not padded, has
what each must answer, and the steps that prompts share run once: under five minutes of CPU time.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from edge.backends.step import step_after
from engines.builder.build import build_engine
from engines.builder.target import Target
from engines.config import BuildConfig
from tests.conftest import require_kernels
from tests.edge.backends.tensorrt.gpu_runner import DIALECTS, SHAPES_ATOL, GpuRunner
from tests.engines.own_builds import export, gpu, target  # noqa: F401
from tests.makers.tiny_models import write_checkpoint
from tests.standins.cuda import FakeGpu
from tests.standins.slot_rows import by_name, stacked

STEP, LONGEST, CAPACITY = 512, 2048, 2560
SCORED = 64  # tokens of a step whose logits are all had
TEXT = np.random.default_rng(0).integers(3, 256, (1, CAPACITY))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("prompt-lengths")
    source = write_checkpoint(root / "source", "qwen2", max_position_embeddings=2 * CAPACITY)
    return {
        dialect: export(source, root / dialect, dialect=dialect, kv_capacity=CAPACITY)
        for dialect in DIALECTS
    }


@pytest.fixture(params=["tensorrt", "own"])
def kernels(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=DIALECTS)
def built(
    request: pytest.FixtureRequest,
    bundles: dict[str, Path],
    kernels: str,
    target: Target,  # noqa: F811
    tmp_path: Path,
) -> Iterator[Path]:
    """A bundle with one engine of 4 slots."""
    require_kernels(request.param)
    bundle = Path(shutil.copytree(bundles[request.param], tmp_path / "bundle"))
    config = BuildConfig(bundle, max_batch=4, max_prefill=STEP, kernels=kernels)  # type: ignore[arg-type]
    info = build_engine(config, target=target).info
    assert bool(info.own_linears) == (kernels == "own")
    yield bundle
    shutil.rmtree(bundle)


def read(runner: GpuRunner, slot: int, start: int, end: int, logits: int = 1) -> NDArray[Any]:
    """Logits of the last tokens, once these tokens of the text are read."""
    places = np.arange(end - start - logits, end - start)[None]
    step = step_after([slot], [start], runner.table[TEXT[:, start:end]], places)
    return np.array(runner.backend.forward(step)[0])


def unpadded(bundle: Path, gpu: FakeGpu) -> tuple[NDArray[Any], NDArray[Any]]:  # noqa: F811
    """Logits behind each token of the text, and all rows of the cache."""
    with GpuRunner(bundle, gpu, use_cuda_graphs=False, num_slots=1) as plain:
        rows = [
            read(plain, 0, start, start + SCORED, SCORED) for start in range(0, CAPACITY, SCORED)
        ]
        return np.concatenate(rows), stacked(plain.backend.read_slot(0, CAPACITY))


def check(found: NDArray[Any], expected: NDArray[Any]) -> int:
    """Compare logits; returns how many rows have a best token beyond doubt, which is the same."""
    assert_allclose(found, expected, atol=SHAPES_ATOL, rtol=0)
    second, best = np.sort(expected)[:, -2:].T
    clear = best - second > 2 * SHAPES_ATOL
    assert (found.argmax(-1) == expected.argmax(-1))[clear].all()
    return int(clear.sum())


def test_every_length_gives_the_tokens_of_unpadded_steps(
    built: Path,
    gpu: FakeGpu,  # noqa: F811
) -> None:
    expected, _ = unpadded(built, gpu)
    with GpuRunner(built, gpu, num_slots=1) as ours:
        assert ours.engine.graphs_disabled is None
        gpu.calls.clear()
        found = [
            read(ours, 0, (length - 1) // STEP * STEP, length) for length in range(1, LONGEST + 1)
        ]
        assert gpu.calls.count("cuGraphLaunch") == LONGEST
    assert check(np.concatenate(found), expected[:LONGEST]) > 0.9 * LONGEST


def test_starts_up_to_the_capacity_of_any_slot(built: Path, gpu: FakeGpu) -> None:  # noqa: F811
    """Also where padding would pass the end of the cache, and where rows come from elsewhere."""
    expected, rows = unpadded(built, gpu)
    random = np.random.default_rng(1)
    with GpuRunner(built, gpu, num_slots=4) as ours:
        capacity, ends, found = ours.engine.capacity, [], []
        for slot in range(4):
            ours.backend.write_slot(slot, by_name(rows[:, :, :capacity]))
        for number in range(60):
            length = int(random.integers(1, STEP + 1))
            start = int(random.integers(0, capacity - length + 1))
            start = capacity - length if number % 3 == 0 else start
            found.append(read(ours, int(random.integers(4)), start, start + length))
            ends.append(start + length - 1)
    assert check(np.concatenate(found), expected[ends]) > 0.9 * len(ends)
