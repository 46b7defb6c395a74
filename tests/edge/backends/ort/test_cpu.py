"""The CPU backend: its cache, its batches and what it refuses; numbers are `test_parity`'s."""

from __future__ import annotations

import gc
import hashlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from edge.backends.ort import cpu
from edge.backends.ort.cpu import OrtBackend
from edge.backends.step import step_after
from edge.bundle.manifest import read_manifest
from edge.errors import BackendError, ConfigError
from tests.conftest import RUNNABLE, TINY_KV_CAPACITY, Bundles, require_huge_pages
from tests.edge.backends.runner import Runner, check_slots_apart, random_ids
from tests.makers.tiny_models import KINDS, Kind
from tests.standins.slot_rows import by_name, stacked

# Sums of at most 128 products of size one in another order; measured 8e-6.
ATOL = 5e-5


@pytest.fixture
def runner(variant: str, tiny_bundles: Bundles) -> Iterator[Runner]:
    with open_runner(tiny_bundles, "qwen2", variant) as opened:
        yield opened


def open_runner(bundles: Bundles, kind: Kind, variant: str, **options: Any) -> Runner:
    return Runner(
        bundles(kind, variant.split()[0]), fuse_attention=variant == "native fused", **options
    )


_SHOW_MEMORY = """
import sys
from pathlib import Path
import numpy as np
from edge.backends.ort import cpu
from edge.backends.step import step_after
from edge.bundle.manifest import read_manifest
bundle = Path(sys.argv[1])
if "small" in sys.argv:
    cpu.collapse_filled = lambda _: ()
manifest = read_manifest(bundle)
backend = cpu.OrtBackend(bundle, manifest)
embeds = np.zeros((1, 1, manifest.model.hidden_size), np.float32)
for row in range(40):
    backend.forward(step_after([0], [row], embeds, np.array([[0]])))
print(Path("/proc/self/smaps_rollup").read_text(), end="")
"""


@pytest.mark.slow
def test_weights_are_in_huge_pages_and_take_no_more_memory(smollm2_bundle: Path):
    """SmolLM2 in fp16, whose weights the CPU holds in fp32, in processes of their own."""
    require_huge_pages()
    resident, huge = {}, {}
    for pages in ("small", "huge"):
        command = [sys.executable, "-c", _SHOW_MEMORY, str(smollm2_bundle), pages]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        kib = dict(line.split()[:2] for line in done.stdout.splitlines())
        resident[pages], huge[pages] = int(kib["Anonymous:"]), int(kib["AnonHugePages:"])
    assert huge["huge"] >= 0.6 * resident["huge"]  # nearly all, but a crowded machine has fewer
    assert resident["huge"] == pytest.approx(resident["small"], rel=0.03)


