"""The page in a real browser: what it sends, and what it shows of the server."""

from __future__ import annotations

import os
import re
from pathlib import PurePosixPath

import pytest

from edge_serve.http.page import PAGE, page_files
from tests.edge_serve.http.browser import REAL_KEY, WAIT_S, Browser
from tests.edge_serve.http.page_stub import ATTACK, HOT_CELSIUS, StubServer
from tests.edge_serve.scripted import Live

pytestmark = pytest.mark.live

# --------------------------------------------------------------------------- without a browser


OWN = {path: file.body.decode() for path, file in page_files().items() if "/vendor/" not in path}


def test_the_page_asks_nobody_else():
    for path, text in OWN.items():
        links = re.findall(r"""(?:https?:)?//[^\s"'<>]+""", text)
        assert {link for link in links if "w3.org" not in link} <= {
            link for link in links if link.startswith("// ")
        }, path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write", text), path
    page = OWN[PAGE]
    assert not re.search(r"<script[^>]*>[^<]", page)  # the policy would refuse it, and these
    assert not re.search(r"\bon[a-z]+=\"", page)
    assert not re.search(r"\bstyle=\"", page)


def test_the_policy_allows_the_pages_own_files_only():
    policy = page_files()[PAGE].headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "script-src 'self';" in policy
    assert "require-trusted-types-for 'script'; trusted-types 'none'" in policy


def test_every_file_that_a_file_names_is_there():
    names = {path.split("/", 3)[-1] for path in page_files()}
    for path, text in OWN.items():
        folder = PurePosixPath(path.split("/", 3)[-1]).parent
        named = re.findall(r'(?:from|import) "(\.[^"]+)"', text)
        for name in named:
            assert os.path.normpath(folder / name) in names, f"{path} imports {name}"
    page = OWN[PAGE]
    linked = re.findall(r'(?:src|href)="(?!data:|#)([^"]+)"', page)
    assert len(linked) > 5
    assert {f"/{link}" for link in linked} <= page_files().keys()


def test_files_are_kept_for_ever_and_the_page_is_asked_for_again(live: Live):
    page = live.ask("/")
    assert page.headers["cache-control"] == "no-cache"
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    for path, kind in ((PAGE, "text/html"), (_path_of("app.js"), "text/javascript")):
        first = live.ask(path)
        assert first.status == 200
        assert first.headers["content-type"].startswith(kind)
        assert first.headers["x-content-type-options"] == "nosniff"
        tag = first.headers["etag"]
        again = live.ask(path, headers={"if-none-match": f'W/"other", {tag}'})
        assert (again.status, again.body) == (304, b"")
        assert live.ask(path, headers={"if-none-match": '"other"'}).body == first.body
    assert "immutable" in live.ask(_path_of("theme.css")).headers["cache-control"]
    assert live.ask(_path_of("app.js").replace("app.js", "no.js")).status == 404
    assert live.ask("/page/../__init__.py").status == 404


def _path_of(name: str) -> str:
    (path,) = (path for path in page_files() if path.endswith(f"/{name}"))
    return path


# --------------------------------------------------------------------------- with one


def test_ask_and_stream(browser: Browser, server: StubServer):
    browser.ask("hello")
    turn = browser.answered()
    body = turn.find_element(browser.by.CSS_SELECTOR, ".body")
    assert body.text.splitlines()[0] == "Grüße, Welt 🌍."
    assert body.find_element(browser.by.CSS_SELECTOR, "pre").text == "print('<b>')"
    assert body.find_element(browser.by.CSS_SELECTOR, "p code").text == "Done"
    details = turn.find_element(browser.by.CSS_SELECTOR, "details")
    assert details.get_attribute("open") is None  # folded once the answer is there
    details.find_element(browser.by.CSS_SELECTOR, "summary").click()
    assert details.find_element(browser.by.CSS_SELECTOR, ".reasoning").text == "First I think."
    assert "7 tokens" in turn.text
    browser.picture("answer")
    (request,) = server.requests
    assert request["messages"] == [{"role": "user", "content": "hello"}]
    assert request["model"] == "tiny"
    assert request["stream"] is True
    asked = {"model", "messages", "stream", "stream_options", "return_progress"}
    assert set(request) == asked  # the model's own knobs
    assert browser.complaints() == []


