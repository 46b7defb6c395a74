"""``scripts/nightly`` runs what is overdue, goes on where it stopped, and says so loudly."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from tools.gates import nightly
from tools.gates.nightly import Step

STEPS = (
    Step("one", "echo ran >>one.ran", ("a/**",)),
    Step("two", "echo ran >>two.ran; test ! -e broken || { echo why; exit 3; }", ("b/*.txt",)),
    Step("three", "echo ran >>three.ran", ("pyproject.toml[dependency-groups]",)),
)
PYPROJECT = """[project]
name = "x"

[dependency-groups]
test = [
    "pytest>=8.4",
]

[tool.x]
y = 1
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with the inputs of ``STEPS``, whose steps note that they ran."""
    files = {
        "a/deep/x.py": "x = 1\n",
        "a/y.py": "y = 1\n",
        "b/t.txt": "t\n",
        "c.md": "c\n",
        ".ci/run": "",
        "pyproject.toml": PYPROJECT,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for command in (
        ("init", "--quiet"),
        ("add", "."),
        ("-c", "user.name=x", "-c", "user.email=x@x", "commit", "--quiet", "-m", "x"),
    ):
        subprocess.run(("git", *command), cwd=tmp_path, check=True)
    monkeypatch.setattr(nightly, "ROOT", tmp_path)
    monkeypatch.setattr(nightly, "STEPS", STEPS)
    return tmp_path


def ran(root: Path) -> list[str]:
    """The steps that ran since the last question, each as often as it did."""
    found = []
    for path in sorted(root.glob("*.ran")):
        found += [path.stem] * len(path.read_text().splitlines())
        path.unlink()
    return found


def record(root: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((root / ".ci/nightly.json").read_text())
    return loaded


def age(root: Path, name: str, by: timedelta) -> None:
    """Have the record say that a step passed so long ago."""
    rows = record(root)
    rows[name]["date"] = (datetime.now(timezone.utc) - by).isoformat()
    (root / ".ci/nightly.json").write_text(json.dumps(rows))


def test_the_record_says_what_passed_when_and_with_which_files(root: Path):
    assert nightly.main([]) == 0
    assert ran(root) == ["one", "three", "two"]
    rows = record(root)
    assert list(rows) == ["one", "two", "three"]
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=root, check=True, capture_output=True, text=True
    ).stdout
    for row in rows.values():
        assert head.startswith(row["commit"])
        assert len(row["commit"]) >= 12
        passed = datetime.now(timezone.utc) - datetime.fromisoformat(row["date"])
        assert timedelta(seconds=-1) < passed < timedelta(minutes=5)
        assert 0 <= row["minutes"] < 5
    assert len({row["inputs"] for row in rows.values()}) == 3


def test_an_interrupted_night_goes_on_where_it_stopped(root: Path, monkeypatch: pytest.MonkeyPatch):
    real = subprocess.run

    def interrupt(command: Any, **options: Any) -> Any:
        if "two.ran" in command[-1]:
            raise KeyboardInterrupt
        return real(command, **options)

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", interrupt)
        assert nightly.main([]) == 130
    assert list(record(root)) == ["one"]
    assert ran(root) == ["one"]
    assert nightly.main([]) == 0
    assert ran(root) == ["three", "two"]
    assert nightly.main([]) == 0
    assert ran(root) == []
    age(root, "one", timedelta(days=31))
    assert nightly.main([]) == 0
    assert ran(root) == ["one"]
    assert nightly.main(["--all"]) == 0
    assert ran(root) == ["one", "three", "two"]
    assert nightly.main(["two"]) == 0
    assert ran(root) == ["two"]


@pytest.mark.parametrize(
    ("path", "text", "steps"),
    [
        ("a/deep/x.py", "x = 2\n", ["one"]),
        ("b/t.txt", "u\n", ["two"]),
        ("c.md", "d\n", []),
        ("pyproject.toml", PYPROJECT.replace("8.4", "8.5"), ["three"]),
        ("pyproject.toml", PYPROJECT.replace("y = 1", "y = 2"), []),
    ],
)
def test_a_change_makes_exactly_its_steps_overdue(
    root: Path, path: str, text: str, steps: list[str], capsys: pytest.CaptureFixture[str]
):
    assert nightly.main([]) == 0
    before = (root / ".ci/nightly.json").read_bytes()
    ran(root)
    assert nightly.main(["--overdue"]) == 0
    assert "nightly: nothing is overdue\n" in capsys.readouterr().out
    (root / path).write_text(text)
    assert nightly.main(["--overdue"]) == 0
    assert ran(root) == []
    assert (root / ".ci/nightly.json").read_bytes() == before
    loud = [line for line in capsys.readouterr().out.splitlines() if line.startswith("!!!!!!")]
    assert len(loud) == len(steps) + bool(steps)
    for name, line in zip(steps, loud, strict=False):
        assert f"{name} is overdue: its files changed since it passed 0.0 hours ago" in line
    # A file that is gone or has another name is a change, too.
    (root / "a/y.py").rename(root / "a/z.py")
    subprocess.run(["git", "add", "-A"], cwd=root, check=True)
    assert nightly.main([]) == 0
    assert ran(root) == sorted({*steps, "one"})
    assert nightly.main([]) == 0
    assert ran(root) == []


def test_another_command_of_a_step_is_a_change(root: Path, monkeypatch: pytest.MonkeyPatch):
    assert nightly.main([]) == 0
    ran(root)
    other = replace(STEPS[0], command="echo ran >>other.ran")
    monkeypatch.setattr(nightly, "STEPS", (other, *STEPS[1:]))
    assert nightly.main([]) == 0
    assert ran(root) == ["other"]


def test_a_failure_fails_shows_its_end_and_is_no_pass(
    root: Path, capsys: pytest.CaptureFixture[str]
):
    assert nightly.main([]) == 0
    ran(root)
    (root / "broken").touch()
    assert nightly.main(["--all"]) == 1
    assert ran(root) == ["one", "three", "two"]  # the others run
    out = capsys.readouterr().out
    assert "why\nnightly: two FAILED" in out
    assert "with exit code 3" in out
    assert "two is overdue: never passed, or failed when it last ran" in out
    assert list(record(root)) == ["one", "three"]
    assert (root / ".nightly/two.log").read_text() == "why\n"
    assert nightly.main([]) == 1
    assert ran(root) == ["two"]


def test_a_step_that_passed_can_report(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    reports = Step("reports", "echo fine; echo 'report: two are stale'", ("c.md",))
    monkeypatch.setattr(nightly, "STEPS", (reports,))
    assert nightly.main([]) == 0
    assert "nightly: reports: two are stale\nnightly: reports passed" in capsys.readouterr().out


def test_inputs_that_change_under_a_step_are_no_pass(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    edits = Step("edits", "echo more >>b/t.txt", ("b/*.txt",))
    monkeypatch.setattr(nightly, "STEPS", (edits,))
    assert nightly.main([]) == 1
    assert "its inputs changed while it ran" in capsys.readouterr().out
    assert record(root) == {}


def test_what_passed_a_month_ago_is_overdue(root: Path, capsys: pytest.CaptureFixture[str]):
    assert nightly.main(["--list"]) == 0
    out = capsys.readouterr().out
    assert "one: never passed" in out
    assert "!!!!!! nightly: one is overdue: never passed" in out
    assert nightly.main([]) == 0
    age(root, "two", timedelta(days=29, hours=23))
    capsys.readouterr()
    assert nightly.main(["--overdue"]) == 0
    assert "!" not in capsys.readouterr().out
    age(root, "two", timedelta(days=30, hours=1))
    assert nightly.main(["--overdue"]) == 0
    assert "!!!!!! nightly: two is overdue: it passed 30 days ago" in capsys.readouterr().out
    assert ran(root) == ["one", "three", "two"]  # of the first run


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        ("gone/**", "names gone/**, which no tracked file matches"),
        ("a/*.txt", "names a/*.txt, which no tracked file matches"),
        ("pyproject.toml[gone]", "pyproject.toml has no such table"),
    ],
)
def test_a_pattern_without_a_file_is_an_error(
    root: Path,
    pattern: str,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    wrong = Step("wrong", "true", ("c.md", pattern))
    monkeypatch.setattr(nightly, "STEPS", (*STEPS, wrong))
    (root / "a/untracked.txt").touch()
    assert nightly.main(["--overdue"]) == 78
    assert ran(root) == []
    assert what in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["four"], ["one", "--all"], ["--all", "--overdue"]])
def test_wrong_arguments(root: Path, arguments: list[str]):
    with pytest.raises(SystemExit) as caught:
        nightly.main(arguments)
    assert caught.value.code == 2
    assert ran(root) == []


def test_the_real_steps_name_files_that_are_there():
    for step in nightly.STEPS:
        assert len(nightly.hash_inputs(step)) == 64
