"""Votes and thoughts that end early, over HTTP."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.edge_serve.api.test_chat import joined
from tests.edge_serve.scripted import Live, until

ASKED = [{"role": "user", "content": "How many are it?"}]
VOTE: dict[str, Any] = {"temperature": 1, "top_p": 0.01, "seed": 3, "messages": ASKED}
TWO = {"first": 2, "most": 4, "error": 0.15}  # two that agree are enough


@pytest.fixture(autouse=True)
def _says_four(live: Live) -> None:
    live.engine.say(ASKED, "Two and two.\n</think>\n\nIt is 4.")


def test_a_chat_has_the_result_of_its_vote(live: Live):
    body = live.chat(**VOTE, vote=TWO).json
    (choice,) = body["choices"]
    message = choice["message"]
    assert message["content"] == "It is 4."
    vote = message["vote"]
    assert (vote["answer"], vote["agreed"], vote["counted"]) == ("4", 2, 2)
    assert vote["decided"] is True
    assert [sample["text"] for sample in vote["samples"]] == ["It is 4."] * 2
    assert message["reasoning"] == "1: 4\n2: 4\n2 of 2 answers agree\nTwo and two."
    tokens = sum(sample["tokens"] for sample in vote["samples"])
    assert body["usage"]["completion_tokens"] == tokens
    assert body["usage"]["prompt_tokens"] == len(live.engine.llm.encode(ASKED))
    assert "vote" not in live.chat(**VOTE).json["choices"][0]["message"]


def test_a_stream_has_progress_and_then_the_answer(live: Live):
    *events, done = live.chat(**VOTE, vote=TWO, stream=True).events
    assert done == "[DONE]"
    assert joined(events, "content") == "It is 4."
    assert joined(events, "reasoning").startswith("1: 4\n2: 4\n2 of 2 answers agree")
    last = events[-1]["choices"][0]
    assert last["finish_reason"] == "stop"
    assert last["delta"]["vote"]["agreed"] == 2


def test_samples_without_an_answer_come_back(live: Live):
    message = live.chat(**VOTE, vote={"most": 3, "answers": "boxed"}).json["choices"][0]["message"]
    assert message["vote"]["answer"] is None
    assert message["vote"]["decided"] is False
    assert [each["text"] for each in message["vote"]["samples"]] == ["It is 4."] * 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 2, "vote": {}}, "leave n out"),
        ({"vote": {"most": 9}}, "9 samples are more than the 8"),
        ({"temperature": 0, "vote": {}}, "at temperature 0 all samples are the same"),
        ({"vote": {"answers": "regex:["}}, "is wrong"),
    ],
)
def test_what_cannot_be_voted_on_is_refused(live: Live, fields: dict[str, Any], message: str):
    answer = live.chat(**{**VOTE, **fields})
    assert answer.status == 400
    assert message in answer.json["error"]["message"]


def test_a_confidence_arrives(live: Live):
    before = live.engine.llm.stop_counts.copy()
    question = [{"role": "user", "content": "At length?"}]
    live.engine.say(question, "They say so. " * 9 + "\n\n" + "so " * 20 + "</think>\n\nIt is 4.")
    asked = {"messages": question, "temperature": 0, "max_tokens": 200}
    assert live.chat(**asked, stop_when_sure=0).status == 200
    assert live.engine.llm.stop_counts == before
    assert live.chat(**asked, stop_when_sure=0.9).status == 200
    assert live.engine.llm.stop_counts.total() > before.total()


def test_results_of_trials_are_counted(live: Live):
    live.engine.llm.stop_counts.update(tried=2, stopped=1, too_expensive=3)
    counts = {**live.engine.llm.stop_counts, "too_dear": 3}  # its old name, for this release
    assert live.ask("/stats").json["models"]["tiny"]["stop_counts"] == counts
    lines = live.ask("/metrics").body.decode().splitlines()
    for outcome, count in counts.items():
        name = f'edgellm_stop_when_sure_total{{model="tiny",outcome="{outcome}"}}'
        assert f"{name} {float(count)}" in lines


def test_a_client_that_leaves_ends_all_samples(live: Live):
    live.engine.say(ASKED, "on and on " * 40)
    live.engine.delay_s = 0.01
    try:
        body = json.dumps({"model": "tiny", **VOTE, "vote": {"most": 3}}).encode()
        with live.connect() as connection:
            head = (
                "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
                f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            )
            connection.sendall(head.encode() + body)
            until(lambda: live.engine.llm.scheduler.stats().running == 3)
        assert live.idle(), "samples go on without their client"
    finally:
        live.engine.delay_s = 0.0


def test_the_openai_client_votes(live: Live):
    openai = pytest.importorskip("openai")
    asked = {"model": "tiny", "messages": ASKED, "temperature": 1, "top_p": 0.01, "seed": 3}
    extra = {"vote": {**TWO, "answers": "number"}}
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(**asked, extra_body=extra)
        chunks = list(client.chat.completions.create(**asked, extra_body=extra, stream=True))
        with pytest.raises(openai.BadRequestError, match="at temperature 0"):
            client.chat.completions.create(**{**asked, "temperature": 0}, extra_body=extra)
    message = answer.choices[0].message
    assert message.content == "It is 4."
    assert (message.vote["answer"], message.vote["agreed"]) == ("4", 2)
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == "It is 4."
    thoughts = "".join(getattr(delta, "reasoning", None) or "" for delta in deltas)
    assert thoughts == message.reasoning
    assert deltas[-1].vote["agreed"] == 2
    assert [sample["text"] for sample in deltas[-1].vote["samples"]] == ["It is 4."] * 2


def test_a_vote_counts_as_one_request_with_all_tokens(live: Live):
    def counts() -> tuple[int, int]:
        stats = live.ask("/stats").json
        return stats["requests"].get("stop", 0), sum(stats["generation_tokens"].values())

    before = counts()
    answer = live.chat(**VOTE, vote=TWO).json
    usage, vote = answer["usage"], answer["choices"][0]["message"]["vote"]
    requests, tokens = counts()
    assert requests - before[0] == 1
    assert tokens - before[1] == usage["completion_tokens"]
    assert usage["completion_tokens"] == sum(sample["tokens"] for sample in vote["samples"])
