"""A head that drafts: its books, how often it is right, and that no answer changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge import LLM, SamplingParams
from edge.backends import Step
from edge.backends.ort.cpu import OrtBackend
from edge.backends.ort.gpu import OrtCudaBackend
from edge.backends.ort.session import load_graph
from edge.backends.step import step_after
from edge.bundle.embeddings import EMBEDDINGS_NAME, EmbeddingTable
from edge.bundle.manifest import head_manifest, read_manifest
from edge.bundle.onnx_values import Constants
from edge.bundle.weights import manifest_linears, weight_parts
from edge.engine_config import EngineConfig
from edge.errors import BackendError, BundleError, ConfigError
from edge.runtime import eagle3
from edge.runtime.eagle3 import CLOSE, Eagle3Drafter
from edge.runtime.scheduler import StoredPrefix
from edge_lab.cli.inspect import inspect
from edge_lab.cli.plan import plan
from edge_serve.models.loader import need_bytes
from tests.conftest import TINY_KV_CAPACITY, Checkpoints, require_kernels
from tests.edge.backends.ort.test_gpu import HOST
from tests.edge.runtime.conftest import VOCAB
from tests.edge.runtime.drafting_support import (
    TARGET,
    NoneTwice,
    TimedPair,
    made,
    real_answers,
    unrelated,
)
from tests.edge.runtime.scheduler.conftest import DropMiddle, Engine, drafting_of
from tests.makers.goldens import FP16_KERNELS
from tests.makers.manifests import replace_file
from tests.makers.tiny_heads import make_head
from tests.standins.scripted_backend import Script, ScriptedBackend
from tests.standins.slot_rows import by_name

Seen = tuple[int, ...]


class States:
    """Hidden states by what they stand for: all tokens up to theirs. Each is a number."""

    def __init__(self) -> None:
        self._texts: list[Seen] = []
        self._numbers: dict[Seen, int] = {}

    def of(self, seen: Seen) -> list[float]:
        if seen not in self._numbers:
            self._numbers[seen] = len(self._texts)
            self._texts.append(seen)
        return [float(self._numbers[seen])]

    def text(self, state: NDArray[np.float32]) -> Seen:
        return self._texts[int(state[0])]


class Target(ScriptedBackend):
    """A scripted target that puts out hidden states of all rows of a step."""

    def __init__(self, table: EmbeddingTable, script: Script, *, states: States, **options: Any):
        super().__init__(table, script, **options)
        self.states = states
        self.spoils_at = -1

    def forward(self, step: Step) -> NDArray[np.float32]:
        logits = super().forward(step)
        rows = [
            [
                self.states.of(tuple(self._cache[slot, : place + 1].tolist()))
                if place != self.spoils_at
                else [np.nan]
                for place in places.tolist()
            ]
            for slot, places in zip(step.slots, step.positions, strict=True)
        ]
        self.hidden_states = np.array(rows, np.float32)
        return logits


class Head(ScriptedBackend):
    """A scripted head: row after row it must be given the states of one text.

    It guesses by its script from all tokens that went into the state, and the one beside it.
    """

    def __init__(
        self,
        table: EmbeddingTable,
        states: States,
        script: Script,
        vocabulary: NDArray[np.int64] | None,
        **options: Any,
    ):
        super().__init__(table, script, **options)
        self.states, self.vocabulary = states, vocabulary
        self.rows: list[list[Seen]] = [[] for _ in range(self.num_slots)]

    def forward(self, step: Step) -> NDArray[np.float32]:
        step.check(self)
        if self.fails:
            raise BackendError("the head failed, as it was told to")
        self.steps.append((step.starts[0], step.seq))
        logits, hidden = [], []
        for slot, start, inputs in zip(step.slots, step.starts, step.embeds, strict=True):
            rows = self.rows[slot]
            assert len(rows) >= start, "a row is read before it is written"
            del rows[start:]
            seen: Seen = ()
            for row in inputs:
                token = self._ids[row[:2].astype(np.float16).tobytes()]
                text = self.states.text(row[2:])
                assert not rows or text[:-1] == rows[-1], "the states are not of one text"
                assert seen in ((), text), "a row has the token of another"
                rows.append(text)
                seen = (*text, token)
                hidden.append(self.states.of(seen))
            found = np.asarray(self.script(seen), np.float32)
            logits.append(found if self.vocabulary is None else found[self.vocabulary])
        self.hidden_states = np.array(hidden, np.float32).reshape(step.batch, step.seq, 1)
        return np.stack(logits)[:, None]

    def copy_slot(self, source: int, target: int, length: int) -> None:
        assert source != target
        self.rows[target] = self.rows[source][:length]


def target_of(pair: Pair) -> Target:
    target = pair.engine.backend
    assert isinstance(target, Target)
    return target


def similar(seen: Seen) -> NDArray[np.float32]:
    """Another model that often agrees."""
    noise = np.random.RandomState(np.array([7, *seen], dtype=np.uint32))
    return (np.asarray(TARGET(seen)) + noise.standard_normal(VOCAB)).astype(np.float32)


class Pair(TimedPair):
    """A core on a scripted target, with a scripted head or without."""

    def __init__(
        self,
        table: EmbeddingTable,
        head: Script | None,
        *,
        num_slots: int = 3,
        capacity: int = 64,
        head_capacity: int | None = None,
        head_step: int = 8,
        vocabulary: NDArray[np.int64] | None = None,
        verify_s: float = 1.0,
        **options: Any,
    ) -> None:
        self.drafter: Eagle3Drafter | None = None
        states = States()
        if head is not None:
            self.head = Head(
                table,
                states,
                head,
                vocabulary,
                num_slots=num_slots,
                capacity=head_capacity or capacity,
                max_step_tokens=head_step,
            )
            self.charge(self.head, lambda step: 0.01)
            self.drafter = Eagle3Drafter(
                self.head, table, target_vocab=VOCAB, vocabulary=vocabulary
            )
        self.engine = Engine(
            table,
            TARGET,
            num_slots=num_slots,
            capacity=capacity,
            drafter=self.drafter,
            clock=lambda: self.now,
            speculative=options.pop("speculative", 4),
            backend_type=ScriptedBackend if head is None else partial(Target, states=states),
            **options,
        )
        self.core = self.engine.core
        self.charge(self.core.backend, lambda step: 1.0 if step.num_logits == 1 else verify_s)


@settings(max_examples=40)
@given(
    prompts=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=20), min_size=1, max_size=5),
    head=st.sampled_from([TARGET, similar, unrelated]),
    draft_vocab=st.sampled_from([None, 20, VOCAB]),
    head_capacity=st.sampled_from([None, 12]),
    head_step=st.integers(1, 9),
    most_waiting=st.sampled_from([2, 1024]),
    temperature=st.sampled_from([0.0, 1.0]),
    penalty=st.sampled_from([0.0, 0.7]),
    make_constraint=st.sampled_from([None, NoneTwice]),
    end_ids=st.sampled_from([frozenset(), frozenset({3, 4})]),
    slides=st.booleans(),
    spoils_at=st.sampled_from([-1, 3]),
    reuse_prefix=st.booleans(),
    verify_s=st.sampled_from([1.0, 3.0]),
)
def test_a_head_changes_no_answer(
    table: EmbeddingTable,
    prompts: list[list[int]],
    head: Script,
    draft_vocab: int | None,
    head_capacity: int | None,
    head_step: int,
    most_waiting: int,
    temperature: float,
    penalty: float,
    make_constraint: type[NoneTwice] | None,
    end_ids: frozenset[int],
    slides: bool,
    spoils_at: int,
    reuse_prefix: bool,
    verify_s: float,
):
    """Whatever it guesses and however its rows and tokens differ; full slots slide or end."""
    params = made(temperature=temperature, presence_penalty=penalty)
    options: dict[str, Any] = {"capacity": 28, "reuse_prefix": reuse_prefix}
    if slides:
        options["overflow"] = DropMiddle()
    given_ = {"make_constraint": make_constraint, "end_ids": end_ids}
    plain = Pair(table, None, **options).answers(prompts, params, **given_)
    rng = np.random.RandomState(0)
    pair = Pair(
        table,
        head,
        head_capacity=head_capacity,
        head_step=head_step,
        vocabulary=None if draft_vocab is None else rng.permutation(VOCAB)[:draft_vocab],
        verify_s=verify_s,
        **options,
    )
    target_of(pair).spoils_at = spoils_at
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eagle3, "MOST_WAITING", most_waiting)
        assert pair.answers(prompts, params, **given_) == plain
    assert drafting_of(pair.core).failed is None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_head_that_knows_the_model_is_always_right(table: EmbeddingTable, temperature: float):
    """So each guess stands beside the right hidden state, drawn with the same random numbers."""
    params = made(temperature=temperature, top_p=0.9, repetition_penalty=1.2, frequency_penalty=0.3)
    prompts = [[1, 2, 3], [4] * 15, [1, 2, 3, 4, 5], [7]]
    pair = Pair(table, TARGET)
    pair.answers(prompts, replace(params, max_tokens=40))
    counts = pair.core.counts
    assert counts["drafted"] == counts["accepted"] > 60
    assert pair.core.times.steps < 45
    # A prompt that begins like one before: its rows are there already, or come from another slot.
    before = sum(seq for _, seq in pair.head.steps)
    pair.answers([[4] * 15 + [5, 6], [4] * 15 + [7]], replace(params, max_tokens=20))
    assert counts["drafted"] == counts["accepted"]
    assert sum(seq for _, seq in pair.head.steps) - before < 2 * 20 + 12


def test_every_token_that_the_head_knows_can_be_guessed(table: EmbeddingTable):
    """The first of its list, too."""
    favourite = VOCAB - 1

    def script(seen: Seen) -> Any:
        row = np.zeros(VOCAB, np.float32)
        row[favourite] = 5
        return row

    pair = Pair(table, script, vocabulary=np.array([favourite, 1, 2]))
    pair.core.backend.script = script  # type: ignore[attr-defined]
    pair.answers([[1, 2, 3], [4]], made(temperature=0.0, max_tokens=20))
    counts = pair.core.counts
    assert counts["drafted"] == counts["accepted"] > 10


def test_a_head_far_behind_reads_first_and_waiting_states_are_bounded(
    table: EmbeddingTable, monkeypatch: pytest.MonkeyPatch
):
    prompt = [i % VOCAB for i in range(3 * CLOSE)]
    pair = Pair(table, TARGET)
    pair.answers([prompt], made(temperature=0.0, max_tokens=12))
    assert pair.head.steps[0][0] == 0
    assert pair.core.counts["accepted"] > 4
    assert len(pair.head.rows[0]) > len(prompt)

    monkeypatch.setattr(eagle3, "MOST_WAITING", 5)
    pair = Pair(table, TARGET, speculative=0)
    pair.answers([prompt], made(temperature=0.0, max_tokens=12))
    assert pair.drafter is not None
    waiting = max(sum(map(len, text.waiting)) for text in pair.drafter._texts)
    assert waiting <= 5 + 8  # a chunk of the prompt comes at once
    assert len(pair.head.rows[0]) > 20


class Stored:
    """Rows of a prompt's first tokens, as from a file."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def lookup(self, ids: Sequence[int]) -> StoredPrefix | None:
        if list(ids[: len(self.ids)]) != self.ids:
            return None
        rows = by_name(np.array(self.ids, np.float32)[None, None, :, None])
        return StoredPrefix(len(self.ids), lambda: rows)


