"""Which requests belong together, and where keys go when devices come and go."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_fleet.devices.affinity import affinity
from edge_fleet.devices.ring import Ring

CHAT = "/v1/chat/completions"
SYSTEM = {"role": "system", "content": "Be brief."}


def key(body: Any, path: str = CHAT, session: str = "", client: str = "anonymous") -> str | None:
    headers = {b"x-session-id": session.encode()} if session else {}
    return affinity(path, headers, msgspec.json.encode(body), client).key


def chat(*texts: str, **fields: Any) -> dict[str, Any]:
    messages = [
        {"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)
    ]
    return {"messages": [SYSTEM, *messages], **fields}


def test_the_turns_of_a_conversation_belong_together():
    first = key(chat("hello"))
    assert first == key(chat("hello", "hi", "what next?")) == key(chat("hello", temperature=0))
    assert first != key(chat("goodbye"))
    assert first != key({"messages": chat("hello")["messages"][1:]})  # no system prompt
    assert first != key(chat("hello", tools=[{"type": "function"}]))


@pytest.mark.parametrize(
    ("path", "body", "longer", "other"),
    [
        (
            "/v1/messages",
            {"system": "s", "messages": [{"role": "user", "content": "a"}]},
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}], "system": "s"},
            {"system": "t", "messages": [{"role": "user", "content": "a"}]},
        ),
        (
            "/v1/responses",
            {"instructions": "s", "input": [{"role": "user", "content": "a"}]},
            {"instructions": "s", "input": [{"role": "user", "content": "a"}, {"role": "user"}]},
            {"instructions": "s", "input": [{"role": "user", "content": "b"}]},
        ),
        ("/v1/responses", {"input": "a"}, {"input": "a", "stream": True}, {"input": "b"}),
        (
            "/v1/completions",
            {"prompt": "x" * 5000},
            {"prompt": "x" * 5000 + "y"},
            {"prompt": "y" * 5000},
        ),
        ("/api/generate", {"prompt": "a"}, {"prompt": "a", "options": {}}, {"prompt": "b"}),
    ],
)
def test_each_protocol_has_a_beginning(path: str, body: Any, longer: Any, other: Any):
    assert key(body, path) == key(longer, path)
    assert key(body, path) != key(other, path)


@pytest.mark.parametrize(
    "fields", [{"prompt_cache_key": "s"}, {"user": "s"}, {"metadata": {"user_id": "s"}}]
)
def test_a_session_has_one_place_whatever_it_asks(fields: dict[str, Any]):
    assert key(chat("a", **fields)) == key(chat("b", **fields)) == key(chat("c"), session="s")
    assert key(chat("a", **fields), session="t") == key(chat("c"), session="t")  # the header counts
    assert key(chat("a"), session="s") != key(chat("a"), session="s", client="other")
    assert key(chat("a"), client="one") != key(chat("a"), client="other")


def test_what_is_not_cached_belongs_nowhere():
    for path in ("/v1/embeddings", "/v1/rerank", "/tokenize", "/v1/messages/count_tokens"):
        assert key({"input": "a", "user": "s"}, path) is None


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b'{"messages": 3}'])
def test_what_is_no_request_goes_to_any_device(body: bytes):
    found = affinity(CHAT, {}, body, "anonymous")
    assert found.model is None
    assert found.key is None or body.startswith(b'{"m')


@given(st.recursive(st.none() | st.text() | st.integers(), lambda inner: st.lists(inner)))
def test_any_value_of_a_field_is_taken(value: Any):
    for name in ("messages", "model", "user", "metadata", "tools", "input", "prompt", "system"):
        found = affinity(CHAT, {}, msgspec.json.encode({name: value}), "anonymous")
        assert found.key is not None
        assert found.model == (value if name == "model" and isinstance(value, str) else None)


def test_a_lost_device_moves_only_its_own_share():
    names = [f"orin-{i}" for i in range(5)]
    whole, less = Ring(names), Ring(names[1:])
    keys = [f"key {i}" for i in range(5000)]
    homes = {each: next(whole.order(each)) for each in keys}
    shares = Counter(homes.values())
    assert set(shares) == set(names)
    assert max(shares.values()) < 1.5 * min(shares.values())
    for each in keys:
        if homes[each] != names[0]:
            assert next(less.order(each)) == homes[each]
    heirs = Counter(next(less.order(each)) for each in keys if homes[each] == names[0])
    assert set(heirs) == set(names[1:])  # nobody takes all of it
    assert all(sorted(whole.order(each)) == names for each in keys[:100])
