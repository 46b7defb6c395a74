"""Turns chat messages into token ids.

A client's text is data. `encode_chat` renders the model's chat template such that only control
tokens written by the *template* become control tokens. The same characters in a message stay plain
text, whoever sent them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any

from edge.errors import BundleError, ContextLengthError, DependencyError, RequestError

from .known_templates import is_known_template
from .messages import normalize_messages, parse_arguments, plain_copy, refuse
from .reasoning import cut_reasoning, prompt_opens_reasoning
from .template_engine import Task, TemplateEngine, TemplateFailure

if TYPE_CHECKING:
    from edge.bundle.manifest import Tokens

    from .begun_answer import BegunAnswer
    from .template_trials import Tried
    from .tokenizer import Tokenizer

_MAX_SOURCE_CHARS = 1 << 18  # templates of tool-calling models have about 15,000
_REPAIR = "repair the source's template and export the bundle again"
# Names that a caller may not set: variables and functions of this module and of minijinja.
_RESERVED = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"}
    | {"raise_exception", "strftime_now", "namespace", "range", "dict", "debug"}
)


class ChatTemplate:
    """A model's Jinja chat template, run by ``minijinja`` with a bound on its work.

    It is set up as in ``transformers``: ``trim_blocks`` and ``lstrip_blocks`` are on, undefined
    values are empty, and there are ``raise_exception``, ``strftime_now``, a ``tojson`` that does
    not escape HTML, loop controls and ``{% generation %}``. The template sees plain JSON data only.

    A template of `known_templates` is compiled and rendered here. Any other one runs in a child
    with limits (`template_child`), since a few lines can ask for all memory or run forever. It is
    first tried with some short conversations.

    Attributes:
        source: the Jinja text.
        tokens: the manifest's tokens.
        variables: names that the template looks up; any other option would have no effect.
        is_known: whether it runs in this process.
    """

    def __init__(self, source: str, tokens: Tokens) -> None:
        """Compile the template, and try it if it is not known.

        Args:
            source: the Jinja text, e.g. of ``chat_template.jinja``.
            tokens: the manifest's bos and eos, for ``bos_token`` and ``eos_token``.

        Raises:
            BundleError: the template has a syntax error, is too long, or passes a limit with a
                short conversation.
            DependencyError: the ``minijinja`` library is missing.
            ResourceError: no process could be started for it, or it got hardly any time.
        """
        try:
            import_module("minijinja")  # checked here, since the child would only report a failure
        except ImportError as error:
            raise DependencyError(
                "chat templates need the package minijinja; pip install 'minijinja>=3.1'"
            ) from error
        if len(source) > _MAX_SOURCE_CHARS:
            raise BundleError(
                f"the chat template has {len(source)} characters, at most {_MAX_SOURCE_CHARS} are "
                f"taken; {_REPAIR}"
            )
        self.source = source
        self.tokens = tokens
        self.is_known = is_known_template(source)
        self._engine: TemplateEngine | None = None
        try:
            if self.is_known:
                self._engine = TemplateEngine(source)
                self.variables = self._engine.variables
            else:
                self.variables = self._try_in_child()
        except TemplateFailure as failure:
            what, place = "the chat template cannot be used", ", with a conversation of a few words"
            if failure.kind == "syntax":
                what, place = "the chat template does not compile", ""
            raise BundleError(f"{what}: {failure.why}{place}; {_REPAIR}") from failure

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **extra: Any,
    ) -> str:
        """Render messages to the model's prompt, as text.

        Encode it only if you trust every message: the text does not tell the template's control
        tokens from typed ones. `encode_chat` does.

        Args:
            messages: messages as `normalize_messages` takes them.
            add_generation_prompt: end with the opening of the assistant's answer.
            tools: JSON schemas of functions, in OpenAI's form.
            extra: further variables of the template, e.g. ``enable_thinking``.

        Raises:
            RequestError: a message is wrong, the template refuses the messages or passes a limit,
                or it has no use for ``tools``, for tool calls or for a variable of ``extra``.
            ResourceError: no process could be started for the template, or it got hardly any time.
        """
        plain_messages = self._normalize(messages)
        plain_tools, plain_extra = plain_copy([tools, extra], "tools and template options")
        return self._render(plain_messages, add_generation_prompt, plain_tools, plain_extra)

    def _normalize(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Normalize messages, and bring them into the form that this template reads.

        The arguments of calls, which may be JSON text, become objects if the template needs them
        so. A missing content beside calls becomes an empty one if the template fails without it.
        System messages become one, at the front, if the template refuses or drops some of several.
        """
        plain_messages = normalize_messages(messages)
        for index, message in enumerate(plain_messages):
            if "tool_calls" in message and "tool_calls" not in self.source:
                refuse(index, "tool_calls", "this model's chat template has no place for them")
            for call in message.get("tool_calls", []):
                if self._tried.wants_objects:
                    parse_arguments(index, call.get("function"))
            if message["content"] is None and self._tried.wants_content:
                message["content"] = ""
        systems = [message for message in plain_messages if message["role"] == "system"]
        if systems in ([], plain_messages[:1]) or self._tried.writes_each_system:
            return plain_messages
        text = "\n\n".join(message["content"] for message in systems if message["content"])
        others = [message for message in plain_messages if message["role"] != "system"]
        return [{**systems[0], "content": text}, *others]

    @cached_property
    def _tried(self) -> Tried:
        from .template_trials import Tried

        return Tried(self._try)

    def _try(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> str | None:
        """Render a conversation; None if the template fails."""
        try:
            return self._text(self._context(messages, True, tools))
        except TemplateFailure:
            return None

    def _render(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        tools: list[dict[str, Any]] | None,
        extra: dict[str, Any],
    ) -> str:
        """Render messages and options that are plain JSON data already, as `render` does."""
        context = self._context(messages, add_generation_prompt, tools)
        if tools and "tools" not in self.variables:
            raise RequestError("tools: this model's chat template has no place for them")
        for name, value in extra.items():
            if name in _RESERVED or name not in self.variables:
                raise RequestError(
                    f"{name}: this model's chat template has no such option; it reads "
                    f"{', '.join(sorted(self.variables - _RESERVED)) or 'none'}"
                )
            context[name] = value
        try:
            return self._text(context)
        except TemplateFailure as failure:
            what, why = "the chat template cannot render these messages", failure.why
            if failure.kind == "refused":
                what = "the chat template refuses these messages"
            elif failure.kind in ("fuel", "limit"):
                why += f"; shorten the messages ({len(messages)} now), or repair the template if it"
                why += " loops"
            raise RequestError(f"{what}: {why}") from failure

    def _text(self, context: dict[str, Any]) -> str:
        if self._engine is not None:
            return self._engine.render(context)
        from .template_child import ask

        return ask(Task(self.source, context)).text or ""

    def _context(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        tools: list[dict[str, Any]] | None,
    ) -> dict[str, Any]:
        return {
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self.tokens.bos_text,
            "eos_token": self.tokens.eos_text,
        }

    def _try_in_child(self) -> frozenset[str]:
        """Compile the template, render some short conversations, and return its variables.

        Raises:
            TemplateFailure: `TemplateEngine` failed, or reached a limit of the child (``limit``).
        """
        from .template_child import ask
        from .template_trials import CONVERSATIONS, TOOLS

        trials = [
            self._context(messages, prompt, tools)
            for messages in CONVERSATIONS
            for prompt in (True, False)
            for tools in (None, TOOLS)
        ]
        return frozenset(ask(Task(self.source, trials=trials)).variables)


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    begun: BegunAnswer | None = None,
    max_tokens: int | None = None,
    on_piece: Callable[[], None] | None = None,
    **extra: Any,
) -> list[int]:
    """Render messages and encode them; no message can smuggle in a control token.

    Every control token begins with one of a few characters (mostly ``<``). Before rendering, each
    of these characters in client data is swapped for a character that occurs nowhere else; it is
    swapped back in the plain pieces afterwards. Lengths stay the same, and the template cannot
    even put a control token together from parts of messages.

    Templates look for the reasoning tags of past answers, to cut the reasoning out. They cannot see
    these tags here, so `cut_reasoning` does it for them.

    Args:
        tokenizer: the model's tokenizer.
        template: the model's chat template.
        messages: messages as `normalize_messages` takes them.
        add_generation_prompt: end with the opening of the assistant's answer.
        tools: JSON schemas of functions, in OpenAI's form.
        begun: an answer to the messages that the model is to continue.
        max_tokens: refuse, before encoding, text that surely has more tokens.
        on_piece: called before each piece of a long text, as in `Tokenizer.encode`.
        extra: further variables of the template.

    Returns:
        Token ids, with exactly one bos if the template writes it or the model wants it.

    Raises:
        ContextLengthError: the rendered messages surely have more than ``max_tokens``.
        RequestError: `ChatTemplate.render` refuses the messages or an option.
    """
    plain_messages = [
        cut_reasoning(message, template.source) for message in template._normalize(messages)
    ]
    plain_rest = plain_copy([tools, extra], "tools and template options")
    texts = [] if begun is None else [begun.reasoning, begun.content]
    shield = _Shield(tokenizer, template, [plain_messages, plain_rest, texts])
    rendered = template._render(
        [{**shield.cover(message), "role": message["role"]} for message in plain_messages],
        add_generation_prompt,
        *shield.cover(plain_rest),
    )
    if begun is not None:
        rendered += begun.prompt(prompt_opens_reasoning(rendered), shield.cover)
    pieces = tokenizer.split_control(rendered)
    expected = [tokenizer.control_tokens[text] for text, is_control in pieces if is_control]
    if max_tokens is not None:
        plain = shield.uncover("".join(text for text, is_control in pieces if not is_control))
        least = len(expected) + tokenizer.least_tokens(plain)
        if least > max_tokens:
            raise ContextLengthError(least, max_tokens, at_least=True)

    # All is encoded in one go, so that the ids are the library's own. If it finds other control
    # tokens than the template wrote, someone typed one, and the pieces are encoded one by one.
    control_ids = frozenset(tokenizer.control_tokens.values())
    ids = tokenizer.encode(shield.uncover(rendered), control=True, on_piece=on_piece)
    if [id_ for id_ in ids if id_ in control_ids] != expected:
        ids = []
        for text, is_control in pieces:
            if is_control:
                ids.append(tokenizer.control_tokens[text])
            else:
                ids.extend(tokenizer.encode(shield.uncover(text), on_piece=on_piece))
    bos = tokenizer.tokens.bos
    if tokenizer.tokens.add_bos and bos is not None and ids[:1] != [bos]:
        ids.insert(0, bos)
    return ids