def test_after_unseen_rows_the_head_begins_anew(table: EmbeddingTable):
    """A prefix from a file has no hidden states: the head's first row is behind it."""
    prompt = [*range(20)]
    params = made(temperature=0.0, max_tokens=30)
    pair = Pair(table, TARGET, prefix_store=Stored(prompt[:15]))
    found = pair.answers([prompt], params)
    assert found == Pair(table, None).answers([prompt], params)
    assert pair.head.rows[0][0] == tuple(prompt[:16])
    counts = pair.core.counts
    assert counts["cached"] == 15
    assert counts["drafted"] == counts["accepted"] > 15


@pytest.mark.parametrize(("salt", "is_shared"), [("ours", True), ("theirs", False)])
def test_a_head_takes_rows_from_slots_of_the_same_salt_only(
    salt: str, is_shared: bool, table: EmbeddingTable
):
    """Else the time of another's drafts would tell what was asked in the slot beside it."""
    prompt, params = [*range(20)], made(temperature=0.0, max_tokens=30)
    store = Stored([VOCAB - 1])
    pair = Pair(table, TARGET, num_slots=2, prefix_store=store)
    sequence, _ = pair.submit(prompt, params, salt="ours")
    while sequence.stats.completion_tokens < 6:
        pair.core.step()
    store.ids = prompt[:15]  # so that the target has these rows, whoever asks
    copies: list[tuple[int, int, int]] = []
    copy_slot = pair.head.copy_slot

    def noted(source: int, target: int, length: int) -> None:
        copies.append((source, target, length))
        copy_slot(source, target, length)

    pair.head.copy_slot = noted  # type: ignore[method-assign]
    pair.answers([prompt], params, salt=salt)
    assert pair.core.counts["cached"] >= 15
    assert bool(copies) == is_shared


