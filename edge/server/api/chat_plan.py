"""What the fields of a chat request mean together, for one model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edge.errors import RequestError
from edge.runtime.sampling import SamplingParams
from edge.server.http.errors import invalid
from edge.server.models.registry import ServedModel
from edge.server.settings import ServerSettings

from .generate import check_choices, sampling_params
from .protocol import ChatRequest
from .structure import output_format
from .tools import forced_schema, prepare_messages, strict_calls, syntax_of, template_tools

# Tokens of reasoning for OpenAI's efforts; R1 and Qwen3 know none, so they are budgets here.
EFFORT_TOKENS = {"minimal": 256, "low": 1024, "medium": 4096, "high": None}


@dataclass(frozen=True)
class ChatPlan:
    """A request, understood."""

    params: SamplingParams
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    forced: bool
    thinking: bool
    options: dict[str, Any]


def plan_chat(request: ChatRequest, model: ServedModel, settings: ServerSettings) -> ChatPlan:
    """Check what the fields mean together.

    Raises:
        APIError, RequestError: they do not fit together, or not to the model.
    """
    limits = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise invalid(
            "max_tokens: differs from max_completion_tokens; give one of them", "max_tokens"
        )
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs: needs logprobs to be true", "top_logprobs")
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options: needs stream to be true", "stream_options")
    if len(request.messages) > settings.max_messages:
        raise invalid(f"messages: more than {settings.max_messages} messages", "messages")
    check_choices(request.n or 1, 1, settings.max_choices)
    template = model.llm.template.source if model.llm.template is not None else ""
    forced = forced_schema(request)
    tools = None
    if request.tools and request.tool_choice != "none":
        if forced is None and syntax_of(template) is None:
            raise RequestError(
                "tools: this model's chat template writes no tool calls in a form known here; "
                "send tool_choice with a function's name, or no tools"
            )
        tools = template_tools(request.tools)
    calls = strict_calls(request, syntax_of(template)) if forced is None else None
    output = output_format(request.response_format, forced, calls)
    thinking, budget = _thinking(request)
    options: dict[str, Any] = {}
    if output is not None:
        options["output"] = output
    if budget is not None:
        options["thinking_budget"] = budget
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    params = sampling_params(
        request,
        model.llm,
        max_tokens=next(iter(limits), None),
        logprobs=logprobs,
    )
    return ChatPlan(
        params,
        prepare_messages(request.messages, template),
        tools,
        forced is not None,
        thinking,
        options,
    )


def _thinking(request: ChatRequest) -> tuple[bool, int | None]:
    """Whether to reason at all, and for how many tokens.

    Raises:
        APIError: fields that contradict each other.
    """
    said = {}
    if request.enable_thinking is not None:
        said["enable_thinking"] = request.enable_thinking
    if request.chat_template_kwargs is not None:
        wanted = request.chat_template_kwargs.enable_thinking
        if wanted is not None:
            said["chat_template_kwargs"] = wanted
    if request.reasoning_effort is not None:
        said["reasoning_effort"] = request.reasoning_effort != "none"
    if len(set(said.values())) > 1:
        names = " and ".join(said)
        raise invalid(f"{names}: one turns the reasoning on, the other off", next(iter(said)))
    thinking = next(iter(said.values()), True)
    budget = request.thinking_token_budget
    if budget is None and request.reasoning_effort is not None and thinking:
        budget = EFFORT_TOKENS[request.reasoning_effort]
    if budget is not None and not thinking:
        raise invalid("thinking_token_budget: the reasoning is turned off", "thinking_token_budget")
    return thinking, budget
