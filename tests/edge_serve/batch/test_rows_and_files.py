"""Lines of a batch, and files that may end anywhere."""

from __future__ import annotations

import codecs
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.errors import ConfigError, RequestError
from edge_serve.batch import rows
from edge_serve.batch.files import Journal, Requests
from edge_serve.batch.rows import (
    RowError,
    answer_line,
    bad_line,
    failure_line,
    read_answer,
    read_lines,
    read_row,
)
from tests.edge_serve.batch.stub import read_rows, write_requests

GOOD = {"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"input": "x"}}


def test_a_row_keeps_its_body_to_the_byte():
    line = (
        b' {"custom_id":"a","method":"POST","url":"/v1/completions","body": {"b" :1.50,"a":[]} } '
    )
    row = read_row(line, 7)
    assert (row.line, row.custom_id, row.url) == (7, "a", "/v1/completions")
    assert row.body.strip() == b'{"b" :1.50,"a":[]}'


@pytest.mark.parametrize(
    ("line", "code", "custom_id"),
    [
        ("{", "invalid_json_line", None),
        ("[]", "invalid_request", None),
        ("null", "invalid_request", None),
        ("\udcff".encode("utf-8", "surrogateescape"), "invalid_json_line", None),
        ({**GOOD, "custom_id": ""}, "invalid_request", ""),
        ({**GOOD, "custom_id": 7}, "invalid_request", None),
        ({**GOOD, "method": "GET"}, "invalid_request", "a"),
        ({**GOOD, "url": "/v1/images"}, "invalid_url", "a"),
        ({**GOOD, "url": "/embeddings"}, "invalid_url", "a"),
        ({**GOOD, "body": []}, "invalid_request", "a"),
        ({**GOOD, "body": {"stream": True}}, "invalid_request", "a"),
        ({**GOOD, "extra": 1}, "invalid_request", "a"),
        ({"custom_id": "a"}, "invalid_request", "a"),
        ("[" * 100_000, "invalid_request", None),
    ],
)
def test_lines_that_are_not_requests_say_why(line: Any, code: str, custom_id: str | None):
    data = line if isinstance(line, bytes) else line if isinstance(line, str) else json.dumps(line)
    data = data if isinstance(data, bytes) else data.encode()
    with pytest.raises(RowError) as failing:
        read_row(data, 1)
    assert failing.value.custom_id == custom_id
    assert failing.value.code in (code, "invalid_json_line")
    answer = json.loads(bad_line(3, failing.value))
    assert answer["response"] is None
    assert answer["error"]["line"] == 3
    assert answer["error"]["message"].startswith("line 3: ")


@given(st.binary(max_size=80))
def test_any_bytes_are_a_row_or_an_error(line: bytes):
    fault = RowError("", "")
    try:
        read_row(line, 1)
    except RowError as error:
        fault = error
    assert read_answer(bad_line(1, fault))[1] == 1


def test_a_line_without_an_end_takes_no_more_than_its_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 100)
    file = io.BytesIO(b"x" * 1050 + b"\n" + b"y" * 100 + b"\nz")
    found = list(read_lines(file))
    assert [len(line) for line in found] == [101, 100, 1]
    with pytest.raises(RowError, match="more than") as failing:
        read_row(found[0], 1)
    assert failing.value.code == "line_too_long"


def test_answers_have_the_form_of_openais_output_files():
    row = read_row(json.dumps(GOOD).encode(), 1)
    body = b'{"object":\n "a\xe2\x80\xa8b"}'
    (line,) = answer_line(row, 200, "req_7", body).decode().splitlines()
    answer = json.loads(line)
    assert answer.pop("id").startswith("batch_req_")
    assert answer == {
        "custom_id": "a",
        "response": {"status_code": 200, "request_id": "req_7", "body": {"object": "a\u2028b"}},
        "error": None,
    }
    failure = json.loads(failure_line(row, "no_answer", "it is gone"))
    assert failure["response"] is None
    assert failure["error"] == {"code": "no_answer", "message": "it is gone"}


# ------------------------------------------------------------------------------- going on


def _lines(count: int) -> list[bytes]:
    rows = [
        read_row(json.dumps({**GOOD, "custom_id": f"row-{i}"}).encode(), 1) for i in range(count)
    ]
    return [answer_line(row, 200, "req", b'{"text":"a\xc3\xa9\\n"}') for row in rows]


