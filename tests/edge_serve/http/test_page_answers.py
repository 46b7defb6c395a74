"""How the page shows answers, while they come and when they are there."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from edge_serve.http.page import page_files
from tests.edge_serve.http.browser import Browser
from tests.edge_serve.http.page_stub import StubServer

pytestmark = pytest.mark.live

PAGE = Path(__file__).parents[3] / "edge_serve/http/page"

TEXT = """# Roots

The roots of \\(ax^2 + bx + c = 0\\), where $a \\neq 0$; it costs $5 or $10.
**Bold**, *soft*, ~~old~~, `f(x)`.

\\[
x = \\frac{-b \\pm \\sqrt{b^2 - 4ac}}{2a}
\\]

1. First
   - inner \\(y\\)
2. Second

> Quoted [link](https://example.org/a).

| Name | ms |
|:--|--:|
| formula | 12 |

```python
def f(x: int) -> int:
    return x * 2  # doubled
```

So \\boxed{x = \\frac{1}{2}}, and $$\\sum_k k$$

\\begin{align}
a &= b
\\end{align}

~~~
no language
~~~

- [x] done
- [ ] open
"""

HOSTILE = """[a](javascript:alert(1)) [b](data:text/html,x) [c](/metrics) [d](vbscript:x)
<script>document.title='owned'</script><img src=x onerror="document.title='owned'">
![track](https://evil.example/pixel.png) <https://ok.example>

<details open ontoggle="document.title='owned'">

\\(\\href{javascript:alert(1)}{x}\\) \\(\\includegraphics{https://evil.example/a.png}\\)

```"><script>document.title='owned'</script>
</code></pre><script>document.title='owned'</script>
```

\\(\\frac{\\) $\\def\\a{\\a\\a}\\a$
"""

TALL = "\\[\\left(\\frac{\\frac{a}{b}}{\\frac{c}{d}}\\right)\\]"

VIEW = """
const [folder, done] = [arguments[0], arguments[arguments.length - 1]];
const given = arguments[1];
import(`${folder}/script/answer/markdown_view.js`).then(({ MarkdownView }) => {
  const fresh = () => {
    const root = document.createElement("div");
    document.getElementById("log").append(root);
    return [root, new MarkdownView(root)];
  };
  const run = async () => { %s };
  return run();
}).then(done, (error) => done(String(error.stack)));
"""


def in_view(browser: Browser, script: str, given: Any) -> Any:
    """Run a script that has ``fresh`` (makes a view) and ``given``; returns what it returns."""
    folder = next(path for path in page_files() if path.endswith("/script/app.js"))
    folder = folder.removesuffix("/script/app.js")
    return browser.driver.execute_async_script(VIEW % script, folder, given)


# --------------------------------------------------------------------------- without a browser


def test_the_libraries_are_what_was_published():
    packages = json.loads((PAGE / "vendor/packages.json").read_text())
    listed = {name: file["sha256"] for one in packages for name, file in one["files"].items()}
    there = {
        path.relative_to(PAGE / "vendor").as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (PAGE / "vendor").rglob("*")
        if path.is_file() and path.name != "packages.json"
    }
    assert there == listed
    notices = (PAGE.parents[2] / "THIRD_PARTY_NOTICES.md").read_text()
    for one in packages:
        assert any("LICENSE" in name for name in one["files"]), one["name"]
        assert re.search(rf"\| {re.escape(one['name'])} .*\| {one['version']} \|", notices)


def test_every_grammar_has_a_name():
    source = (PAGE / "script/answer/highlight.js").read_text()
    table = source[source.index("NAMES = {") : source.index("};")]
    there = {path.name.split(".")[0] for path in (PAGE / "vendor/highlight/languages").iterdir()}
    assert set(re.findall(r"(\w+): \"", table)) == there


# --------------------------------------------------------------------------- what is shown


@pytest.fixture
def shown(browser: Browser, server: StubServer) -> Browser:
    server.answers["text"] = TEXT
    browser.ask("text")
    browser.answered()
    return browser


def test_markdown_is_shown_as_people_read_it(shown: Browser):
    def texts(selector: str) -> list[str]:
        return [one.text for one in shown.all(f".assistant .body {selector}")]

    assert texts("[data-level='1']") == ["Roots"]
    assert texts("strong") == ["Bold"]
    assert texts("em") == ["soft"]
    assert texts("s") == ["old"]
    assert texts("p code") == ["f(x)"]
    assert texts("ol > li > ul > li")[0].startswith("inner")
    assert texts("blockquote a") == ["link"]
    assert texts("th") == ["Name", "ms"]
    assert texts("td[data-align='right']") == ["12"]
    assert texts("> ul > li") == ["☑ done", "☐ open"]
    assert "it costs $5 or $10." in shown.one(".assistant .body p").text
    (link,) = shown.all(".assistant .body a")
    assert link.get_attribute("rel") == "noopener noreferrer nofollow"
    assert shown.complaints() == []


def test_formulas_are_mathml(shown: Browser):
    script = """
    return [...document.querySelectorAll(".assistant .body math")].map((one) => {
      const structured = one.querySelector("mfrac, msup, munder") !== null;
      return [one.namespaceURI, one.getAttribute("display"), structured];
    });"""
    found = shown.driver.execute_script(script)
    assert {space for space, _, _ in found} == {"http://www.w3.org/1998/Math/MathML"}
    assert len(found) == 7
    assert sum(display == "block" for _, display, _ in found) == 3
    assert sum(structured for _, _, structured in found) >= 4


def test_equations_are_numbered_through_an_answer(browser: Browser, server: StubServer):
    rows = "\\begin{align}\na &= b \\\\\nc &= d\n\\end{align}\n\n"
    server.answers["rows"] = rows + "So:\n\n" + rows
    for number in (1, 2):
        browser.ask("rows")
        browser.until(lambda number=number: len(browser.all(".assistant .copy")) == number)
        browser.answered()
    # What a reader hears: the numbers come from a counter, whose value no script is told.
    nodes = browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    texts = [one["name"]["value"] for one in nodes if one["role"]["value"] == "StaticText"]
    numbers = re.findall(r"\((\d)\)", "".join(texts))
    assert numbers == ["1", "2", "3", "4"] * 2  # each answer begins anew


def test_the_font_of_formulas_is_the_pages_own(shown: Browser):
    loaded = "return [...document.fonts].filter((font) => font.status === 'loaded').length"
    shown.until(lambda: shown.driver.execute_script(loaded) == 1)
    assert shown.complaints() == []
    # Only a font with the table MATH has brackets of every height; this machine has no other.
    script = """return given.map((tex) => {
      const [root, view] = fresh();
      view.update(tex, true);
      return root.querySelector("mo").getBoundingClientRect().height;
    });"""
    low, high = in_view(shown, script, ["\\(\\left(a\\right)\\)", TALL])
    assert high > 2 * low


@pytest.mark.parametrize(
    ("line", "end"),
    [
        ("\\[\n", ""),
        ("$$\n", "$"),
        ("\\begin{align}\n", ""),
        ("\\[\n", "\\] and so on\n"),
        ("- \\[\n", "\\]\n"),
        ("> \\[\n", "\n\\]\n"),
        ("a\n\\[\n", "\\[ x \\] y\n"),
    ],
)
def test_unclosed_formulas_take_linear_time(line: str, end: str, browser: Browser):
    """Texts that are cut out of the answer are counted, not the time."""
    script = """
    const { slice } = String.prototype;
    const count = (lines) => {
      const [root, view] = fresh();
      let calls = 0;
      String.prototype.slice = function (...given) { calls += 1; return slice.apply(this, given); };
      try {
        view.update(given.line.repeat(lines) + given.end, true);
      } finally {
        String.prototype.slice = slice;
      }
      root.remove();
      return calls;
    };
    return [count(100), count(400)];
    """
    few, many = in_view(browser, script, {"line": line, "end": end})
    assert few > 100  # the count counts
    assert many < 5 * few


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\\[\nx\n\\]", ["x"]),
        ("\\[ x \\]\n\\[ y \\]", ["x", "y"]),
        ("\\[ x \\] so\n\n\\[\ny\n\\]", ["x", "y"]),
        ("$$x$$\n$$\ny\n$$", ["x", "y"]),
        ("- \\[\n  x\n  \\]\n- \\[ y \\]", ["x", "y"]),
        ("> \\[\n> x\n> \\]\n\nand \\(y\\)", ["x", "y"]),
        ("- \\[\n\nno list\n\n\\[ x \\]", ["x"]),
        ("\\begin{cases}\nx\n\\end{cases}", ["{x"]),
    ],
)
def test_formulas_end_where_they_are_closed(text: str, shown: list[str], browser: Browser):
    script = """
    const [root, view] = fresh();
    view.update(given, true);
    const found = [...root.querySelectorAll("math")].map((one) => one.textContent);
    root.remove();
    return found;
    """
    found = in_view(browser, script, text)
    assert [formula.strip() for formula in found] == shown


def test_code_has_its_language_its_colours_and_its_button(shown: Browser):
    blocks = shown.all(".assistant figure.code")
    assert [one.find_element(shown.by.CSS_SELECTOR, "figcaption span").text for one in blocks] == [
        "python",
        "text",
    ]
    shown.until(lambda: shown.all(".assistant figure.code .hl-keyword"))
    assert blocks[0].find_element(shown.by.CSS_SELECTOR, ".hl-comment").text == "# doubled"
    code = blocks[0].find_element(shown.by.CSS_SELECTOR, "code")
    assert code.text == "def f(x: int) -> int:\n    return x * 2  # doubled"


@pytest.mark.parametrize("host", ["127.0.0.1", "jetson.test"])
def test_code_is_copied_also_over_plain_http(host: str, browser: Browser, server: StubServer):
    server.answers["text"] = TEXT
    browser.driver.get(server.url.replace("127.0.0.1", host))
    trusted = browser.driver.execute_script("return isSecureContext")
    assert trusted == (host == "127.0.0.1")
    browser.ask("text")
    browser.answered()
    button = browser.one("figure.code figcaption button")
    button.click()
    browser.until(lambda: button.text == "Copied")
    prompt = browser.one("#prompt")
    prompt.send_keys(browser.keys.CONTROL, "v")
    browser.until(lambda: "doubled" in prompt.get_attribute("value"))
    assert prompt.get_attribute("value").splitlines()[0] == "def f(x: int) -> int:"
    browser.until(lambda: button.text == "Copy")


def test_hostile_answers_stay_text(browser: Browser, server: StubServer):
    server.answers["hostile"] = HOSTILE
    browser.ask("hostile")
    browser.answered()
    hrefs = [one.get_attribute("href") for one in browser.all("#log a")]
    assert hrefs == ["https://evil.example/pixel.png", "https://ok.example/"]
    assert browser.all("#log img, #log script, #log details[ontoggle], #log iframe") == []
    assert browser.all("#log math [href], #log mglyph") == []
    assert browser.driver.title == "edge-llm"
    script = "return performance.getEntriesByType('resource').map(e => e.name)"
    asked = browser.driver.execute_script(script)
    assert [url for url in asked if "evil" in url] == []
    assert browser.complaints() == []  # the policy had nothing to stop


# --------------------------------------------------------------------------- while it comes


def test_in_pieces_it_becomes_the_same_as_at_once(browser: Browser):
    script = """
    const [whole, view] = fresh();
    view.update(given.text, true);
    const wrong = [];
    for (const size of given.sizes) {
      const [root, grown] = fresh();
      for (let at = size; at < given.text.length; at += size) {
        grown.update(given.text.slice(0, at), false);
      }
      grown.update(given.text, true);
      // For grammars that are yet to load.
      await new Promise((resolve) => setTimeout(resolve, 50));
      if (root.innerHTML !== whole.innerHTML) wrong.push([size, root.innerHTML]);
      root.remove();
    }
    whole.remove();
    return wrong;
    """
    in_view(browser, script, {"text": TEXT, "sizes": [1000]})  # loads the grammar
    for text in (
        TEXT,
        HOSTILE,
        TEXT.replace("\n", "\r\n"),
        "```py\nx = 1\n",
        "a\n\n" * 3 + "$$\nx",
    ):
        assert in_view(browser, script, {"text": text, "sizes": [1, 2, 3, 7, 50]}) == []


def test_what_is_complete_is_never_touched_and_a_selection_survives(browser: Browser):
    script = """
    const [root, view] = fresh();
    view.update("# Head\\n\\nThe first words", false);
    const head = root.firstChild, text = root.querySelector("p").firstChild;
    getSelection().setBaseAndExtent(text, 4, text, 9);
    const changes = [];
    const watch = new MutationObserver((list) => changes.push(...list.map((one) => one.target)));
    watch.observe(head, { subtree: true, childList: true, characterData: true, attributes: true });
    view.update("# Head\\n\\nThe first words of **some", false);
    view.update("# Head\\n\\nThe first words of **some** text.\\n\\nAnd more.\\n\\n- list", false);
    await null;
    const result = [root.firstChild === head, changes.length, String(getSelection())];
    root.remove();
    return result;
    """
    assert in_view(browser, script, None) == [True, 0, "first"]


def test_the_caret_is_always_at_the_end(browser: Browser):
    script = """
    const [root, view] = fresh();
    const wrong = [];
    for (let at = 1; at < given.length; at += 1) {
      view.update(given.slice(0, at), false);
      const after = document.createRange();
      after.setStartAfter(root.querySelector(".caret"));
      after.setEnd(root, root.childNodes.length);
      if (String(after).trim() || root.querySelectorAll(".caret").length !== 1) wrong.push(at);
      const code = root.querySelector("figure:last-child code");
      const isOpen = code && root.lastChild.contains(code);
      if (isOpen && !code.querySelector(".caret")) wrong.push(at);
    }
    view.update(given, true);
    if (root.querySelector(".caret")) wrong.push("end");
    root.remove();
    return wrong;
    """
    assert in_view(browser, script, TEXT[:600]) == []


def test_marks_that_are_still_open_are_not_shown(browser: Browser):
    script = """
    const [root, view] = fresh();
    const seen = given.map((text) => {
      view.reset();
      view.update(text, false);
      return root.textContent;
    });
    root.remove();
    return seen;
    """
    texts = ["It is **very", "Call `f(x", "So \\[\nx^2", "Text\n```py\nx\n``"]
    seen = in_view(browser, script, texts)
    assert seen[:2] == ["It is very", "Call f(x"]
    assert "x^2" in seen[2]
    assert "\\[" not in seen[2]
    assert "`" not in seen[3]


def test_what_is_shown_stays_while_the_next_answer_comes(shown: Browser):
    """Folds, selections and scrolled code are those of elements, which must not be made anew."""
    shown.driver.execute_script("document.querySelector('figure.code').mark = 'same'")
    shown.ask("hello")
    shown.until(lambda: len(shown.all(".turn.assistant")) == 2)
    shown.answered()
    script = "return document.querySelector('figure.code').mark"
    assert shown.driver.execute_script(script) == "same"


@pytest.mark.parametrize("way", ["at once", "in pieces"])
def test_a_million_lines_of_code(way: str, browser: Browser, server: StubServer):
    script = """
    const [root, view] = fresh();
    const text = "Look:\\n\\n```python\\n" + "x = 1  # line\\n".repeat(1e6) + "```\\n\\nEnd.";
    const pieces = given === "in pieces" ? 40 : 0;
    for (let at = 1; at < pieces; at += 1) {
      view.update(text.slice(0, text.length * at / pieces), false);
    }
    view.update(text, true);
    const code = root.querySelector("figure code");
    const result = [code.textContent.length, code.children.length, root.lastChild.textContent];
    code.parentNode.scrollTop = 1e9;
    root.remove();
    return result;
    """
    length, chunks, end = in_view(browser, script, way)
    assert (length, end) == (14 * 10**6, "End.")
    assert chunks == 5000
    browser.ask("hello")  # the page goes on
    assert "Done." in browser.answered().text


def test_long_text_without_a_break_is_shown(browser: Browser):
    script = """
    const [root, view] = fresh();
    view.update(given, false);
    view.update(given + given, true);
    const result = root.textContent;
    root.remove();
    return result;
    """
    text = "word *and* `code` $ " * 10_000
    assert in_view(browser, script, text) == text + text
