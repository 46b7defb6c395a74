"""Defines requests of Ollama's API as types; an unknown field is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from edge.runtime.sampling_params import KNOBS
from edge_serve.api.protocol import ModelName, StopString, Tool, range_of

_MaybeName = Annotated[str, Meta(max_length=256)]
_WHOLE = Meta(multiple_of=1)
_WholeSeed = Annotated[float, _WHOLE, Meta(ge=-1, le=2**53)]  # larger floats have lost digits
KeepAlive = Annotated[str, Meta(max_length=64)] | float
_HARDWARE = "how the engine runs is the server's choice"
IGNORED = {
    "messages[].tool_calls[].type": "every call is of a function",
    "messages[].tool_calls[].index": "calls are in their order",
    "messages[].tool_calls[].function.index": "calls are in their order",
    "options.num_ctx": "the context is what --kv-capacity says; what does not fit is refused",
    "options.num_keep": "no prompt is cut",
    "options.num_batch": _HARDWARE,
    "options.num_gpu": _HARDWARE,
    "options.main_gpu": _HARDWARE,
    "options.num_thread": _HARDWARE,
    "options.numa": _HARDWARE,
    "options.low_vram": _HARDWARE,
    "options.use_mmap": _HARDWARE,
    "options.use_mlock": _HARDWARE,
    "verbose": "the answer is short",
}
"""Fields that are accepted without effect, by path, and why."""


class OllamaOptions(Struct, forbid_unknown_fields=True):
    """The field ``options``; an unsupported option accepts only the value that turns it off.

    A whole number may come as a float, since Ollama reads them all: Home Assistant sends 8192.0.
    """

    num_predict: Annotated[float, _WHOLE, Meta(ge=-2, le=KNOBS["max_tokens"].high)] | None = None
    temperature: Annotated[float, range_of("temperature")] | None = None
    top_k: Annotated[float, _WHOLE, Meta(ge=-1, le=KNOBS["top_k"].high)] | None = None
    top_p: Annotated[float, range_of("top_p")] | None = None
    min_p: Annotated[float, range_of("min_p")] | None = None
    seed: Annotated[int, Meta(ge=-1, le=2**63 - 1)] | _WholeSeed | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=16)] | None = None
    repeat_penalty: Annotated[float, range_of("repetition_penalty")] | None = None
    presence_penalty: Annotated[float, range_of("presence_penalty")] | None = None
    frequency_penalty: Annotated[float, range_of("frequency_penalty")] | None = None
    # The repetition penalty covers the whole prompt and answer.
    repeat_last_n: Annotated[float, Meta(ge=-1, le=-1)] | None = None
    mirostat: Annotated[float, Meta(ge=0, le=0)] | None = None
    mirostat_eta: None = None
    mirostat_tau: None = None
    typical_p: Annotated[float, Meta(ge=1, le=1)] | None = None
    tfs_z: Annotated[float, Meta(ge=1, le=1)] | None = None
    penalize_newline: Literal[True] | None = None
    num_ctx: Annotated[float, _WHOLE] | None = None
    num_keep: Any = None
    num_batch: Any = None
    num_gpu: Any = None
    main_gpu: Any = None
    num_thread: Any = None
    numa: Any = None
    low_vram: Any = None
    use_mmap: Any = None
    use_mlock: Any = None


class OllamaCalledFunction(Struct, forbid_unknown_fields=True):
    """Name and arguments of a call."""

    name: str
    arguments: dict[str, Any]
    index: Any = None


class OllamaCall(Struct, forbid_unknown_fields=True):
    """A call in a past answer; Ollama puts ``index`` in the function, Open WebUI beside it."""

    function: OllamaCalledFunction
    id: str | None = None
    index: Any = None
    type: Any = None


class OllamaMessage(Struct, forbid_unknown_fields=True):
    """A message; ``images`` are a user's pictures, each in base64.

    Ollama does not check roles: Continue sends the reasoning of an answer as a message before it.
    """

    role: Literal["system", "user", "assistant", "tool", "thinking"]
    content: str | None = None
    thinking: str | None = None
    images: list[str] | None = None
    tool_calls: list[OllamaCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class OllamaRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields that chats and generations share."""

    model: ModelName | None = None
    stream: bool | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: OllamaOptions | None = None
    think: bool | Literal["low", "medium", "high", "max"] | None = None
    # No text is dropped to make room for another, and log-probabilities exist in OpenAI's API only.
    truncate: Literal[False] | None = None
    shift: Literal[False] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    keep_alive: KeepAlive | None = None


class OllamaChatRequest(OllamaRequest, forbid_unknown_fields=True, kw_only=True):
    """The body of ``POST /api/chat``; without messages it only loads the model."""

    messages: list[OllamaMessage] | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None


class GenerateRequest(OllamaRequest, forbid_unknown_fields=True, kw_only=True):
    """The body of ``POST /api/generate``; without a prompt it only loads the model.

    Ollama's own client, in Go, sends every missing text as an empty one.
    """

    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    raw: bool | None = None
    images: list[str] | None = None

    def __post_init__(self) -> None:
        self.suffix, self.system = self.suffix or None, self.system or None


class ShowRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of ``POST /api/show``; ``name`` is the older word for ``model``.

    The Go client sends one of ``model`` and ``name``, and leaves the other empty.
    """

    model: _MaybeName | None = None
    name: _MaybeName | None = None
    system: Literal[""] | None = None
    template: Literal[""] | None = None
    options: None = None
    verbose: Any = None


class EmbedRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of ``POST /api/embed``; without a text it only loads the model.

    It takes the ``options`` of chats, since LangChain sends all of them; no text is sampled.
    """

    model: ModelName | None = None
    input: str | list[str] | None = None
    truncate: bool | None = None
    dimensions: Annotated[int, Meta(ge=1, le=1 << 20)] | None = None
    options: OllamaOptions | None = None
    keep_alive: KeepAlive | None = None


class EmbeddingsRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of ``POST /api/embeddings``, the older form: one text, which is never truncated."""

    model: ModelName | None = None
    prompt: str | None = None
    options: OllamaOptions | None = None
    keep_alive: KeepAlive | None = None
