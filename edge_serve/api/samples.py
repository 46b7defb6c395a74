"""Decodes a sample of each request before the server starts."""

from __future__ import annotations

import msgspec
from msgspec import Struct

from edge.errors import DependencyError

from .anthropic.protocol import CountTokensRequest, MessagesRequest
from .ollama.protocol import (
    EmbeddingsRequest,
    EmbedRequest,
    GenerateRequest,
    OllamaChatRequest,
    ShowRequest,
)
from .protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    LoadAdapterRequest,
    LoadRequest,
    RerankRequest,
    TokenizeRequest,
    UnloadAdapterRequest,
    decode,
)
from .responses.protocol import ResponsesRequest

SAMPLES: dict[type[Struct], bytes] = {
    ChatRequest: (
        b'{"messages": [{"role": "user", "content": "hello"}], "stop": ["."], "seed": 1, '
        b'"stream_options": {"include_usage": true, "include_obfuscation": false}, '
        b'"logit_bias": {"1": 0.5}, "response_format": {"type": "json_schema", "json_schema": '
        b'{"name": "a", "schema": {}}}, "tools": [{"type": "function", "function": {"name": "a"}}],'
        b' "tool_choice": "auto", "chat_template_kwargs": {"enable_thinking": true}}'
    ),
    CompletionRequest: b'{"prompt": ["hello", [1, 2]], "max_tokens": 1, "temperature": 0}',
    TokenizeRequest: b'{"prompt": "hello", "add_special_tokens": true}',
    DetokenizeRequest: b'{"tokens": [1, 2]}',
    EmbeddingRequest: b'{"input": ["hello", [1, 2]], "encoding_format": "base64", "dimensions": 2}',
    RerankRequest: b'{"query": "a", "documents": ["b", {"text": "c"}], "top_n": 1}',
    MessagesRequest: (
        b'{"max_tokens": 1, "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}'
        b']}, {"role": "assistant", "content": [{"type": "thinking", "thinking": "a"}, {"type": '
        b'"tool_use", "id": "1", "name": "f", "input": {}}]}, {"role": "user", "content": '
        b'[{"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "b"}]}]'
        b'}], "thinking": {"type": "enabled", "budget_tokens": 1}, "tool_choice": {"type": "auto"}}'
    ),
    ResponsesRequest: (
        b'{"input": [{"role": "user", "content": "hello"}], "text": {"format": {"type": "text"}}, '
        b'"background": false, "tool_choice": "auto", "reasoning": {"effort": "low"}}'
    ),
    OllamaChatRequest: (
        b'{"messages": [{"role": "user", "content": "hello"}], "think": "low", "format": "json", '
        b'"options": {"stop": ["a"], "tfs_z": 1, "repeat_last_n": -1, "penalize_newline": true}}'
    ),
    GenerateRequest: b'{"prompt": "hello", "format": {"type": "object"}, "think": true}',
    ShowRequest: b'{"model": "a"}',
    LoadRequest: b'{"model": "a"}',
    LoadAdapterRequest: b'{"lora_name": "a", "lora_path": "b", "load_inplace": true}',
    UnloadAdapterRequest: b'{"lora_name": "a"}',
    EmbedRequest: b'{"input": ["a"], "truncate": true, "dimensions": 2, "options": {"num_ctx": 8}}',
    EmbeddingsRequest: b'{"prompt": "a", "keep_alive": "5m"}',
    CountTokensRequest: b'{"messages": [{"role": "user", "content": "a"}], "system": "b"}',
}


def check_decoding() -> None:
    """Decode a sample of each request, since msgspec resolves a type only when it first uses it.

    Raises:
        DependencyError: the installed msgspec cannot, and every request would get an error 500.
    """
    for kind, body in SAMPLES.items():
        try:
            decode(body, kind, max_nesting=16)
        except Exception as error:
            raise DependencyError(
                f"msgspec {msgspec.__version__} cannot read a {kind.__name__} ({error}); run: "
                "pip install --upgrade msgspec"
            ) from error
