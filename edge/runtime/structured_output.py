"""Forces an answer into a form: JSON, a JSON schema, a regular expression or a grammar.

The form is compiled by llguidance (https://github.com/guidance-ai/llguidance) into an automaton
over the model's tokens. Before each token the automaton says which tokens may come, and the sampler
draws among those. So the text of a finished answer always has the form, whatever the model.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge.errors import DependencyError, RequestError, ResourceError, install_command
from edge.files import MALFORMED
from edge.limited_child import ChildError, LimitedChild, LimitError, Limits

from .closed_schema import close_schema
from .grammar_check import GrammarTask
from .schema_rewrite import rewrite_schema

if TYPE_CHECKING:
    from edge.text.tokenizer import Tokenizer

OutputKind = Literal["json_object", "json_schema", "regex", "grammar", "tool_calls"]

_NOUNS = {
    "json_object": "JSON object",
    "json_schema": "JSON schema",
    "regex": "regular expression",
    "grammar": "grammar",
    "tool_calls": "JSON schema of tools or answer",
}
_SCHEMA_HINT = (
    "leave that keyword out or write it with supported ones "
    "(type, properties, required, items, enum, const, anyOf, $ref and $defs, pattern, bounds)"
)
_HINTS = {
    "json_schema": _SCHEMA_HINT,
    "tool_calls": _SCHEMA_HINT,
    "regex": "use the syntax of Rust's regex crate: no look-around, no back-references",
    "grammar": "use Lark's syntax as llguidance reads it, with a rule named start",
}
_SCHEMA_OPTIONS = {
    "lenient": False,
    # A model that loses its way may write white space forever where JSON allows it.
    "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,64}",
    # Without u, since a key spelled with it would match none of the schema's names.
    "json_allowed_escapes": 'nrbtf\\"',
}
_CACHED_GRAMMARS = 32
_CHECK = "edge.runtime.grammar_check:work"
_CHECK_NICE = 10  # because the engine decodes for others meanwhile
CHECK_MEMORY_BYTES = 1 << 30


class HasSchema(Protocol):
    """A Pydantic model's class, or another object that has a JSON schema."""

    def model_json_schema(self) -> dict[str, Any]:
        """Return the schema."""


@dataclass(frozen=True)
class OutputFormat:
    """The form that an answer must have.

    Attributes:
        kind: one of five kinds. ``json_object`` is any object. ``json_schema`` is draft 2020-12;
            properties come in the schema's order, and no others unless it says
            ``additionalProperties``. ``regex`` is an expression for the whole answer, in the syntax
            of Rust's regex crate. ``grammar`` is Lark with llguidance's extensions. ``tool_calls``
            is any text, in which text between two marks keeps to a schema; or either such calls or
            JSON.
        source: the schema (plain data, JSON text or a Pydantic model; kept as text), the
            expression or the grammar; None for ``json_object``. For ``tool_calls`` it is an object
            with the marks ``start`` and ``end``, and ``schema``. It also has ``answer``, a schema,
            if an answer without calls is JSON.

    Raises:
        RequestError: the kind is unknown, or the source has a wrong type for it.
    """

    kind: OutputKind
    source: str | Mapping[str, Any] | HasSchema | None = None

    def __post_init__(self) -> None:
        if self.kind not in _NOUNS:
            raise RequestError(
                f"unknown output format {self.kind!r:.80}; use one of {', '.join(_NOUNS)}"
            )
        source = self.source
        of_model = getattr(source, "model_json_schema", None)
        if self.kind == "json_schema" and callable(of_model):
            source = of_model()
        if self.kind in ("json_schema", "tool_calls") and isinstance(source, Mapping):
            try:
                text = msgspec.json.encode(source).decode()
            except (TypeError, *MALFORMED) as error:
                raise RequestError(f"the JSON schema is not plain JSON data: {error}") from error
            object.__setattr__(self, "source", text)
        elif (self.source is None) != (self.kind == "json_object"):
            needs = "takes no" if self.kind == "json_object" else "needs a"
            raise RequestError(f"the output format {self.kind} {needs} source")
        if not isinstance(self.source, str | None):
            raise RequestError(
                f"a {_NOUNS[self.kind]} is given as text, not as {self.source!r:.80}"
            )

    @property
    def text(self) -> str:
        """Return the source as text; for ``json_object``, the schema of any object."""
        return '{"type":"object"}' if self.source is None else str(self.source)


