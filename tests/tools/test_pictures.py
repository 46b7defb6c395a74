"""The README's pictures: what is recorded is drawn as it was, and what is drawn is up to date."""

from __future__ import annotations

import re
import sys
from xml.etree import ElementTree

import pytest

from edge.errors import EdgeError
from tools.pages.pictures import (
    MOST_BYTES,
    MOST_S,
    PICTURES,
    Moment,
    Screen,
    animated,
    flow,
    record,
)


def test_the_pictures_are_small_and_the_flow_is_up_to_date():
    assert sum(path.stat().st_size for path in PICTURES.iterdir()) < MOST_BYTES
    assert (PICTURES / "flow.svg").read_text("utf-8") == flow()
    for path in PICTURES.glob("*.svg"):
        ElementTree.parse(path)


@pytest.mark.parametrize(
    ("written", "lines"),
    [
        ("one\r\ntwo", ["one", "two"]),
        ("abc\rx", ["xbc"]),
        ("abc\r\x1b[2Kx", ["x"]),
        ("abcdef\b\b\b\x1b[K", ["abc"]),
        ("one\r\ntwo\r\n\x1b[2A\rO\r\n\x1b[2KT", ["One", "T", ""]),
        ("a\x1b[1mb\x1b[0mc", ['a<tspan class="bold">b</tspan>c']),
        ("\x1b[38;5;237m-\x1b[38;2;249;38;114m=\x1b[0m", None),
        ("<&>", ["&lt;&amp;&gt;"]),
        ("\x1b[?25l" + "x" * 90, ["x" * 88, "xx"]),
    ],
)
def test_a_terminal_shows_what_a_program_wrote(written: str, lines: list[str] | None):
    screen = Screen()
    screen.feed(written)
    soft_and_loud = ['<tspan class="soft">-</tspan><tspan class="accent">=</tspan>']
    assert screen.lines() == (lines or soft_and_loud)


def test_a_sequence_that_is_not_known_is_refused():
    with pytest.raises(EdgeError, match="teach it"):
        Screen().feed("\x1b[5;7H")


def test_a_recording_is_what_was_written_and_when():
    script = (
        "import time; print('\\x1b[2mfirst', flush=True); time.sleep(0.3); print('\\x1b[0mlast ü')"
    )
    moments = record([sys.executable, "-c", script])
    assert b"".join(moment.data for moment in moments).decode().split() == [
        *("\x1b[2mfirst", "\x1b[0mlast", "ü")
    ]
    assert 0.25 < moments[-1].at_s - moments[0].at_s < 60
    with pytest.raises(EdgeError, match="ended with 3"):
        record([sys.executable, "-c", "raise SystemExit(3)"])


def test_each_state_is_seen_for_as_long_as_it_stood():
    moments = [
        *(Moment(0.1, b"50 %"), Moment(0.3, b"\r100 %\r\n\x1b"), Moment(0.4, b"[1mgr\xc3")),
        *(Moment(0.5, b"\xbc\xc3\x9fe"), Moment(500, b"\x1b[0m.")),
    ]
    drawn = animated("a & b", moments)
    texts = [
        (one.get("style"), "".join(one.itertext()))
        for one in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")
    ]
    assert texts[0] == (None, "$ a & b")
    assert texts[1:] == [
        ("animation-delay:1.10s,1.30s", "50 %"),
        ("animation-delay:1.40s,1.50s", "gr"),
        ("animation-delay:1.50s,2.10s", "grüße"),  # the long pause is cut
        ("animation-delay:1.30s", "100 %"),
        ("animation-delay:2.10s", "grüße."),
    ]
    long = animated("x", [Moment(0.5 * n, b"%d\r\n" % n) for n in range(100)])
    assert max(map(float, re.findall(r"delay:([\d.]+)s", long))) == pytest.approx(1 + MOST_S)