def test_the_whole_conversation_is_sent_and_survives_a_reload(browser: Browser, server: StubServer):
    browser.ask("hello")
    browser.answered()
    browser.reload()
    assert "Done." in browser.one(".turn.assistant .body").text
    browser.ask("and more")
    browser.until(lambda: len(browser.all(".turn.assistant")) == 2)
    browser.answered()
    roles = [message["role"] for message in server.requests[-1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    # Reasoning stays here: the template would strip it anyway.
    assert "I think" not in str(server.requests[-1])
    browser.one("#new").click()
    assert browser.all(".turn") == []
    browser.reload()
    assert browser.all(".turn") == []


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop(how: str, browser: Browser, server: StubServer):
    browser.ask("endless")
    browser.until(lambda: "20 21" in browser.one(".turn.assistant .body").text)
    browser.picture("streaming")
    if how == "button":
        browser.one("#stop").click()
    else:
        browser.one("#prompt").send_keys(browser.keys.ESCAPE)
    turn = browser.answered()
    assert "Stopped" in turn.text
    assert server.hangups.wait(WAIT_S), "the server goes on generating"
    browser.ask("hello")
    browser.until(lambda: "Done." in browser.one("#log").text)


def test_a_new_chat_leaves_the_running_answer(browser: Browser, server: StubServer):
    browser.ask("endless")
    browser.until(lambda: "5 6" in browser.one(".turn.assistant .body").text)
    browser.one("#new").click()
    assert server.hangups.wait(WAIT_S)
    browser.until(lambda: browser.one("#send").is_displayed())
    browser.reload()
    assert browser.all(".turn") == []  # what was cut off did not come back
    browser.ask("hello")
    browser.answered()
    assert server.requests[-1]["messages"] == [{"role": "user", "content": "hello"}]


def test_text_of_the_model_is_only_ever_text(browser: Browser):
    browser.ask("attack")
    turn = browser.answered()
    turn.find_element(browser.by.CSS_SELECTOR, "summary").click()
    reasoning = turn.find_element(browser.by.CSS_SELECTOR, ".reasoning")
    for written in (reasoning, turn.find_element(browser.by.CSS_SELECTOR, ".body")):
        text = written.get_attribute("textContent")
        assert all(line in text for line in ATTACK.splitlines() if not line.startswith("```"))
    assert browser.all("#log img, #log script, #log a") == []
    assert browser.driver.title == "edge-llm"
    assert browser.complaints() == []  # nor did the policy have to stop anything
    browser.picture("attack")


def test_a_model_is_chosen_by_name(browser: Browser, server: StubServer):
    browser.until(lambda: len(browser.all("#model option")) == 2)
    option = browser.all("#model option")[1]
    assert option.text == "<b>other</b>"
    option.click()
    browser.ask("hello")
    browser.answered()
    assert server.requests[-1]["model"] == "<b>other</b>"


def test_the_list_of_models_follows_the_server(browser: Browser, server: StubServer):
    def listed() -> list[str]:
        return [one.text for one in browser.all("#model option")]

    browser.until(lambda: len(listed()) == 2)
    server.models = ["tiny", "new"]
    browser.until(lambda: listed() == ["tiny", "new"])
    # Names of splits, of which the figures have nothing: the server was away.
    server.api_key = "another"
    browser.until(lambda: browser.one("#state").get_attribute("class") == "down")
    server.aliases, server.api_key = ["auto"], None
    browser.until(lambda: listed() == ["tiny", "new", "auto"])
    assert browser.one("#model").is_enabled()


def test_below_a_prefix_of_a_proxy(browser: Browser, server: StubServer):
    """Where the origin's root has nothing."""
    server.prefix = "/llm/"
    browser.driver.get(f"{server.url}llm/")
    browser.started()
    browser.ask("hello")
    assert "Done." in browser.answered().text
    browser.open_panel()
    browser.until(lambda: " GB" in browser.one("#gauges").text)


def test_sampling_controls(browser: Browser, server: StubServer):
    browser.open_panel()
    for name, value in {"temperature": "0.25", "top_k": "7", "seed": "42"}.items():
        browser.one(f"[name={name}]").send_keys(value)
    browser.one("[name=system]").send_keys("Be brief.")
    browser.one("[name=no_thinking]").click()
    browser.ask("hello")
    browser.answered()
    request = server.requests[-1]
    assert (request["temperature"], request["top_k"], request["seed"]) == (0.25, 7, 42)
    assert request["enable_thinking"] is False
    assert request["messages"][0] == {"role": "system", "content": "Be brief."}
    assert "top_p" not in request
    browser.reload()
    assert browser.one("[name=temperature]").get_attribute("value") == "0.25"


def test_controls_of_reasoning_are_for_models_that_reason(browser: Browser, server: StubServer):
    def shown() -> list[bool]:
        names = ("thinking_token_budget", "no_thinking")
        return [browser.one(f"[name={name}]").is_displayed() for name in names]

    browser.open_panel()
    assert shown() == [True, True]
    browser.one("[name=thinking_token_budget]").send_keys("50")
    browser.ask("hello")
    browser.answered()
    assert server.requests[-1]["thinking_token_budget"] == 50
    server.reasons["tiny"] = False
    browser.reload()
    browser.open_panel()
    browser.until(lambda: shown() == [False, False])
    browser.one("#new").click()
    browser.ask("hello")  # what was typed before is nothing to this model
    browser.answered()
    assert "thinking_token_budget" not in server.requests[-1]
    # Of two models side by side, each is sent what it has a use for.
    browser.one("#compare").click()
    assert shown() == [True, True]
    browser.one("#new").click()
    browser.ask("hello")
    browser.until(lambda: len(browser.all(".pair .keep:enabled")) == 2)
    asked = {one["model"]: one.get("thinking_token_budget") for one in server.requests[-2:]}
    assert asked == {"tiny": None, "<b>other</b>": 50}


def test_a_wrong_number_is_named_and_nothing_sent(browser: Browser, server: StubServer):
    browser.open_panel()
    browser.one("[name=top_p]").send_keys("7")
    browser.ask("hello")
    browser.until(lambda: browser.all(".turn.error"))
    assert "Top-p" in browser.one(".turn.error").text
    assert server.requests == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("broken", "the engine failed at this request"), ("cut", "connection closed before")],
)
def test_an_answer_that_breaks_off(prompt: str, message: str, browser: Browser):
    browser.ask(prompt)
    browser.until(lambda: browser.all(".turn.error"))
    error = browser.one(".turn.error")
    assert error.get_attribute("role") == "alert"
    assert message in error.text
    turn = browser.one(".turn.assistant")
    assert "half an" in turn.text
    assert "incomplete" in turn.text
    browser.picture(f"error-{prompt}")


