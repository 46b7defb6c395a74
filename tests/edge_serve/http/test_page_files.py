"""Text files that go with a message."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from tests.edge_serve.http.browser import Browser
from tests.edge_serve.http.page_stub import StubServer
from tests.edge_serve.http.test_page_conversations import act, bring, exported, tool

pytestmark = pytest.mark.live

NOTES = "Buy milk.\nBuy tea.\n"
SENT = "notes.txt:\n```txt\nBuy milk.\nBuy tea.\n```\n\nWhat do I buy?"

GIVE = """
const [how, given] = arguments;
const data = new DataTransfer();
for (const [name, bytes] of given) {
  data.items.add(new File([Uint8Array.from(atob(bytes), (one) => one.charCodeAt(0))], name));
}
if (how === "paste") {
  const made = { clipboardData: data, bubbles: true, cancelable: true };
  document.getElementById("prompt").dispatchEvent(new ClipboardEvent("paste", made));
} else {
  for (const name of ["dragenter", "dragover", "drop"]) {
    const event = new DragEvent(name, { dataTransfer: data, bubbles: true, cancelable: true });
    document.getElementById("log").dispatchEvent(event);
    if (!event.defaultPrevented) throw new Error(`the browser would open the file at ${name}`);
  }
}
"""


def give(browser: Browser, how: str, *files: tuple[str, bytes]) -> None:
    given = [(name, base64.b64encode(data).decode()) for name, data in files]
    browser.driver.execute_script(GIVE, how, given)


def chips(browser: Browser) -> list[str]:
    return [one.text for one in browser.all("#files .name")]


def asked(server: StubServer) -> list[str]:
    return [message["content"] for message in server.requests[-1]["messages"]]


def ask_about_notes(browser: Browser) -> None:
    give(browser, "drop", ("notes.txt", NOTES.encode()))
    browser.until(lambda: chips(browser) == ["notes.txt"])
    browser.ask("What do I buy?")
    browser.answered()


@pytest.mark.parametrize("how", ["drop", "paste", "button"])
def test_a_file_goes_with_the_message(
    how: str, browser: Browser, server: StubServer, tmp_path: Path
):
    if how == "button":
        (tmp_path / "notes.txt").write_text(NOTES)
        browser.driver.execute_script("document.getElementById('attach-file').hidden = false")
        browser.one("#attach-file").send_keys(str(tmp_path / "notes.txt"))
    else:
        give(browser, how, ("notes.txt", NOTES.encode()))
    browser.until(lambda: chips(browser) == ["notes.txt"])
    browser.picture(f"files-{how}")
    browser.ask("What do I buy?")
    browser.answered()
    assert asked(server) == [SENT]
    assert chips(browser) == []
    turn = browser.one(".turn.user")
    assert turn.find_element(browser.by.CSS_SELECTOR, ".body").text == "What do I buy?"
    turn.find_element(browser.by.CSS_SELECTOR, ".files summary").click()
    assert turn.find_element(browser.by.CSS_SELECTOR, ".files pre").text == NOTES.strip()
    browser.ask("And then?")
    browser.until(lambda: len(server.requests) == 2)
    assert asked(server)[0] == SENT
    assert browser.complaints() == []


def test_several_files_and_no_word(browser: Browser, server: StubServer):
    code = b"a = '''\n```\n'''\n"  # a fence of its own, which must not end ours
    give(browser, "drop", ("a.py", code), ("b.csv", b"x,y\r\n1,2\r\n"), ("c.md", b"# C"))
    browser.until(lambda: chips(browser) == ["a.py", "b.csv", "c.md"])
    browser.all("#files button")[2].click()
    assert chips(browser) == ["a.py", "b.csv"]
    browser.ask("")
    browser.until(lambda: len(server.requests) == 1)
    assert asked(server) == [
        "a.py:\n````py\na = '''\n```\n'''\n````\n\nb.csv:\n```csv\nx,y\n1,2\n```"
    ]
    browser.answered()
    browser.open_list()
    assert browser.one("#conversations .title").text == "a.py"


def test_files_stay_through_editing_regenerating_and_reloading(
    browser: Browser, server: StubServer
):
    ask_about_notes(browser)
    tool(browser, "regenerate").click()
    browser.until(lambda: len(server.requests) == 2)
    browser.answered()
    assert asked(server) == [SENT]
    browser.reload()
    browser.one(".turn.user .edit").click()
    assert browser.one(".turn.user .files .name").is_displayed()
    field = browser.driver.switch_to.active_element
    field.send_keys(browser.keys.CONTROL, "a")
    field.send_keys("How many?", browser.keys.ENTER)
    browser.until(lambda: len(server.requests) == 3)
    browser.answered()
    assert asked(server) == [SENT.replace("What do I buy?", "How many?")]
    assert len(browser.all(".turn.user .files .name")) == 1


def test_files_are_exported_and_imported(browser: Browser, server: StubServer, tmp_path: Path):
    browser.driver.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
    )
    ask_about_notes(browser)
    act(browser, "markdown")
    assert SENT in exported(browser, tmp_path, "md")
    browser.one("#conversations .json").click()
    whole = exported(browser, tmp_path, "json")
    browser.one("#conversations .delete").click()
    browser.until(lambda: browser.all("#conversations .open") == [])
    browser.one("#toast .close").click()
    bring(browser, tmp_path / "brought", whole)
    browser.one("#conversations .open").click()
    browser.ask("And then?")
    browser.until(lambda: len(server.requests) == 2)
    assert asked(server)[0] == SENT
    browser.answered()
    broken = json.loads(whole)
    for turn in broken["conversations"][0]["turns"].values():
        turn["files"] = [{"name": "x"}]
    browser.one("#toast .close").click()
    assert "(turn 1)" in bring(browser, tmp_path / "broken", json.dumps(broken))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        pytest.param("Größe 温度".encode(), "Größe 温度", id="utf-8"),
        pytest.param("\ufeffa".encode(), "a", id="utf-8 with a mark"),
        pytest.param("Größe".encode("utf-16"), "Größe", id="utf-16"),
        pytest.param("Größe".encode("cp1252"), "Größe", id="windows-1252"),
    ],
)
def test_texts_of_several_encodings(data: bytes, text: str, browser: Browser, server: StubServer):
    give(browser, "drop", ("a.txt", data))
    browser.until(lambda: chips(browser) == ["a.txt"])
    browser.ask("")
    browser.until(lambda: len(server.requests) == 1)
    assert asked(server) == [f"a.txt:\n```txt\n{text}\n```"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "a.bin is not a text file"),
        (b" \n", "a.bin is empty"),
        (b"word " * 4000, "a.bin has about 5,000 tokens, but only about 4,094 of 4,096 are left"),
        (b"x" * 60_000, "a.bin (60.0 KB) is larger than the context"),
    ],
    ids=["binary", "empty", "too long", "far too long"],
)
def test_a_file_that_cannot_go_is_named(
    data: bytes, said: str, browser: Browser, server: StubServer
):
    browser.until(lambda: browser.one("#state").get_attribute("class") == "up")
    browser.one("#prompt").send_keys("A word?")
    give(browser, "drop", ("a.bin", data), ("good.txt", b"good"))
    browser.until(lambda: said in browser.one("#toast").text)
    assert chips(browser) == ["good.txt"]  # the others go


def test_the_meter_counts_files(browser: Browser):
    browser.until(lambda: browser.one("#state").get_attribute("class") == "up")
    give(browser, "drop", ("a.txt", b"word" * 1000))
    browser.until(lambda: "about 1,005 of 4,096" in browser.one("#meter-text").text)
    browser.one("#files button").click()
    assert not browser.one("#meter").is_displayed()