@dataclass(frozen=True)
class GrammarLimits:
    """Limits on a form, since forms come from clients.

    Attributes:
        max_bytes: size of its source.
        max_depth: nested brackets of a JSON schema.
        max_properties: entries of all ``properties`` of a JSON schema together.
        compile_s: CPU seconds that the compiler may take.
    """

    max_bytes: int = 1 << 16
    max_depth: int = 64
    max_properties: int = 1000
    compile_s: int = 2


class GrammarCompiler:
    """Compiles output formats for one model; one object per bundle, safe to share.

    The automaton of the vocabulary is built at the first use (about 0.2 s per 50,000 tokens).

    Args:
        tokenizer: the bundle's tokenizer.
        vocab_size: length of a row of logits; ids beyond the tokenizer are never allowed.
        limits: limits on a form; None is `GrammarLimits` with its defaults.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, limits: GrammarLimits | None = None
    ) -> None:
        self.vocab_size = vocab_size
        self._tokenizer = tokenizer
        self._limits = limits or GrammarLimits()
        self._lock = threading.Lock()  # guards the matchers; held for a moment
        self._compiling = threading.Lock()  # one process at a time, whatever clients send
        self._vocabulary: Any = None
        self._matchers: OrderedDict[OutputFormat, Any] = OrderedDict()
        self._used: OrderedDict[bytes, OutputFormat] = OrderedDict()

    def __contains__(self, output: OutputFormat) -> bool:
        """Whether a form is kept, so that `compile` takes microseconds."""
        with self._lock:
            return output in self._matchers

    def compile(self, output: OutputFormat) -> GrammarConstraint:
        """Make the constraint of one sequence.

        A form that was compiled before (the last 32 are kept) takes microseconds. A new form is
        first compiled in a process of its own, which takes about 0.1 s and can be ended.

        Raises:
            RequestError: the form is malformed, uses unsupported features, or passes a limit.
            DependencyError: llguidance is missing.
            ResourceError: no process could be started, or it got hardly any time.
        """
        with self._lock:
            if (matcher := self._matchers.get(output)) is not None:
                self._matchers.move_to_end(output)
        if matcher is None:
            matcher = self._compile(output)
            with self._lock:
                self._matchers[output] = matcher
                if len(self._matchers) > _CACHED_GRAMMARS:
                    self._matchers.popitem(last=False)
        return GrammarConstraint(matcher.deep_copy(), self.vocab_size, _NOUNS[output.kind])

    def check(self, output: OutputFormat) -> str:
        """Return a form's grammar, once it has been compiled without the vocabulary; keep nothing.

        Raises:
            EdgeError: any error of `compile`.
        """
        library = _import_llguidance()
        names = self._tokenizer.control_tokens
        grammar = _to_grammar(library, output, self._limits, names, is_closed=True)
        if '"oneOf"' in output.text:
            # llguidance must see that no two branches hold at once before they are closed.
            open_grammar = _to_grammar(library, output, self._limits, names, is_closed=False)
            if open_grammar != grammar:
                self._check(output.kind, open_grammar)
        if output.kind != "json_object":
            self._check(output.kind, grammar)
        return grammar

    def use_for(self, wanted: OutputFormat, used: OutputFormat) -> None:
        """Remember a replacement for a form that cannot be compiled (the last 32)."""
        with self._lock:
            self._used[_digest(wanted)] = used
            if len(self._used) > _CACHED_GRAMMARS:
                self._used.popitem(last=False)

    def used_for(self, wanted: OutputFormat) -> OutputFormat:
        """Return the replacement that `use_for` remembered for a form; else the form itself."""
        with self._lock:
            return self._used.get(_digest(wanted), wanted)

    def _compile(self, output: OutputFormat) -> Any:
        library = _import_llguidance()
        grammar = self.check(output)
        with self._compiling:
            if self._vocabulary is None:
                self._vocabulary = _build_vocabulary(library, self._tokenizer, self.vocab_size)
        limits = library.LLParserLimits(verbose_errors=False)
        matcher = library.LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # the first is the slowest; here the engine need not wait
        if matcher.is_error():
            _refuse(output.kind, matcher.get_error())
        return matcher

    def _check(self, kind: OutputKind, grammar: str) -> None:
        limits = Limits(self._limits.compile_s, CHECK_MEMORY_BYTES, nice=_CHECK_NICE, tasks=1)
        task = GrammarTask(grammar, list(self._tokenizer.control_tokens))
        try:
            # A child for each, so that memory left by one grammar is not taken from the next.
            with self._compiling, LimitedChild(_CHECK, limits) as child:
                error = child.ask(msgspec.json.encode(task))
        except LimitError:
            _refuse_cost(kind, self._limits)
        except ChildError as failure:
            raise ResourceError(
                f"the process that compiles the {_NOUNS[kind]} failed: {str(failure)[-300:]}; "
                "is llguidance installed whole?"
            ) from failure
        if error:
            _refuse(kind, error.decode("utf-8", "replace"))


def _digest(output: OutputFormat) -> bytes:
    """Return a key whose size does not depend on the form's."""
    text = f"{output.kind} {output.text}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