def test_a_full_queue_says_when_to_try_again(browser: Browser, server: StubServer):
    server.refusals = 1
    browser.ask("hello")
    browser.until(lambda: browser.all(".turn.error"))
    assert "the queue is full (429)" in browser.one(".turn.error").text
    button = browser.one(".turn.error button")
    browser.until(button.is_enabled)
    button.click()
    assert "Done." in browser.answered().text
    assert browser.all(".turn.error") == []
    assert len(server.requests[-1]["messages"]) == 1


def test_try_again_asks_the_model_that_is_chosen_now(browser: Browser, server: StubServer):
    server.failing = "tiny"
    browser.ask("hello")
    browser.until(lambda: browser.all(".turn.error"))
    browser.all("#model option")[1].click()
    browser.one(".turn.error button").click()
    assert "Done." in browser.answered().text
    assert [request["model"] for request in server.requests] == ["tiny", "<b>other</b>"]


def test_nothing_is_sent_before_a_model_is_known(browser: Browser, server: StubServer):
    server.models = []
    browser.reload()
    browser.until(lambda: browser.one("#state").get_attribute("class") == "down")
    browser.one("#prompt").send_keys("hello", browser.keys.ENTER)
    browser.until(lambda: "Nothing was sent" in browser.one("#toast").text)
    assert browser.one("#prompt").get_attribute("value") == "hello"
    server.models = ["tiny"]
    browser.ask("")
    browser.answered()
    assert [request["model"] for request in server.requests] == ["tiny"]


