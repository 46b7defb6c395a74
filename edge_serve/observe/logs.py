"""Writes log lines for journald: JSON objects for machines, or plain lines for people.

One record is one line, whatever it contains: a line break in a message or in a name that a client
chose cannot start a second one. Fields from ``logger.info("...", extra={"model": "r1"})`` are keys.

In the journal a line begins with ``<N>``, the priority of syslog, which journald takes off again
(sd-daemon(3)). Anywhere else a JSON line is nothing but JSON, and a plain one begins with the time.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Literal, TextIO

LogFormat = Literal["auto", "plain", "json"]

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
OWN = ("edge", "edge_make", "edge_lab", "edge_serve", "edge_fleet")
CONFIGURED = (*OWN, "asyncio", "uvicorn")
"""Names of the loggers that have our handler."""
_MAX_CHARS = 8192  # per message: a line of the journal holds 48 kB (LineMax=)


class JSONFormatter(logging.Formatter):
    """Formats objects ``{"time", "level", "logger", "message", ...}`` with the record's fields.

    Args:
        journal: begin with syslog's priority.
    """

    def __init__(self, *, journal: bool = False) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        """Write one line of ASCII JSON: no character in it ends a line or moves a cursor."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(
                timespec="milliseconds"
            ),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _cut(record.getMessage()),
        }
        line.update((name, value) for name, value in _extra(record).items() if name not in line)
        if record.exc_info:
            line["exception"] = _cut(self.formatException(record.exc_info))
        text = json.dumps(line, default=str, allow_nan=True, separators=(",", ":"))
        return _prefix(record.levelno) + text if self._journal else text


class PlainFormatter(logging.Formatter):
    """Formats lines ``level logger: message key=value`` with control characters escaped.

    Args:
        journal: begin with syslog's priority instead of the time.
    """

    def __init__(self, *, journal: bool) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        """Write one line of text."""
        if self._journal:
            start = _prefix(record.levelno)
        else:
            start = datetime.fromtimestamp(record.created).strftime("%H:%M:%S ")
        text = f"{record.levelname.lower()} {record.name}: {_cut(record.getMessage())}"
        for name, value in _extra(record).items():
            text += f" {name}={value}"
        if record.exc_info:
            text += " | " + _cut(self.formatException(record.exc_info))
        return start + _one_line(text)


def configure_logging(
    log_format: LogFormat = "auto",
    level: str = "info",
    *,
    stream: TextIO | None = None,
    environ: Mapping[str, str] | None = None,
) -> None:
    """Send records of edge-llm, and warnings of libraries, to one handler on standard error.

    A full disk or a closed pipe loses lines, never a request.

    Args:
        log_format: format of lines; ``auto`` is plain.
        level: level of the loggers in `OWN`: debug, info, warning or error. From
            ``asyncio`` and ``uvicorn`` nothing below a warning is logged.
        stream: stream to use instead of standard error.
        environ: used instead of ``os.environ``; ``JOURNAL_STREAM`` in it names the stream that
            is the journal.
    """
    variables = os.environ if environ is None else environ
    stream = stream or sys.stderr
    journal = _is_journal(stream, variables.get("JOURNAL_STREAM"))
    handler = _QuietHandler(stream)
    formatter = JSONFormatter if log_format == "json" else PlainFormatter
    handler.setFormatter(formatter(journal=journal))
    for name in CONFIGURED:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level.upper())
        if name not in OWN:
            logger.setLevel(max(logger.level, logging.WARNING))
        logger.propagate = False


if TYPE_CHECKING:
    _StreamHandler = logging.StreamHandler[TextIO]
else:
    _StreamHandler = logging.StreamHandler  # no subscript before Python 3.11


class _QuietHandler(_StreamHandler):
    """A handler that prints no tracebacks about the log into the log."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Drop the line: if it cannot be written, an error cannot be either."""


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]}… ({len(text)} characters)"


def _one_line(text: str) -> str:
    """Escape characters that break the line or control a terminal, and surrogates."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text
    )


def _prefix(level: int) -> str:
    return f"<{next((priority for least, priority in _PRIORITIES if level >= least), 7)}>"


def _is_journal(stream: TextIO, named: str | None) -> bool:
    """Whether a stream is the one that systemd named, and not a file that took its place."""
    if not named:
        return False
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):  # it has no descriptor
        return False
    return named == f"{found.st_dev}:{found.st_ino}"
