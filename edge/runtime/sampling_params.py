"""Defines the sampling parameters: how to choose tokens, with types, ranges and help."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any, ClassVar

from edge.bundle.manifest import SamplingDefaults
from edge.errors import RequestError
from edge.settings_fields import Section

MAX_LOGPROBS = 20


@dataclass(frozen=True)
class Knob:
    """Type and range of one number among the sampling parameters.

    Attributes:
        kind: type of the value, int or float.
        low, high: least and greatest value.
    """

    kind: type[int] | type[float]
    low: float
    high: float

    def check(self, name: str, value: Any) -> Any:
        """Check a value and return it, as a float if the knob is one.

        Raises:
            RequestError: it has another type or is out of the range.
        """
        # NaN fails the comparison; a bool is an int in Python, but True is not a temperature.
        # NumPy's numbers are accepted.
        is_number = isinstance(value, Integral if self.kind is int else Real)
        if is_number and not isinstance(value, bool) and self.low <= value <= self.high:
            return self.kind(value)
        if self.kind is int:
            raise _refusal(name, value, f"an integer from {self.low} to {self.high}")
        raise _refusal(name, value, f"a number from {self.low:g} to {self.high:g}")


_MOST = 2**31 - 1
KNOBS = {
    "temperature": Knob(float, 0.0, 10.0),
    "top_k": Knob(int, 0, _MOST),
    "top_p": Knob(float, 0.0, 1.0),
    "min_p": Knob(float, 0.0, 1.0),
    "repetition_penalty": Knob(float, 0.1, 10.0),
    "presence_penalty": Knob(float, -2.0, 2.0),
    "frequency_penalty": Knob(float, -2.0, 2.0),
    "seed": Knob(int, 0, 2**64 - 1),
    "max_tokens": Knob(int, 1, _MOST),
}
"""The sampling knobs, by name.

The checks of `SamplingParams`, the options of the verbs and the ranges of the HTTP API are made
from this table.
"""

DEFAULTED = tuple(name for name in KNOBS if name in SamplingDefaults.__struct_fields__)
"""Lists the knobs for which a model has its own default."""
_TOKEN_ID = Knob(int, 0, _MOST)
_BIAS = Knob(float, -100.0, 100.0)
_LOGPROBS = Knob(int, 0, MAX_LOGPROBS)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop.

    A knob that is None takes the model's own default, see `resolve`.

    Attributes:
        temperature: divides the logits, 0..10; 0 (or less than 1e-5) takes the most probable token,
            and of equal ones the one with the lowest id.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the most probable tokens that together hold this share of the mass, 0..1.
        min_p: keep tokens at least this probable relative to the best one, 0..1.
        repetition_penalty: divides or multiplies the logits of tokens in the prompt or the answer,
            0.1..10; 1 is off, more discourages them.
        presence_penalty: subtracted from the logits of tokens in the answer, once, -2..2.
        frequency_penalty: subtracted from the logits of tokens in the answer, per occurrence,
            -2..2.
        logit_bias: added to the logits of these token ids, -100..100.
        seed: where the random numbers start, 0..2**64 - 1: the same seed gives the same answer; by
            default a fresh one.
        max_tokens: tokens of the answer at most; by default it ends when the KV cache is full.
        stop: texts that end the answer; in a reasoning they end nothing.
        stop_token_ids: tokens that end the answer, besides the model's own.
        logprobs: report the log-probability of each token and of this many of the most probable
            ones, 0..20; None is off.
        ignore_eos: go on after the model's own end token.

    Raises:
        RequestError: a name is unknown, or a value has a wrong type or is out of its range.
    """

    def __new__(cls, *given: object, **params: Any) -> SamplingParams:
        """Refuse unknown names here, since ``__init__`` would raise a TypeError."""
        known = [each.name for each in fields(cls)]
        for name in params.keys() - known:
            from edge.other_names import instead_of

            instead = instead_of(name, known, f"there are {', '.join(known)}")
            raise RequestError(f"SamplingParams has no {name}: {instead}")
        if given:
            raise RequestError("SamplingParams takes names: SamplingParams(temperature=0.6)")
        return super().__new__(cls)

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False

    SECTIONS: ClassVar[dict[Section, tuple[str, ...]]] = {
        "Answer": ("temperature", "top_k", "top_p", "seed", "max_tokens", "stop"),
        "Expert": ("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    }
    """Says in which section of a verb's help each option is shown."""

    def __post_init__(self) -> None:
        for name, knob in KNOBS.items():
            value = getattr(self, name)
            if value is not None or getattr(SamplingParams, name) is not None:
                # The checked value is stored, so that temperature=1 and temperature=1.0 are equal.
                object.__setattr__(self, name, knob.check(name, value))
        if self.logprobs is not None:
            object.__setattr__(self, "logprobs", _LOGPROBS.check("logprobs", self.logprobs))
        if not isinstance(self.logit_bias, Mapping):
            raise _refusal("logit_bias", self.logit_bias, "a mapping from token id to bias")
        bias = {}
        for token_id, value in self.logit_bias.items():
            key = _TOKEN_ID.check("a token id of logit_bias", token_id)
            bias[key] = _BIAS.check(f"logit_bias[{key}]", value)
        object.__setattr__(self, "logit_bias", bias)
        stop = _tuple("stop", self.stop, "texts")
        object.__setattr__(self, "stop", stop)
        for text in stop:
            if not isinstance(text, str) or not text:
                raise _refusal("an entry of stop", text, "a text that is not empty")
        ids = tuple(
            _TOKEN_ID.check("an entry of stop_token_ids", token_id)
            for token_id in _tuple("stop_token_ids", self.stop_token_ids, "token ids")
        )
        object.__setattr__(self, "stop_token_ids", ids)
        if not isinstance(self.ignore_eos, bool):
            raise _refusal("ignore_eos", self.ignore_eos, "true or false")

    def resolve(self, defaults: SamplingDefaults) -> SamplingParams:
        """Fill the knobs that are None from the model's generation config.

        Raises:
            RequestError: a default is out of range.
        """
        return replace(
            self,
            **{name: getattr(defaults, name) for name in DEFAULTED if getattr(self, name) is None},
        )


def _tuple(name: str, value: object, what: str) -> tuple[object, ...]:
    # A text is a sequence too, and would stop the answer at each of its letters.
    if not isinstance(value, (tuple, list)):
        raise _refusal(name, value, f"a tuple of {what}")
    return tuple(value)


def _refusal(name: str, value: object, allowed: str) -> RequestError:
    return RequestError(f"{name} must be {allowed}, not {value!r}")