def test_pages_become_huge_after_each_step_but_the_first(
    tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    made = []

    def pieces(_: int) -> Iterator[int]:
        for number in range(2):
            made.append(number)
            yield number

    monkeypatch.setattr(cpu, "collapse_filled", pieces)
    with open_runner(tiny_bundles, "qwen2", RUNNABLE) as runner:
        counts = []
        for number in range(4):
            runner.step(random_ids(1, 1, seed=number))
            counts.append(len(made))
    assert counts == [0, 1, 2, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_its_sequences_alone(kind: Kind, variant: str, tiny_bundles: Bundles):
    """Batched prefill, then chunks behind unequal pasts, then decode; slots out of order."""
    slots = [3, 0, 2]
    ids = random_ids(3, 24)
    chunks = [slice(0, 9), slice(9, 14), slice(14, 15), slice(15, 22), slice(22, 23)]
    with (
        open_runner(tiny_bundles, kind, variant) as batched,
        open_runner(tiny_bundles, kind, variant) as alone,
    ):
        # A head start for one of two neighbours, which run as one batch.
        head = random_ids(1, 7, seed=1)
        together = [batched.step(head, [2])]
        together += [batched.step(ids[:, chunk], slots) for chunk in chunks]
        alone.step(head, [2])
        for row, slot in enumerate(slots):
            logits = alone.step(ids[row : row + 1, :23], [slot])[0]
            found = np.concatenate([step[row] for step in together[1:]])
            assert_allclose(found, logits, atol=ATOL, rtol=0)
            assert_allclose(batched.cache(slot), alone.cache(slot), atol=ATOL, rtol=0)


def test_padding_after_a_short_sequence_changes_nothing(runner: Runner):
    """Rows of padding are written, never read, and overwritten by the tokens that follow."""
    ids = random_ids(2, 12)
    valid = 5  # tokens of the second sequence
    found = []
    for junk in (random_ids(7, seed=3), np.full(7, 299)):
        runner.lengths = [0] * 4
        ids[1, valid:] = junk
        first = runner.step(ids, [1, 2])
        runner.lengths[2] = valid
        second = runner.step(random_ids(2, 1, seed=4), [1, 2])  # decode
        third = runner.step(random_ids(2, 3, seed=5), [1, 2])  # a chunk behind unequal pasts
        found.append([first[0], first[1, :valid], second, third, runner.cache(1), runner.cache(2)])
    for one, other in zip(*found, strict=True):
        assert_array_equal(one, other)


def test_slots_do_not_touch_each_other(runner: Runner):
    check_slots_apart(runner)


def test_read_write_and_copy_of_a_slot(runner: Runner):
    ids = random_ids(1, 33)
    runner.step(ids, [2])
    rows = runner.cache(2)
    model = runner.manifest.model
    assert rows.shape == (
        2 * model.num_layers,
        model.attentions()[0].kv_heads,
        33,
        model.attentions()[0].dim,
    )
    assert rows.any(axis=(1, 3)).all()

    runner.backend.write_slot(0, by_name(rows))
    runner.backend.copy_slot(2, 3, 20)
    assert_array_equal(stacked(runner.backend.read_slot(0, 33)), rows)
    assert_array_equal(stacked(runner.backend.read_slot(3, 20)), rows[:, :, :20])
    assert not stacked(runner.backend.read_slot(0, TINY_KV_CAPACITY))[:, :, 33:].any()
    assert not stacked(runner.backend.read_slot(3, TINY_KV_CAPACITY))[:, :, 20:].any()

    # What was copied is as good as what was computed, and is a copy.
    runner.lengths = [33, 0, 33, 20]
    following = random_ids(1, 2, seed=1)
    expected = runner.step(following, [2])
    assert_array_equal(runner.step(following, [0]), expected)
    runner.step(ids[:, 20:], [3])
    assert_allclose(runner.step(following, [3]), expected, atol=ATOL, rtol=0)
    rows[...] = 0
    assert stacked(runner.backend.read_slot(2, 33)).any()


def test_the_last_row_of_the_cache_is_usable(runner: Runner):
    ids = random_ids(1, TINY_KV_CAPACITY)
    whole = runner.step(ids, [3])
    runner.lengths[3] -= 1
    last = runner.step(ids[:, -1:], [3])
    assert_allclose(last[0, 0], whole[0, -1], atol=ATOL, rtol=0)


def test_wrong_steps_are_refused_before_the_engine_runs(runner: Runner):
    """The operators write where they are told to: past the end is someone else's memory."""
    backend = runner.backend
    end = TINY_KV_CAPACITY
    for slot in range(4):
        backend.write_slot(slot, by_name(np.full_like(stacked(backend.read_slot(slot, end)), 7)))
    engine, backend._session = backend._session, NotToBeUsed()

    def step(slot: int, first: int, seq: int, kv_len: int | None = None) -> None:
        embeds = np.zeros((1, seq, runner.manifest.model.hidden_size), np.float16)
        made = step_after([slot], [first], embeds, np.zeros((1, 1), np.int64))
        backend.forward(made if kv_len is None else replace(made, kv_len=kv_len))

    for arguments, message in (
        ((0, end, 1), f"positions {end}..{end} does not fit a cache of {end} rows"),
        ((0, end - 4, 5), "does not fit"),
        ((3, 2**40, 1), "does not fit"),
        ((0, 5, 1, end + 1), f"reads {end + 1} rows exceeds the cache of {end}"),
        ((0, 0, 513), "does not fit"),
        ((4, 0, 1), "not slots of the 4"),
        ((-1, 0, 1), "not slots of the 4"),
    ):
        with pytest.raises(BackendError, match=message):
            step(*arguments)
    backend.max_step_tokens = 8
    with pytest.raises(BackendError, match="9 tokens exceeds max_step_tokens 8"):
        step(0, 0, 9)
    backend._session = engine
    for slot in range(4):
        assert (stacked(backend.read_slot(slot, end)) == 7).all()


class NotToBeUsed:
    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the engine was asked for {name}")


def test_an_engine_that_fails_is_a_backend_error(runner: Runner, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(runner.backend, "_session", Fails(runner.backend._session))
        with pytest.raises(BackendError, match=r"ONNX Runtime failed on a step of \(1, 3\) tokens"):
            runner.step(random_ids(1, 3))
    runner.step(random_ids(1, 3))  # and goes on


class Fails:
    def __init__(self, session: Any) -> None:
        self.io_binding = session.io_binding

    def run_with_iobinding(self, binding: Any) -> None:
        raise RuntimeError("no such kernel")


@pytest.mark.parametrize("capacity", [24, 256])
def test_another_capacity_leaves_the_files_alone(
    capacity: int, variant: str, tiny_bundles: Bundles
):
    bundle = tiny_bundles("llama", variant.split()[0])
    before = digests(bundle)
    ids = random_ids(1, 24)
    with (
        open_runner(tiny_bundles, "llama", variant) as plain,
        open_runner(tiny_bundles, "llama", variant, kv_capacity=capacity) as other,
    ):
        assert other.backend.capacity == capacity
        assert other.backend.cache_bytes * TINY_KV_CAPACITY == plain.backend.cache_bytes * capacity
        assert_allclose(other.step(ids), plain.step(ids), atol=ATOL, rtol=0)
        other.lengths[0] = capacity
        with pytest.raises(BackendError, match="does not fit"):
            other.step(ids[:, :1])
    assert digests(bundle) == before


def digests(bundle: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in bundle.iterdir()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_capacity": 257}, "257 is out of range: this model takes 2 to 256"),
        ({"kv_capacity": 1}, "out of range"),
        ({"num_slots": 0}, "num_slots"),
        ({"max_step_tokens": 0}, "max_step_tokens"),
        ({"num_threads": 0}, "num_threads"),
        ({"num_threads": -1}, "num_threads"),
    ],
)
def test_numbers_out_of_range(options: dict[str, Any], message: str, tiny_bundles: Bundles):
    bundle = tiny_bundles("qwen2")
    with pytest.raises(ConfigError, match=message):
        OrtBackend(bundle, read_manifest(bundle), **options)


def test_closing(runner: Runner):
    runner.step(random_ids(1, 3))
    runner.backend.close()
    runner.backend.close()
    assert runner.backend.cache_bytes == 0
    with pytest.raises(BackendError, match="closed"):
        runner.step(random_ids(1, 1))


def test_closing_during_a_step_frees_nothing_that_the_engine_writes_to(
    runner: Runner, variant: str, tiny_bundles: Bundles
):
    """As another thread might do: the engine holds bare addresses, not arrays."""
    ids = random_ids(1, 40)
    with open_runner(tiny_bundles, "qwen2", variant) as reference:
        expected = reference.step(ids)
    runner.backend._session = ClosesFirst(runner.backend)
    assert_array_equal(runner.step(ids), expected)


class ClosesFirst:
    def __init__(self, backend: OrtBackend) -> None:
        self._backend, self._session = backend, backend._session

    def io_binding(self) -> Any:
        return self._session.io_binding()

    def run_with_iobinding(self, binding: Any) -> None:
        self._backend.close()
        gc.collect()
        # Whoever gets memory now must not get the cache's.
        taken = [np.full(4 * 16 * TINY_KV_CAPACITY * 2, np.nan, np.float32) for _ in range(64)]
        self._session.run_with_iobinding(binding)
        assert all(np.isnan(array).all() for array in taken)
