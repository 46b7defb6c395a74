"""What is said of a name that is not known."""

from __future__ import annotations

import pytest

from edge.other_names import instead_of, nearest_name

OPENAI = ("max_tokens", "max_completion_tokens", "stop", "repetition_penalty", "response_format")
OLLAMA = ("num_predict", "repeat_penalty", "stop", "num_ctx")


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("repeat_penalty", OPENAI, "repetition_penalty"),
        ("repetition_penalty", OLLAMA, "repeat_penalty"),
        ("max_tokens", OLLAMA, "num_predict"),
        ("max_new_tokens", OPENAI, "max_tokens"),
        ("max_model_len", OLLAMA, "num_ctx"),
        ("format", OPENAI, "response_format"),
        ("stop_sequences", OLLAMA, "stop"),
        ("max_token", OPENAI, "max_tokens"),
        ("colour", OPENAI, None),
    ],
)
def test_the_name_of_the_place_is_found(name: str, known: tuple[str, ...], meant: str | None):
    assert nearest_name(name, known) == meant
    said = f"did you mean {meant}?" if meant else "look it up"
    assert instead_of(name, known, "look it up") == said


def test_options_without_a_counterpart_get_a_sentence():
    """Though it is written much like another name."""
    assert nearest_name("num_beams", ["num_beam"]) == "num_beam"
    assert instead_of("num_beams", ["num_beam"], "") == "answers are sampled, without beams"
    assert "--kv-capacity" in instead_of("num_ctx", OPENAI, "")
    assert instead_of("num_ctx", ["kv_capacity"], "") == "did you mean kv_capacity?"
