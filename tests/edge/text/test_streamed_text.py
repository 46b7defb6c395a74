from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.errors import RequestError
from edge.text.streamed_text import MAX_STOP_CHARS, MAX_STOPS, StopMatcher

few = st.text("ab<", min_size=1, max_size=4)


def stopped(text: str, stops: list[str]) -> tuple[str, bool]:
    """What `StopMatcher` is to do, by trying every end and, for each, the longest stop first."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], True
    return text, False


@settings(deadline=None, max_examples=400)
@given(st.lists(few, max_size=5), st.lists(st.text("ab<x", max_size=6), max_size=8))
def test_stops_in_any_chunking(stops, chunks):
    matcher = StopMatcher(stops)
    emitted, hit, seen = "", False, ""
    for chunk in chunks:
        text, hit = matcher.push(chunk)
        emitted += text
        seen += chunk
        if not hit:
            held = seen[len(emitted) :]
            # Nothing more is held back than what may still become a stop.
            suffixes = [seen[i:] for i in range(len(seen))]
            possible = [s for s in suffixes if any(stop.startswith(s) for stop in stops)]
            assert held == max(possible, key=len, default="")
    emitted += matcher.flush()
    assert (emitted, hit) == stopped("".join(chunks), stops)


def test_a_stop_ends_the_stream():
    matcher = StopMatcher(["</s>", "\n\n"])
    assert matcher.push("a<") == ("a", False)
    assert matcher.push("/s") == ("", False)
    assert matcher.push("> b") == ("", True)
    assert matcher.push("c") == ("", True)
    assert matcher.flush() == ""


def test_long_text_is_read_once():
    # 200,000 characters that all could begin a stop; re-scanning them would take minutes.
    matcher = StopMatcher(["a" * 1000 + "b"])
    emitted = "".join(matcher.push("aaaa")[0] for _ in range(50_000))
    assert emitted == "a" * 199_000
    assert matcher.push("b") == ("", True)


@pytest.mark.parametrize(
    ("stops", "message"),
    [
        ([""], r"stop\[0\]"),
        (["a", 3], r"stop\[1\]"),
        (["a" * (MAX_STOP_CHARS + 1)], "1 to 1024 characters"),
        (["a"] * (MAX_STOPS + 1), "at most 16"),
        ("abc", "give a list"),
    ],
)
def test_wrong_stops(stops, message):
    with pytest.raises(RequestError, match=message):
        StopMatcher(stops)