@settings(max_examples=60)
@given(st.data())
def test_a_batch_resumes_from_any_prefix_of_its_answers(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    """Cut, or zeros, from anywhere on: whole lines stay to the byte, others come again, once."""
    path = tmp_path_factory.mktemp("cut")
    source = write_requests(path / "in.jsonl", [{"input": "x"}] * 6)
    answers = _lines(6)
    order = data.draw(st.permutations(range(6)))
    whole = b"".join(answers[i] for i in order)
    cut = data.draw(st.integers(0, len(whole)))
    output = path / "out.jsonl"
    zeros = data.draw(st.sampled_from([b"", b"\0" * 4096, b"\0\0\n", b"\0\n" + whole[cut:]]))
    output.write_bytes(whole[:cut] + (zeros if cut else b""))
    requests, journal = Requests(source), Journal(output)
    requests.mark_done(journal)
    left = [row.custom_id for row in requests.rows(lambda *_: pytest.fail("a row is refused"))]
    kept = whole[:cut].count(b"\n")
    assert output.read_bytes() == whole[: whole[:cut].rfind(b"\n") + 1]
    assert journal.num_rows == kept
    assert sorted(left) == sorted(f"row-{i}" for i in order[kept:])
    for name in left:
        journal.append(answers[int(name[4:])])
    journal.close()
    requests.close()
    assert sorted(row["custom_id"] for row in read_rows(output)) == [f"row-{i}" for i in range(6)]


@contextmanager
def opened(source: Path, output: Path) -> Iterator[tuple[Requests, Journal]]:
    with closing(Requests(source)) as requests, closing(Journal(output)) as journal:
        requests.mark_done(journal)
        yield requests, journal


def test_bad_lines_and_duplicates_are_known_by_their_lines(tmp_path: Path):
    good = json.dumps(GOOD)
    other = json.dumps({**GOOD, "custom_id": "b"})
    source = tmp_path / "in.jsonl"
    source.write_text(f"{good}\n\nnonsense\n{other}\n{good}\n  \n{good}")
    refused: list[tuple[int, str]] = []
    errors = tmp_path / "out.errors.jsonl"
    with opened(source, errors) as (requests, journal):
        assert requests.num_rows == 5

        def refuse(line: int, error: RowError) -> None:
            refused.append((line, error.code))
            journal.append(bad_line(line, error))

        found = [(row.line, row.custom_id) for row in requests.rows(refuse)]
    assert found == [(1, "a"), (4, "b")]
    duplicate = "duplicate_custom_id"
    assert refused == [(3, "invalid_json_line"), (5, duplicate), (7, duplicate)]
    with opened(source, errors) as (requests, _):
        left = list(requests.rows(lambda *_: pytest.fail("it was refused already")))
    assert [row.custom_id for row in left] == ["a", "b"]
    third = json.dumps({**GOOD, "custom_id": "c"})
    source.write_text(f"{good}\n\n{third}\n{other}\n{good}\n \n{good}")
    with pytest.raises(ConfigError, match=r"line 3 .* is one now; remove"), opened(source, errors):
        pass


def test_a_duplicate_of_an_answered_row_still_gets_its_error(tmp_path: Path):
    """The run was cut off between the two."""
    source = tmp_path / "in.jsonl"
    line = json.dumps({**GOOD, "custom_id": "row-0"})
    source.write_text(f"{line}\n{line}\n")
    output = tmp_path / "out.jsonl"
    output.write_bytes(_lines(1)[0])
    refused: list[tuple[int, str]] = []
    with opened(source, output) as (requests, _):
        assert not list(requests.rows(lambda line, error: refused.append((line, error.code))))
    assert refused == [(2, "duplicate_custom_id")]


def test_a_byte_order_mark_is_no_part_of_a_request(tmp_path: Path):
    source = write_requests(tmp_path / "in.jsonl", [{"input": "x"}] * 2)
    source.write_bytes(codecs.BOM_UTF8 + source.read_bytes())
    with closing(Requests(source)) as requests:
        for _ in range(2):  # each time from the start
            rows_left = requests.rows(lambda *_: pytest.fail("a row is refused"))
            assert [row.custom_id for row in rows_left] == ["row-0", "row-1"]


def test_files_of_something_else_are_left_as_they_are(tmp_path: Path):
    source = write_requests(tmp_path / "in.jsonl", [{}, {}])
    notes = tmp_path / "notes.txt"
    answers = _lines(3)
    for data, fault in (
        (b"my notes", "something else than answers"),
        (b"my notes\n", "something else than answers"),
        (b'{"id": 1}\n', "something else than answers"),
        (b"\0\0\0", "something else than answers"),
        (b'{"id": 1}\n\0\0', "line 1 begins with"),
        (_lines(1)[0] + b"my notes\n\0\0", "line 2 begins with"),
        (b"".join(answers), r"custom_id 'row-2', which .* does not have"),
        (answers[0] + 2 * answers[1], r"custom_id 'row-1'.*answered already"),
    ):
        notes.write_bytes(data)
        with pytest.raises(ConfigError, match=fault), opened(source, notes):
            pass
        assert notes.read_bytes() == data
    with pytest.raises(ConfigError, match="no plain file"):
        Journal(Path("/dev/null"))
    with pytest.raises(ConfigError, match="cannot write"):
        Journal(tmp_path)
    with pytest.raises(RequestError, match="cannot read"):
        Requests(tmp_path / "none")
    with pytest.raises(RequestError, match="has no request"):
        Requests(_empty(tmp_path))


def _empty(tmp_path: Path) -> Path:
    path = tmp_path / "empty.jsonl"
    path.write_text("\n \n")
    return path


def test_one_process_at_a_time_writes(tmp_path: Path):
    journal = Journal(tmp_path / "out.jsonl")
    with pytest.raises(ConfigError, match="another process writes"):
        Journal(tmp_path / "out.jsonl")
    journal.close(remove_empty=True)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_source_that_changes_is_noticed(tmp_path: Path):
    source = write_requests(tmp_path / "in.jsonl", [{}, {}, {}])
    with closing(Requests(source)) as requests:
        taken = requests.rows(lambda *_: None)
        next(taken)
        with source.open("a") as file:
            file.write(json.dumps({**GOOD, "custom_id": "new"}) + "\n")
        with pytest.raises(RequestError, match="was changed"):
            list(taken)


def test_a_full_disk_leaves_whole_lines(tmp_path: Path):
    """A limit of the file's size stands in for the disk: the line that passes it is taken back."""
    script = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from edge_serve.batch.files import Journal; from edge.errors import ResourceError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (250, 250))\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "line = b'{\"id\":\"batch_req_' + b'x' * 81 + b'\"}\\n'\n"
        "try:\n    [journal.append(line) for _ in range(3)]\n"
        "except ResourceError as error:\n    print(error)\n"
    )
    path = tmp_path / "out.jsonl"
    ran = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
    )
    assert "the same command goes on" in ran.stdout
    assert path.stat().st_size == 202


