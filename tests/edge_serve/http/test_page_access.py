"""Whether everybody can use the page: languages, WCAG 2.2 AA by axe-core, keyboard, phones."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edge_serve.http.page import page_files
from tests.edge_serve.http.browser import Browser
from tests.edge_serve.http.page_stub import StubServer
from tests.edge_serve.http.test_page_answers import TEXT
from tests.edge_serve.http.test_page_files import give

pytestmark = pytest.mark.live

AXE = Path(__file__).parent / "axe-core/axe.min.js"
AXE_SHA256 = "29348999450cdf2849a8e70b7912fc2da85a849da39c0d0d5394f51d4a9ed95c"  # npm, 4.14.1
TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}


def catalogue(language: str) -> dict[str, str]:
    (path,) = (path for path in page_files() if path.endswith(f"/lang/{language}.js"))
    text = page_files()[path].body.decode()
    words: dict[str, str] = json.loads(text.partition("export default ")[2].rstrip(";\n"))
    return words


def test_every_language_has_every_word():
    english, chinese = catalogue("en"), catalogue("zh")
    assert english.keys() == chinese.keys()
    for key, text in english.items():
        assert set(re.findall(r"\{\w+\}", text)) == set(re.findall(r"\{\w+\}", chinese[key])), key
    same = {key for key, text in english.items() if chinese[key] == text}
    assert same == {"min_p", "none", "top_k", "top_p"}


def test_every_translated_word_exists_and_is_used():
    own = "\n".join(
        file.body.decode()
        for path, file in page_files().items()
        if "/script/" in path or path == "/"
    )
    there = catalogue("en").keys()
    named = set(re.findall(r'data-t(?:-\w+)?="(\w+)"', own))
    named |= set(re.findall(r'\bt\("(\w+)"', own))
    assert named <= there
    quoted = set(re.findall(r'"(\w+)"', own))
    quoted |= {f"preset_{name}" for name in ("own", "greedy", "precise", "lively")}
    quoted |= {f"state_{name}" for name in ("loaded", "loading", "failed")}
    quoted |= {"load_failed", "unload_failed"}
    assert there - quoted == set()


def test_every_documented_error_has_words():
    text = (Path(__file__).parents[3] / "docs/server.md").read_text()
    table = text.partition("| Status | `code` |")[2].partition("\n\n")[0]
    codes = {code for row in table.splitlines() for code in re.findall(r"`([a-z_]+)`", _code(row))}
    assert {"queue_full", "model_busy"} < codes
    (path,) = (path for path in page_files() if path.endswith("/script/refusals.js"))
    known = set(re.findall(r'"(\w+)"', page_files()[path].body.decode()))
    assert codes - known == set()


def _code(row: str) -> str:
    return row.split("|")[2] if row.count("|") > 2 else ""


def test_axe_is_what_was_published():
    assert hashlib.sha256(AXE.read_bytes()).hexdigest() == AXE_SHA256


# --------------------------------------------------------------------------- with a browser


@contextmanager
def seen_as(browser: Browser, language: str, scheme: str, size: dict[str, Any]) -> Iterator[None]:
    """The page for a reader of this language, with this colour scheme and screen."""
    cdp = browser.driver.execute_cdp_cmd
    agent = browser.driver.execute_script("return navigator.userAgent")
    cdp("Emulation.setUserAgentOverride", {"userAgent": agent, "acceptLanguage": language})
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    cdp("Emulation.setEmulatedMedia", {"features": features})
    if size:
        cdp("Emulation.setDeviceMetricsOverride", size)
    try:
        browser.reload()
        yield
    finally:
        cdp("Emulation.setUserAgentOverride", {"userAgent": agent, "acceptLanguage": "en-US"})
        cdp("Emulation.setEmulatedMedia", {"features": []})
        cdp("Emulation.clearDeviceMetricsOverride", {})


def violations(browser: Browser) -> list[str]:
    """What axe-core finds wrong with what is shown."""
    browser.driver.execute_script(AXE.read_text())
    script = """
    const [tags, done] = arguments;
    axe.run(document, { runOnly: { type: "tag", values: tags } }).then(({ violations }) => done(
      violations.flatMap(({ id, nodes }) => nodes.map((one) => `${id}: ${one.html}`))));
    """
    found: list[str] = browser.driver.execute_async_script(script, TAGS)
    return found


# Every pair of language, colours and size: names come from one, contrast and overflow from two.
@pytest.mark.parametrize(
    ("language", "scheme", "size"),
    [
        pytest.param("en-US", "light", {}, id="en-US-light-desktop"),
        pytest.param("en-US", "dark", PHONE, id="en-US-dark-phone"),
        pytest.param("zh-CN", "light", PHONE, id="zh-CN-light-phone"),
        pytest.param("zh-CN", "dark", {}, id="zh-CN-dark-desktop"),
    ],
)
def test_wcag_22_aa(
    language: str, scheme: str, size: dict[str, Any], browser: Browser, server: StubServer
):
    server.answers["text"] = TEXT
    server.usage = {"completion_tokens": 500, "prompt_tokens": 3500}
    failed = {"value": "failed", "failed": "it takes 9 GB, and 7 GB are free"}
    server.states = {"tiny": {"value": "loaded"}, "<b>other</b>": failed}
    with seen_as(browser, language, scheme, size):
        name = f"{language[:2]}-{scheme}-{'phone' if size else 'desktop'}"
        browser.picture(f"{name}-empty")
        assert violations(browser) == []
        browser.until(lambda: browser.one("#state").get_attribute("class") == "up")
        give(browser, "drop", ("notes.txt", b"Buy milk."))
        browser.until(lambda: browser.all("#files .chip"))
        assert violations(browser) == []
        browser.ask("hello")
        browser.answered()
        browser.one(".turn .files summary").click()
        browser.ask("text")
        browser.until(lambda: len(browser.all(".turn.assistant")) == 2)
        browser.answered()
        browser.ask("broken")
        browser.until(lambda: browser.all(".turn.error"))
        browser.one(".turn.assistant details summary").click()
        browser.picture(f"{name}-chat")
        assert violations(browser) == []
        browser.open_panel()
        browser.until(lambda: " GB" in browser.one("#gauges").text)
        browser.picture(f"{name}-panel")
        assert violations(browser) == []
        browser.open_list()
        browser.one("#conversations .more").click()
        browser.picture(f"{name}-list")
        assert violations(browser) == []
        browser.one("#conversations .delete").click()
        browser.until(lambda: browser.one("#toast").is_displayed())
        assert violations(browser) == []
        browser.one("#toast .close").click()
        browser.one("#new").click()
        browser.one("#compare").click()
        browser.ask("text")
        browser.until(lambda: len(browser.all(".pair .keep:enabled")) == 2)
        browser.picture(f"{name}-compare")
        assert violations(browser) == []
        server.api_key = "s3cret"
        browser.until(lambda: browser.one("#key").is_displayed())
        browser.picture(f"{name}-key")
        assert violations(browser) == []
        width = browser.driver.execute_script("return document.documentElement.scrollWidth")
        assert width <= (390 if size else 1280)


def test_axe_finds_what_is_wrong(browser: Browser):
    """The check itself sees a missing name and a faint colour."""
    browser.driver.execute_script(
        "document.getElementById('send').textContent = '';"
        "document.getElementById('new').style.color = '#ccc';"
    )
    assert {one.split(":")[0] for one in violations(browser)} == {"button-name", "color-contrast"}


def test_chinese_readers_get_chinese(browser: Browser, server: StubServer):
    words = catalogue("zh")
    with seen_as(browser, "zh-CN", "light", {}):
        assert browser.one("html").get_attribute("lang") == "zh-Hans"
        assert browser.one("#new").text == words["new_chat"]
        browser.ask("hello")
        browser.answered()
        assert words["copy"] in browser.one(".turn.assistant .tools").text
        browser.open_panel()
        browser.until(lambda: words["gauge_kv"] in browser.one("#gauges").text)
    with seen_as(browser, "fr-FR", "light", {}):
        assert browser.one("#new").text == catalogue("en")["new_chat"]


def test_a_whole_chat_by_keyboard_alone(browser: Browser, server: StubServer):
    def reach(selector: str, key: Any = None) -> None:
        for _ in range(80):
            active = browser.driver.switch_to.active_element
            if browser.driver.execute_script(
                "return arguments[0].matches(arguments[1])", active, selector
            ):
                return
            active.send_keys(key or browser.keys.TAB)
        pytest.fail(f"{selector} cannot be reached")

    def press(key: Any) -> None:
        browser.driver.switch_to.active_element.send_keys(key)

    browser.until(lambda: browser.one("#state").get_attribute("class") == "up")
    browser.driver.execute_script("document.activeElement.blur()")
    reach(".skip")
    press(browser.keys.ENTER)
    reach("#prompt")
    browser.driver.switch_to.active_element.send_keys("hello", browser.keys.ENTER)
    browser.answered()
    back = browser.keys.SHIFT + browser.keys.TAB
    reach(".turn.assistant .regenerate", back)
    press(browser.keys.ENTER)
    browser.until(lambda: browser.all(".turn.assistant .place"))
    browser.answered()
    browser.one("#prompt").click()
    reach(".turn.user .edit", back)
    press(browser.keys.ENTER)
    press(browser.keys.ESCAPE)
    browser.one("#prompt").click()
    reach("#conversations .more", back)
    press(browser.keys.ENTER)
    reach("#conversations .delete")
    press(browser.keys.ENTER)
    browser.until(lambda: browser.all(".turn") == [])
    reach("#toast .undo")
    press(browser.keys.ENTER)
    browser.until(lambda: len(browser.all(".turn")) == 2)
