"""`lab train-eagle3`: what a head learns from, its unrolled form, and what it is good for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge import LLM, EdgeError, SamplingParams
from edge.bundle.embeddings import EMBEDDINGS_NAME, EmbeddingTable
from edge.bundle.manifest import read_manifest
from edge.errors import ConfigError
from edge.model.spec import ModelSpec
from export.graph.rope import rope_tables
from export.pipeline import ExportConfig, export_checkpoint
from export.sources.eagle3 import Eagle3Head, head_linears, head_norms
from export.sources.opening import open_checkpoint
from tests.conftest import RUNNABLE, TINY_KV_CAPACITY, Bundles, Checkpoints
from tests.makers.dense import dense
from tests.makers.manifests import change_model, make_model
from tests.makers.tiny_heads import EPS, HIDDEN, THETA, VOCAB, make_head
from tests.makers.tiny_models import KINDS, Kind, write_checkpoint

from .train_eagle3 import (
    BEST,
    choose_tokens,
    head_spec,
    layers_of,
    learn,
    lesson,
    make_batches,
    make_lessons,
    train,
    write_head,
)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    lines = [{"text": f"hello world what is the {word}"} for word in ("end", "of", "it") * 7]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_lesson_is_what_the_model_computes(tiny_bundles: Bundles, texts: Path):
    bundle = tiny_bundles("qwen2")
    manifest = read_manifest(bundle)
    lessons = list(make_lessons(bundle, manifest, texts, 64))
    assert len(lessons) == 21
    first = lessons[0]
    count = len(first.ids)
    assert first.states.shape == (count, 3 * HIDDEN)
    table = EmbeddingTable(bundle / EMBEDDINGS_NAME)
    np.testing.assert_array_equal(first.states[:, :HIDDEN], table[first.ids])  # layer 0's input
    table.close()
    assert first.best.shape == first.probabilities.shape == (count, BEST)
    np.testing.assert_allclose(first.probabilities.sum(-1), 1, rtol=1e-5)
    with LLM(bundle, num_threads=1) as llm:
        tokens = llm.generate_ids(first.ids.tolist(), SamplingParams(temperature=0, max_tokens=1))
        assert list(tokens) == [first.best[-1, 0]]


def test_the_most_frequent_tokens_are_chosen(tiny_bundles: Bundles, texts: Path):
    bundle = tiny_bundles("qwen2")
    lessons = list(make_lessons(bundle, read_manifest(bundle), texts, 64))
    chosen = choose_tokens(lessons, 40, VOCAB)
    assert len(chosen) == 40
    assert (np.diff(chosen) > 0).all()
    assert np.isin(lessons[0].ids, chosen).mean() > 0.9
    assert len(choose_tokens(lessons, VOCAB, VOCAB)) == VOCAB


def test_the_layers_are_those_that_others_read():
    assert layers_of(make_model(num_layers=28)) == (2, 14, 25)
    assert layers_of(make_model(num_layers=2)) == (0, 1, 2)
    assert dense(head_spec(make_model(), 99, 7)).intermediate_size == 7


def write(output: Path, spec: ModelSpec, **weights: NDArray[Any]) -> None:
    """Write an untrained head for a tiny model; ``weights`` by published names take the place."""
    head = head_spec(spec, VOCAB, None)
    shapes = {
        name: (rows, layer.shape[0])
        for layer in head_linears(head)
        for name, rows in zip(layer.weights, layer.rows, strict=True)
    } | {norm.source: (norm.size,) for norm in head_norms(head)}
    shapes["fc.weight"] = (head.hidden_size, 3 * head.hidden_size)
    published = {name: np.ones(shape, np.float32) for name, shape in shapes.items()} | weights
    module: Any = SimpleNamespace(spec=head, published=lambda: published)
    manifest: Any = SimpleNamespace(model=spec)
    write_head(output, module, np.arange(VOCAB), manifest, layers_of(spec))


@pytest.mark.parametrize("kind", ["qwen2", "llama", "qwen3"])
@pytest.mark.parametrize("linear", [False, True])
def test_the_written_head_turns_by_the_rope_it_was_trained_with(
    kind: Kind, linear: bool, tmp_path: Path
):
    """Without scaling, as Llama 3 scales it, by YaRN, and linearly."""
    other = {"rope_scaling": {"rope_type": "linear", "factor": 2.5}}
    more: dict[str, Any] = other if linear else {}
    source = write_checkpoint(tmp_path / "model", kind, rope_theta=5e5, **more)
    with open_checkpoint(str(source)) as model:
        write(tmp_path / "head", model.spec)
        expected = head_spec(model.spec, VOCAB, None)
        assert Eagle3Head(model, tmp_path / "head").spec == expected
        kinds = {"qwen2": "default", "llama": "llama3", "qwen3": "yarn"}
        assert expected.ropes[0].kind == ("linear" if linear else kinds[kind])


def test_what_is_no_number_is_not_written(tmp_path: Path):
    output = tmp_path / "head"
    for wrong in (np.nan, np.inf):
        with pytest.raises(ConfigError, match=r"norm\.weight is not finite"):
            write(output, make_model(), **{"norm.weight": np.full(64, wrong, np.float32)})
    assert not output.exists()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -7e4])
def test_states_beyond_float16_teach_nothing(wrong: float):
    states = np.ones((1, 9, 8), np.float32)
    logits = np.zeros((9, VOCAB), np.float32)
    assert np.isfinite(lesson(np.arange(9), [states] * 3, logits, 0).states).all()
    states[0, 3, 5] = wrong
    with pytest.raises(ConfigError, match=f"hidden states reach {abs(wrong):g}, "):
        lesson(np.arange(9), [states] * 3, logits, 0)


@pytest.mark.parity
def test_a_loss_that_is_no_number_ends_the_training():
    pytest.importorskip("torch", reason="live parity needs torch")
    import torch

    weight = torch.nn.Parameter(torch.ones(1))

    def losses(*_: Any) -> tuple[list[Any], list[Any], list[Any]]:
        return [weight.sum() * np.nan], [], []

    head: Any = SimpleNamespace(trained=lambda: [weight], losses=losses)
    each: Any = SimpleNamespace(ids=np.arange(9))
    with pytest.raises(ConfigError, match=r"the loss is nan after 0 steps; .* than 0\.5"):
        learn(head, [each], 9.0, 1, 0.5, 1, False, 0)


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
def test_training_turns_as_the_exported_head_does(kind: Kind, tmp_path: Path):
    pytest.importorskip("torch", reason="live parity needs torch")
    import torch

    from .eagle3_module import HeadModule

    with open_checkpoint(str(write_checkpoint(tmp_path, kind))) as model:
        spec = head_spec(model.spec, VOCAB, None)
    table = np.zeros((VOCAB, spec.hidden_size), np.float16)
    module = HeadModule(
        spec, table, np.arange(VOCAB), np.ones(spec.hidden_size, np.float32), is_tied=False
    )
    x = (
        np.random.RandomState(0)
        .standard_normal((1, 2, 40, spec.attentions()[0].dim))
        .astype(np.float32)
    )
    cos, sin = (part[3:] for part in rope_tables(spec.ropes[0], spec.attentions()[0].dim, 43))
    low, high = np.split(x, 2, axis=-1)
    expected = np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    np.testing.assert_allclose(module._rotate(torch.from_numpy(x), 3), expected, atol=1e-4)


def test_what_cannot_be_trained_is_refused(
    tiny_bundles: Bundles, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bundle, output = tiny_bundles("qwen2"), tmp_path / "head"
    with pytest.raises(ConfigError, match="exists; name a new directory"):
        train(bundle, texts, tmp_path)
    for wrong in ({"draft_vocab": 999}, {"ahead": 0}, {"minutes": 0.0}):
        with pytest.raises(ConfigError, match="must be positive, the first at most 320"):
            train(bundle, texts, output, **{"draft_vocab": 64, **wrong})  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(EdgeError, match="torch is missing; run python3 -m lab train-eagle3"):
        train(bundle, texts, output, draft_vocab=64)
    assert not output.exists()


@pytest.mark.parity
def test_the_unrolled_head_is_the_one_that_drafts():
    """Against plain NumPy, which goes on from its own states one guess after the other."""
    pytest.importorskip("torch", reason="live parity needs torch")
    import torch

    from .eagle3_module import HeadModule

    head = make_head(draft_vocab=VOCAB)
    spec = head_spec(make_model(), VOCAB, 96)
    rope = msgspec.structs.replace(spec.ropes[0], theta=THETA)
    spec = change_model(spec, rope=rope, rms_norm_eps=EPS)
    rng = np.random.RandomState(0)
    table = rng.standard_normal((VOCAB, HIDDEN)).astype(np.float16)
    module = HeadModule(spec, table, np.arange(VOCAB), np.ones(HIDDEN, np.float32), False)
    assert set(module.names) == set(head.tensors)
    with torch.no_grad():
        for name, attribute in module.names.items():
            getattr(module, attribute).copy_(torch.from_numpy(head.weight(name)))
        ids, count, ahead = rng.randint(0, VOCAB, 9), 9, 3
        states = rng.standard_normal((count, 3 * HIDDEN)).astype(np.float32)
        embeds = torch.from_numpy(table[ids].astype(np.float32))[None]
        logits = [each[0].numpy() for each in module._unroll(embeds, torch.tensor(states)[None], 3)]
    joined = states @ head.weight("fc.weight").T
    rows = table[ids].astype(np.float32)
    for at in range(count - ahead):  # the guesses behind token `at`, and the true tokens beside
        hidden = joined[: at + 1]
        for k in range(ahead):
            found, after = head.run(rows[1 : at + 2 + k], hidden)
            np.testing.assert_allclose(logits[k][at], found[-1], rtol=2e-3, atol=2e-3)
            hidden = np.concatenate([hidden, after[-1:]])


@given(st.lists(st.integers(1, 256), min_size=1, max_size=60), st.integers(1, 9))
def test_each_text_is_learned_once_a_round_beside_others_of_its_length(
    lengths: list[int], size: int
):
    batches = make_batches(lengths, size, seed=0)
    rounds = [[next(batches) for _ in range(-(-len(lengths) // size))] for _ in range(2)]
    for batches_of_round in rounds:
        assert sorted(np.concatenate(batches_of_round)) == list(range(len(lengths)))
        padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches_of_round)
        # A batch's longest text is but for a factor below all of the next batch.
        assert padded <= sum(lengths) * 1.1 / 0.9 + 2 * size * max(lengths)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--bfloat16",)])
@pytest.mark.parity
def test_a_trained_head_is_right_where_it_was_trained(
    more: tuple[str, ...],
    tiny_bundles: Bundles,
    tiny_checkpoints: Checkpoints,
    texts: Path,
    tmp_path: Path,
):
    """From texts to a bundle that drafts."""
    pytest.importorskip("torch", reason="live parity needs torch")
    head = tmp_path / "head"
    # In a process of its own: torch brings threads, and warnings that are errors here.
    done = subprocess.run(
        [sys.executable, "-m", "lab.training.train_eagle3", tiny_bundles("qwen2"), texts,
         "-o", head, "--minutes", "0.1", "--draft-vocab", "300", "--ahead", "2",
         "--learning-rate", "0.01", *more],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([".", *sys.path])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert report["texts_held_out"] == 2
    assert report["right"][0] > 0.6
    export_checkpoint(
        ExportConfig(
            source=str(tiny_checkpoints("qwen2")), output=tmp_path / "bundle", quant="fp16",
            eagle3=head, kv_capacity=TINY_KV_CAPACITY, dialect=RUNNABLE,
        )
    )  # fmt: skip
    with LLM(tmp_path / "bundle", num_threads=1, draft="eagle3") as llm:
        assert llm.generate("hello world what is", SamplingParams(max_tokens=4)).tokens
