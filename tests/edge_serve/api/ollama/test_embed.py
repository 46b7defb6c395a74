"""``/api/embed`` and ``/api/embeddings``: a real engine, Ollama's client, every field."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_serve.api.ollama.protocol import IGNORED, EmbeddingsRequest, EmbedRequest
from tests.conftest import Bundles, PoolingBundles
from tests.edge_serve.api.fields import check_field, fields_of
from tests.edge_serve.api.ollama.test_protocol import SAMPLING
from tests.edge_serve.api.test_pooling import ATOL, RealEngine
from tests.edge_serve.scripted import Live, running
from tests.makers.goldens import PoolingGolden, assert_close
from tests.makers.tiny_pooling import TEXTS

pytestmark = pytest.mark.live

EMBED, OLDER = "/api/embed", "/api/embeddings"
CAPACITY = 256
LONG = "hello world " * 400


@pytest.fixture(scope="module")
def live(pooling_bundles: PoolingBundles) -> Iterator[Live]:
    limits = {"queue_capacity": 16, "kv_capacity": CAPACITY, "reuse_prefix": False}
    with running(pooling_bundles("embed"), RealEngine(), llm=limits) as service:
        yield service


def ask(live: Live, path: str = EMBED, **fields: Any) -> Any:
    return live.ask(path, {"model": "tiny", **fields})


def test_vectors_have_ollamas_form(live: Live):
    golden = PoolingGolden.load()
    answer = ask(live, input=list(TEXTS))
    assert answer.status == 200, answer.body
    found = answer.json
    assert_close(np.array(found["embeddings"]), golden.vectors, atol=ATOL, what="vectors")
    llm = live.engine.llm
    tokens = sum(len(llm.tokenizer.encode(text)) + 1 for text in TEXTS)
    assert (found["model"], found["prompt_eval_count"]) == ("tiny", tokens)
    assert found["total_duration"] > 0
    assert found["load_duration"] == 0
    (one,) = ask(live, input=TEXTS[0]).json["embeddings"]
    older = ask(live, OLDER, prompt=TEXTS[0]).json
    assert older.keys() == {"embedding"}
    assert_close(np.array([one]), golden.vectors[:1], atol=ATOL, what="one text")
    assert_close(np.array([older["embedding"]]), golden.vectors[:1], atol=ATOL, what="older form")


def test_a_text_that_is_too_long_is_cut_at_its_end(live: Live):
    llm = live.engine.llm
    ids = llm.tokenizer.encode(LONG)
    assert len(ids) > 2 * CAPACITY
    answer = ask(live, input=[LONG, "hello"])
    (cut, short) = answer.json["embeddings"]
    facts = llm.manifest.embedding
    assert facts is not None
    (end,) = facts.append
    kept = [*ids[: CAPACITY - 2], end]
    body = {"model": "tiny", "input": [kept]}
    same = live.ask("/v1/embeddings", body).json["data"][0]["embedding"]
    assert_close(np.array([cut]), np.array([same]), atol=ATOL, what="the text's beginning")
    assert answer.json["prompt_eval_count"] == len(kept) + len(llm.tokenizer.encode("hello")) + 1
    assert not np.allclose(cut, short, atol=0.01)
    for path, fields in ((EMBED, {"input": LONG, "truncate": False}), (OLDER, {"prompt": LONG})):
        refused = ask(live, path, **fields)
        assert refused.status == 400
        name = "input" if path == EMBED else "prompt"
        assert refused.json["error"].startswith(f"{name}: a text has ")


def test_a_request_without_text_only_loads_the_model(live: Live):
    given: dict[str, Any]
    for given in ({}, {"input": ""}, {"input": []}):
        answer = ask(live, **given)
        assert (answer.status, answer.json["embeddings"]) == (200, []), answer.body
    for given in ({}, {"prompt": ""}):
        answer = ask(live, OLDER, **given)
        assert (answer.status, answer.json) == (200, {"embedding": []})
    for path in (EMBED, OLDER):
        assert live.ask(path, {"model": "nobody"}).status == 404


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"input": ["a", ""]}, "input: a text is empty"),
        ({"input": ["a"] * 3000}, "input: has 3000 texts"),
        ({"input": "a", "dimensions": 5000}, "dimensions: "),
        ({"input": [[1, 2]]}, "input"),
        ({"input": "a", "options": {"temperature": -1}}, "options.temperature"),
        ({"input": "a", "options": {"mirostat": 1}}, "options.mirostat"),
        ({"input": "a", "options": {"num_ctx": 1.5}}, "options.num_ctx"),
    ],
)
def test_what_cannot_be_done_is_refused(live: Live, fields: dict[str, Any], said: str):
    answer = ask(live, **fields)
    assert answer.status == 400
    assert said in answer.json["error"]


def test_a_generative_model_makes_no_vectors(tiny_bundles: Bundles):
    with running(tiny_bundles("qwen2", "portable"), RealEngine()) as live:
        assert "completion" in live.ask("/api/show", {"model": "tiny"}).json["capabilities"]
        for path, text in ((EMBED, {"input": "a"}), (OLDER, {"prompt": "a"})):
            answer = ask(live, path, **text)
            assert answer.status == 400
            assert "embed" in answer.json["error"]


def test_clients_are_told_what_the_model_does(live: Live):
    shown = live.ask("/api/show", {"model": "tiny"}).json
    assert shown["capabilities"] == ["embedding"]


def test_ollamas_client(live: Live):
    ollama = pytest.importorskip("ollama")
    llm = live.engine.llm
    with ollama.Client(live.url) as client:
        found = client.embed("tiny", ["hello", "world"], truncate=True, keep_alive="5m")
        assert np.array(found.embeddings).shape == (2, llm.manifest.model.hidden_size)
        tokens = sum(len(llm.tokenizer.encode(text)) + 1 for text in ("hello", "world"))
        assert found.prompt_eval_count == tokens
        older = client.embeddings("tiny", "hello")
        wanted = np.array(found.embeddings[:1])
        assert_close(np.array([older.embedding]), wanted, atol=ATOL, what="older form")
        with pytest.raises(ollama.ResponseError, match="a text has"):
            client.embed("tiny", LONG, truncate=False)


def test_what_langchain_sends(live: Live):
    """All of its options, whether they were set or not."""
    names = (
        "mirostat mirostat_eta mirostat_tau num_ctx num_gpu num_thread repeat_last_n "
        "repeat_penalty temperature stop tfs_z top_k top_p"
    )
    options = {**dict.fromkeys(names.split()), "temperature": 0.1, "num_ctx": 2048}
    answer = ask(live, input=["hello", "world"], options=options)
    assert answer.status == 200, answer.body
    assert len(answer.json["embeddings"]) == 2


# Of options that a text has, those count that are refused unless they change nothing.
REFUSED = {
    f"options.{name}"
    for name in (
        "repeat_last_n",
        "mirostat",
        "mirostat_eta",
        "mirostat_tau",
        "typical_p",
        "tfs_z",
        "penalize_newline",
    )
}
OPTIONS = {name: pair for name, pair in SAMPLING.items() if name.startswith("options.")}
SHARED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "model": ({}, {"model": "other"}),
    "options": ({}, {"options": {"mirostat": 1}}),
    "keep_alive": ({"keep_alive": "5m"}, {"keep_alive": -1}),
    **OPTIONS,
}
PAIRS: dict[str, dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    EMBED: {
        **SHARED,
        "input": ({"input": "a"}, {"input": "b"}),
        "truncate": ({"input": LONG}, {"input": LONG, "truncate": False}),
        "dimensions": ({}, {"dimensions": 5000}),
    },
    OLDER: {**SHARED, "prompt": ({"prompt": "a"}, {"prompt": "b"})},
}
KINDS: dict[str, type] = {EMBED: EmbedRequest, OLDER: EmbeddingsRequest}


def test_every_field_is_tried_and_documented():
    for path, kind in KINDS.items():
        assert set(fields_of(kind, set())) == PAIRS[path].keys()
    page = (Path(__file__).parents[4] / "docs" / "protocols.md").read_text("utf-8")
    (section,) = [part for part in page.split("\n## ") if part.startswith("Ollama's API")]
    named = {*PAIRS[EMBED], *PAIRS[OLDER]}
    assert not [name for name in named if f"`{name}`" not in section]


@pytest.mark.parametrize(
    ("path", "field"), [(path, field) for path, pairs in PAIRS.items() for field in pairs]
)
def test_a_field_makes_a_difference_or_the_list_says_why_not(
    live: Live, path: str, field: str, monkeypatch: pytest.MonkeyPatch
):
    base = {"model": "tiny", "input" if path == EMBED else "prompt": "what"}
    first, second = ({**base, **changes} for changes in PAIRS[path][field])
    is_ignored = field in IGNORED.keys() | OPTIONS.keys() - REFUSED
    check_field(live, path, KINDS[path], (first, second), monkeypatch, is_ignored=is_ignored)
