"""The lint of docstrings finds what it says, and nothing in plain English."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.gates.voice import check, faults_of

PLAIN = '''"""Return the larger of two sizes.

That a sentence begins so is no fault. This one goes on over the end of its line, and it has just as
many words as a sentence may have here, so nothing is found.

- Of a list, too.

======  ===============================
name    a row of a table has no full stop
first   number of rows, one after the other
second  number of rows, twice as many as the first ones, or fewer
rest    number of rows that are left when all others have been taken away
======  ===============================

Args:
    first: number of rows, at most `second`.
    second, third: rows that are left.

Raises:
    ConfigError: the sizes differ.
"""'''


def test_plain_docstrings_pass():
    assert list(faults_of(PLAIN.strip('"'))) == []


@pytest.mark.parametrize(
    ("docstring", "line", "fault"),
    [
        ("What a step takes.", 0, "begins with 'What'"),
        ("Of the last one.", 0, "begins with 'Of'"),
        ("Likewise for rows.", 0, "begins with 'Likewise'"),
        ("Return it.\n\nArgs:\n    rows: of the cache.", 3, "an entry begins with 'of'"),
        ("Return it.\n\nArgs:\n    rows, slots: see `Cache`.", 3, "an entry begins with 'see'"),
        ("Return it.\n\nArgs:\n    *rows: as they come.", 3, "an entry begins with 'as'"),
        ("Return it.\n\nReturns:\n    ``rows``: that are left.", 3, "begins with 'that'"),
        ("Return " + "rows " * 30 + ".", 0, "a sentence has 31 words"),
        ("Return it.\n\n" + "rows\n" * 31 + ".", 2, "a sentence has 31 words"),
        ("Return it.\n\nArgs:\n    rows: " + "row " * 31, 3, "a sentence has 31 words"),
    ],
)
def test_faults_are_found(docstring: str, line: int, fault: str):
    ((found_line, found),) = faults_of(docstring)
    assert fault in found
    assert found_line == line


def test_every_docstring_of_a_file_is_read(tmp_path: Path):
    path = tmp_path / "module.py"
    path.write_text(
        '"""What is here."""\n\nclass A:\n    """Of it."""\n\n    b: int\n    """Likewise."""\n\n'
        '    def c(self) -> None:\n        """What."""\n        d = "What is no docstring"\n'
    )
    assert [fault.split(":")[1] for fault in check(path)] == ["1", "4", "7", "10"]
