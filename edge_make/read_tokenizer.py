"""Reads the tokenizer of a bundle from its file."""

from __future__ import annotations

from pathlib import Path

from edge.bundle.manifest import Tokens
from edge.errors import BundleError
from edge.files import read_file
from edge.text.tokenizer import Tokenizer
from edge.text.tokenizer_file import MAX_FILE_BYTES


def read_tokenizer(path: Path, tokens: Tokens) -> Tokenizer:
    """Read a ``tokenizer.json``.

    Args:
        path: the file.
        tokens: the manifest's ids of bos and eos.

    Raises:
        BundleError: the file cannot be read or used.
        DependencyError: the ``tokenizers`` library is missing.
    """
    try:
        data = read_file(path, MAX_FILE_BYTES)
    except OSError as error:
        raise BundleError(
            f"cannot read {path} ({error.strerror}); copy or export the bundle again"
        ) from error
    return Tokenizer(data, tokens, str(path))
