"""Reads a file of text that a person may have edited."""

from __future__ import annotations

import errno
from pathlib import Path

from edge.files import decode_text, read_file


def read_text_file(path: Path, max_bytes: int) -> str:
    """Read a plain file of UTF-8 text by `read_file` and `decode_text`.

    Raises:
        OSError: `read_file` fails, or the file is not UTF-8.
    """
    data = read_file(path, max_bytes)
    try:
        return decode_text(data)
    except UnicodeDecodeError as error:
        what = f"it is not UTF-8 (byte {error.start})"
        raise OSError(errno.EILSEQ, what, str(path)) from error
