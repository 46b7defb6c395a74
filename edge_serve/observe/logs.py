"""Log lines for journald: JSON objects for machines, or plain lines for people.

One record is one line, whatever it holds: a line break in a message or a name that a client chose
cannot make a second one. Fields given by ``logger.info("...", extra={"model": "r1"})`` become keys.

Plain lines begin with ``<N>``, the priority of syslog, when standard error is the journal
(sd-daemon(3)), and with the time where it is not: the journal has its own.
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
OWN = ("edge", "edge_lab", "edge_serve", "edge_fleet")
CONFIGURED = (*OWN, "asyncio", "uvicorn")
"""The loggers that have our handler."""
_MAX_CHARS = 8192  # of one message: a line of the journal holds 48 kB (LineMax=)


class JSONFormatter(logging.Formatter):
    """Objects ``{"time", "level", "logger", "message", ...}`` with the record's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Write one line of JSON, ASCII only: no character of it ends a line or moves a cursor."""
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
        return json.dumps(line, default=str, allow_nan=True, separators=(",", ":"))


class PlainFormatter(logging.Formatter):
    """Lines ``level logger: message key=value``, control characters escaped.

    Args:
        journal: begin with syslog's priority instead of the time.
    """

    def __init__(self, *, journal: bool) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        """Write one line of text."""
        if self._journal:
            start = f"<{_priority(record.levelno)}>"
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
    """Send every record of edge-llm to one handler on standard error, and warnings of libraries.

    A full disk or a closed pipe loses lines, never a request.

    Args:
        log_format: ``auto`` is plain.
        level: level of the loggers in `OWN`: debug, info, warning or error. Of
            ``asyncio`` and ``uvicorn`` nothing below a warning is logged.
        stream: instead of standard error.
        environ: instead of ``os.environ``; ``JOURNAL_STREAM`` in it says that systemd listens.
    """
    variables = os.environ if environ is None else environ
    handler = _QuietHandler(stream or sys.stderr)
    if log_format == "json":
        handler.setFormatter(JSONFormatter())
    else:
        handler.setFormatter(PlainFormatter(journal="JOURNAL_STREAM" in variables))
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
        """Drop the line: who cannot write cannot complain either."""


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]}… ({len(text)} characters)"


def _one_line(text: str) -> str:
    """Escape what would break the line or reach a terminal: control characters, surrogates."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text
    )


def _priority(level: int) -> int:
    return next((priority for least, priority in _PRIORITIES if level >= least), 7)
