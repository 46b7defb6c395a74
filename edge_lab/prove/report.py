"""Writes the report of a proof, reads one that a stranger sent, and shows reports as a table.

A report is one JSON object of two members: ``content``, and ``sha256`` of the content written with
sorted keys and no spaces (`canonical`). The hash tells a report that was cut or edited on its way
from a whole one; it vouches for nobody. A signature beside the file says whose report it is, if the
reader knew the key before: a key made on the spot would prove no more than the hash.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge.errors import ConfigError, IntegrityError
from edge.files import MALFORMED, read_file

SCHEMA = 1
_MAX_BYTES = 64 << 20
_PROBLEM_CHARS = 300
_NOT_A_REPORT = "it is no report of edge-llm prove"


def canonical(content: dict[str, Any]) -> bytes:
    """Return the bytes to hash."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return text.encode()


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """Add the content's hash."""
    return {"content": content, "sha256": hashlib.sha256(canonical(content)).hexdigest()}


def read_report(path: Path) -> dict[str, Any]:
    """Read the content of a report.

    Raises:
        ConfigError: it cannot be read, or is not a report that this version reads.
        IntegrityError: it was changed after it was written.
    """
    try:
        found = json.loads(read_file(path, _MAX_BYTES).decode("utf-8"))
        content, digest = found["content"], found["sha256"]
        if not isinstance(content, dict) or not isinstance(digest, str) or len(found) != 2:
            raise ValueError(_NOT_A_REPORT)
        whole = hmac.compare_digest(hashlib.sha256(canonical(content)).hexdigest(), digest)
    except OSError as error:
        raise ConfigError(f"cannot read the report {path}: {error.strerror}") from error
    except (*MALFORMED, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read: {_NOT_A_REPORT} ({error})") from error
    if not whole:
        raise IntegrityError(f"{path} is not as edge-llm prove wrote it; ask for the file again")
    if content.get("schema") != SCHEMA:
        raise ConfigError(
            f"{path} has schema {content.get('schema')!r}, and this edge-llm reads {SCHEMA}; "
            "read it with the version that wrote it"
        )
    return content


COLUMNS = (
    "device",
    "JetPack",
    "TensorRT",
    "power mode",
    "engine",
    "decode tok/s",
    "of the ceiling",
    "prefill tok/s",
    "J/token",
    "equals the CPU",
    "memory kept",
    "tactics skipped",
    "report",
)


def table(reports: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Make a row of `COLUMNS` per engine of each report.

    Raises:
        ConfigError: a report lacks a part that every report has.
    """
    try:
        return [row for content in reports for row in _rows(content)]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"a report lacks what every report has: {error}") from error


def _rows(content: dict[str, Any]) -> list[tuple[str, ...]]:
    machine = content["machine"]
    device = (
        _text(machine["module"] or machine["processor"]),
        _text(machine["jetpack"] or machine["l4t"]),
        _text(content["tensorrt"]),
    )
    digest = hashlib.sha256(canonical(content)).hexdigest()[:12]
    rows = [
        (*device, _text(machine["power_mode"]), _text(name), *_figures(engine), digest)
        for name, engine in content["engines"].items()
    ]
    for mode, bench in content["power_modes"].items():
        cells = _figures({"bench": bench})
        rows.append((*device, _text(mode), _text(content["measured"]), *cells, digest))
    return rows


def _figures(engine: dict[str, Any]) -> tuple[str, ...]:
    bench = engine["bench"].get("result") or {}
    ceiling = bench.get("roofline") or {}
    growth = ((engine.get("soak") or {}).get("result") or {}).get("growth") or {}
    skipped = (engine.get("layers") or {}).get("skipped_tactics")
    return (
        _number(bench.get("decode_tps")),
        f"{ceiling['reached']:.0%}" if ceiling.get("reached") else "-",
        _number(bench.get("prefill_tps")),
        _number(bench.get("decode_joules_per_token")),
        _verdict(engine.get("verify")),
        {"False": "yes", "True": "NO"}.get(str(growth.get("grows")), "-"),
        _number(skipped),
    )


def _verdict(cell: dict[str, Any] | None) -> str:
    return {"passed": "yes", "failed": "NO"}.get((cell or {}).get("verdict", ""), "-")


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"


def _text(value: Any, most: int = 60) -> str:
    """Fit a stranger's text into a cell: one line, short, and without column marks."""
    text = "-" if value is None else str(value)[:most]
    return "".join(c if c.isprintable() and c not in "|<>`[]" else " " for c in text)


def markdown(reports: Sequence[dict[str, Any]]) -> str:
    """Write the table in Markdown, and what each report could not prove."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *table(reports)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    for content in reports:
        digest = hashlib.sha256(canonical(content)).hexdigest()[:12]
        lines += [
            "",
            f"{digest}, {_text(content['started'])}, edge-llm {_text(content['edge_llm'])}:",
        ]
        lines += [f"- {_text(problem, _PROBLEM_CHARS)}" for problem in content["problems"]] or [
            "- nothing missed"
        ]
    return "\n".join(lines) + "\n"