class GrammarConstraint:
    """Keeps one sequence to a grammar, as an `edge.runtime.scheduler.Constraint`.

    An end token is allowed only where the text may end, and nothing else where it must end.

    Args:
        matcher: an llguidance ``LLMatcher`` that nothing else uses.
        vocab_size: length of the mask.
        noun: name of the form in errors.
    """

    def __init__(self, matcher: Any, vocab_size: int, noun: str) -> None:
        self._matcher = matcher
        self._noun = noun
        words = (vocab_size + 31) // 32
        self._bits = np.zeros(4 * words, np.uint8)
        self._rows = np.empty((4 * words, 8), np.float32)
        self._mask: NDArray[np.float32] = self._rows.reshape(-1)[:vocab_size]

    def mask(self) -> NDArray[np.float32]:
        """Return numbers to add to the next logits: float32 ``[vocab]`` of 0 and -inf.

        The array is valid until the next call.

        Raises:
            RequestError: the automaton passed llguidance's limits on the work per token.
        """
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.size)
        if self._matcher.is_error():
            raise RequestError(
                f"the {self._noun} became too complex for the answer so far "
                f"({_first_line(self._matcher.get_error())}); simplify it"
            )
        np.take(_BYTE_TO_MASK, self._bits, axis=0, out=self._rows, mode="clip")
        return self._mask

    def accept(self, token_id: int) -> None:
        """Advance by a sampled token.

        Raises:
            RequestError: the mask forbids the token.
        """
        if not self._matcher.consume_token(token_id):
            raise RequestError(
                f"token {token_id} breaks the {self._noun} "
                f"({_first_line(self._matcher.get_error())})"
            )

    @property
    def may_end(self) -> bool:
        """Whether the text so far is complete."""
        accepting: bool = self._matcher.is_accepting()
        return accepting