def test_a_key_is_asked_for_and_kept_in_this_tab(browser: Browser, server: StubServer):
    server.api_key = "s3cret"
    browser.reload()
    key, note = browser.one("#key"), browser.one("#key-note")
    browser.until(key.is_displayed)
    assert browser.driver.switch_to.active_element == key
    assert not browser.one("#prompt").is_displayed()
    assert not browser.one("#model").is_displayed()
    assert "not known" not in note.text
    browser.picture("key")
    key.send_keys("guessed", browser.keys.ENTER)
    browser.until(lambda: note.text == "That key is not known.")
    assert browser.driver.switch_to.active_element == key
    key.send_keys("s3cret", browser.keys.ENTER)  # in the place of the wrong one
    browser.ask("hello")
    assert "Done." in browser.answered().text
    browser.reload()
    browser.until(lambda: browser.one("#state").get_attribute("class") == "up")
    stored = browser.driver.execute_script("return [localStorage.length, document.cookie]")
    assert stored == [0, ""]
    browser.open_panel()
    browser.one("#key-forget").click()
    key = browser.one("#key")
    browser.until(key.is_displayed)
    # The log stays to be read, and the server is not asked with a key that was taken back.
    assert "Done." in browser.one(".turn.assistant").text
    server.api_key = None
    browser.until(lambda: not key.is_displayed())


def test_a_key_that_was_taken_back_is_asked_for_on_a_phone(browser: Browser, server: StubServer):
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        browser.ask("hello")
        browser.answered()
        browser.one("#panel-toggle").click()
        server.api_key = "s3cret"
        key = browser.one("#key")
        browser.until(key.is_displayed)  # and no panel is in front of it
        assert browser.driver.execute_script("return document.documentElement.scrollWidth") <= 390
        assert "Done." in browser.one(".turn.assistant").text
        box = key.rect
        assert 0 < box["y"] < box["y"] + box["height"] < metrics["height"]
        key.send_keys("s3cret", browser.keys.ENTER)
        browser.until(lambda: browser.one("#prompt").is_displayed())
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_key_that_no_header_holds_is_asked_for_again(browser: Browser, server: StubServer):
    server.api_key = "s3cret"
    browser.until(lambda: browser.one("#key").is_displayed())
    browser.one("#key").send_keys("密钥", browser.keys.ENTER)
    browser.until(lambda: browser.one("#key-note").text == "That key is not known.")
    assert browser.all(".turn.error") == []


def test_a_key_of_an_input_method_sends_and_stops_nothing(browser: Browser, server: StubServer):
    """Safari's, which comes after the composition's end and has only its old code."""
    press = """
    const key = new KeyboardEvent("keydown", { key: arguments[0], keyCode: 229, bubbles: true });
    document.getElementById("prompt").dispatchEvent(key);"""
    browser.one("#prompt").send_keys("endless")
    browser.driver.execute_script(press, "Enter")
    assert browser.all(".turn") == []
    browser.one("#prompt").send_keys(browser.keys.ENTER)
    browser.until(lambda: "5 6" in browser.one(".turn.assistant .body").text)
    browser.driver.execute_script(press, "Escape")
    browser.until(lambda: "15 16" in browser.one(".turn.assistant .body").text)
    browser.one("#prompt").send_keys(browser.keys.ESCAPE)
    browser.answered()


def test_the_dashboard_shows_what_the_server_says(browser: Browser):
    browser.open_panel()
    browser.until(lambda: " GB" in browser.one("#gauges").text)
    text = browser.one("#gauges").text
    assert "2 of 64, 1 running" in text
    assert "25 % of 100 tokens in 4 slots" in text
    assert "2.1 GB of 8.6 GB" in text
    assert f"{HOT_CELSIUS:.0f} °C" in text
    assert "125 ms, P99 2.5 s" in text
    assert "Server memory\n1.6 GB" in text
    assert "invalid request 7, queue full 3, of a newer server 2" in text
    assert "connections" not in text  # nothing was refused for that
    assert "0.31 Temperature ⚠" in text
    assert "Power" not in text  # this device tells nothing of it
    browser.ask("endless")
    first = browser.all("#gauges dd")[0]
    # One token every 20 ms and some overhead; the first figure may be of its beginning.
    browser.until(lambda: first.text != "–" and 5 < float(first.text) < 60)
    browser.until(lambda: len(browser.one("#gauges polyline").get_attribute("points").split()) > 1)
    browser.picture("dashboard")
    browser.one("#stop").click()