class _Shield:
    """Keeps the characters of one request's messages apart from those of the template."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, data: Any) -> None:
        self._tokenizer = tokenizer
        used = {*template.source, *json.dumps(data, ensure_ascii=False)}
        spare = (char for char in map(chr, range(0x10FFFF, 0xDFFF, -1)) if char not in used)
        firsts = sorted({text[0] for text in tokenizer.control_tokens})
        try:
            swaps = {first: next(spare) for first in firsts}
        except StopIteration:
            raise RequestError(
                "the messages use every character of Unicode; shorten them"
            ) from None
        self._cover = str.maketrans(swaps)
        self._uncover = str.maketrans({swap: first for first, swap in swaps.items()})

    def cover(self, value: Any) -> Any:
        """Swap the characters in every string of plain JSON data."""
        if isinstance(value, str):
            return value.translate(self._cover)
        if isinstance(value, list):
            return [self.cover(item) for item in value]
        if isinstance(value, dict):
            return {self._cover_key(key): self.cover(item) for key, item in value.items()}
        return value

    def _cover_key(self, key: str) -> str:
        # Keys are looked up by the template, so they are left alone unless they are dangerous.
        dangerous = any(is_control for _, is_control in self._tokenizer.split_control(key))
        return key.translate(self._cover) if dangerous else key

    def uncover(self, text: str) -> str:
        """Swap the characters back."""
        return text.translate(self._uncover)