def _masks_of_bytes() -> NDArray[np.float32]:
    """Return for every byte of a bit mask, lowest bit first, the numbers for its eight logits."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.where(bits == 1, 0.0, -np.inf).astype(np.float32)


_BYTE_TO_MASK = _masks_of_bytes()


def _import_llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise DependencyError(
            f"structured output needs the package llguidance; run: {install_command('serve')}"
        ) from error
    return llguidance


class _Vocabulary:
    """The model's tokens, with the methods that `llguidance.TokenizerWrapper` needs."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        # Ids beyond the tokenizer have no bytes and are never allowed.
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(vocab_size)]
        # A control token is allowed only by a rule that names it.
        special = {*tokenizer.control_tokens.values(), *tokenizer.tokens.eos}
        self.special_token_ids = sorted(special)
        self.eos_token_id = tokenizer.tokens.eos[0]
        self.bos_token_id = tokenizer.tokens.bos
        self._tokenizer = tokenizer
        self._of_byte = {
            token: token_id
            for token_id, token in enumerate(self.tokens)
            if len(token) == 1 and token_id not in special
        }

    def __call__(self, text: bytes | str) -> list[int]:
        """Return the tokens of text that must come; their bytes are the text's own.

        A tokenizer may change the text, e.g. to NFC. Then a part is cut until it is unchanged.
        """
        data = text.encode() if isinstance(text, str) else text
        chars = data.decode()
        ids = self._tokenizer.encode(chars, goes_on=True)
        if b"".join(self.tokens[token_id] for token_id in ids) == data:
            return ids
        if len(chars) == 1:
            singles = [data[i : i + 1] for i in range(len(data))]
            # A vocabulary without these bytes cannot write the character at all.
            has_all = all(byte in self._of_byte for byte in singles)
            return [self._of_byte[byte] for byte in singles] if has_all else ids
        middle = len(chars) // 2
        return [*self(chars[:middle]), *self(chars[middle:])]


def _build_vocabulary(library: Any, tokenizer: Tokenizer, vocab_size: int) -> Any:
    if not tokenizer.tokens.eos:
        raise RequestError("structured output needs an end token, and this model has none")
    wrapper = library.TokenizerWrapper(_Vocabulary(tokenizer, vocab_size))
    return library.LLTokenizer(wrapper, n_vocab=vocab_size, eos_token=list(tokenizer.tokens.eos))


def _to_grammar(
    library: Any,
    output: OutputFormat,
    limits: GrammarLimits,
    control_tokens: Mapping[str, int],
    *,
    is_closed: bool,
) -> str:
    """Write the grammar for `LLMatcher`, after the checks that need no compiler."""
    text = output.text
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > limits.max_bytes:
        raise RequestError(
            f"the {_NOUNS[output.kind]} has {size} bytes, at most {limits.max_bytes} are taken; "
            "shorten it"
        )
    if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
        raise RequestError(f"the {_NOUNS[output.kind]} has characters that are no text")
    grammar: str
    if output.kind == "regex":
        grammar = library.LLMatcher.grammar_from_regex(text)
    elif output.kind == "grammar":
        grammar = library.LLMatcher.grammar_from_lark(text)
    elif output.kind == "tool_calls":
        calls = _read_calls(text)
        calls.schema = _prepare_schema(calls.schema, limits, is_closed=is_closed)
        if calls.answer is not None:
            calls.answer = _prepare_schema(calls.answer, limits, is_closed=is_closed)
        grammar = library.LLMatcher.grammar_from_lark(_calls_grammar(calls, control_tokens))
    else:
        try:
            schema = msgspec.json.decode(text)
        except MALFORMED as error:
            raise RequestError(f"the JSON schema is not JSON: {error}") from error
        if not isinstance(schema, dict):
            raise RequestError(f"the JSON schema must be an object, not {text!r:.80}")
        schema = _prepare_schema(schema, limits, is_closed=is_closed)
        text = msgspec.json.encode(schema).decode()
        grammar = library.LLMatcher.grammar_from_json_schema(text, overrides=_SCHEMA_OPTIONS)
    return grammar


class _Calls(msgspec.Struct, forbid_unknown_fields=True):
    """The source of ``tool_calls``."""

    start: Annotated[str, msgspec.Meta(pattern=r"^<[\w|-]+>$")]
    end: Annotated[str, msgspec.Meta(pattern=r"^</?[\w|-]+>$")]
    schema: dict[str, Any]
    answer: dict[str, Any] | None = None


