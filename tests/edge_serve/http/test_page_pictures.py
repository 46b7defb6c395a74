"""Pictures that go with a message."""

from __future__ import annotations

import base64
import json
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from edge import SamplingParams
from tests.edge_serve.http.browser import Browser
from tests.edge_serve.http.page_stub import StubServer
from tests.edge_serve.http.test_page_access import violations
from tests.edge_serve.http.test_page_conversations import act, bring, exported, stored_values, tool
from tests.edge_serve.http.test_page_files import GIVE, chips
from tests.edge_serve.scripted import RealEngine, running

pytestmark = pytest.mark.live


def png(width: int, height: int, *, noise: bool = False) -> bytes:
    """A picture, red or of noise, which no format makes small."""
    chance = random.Random(width * height)
    rows = [
        chance.randbytes(3 * width) if noise else b"\xff\x20\x10" * width for _ in range(height)
    ]
    head = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows), 1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


RED = png(40, 30)
# Files of a type, which those of the tests of texts have not.
TYPED = GIVE.replace("[name, bytes] of", "[name, bytes, type] of").replace(
    "], name)", "], name, { type })"
)
assert TYPED.count("type") > GIVE.count("type") + 1


@pytest.fixture
def sees(browser: Browser, server: StubServer) -> Browser:
    """The page, whose first model takes pictures."""
    server.sees = {"tiny"}
    browser.reload()
    browser.until(lambda: browser.one("#state").get_attribute("class") == "up")
    return browser


def give(browser: Browser, how: str, *files: tuple[str, bytes, str]) -> None:
    given = [(name, base64.b64encode(data).decode(), kind) for name, data, kind in files]
    browser.driver.execute_script(TYPED, how, given)


def parts(server: StubServer, message: int = -1) -> Any:
    return server.requests[-1]["messages"][message]["content"]


def data_of(part: dict[str, Any]) -> tuple[str, bytes]:
    """Type and bytes of a picture that was sent."""
    assert part["type"] == "image_url"
    kind, _, data = part["image_url"]["url"].removeprefix("data:").partition(";base64,")
    return kind, base64.b64decode(data, validate=True)


def is_shown(browser: Browser, selector: str) -> bool:
    """Whether the browser could draw a picture, which its policy may forbid."""
    script = "return [...document.querySelectorAll(arguments[0])].map((one) => one.naturalWidth);"
    widths = browser.driver.execute_script(script, selector)
    return bool(widths) and all(width > 0 for width in widths)


def attach_red(browser: Browser, how: str = "drop") -> None:
    give(browser, how, ("red.png", RED, "image/png"))
    browser.until(lambda: chips(browser) == ["red.png"])
    browser.until(lambda: is_shown(browser, "#files img"))


def ask_about_red(browser: Browser, text: str = "Which colour?") -> None:
    attach_red(browser)
    browser.ask(text)
    browser.answered()


@pytest.mark.parametrize("how", ["drop", "paste", "button"])
def test_a_picture_goes_with_the_message(
    how: str, sees: Browser, server: StubServer, tmp_path: Path
):
    if how == "button":
        (tmp_path / "red.png").write_bytes(RED)
        sees.driver.execute_script("document.getElementById('attach-file').hidden = false")
        sees.one("#attach-file").send_keys(str(tmp_path / "red.png"))
        sees.until(lambda: chips(sees) == ["red.png"])
    else:
        attach_red(sees, how)
    sees.ask("Which colour?")
    sees.answered()
    picture, text = parts(server)
    assert data_of(picture) == ("image/png", RED)
    assert text == {"type": "text", "text": "Which colour?"}
    assert chips(sees) == []
    sees.until(lambda: is_shown(sees, ".turn.user .files summary img"))
    sees.one(".turn.user .files summary").click()
    whole = sees.one(".turn.user .files details > img")
    assert whole.get_attribute("alt") == "red.png"
    assert whole.size["width"] >= 40
    sees.picture(f"pictures-{how}")
    sees.ask("And then?")
    sees.until(lambda: len(server.requests) == 2)
    assert data_of(parts(server, 0)[0]) == ("image/png", RED)
    assert parts(server) == "And then?"
    assert sees.complaints() == []


def test_several_pictures_a_text_file_and_no_word(sees: Browser, server: StubServer):
    give(
        sees,
        "drop",
        ("a.png", RED, "image/png"),
        ("b.txt", b"b", "text/plain"),
        ("c.png", png(10, 10), "image/png"),
        ("d.svg", b"<svg/>", "image/svg+xml"),
    )
    sees.until(lambda: chips(sees) == ["a.png", "b.txt", "c.png", "d.svg"])
    sees.all("#files button")[2].click()
    assert chips(sees) == ["a.png", "b.txt", "d.svg"]
    sees.ask("")
    sees.until(lambda: len(server.requests) == 1)
    picture, text = parts(server)
    assert data_of(picture) == ("image/png", RED)
    assert text["text"] == "b.txt:\n```txt\nb\n```\n\nd.svg:\n```svg\n<svg/>\n```"
    sees.answered()
    sees.open_list()
    assert sees.one("#conversations .title").text == "a.png"