def test_hidden_states_that_are_no_numbers_reach_no_cache(table: EmbeddingTable):
    prompt, params = [*range(12)], made(temperature=0.0, max_tokens=30)
    pair = Pair(table, TARGET)
    target_of(pair).spoils_at = 10
    found = pair.answers([prompt], params)
    assert found == Pair(table, None).answers([prompt], params)
    assert drafting_of(pair.core).failed is None
    assert len(pair.head.rows[0][0]) > 10
    assert pair.core.counts["accepted"] > 10


@pytest.mark.parametrize(("length", "spoilt"), [(3, range(13, 14)), (24, range(5, 25))])
def test_a_nan_of_the_head_ends_its_draft_alone(table: EmbeddingTable, length: int, spoilt: range):
    """It begins anew after it, be it in a guess or in what is read first; later ones are right."""
    prompt, params = [*range(length)], made(temperature=0.0, max_tokens=30)

    def script(seen: Seen) -> Any:
        return np.full(VOCAB, np.nan, np.float32) if len(seen) in spoilt else TARGET(seen)

    pair = Pair(table, script, num_slots=1)
    assert pair.answers([prompt], params) == Pair(table, None).answers([prompt], params)
    assert drafting_of(pair.core).failed is None
    assert 0 in pair.head.rows_of(0, 64), "it is zeroed; the scripted head itself writes no row"
    counts = pair.core.counts
    assert counts["drafted"] == counts["accepted"] > 15


