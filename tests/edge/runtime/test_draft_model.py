"""A second model that drafts: its books, how often it is right, and that no answer changes."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge import LLM, SamplingParams
from edge.backends import Step
from edge.bundle.embeddings import EmbeddingTable
from edge.bundle.manifest import FileInfo, read_manifest
from edge.errors import BackendError, ConfigError, IntegrityError
from edge.model.slot_rows import SlotRows
from edge.runtime.draft_model import CLOSE, ModelDrafter
from edge.runtime.sampling import Sampler
from edge.runtime.scheduler.core import EngineCore
from edge.runtime.scheduler.drafter import DraftContext, DraftWorth
from edge_make.manifest_bytes import encode_manifest
from tests.conftest import Bundles
from tests.edge.runtime.conftest import VOCAB
from tests.edge.runtime.drafting_support import (
    TARGET,
    NoneTwice,
    Seconds,
    TimedPair,
    made,
    real_answers,
    unrelated,
)
from tests.edge.runtime.scheduler.conftest import DropMiddle, Engine, drafting_of, drop_middle
from tests.standins.scripted_backend import Script, ScriptedBackend, write_table


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], EmbeddingTable]]:
    """Token tables by number of rows; the target's has `VOCAB`."""
    root = tmp_path_factory.mktemp("tables")
    opened: dict[int, EmbeddingTable] = {}

    def table(size: int) -> EmbeddingTable:
        if size not in opened:
            opened[size] = EmbeddingTable(write_table(root / f"{size}.safetensors", size))
        return opened[size]

    yield table
    for each in opened.values():
        each.close()


def resized(script: Script, size: int) -> Script:
    """The same model with more or fewer rows in its head; what is added is never drawn."""

    def other(seen: tuple[int, ...]) -> NDArray[np.float32]:
        row = np.full(size, -100.0, np.float32)
        found = np.asarray(script(seen))
        row[: min(size, len(found))] = found[:size]
        return row

    return other


def similar(script: Script, seed: int) -> Script:
    """Another model that often agrees."""

    def other(seen: tuple[int, ...]) -> NDArray[np.float32]:
        noise = np.random.RandomState(np.array([seed, *seen], dtype=np.uint32))
        return (np.asarray(script(seen)) + noise.standard_normal(VOCAB)).astype(np.float32)

    return other


class Pair(TimedPair):
    """A core on a scripted target, and a drafter on a scripted draft."""

    def __init__(
        self,
        tables: Callable[[int], EmbeddingTable],
        draft: Script | None,
        *,
        num_slots: int = 3,
        capacity: int = 64,
        draft_vocab: int = VOCAB,
        draft_capacity: int | None = None,
        draft_step: int = 8,
        cuts: bool = True,
        seconds: Seconds = lambda step: 1.0,
        draft_seconds: Seconds = lambda step: 0.01,
        **options: Any,
    ) -> None:
        self.drafter: ModelDrafter | None = None
        if draft is not None:
            table = tables(draft_vocab)
            self.draft = ScriptedBackend(
                table,
                draft if draft_vocab == VOCAB else resized(draft, draft_vocab),
                num_slots=num_slots,
                capacity=draft_capacity or capacity,
                max_step_tokens=draft_step,
            )
            self.charge(self.draft, draft_seconds)
            self.drafter = ModelDrafter(
                self.draft,
                table,
                draft_vocab=draft_vocab,
                target_vocab=VOCAB,
                cut_rows=SlotRows.without if cuts else None,
            )
        self.engine = Engine(
            tables(VOCAB),
            TARGET,
            num_slots=num_slots,
            capacity=capacity,
            drafter=self.drafter,
            clock=lambda: self.now,
            speculative=options.pop("speculative", 4),
            **options,
        )
        self.charge(self.engine.backend, seconds)
        self.core = self.engine.core

    def check_books(self) -> None:
        super().check_books()
        if self.drafter is not None:
            for slot, ids in enumerate(self.drafter._ids):
                known = [i if i < self.draft._vocab_size else 0 for i in ids]
                assert self.draft.rows_of(slot, len(ids)) == known


