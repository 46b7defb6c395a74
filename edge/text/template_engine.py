"""Compiles and renders a Jinja chat template with ``minijinja``, in this process or in a child.

Fuel bounds the steps of a template and the characters that it writes, but neither its memory nor
the time of one step: lists that are doubled 60 times cost 60 steps. `edge.text.chat_template`
decides where a template runs; this module is all that the child imports.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from operator import attrgetter
from typing import Any, Literal, NoReturn

import msgspec

# Steps and characters of one rendering. A prompt of 500,000 characters takes about 2 million with
# R1's template; an endless loop ends after 0.2 s.
FUEL = 10_000_000

_TEMPLATE_NAME = "chat_template.jinja"
_CACHED_ENGINES = 8

FailureKind = Literal["syntax", "fuel", "limit", "refused", "failed"]


class TemplateFailure(Exception):  # noqa: N818 - not a fault of the program
    """A template cannot be compiled, or rendered with these messages.

    Attributes:
        kind: ``syntax``, ``fuel`` (too many steps), ``limit`` (too much time or memory, in a
            child), ``refused`` (by the template's own ``raise_exception``) or ``failed``.
        why: one line for a person.
    """

    def __init__(self, kind: FailureKind, why: str) -> None:
        super().__init__(kind, why)
        self.kind = kind
        self.why = why


class TemplateEngine:
    """A compiled template.

    Attributes:
        variables: names that the template looks up.
    """

    def __init__(self, source: str) -> None:
        """Compile the template.

        Raises:
            TemplateFailure: it has a syntax error.
            ImportError: ``minijinja`` is missing.
        """
        import minijinja

        self._environment = minijinja.Environment(
            fuel=FUEL,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined_behavior="lenient",
            auto_escape_callback=lambda _: False,
            debug=False,  # otherwise an error would quote the messages
            filters={"tojson": _to_json},
            tests={
                "sequence": lambda value: hasattr(value, "__getitem__"),  # also a text
                "number": lambda value: isinstance(value, (int, float, _Float)),
                "float": lambda value: isinstance(value, (float, _Float)),
            },
            globals={"raise_exception": _raise_exception, "strftime_now": _strftime_now},
        )
        try:
            self._environment.add_template(_TEMPLATE_NAME, _without_generation_tags(source))
            self.variables: frozenset[str] = frozenset(
                self._environment.undeclared_variables_in_template(_TEMPLATE_NAME)
            )
        except minijinja.TemplateError as error:
            raise TemplateFailure("syntax", _describe(error)) from error

    def render(self, context: Mapping[str, Any]) -> str:
        """Render with these variables.

        Raises:
            TemplateFailure: the template does not end, refuses the messages or fails.
        """
        try:
            plain = _plain.decode(msgspec.json.encode(context))
            # Options are compared more often than they are written.
            plain |= {name: each for name, each in context.items() if isinstance(each, float)}
            rendered: str = self._environment.render_template(_TEMPLATE_NAME, **plain)
        except (TemplateFailure, MemoryError):
            raise
        except Exception as error:  # a template may cause any error of a Python method
            if getattr(error, "kind", None) == "OutOfFuel":
                raise TemplateFailure("fuel", f"it did not end within {FUEL} steps") from error
            raise TemplateFailure("failed", _describe(error)) from error
        return rendered


# ------------------------------------------------------------------------------- in the child


class Task(msgspec.Struct, omit_defaults=True):
    """A task for the child.

    Attributes:
        source: the template.
        context: variables to render it with; None only compiles it and runs ``trials``.
        trials: variables to try it with; only a rendering that does not end counts.
    """

    source: str
    context: dict[str, Any] | None = None
    trials: list[dict[str, Any]] = []


class TaskResult(msgspec.Struct, omit_defaults=True):
    """The result of a `Task`: text or variables, or a failure's ``kind`` and ``why``."""

    text: str | None = None
    variables: list[str] = []
    kind: FailureKind | None = None
    why: str = ""


_engine = lru_cache(_CACHED_ENGINES)(TemplateEngine)


def prepare() -> None:
    """Render and fail once, so that minijinja imports its last parts and the time zone is read."""
    with suppress(TemplateFailure):
        TemplateEngine("{{ strftime_now('%H') ~ (1.0 | tojson) }}{{ 1 + {} }}").render({})


def work(data: bytes) -> bytes:
    """Do an encoded `Task`; return an encoded `TaskResult`."""
    task = msgspec.json.decode(data, type=Task)
    try:
        engine = _engine(task.source)
        if task.context is not None:
            answer = TaskResult(text=engine.render(task.context))
        else:
            for context in task.trials:
                _try(engine, context)
            answer = TaskResult(variables=sorted(engine.variables))
    except TemplateFailure as failure:
        answer = TaskResult(kind=failure.kind, why=failure.why)
    return msgspec.json.encode(answer)


def _try(engine: TemplateEngine, context: dict[str, Any]) -> None:
    try:
        engine.render(context)
    except TemplateFailure as failure:
        if failure.kind == "fuel":
            raise


# ------------------------------------------------------------------------------- what templates see


class _Float:
    """A float within messages or tools that minijinja would not write as Python does.

    minijinja passes 21.0 to a filter as 21, and writes 1e20 and 1e-5 in full. A template can write
    this float and ask whether it is a number. Computing with it is refused, and comparing it gives
    a wrong result. Floats that a template writes down or computes itself are minijinja's own:
    21.0 | tojson gives 21.
    """

    __slots__ = ("value",)

    def __init__(self, value: float) -> None:
        self.value = value

    def __repr__(self) -> str:
        return repr(self.value)

    def __bool__(self) -> bool:
        return bool(self.value)


def _read_float(text: str) -> float | _Float:
    value = float(text)
    return value if not value.is_integer() and abs(value) >= 1e-4 else _Float(value)


_plain = msgspec.json.Decoder(float_hook=_read_float)


def _raise_exception(message: Any) -> NoReturn:
    raise TemplateFailure("refused", str(message))


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Encode as ``transformers`` does: unlike Jinja's own filter, leave ``<`` and ``'`` alone."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
        default=attrgetter("value"),
    )


def _without_generation_tags(source: str) -> str:
    """Replace ``{% generation %}``, which marks text for training, by an ``if`` that is true."""
    return re.sub(
        r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}",
        lambda tag: f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}",
        source,
    )


def _describe(error: Exception) -> str:
    """Return the error in one line, without the template's line that ends minijinja's message."""
    return str(getattr(error, "message", None) or repr(error)).splitlines()[0]
