"""The command line in this process."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from edge.cli import main
from tests.conftest import Bundles


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def edge_llm(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs the command in this process, on click's stand-ins for the three streams."""

    def run(*arguments: object, stdin: str | bytes = "") -> Result:
        monkeypatch.setattr(sys, "argv", ["edge-llm", *map(str, arguments)])
        with CliRunner().isolation(input=stdin) as (out, err, _):
            with pytest.raises(SystemExit) as leaving:
                main()
            assert isinstance(leaving.value.code, int)
            sys.stdout.flush()
            sys.stderr.flush()
            return Result(leaving.value.code, out.getvalue().decode(), err.getvalue().decode())

    return run


def error_line(result: Result, code: int) -> str:
    """The one line on stderr of a run that failed."""
    assert (result.code, result.out) == (code, "")
    (line,) = result.err.splitlines()
    assert line.startswith("edge-llm: error: ")
    return line


@pytest.fixture
def shelf(tiny_bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of two bundles, one of them damaged, where the verbs look for names."""
    root = tmp_path / "kept"
    monkeypatch.setenv("EDGE_LLM_BUNDLES", str(root))
    shutil.copytree(tiny_bundles("qwen2"), root / "tiny-1.5b-fp16")
    (root / "broken").mkdir()
    (root / "broken" / "manifest.json").write_text("{}")
    return root
