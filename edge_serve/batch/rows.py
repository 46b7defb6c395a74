"""Defines the lines of a batch, in the format of OpenAI's Batch API: requests and answers.

Both are JSON, one object a line: https://platform.openai.com/docs/api-reference/batch.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, BinaryIO, Literal

import msgspec
from msgspec import Meta, Raw, Struct

from edge.files import MALFORMED
from edge_serve.json_lines import json_line

MAX_LINE_BYTES = 16 * 2**20
"""Longest line of a batch; a server takes 4 MiB of body by default."""
PREFIX = b'{"id":"batch_req_'
"""The beginning of every line of an answer."""

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]


class _Request(Struct, forbid_unknown_fields=True):
    custom_id: Annotated[str, Meta(min_length=1, max_length=512)]
    method: Literal["POST"]
    url: Endpoint
    body: Raw


class _Streaming(Struct):
    stream: Any = None


class RowError(Exception):
    """A line that is not a request; OpenAI's entry in ``errors.data`` of a batch.

    Attributes:
        code: short name of the cause.
        message: what is wrong with it.
        custom_id: its id, if that could be read.
    """

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.custom_id = custom_id


@dataclass(frozen=True)
class Row:
    """A request.

    Attributes:
        line: number of its line, from 1.
        custom_id: its id, unique in a file.
        url: path of the endpoint.
        body: JSON, unchanged.
    """

    line: int
    custom_id: str
    url: str
    body: bytes


def read_lines(file: BinaryIO) -> Iterator[bytes]:
    """Read lines without their ends; of one that is too long, only `MAX_LINE_BYTES` and one more.

    Args:
        file: at its start; a byte-order mark there, as editors on Windows write it, is left out.
    """
    if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
        file.seek(0)
    while line := file.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            rest = line
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(MAX_LINE_BYTES)
            yield line
        else:
            yield line.rstrip(b"\r\n")


def read_row(line: bytes, number: int) -> Row:
    """Read a line.

    Raises:
        RowError: it is not a request.
    """
    if len(line) > MAX_LINE_BYTES:
        raise RowError("line_too_long", f"the line has more than {MAX_LINE_BYTES >> 20} MiB")
    try:
        row = msgspec.json.decode(line, type=_Request)
    except msgspec.ValidationError as error:
        text = str(error)
        code = "invalid_url" if "$.url" in text else "invalid_request"
        raise RowError(code, text, _id_of(line)) from error
    except MALFORMED as error:
        raise RowError("invalid_json_line", f"the line is no JSON: {error}") from error
    body = bytes(row.body)
    try:
        # The server's verdict about the body belongs into its answer, so little is read of it.
        streams = msgspec.json.decode(body, type=_Streaming).stream
    except MALFORMED as error:
        raise RowError("invalid_request", f"body: {error}", row.custom_id) from error
    if streams not in (None, False):
        message = "body.stream: the answer is one line, so nothing can be streamed; leave it out"
        raise RowError("invalid_request", message, row.custom_id)
    return Row(number, row.custom_id, row.url, body)


def _id_of(line: bytes) -> str | None:
    """Return the id of a line that is wrong elsewhere."""
    try:
        found = msgspec.json.decode(line)["custom_id"]
    except (*MALFORMED, TypeError, KeyError):
        return None
    return found if isinstance(found, str) else None


def key_of(custom_id: str) -> int:
    """Return the number that stands for an id: 64 bits of its hash, never 0.

    Two of 10 million ids have the same number with a probability of 3e-6; the second would be
    reported as a duplicate, not lost.
    """
    digest = hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") or 1


# ------------------------------------------------------------------------------- answers


class _Response(Struct):
    status_code: int
    request_id: str
    body: Raw


class _Failure(Struct, omit_defaults=True):
    code: str
    message: str
    param: str | None = None
    line: int | None = None


class _AnswerLine(Struct):
    id: str
    custom_id: str | None
    response: _Response | None = None
    error: _Failure | None = None


class _ReadFailure(Struct):
    line: int | None = None


class _ReadAnswer(Struct):
    id: str
    custom_id: str | None
    response: Raw
    error: _ReadFailure | None


def answer_line(row: Row, status: int, request_id: str, body: bytes) -> bytes:
    """Write the line for a server's answer to a row."""
    return _write(row.custom_id, row.line, _Response(status, request_id, Raw(_one_line(body))))


def failure_line(row: Row, code: str, message: str) -> bytes:
    """Write the line for a row that no server answered."""
    return _write(row.custom_id, row.line, error=_Failure(code, message))


def bad_line(line: int, error: RowError) -> bytes:
    """Write the line for a line that is not a request; ``error.line`` identifies it."""
    failure = _Failure(error.code, f"line {line}: {error.message}", line=line)
    return _write(error.custom_id, line, error=failure)


def _write(
    custom_id: str | None, line: int, response: _Response | None = None, error: Any = None
) -> bytes:
    digest = hashlib.blake2b(f"{line} {custom_id}".encode("utf-8", "surrogatepass"), digest_size=12)
    answer = _AnswerLine(f"batch_req_{digest.hexdigest()}", custom_id, response, error)
    return json_line(answer)


def _one_line(body: bytes) -> bytes:
    """Return a body as JSON without line ends; a body that is not JSON becomes OpenAI's error."""
    try:
        value = msgspec.json.decode(body)
    except MALFORMED:
        text = body[:1000].decode("utf-8", "replace")
        return msgspec.json.encode({"error": {"message": text, "code": "no_json"}})
    return msgspec.json.encode(value) if b"\n" in body or b"\r" in body else body


def is_json(body: bytes) -> bool:
    """Whether a body is valid JSON."""
    try:
        msgspec.json.decode(body)
    except MALFORMED:
        return False
    return True


def read_answer(line: bytes) -> tuple[str | None, int | None]:
    """Read which row an answer belongs to: by its id, or by its line if that was no request.

    Raises:
        MALFORMED: it is not an answer.
    """
    answer = msgspec.json.decode(line, type=_ReadAnswer)
    number = None if answer.error is None else answer.error.line
    if number is None and answer.custom_id is None:
        raise ValueError("it has neither custom_id nor a line")
    return answer.custom_id, number