@settings(max_examples=40)
@given(
    prompts=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=20), min_size=1, max_size=5),
    draft=st.sampled_from([TARGET, similar(TARGET, 1), unrelated]),
    draft_vocab=st.sampled_from([VOCAB, VOCAB - 20, VOCAB + 9]),
    draft_capacity=st.sampled_from([None, 20]),
    draft_step=st.integers(1, 9),
    temperature=st.sampled_from([0.0, 1.0]),
    penalty=st.sampled_from([0.0, 0.7]),
    top_k=st.sampled_from([0, 3]),
    make_constraint=st.sampled_from([None, NoneTwice]),
    end_ids=st.sampled_from([frozenset(), frozenset({3, 4})]),
    slides=st.booleans(),
    cuts=st.booleans(),
    reuse_prefix=st.booleans(),
    verify_s=st.sampled_from([1.0, 3.0]),
)
def test_a_draft_model_changes_no_answer(
    tables: Callable[[int], EmbeddingTable],
    prompts: list[list[int]],
    draft: Script,
    draft_vocab: int,
    draft_capacity: int | None,
    draft_step: int,
    temperature: float,
    penalty: float,
    top_k: int,
    make_constraint: type[NoneTwice] | None,
    end_ids: frozenset[int],
    slides: bool,
    cuts: bool,
    reuse_prefix: bool,
    verify_s: float,
):
    """Whatever it is and however its slots and vocabulary differ; full slots slide or end."""
    params = made(temperature=temperature, presence_penalty=penalty, top_k=top_k)
    options: dict[str, Any] = {"capacity": 28, "reuse_prefix": reuse_prefix}
    if slides:
        options["overflow"] = DropMiddle()
    given_ = {"make_constraint": make_constraint, "end_ids": end_ids}
    plain = Pair(tables, None, **options).answers(prompts, params, **given_)
    pair = Pair(
        tables,
        draft,
        draft_vocab=draft_vocab,
        draft_capacity=draft_capacity,
        draft_step=draft_step,
        cuts=cuts,
        seconds=lambda step: 1.0 if step.num_logits == 1 else verify_s,
        **options,
    )
    assert pair.answers(prompts, params, **given_) == plain
    assert drafting_of(pair.core).failed is None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("draft_vocab", [VOCAB, VOCAB + 9])
def test_the_same_model_is_always_right(
    tables: Callable[[int], EmbeddingTable], temperature: float, draft_vocab: int
):
    """So the draft's rows are the target's, and both draw with the same random numbers."""
    params = made(temperature=temperature, top_p=0.9, repetition_penalty=1.2, frequency_penalty=0.3)
    prompts = [[1, 2, 3], [4] * 15, [1, 2, 3, 4, 5], [7]]
    pair = Pair(tables, TARGET, draft_vocab=draft_vocab)
    pair.answers(prompts, replace(params, max_tokens=40))
    counts = pair.core.counts
    assert counts["drafted"] == counts["accepted"] > 60
    # 4 x 40 tokens, and each step of up to 3 sequences gives each up to 5.
    assert pair.core.times.steps < 45
    assert drafting_of(pair.core).saved_s > 0


def test_sampled_drafts_are_right_about_as_often_as_the_distributions_overlap(
    tables: Callable[[int], EmbeddingTable],
):
    """With random numbers of its own, a draft is right as often as two independent draws agree."""
    params, prompt = made(temperature=1.0), [1, 2, 3]
    overlaps, by_chance = [], []
    draft = similar(TARGET, 3)
    agree = 0
    for seed in range(400):
        sampler = Sampler(replace(params, seed=seed), VOCAB, prompt)
        seen = (*prompt, seed % VOCAB)
        rows = [np.asarray(script(seen), np.float32) for script in (TARGET, draft)]
        guess, _ = sampler.guess(rows[1])
        sampler.forget_guesses()
        agree += guess == sampler.sample(rows[0]).id
        p, q = (np.exp(row - row.max()) / np.exp(row - row.max()).sum() for row in rows)
        overlaps.append(np.minimum(p, q).sum())
        by_chance.append((p * q).sum())
    assert agree / 400 <= np.mean(overlaps) + 0.05  # no coupling can do better
    # Flat rows of 50 tokens are hard for an inverse CDF; models' rows have a few heavy ones.
    assert agree / 400 > np.mean(by_chance) + 0.4 * (np.mean(overlaps) - np.mean(by_chance))


def test_a_sequence_that_is_cancelled_leaves_its_rows_to_the_next(
    tables: Callable[[int], EmbeddingTable],
):
    params, prompt = made(temperature=0.0, max_tokens=12), [*range(20)]
    pair = Pair(tables, TARGET, num_slots=1)
    sequence, _ = pair.submit(prompt, params)
    while sequence.stats.completion_tokens < 6:
        pair.core.step()
    sequence.cancelled = True
    before = len(pair.draft.steps)
    (found,) = pair.answers([prompt], params)
    (expected,) = Pair(tables, None).answers([prompt], params)
    assert found == expected
    read_again = sum(seq for _, seq in pair.draft.steps[before:])
    assert read_again < len(prompt)
    # A text of another salt shares nothing, whatever the time that takes says.
    pair.submit(prompt, params, salt="other")
    pair.core.step()
    assert pair.drafter is not None
    assert pair.drafter._salts == ["other"]


