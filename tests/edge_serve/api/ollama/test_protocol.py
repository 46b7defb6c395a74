"""No field of Ollama's API is accepted and ignored, but for those that a list names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge_serve.api.ollama.protocol import IGNORED, GenerateRequest, OllamaChatRequest, ShowRequest
from tests.edge_serve.api.fields import Pair, check_field, fields_of
from tests.edge_serve.api.weather import THINKING
from tests.edge_serve.scripted import Live

OPTIONS = {"temperature": 0, "num_predict": 4, "seed": 7}
SHARED = {"model": "tiny", "stream": False, "options": OPTIONS}
CHAT, TEXT = "/api/chat", "/api/generate"
BASES: dict[str, dict[str, Any]] = {
    CHAT: {**SHARED, "messages": [{"role": "user", "content": "what"}]},
    TEXT: {**SHARED, "prompt": "what"},
    "/api/show": {"model": "tiny"},
}
KINDS: dict[str, type] = {CHAT: OllamaChatRequest, TEXT: GenerateRequest, "/api/show": ShowRequest}


def option(name: str, one: Any, other: Any) -> Pair:
    return {"options": {**OPTIONS, name: one}}, {"options": {**OPTIONS, name: other}}


def said(field: str, one: Any, other: Any, role: str = "assistant", **base: Any) -> Pair:
    """Two chats with a message that differs in a field."""
    return tuple(  # type: ignore[return-value]
        {"messages": [{"role": role, "content": "a", **base, field: value}, *THINKING]}
        for value in (one, other)
    )


def called(**fields: Any) -> list[dict[str, Any]]:
    function = {"name": "f", "arguments": {}, **fields.pop("function", {})}
    return [{"id": "1", "function": function, **fields}]


def tool(kind: str = "function", /, **function: Any) -> dict[str, Any]:
    return {"tools": [{"type": kind, "function": {"name": "f", **function}}]}


SAMPLING: dict[str, Pair] = {
    "model": ({}, {"model": "other"}),
    "stream": ({"stream": True}, {"stream": False}),
    "format": ({"format": ""}, {"format": "json"}),
    "options": option("num_predict", 2, 3),
    "think": ({"think": True}, {"think": False}),
    "truncate": ({"truncate": False}, {"truncate": True}),
    "shift": ({"shift": False}, {"shift": True}),
    "logprobs": ({"logprobs": False}, {"logprobs": True}),
    "top_logprobs": ({"top_logprobs": 0}, {"top_logprobs": 1}),
    "keep_alive": ({"keep_alive": "5m"}, {"keep_alive": -1}),
    **{
        f"options.{name}": option(name, one, other)
        for name, one, other in (
            ("num_predict", 2, 3),
            ("temperature", 0, 1),
            ("top_k", 2, 5),
            ("top_p", 0.5, 0.9),
            ("min_p", 0.1, 0.2),
            ("seed", 1, 2),
            ("stop", "a", "b"),
            ("repeat_penalty", 1.1, 1.5),
            ("presence_penalty", 0.5, 1),
            ("frequency_penalty", 0.5, 1),
            ("num_ctx", 512, 100_000),
            ("repeat_last_n", -1, 64),
            ("mirostat", 0, 1),
            ("mirostat_eta", None, 0.1),
            ("mirostat_tau", None, 5),
            ("typical_p", 1, 0.5),
            ("tfs_z", 1, 0.5),
            ("penalize_newline", True, False),
            ("num_keep", 1, 2),
            ("num_batch", 1, 2),
            ("num_gpu", 1, 2),
            ("main_gpu", 0, 1),
            ("num_thread", 1, 2),
            ("numa", True, False),
            ("low_vram", True, False),
            ("use_mmap", True, False),
            ("use_mlock", True, False),
        )
    },
}
PAIRS: dict[str, dict[str, Pair]] = {
    CHAT: {
        **SAMPLING,
        "messages": ({}, {"messages": THINKING}),
        "messages[].role": said("role", "user", "assistant"),
        "messages[].content": said("content", "a", "b"),
        "messages[].thinking": said("thinking", "a", "x" * 200_000),
        "messages[].images": said("images", [], ["AAAA"], "user"),
        "messages[].tool_calls": said("tool_calls", [], called()),
        "messages[].tool_calls[].function": said(
            "tool_calls", called(), called(function={"name": "g"})
        ),
        "messages[].tool_calls[].function.name": said(
            "tool_calls", called(), called(function={"name": "g"})
        ),
        "messages[].tool_calls[].function.arguments": said(
            "tool_calls", called(), called(function={"arguments": {"a": 1}})
        ),
        "messages[].tool_calls[].function.index": said(
            "tool_calls", called(function={"index": 0}), called(function={"index": 1})
        ),
        "messages[].tool_calls[].index": said("tool_calls", called(index=0), called(index=1)),
        "messages[].tool_calls[].id": said("tool_calls", called(id="1"), called(id=1)),
        "messages[].tool_calls[].type": said(
            "tool_calls", called(type="function"), called(type=None)
        ),
        "messages[].tool_name": said("tool_name", "a", 1, "tool"),
        "messages[].tool_call_id": said("tool_call_id", "a", 1, "tool"),
        "tools": ({}, tool()),
        "tools[].type": (tool(), tool("other")),
        "tools[].function": (tool(), tool(name="g")),
        "tools[].function.name": (tool(), tool(name="g")),
        "tools[].function.description": (tool(description="a"), tool(description="b")),
        "tools[].function.parameters": (tool(), tool(parameters={"type": "object"})),
        "tools[].function.strict": (tool(strict=True), tool(strict=False)),
    },
    TEXT: {
        **SAMPLING,
        "prompt": ({"prompt": "a"}, {"prompt": "b"}),
        "suffix": ({}, {"suffix": "a"}),
        "system": ({"system": "a"}, {"system": "b"}),
        "template": ({"template": ""}, {"template": "a"}),
        "raw": ({"raw": True}, {"raw": False}),
        "images": ({"images": []}, {"images": ["AAAA"]}),
    },
    "/api/show": {
        "model": ({}, {"model": "other"}),
        "name": ({"model": None, "name": "tiny"}, {"model": None, "name": "other"}),
        "system": ({"system": ""}, {"system": "a"}),
        "template": ({"template": ""}, {"template": "a"}),
        "options": ({"options": None}, {"options": {}}),
        "verbose": ({"verbose": True}, {"verbose": False}),
    },
}


def test_every_field_is_tried_and_documented():
    for path, kind in KINDS.items():
        assert set(fields_of(kind, set())) == PAIRS[path].keys()
    assert set().union(*PAIRS.values()) >= IGNORED.keys()
    page = (Path(__file__).parents[4] / "docs" / "protocols.md").read_text("utf-8")
    (section,) = [part for part in page.split("\n## ") if part.startswith("Ollama's API")]
    named = {path.split("[")[0] for path in set().union(*PAIRS.values())}
    named = {path if path.startswith("options.") else path.split(".")[0] for path in named}
    assert not [name for name in {*IGNORED, *named} if f"`{name}`" not in section]


@pytest.mark.live
@pytest.mark.parametrize(
    ("path", "field"), [(path, field) for path, pairs in PAIRS.items() for field in pairs]
)
def test_a_field_makes_a_difference_or_the_list_says_why_not(
    service: Live, path: str, field: str, monkeypatch: pytest.MonkeyPatch
):
    first, second = ({**BASES[path], **changes} for changes in PAIRS[path][field])
    check_field(
        service, path, KINDS[path], (first, second), monkeypatch, is_ignored=field in IGNORED
    )