def test_a_sequence_that_is_cancelled_leaves_its_rows_to_the_next(table: EmbeddingTable):
    params, prompt = made(temperature=0.0, max_tokens=12), [*range(20)]
    pair = Pair(table, TARGET, num_slots=1)
    sequence, _ = pair.submit(prompt, params)
    while sequence.stats.completion_tokens < 6:
        pair.core.step()
    sequence.cancelled = True
    before = len(pair.head.steps)
    assert pair.answers([prompt], params) == Pair(table, None).answers([prompt], params)
    assert sum(seq for _, seq in pair.head.steps[before:]) < len(prompt)
    pair.submit(prompt, params, salt="other")
    pair.core.step()
    assert pair.drafter is not None
    assert pair.drafter._texts[0].salt == "other"


def test_a_head_that_fails_leaves_the_answers_alone(table: EmbeddingTable):
    params, prompts = made(temperature=1.0), [[1, 2, 3], [4, 5]]
    pair = Pair(table, TARGET)
    pair.head.fails = True
    assert pair.answers(prompts, params) == Pair(table, None).answers(prompts, params)
    assert "the head failed, as it was told to" in str(drafting_of(pair.core).failed)
    assert drafting_of(pair.core).drafter is None


# Real engines


@pytest.fixture(scope="module", params=["native", "portable"])
def bundle(
    request: pytest.FixtureRequest,
    tiny_checkpoints: Checkpoints,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A tiny model with a random head; treat it as read-only."""
    from export.pipeline import ExportConfig, export_checkpoint

    require_kernels(request.param)
    root = tmp_path_factory.mktemp("eagle3")
    config = ExportConfig(
        str(tiny_checkpoints("qwen2")),
        root / "bundle",
        quant="fp16",
        dialect=request.param,
        kv_capacity=TINY_KV_CAPACITY,
        eagle3=make_head().write(root / "head"),
    )
    export_checkpoint(config)
    return config.output


def test_the_real_engines_give_the_answers_of_one(bundle: Path, monkeypatch: pytest.MonkeyPatch):
    plain, _ = real_answers(bundle, monkeypatch)
    drafted, stats = real_answers(bundle, monkeypatch, draft="eagle3", speculative=3)
    assert drafted == plain
    assert stats.drafted_tokens > 0
    assert stats.drafts_failed is None


def test_it_is_sized_and_closed_with_its_model(bundle: Path):
    with LLM(bundle, num_slots=2, kv_capacity=99, draft="eagle3") as llm:
        drafter = llm._draft_model
        assert isinstance(drafter, Eagle3Drafter)
        assert (drafter.backend.num_slots, drafter.backend.capacity) == (2, 99)
        assert llm.draft_manifest == head_manifest(read_manifest(bundle))
        assert llm.generate("what", SamplingParams(max_tokens=3)).tokens
        assert llm.backend.hidden_states is not None
    assert drafter.backend.failed is not None
    with LLM(bundle, num_slots=2) as llm:  # nothing of it where nobody asks for it
        assert llm.generate("what", SamplingParams(max_tokens=3)).tokens
        assert llm.backend.hidden_states is None


def test_the_cuda_backend_puts_out_the_same_hidden_states(bundle: Path):
    """Run for real on the CPU provider, for the model and for the head."""
    manifest = read_manifest(bundle)
    own = head_manifest(manifest)
    assert own is not None
    table = EmbeddingTable(bundle / EMBEDDINGS_NAME)
    ids = np.arange(14).reshape(2, 7)
    found = {}
    for name, make in (
        ("cuda", lambda m: OrtCudaBackend(bundle, m, num_slots=2, device=HOST, hidden_states=True)),
        ("cpu", lambda m: OrtBackend(bundle, m, num_slots=2, num_threads=1, hidden_states=True)),
    ):
        states = []
        hidden = np.zeros((2, 7, 64), np.float32)
        for part in (manifest, own):
            backend = make(part)
            inputs = table[ids].astype(np.float32)
            if part is own:
                inputs = np.concatenate([inputs, hidden], axis=-1)
            backend.forward(step_after([0, 1], [0, 0], inputs, np.full((2, 1), 6)))
            assert backend.hidden_states is not None
            hidden = backend.hidden_states.copy()
            states.append(hidden)
            backend.close()
        found[name] = states
    table.close()
    for ours, theirs in zip(found["cuda"], found["cpu"], strict=True):
        atol = 0.15 if FP16_KERNELS else 0.05
        np.testing.assert_allclose(ours, theirs, rtol=0.02, atol=atol)


@pytest.mark.parametrize("drafts", [False, True])
def test_the_product_for_the_head_is_planned_where_it_is_in_memory(bundle: Path, drafts: bool):
    manifest = read_manifest(bundle)
    path = bundle / manifest.graphs.cpu
    graph = load_graph(path, manifest, "fp32", manifest.kv_capacity, hidden_states=drafts)
    constants = Constants(graph, bundle)
    found = [constants.get(name) for name in constants.initializers]
    held = sum(2 * each.volume for each in found if each is not None and each.location)
    linears = manifest_linears(manifest, head_manifest(manifest) if drafts else None)
    parts = weight_parts(manifest.model, linears, manifest.rope_positions)
    assert sum(parts.values()) == held  # as stored; the CPU's norms and RoPE are in FP32


def test_plan_and_service_count_the_head(bundle: Path):
    """Its weights are in the bundle's files; its cache, of one layer, comes on top."""
    manifest = read_manifest(bundle)
    own = head_manifest(manifest)
    assert own is not None
    more = need_bytes(manifest, 4, 100, "plain", own) - need_bytes(manifest, 4, 100)
    assert more == 4 * 100 * 2 * 2 * 16 * 2  # keys and values of two heads of 16, in two bytes

    shown = CliRunner().invoke(inspect, [str(bundle)], env={"COLUMNS": "200"}).stdout
    assert "head: guesses 96 tokens, reads the inputs of layers 0, 1, 2" in shown

    def planned(*options: str) -> Any:
        arguments = [str(bundle), "--json", *options]
        return CliRunner().invoke(plan, arguments, catch_exceptions=False)

    found = json.loads(planned("--device", "cpu", "--draft", "eagle3").stdout)
    alone = json.loads(planned("--device", "cpu").stdout)
    assert found["draft"]["model"] == "qwen2: head head"
    assert found["draft"]["quant"] == "fp16"
    sizes = [each["options"][0]["memory"]["process_bytes"] for each in (found, alone)]
    linears = sum(info.num_bytes for info in own.quantization.linears.values())
    assert sizes[0] - sizes[1] > linears
    with pytest.raises(ConfigError, match="plan it with --device cpu"):
        planned("--draft", "eagle3")
    with pytest.raises(ConfigError, match="is planned for a bundle with a head"):
        CliRunner().invoke(
            plan,
            ["deepseek-r1:7b", "--device", "cpu", "--draft", "eagle3"],
            catch_exceptions=False,
        )


def test_a_bundle_without_a_head_is_refused(tiny_bundles: Any):
    with pytest.raises(ConfigError, match=r"has none: export it with --eagle3 DIR"):
        LLM(tiny_bundles("qwen2"), draft="eagle3")


def test_engines_are_refused_with_the_reason(bundle: Path):
    with pytest.raises(ConfigError, match="which TensorRT engines do not put out"):
        LLM(bundle, draft="eagle3", backend="tensorrt")
    assert EngineConfig(draft="eagle3").max_draft_tokens == 5  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [b"[1,2]", b"{}", b"[" * 9999, b"[" + b"1," * 95 + b"1]"])
def test_a_malformed_list_of_tokens_is_refused(bundle: Path, tmp_path: Path, content: bytes):
    broken = tmp_path / "broken"
    shutil.copytree(bundle, broken)
    replace_file(broken, "eagle3.vocabulary.json", content)
    with pytest.raises(BundleError, match=r"eagle3.vocabulary.json (is no list|has \d+ ids)"):
        LLM(broken, draft="eagle3")
