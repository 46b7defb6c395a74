"""A deterministic backend on real ONNX Runtime: the same bits, whatever runs beside a token."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from edge import LLM, SamplingParams
from edge.backends import Step
from edge.backends.ort import cpu, even_rows
from edge.backends.ort.even_rows import cut_groups, find_unevenness
from edge.backends.step import step_after
from edge.bundle.manifest import read_manifest
from edge.bundle.onnx_values import node_attributes
from edge.errors import BackendError, ConfigError
from export.pipeline import ExportConfig, export_checkpoint
from tests.conftest import FEW_TOKENS, Bundles, Checkpoints, require_even_rows, require_kernels
from tests.edge.backends.runner import Runner, random_ids

QUANTS = ("fp16", "int4", "int8", "int8-w8a8")


@pytest.fixture(autouse=True)
def native() -> None:
    """Attention in one operator is what makes it possible."""
    require_kernels("native")


@pytest.fixture
def even() -> None:
    require_even_rows()


@pytest.fixture(scope="module")
def grouped(tiny_checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A bundle with groups of 64, which are the whole width of the tiny model."""
    paths: dict[str, Path] = {}

    def bundle(quant: Any) -> Path:
        if quant not in paths:
            paths[quant] = tmp_path_factory.mktemp("grouped") / quant
            export_checkpoint(
                ExportConfig(
                    source=str(tiny_checkpoints("qwen2")),
                    output=paths[quant],
                    quant=quant,
                    group_size=64,
                    method="rtn" if quant == "int4" else None,
                    calibration_tokens=FEW_TOKENS if quant == "int8-w8a8" else None,
                    dialect="native",
                    kv_capacity=128,
                )
            )
        return paths[quant]

    return bundle


@pytest.mark.usefixtures("even")
@pytest.mark.parametrize("quant", QUANTS)
def test_a_token_is_computed_the_same_whatever_runs_beside_it(quant: str, tiny_bundles: Bundles):
    ids = random_ids(1, 72)

    with Runner(tiny_bundles("qwen2", "native", quant=quant), deterministic=True) as runner:

        def prompt(slot: int, sizes: list[int]) -> NDArray[np.float32]:
            runner.lengths[slot] = 0
            found = []
            for end in np.cumsum(sizes):
                start = runner.lengths[slot]
                found.append(last_logits(runner, ids[:, start:end], slot))
            return found[-1]

        whole = prompt(0, [64])
        rows = runner.cache(0).copy()
        alone = [last_logits(runner, ids[:, 64 + i : 65 + i], 0) for i in range(4)]

        @settings(max_examples=15, deadline=None)
        @given(
            st.lists(st.integers(1, 31), unique=True, max_size=5),
            st.permutations(range(4)),
            st.integers(1, 4),
        )
        def check(halves: list[int], order: list[int], count: int) -> None:
            cuts = np.diff([0, *(2 * half for half in sorted(halves)), 64]).tolist()
            slots = order[:count]
            for slot in slots:
                np.testing.assert_array_equal(prompt(slot, cuts), whole)
                np.testing.assert_array_equal(runner.cache(slot), rows)
            for i in range(4):
                token = np.repeat(ids[:, 64 + i : 65 + i], count, axis=0)
                for logits in runner.step(token, slots):
                    np.testing.assert_array_equal(logits[0], alone[i])

        check()


def last_logits(runner: Runner, ids: NDArray[np.int64], slot: int) -> NDArray[np.float32]:
    start, last = runner.lengths[slot], np.array([[ids.shape[1] - 1]])
    logits = runner.backend.forward(step_after([slot], [start], runner.table[ids], last))
    runner.lengths[slot] += ids.shape[1]
    return np.array(logits[0, 0])


@pytest.mark.usefixtures("even")
@pytest.mark.parametrize("quant", ["int4", "int8"])
def test_smaller_groups_are_the_same_weights(quant: str, grouped: Any):
    bundle = grouped(quant)
    ids = random_ids(1, 20)
    exact = {"int8_activations": False}
    with Runner(bundle, **exact) as plain, Runner(bundle, deterministic=True, **exact) as ours:
        assert_allclose(ours.step(ids), plain.step(ids), atol=2e-4, rtol=0)
    graph = cpu.load_cpu_graph(
        bundle, read_manifest(bundle), 64, fuse_attention=True, int8_activations=True
    )
    before = sizes_of_groups(graph)
    cut_groups(graph, bundle)
    assert 64 in before
    assert len(sizes_of_groups(graph)) == len(before)
    assert set(sizes_of_groups(graph)) == {32}


def sizes_of_groups(graph: Any) -> list[int]:
    graph.prune()
    found = (node_attributes(node).get("block_size") for node in graph.nodes)
    return [size for size in found if size]


