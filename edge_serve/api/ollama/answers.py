"""Defines the answers of Ollama's API as types; times are nanoseconds."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType


class AnsweredFunction(Struct):
    """Name and arguments of a call; ``index`` counts the calls of its answer."""

    name: str
    arguments: dict[str, Any]
    index: int


class AnsweredCall(Struct):
    """A call that the model asks for."""

    id: str
    function: AnsweredFunction


class OllamaAnswerMessage(Struct, omit_defaults=True):
    """An answer, or the text that a line adds to it."""

    content: str
    role: Literal["assistant"] | UnsetType = UNSET
    thinking: str | UnsetType = UNSET
    tool_calls: list[AnsweredCall] | UnsetType = UNSET


class OllamaCounts(Struct, kw_only=True):
    """Counts on every last line; ``load_duration`` is 0 if the model was loaded before."""

    model: str
    created_at: str
    done: bool = False
    done_reason: Literal["stop", "length", "load", "unload"] | UnsetType = UNSET
    total_duration: int | UnsetType = UNSET
    load_duration: int | UnsetType = UNSET
    prompt_eval_count: int | UnsetType = UNSET
    prompt_eval_duration: int | UnsetType = UNSET
    eval_count: int | UnsetType = UNSET
    eval_duration: int | UnsetType = UNSET


class OllamaChatAnswer(OllamaCounts, kw_only=True):
    """The answer to a chat, or one line of it."""

    message: OllamaAnswerMessage


class GenerateAnswer(OllamaCounts, kw_only=True):
    """The answer to a prompt, or one line of it."""

    response: str
    thinking: str | UnsetType = UNSET


class EmbedAnswer(Struct):
    """The answer to ``POST /api/embed``."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class EmbeddingsAnswer(Struct):
    """The answer to ``POST /api/embeddings``."""

    embedding: list[float]


class ModelDetails(Struct):
    """The format, family and size of a model."""

    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str
    format: str = "onnx"
    parent_model: str = ""


class OllamaModel(Struct):
    """A model that is served; ``/api/ps`` also says how long it stays loaded."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: ModelDetails
    expires_at: str | UnsetType = UNSET
    size_vram: int | UnsetType = UNSET
    context_length: int | UnsetType = UNSET


class OllamaModels(Struct):
    """The answer to ``GET /api/tags`` and ``GET /api/ps``."""

    models: list[OllamaModel]


class ShowAnswer(Struct):
    """The answer to ``POST /api/show``."""

    parameters: str
    template: str
    details: ModelDetails
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class VersionAnswer(Struct):
    """The answer to ``GET /api/version``."""

    version: str


class OllamaErrorResponse(Struct):
    """Any answer other than 200, and the last line of a stream that failed."""

    error: str