def _read_calls(source: str) -> _Calls:
    try:
        return msgspec.json.decode(source, type=_Calls)
    except MALFORMED as error:
        raise RequestError(f"the form of tool calls cannot be read: {error}") from error


def _calls_grammar(calls: _Calls, control_tokens: Mapping[str, int]) -> str:
    """Write the grammar of text with calls in it, or of either calls alone or JSON.

    In Lark a control token has no quotes, and no text matches it.
    """
    start, end = (
        mark if mark in control_tokens else f'"{mark}"' for mark in (calls.start, calls.end)
    )
    if calls.answer is not None:
        answer = msgspec.json.encode({**calls.answer, "x-guidance": _SCHEMA_OPTIONS}).decode()
        rules = f"start: call (NL? call)* | answer\nbegin: {start}\nanswer: %json {answer}\n"
    elif calls.start in control_tokens:
        rules = f"start: text (call text)*\ntext: TEXT |\nbegin: {calls.start}\n"
    else:
        # Lazy: the mark ends the text as soon as it is there.
        rules = f'start: call* TEXT\nbegin[lazy]: ANY "{calls.start}"\nANY: /(.|\\n)*/\n'
    schema = msgspec.json.encode({**calls.schema, "x-guidance": _SCHEMA_OPTIONS}).decode()
    return (
        f"%llguidance {{}}\n{rules}call: begin NL? arguments NL? {end}\nNL: /\\n/\n"
        # The mark spelled in letters would be read as a call, too.
        f"TEXT: /(.|\\n)*/ & ~/(.|\\n)*{re.escape(calls.start)}(.|\\n)*/\n"
        f"arguments: %json {schema}\n"
    )


def _prepare_schema(
    schema: dict[str, Any], limits: GrammarLimits, *, is_closed: bool
) -> dict[str, Any]:
    """Check a schema against the limits, and rewrite it for llguidance."""
    if "x-guidance" in schema:
        raise RequestError("the JSON schema: x-guidance is not supported; leave it out")
    properties = 0
    level: list[Any] = [schema]
    for _ in range(limits.max_depth):
        properties += sum(
            len(node["properties"])
            for node in level
            if isinstance(node, dict) and isinstance(node.get("properties"), dict)
        )
        level = [child for node in level for child in _children(node)]
    if level:
        raise RequestError(
            f"the JSON schema nests more than {limits.max_depth} levels; "
            "name the inner parts in $defs and refer to them by $ref"
        )
    if properties > limits.max_properties:
        raise RequestError(
            f"the JSON schema has {properties} properties, at most {limits.max_properties} are "
            "taken; split it"
        )
    rewrite_schema(schema)
    return close_schema(schema, is_open=not is_closed)


def _children(node: Any) -> list[Any]:
    if isinstance(node, dict):
        return list(node.values())
    return node if isinstance(node, list) else []


def _refuse(kind: OutputKind, why: str) -> NoReturn:
    hint = _HINTS.get(kind)
    if "coerce_one_of" in why:  # names an option of the library
        why = "it cannot be seen that of each oneOf one branch holds at most"
        hint = (
            "write anyOf, or give all branches a property of the same name, required and with "
            "another const in each"
        )
    raise RequestError(
        f"the {_NOUNS[kind]} cannot be used: {_first_line(why)}" + (f"; {hint}" if hint else "")
    )


def _refuse_cost(kind: OutputKind, limits: GrammarLimits) -> NoReturn:
    raise RequestError(
        f"the {_NOUNS[kind]} takes more than {limits.compile_s} s or "
        f"{CHECK_MEMORY_BYTES >> 20} MiB to compile; simplify it: what costs most are patterns "
        "that are joined (allOf, &), a large multipleOf and large counts of repetition"
    )


def _first_line(error: str) -> str:
    """Return the reason, without the excerpts of the source that llguidance prints around it."""
    lines = [line.strip() for line in error.splitlines() if line.strip()] or ["unknown error"]
    reason = next((line for line in lines if line.startswith("error: ")), None)
    return (reason.removeprefix("error: ") if reason else lines[0])[:300]