@pytest.mark.parametrize("size", [(3000, 500), (900, 900)], ids=["wide", "many bytes"])
def test_a_large_picture_is_made_smaller(size: tuple[int, int], sees: Browser, server: StubServer):
    """A request has room for ten, and the browser keeps them all."""
    given = png(*size, noise=True)
    assert len(given) > 2_000_000
    give(sees, "drop", ("large.png", given, "image/png"))
    sees.until(lambda: chips(sees) == ["large.png"])
    sees.ask("What?")
    sees.answered()
    kind, data = data_of(parts(server)[0])
    assert kind == "image/jpeg"
    assert len(data) <= 800_000
    width, height = sees.driver.execute_async_script(
        "const [uri, done] = arguments; const image = new Image();"
        "image.onload = () => done([image.naturalWidth, image.naturalHeight]); image.src = uri;",
        parts(server)[0]["image_url"]["url"],
    )
    assert max(width, height) <= 2048
    assert width / height == pytest.approx(size[0] / size[1], rel=0.01)


def test_pictures_stay_through_editing_regenerating_and_reloading(
    sees: Browser, server: StubServer
):
    ask_about_red(sees)
    first = parts(server)
    tool(sees, "regenerate").click()
    sees.until(lambda: len(server.requests) == 2)
    sees.answered()
    assert parts(server) == first
    sees.reload()
    sees.until(lambda: is_shown(sees, ".turn.user .files summary img"))
    sees.one(".turn.user .edit").click()
    field = sees.driver.switch_to.active_element
    field.send_keys(sees.keys.CONTROL, "a")
    field.send_keys("How many?", sees.keys.ENTER)
    sees.until(lambda: len(server.requests) == 3)
    sees.answered()
    assert parts(server) == [first[0], {"type": "text", "text": "How many?"}]


def test_pictures_are_exported_and_imported(sees: Browser, server: StubServer, tmp_path: Path):
    sees.driver.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
    )
    ask_about_red(sees)
    act(sees, "markdown")
    assert f"![red.png](data:image/png;base64,{base64.b64encode(RED).decode()})" in exported(
        sees, tmp_path, "md"
    )
    sees.one("#conversations .json").click()
    whole = exported(sees, tmp_path, "json")
    sees.one("#conversations .delete").click()
    sees.until(lambda: sees.all("#conversations .open") == [])
    sees.one("#toast .close").click()
    bring(sees, tmp_path / "brought", whole)
    sees.one("#conversations .open").click()
    sees.until(lambda: is_shown(sees, ".turn.user .files summary img"))
    sees.ask("And then?")
    sees.until(lambda: len(server.requests) == 2)
    assert data_of(parts(server, 0)[0]) == ("image/png", RED)
    sees.answered()
    for wrong in ("https://example.org/a.png", "data:image/svg+xml;base64,AAAA", 5):
        broken = json.loads(whole)
        for turn in broken["conversations"][0]["turns"].values():
            turn["files"] = [{"name": "x", "picture": wrong}]
        sees.one("#toast .close").click()
        assert "(turn 1)" in bring(sees, tmp_path / "broken", json.dumps(broken))


def test_a_model_that_reads_text_only_is_named_before_anything_is_sent(
    sees: Browser, server: StubServer
):
    sees.one("#model").send_keys("<b>other</b>")
    give(sees, "drop", ("red.png", RED, "image/png"))
    sees.until(lambda: "Pictures are read by: tiny." in sees.one("#toast").text)
    assert chips(sees) == []
    server.sees = set()
    sees.reload()
    sees.until(lambda: sees.one("#state").get_attribute("class") == "up")
    give(sees, "drop", ("red.png", RED, "image/png"))
    sees.until(lambda: "no model here reads pictures" in sees.one("#toast").text)
    assert server.requests == []


def test_what_is_no_picture_and_one_too_many_are_named(sees: Browser):
    give(sees, "drop", ("bad.png", RED[:40], "image/png"))
    sees.until(lambda: "bad.png cannot be read" in sees.one("#toast").text)
    many = [(f"{number}.png", RED, "image/png") for number in range(11)]
    give(sees, "drop", *many)
    sees.until(lambda: "10.png is one picture too many" in sees.one("#toast").text)
    assert len(chips(sees)) == 10


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_pictures_are_accessible(theme: str, sees: Browser):
    sees.open_panel()
    sees.one("#theme").send_keys("Light" if theme == "light" else "Dark")
    sees.one("#panel-toggle").click()
    ask_about_red(sees)
    sees.one(".turn.user .files summary").click()
    attach_red(sees)
    assert violations(sees) == []
    assert sees.one("#files button").get_attribute("aria-label") == "Remove red.png"
    sees.picture(f"pictures-{theme}")


def test_the_page_shows_what_a_real_model_says(driver: Any, sees_bundle: Path):
    pytest.importorskip("PIL")
    with running(sees_bundle, RealEngine()) as live:
        driver.set_window_size(1280, 800)
        driver.get(live.url)
        page = Browser(driver)
        page.until(lambda: page.one("#state").get_attribute("class") == "up")
        page.complaints()
        page.open_panel()
        for name, value in (("temperature", "0"), ("max_tokens", "12")):
            page.one(f"[name={name}]").send_keys(value)
        ask_about_red(page)
        (conversation,) = stored_values(page)
        said = [turn["content"] for turn in conversation["turns"].values()]
        parts = [{"type": "image", "image": RED}, {"type": "text", "text": "Which colour?"}]
        params = SamplingParams(temperature=0, max_tokens=12)
        answer = live.engine.llm.generate([{"role": "user", "content": parts}], params)
        assert said == ["Which colour?", answer.text]
        assert page.complaints() == []
        driver.get("about:blank")
