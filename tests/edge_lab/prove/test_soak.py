"""A leak is found whatever hides it, and memory that only moves is none."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from edge.bundle.embeddings import EmbeddingTable
from edge_lab.prove import soak
from edge_lab.prove.soak import ANSWER_TOKENS, MAX_GROWTH_BYTES, Memory, judge, theil_sen
from tests.conftest import Bundles
from tests.standins.scripted_backend import ScriptedBackend

GB = 1 << 30


def memory(
    used: Callable[[int], float], prompts: int = 500, *, device: bool = True, cache: int = 0
) -> Memory:
    """What is left of 64 GB; the page cache takes ``cache`` bytes of the driver's figure each."""
    found = Memory()
    for index in range(prompts):
        left = 64 * GB - round(used(index))
        found.available.append(left)
        found.device_free.append(left - cache * index if device else None)
        found.rss.append(GB + (0 if device else round(used(index))))
    return found


def noise(seed: int, size: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 20e6, size)


@pytest.mark.parametrize("integrated", [True, False])
def test_a_module_that_leaks_per_prompt_is_found(integrated: bool):
    """20 kB for each of 169 plugins, as public reports have it, under 20 MB of noise."""
    shaken = noise(1, 500)
    growth = judge(memory(lambda i: 169 * 20e3 * i + shaken[i]), integrated=integrated)
    assert growth.grows
    assert growth.bytes_per_prompt == pytest.approx(169 * 20e3, rel=0.1)
    assert growth.source == ("available" if integrated else "device_free")


@pytest.mark.parametrize(
    "used",
    [
        lambda i: 0,
        lambda i: min(i, 40) * 30e6,  # caches that fill
        *(
            lambda i, at=at: 3e9 * (i > at) for at in (101, 200, 299, 300, 301, 498)
        ),  # a program began
        lambda i: noise(2, 500)[i],
        lambda i: -50e3 * i,  # memory that others give back
    ],
)
def test_memory_that_only_fluctuates_is_no_leak(used: Callable[[int], float]):
    assert judge(memory(used), integrated=True).grows is False


def test_the_page_cache_that_fills_is_no_leak_where_cpu_and_gpu_share_the_memory():
    filling = memory(lambda _: 0, cache=1 << 20)
    assert judge(filling, integrated=True).grows is False
    assert judge(filling, integrated=False).grows is True


def test_without_a_gpu_the_process_is_judged():
    growth = judge(memory(lambda i: 2 * MAX_GROWTH_BYTES * i, device=False), integrated=True)
    assert (growth.source, growth.grows) == ("rss", True)


def test_few_prompts_give_no_verdict():
    assert judge(memory(lambda i: 1e9 * i, prompts=99), integrated=True).grows is None
    assert judge(memory(lambda i: 1e9 * i, prompts=100), integrated=True).grows is True
    assert judge(Memory(), integrated=True).grows is None


def test_theil_sen_is_the_median_of_all_slopes():
    values = [0.0, 1.0, 2.0, 100.0, 4.0]
    slopes = sorted(
        (b - a) / (j - i) for i, a in enumerate(values) for j, b in enumerate(values) if j > i
    )
    assert theil_sen(values) == pytest.approx((slopes[4] + slopes[5]) / 2)
    assert theil_sen([]) == theil_sen([5.0]) == 0.0


@pytest.fixture
def table(tiny_bundles: Bundles) -> Iterator[EmbeddingTable]:
    with closing(EmbeddingTable(tiny_bundles("qwen2") / "embeddings.safetensors")) as opened:
        yield opened


def test_every_prompt_has_a_random_length_and_its_whole_answer(table: EmbeddingTable):
    backend = ScriptedBackend(table, lambda tokens: tokens[-1], capacity=64, max_step_tokens=64)
    found, done = soak.soak(
        backend,
        table,
        table.vocab_size,
        prompts=120,
        seconds=1e9,
        most_tokens=1024,
        read_device_free=lambda: 1,
    )
    prompts = [seq for start, seq in backend.steps if start == 0]
    assert len(prompts) == done["prompts"] == len(found.rss) == 120
    assert len(set(prompts)) > 30
    assert max(prompts) <= 64 - ANSWER_TOKENS  # prompt and answer fit into the cache
    assert sum(prompts) == done["prompt_tokens"]
    assert len(backend.steps) == 120 * (1 + ANSWER_TOKENS)
    assert max(start + seq for start, seq in backend.steps) <= 64
    assert found.device_free == [1] * 120


def test_no_prompt_begins_when_the_time_is_over(table: EmbeddingTable):
    ticks = iter(range(1000))
    backend = ScriptedBackend(table, lambda tokens: tokens[-1], max_step_tokens=64)
    found, done = soak.soak(
        backend,
        table,
        table.vocab_size,
        prompts=500,
        seconds=20,
        most_tokens=8,
        read_device_free=lambda: None,
        clock=lambda: float(next(ticks)),
    )
    assert done["prompts"] == 20 == len(found.available)


def test_a_bundle_is_soaked_and_one_that_leaks_ends_with_3(
    tiny_bundles: Bundles, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    arguments = [str(tiny_bundles("qwen2")), "--prompts", "110", "--most-tokens", "8"]
    assert soak.main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["backend"], found["prompts"]) == ("ort-cpu", 110)
    assert len(found["bytes"]["rss"]) <= 55
    leaked = iter(range(0, 1 << 40, 1 << 20))
    monkeypatch.setattr(soak, "read_rss_bytes", lambda: next(leaked))
    assert soak.main(arguments) == 3
    captured = capsys.readouterr()
    assert json.loads(captured.out)["growth"]["grows"] is True
    assert "error: memory grows by 1,049 kB per prompt (rss)" in captured.err
    assert soak.main([*arguments[:1], "--prompts", "9", "--most-tokens", "8"]) == 3
    assert "9 prompts in" in capsys.readouterr().err


def test_a_bundle_that_is_not_there_is_an_error_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert soak.main([str(tmp_path / "none")]) == 65
    assert capsys.readouterr().err.startswith("soak: error: ")
