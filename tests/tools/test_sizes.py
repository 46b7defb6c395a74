"""The gate on sizes counts code, and says which figure to edit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.gates import sizes
from tools.gates.sizes import Allowance, code_lines, judge, package_lines

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


@pytest.mark.parametrize(
    ("found", "complaint"),
    [
        (1001, "it has 1001, its budget in tools/gates/sizes.py is 1000; "),
        (1000, None),
        (980, None),
        (979, "it has 979, far below its budget of 1000; write 979 "),
    ],
)
def test_a_budget_is_kept_and_not_wide(found: int, complaint: str | None):
    said = judge("it", found, 1000)
    assert said is None if complaint is None else (said or "").startswith(complaint)


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


def test_a_room_counts_against_its_allowance_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("edge/a.py", "edge/room/b.py", "edge/room/deeper/c.py", "engines/d.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n")
    monkeypatch.setattr(sizes, "ALLOWANCES", {"it": Allowance(9, ("edge.room", "engines.d"))})
    found = package_lines(tmp_path)
    assert (found["edge"], found["engines"], found["it"]) == (1, 0, 3)