class Company:
    """A backend whose numbers change where the given rule says so."""

    def __init__(self, runner: Runner, changes: Any) -> None:
        self.backend, self.changes = runner.backend, changes
        self.num_slots, self.capacity = self.backend.num_slots, self.backend.capacity
        self.max_step_tokens = self.backend.max_step_tokens

    def forward(self, step: Step) -> NDArray[np.float32]:
        logits = self.backend.forward(step)
        return np.nextafter(logits, np.float32(1e9)) if self.changes(step) else logits

    def read_slot(self, slot: int, length: int) -> Any:
        return self.backend.read_slot(slot, length)


@pytest.mark.usefixtures("even")
@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (lambda step: False, None),
        (lambda step: step.batch == 3, "3 sequences in one step"),
        (lambda step: step.batch == step.seq == 1, "2 sequences in one step"),
        (lambda step: step.seq == 3, "in chunks of 3 and 3"),
        (lambda step: step.seq == 6, "in chunks of 2 and 4"),
    ],
)
def test_a_last_bit_is_noticed(changes: Any, found: str | None, tiny_bundles: Bundles):
    with Runner(tiny_bundles("qwen2", "native", quant="int4"), deterministic=True) as runner:
        told = find_unevenness(Company(runner, changes), 64)  # type: ignore[arg-type]
    assert (told is None) == (found is None)
    assert found is None or (told is not None and found in told)


@pytest.mark.usefixtures("even")
def test_a_lone_token_gets_company_where_it_needs_some(
    tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    batches: list[int] = []
    forward = cpu._HostStep.run

    def uneven(self: Any, step: Step) -> NDArray[np.float32]:
        batches.append(step.batch)
        logits = forward(self, step)
        return np.nextafter(logits, np.float32(1e9)) if step.batch == step.seq == 1 else logits

    monkeypatch.setattr(cpu._HostStep, "run", uneven)
    bundle = tiny_bundles("qwen2", "native", quant="int4")
    with Runner(bundle, deterministic=True) as runner:
        ids = random_ids(1, 8)
        for slot in (0, 3):
            runner.step(ids, [slot])
        kept = [runner.cache(slot).copy() for slot in (0, 3)]
        batches.clear()
        for slot in (0, 3):
            runner.step(ids[:, :1], [slot])
            runner.lengths[slot] -= 1
        assert batches == [2, 2]
        for slot, rows in zip((0, 3), kept, strict=True):
            np.testing.assert_array_equal(runner.cache(slot), rows)
    with Runner(bundle, deterministic=True, num_slots=1) as runner:  # nobody is ever beside it
        runner.step(ids)
        batches.clear()
        runner.step(ids[:, :1])
        assert batches == [1]


@pytest.mark.usefixtures("even")
@pytest.mark.parametrize("sizes", [{"max_step_tokens": 3}, {"kv_capacity": 4}])
def test_the_trial_fits_short_steps_and_small_slots(sizes: dict[str, int], tiny_bundles: Bundles):
    with Runner(tiny_bundles("qwen2", "native", quant="int4"), deterministic=True, **sizes) as ours:
        assert ours.step(random_ids(1, 3)).shape[1] == 3


@pytest.mark.usefixtures("even")
def test_kernels_that_cannot_be_evened_are_refused(
    tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(even_rows, "find_unevenness", lambda *_: "2 sequences in one step")
    with pytest.raises(BackendError, match="leave deterministic out"):
        Runner(tiny_bundles("qwen2", "native", quant="int4"), deterministic=True)


def test_another_machine_than_x86_64_is_refused(
    tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(BackendError, match="x86-64 only, and this is aarch64"):
        Runner(tiny_bundles("qwen2", "native", quant="int4"), deterministic=True)


@pytest.mark.usefixtures("even")
def test_a_request_gets_the_same_answer_alone_and_beside_others(tiny_bundles: Bundles):
    bundle = tiny_bundles("qwen2", "native", quant="int4")
    prompts = [random_ids(5 + 7 * i, seed=i).tolist() for i in range(6)]
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=24)
    with LLM(bundle, deterministic=True, num_slots=1, reuse_prefix=False) as llm:
        alone = [list(llm.generate_ids(prompt, params)) for prompt in prompts]
    with (
        LLM(bundle, deterministic=True, num_slots=4, prefill_chunk=8) as llm,
        ThreadPoolExecutor(len(prompts)) as pool,
    ):
        for _ in range(2):  # the second time with cached rows
            together = pool.map(lambda prompt: list(llm.generate_ids(prompt, params)), prompts)
            assert list(together) == alone


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prefill": "int8"}, "prefill int8 rounds"),
        ({"speculative": 4}, "speculative or draft computes"),
        ({"prefix_dir": "x"}, "prefix_dir brings"),
        ({"prefill_chunk": 2}, "takes 3"),
        ({"backend": "tensorrt"}, "computes on the GPU"),
    ],
)
def test_what_it_excludes_is_refused(options: dict[str, Any], words: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=words):
        LLM(tmp_path, deterministic=True, **options)


def test_attention_of_several_operators_is_refused(tiny_bundles: Bundles):
    with pytest.raises(ConfigError, match="needs a bundle of dialect native"):
        Runner(tiny_bundles("qwen2", "portable", quant="int4"), deterministic=True)
