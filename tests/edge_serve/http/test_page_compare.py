"""One question to two models, side by side."""

from __future__ import annotations

from typing import Any

import pytest

from tests.edge_serve.http.browser import Browser
from tests.edge_serve.http.page_stub import StubServer

pytestmark = pytest.mark.live

OTHER = "<b>other</b>"


def compare(browser: Browser) -> None:
    browser.until(lambda: len(browser.all("#model option")) == 2)
    browser.one("#compare").click()
    browser.until(lambda: browser.one("#model-b").is_displayed())


def both(browser: Browser) -> list[Any]:
    """The two answers, once both are whole."""
    browser.until(lambda: len(browser.all(".pair .keep:enabled")) == 2)
    return browser.all(".pair .turn")


def test_two_models_answer_one_question_and_one_is_kept(browser: Browser, server: StubServer):
    compare(browser)
    assert browser.one("#model-b").get_attribute("value") == OTHER
    browser.let_time_pass()
    browser.ask("hello")
    first, second = both(browser)
    browser.picture("compare")
    assert sorted(one["model"] for one in server.requests) == [OTHER, "tiny"]
    assert server.requests[0]["messages"] == server.requests[1]["messages"]
    for turn, name in ((first, "tiny"), (second, OTHER)):
        assert turn.find_element(browser.by.CSS_SELECTOR, "h2").text == name
        assert "Grüße, Welt 🌍." in turn.text
        assert "7 tokens" in turn.text
        assert "tokens/s" in turn.text
    assert first.rect["y"] == second.rect["y"]
    assert first.rect["x"] + first.rect["width"] < second.rect["x"]
    # Nothing is asked until it is clear from which of them the chat goes on.
    browser.one("#prompt").send_keys("and more", browser.keys.ENTER)
    browser.until(lambda: "Keep one" in browser.one("#toast").text)
    assert len(server.requests) == 2
    assert browser.one("#prompt").get_attribute("value") == "and more"
    browser.reload()
    _, second = both(browser)
    second.find_element(browser.by.CSS_SELECTOR, ".keep").click()
    browser.until(lambda: browser.all(".pair") == [])
    assert [one.text for one in browser.all(".turn .place")] == ["2/2"]
    browser.one("#compare").click()
    assert not browser.one("#model-b").is_displayed()
    browser.ask("more")
    browser.until(lambda: len(server.requests) == 3)
    browser.answered()
    assert [one["role"] for one in server.requests[2]["messages"]] == ["user", "assistant", "user"]
    assert server.requests[2]["model"] == "tiny"
    assert browser.complaints() == []


def test_what_was_not_kept_is_still_there(browser: Browser, server: StubServer):
    server.answers["hello"] = "an answer"
    compare(browser)
    browser.ask("hello")
    first, _ = both(browser)
    first.find_element(browser.by.CSS_SELECTOR, ".keep").click()
    browser.until(lambda: browser.all(".pair") == [])
    assert OTHER not in browser.one("#log").text
    browser.one(".turn .next").click()
    browser.until(lambda: OTHER in browser.one(".turn.assistant .facts").text)


def test_one_that_fails_leaves_the_other(browser: Browser, server: StubServer):
    server.failing = OTHER
    compare(browser)
    browser.ask("hello")
    error = browser.until(lambda: browser.all(".turn.error"))[0]
    assert error.text.startswith(f"{OTHER}: the engine failed at this request")
    assert browser.all(".pair") == []
    (turn,) = browser.all(".turn.assistant")
    assert "Done." in turn.text
    server.failing = None
    error.find_element(browser.by.CSS_SELECTOR, "button").click()
    both(browser)


def test_stop_ends_both(browser: Browser, server: StubServer):
    compare(browser)
    browser.ask("endless")
    browser.until(lambda: all("5 6" in turn.text for turn in browser.all(".pair .turn .body")))
    assert browser.all(".pair .keep:enabled") == []
    browser.one("#stop").click()
    assert all("Stopped" in turn.text for turn in both(browser))


def test_one_below_the_other_where_it_is_narrow(browser: Browser):
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        compare(browser)
        browser.ask("hello")
        first, second = both(browser)
        assert first.rect["x"] == second.rect["x"]
        assert first.rect["y"] + first.rect["height"] <= second.rect["y"]
        assert browser.driver.execute_script("return document.documentElement.scrollWidth") <= 390
        browser.picture("compare-phone")
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_with_one_model_there_is_nothing_to_compare(browser: Browser, server: StubServer):
    browser.until(lambda: browser.one("#compare").is_displayed())
    server.models = ["tiny"]
    browser.until(lambda: not browser.one("#compare").is_displayed())
    browser.ask("hello")
    browser.answered()
    assert len(server.requests) == 1
