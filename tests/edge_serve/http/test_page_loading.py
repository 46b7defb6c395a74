"""Models that are loaded and unloaded from the page."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import Bundles
from tests.edge_serve.http.browser import Browser
from tests.edge_serve.http.page_stub import StubServer
from tests.edge_serve.scripted import running

pytestmark = pytest.mark.live

OTHER = "<b>other</b>"


@pytest.fixture
def page(browser: Browser, server: StubServer) -> Browser:
    server.states = {"tiny": {"value": "loaded"}, OTHER: {"value": "unloaded"}}
    browser.open_panel()
    browser.until(lambda: browser.all("#engines button"))
    return browser


def states(browser: Browser) -> list[str]:
    return [one.text for one in browser.all("#engines .state span")]


def test_a_model_is_loaded_and_unloaded(page: Browser, server: StubServer):
    assert states(page) == ["loaded", "not loaded"]
    assert "1.5 GB" in page.one("#engines").text
    options = [one.text for one in page.all("#model option")]
    assert options == ["tiny", f"{OTHER} (not loaded)"]
    server.loading.clear()
    page.one(f"#engines button[data-model='{OTHER}']").click()
    page.until(lambda: states(page)[1].startswith("loading, "))
    assert page.all("#engines progress")
    page.picture("loading")
    page.until(lambda: states(page)[1] not in ("loading, 0 s", "loading, 1 s"))  # it counts
    server.loading.set()
    page.until(lambda: states(page) == ["loaded", "loaded"])
    page.until(lambda: [one.text for one in page.all("#model option")] == ["tiny", OTHER])
    page.one("#engines button[data-model='tiny']").click()
    page.until(lambda: states(page) == ["not loaded", "loaded"])
    asked = [path for path in server.paths if path.startswith("/models/")]
    assert asked == ["/models/load", "/models/unload"]
    assert page.complaints() == []


def test_a_model_that_failed_says_why_and_can_be_tried_again(page: Browser, server: StubServer):
    server.states[OTHER] = {"value": "failed", "failed": "it takes 9.1 GB, and 7.4 GB are free"}
    page.until(lambda: states(page) == ["loaded", "failed to load"])
    assert "9.1 GB" in page.one("#engines .why").text
    page.one(f"#engines button[data-act='load'][data-model='{OTHER}']").click()
    page.until(lambda: states(page) == ["loaded", "loaded"])
    assert page.all("#engines .why") == []


def test_a_refusal_is_shown(page: Browser, server: StubServer):
    server.load_refusal = (409, "requests run on it")
    page.one("#engines button[data-model='tiny']").click()
    page.until(lambda: "tiny was not unloaded: requests run on it" in page.one("#toast").text)
    assert states(page) == ["loaded", "not loaded"]
    # Who may not is not offered it again.
    server.load_refusal = (403, "this key may not")
    page.one("#engines button[data-model='tiny']").click()
    page.until(lambda: "this key may not" in page.one("#toast").text)
    page.until(lambda: page.all("#engines button") == [])
    assert states(page) == ["loaded", "not loaded"]
    # Another key may be the operator's.
    server.load_refusal, server.api_key = None, "of-the-operator"
    page.until(page.one("#key").is_displayed)
    page.one("#key").send_keys("of-the-operator", page.keys.ENTER)
    page.until(lambda: page.all("#engines button"))


def test_a_question_to_a_model_that_is_not_loaded_says_what_it_waits_for(
    page: Browser, server: StubServer
):
    page.all("#model option")[1].click()
    server.holds.clear()
    page.ask("hello")
    page.until(lambda: [one.text for one in page.all(".turn .waiting")] == ["Loading the model …"])
    server.holds.set()
    page.answered()
    assert page.all(".turn .waiting") == []


def test_the_focus_stays_while_another_model_loads(page: Browser, server: StubServer):
    server.states["third"] = {"value": "unloaded"}
    server.models.append("third")
    page.until(lambda: len(states(page)) == 3)
    server.loading.clear()
    page.one("#engines button[data-model='third']").click()
    page.driver.execute_script("document.querySelector('#engines button[data-model=tiny]').focus()")
    page.until(lambda: states(page)[2] == "loading, 4 s")
    active = page.driver.switch_to.active_element
    assert active.get_attribute("data-model") == "tiny"
    server.loading.set()


def test_the_real_service_unloads_and_loads_for_a_question(driver: Any, tiny_bundles: Bundles):
    with running(tiny_bundles("qwen2")) as live:
        driver.get(live.url)
        page = Browser(driver)
        page.started()
        page.open_panel()
        page.until(lambda: states(page) == ["loaded"])
        page.one("#engines button").click()
        page.until(lambda: states(page) == ["not loaded"])
        assert live.ask("/v1/models/tiny").json["status"] == {"value": "unloaded"}
        live.engine.say([{"role": "user", "content": "hello"}], "So.</think>Here again.")
        page.ask("hello")
        assert "Here again." in page.answered().text
        page.until(lambda: states(page) == ["loaded"])
        page.one("#engines button").click()
        page.until(lambda: states(page) == ["not loaded"])
        page.one("#engines button").click()
        page.until(lambda: states(page) == ["loaded"])
        assert not page.one("#toast").is_displayed()
        driver.get("about:blank")
