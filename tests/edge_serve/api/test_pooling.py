"""``/v1/embeddings`` and ``/v1/rerank``: a real engine, OpenAI's client, hostile requests."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from edge import LLM
from edge.errors import BackendError
from edge_serve.api.pooling import encoded
from tests.conftest import Bundles, PoolingBundles
from tests.edge_serve.scripted import Live, ScriptedEngine, running, until
from tests.makers.goldens import PoolingGolden, assert_close
from tests.makers.tiny_pooling import PAIRS, PROMPTS, TEXTS

pytestmark = pytest.mark.live

ATOL = 1e-5
CHAT = [{"role": "user", "content": "hello"}]


class RealEngine(ScriptedEngine):
    """Opens bundles with the engine that they are for."""

    def open(self, bundle: Path, **options: Any) -> LLM:
        self.llm = LLM(bundle, backend="ort-cpu", num_threads=1, **options)
        return self.llm


@pytest.fixture(scope="module")
def golden() -> PoolingGolden:
    return PoolingGolden.load()


@pytest.fixture(scope="module")
def live(pooling_bundles: PoolingBundles) -> Iterator[Live]:
    with running(pooling_bundles("embed"), RealEngine(), llm={"queue_capacity": 16}) as service:
        yield service


@pytest.fixture(scope="module")
def judge(pooling_bundles: PoolingBundles) -> Iterator[Live]:
    with running(pooling_bundles("rerank"), RealEngine()) as service:
        yield service


def embed(live: Live, given: Any = "hello world", **fields: Any) -> Any:
    return live.ask("/v1/embeddings", {"model": "tiny", "input": given, **fields})


def rerank(live: Live, **fields: Any) -> Any:
    body = {"model": "tiny", "query": "hello", "documents": ["world"], "instruction": "x"}
    return live.ask("/v1/rerank", {**body, **fields})


def vectors(answer: Any) -> Any:
    assert answer.status == 200, answer.body
    assert [item["index"] for item in answer.json["data"]] == list(range(len(answer.json["data"])))
    return np.array([item["embedding"] for item in answer.json["data"]], np.float32)


def test_vectors_have_openais_form(live: Live, golden: PoolingGolden):
    answer = embed(live, list(TEXTS))
    assert_close(vectors(answer), golden.vectors, atol=ATOL, what="vectors")
    llm = live.engine.llm
    tokens = sum(len(llm.tokenizer.encode(text)) + 1 for text in TEXTS)
    body = answer.json
    assert body["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert (body["object"], body["model"]) == ("list", "tiny")
    assert {item["object"] for item in body["data"]} == {"embedding"}
    assert_close(vectors(embed(live, TEXTS[0])), golden.vectors[:1], atol=ATOL, what="one text")


def test_token_ids_are_texts_too(live: Live, golden: PoolingGolden):
    ids = [live.engine.llm.tokenizer.encode(text) for text in TEXTS]
    assert_close(vectors(embed(live, ids)), golden.vectors, atol=ATOL, what="lists")
    assert_close(vectors(embed(live, ids[0])), golden.vectors[:1], atol=ATOL, what="one list")


def test_base64_is_the_same_numbers(live: Live):
    numbers = vectors(embed(live, list(TEXTS), encoding_format="float"))
    data = embed(live, list(TEXTS), encoding_format="base64").json["data"]
    decoded = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in data]
    # Two requests differ in the last bits, since texts share steps; two forms do not differ.
    assert_close(np.stack(decoded), numbers, atol=1e-6, what="base64")
    written = cast("str", encoded(numbers[0], "base64"))
    assert np.frombuffer(base64.b64decode(written), "<f4").tolist() == encoded(numbers[0], None)


def test_openais_client(live: Live, golden: PoolingGolden):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.embeddings.create(model="tiny", input=list(TEXTS))  # asks for base64
        found = np.array([item.embedding for item in answer.data], np.float32)
        assert_close(found, golden.vectors, atol=ATOL, what="vectors")
        assert answer.usage.prompt_tokens > 0
        cut = client.embeddings.create(
            model="tiny", input="hello world", dimensions=16, encoding_format="float"
        )
        assert len(cut.data[0].embedding) == 16
        with pytest.raises(openai.BadRequestError, match=r"not in 16\.\.64"):
            client.embeddings.create(model="tiny", input="a", dimensions=3)
        with pytest.raises(openai.BadRequestError, match="cannot generate"):
            client.chat.completions.create(model="tiny", messages=CHAT)


def test_prompts_by_name(live: Live):
    named = vectors(embed(live, "is it so?", prompt_name="query"))
    written = vectors(embed(live, PROMPTS["query"] + "is it so?"))
    assert_close(named, written, atol=1e-6, what="the prompt by name")


def test_many_texts_pass_a_short_queue(live: Live, golden: PoolingGolden):
    """Requests of 300 texts leave room in the queue for another."""
    texts = list(TEXTS) * 60
    with ThreadPoolExecutor(3) as threads:
        answers = list(threads.map(lambda given: embed(live, given), [texts, "what", texts]))
    for answer in answers[::2]:
        assert_close(vectors(answer), np.tile(golden.vectors, (60, 1)), atol=ATOL, what="many")
    assert_close(vectors(answers[1]), golden.vectors[1:2], atol=ATOL, what="between them")
    assert live.idle()


def test_documents_are_ranked(judge: Live, golden: PoolingGolden):
    documents = [document for _, document, _ in PAIRS[:3]]
    body = rerank(judge, documents=documents).json
    assert [result["index"] for result in body["results"]] == [2, 1, 0]
    scores = np.array([result["relevance_score"] for result in body["results"]])
    assert_close(scores, golden.scores[:3][::-1], atol=ATOL, what="scores")
    assert body["usage"]["total_tokens"] > 0
    assert body["id"].startswith("rerank-")
    assert "document" not in body["results"][0]
    objects = [{"text": document} for document in documents]
    shown = rerank(judge, documents=objects, top_n=2, return_documents=True).json["results"]
    assert [(result["index"], result["document"]) for result in shown] == [
        (2, {"text": "the other"}), (1, {"text": "what"})
    ]  # fmt: skip


def test_the_list_of_models_says_the_task(live: Live, judge: Live):
    for service, task in ((live, "embed"), (judge, "rerank")):
        (card,) = service.ask("/v1/models").json["data"]
        assert card["task"] == task
        assert "sampling" not in card


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [1, "a"]}, "input"),
        ({"input": [[1], "a"]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": 1}, "input"),
        ({"input": None}, "input"),
        ({"input": {"text": "a"}}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a b " * 500}, "input"),
        ({"input": ["a", "a b " * 200]}, "input"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": 15}, "dimensions"),
        ({"dimensions": 65}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"prompt_name": "passage"}, "prompt_name"),
        ({"truncate": True}, "truncate"),
        ({"messages": CHAT}, "messages"),
    ],
)
def test_wrong_requests_are_refused_before_anything_runs(
    fields: dict[str, Any], param: str, live: Live
):
    before = live.engine.llm.scheduler.stats().steps
    answer = embed(live, **{"given": "a", **({"given": fields.pop("input")} if "input" in fields
                                             else {}), **fields})  # fmt: skip
    assert answer.status == 400, answer.body
    assert re.split(r"[.\[]", answer.json["error"]["param"])[0] == param
    assert live.engine.llm.scheduler.stats().steps == before


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"query": ""}, "query"),
        ({"query": None}, "query"),
        ({"documents": []}, "documents"),
        ({"documents": ["a", ""]}, "documents"),
        ({"documents": "a"}, "documents"),
        ({"documents": [{"title": "a"}]}, "documents"),
        ({"documents": [1]}, "documents"),
        ({"documents": ["a b " * 500]}, "documents"),
        ({"documents": ["a"] * 2049}, "documents"),
        ({"top_n": 0}, "top_n"),
        ({"max_chunks_per_doc": 1}, "max_chunks_per_doc"),
    ],
)
def test_wrong_rerank_requests(fields: dict[str, Any], param: str, judge: Live):
    answer = rerank(judge, **fields)
    assert answer.status == 400, answer.body
    assert re.split(r"[.\[]", answer.json["error"]["param"])[0] == param


def test_an_id_outside_the_vocabulary(live: Live):
    answer = embed(live, [[1, 999_999]])
    assert (answer.status, answer.json["error"]["code"]) == (400, "invalid_value")


def test_each_model_does_what_it_is_for(live: Live, judge: Live, tiny_bundles: Bundles):
    """Every other endpoint refuses with the reason, prompts that are only scored included."""
    for service in (live, judge):
        for path, body in (
            ("/v1/chat/completions", {"messages": CHAT}),
            ("/v1/completions", {"prompt": "a"}),
            ("/v1/completions", {"prompt": "a", "echo": True, "logprobs": 1, "max_tokens": 1}),
        ):
            answer = service.ask(path, {"model": "tiny", **body})
            assert answer.status == 400
            assert "cannot generate" in answer.json["error"]["message"]
    assert "/v1/embeddings" in rerank(live).json["error"]["message"]
    assert "/v1/rerank" in embed(judge).json["error"]["message"]
    with running(tiny_bundles("qwen2")) as service:
        for answer in (embed(service), rerank(service)):
            assert answer.status == 400
            assert "generates text" in answer.json["error"]["message"]


def test_texts_count_in_the_metrics(live: Live):
    def value(name: str) -> float:
        text = live.ask("/metrics").body.decode()
        found = re.findall(rf"^{name}(?:{{[^}}]*}})? ([0-9.e+]+)$", text, re.MULTILINE)
        return sum(map(float, found))

    names = ("edgellm_requests_total", "edgellm_prompt_tokens_total")
    before = [value(name) for name in names]
    tokens = embed(live, list(TEXTS)).json["usage"]["prompt_tokens"]
    assert [value(name) - old for name, old in zip(names, before, strict=True)] == [
        len(TEXTS), tokens
    ]  # fmt: skip


def test_a_failed_engine_is_reported(pooling_bundles: PoolingBundles):
    engine = RealEngine()
    with (
        running(pooling_bundles("embed"), engine) as service,
        pytest.MonkeyPatch.context() as patch,
    ):

        def fail(_step: Any) -> Any:
            raise BackendError("cudaMalloc failed in /opt/secret/engine.plan")

        patch.setattr(engine.llm.backend, "forward", fail)
        answer = embed(service, list(TEXTS))
        assert (answer.status, answer.json["error"]["code"]) == (500, "engine_error")
        assert b"secret" not in answer.body
        assert service.idle()
        patch.undo()
        assert embed(service).status == 200  # one failed request spoils no other


def test_infinite_vectors_are_an_error(pooling_bundles: PoolingBundles):
    engine = RealEngine()
    with (
        running(pooling_bundles("embed"), engine) as service,
        pytest.MonkeyPatch.context() as patch,
    ):
        forward = engine.llm.backend.forward
        patch.setattr(
            engine.llm.backend, "forward", lambda step: np.full_like(forward(step), np.nan)
        )
        assert embed(service).json["error"]["code"] == "engine_error"


def test_a_full_queue_is_429(pooling_bundles: PoolingBundles):
    engine = RealEngine()
    with (
        running(
            pooling_bundles("embed"), engine, llm={"num_slots": 1, "queue_capacity": 1}
        ) as service,
        pytest.MonkeyPatch.context() as patch,
        ThreadPoolExecutor(2) as threads,
    ):
        forward = engine.llm.backend.forward

        def wait(step: Any) -> Any:
            engine.running.wait()
            return forward(step)

        patch.setattr(engine.llm.backend, "forward", wait)
        engine.running.clear()
        held = [threads.submit(embed, service, list(TEXTS[:2])) for _ in range(2)]
        while sum(_load(engine)) < 2:
            pass
        answer = embed(service)
        engine.running.set()
        statuses = sorted([each.result().status for each in held])
    assert (answer.status, answer.json["error"]["code"]) == (429, "queue_full")
    assert statuses[0] == 200


def test_texts_that_make_room_for_another_client_wait_again(pooling_bundles: PoolingBundles):
    engine = RealEngine()
    with (
        running(
            pooling_bundles("embed"),
            engine,
            llm={"num_slots": 1, "queue_capacity": 3},
            trusted_proxies=["127.0.0.1"],
        ) as service,
        pytest.MonkeyPatch.context() as patch,
        ThreadPoolExecutor(5) as threads,
    ):
        forward = engine.llm.backend.forward

        def wait(step: Any) -> Any:
            engine.running.wait()
            return forward(step)

        patch.setattr(engine.llm.backend, "forward", wait)
        engine.running.clear()
        held = []

        def send(client: str, texts: Sequence[str]) -> None:
            body, headers = {"model": "tiny", "input": list(texts)}, {"X-Edge-Client": client}
            before = sum(_load(engine))
            held.append(threads.submit(service.ask, "/v1/embeddings", body, headers=headers))
            until(lambda: sum(_load(engine)) > before)

        for _ in range(4):
            send("many", TEXTS[:1])
        send("one", TEXTS[1:2])
        engine.running.set()
        answers = [each.result() for each in held]
        outcomes = engine.llm.scheduler.stats().outcomes
    assert outcomes["stop"] == 5
    assert outcomes["rejected"]  # the newest text of the four, and perhaps it came again too soon
    assert [answer.status for answer in answers] == [200] * 5
    first, *_, other = (answer.json["data"][0]["embedding"] for answer in answers)
    # The fourth finds the rows of the first in the cache, which rounds its last token otherwise.
    again = answers[3].json["data"][0]["embedding"]
    assert again == pytest.approx(first, abs=1e-5)
    assert again != pytest.approx(other, abs=1e-2)


def _load(engine: RealEngine) -> tuple[int, int]:
    stats = engine.llm.scheduler.stats()
    return stats.running, stats.waiting


def test_openapi_lists_both(live: Live):
    paths = json.loads(live.ask("/openapi.json").body)["paths"]
    assert {"/v1/embeddings", "/v1/rerank"} <= paths.keys()
