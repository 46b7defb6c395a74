"""Finds the name that was meant by an unknown one, such as another program's."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_CAPACITY = ("kv_capacity", "num_ctx", "n_ctx", "ctx_size", "max_model_len", "max_seq_len")
_SAME = (
    ("max_tokens", "max_new_tokens", "max_completion_tokens", "max_output_tokens", "num_predict",
     "n_predict", "max_length", "maxOutputTokens"),
    ("repetition_penalty", "repeat_penalty"),
    ("stop", "stop_sequences", "stop_strings", "stopSequences"),
    ("stop_token_ids", "eos_token_id"),
    ("n", "num_return_sequences"),
    ("deadline_s", "max_time", "timeout"),
    _CAPACITY,
    ("response_format", "format", "output", "guided_json", "json_schema"),
    # verbs
    ("inspect", "show"),
    ("list", "ls", "ps"),
    ("export", "create", "convert"),
    ("run", "generate"),
)  # fmt: skip
"""Pairs names of the same thing: ours, and those of other programs and of the protocols."""
_INSTEAD = {
    "do_sample": "temperature 0 takes the likeliest token, more draws it",
    **dict.fromkeys(("num_beams", "length_penalty"), "answers are sampled, without beams"),
    **dict.fromkeys(
        ("min_tokens", "min_new_tokens"), "take ignore_eos, which goes on to max_tokens"
    ),
    "mirostat": "take top_p or min_p",
    **dict.fromkeys(_CAPACITY, "--kv-capacity, LLM(kv_capacity=...), sets it when the model loads"),
}


def nearest_name(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Find the known name with the same meaning, or else the one with the most similar spelling.

    Args:
        name: the name that was given.
        known: the names that are known.
        cutoff: least similarity, 0..1, as `difflib.get_close_matches` counts it.
    """
    names = list(known)
    same = {other for group in _SAME if name in group for other in group}
    if found := [other for other in names if other in same]:
        return found[0]
    return next(iter(difflib.get_close_matches(name, names, 1, cutoff)), None)


def instead_of(name: str, known: Iterable[str], otherwise: str) -> str:
    """Say which name to use instead; returns ``otherwise`` if no known name is similar."""
    near = nearest_name(name, known, _alike(name))
    return f"did you mean {near}?" if near else _INSTEAD.get(name, otherwise)


def answer_option(name: str, known: list[str], sampling: list[str]) -> str:
    """Say which option to use instead of a name that `LLM.submit` and its kin do not know.

    Args:
        name: the name that was given.
        known: the options that exist.
        sampling: the fields of `SamplingParams`.
    """
    if nearest_name(name, ["n"], 1.0):
        return "n of LLM.submit is how many answers there are"
    near = nearest_name(name, [*known, *sampling], _alike(name))
    if near in sampling:
        return f"did you mean SamplingParams({near}=...), after the prompt?"
    return instead_of(name, known, f"there are {', '.join(known)}")


def _alike(name: str) -> float:
    """Return how similar a known name must be to this one; nothing is similar to a sentence."""
    return 1.0 if name in _INSTEAD else 0.6
