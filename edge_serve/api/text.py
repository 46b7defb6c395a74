"""Serves ``/tokenize``, ``/detokenize`` and ``/tokenizer_info``, in vLLM's form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edge.errors import RequestError
from edge.text.chat_template import encode_chat
from edge_serve.http.errors import invalid
from edge_serve.http.threads import OnPiece
from edge_serve.models.registry import ServedModel
from edge_serve.settings import ServerSettings

from .answers import DetokenizeResponse, TokenizeResponse
from .generate import check_length, check_messages, check_texts
from .generic_tools import place_tools
from .messages import check_prompt_end, prepare_messages
from .protocol import DetokenizeRequest, TokenizeRequest
from .tool_use import template_tools

if TYPE_CHECKING:
    from edge.runtime.llm import LLM
    from edge_serve.models.bundle_text import BundleText

# To measure perplexity, clients encode a whole document and cut it afterwards.
_LEAST_ROOM_TOKENS = 32_768


def tokenize(
    body: TokenizeRequest, model: ServedModel, settings: ServerSettings, on_piece: OnPiece
) -> TokenizeResponse:
    """Encode a text, in which control tokens stay text, or a chat.

    Raises:
        APIError, RequestError: the body has both or neither; it cannot be encoded; or it surely
            exceeds the context, or 32,768 tokens if the context is smaller.
    """
    llm = model.llm
    if (body.prompt is None) == (body.messages is None):
        raise invalid("prompt: give either prompt or messages", "prompt")
    capacity = max(llm.kv_capacity, _LEAST_ROOM_TOKENS)
    values = [body.prompt, body.messages, body.tools]
    check_texts(llm, values, "prompt", capacity=capacity)
    if body.messages is not None:
        if body.add_special_tokens:
            raise invalid(
                "add_special_tokens: belongs to prompt; the template writes those of messages",
                "add_special_tokens",
            )
        check_messages(len(body.messages), settings)
        if llm.template is None:
            raise RequestError("messages: this model has no chat template; send prompt")
        tools = template_tools(body.tools) if body.tools else None
        messages, tools = place_tools(prepare_messages(body.messages), tools, llm.template)
        if body.continue_final_message:
            check_prompt_end(True, body.add_generation_prompt)
            ids = llm.encode(
                messages,
                tools=tools,
                continue_final_message=True,
                max_tokens=capacity,
                on_piece=on_piece,
            )
        else:
            ids = encode_chat(
                llm.tokenizer,
                llm.template,
                messages,
                add_generation_prompt=body.add_generation_prompt is not False,
                tools=tools,
                max_tokens=capacity,
                on_piece=on_piece,
            )
    else:
        assert body.prompt is not None
        if body.tools is not None:
            raise invalid("tools: belong to messages", "tools")
        if body.add_generation_prompt is not None:
            raise invalid("add_generation_prompt: belongs to messages", "add_generation_prompt")
        if body.continue_final_message:
            raise invalid("continue_final_message: belongs to messages", "continue_final_message")
        check_length(llm, [body.prompt], "prompt", capacity=capacity)
        add_bos = body.add_special_tokens is not False and llm.manifest.tokens.add_bos
        ids = llm.tokenizer.encode(body.prompt, add_bos=add_bos, on_piece=on_piece)
    texts = None
    if body.return_token_strs:
        texts = [llm.tokenizer.token_bytes(id_).decode("utf-8", "replace") for id_ in ids]
    return TokenizeResponse(len(ids), llm.kv_capacity, ids, texts)


def detokenize(body: DetokenizeRequest, model: ServedModel) -> DetokenizeResponse:
    """Return the text of token ids, control tokens included.

    Raises:
        APIError: 400, there are more ids than the context holds.
    """
    if len(body.tokens) > model.llm.kv_capacity:
        raise invalid(
            f"tokens: {len(body.tokens)} are more than the {model.llm.kv_capacity} that the "
            "context holds; send them in parts",
            "tokens",
        )
    return DetokenizeResponse(model.llm.tokenizer.decode(body.tokens))


def tokenizer_info(llm: LLM | BundleText) -> dict[str, Any]:
    """Describe the tokenizer for clients such as ``lm-eval`` with a remote tokenizer."""
    tokens = llm.manifest.tokens
    return {
        "tokenizer_class": type(llm.tokenizer).__name__,
        "bos_token": tokens.bos_text if tokens.bos is not None else None,
        "eos_token": tokens.eos_text,
        "add_bos_token": tokens.add_bos,
        "vocab_size": llm.manifest.model.vocab_size,
        "model_max_length": llm.kv_capacity,
        "chat_template": None if llm.template is None else llm.template.source,
        "control_tokens": dict(llm.tokenizer.control_tokens),
    }