def test_a_prefix_is_taken_from_another_slot(tables: Callable[[int], EmbeddingTable]):
    prompt = [i % VOCAB for i in range(40)]
    pair = Pair(tables, TARGET, num_slots=3)
    pair.answers([[*prompt, 1], [*prompt, 2], [*prompt, 3]], made(temperature=0.0, max_tokens=20))
    read = [seq for first, seq in pair.draft.steps if first + seq <= len(prompt)]
    assert sum(read) <= 2 * len(prompt)  # and not three times


def test_a_slide_moves_the_drafts_rows_too(tables: Callable[[int], EmbeddingTable]):
    """Without that half of the window would be read again after each slide."""
    params = made(temperature=0.0, max_tokens=80)

    def tokens_read(cuts: bool) -> int:
        pair = Pair(tables, TARGET, capacity=30, overflow=DropMiddle(), cuts=cuts)
        pair.answers([[1, 2, 3]], params)
        counts = pair.core.counts
        assert counts["drafted"] == counts["accepted"] > 20
        return sum(seq for _, seq in pair.draft.steps)

    assert tokens_read(True) <= 80 * 1.3
    assert tokens_read(True) < tokens_read(False) - 20


def test_a_slide_without_dropped_rows_drops_nothing(tables: Callable[[int], EmbeddingTable]):
    pair = Pair(tables, TARGET)
    assert pair.drafter is not None
    before = [*range(20)]
    context = DraftContext(0, before, before, 4, Sampler(made(temperature=0.0), VOCAB))
    pair.drafter.propose([context], 1, DraftWorth())
    pair.drafter.slide(0, before, [5, 6, 7])
    assert pair.drafter._ids[0] == before
    kept = drop_middle(20)
    pair.drafter.slide(0, before, [before[i] for i in kept])
    assert pair.drafter._ids[0] == [before[i] for i in kept]
    pair.check_books()


def test_a_draft_that_fails_leaves_the_answers_alone(
    tables: Callable[[int], EmbeddingTable], caplog: pytest.LogCaptureFixture
):
    params = made(temperature=1.0)
    prompts = [[1, 2, 3], [4, 5]]
    expected = Pair(tables, None).answers(prompts, params)
    pair = Pair(tables, TARGET)
    pair.draft.fails = True
    with caplog.at_level(logging.ERROR):
        assert pair.answers(prompts, params) == expected
    assert "the engine failed, as it was told to" in str(drafting_of(pair.core).failed)
    assert "answers go on without" in caplog.text
    assert drafting_of(pair.core).drafter is None


@pytest.mark.parametrize("length", [3, 20])
def test_a_nan_of_the_draft_ends_the_drafts_of_its_text_alone(
    tables: Callable[[int], EmbeddingTable], length: int
):
    """In its first guesses, or in what is read before; the slot's next text has drafts again."""
    params, prompts = made(temperature=0.0), [[9, *[1] * length], [2, 3]]

    def script(seen: tuple[int, ...]) -> Any:
        return np.full(VOCAB, np.nan, np.float32) if seen[0] == 9 else TARGET(seen)

    pair = Pair(tables, script, num_slots=2)
    assert pair.answers(prompts, params) == Pair(tables, None).answers(prompts, params)
    assert drafting_of(pair.core).failed is None
    # A chunk shows it, and for a text that is not read first a guess.
    assert sum(0 in slots for slots in pair.draft.batches) == (1 if length == 20 else 2)
    assert set(pair.draft.rows_of(0, 64)) == {0, -1}, "what was written is zeroed"
    accepted = pair.core.counts["accepted"]
    assert accepted > 10
    pair.answers([[4]], params)
    assert pair.core.counts["accepted"] > accepted + 10


def test_an_unsure_draft_stops_early(tables: Callable[[int], EmbeddingTable]):
    pair = Pair(tables, TARGET)
    assert pair.drafter is not None
    sampler = Sampler(made(temperature=1.0, seed=1), VOCAB)
    text = [1, 2, 3]
    context = DraftContext(0, text, text, 6, sampler)

    def length(worth: DraftWorth) -> int:
        assert pair.drafter is not None
        (draft,) = pair.drafter.propose([context], 6, worth)
        return len(draft)

    assert length(DraftWorth()) == 6
    assert length(DraftWorth(run=0.0, continue_threshold=1.0)) == 1
    assert length(DraftWorth(run=1.0, continue_threshold=1.0)) == 0
    assert 1 <= length(DraftWorth(run=0.01, continue_threshold=0.1)) < 6


