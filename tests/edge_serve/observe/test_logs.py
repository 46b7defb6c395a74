"""One record, one line, whatever it holds."""

from __future__ import annotations

import io
import json
import logging
import os
import tempfile
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_serve.observe.logs import JSONFormatter, LogFormat, PlainFormatter, configure_logging


def lines(
    log_format: LogFormat, *, journal: bool = False, level: str = "info", **extra: Any
) -> str:
    with tempfile.TemporaryFile("w+", encoding="utf-8") as stream:
        place = os.fstat(stream.fileno())
        # A process that a service started has the variable, too, wherever its lines go.
        named = f"{place.st_dev}:{place.st_ino + (not journal)}"
        configure_logging(log_format, level, stream=stream, environ={"JOURNAL_STREAM": named})
        logging.getLogger("edge_serve").info("%d requests", 3, extra=extra)
        logging.getLogger("edge_serve").debug("details")
        stream.seek(0)
        return stream.read()


def test_json_has_the_records_own_fields():
    (line,) = lines("json", model="r1", status=200).splitlines()
    found = json.loads(line)
    assert found.pop("time").endswith("+00:00")
    assert found == {
        "level": "info",
        "logger": "edge_serve",
        "message": "3 requests",
        "model": "r1",
        "status": 200,
    }


def test_plain_for_people_and_for_the_journal():
    assert lines("plain", model="r1")[8:] == " info edge_serve: 3 requests model=r1\n"
    assert lines("auto", journal=True) == "<6>info edge_serve: 3 requests\n"


def test_json_has_its_priority_in_the_journal_and_is_json_anywhere_else():
    (line,) = lines("json", journal=True, model="r1").splitlines()
    assert line.startswith("<6>{")
    assert json.loads(line.removeprefix("<6>"))["model"] == "r1"
    assert json.loads(lines("json", model="r1"))["model"] == "r1"


def test_a_stream_without_a_descriptor_is_not_the_journal():
    stream = io.StringIO()
    configure_logging("json", stream=stream, environ={"JOURNAL_STREAM": "8:1"})
    logging.getLogger("edge").error("failed")
    assert json.loads(stream.getvalue())["message"] == "failed"


@pytest.mark.parametrize(
    ("level", "priority"),
    [(logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (10, 7)],
)
def test_priorities_are_those_of_syslog(level: int, priority: int):
    record = logging.makeLogRecord({"levelno": level, "levelname": "x", "msg": "y"})
    assert PlainFormatter(journal=True).format(record).startswith(f"<{priority}>x ")
    assert JSONFormatter(journal=True).format(record).startswith(f"<{priority}>{{")


def test_the_level_is_kept():
    assert len(lines("plain", level="debug").splitlines()) == 2
    assert lines("plain", level="warning") == ""


def test_configuring_twice_does_not_double_lines():
    lines("json")
    assert len(lines("json").splitlines()) == 1


@pytest.mark.parametrize(("level", "least"), [("debug", "warning"), ("error", "error")])
@pytest.mark.parametrize("name", ["asyncio", "uvicorn.error"])
def test_libraries_write_warnings_in_the_same_form(name: str, level: str, least: str):
    stream = io.StringIO()
    configure_logging("json", level, stream=stream, environ={})
    for write in (logging.getLogger(name).info, logging.getLogger(name).warning):
        write("Unsupported\nupgrade")
    logging.getLogger(name).error("failed")
    found = [json.loads(line) for line in stream.getvalue().splitlines()]
    wanted = [("warning", "Unsupported\nupgrade"), ("error", "failed")]
    assert [(line["level"], line["message"]) for line in found] == wanted[least == "error" :]
    assert {line["logger"] for line in found} == {name}


texts = st.text(st.characters(exclude_categories=()), max_size=60)  # lone surrogates too


@given(texts, texts)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_text_makes_a_second_line(message: str, name: str):
    record = logging.makeLogRecord({"msg": message, "levelname": "INFO", "levelno": 20})
    record.client = name
    as_json = JSONFormatter().format(record)
    assert as_json.isascii()
    assert len(as_json.splitlines()) == 1
    assert json.loads(as_json)["message"] == message
    assert json.loads(as_json)["client"] == name
    plain = PlainFormatter(journal=True).format(record)
    assert len(plain.splitlines()) == 1
    assert plain.isprintable()
    plain.encode()  # no surrogate is left


def test_a_field_cannot_pose_as_the_message():
    record = logging.makeLogRecord({"msg": "true", "levelname": "INFO", "levelno": 20})
    record.level, record.time = "forged", "forged"
    found = json.loads(JSONFormatter().format(record))
    assert found["level"] == "info"
    assert found["time"] != "forged"


def test_an_exception_stays_on_its_line():
    try:
        raise ValueError("broken\nin two")
    except ValueError:
        import sys

        record = logging.makeLogRecord(
            {"msg": "x", "levelname": "ERROR", "levelno": 40, "exc_info": sys.exc_info()}
        )
    assert "in two" in json.loads(JSONFormatter().format(record))["exception"]
    assert len(PlainFormatter(journal=True).format(record).splitlines()) == 1


def test_a_long_message_is_cut():
    record = logging.makeLogRecord({"msg": "x" * 100_000, "levelname": "INFO", "levelno": 20})
    assert len(JSONFormatter().format(record)) < 10_000
    assert "(100000 characters)" in json.loads(JSONFormatter().format(record))["message"]


def test_a_full_disk_stops_nothing(capsys: pytest.CaptureFixture[str]):
    class Full(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(28, "No space left on device")

    configure_logging("json", stream=Full(), environ={})
    logging.getLogger("edge").error("lost")
    assert capsys.readouterr().err == ""
