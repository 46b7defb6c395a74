"""The manual has a budget of words, and its counter counts what a reader reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.gates import words


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Runs a model, quickly.", 4),
        ("| Verb | What |\n|---|---|\n| `run` | answers |", 4),
        ("```sh\nedge-llm run bundles/mine\n```", 4),  # the language, and three words of code
        ("See [the page](docs/a-long-name.md#with-an-anchor).", 3),
        ('<img alt="A page" src="a.png">\n\n# A heading', 2),
        ("- one → two -- three", 3),
        ("把模型转换成包 with ONNX", 2 + 4),
        ("见[量化](docs/quantization.md)。", 2),
    ],
)
def test_words_are_those_that_a_reader_reads(text: str, number: int):
    assert words.words_of(text) == number


def test_pages_of_the_manual_are_counted_and_no_others(tmp_path: Path):
    for name in ("README.md", "README.zh-CN.md", "LICENSE.md", "docs/a.md", "docs/b/c.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("one two three\n")
    counted = words.count(tmp_path)
    assert set(counted) == {"README.md", "README.zh-CN.md", "docs/a.md", "docs/b/c.md"}
    assert words.total(counted) == 9  # the Chinese page apart


@pytest.mark.parametrize(
    ("pages", "fault"),
    [
        ({"README.md": 1_401}, "README.md has 1,401 words, 1,400 at most"),
        ({"README.md": 5, "docs/a.md": 44_996}, "the manual has 45,001 words"),
        (
            {"docs/a.md": 5, "docs/a.zh-CN.md": 6},
            "docs/a.zh-CN.md has 6 words, and docs/a.md has 5",
        ),
        ({"docs/a.zh-CN.md": 6}, "docs/a.zh-CN.md has no English twin docs/a.md"),
    ],
)
def test_a_page_that_is_too_long_is_named(pages: dict[str, int], fault: str):
    [found] = words.faults_of(pages)
    assert fault in found


def test_a_manual_within_its_bounds_has_no_fault():
    pages = {"README.md": 1_400, "README.zh-CN.md": 1_400, "docs/a.md": 43_600}
    assert list(words.faults_of(pages)) == []


def test_the_command_informs_and_fails_nowhere_but_without_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "README.md").write_text("word " * 1_401)
    monkeypatch.setattr("sys.argv", ["words", str(tmp_path)])
    words.main()
    said = capsys.readouterr().out
    assert "1,401  README.md" in said
    assert "words: README.md has 1,401 words, 1,400 at most" in said
    monkeypatch.setattr("sys.argv", ["words", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="name the root of a checkout"):
        words.main()
