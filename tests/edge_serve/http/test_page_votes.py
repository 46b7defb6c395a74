"""Votes on the page: what is asked, and what is shown of one."""

from __future__ import annotations

from typing import Any

import pytest

from tests.edge_serve.http.browser import Browser
from tests.edge_serve.http.page_stub import StubServer
from tests.edge_serve.scripted import Live

pytestmark = pytest.mark.live

ASKED = [{"role": "user", "content": "How many are it?"}]


def fill(browser: Browser, **fields: str) -> None:
    browser.open_panel()
    for name, value in fields.items():
        browser.one(f"#sampling [name={name}]").send_keys(value)


def test_a_vote_is_asked_for_where_a_number_is_given(browser: Browser, server: StubServer):
    browser.ask("hello")
    browser.answered()
    assert not {"vote", "vote_on"} & server.requests[-1].keys()
    fill(browser, vote="4")
    browser.ask("hello")
    browser.answered()
    assert server.requests[-1]["vote"] == {"most": 4, "answers": "number"}
    fill(browser, vote_on="letters")
    browser.ask("hello")
    browser.answered()
    assert server.requests[-1]["vote"] == {"most": 4, "answers": "choice"}
    assert "vote_on" not in server.requests[-1]
    assert browser.complaints() == []


def test_an_answer_says_how_many_agree(real: tuple[Browser, Live]):
    browser, live = real
    live.engine.say(ASKED, "Two and two.\n</think>\n\nIt is 4.")
    fill(browser, vote="3", temperature="1", top_p="0.01", seed="3")
    browser.ask(ASKED[0]["content"])
    turn = browser.answered()

    def part(selector: str) -> Any:
        return turn.find_element(browser.by.CSS_SELECTOR, selector)

    assert part(".body").text == "It is 4."
    assert part(".facts span").text == "3 of 3 answers agree"
    assert part("details").get_attribute("open") is None, "the votes are not folded"
    part("summary").click()
    thoughts = part(".reasoning").text.split()
    assert " ".join(thoughts) == "1: 4 2: 4 3: 4 3 of 3 answers agree Two and two."
    browser.picture("vote")
    # It is kept with the conversation.
    browser.driver.refresh()
    browser.started()
    browser.until(lambda: "3 of 3 answers agree" in browser.one(".turn.assistant .facts").text)
    assert browser.complaints() == []