def test_a_curve_has_a_scale_and_tells_what_was(browser: Browser, server: StubServer):
    from selenium.webdriver.common.action_chains import ActionChains

    browser.open_panel()
    queue = browser.all(".gauge")[4]
    top, bottom = queue.find_elements(browser.by.CSS_SELECTOR, ".scale")
    browser.until(lambda: (top.text, bottom.text) == ("2", "0"))
    server.waiting = 7
    browser.until(lambda: (top.text, bottom.text) == ("7", "0"))
    curve = queue.find_element(browser.by.CSS_SELECTOR, ".spark")
    text = queue.find_element(browser.by.CSS_SELECTOR, "dd")
    browser.driver.execute_script("arguments[0].scrollIntoView()", curve)
    end = curve.size["width"] // 2 - 1
    ActionChains(browser.driver).move_to_element_with_offset(curve, end, 0).perform()
    browser.until(lambda: re.search(r" \d s ago$", text.text))
    # While the page is hidden nothing is read, and time passes. The reading before the last one
    # is as old when another has come meanwhile.
    script = "const { now } = Date; Date.now = () => now() + 60000;"
    browser.driver.execute_script(script)
    ActionChains(browser.driver).move_by_offset(-(curve.size["width"] // 59), 0).perform()
    browser.until(lambda: re.search(r" 6\d s ago$", text.text))
    ActionChains(browser.driver).move_to_element(browser.one("#prompt")).perform()
    browser.until(lambda: "ago" not in text.text)


def test_the_dashboard_names_the_engine_and_a_gpu_that_idles(browser: Browser, server: StubServer):
    browser.open_panel()
    engines = browser.one("#engines")
    browser.until(lambda: engines.text.startswith("tiny\nort-cpu · int4\n"))
    assert browser.one("#dash-note").text == ""
    server.warning = "the CPU computes, though this machine has a GPU"
    browser.until(lambda: browser.one("#dash-note").text == server.warning)
    state = browser.one("#state")
    assert (state.text, state.get_attribute("title")) == ("ready, with a warning", server.warning)


def test_the_dashboard_shows_the_cache_by_slot(browser: Browser):
    browser.open_panel()
    browser.until(lambda: browser.all("#engines .slots li"))
    script = """
    return [...document.querySelectorAll("#engines .slots li")].map((slot) => [
      slot.textContent, [...slot.querySelectorAll("rect")].map((one) => one.width.baseVal.value)])
    """
    found = browser.driver.execute_script(script)  # at once: it is drawn anew when it changes
    assert [text for text, _ in found] == [
        "20 tokens, 5 from the cache",
        "5 tokens",
        "9 tokens kept for reuse",
        "free",
        "KV cache by slot, 25 tokens each",
    ]
    browser.driver.execute_script("document.getElementById('engines').scrollIntoView()")
    browser.picture("slots")
    # Percent of the slot: cached, computed.
    assert [widths for _, widths in found] == [[20, 60], [0, 20], [36, 0], [0, 0], []]


def test_a_lost_server_is_reported(browser: Browser, server: StubServer):
    browser.open_panel()
    browser.until(lambda: " GB" in browser.one("#gauges").text)
    server.shutdown()
    server.server_close()
    browser.one("#prompt").send_keys("hello", browser.keys.ENTER)
    browser.until(lambda: browser.all(".turn.error"))
    assert "cannot be reached" in browser.one(".turn.error").text
    browser.until(lambda: browser.one("#state").get_attribute("class") == "down")


def test_a_narrow_screen(browser: Browser):
    # Windows of the new headless mode have a least width; a phone is emulated.
    metrics = {"width": 360, "height": 640, "deviceScaleFactor": 2, "mobile": True}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        browser.ask("hello")
        browser.answered()
        width = "return document.documentElement.scrollWidth"
        assert browser.driver.execute_script(width) <= 360
        assert not browser.one("#gauges").is_displayed()
        browser.picture("phone")
        browser.one("#panel-toggle").click()
        assert browser.one("#gauges").is_displayed()
        assert browser.driver.execute_script(width) <= 360
        browser.picture("phone-panel")
        small = [
            element.get_attribute("id")
            for element in browser.all("header button, #ask button, input, select")
            if element.is_displayed() and element.size["height"] < 19
        ]
        assert small == []
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_keyboard_reaches_everything(browser: Browser):
    browser.open_panel()
    browser.until(lambda: browser.one("#model").is_enabled())
    browser.one("#prompt").click()
    seen = set()
    for _ in range(40):
        active = browser.driver.switch_to.active_element
        seen.add(active.get_attribute("id") or active.get_attribute("name"))
        active.send_keys(browser.keys.TAB)
    wanted = {"model", "new", "prompt", "send", "temperature", "no_thinking", "system", "theme"}
    wanted |= {"language"}
    assert wanted <= seen


def background(browser: Browser) -> int:
    """The red of the page's background."""
    script = "return getComputedStyle(document.body).backgroundColor"
    return int(re.findall(r"\d+", browser.driver.execute_script(script))[0])


def test_a_theme_is_chosen_and_kept_in_the_browser(browser: Browser):
    for theme, is_light in (("dark", False), ("light", True), ("dark", False)):
        browser.open_panel()
        browser.one(f"#theme option[value={theme}]").click()
        assert (background(browser) > 128) == is_light
        browser.driver.execute_script("sessionStorage.clear()")  # as a new tab
        browser.reload()
        assert (background(browser) > 128) == is_light
    browser.open_panel()
    browser.one("#theme option[value=system]").click()
    assert background(browser) > 128


def test_a_language_is_chosen_and_kept_in_the_browser(browser: Browser):
    browser.open_panel()
    browser.one("#language option[value=zh]").click()
    browser.until(lambda: browser.one("html").get_attribute("lang") == "zh-Hans")
    browser.driver.execute_script("sessionStorage.clear()")
    browser.reload()
    assert browser.one("#new").text == "新对话"
    browser.open_panel()
    browser.one("#language option[value='']").click()
    browser.until(lambda: browser.one("html").get_attribute("lang") == "en")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_dark_and_light(scheme: str, browser: Browser):
    feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
    try:
        browser.ask("hello")
        browser.answered()
        assert (background(browser) > 128) == (scheme == "light")
        browser.picture(scheme)
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_nothing_but_its_own_server_is_asked(browser: Browser, server: StubServer):
    browser.ask("hello")
    browser.answered()
    script = "return performance.getEntriesByType('resource').map(e => e.name)"
    asked = browser.driver.execute_script(script)
    assert asked
    assert [url for url in asked if not url.startswith((server.url, "data:"))] == []
    asked_for = set(server.paths) - page_files().keys()
    assert asked_for == {"/v1/models", "/v1/chat/completions", "/stats"}


# --------------------------------------------------------------------------- the real service


def test_ask_the_real_service(real: tuple[Browser, Live]):
    browser, live = real
    messages = [{"role": "user", "content": "hello"}]
    live.engine.say(messages, "I think so.</think>The answer, <b>bold</b>.")
    browser.ask("hello")
    turn = browser.answered()
    assert turn.find_element(browser.by.CSS_SELECTOR, ".body").text == "The answer, <b>bold</b>."
    turn.find_element(browser.by.CSS_SELECTOR, "summary").click()
    reasoning = turn.find_element(browser.by.CSS_SELECTOR, ".reasoning")
    assert reasoning.text == "I think so."
    assert browser.one("#model").get_attribute("value") == "tiny"
    browser.open_panel()
    wanted = re.compile(r"P99.*\b0 of 64, 0 running", re.DOTALL)
    browser.until(lambda: wanted.search(browser.one("#gauges").text))
    browser.picture("real")
    assert browser.complaints() == []


def test_stop_the_real_service(real: tuple[Browser, Live]):
    browser, live = real
    live.engine.default = "word " * 400
    live.engine.delay_s = 0.02
    browser.ask("endless")
    browser.until(lambda: "word word" in browser.one(".turn.assistant").text)
    assert not live.idle(0)
    browser.one("#stop").click()
    assert "Stopped" in browser.answered().text
    assert live.idle(), "the engine goes on"
    outcomes = live.ask("/stats", headers={"authorization": f"Bearer {REAL_KEY}"}).json["requests"]
    assert outcomes == {"abort": 1}


def test_an_error_of_the_real_service(real: tuple[Browser, Live]):
    browser, _ = real
    browser.open_panel()
    browser.one("[name=max_tokens]").send_keys("99999999999")
    browser.ask("hello")
    browser.until(lambda: browser.all(".turn.error"))
    assert "max_tokens" in browser.one(".turn.error").text
    assert "(400)" in browser.one(".turn.error").text
    browser.one("[name=max_tokens]").clear()
