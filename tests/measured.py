"""The tables of docs/measured that hold what the pages no longer print."""

from __future__ import annotations

import json
from typing import Any

from tests.documents import ROOT

FOLDER = ROOT / "docs" / "measured"


def tables(name: str, section: str) -> list[dict[str, Any]]:
    """Return the tables of a section of ``docs/measured/NAME.json``; there is at least one."""
    content = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    found = [table for table in content["tables"] if table["section"] == section]
    assert found, f"docs/measured/{name}.json has no section {section!r}"
    return found


def cell(name: str, section: str, row: str, column: str, table: int = 0) -> str:
    """Return one cell, by the first cell of its row and the head of its column."""
    found = tables(name, section)[table]
    at = found["columns"].index(column)
    [match] = [cells for cells in found["rows"] if cells[0] == row]
    return str(match[at])
