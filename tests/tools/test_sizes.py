"""Sizes are counted as code, and only a package that grows fast fails."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tools.gates import sizes
from tools.gates.sizes import code_lines

SOURCE = '''"""A module.

Of three lines.
"""

# A comment.
import os

LIMIT = 3  # counted once
"""What stands below a name is a docstring, too."""
TEXT = """two
lines"""


def f(a: int) -> str:
    """Do it."""
    call(
        a,

        # no code
    )
    return "text"
'''


def test_code_is_neither_blank_nor_comment_nor_docstring():
    # import, LIMIT, TEXT (2), def, call( a, ), return
    assert code_lines(SOURCE) == 9
    assert code_lines("") == 0


def test_a_closure_has_imports_of_functions_and_none_for_types(tmp_path: Path):
    files = {
        "edge/__init__.py": "",
        "edge/a.py": "if TYPE_CHECKING:\n    from .unused import X\nfrom . import b\n",
        "edge/b.py": "def f():\n    from edge.room.c import D\n    import numpy\n",
        "edge/room/__init__.py": "from .d import E\n",
        "edge/room/c.py": "import edge.a\n",
        "edge/room/d.py": "",
        "edge/unused.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = sizes.closure("edge.a", tmp_path)
    assert found == ["edge", "edge.a", "edge.b", "edge.room", "edge.room.c", "edge.room.d"]


@pytest.mark.parametrize(
    ("before", "now", "fails"),
    [(10_000, 10_500, False), (10_000, 10_501, True), (1_000, 1_200, False), (1_000, 1_201, True),
     (10_000, 0, False), (0, 9_000, False)],
)  # fmt: skip
def test_only_fast_growth_fails(before: int, now: int, fails: bool):
    landed = dict.fromkeys(sizes.PACKAGES, 7) | {"export": before}
    found = landed | {"export": now}
    assert [fault.split()[0] for fault in sizes.faults(found, landed)] == ["export"] * fails


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone whose `origin/main` has a package of 100 lines."""

    def git(folder: Path, *arguments: str) -> None:
        command = ["git", "-c", "user.name=x", "-c", "user.email=x@x", *arguments]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)

    origin, clone = tmp_path / "origin", tmp_path / "clone"
    origin.mkdir()
    git(origin, "init", "-b", "main")
    (origin / "edge").mkdir()
    (origin / "edge/a.py").write_text("x = 1\n" * 100)
    git(origin, "add", ".")
    git(origin, "commit", "-m", "one")
    git(tmp_path, "clone", str(origin), str(clone))
    monkeypatch.setattr("sys.argv", ["sizes"])
    monkeypatch.setattr(sizes, "count", lambda root=clone, count=sizes.count: count(root))
    monkeypatch.setattr(
        sizes, "count_commit", lambda commit, of=sizes.count_commit: of(commit, clone)
    )
    return clone


def test_growth_is_counted_from_the_last_landing(clone: Path, capsys: pytest.CaptureFixture[str]):
    (clone / "edge/b.py").write_text("y = 1\n" * 200)
    assert sizes.main() == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()][:2] == [
        ["code", "lines,", "and", "the", "change", "since", "origin/main"],
        ["edge", "300", "+200"],
    ]
    (clone / "edge/b.py").write_text("y = 1\n" * 201)
    assert sizes.main() == 1
    assert "edge has 301 code lines and had 100" in capsys.readouterr().err
    # Without a landing to compare with there is nothing to fail.
    subprocess.run(["git", "remote", "remove", "origin"], cwd=clone, check=True)
    assert sizes.main() == 0
    assert "edge                              301    +201" in capsys.readouterr().out


def test_deleted_lines_ask_for_nothing(clone: Path):
    (clone / "edge/a.py").write_text("x = 1\n" * 50)
    assert sizes.main() == 0


@pytest.mark.slow
def test_a_chat_loads_nothing_of_what_it_does_not_use():
    rooms = ("edge.vision.", "edge.adapters.", "edge.votes.", "edge.runtime.stop_when_sure.",
             "edge.runtime.scheduler.picturing.", "edge_", "engines.", "export.")  # fmt: skip
    for backend, names in sizes.measure_loaded().items():
        assert "edge.runtime.llm" in names
        assert [name for name in names if f"{name}.".startswith(rooms)] == [], backend