def test_tokens_that_the_draft_lacks_are_read_in_chunks(tables: Callable[[int], EmbeddingTable]):
    pair = Pair(tables, TARGET, draft_step=4)
    assert pair.drafter is not None
    text = [*range(3 * CLOSE)]
    context = DraftContext(1, text, text, 2, Sampler(made(temperature=0.0), VOCAB))
    assert pair.drafter.behind(context) == len(text) - 1
    pair.drafter.read(context, 10)
    assert pair.drafter.behind(context) == len(text) - 11
    pair.drafter.read(context, 99)
    assert pair.drafter.behind(context) == 0
    assert [seq for _, seq in pair.draft.steps] == [4, 4, 2, 4, 4, 4, 1]


def _on_gpu(step: Step) -> float:
    return 0.024 + 0.0005 * step.batch * step.seq


def _on_cpu(step: Step) -> float:
    return 0.015 + 0.010 * step.batch * step.seq


def _speed(
    tables: Callable[[int], EmbeddingTable],
    draft: Script | None,
    seconds: Seconds,
    share: float,
    batch: int,
) -> tuple[float, EngineCore]:
    """Tokens per second of many answers, on an engine of known speed and a draft of its share."""
    pair = Pair(
        tables,
        draft,
        num_slots=batch,
        seconds=seconds,
        draft_seconds=lambda step: share * seconds(step),
        speculative=5,
        reuse_prefix=False,
    )
    params = made(temperature=0.0, max_tokens=50)
    pair.answers([[i % 5, i // 5, i % 3] for i in range(25)], params)
    return pair.core.counts["completion"] / pair.now, pair.core


@pytest.mark.parametrize("seconds", [_on_gpu, _on_cpu])
@pytest.mark.parametrize("batch", [1, 4])
def test_drafts_cost_little_where_they_do_not_pay(
    tables: Callable[[int], EmbeddingTable], seconds: Seconds, batch: int
):
    """They are off where they are wrong, and where the batch or the draft makes them dear."""
    plain, _ = _speed(tables, None, seconds, 0, batch)
    wrong, core = _speed(tables, unrelated, seconds, 0.25, batch)
    assert 0.9 < wrong / plain < 1.01
    assert drafting_of(core).acceptance < 0.3
    dear, core = _speed(tables, TARGET, seconds, 0.95, batch)
    assert dear / plain > 0.9
    assert drafting_of(core).trial_s >= -0.1  # no more was lost to trials than was saved for them


def test_drafts_pay_where_they_are_right_and_cheap(tables: Callable[[int], EmbeddingTable]):
    plain, _ = _speed(tables, None, _on_gpu, 0, 1)
    right, core = _speed(tables, TARGET, _on_gpu, 0.2, 1)
    assert right / plain > 2
    # What the core says it saved is what it saved.
    tokens = core.counts["completion"]
    assert drafting_of(core).saved_s == pytest.approx(tokens / plain - tokens / right, rel=0.15)
    often, _ = _speed(tables, similar(TARGET, 1), _on_gpu, 0.2, 1)
    assert often / plain > 1.15


def test_a_text_is_not_given_up_for_others(tables: Callable[[int], EmbeddingTable]):
    """Half of the texts are easy for the draft, and every other one is not."""

    def half(seen: tuple[int, ...]) -> NDArray[np.float32]:
        return np.asarray(TARGET(seen) if seen[0] % 2 else unrelated(seen), np.float32)

    plain, _ = _speed(tables, None, _on_gpu, 0, 1)
    drafted, core = _speed(tables, half, _on_gpu, 0.2, 1)
    assert drafted / plain > 1.2
    # More than 600 tokens are easy.
    assert core.counts["accepted"] > 250


def test_a_draft_that_becomes_right_is_found_again(tables: Callable[[int], EmbeddingTable]):
    """A small part of the time goes into trials, so that nothing is given up for ever."""
    pair = Pair(
        tables,
        unrelated,
        num_slots=1,
        seconds=_on_gpu,
        draft_seconds=lambda step: 0.2 * _on_gpu(step),
        speculative=5,
    )
    params = made(temperature=0.0, max_tokens=50)
    prompts = [[i % 5, i // 5, i % 3] for i in range(25)]
    pair.answers(prompts, params)
    before = pair.core.counts["accepted"]
    pair.draft.script = TARGET
    pair.answers(prompts, params)
    assert pair.core.counts["accepted"] - before > 25 * 50 / 3


# Real engines


@pytest.fixture(scope="module")
def small(tiny_bundles: Bundles) -> Path:
    return tiny_bundles("llama", quant="int4")


def test_the_real_engines_give_the_answers_of_one(
    tiny_bundles: Bundles, small: Path, monkeypatch: pytest.MonkeyPatch
):
    bundle = tiny_bundles("qwen2")
    plain, _ = real_answers(bundle, monkeypatch)
    drafted, stats = real_answers(bundle, monkeypatch, draft=small, speculative=3)
    assert drafted == plain
    assert stats.drafted_tokens > 0  # how many follows the time that steps took
    same, stats = real_answers(bundle, monkeypatch, draft=bundle)
    assert same == plain
    # Of itself it is right, but for the grammar and the budget, which a draft does not know.
    assert stats.accepted_tokens > 0.6 * stats.drafted_tokens


def test_both_engines_have_the_same_sizes_and_are_closed(tiny_bundles: Bundles, small: Path):
    with LLM(tiny_bundles("qwen2"), num_slots=2, kv_capacity=99, draft=small) as llm:
        assert llm._draft_model is not None
        backend = llm._draft_model.backend
        assert (backend.num_slots, backend.capacity) == (2, 99)
        assert llm.draft_manifest == read_manifest(small)
        assert llm.generate("what", SamplingParams(max_tokens=3)).tokens
    assert backend.failed is not None


def _changed(bundle: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a bundle with another tokenizer; the hashes are right again."""
    shutil.copytree(bundle, target)
    path = target / "tokenizer.json"
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))
    manifest = read_manifest(target)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    entry = FileInfo(num_bytes=path.stat().st_size, sha256=digest)
    files = {**manifest.files, path.name: entry}
    changed = msgspec.structs.replace(manifest, files=files)
    (target / "manifest.json").write_bytes(encode_manifest(changed))
    return target


def _swap(content: dict[str, Any]) -> None:
    vocab = content["model"]["vocab"]
    a, b = list(vocab)[:2]
    vocab[a], vocab[b] = vocab[b], vocab[a]


def _drop_merge(content: dict[str, Any]) -> None:
    content["model"]["merges"].pop()


def _rename(content: dict[str, Any]) -> None:
    content["added_tokens"][-1]["content"] = "<other>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_swap, r"id 0 is '.' here and '.' there"),
        (_drop_merge, r"there are \d+ merges here and \d+ there"),
        (_rename, r"id \d+ is '.*' here and '<other>' there"),
    ],
)
def test_another_tokenizer_is_refused_with_what_differs(
    tiny_bundles: Bundles,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], None],
    message: str,
):
    other = _changed(tiny_bundles("llama"), tmp_path / "other", change)
    with pytest.raises(ConfigError, match=message) as refused:
        LLM(tiny_bundles("qwen2"), draft=other)
    assert "has another tokenizer" in str(refused.value)


def test_the_same_tokenizer_in_other_bytes_is_taken(tiny_bundles: Bundles, tmp_path: Path):
    def respell(content: dict[str, Any]) -> None:
        merges = content["model"]["merges"]
        content["model"]["merges"] = [
            " ".join(merge) if isinstance(merge, list) else merge.split(" ") for merge in merges
        ]
        ids = [token["id"] for token in content["added_tokens"]]
        last = content["added_tokens"][-1]
        content["added_tokens"].append({**last, "id": max(ids) + 1, "content": "<new>"})

    other = _changed(tiny_bundles("llama"), tmp_path / "other", respell)
    with LLM(tiny_bundles("qwen2"), draft=other) as llm:
        assert llm._draft_model is not None


def test_a_damaged_draft_is_refused(tiny_bundles: Bundles, small: Path, tmp_path: Path):
    broken = tmp_path / "broken"
    shutil.copytree(small, broken)
    with (broken / "embeddings.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    with pytest.raises(IntegrityError):
        LLM(tiny_bundles("qwen2"), draft=broken)


def test_a_target_that_cannot_be_opened_with_its_draft_leaves_nothing_open(
    tiny_bundles: Bundles, small: Path, monkeypatch: pytest.MonkeyPatch
):
    closed = []

    class Refuses:
        def __init__(self, *args: Any, **options: Any) -> None:
            closed.append(options["drafter"].backend)
            raise BackendError("no scheduler today")

    monkeypatch.setattr("edge.runtime.llm.Scheduler", Refuses)
    with pytest.raises(BackendError, match="no scheduler today"):
        LLM(tiny_bundles("qwen2"), draft=small)
    assert closed[0].failed is not None