@pytest.mark.slow
def test_a_long_file_is_held_by_its_numbers_only(tmp_path: Path):
    """300,000 rows of half a kilobyte, half of them done, in a few bytes each."""
    script = (
        "import json, resource, sys; from pathlib import Path\n"
        "from edge_serve.batch.files import Journal, Requests\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "requests = Requests(Path(sys.argv[1])); journal = Journal(Path(sys.argv[2]))\n"
        "requests.mark_done(journal)\n"
        "left = sum(1 for _ in requests.rows(print))\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(requests.num_rows, left, after - before)\n"
    )
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    filler = "x" * 400
    count = 300_000
    with source.open("w") as file:
        for i in range(count):
            file.write(
                f'{{"custom_id":"row-{i}","method":"POST","url":"/v1/completions",'
                f'"body":{{"prompt":"{filler}"}}}}\n'
            )
    with output.open("w") as file:
        for i in range(0, count, 2):
            file.write(
                f'{{"id":"batch_req_{i}","custom_id":"row-{i}","response":{{}},"error":null}}\n'
            )
    ran = subprocess.run(
        [sys.executable, "-c", script, source, output], capture_output=True, text=True, check=True
    )
    rows_there, left, grown_kib = map(int, ran.stdout.split())
    assert (rows_there, left) == (count, count // 2)
    assert grown_kib * 1024 < 60 * count + (8 << 20)
    source.unlink()
