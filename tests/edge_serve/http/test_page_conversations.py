"""What can be done with conversations on the page."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.edge_serve.http.browser import WAIT_S, Browser
from tests.edge_serve.http.page_stub import StubServer

pytestmark = pytest.mark.live

FORMAT = "edge-llm conversations"
CIRCLE = {
    "schema": 2,
    "id": "x",
    "title": "t",
    "turns": {"1": {"id": "1", "parent": "1", "role": "user", "content": ""}},
}

ONE_TURN = {"id": "1", "parent": None, "role": "assistant", "content": "An answer."}
NO_FIGURES = {**CIRCLE, "turns": {"1": {**ONE_TURN, "figures": None}}}


def contents(server: StubServer) -> list[str]:
    """The texts of the last chat that the server got."""
    return [message["content"] for message in server.requests[-1]["messages"]]


def titles(browser: Browser) -> list[str]:
    browser.open_list()
    return [one.text for one in browser.all("#conversations .title")]


def tool(browser: Browser, name: str, turn: str = ".turn.assistant:last-of-type") -> Any:
    """The last button of this name in the conversation."""
    return browser.all(f"#log .turn button.{name}")[-1]


def act(browser: Browser, action: str, at: int = 0) -> None:
    """Do something from the menu of a conversation in the list."""
    browser.open_list()
    browser.all("#conversations .more")[at].click()
    browser.one(f"#conversations .{action}").click()


def stored(browser: Browser, script: str, given: Any = None) -> Any:
    """Run a script with ``store``, the object store of conversations, and ``finish``."""
    whole = """
    const [given, done] = arguments;
    const opening = indexedDB.open("edge-llm", 1);
    opening.onsuccess = () => {
      const transaction = opening.result.transaction("conversations", "readwrite");
      const store = transaction.objectStore("conversations");
      let result = null;
      const finish = (value) => { result = value; };
      transaction.oncomplete = () => { opening.result.close(); done(result); };
      %s
    };"""
    return browser.driver.execute_async_script(whole % script, given)


def stored_values(browser: Browser) -> list[dict[str, Any]]:
    script = "const all = store.getAll(); all.onsuccess = () => finish(all.result);"
    found: list[dict[str, Any]] = stored(browser, script)
    return found


def bring(browser: Browser, tmp_path: Path, text: str) -> str:
    """Import a file; returns what the page says to it."""
    tmp_path.mkdir(exist_ok=True)
    file = tmp_path / "chats.json"
    file.write_text(text)
    script = "document.getElementById('import-file').hidden = false"
    browser.driver.execute_script(script)
    browser.one("#import-file").send_keys(str(file))
    browser.until(lambda: browser.one("#toast").is_displayed())
    return str(browser.one("#toast span").text)


# --------------------------------------------------------------------------- the list


def test_conversations_are_listed_and_survive_the_tab(browser: Browser, server: StubServer):
    browser.ask("hello")
    browser.answered()
    browser.one("#new").click()
    assert browser.all(".turn") == []
    browser.ask("another thing")
    browser.answered()
    assert titles(browser) == ["another thing", "hello"]
    browser.driver.execute_script("sessionStorage.clear()")  # as a new tab
    browser.reload()
    assert browser.all(".turn") == []
    browser.all("#conversations .open")[1].click()
    assert browser.one(".turn.user .body").text == "hello"
    assert "Done." in browser.one(".turn.assistant .body").text
    assert browser.one("#conversations [aria-current]").text.startswith("hello")


def test_rename(browser: Browser):
    browser.ask("hello")
    browser.answered()
    act(browser, "rename")
    field = browser.driver.switch_to.active_element
    field.send_keys(browser.keys.CONTROL, "a")
    field.send_keys("Greeting", browser.keys.ENTER)
    assert titles(browser) == ["Greeting"]
    act(browser, "rename")
    browser.driver.switch_to.active_element.send_keys("nothing", browser.keys.ESCAPE)
    assert titles(browser) == ["Greeting"]
    browser.reload()
    assert titles(browser) == ["Greeting"]


def test_delete_and_undo(browser: Browser):
    browser.ask("hello")
    browser.answered()
    act(browser, "delete")
    assert titles(browser) == []
    assert browser.all(".turn") == []
    browser.until(lambda: stored_values(browser) == [])
    browser.one("#toast .undo").click()
    assert titles(browser) == ["hello"]
    assert browser.one(".turn.user .body").text == "hello"
    browser.until(lambda: len(stored_values(browser)) == 1)
    act(browser, "delete")
    browser.until(lambda: stored_values(browser) == [])
    browser.reload()
    assert titles(browser) == []


def test_deleted_while_it_is_answered(browser: Browser):
    browser.ask("endless")
    browser.until(lambda: "5 6" in browser.one(".turn.assistant .body").text)
    act(browser, "delete")
    browser.until(lambda: not browser.one("#stop").is_displayed())
    browser.until(lambda: browser.one("#toast").is_displayed())
    assert titles(browser) == []
    assert stored_values(browser) == []
    browser.one("#toast .undo").click()
    assert titles(browser) == ["endless"]
    browser.until(lambda: len(stored_values(browser)) == 1)


@contextmanager
def second_tab(browser: Browser) -> Iterator[Callable[[], None]]:
    """The page in another tab; yields what goes from one to the other."""
    driver = browser.driver
    url, first = driver.current_url, driver.current_window_handle
    driver.switch_to.new_window("tab")
    second = driver.current_window_handle
    try:
        driver.get(url)
        browser.started()
        yield lambda: driver.switch_to.window(
            first if driver.current_window_handle == second else second
        )
    finally:
        driver.switch_to.window(second)
        driver.close()
        driver.switch_to.window(first)


def test_two_tabs_lose_nothing_of_each_other(browser: Browser):
    browser.ask("one")
    browser.answered()
    with second_tab(browser) as switch:
        browser.open_list()
        browser.one("#conversations .open").click()
        switch()
        browser.ask("two")
        browser.until(lambda: len(browser.all(".turn.assistant .facts .copy, .turn.user")) >= 2)
        browser.answered()
        switch()  # shows what the first one has made of it
        browser.until(
            lambda: [one.text for one in browser.all(".turn.user .body")] == ["one", "two"]
        )
        browser.ask("three")
        browser.answered()
        (conversation,) = stored_values(browser)
        asked = [t["content"] for t in conversation["turns"].values() if t["role"] == "user"]
        assert asked == ["one", "two", "three"]
        # Both are asked at once: both answers are kept, each in a conversation.
        browser.ask("endless")
        browser.until(lambda: "5 6" in browser.all(".turn.assistant .body")[-1].text)
        switch()
        browser.until(lambda: len(browser.all(".turn.user")) == 4)
        browser.one("#new").click()
        browser.all("#conversations .open")[0].click()
        browser.ask("four")
        browser.answered()
        switch()
        browser.one("#stop").click()
        browser.until(lambda: len(stored_values(browser)) == 2)
        both = [json.dumps(each["turns"]) for each in stored_values(browser)]
        assert any("endless" in text and "four" in text for text in both)
        assert any("endless" in text and "four" not in text for text in both)
        act(browser, "delete")
        switch()
        browser.until(lambda: len(titles(browser)) == 1)


def test_an_edit_and_a_renaming_outlast_another_tabs_answer(browser: Browser):
    browser.ask("one")
    browser.answered()
    (conversation,) = stored_values(browser)

    def answer_elsewhere(number: str, text: str) -> None:
        """As another tab keeps an answer and says so."""
        turn = {"id": number, "parent": conversation["leaf"], "role": "assistant", "content": text}
        conversation["turns"][number] = turn
        conversation["leaf"] = number
        stored(browser, "store.put(given);", conversation)
        say = "new BroadcastChannel('edge-llm').postMessage(arguments[0]);"
        browser.driver.execute_script(say, conversation["id"])
        time.sleep(0.2)  # it reads it

    browser.one(".turn.user .edit").click()
    field = browser.driver.switch_to.active_element
    field.send_keys(" and more")
    answer_elsewhere("3", "from elsewhere")
    act(browser, "rename")
    assert field.get_attribute("value") == "one and more"
    answer_elsewhere("4", "again from elsewhere")
    name = browser.driver.switch_to.active_element
    name.send_keys(browser.keys.CONTROL, "a")
    name.send_keys("Named", browser.keys.ENTER)
    browser.until(lambda: stored_values(browser)[0]["title"] == "Named")
    assert titles(browser) == ["Named"]
    (kept,) = stored_values(browser)
    assert kept["turns"].keys() == {"1", "2", "3", "4"}
    # Once nothing is edited any more, the log shows what came.
    field.send_keys(browser.keys.ESCAPE)
    answer_elsewhere("5", "the last")
    browser.until(lambda: "the last" in browser.all(".turn.assistant .body")[-1].text)


def test_a_browser_that_lets_nothing_be_kept(browser: Browser):
    script = "window.BroadcastChannel = class { constructor() { throw new Error('insecure'); } };"
    command = "Page.addScriptToEvaluateOnNewDocument"
    added = browser.driver.execute_cdp_cmd(command, {"source": script})
    try:
        browser.reload()
        browser.ask("hello")
        browser.answered()
        assert titles(browser) == ["hello"]
    finally:
        browser.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)
        browser.complaints()


def test_search_looks_into_titles_and_texts(browser: Browser, server: StubServer):
    server.answers["one"] = "About apples."
    server.answers["two"] = "About pears."
    for text in ("one", "two"):
        browser.one("#new").click()
        browser.ask(text)
        browser.answered()
    browser.open_list()
    browser.one("#search").send_keys("about PEARS")
    assert titles(browser) == ["two"]
    browser.one("#search").send_keys("x")
    assert titles(browser) == []
    assert browser.one("#none").text == "Nothing found."


# --------------------------------------------------------------------------- branches


@pytest.mark.parametrize("prompt", ["broken", "cut"])
def test_try_again_after_an_answer_that_broke_off(
    prompt: str, browser: Browser, server: StubServer
):
    browser.ask(prompt)
    browser.until(lambda: browser.all(".turn.error"))
    server.answers[prompt] = "The whole answer."
    browser.one(".turn.error button").click()
    browser.until(lambda: "The whole answer." in browser.one("#log").text)
    browser.answered()
    assert contents(server) == [prompt]
    assert browser.one(".turn.assistant .place").text == "2/2"


def test_regenerate_keeps_both_answers(browser: Browser, server: StubServer):
    server.answers["q"] = "First answer."
    browser.ask("q")
    browser.answered()
    server.answers["q"] = "Second answer."
    tool(browser, "regenerate").click()
    browser.until(lambda: "Second answer." in browser.one("#log").text)
    browser.answered()
    assert contents(server) == ["q"]
    tool(browser, "previous").click()
    assert "First answer." in browser.one(".turn.assistant .body").text
    browser.ask("more")
    browser.answered()
    assert contents(server) == ["q", "First answer.", "more"]
    browser.reload()
    browser.all(".turn.assistant .next")[0].click()
    assert "Second answer." in browser.one(".turn.assistant .body").text
    assert len(browser.all(".turn")) == 2  # what followed the first answer is not below this one


@pytest.mark.parametrize("how", ["refused", "stopped", "a wrong number"])
def test_a_regeneration_that_fails_hides_nothing(how: str, browser: Browser, server: StubServer):
    browser.open_panel()
    for text in ("one", "two"):
        server.answers[text] = f"Answer to {text}."
        browser.ask(text)
        browser.until(lambda text=text: f"Answer to {text}." in browser.one("#log").text)
        browser.answered()
    if how == "refused":
        server.refusals = 1
    elif how == "stopped":
        server.holds.clear()
    else:
        browser.one("[name=temperature]").send_keys("99")
    browser.all("#log .regenerate")[0].click()
    if how == "stopped":
        browser.until(lambda: browser.one("#stop").is_displayed())
        browser.one("#stop").click()
    browser.until(lambda: browser.all(".turn.error"))
    server.holds.set()
    browser.one("[name=temperature]").clear()
    shown = [one.text for one in browser.all(".turn .body")]
    assert shown == ["one", "Answer to one.", "two", "Answer to two."]
    browser.ask("three")
    browser.answered()
    assert contents(server) == [*shown, "three"]
    browser.reload()
    assert len(browser.all(".turn")) == 6


def test_a_stored_conversation_is_shown_to_its_end(browser: Browser):
    """Also one whose question was the leaf, though it has an answer."""
    browser.ask("hello")
    browser.answered()
    (conversation,) = stored_values(browser)
    stored(browser, "store.put(given);", {**conversation, "leaf": "1"})
    browser.reload()
    assert "Done." in browser.one(".turn.assistant .body").text
    assert browser.all(".turn.error") == []


def test_edit_makes_a_branch(browser: Browser, server: StubServer):
    browser.ask("hello")
    browser.answered()
    browser.ask("second")
    browser.answered()
    browser.all(".turn.user .edit")[0].click()
    area = browser.driver.switch_to.active_element
    assert area.get_attribute("value") == "hello"
    area.send_keys(" again", browser.keys.ENTER)
    browser.until(lambda: len(browser.all(".turn")) == 2)
    browser.answered()
    assert contents(server) == ["hello again"]
    assert browser.one(".turn.user .place").text == "2/2"
    browser.one(".turn.user .previous").click()
    assert [one.text for one in browser.all(".turn.user .body")] == ["hello", "second"]


def test_an_edit_can_be_left(browser: Browser, server: StubServer):
    browser.ask("hello")
    browser.answered()
    browser.one(".turn.user .edit").click()
    browser.driver.switch_to.active_element.send_keys("x", browser.keys.ESCAPE)
    assert browser.one(".turn.user .body").text == "hello"
    assert len(server.requests) == 1


def test_an_edit_outlasts_the_end_of_an_answer(browser: Browser, server: StubServer):
    server.holds.clear()
    browser.ask("hello")
    browser.one(".turn.user .edit").click()
    field = browser.driver.switch_to.active_element
    field.send_keys(" again")
    browser.one(".turn.user .tools .main").click()
    browser.until(lambda: "Wait for it to finish" in browser.one("#toast").text)
    server.holds.set()
    browser.answered()
    assert field.get_attribute("value") == "hello again"
    browser.one(".turn.user .tools .main").click()
    browser.until(lambda: browser.one(".turn.user .place").text == "2/2")
    browser.answered()
    assert contents(server) == ["hello again"]
    browser.one(".turn.user .previous").click()
    assert browser.one(".turn.user .body").text == "hello"
    assert browser.all(".editing") == []


def test_the_focus_stays_where_the_keyboard_is(browser: Browser):
    def focused() -> Any:
        return browser.driver.switch_to.active_element

    browser.one("#prompt").send_keys("hello", browser.keys.TAB)
    focused().send_keys(browser.keys.ENTER)
    browser.answered()
    assert focused().get_attribute("id") == "prompt"
    for number in (2, 3):
        tool(browser, "regenerate").click()
        browser.until(
            lambda number=number: browser.one(".turn .place").text == f"{number}/{number}"
        )
        browser.answered()
    tool(browser, "previous").send_keys(browser.keys.ENTER)
    for place, name in (("2/3", "previous"), ("1/3", "next"), ("2/3", "next"), ("3/3", "previous")):
        browser.until(lambda place=place: browser.one(".turn .place").text == place)
        assert name in focused().get_attribute("class").split()
        focused().send_keys(browser.keys.ENTER)


# --------------------------------------------------------------------------- going on


def test_go_on_with_a_stopped_answer(browser: Browser, server: StubServer):
    browser.ask("endless")
    browser.until(lambda: "5 6" in browser.one(".turn.assistant .body").text)
    browser.one("#stop").click()
    shown = browser.answered().find_element(browser.by.CSS_SELECTOR, ".body").text
    tool(browser, "continue").click()
    browser.until(lambda: "whole answer." in browser.one(".turn.assistant .body").text)
    browser.answered()
    request = server.requests[-1]
    assert request["continue_final_message"] is True
    question, begun = request["messages"]
    assert question == {"role": "user", "content": "endless"}
    assert begun["content"].strip() == shown
    assert browser.one(".turn.assistant .body").text == f"{shown} whole answer."
    assert browser.all("#log .continue") == []


def test_only_the_last_answer_goes_on(browser: Browser, server: StubServer):
    server.reason = "length"
    for number, text in enumerate(("one", "two"), 1):
        browser.ask(text)
        browser.until(lambda number=number: len(browser.all(".turn.assistant .copy")) == number)
        browser.answered()
    assert len(browser.all("#log .continue")) == 1
    tool(browser, "continue").click()
    browser.until(lambda: "whole answer." in browser.all(".turn.assistant .body")[-1].text)
    browser.answered()
    assert len(browser.all(".turn")) == 4


def test_figures_of_an_answer_that_went_on_add_up(browser: Browser, server: StubServer):
    details = {"reasoning_tokens": 30}
    server.usage = {"completion_tokens": 40, "completion_tokens_details": details}
    server.reason = "length"
    browser.let_time_pass()
    browser.ask("hello")
    browser.answered()
    tool(browser, "continue").click()
    browser.until(lambda: "whole answer." in browser.one(".turn.assistant .body").text)
    turn = browser.answered()
    assert "80 tokens" in turn.find_element(browser.by.CSS_SELECTOR, ".facts").text
    assert turn.find_element(browser.by.CSS_SELECTOR, "summary").text.endswith("60 tokens")


def test_figures_of_a_stopped_answer_count(browser: Browser, server: StubServer):
    def tokens() -> int:
        return int(browser.one(".turn.assistant .facts span").text.removesuffix(" tokens"))

    browser.ask("endless")
    browser.until(lambda: "5 6" in browser.one(".turn.assistant .body").text)
    browser.one("#stop").click()
    turn = browser.answered()
    written = len(turn.find_element(browser.by.CSS_SELECTOR, ".body").text.split())
    assert tokens() == written
    facts = turn.find_element(browser.by.CSS_SELECTOR, ".facts").text
    assert "tokens/s" in facts
    assert "first token after" in facts
    # The prompt of what goes on has what is there of the answer.
    server.usage = {"completion_tokens": 40, "prompt_tokens": 3 + written}
    tool(browser, "continue").click()
    browser.until(lambda: "whole answer." in browser.one(".turn.assistant .body").text)
    facts = browser.answered().find_element(browser.by.CSS_SELECTOR, ".facts").text
    assert tokens() == written + 40
    assert "prompt 3\n" in facts
    assert f"about {written + 43} of" in browser.one("#meter-text").text


def test_stopped_before_the_first_word(browser: Browser, server: StubServer):
    server.holds.clear()
    browser.ask("hello")
    browser.until(lambda: browser.one("#stop").is_displayed())
    browser.one("#stop").click()
    browser.until(lambda: browser.all(".turn.error"))
    assert "Stopped" in browser.one(".turn.error").text
    server.holds.set()
    browser.one(".turn.error button").click()
    assert "Done." in browser.answered().text


# --------------------------------------------------------------------------- figures


def test_figures_stand_under_the_answer(browser: Browser, server: StubServer):
    server.usage = {
        "completion_tokens": 1412,
        "prompt_tokens": 1203,
        "prompt_tokens_details": {"cached_tokens": 1100},
        "completion_tokens_details": {"reasoning_tokens": 345},
    }
    browser.let_time_pass()
    browser.ask("hello")
    turn = browser.answered()
    facts = turn.find_element(browser.by.CSS_SELECTOR, ".facts").text
    for fact in (
        "1,412 tokens",
        "tokens/s",
        "first token after",
        "prompt 1,203, 1,100 cached",
        "tiny",
    ):
        assert fact in facts
    summary = turn.find_element(browser.by.CSS_SELECTOR, "summary").text
    assert summary.startswith("Thought for")
    assert summary.endswith("345 tokens")


def test_a_thought_that_took_no_time_is_shown(browser: Browser, server: StubServer):
    # Reasoning and answer may come in one read: the clock does not move between them.
    browser.driver.execute_script("performance.now = () => 1")
    browser.ask("hello")
    summary = browser.answered().find_element(browser.by.CSS_SELECTOR, "summary")
    assert summary.text == "Thought for a moment"


def test_the_meter_warns_before_the_context_is_full(browser: Browser, server: StubServer):
    assert not browser.one("#meter").is_displayed()
    server.usage = {"completion_tokens": 100, "prompt_tokens": 900}
    browser.ask("hello")
    browser.answered()
    text = browser.one("#meter-text")
    assert text.text == "about 1,000 of 4,096 tokens of context"
    browser.one("#prompt").send_keys("word" * 100)
    assert text.text == "about 1,100 of 4,096 tokens of context"
    browser.one("#prompt").clear()
    server.usage = {"completion_tokens": 500, "prompt_tokens": 3000}
    browser.ask("hello")
    browser.until(lambda: text.text == "about 596 of 4,096 tokens of context left")
    assert browser.all("#meter.near")
    server.usage = {"completion_tokens": 500, "prompt_tokens": 3596}
    browser.ask("hello")
    browser.until(lambda: text.text.startswith("This chat is full"))


def test_a_waiting_user_is_told_why(browser: Browser, server: StubServer):
    server.holds.clear()
    server.progress = {"total": 3000, "cache": 0, "processed": 0, "time_ms": 0, "ahead": 4}
    browser.ask("hello")
    waiting = browser.until(lambda: browser.all(".turn .waiting"))[0]
    bar = waiting.find_element(browser.by.CSS_SELECTOR, "progress")
    assert waiting.text == "Waiting, 4 ahead"
    assert not bar.is_displayed()
    server.progress = {**server.progress, "ahead": 0}
    browser.until(lambda: waiting.text == "Waiting, next in line")
    server.progress = {"total": 3000, "cache": 512, "processed": 1536, "time_ms": 900}
    browser.until(lambda: waiting.text == "Reading the prompt: 1,536 of 3,000 tokens")
    assert bar.is_displayed()
    assert float(bar.get_attribute("value")) == pytest.approx(1536 / 3000)
    browser.picture("reading")
    server.holds.set()
    browser.answered()
    assert browser.all(".turn .waiting") == []


# --------------------------------------------------------------------------- carried away


def exported(browser: Browser, folder: Path, suffix: str) -> str:
    browser.until(lambda: [one for one in folder.glob(f"*.{suffix}") if one.stat().st_size])
    (file,) = folder.glob(f"*.{suffix}")
    return file.read_text()


def test_export_and_import(browser: Browser, server: StubServer, tmp_path: Path):
    browser.driver.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
    )
    browser.ask("hello")
    browser.answered()
    act(browser, "markdown")
    text = exported(browser, tmp_path, "md")
    assert text.startswith("# hello\n\n## You\n\nhello\n\n## Model\n\n<details>")
    assert "```py\nprint('<b>')\n```" in text
    browser.one("#conversations .json").click()
    whole = exported(browser, tmp_path, "json")
    assert json.loads(whole)["format"] == FORMAT
    assert bring(browser, tmp_path / "brought", whole) == "Conversations imported: 1."
    assert titles(browser) == ["hello", "hello"]
    first, second = stored_values(browser)
    assert first["id"] != second["id"]
    assert json.dumps(first["turns"]) == json.dumps(second["turns"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no json", "This is not JSON."),
        ('{"a": 1}', "has no conversations"),
        (json.dumps({"format": FORMAT, "conversations": [{"schema": 9}]}), "(schema 9)"),
        (json.dumps({"format": FORMAT, "conversations": [CIRCLE]}), "(parent of turn 1)"),
        (json.dumps({"format": FORMAT, "conversations": [NO_FIGURES]}), "(turn 1)"),
    ],
    ids=["no JSON", "other JSON", "newer schema", "circle", "no figures"],
)
def test_an_invalid_import_is_refused(text: str, said: str, browser: Browser, tmp_path: Path):
    assert said in bring(browser, tmp_path, text)
    assert titles(browser) == []


def test_an_unknown_leaf_is_ignored_on_import(browser: Browser, tmp_path: Path):
    one = {**CIRCLE, "turns": {"1": ONE_TURN}, "leaf": "constructor"}
    text = json.dumps({"format": FORMAT, "conversations": [one]})
    assert "imported" in bring(browser, tmp_path, text)
    browser.one("#conversations .open").click()
    assert browser.one(".turn.assistant .body").text == "An answer."


def test_broken_and_old_stored_conversations(browser: Browser, server: StubServer):
    broken = {"id": "bad", "schema": 2, "title": "x", "turns": {"1": {"id": "1", "role": "robot"}}}
    old = {
        "id": "old",
        "title": "From before",
        "turns": [
            {"role": "user", "content": "old question"},
            {"role": "assistant", "content": "old answer", "reasoning": "so"},
        ],
    }
    stored(browser, "for (const one of given) store.put(one);", [broken, {"id": "worse"}, old])
    browser.reload()
    assert "cannot be read: 2." in browser.one("#toast").text
    assert titles(browser) == ["From before"]
    browser.one("#conversations .open").click()
    browser.ask("hello")
    browser.until(lambda: len(browser.all(".turn")) == 4)
    browser.answered()
    assert contents(server) == ["old question", "old answer", "hello"]
    assert broken in stored_values(browser)  # nothing is thrown away


@contextmanager
def before_the_page(browser: Browser, script: str) -> Iterator[None]:
    """Load the page again after this script."""
    name = "ScriptToEvaluateOnNewDocument"
    added = browser.driver.execute_cdp_cmd(f"Page.add{name}", {"source": script})
    try:
        browser.reload()
        yield
    finally:
        browser.driver.execute_cdp_cmd(f"Page.remove{name}", added)


def test_without_a_store_the_page_goes_on(browser: Browser, server: StubServer):
    script = "delete window.indexedDB; Object.defineProperty(window, 'indexedDB', {value: null})"
    with before_the_page(browser, script):
        assert "does not store" in browser.one("#toast").text
        browser.ask("hello")
        browser.answered()
        assert titles(browser) == ["hello"]


LOST = """
const there = IDBObjectStore.prototype, { get } = there;
const lost = () => { throw new DOMException("the file is lost", "NotReadableError"); };
there.getAll = lost;
"""


def test_a_value_that_is_lost_takes_no_others_with_it(browser: Browser):
    for text in ("one", "two"):
        browser.one("#new").click()
        browser.ask(text)
        browser.answered()
    bad = next(one["id"] for one in stored_values(browser) if one["title"] == "one")
    one_by_one = (
        "there.get = function (key) { return key === '%s' ? lost() : get.call(this, key); };"
    )
    with before_the_page(browser, LOST + one_by_one % bad):
        assert "cannot be read: 1." in browser.one("#toast").text
        assert titles(browser) == ["two"]
    browser.reload()
    assert titles(browser) == ["two", "one"]


def test_a_store_that_cannot_be_read_leaves_the_page(browser: Browser):
    with before_the_page(browser, LOST + "there.getAllKeys = lost;"):
        assert "storage failed: the file is lost" in browser.one("#toast").text
        browser.ask("hello")
        browser.answered()
        assert titles(browser) == ["hello"]


def test_conversations_that_cannot_be_deleted_stay(browser: Browser):
    browser.ask("hello")
    browser.answered()
    refuse = """IDBObjectStore.prototype.delete = IDBObjectStore.prototype.put =
        () => { throw new DOMException("the disk is full", "QuotaExceededError"); };"""
    browser.driver.execute_script(refuse)
    act(browser, "delete")
    said = "storage failed: the disk is full"
    browser.until(lambda: said in browser.one("#toast").text)
    assert titles(browser) == ["hello"]
    browser.one("#toast .close").click()
    browser.open_panel()
    browser.one("#preset-name").send_keys("Pirate", browser.keys.ENTER)
    browser.until(lambda: said in browser.one("#toast").text)
    assert browser.one("#preset-name").get_attribute("value") == "Pirate"


def test_a_connection_to_the_store_that_ended_is_made_again(browser: Browser):
    browser.ask("one")
    browser.answered()
    end = """
    const { transaction } = IDBDatabase.prototype;
    IDBDatabase.prototype.transaction = function (...given) {
      IDBDatabase.prototype.transaction = transaction;
      this.close();
      return transaction.apply(this, given);
    };"""
    browser.driver.execute_script(end)
    browser.ask("two")
    browser.until(lambda: len(browser.all(".turn.assistant .copy")) == 2)
    browser.answered()
    assert not browser.one("#toast").is_displayed()
    assert len(stored_values(browser)[0]["turns"]) == 4


# --------------------------------------------------------------------------- settings


def test_fields_show_the_models_own_values(browser: Browser):
    browser.open_panel()
    browser.until(lambda: browser.one("[name=temperature]").get_attribute("placeholder") == "0.6")
    assert browser.one("[name=top_p]").get_attribute("placeholder") == "0.95"
    assert browser.one("[name=max_tokens]").get_attribute("placeholder") == "no limit"


def test_presets(browser: Browser, server: StubServer):
    browser.open_panel()
    browser.one("#preset option[value='built:greedy']").click()
    assert browser.one("[name=temperature]").get_attribute("value") == "0"
    browser.one("[name=system]").send_keys("Be a pirate.")
    browser.one("[name=stop]").send_keys("END")
    browser.one("#preset-name").send_keys("Pirate", browser.keys.ENTER)
    browser.until(lambda: browser.one("#preset").get_attribute("value") == "own:Pirate")
    browser.one("#preset option[value='built:own']").click()
    assert browser.one("[name=temperature]").get_attribute("value") == ""
    browser.driver.execute_script("sessionStorage.clear()")
    browser.reload()
    browser.open_panel()
    browser.until(lambda: browser.all("#preset option[value='own:Pirate']"))[0].click()
    browser.ask("hello")
    browser.answered()
    request = server.requests[-1]
    assert request["messages"][0] == {"role": "system", "content": "Be a pirate."}
    assert (request["temperature"], request["stop"]) == (0, ["END"])
    browser.one("#preset-delete").click()
    browser.until(lambda: not browser.all("#preset option[value='own:Pirate']"))


def test_the_real_service_continues_an_answer(real: tuple[Browser, Any]):
    browser, live = real
    messages = [{"role": "user", "content": "hello"}]
    live.engine.say(messages, "So.</think>One two", ends=False)
    live.engine.delay_s = 0.2  # so that it still writes when the button is pressed
    browser.ask("hello")
    browser.until(lambda: "One two" in browser.one(".turn.assistant .body").text)
    browser.one("#stop").click()
    browser.answered()
    live.engine.delay_s = 0.02
    before = browser.one(".turn.assistant .body").text
    tool(browser, "continue").click()
    browser.until(lambda: live.idle(WAIT_S))
    browser.answered()
    assert browser.all(".turn.error") == []
    assert browser.one(".turn.assistant .body").text.startswith(before[: len("One two")])
