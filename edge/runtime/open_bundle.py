"""Opens the parts of a bundle that an engine does not run: checked files, tokenizer, template."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edge.bundle.embeddings import EMBEDDINGS_NAME
from edge.bundle.manifest import MANIFEST_NAME, Manifest, Tokens
from edge.bundle.verified_files import VerifiedFiles
from edge.errors import BundleError
from edge.files import decode_text, is_file
from edge.text.chat_template import ChatTemplate
from edge.text.reasoning import template_reasons
from edge.text.tokenizer import Tokenizer

_TOKENIZER, _TEMPLATE = "tokenizer.json", "chat_template.jinja"


@dataclass(frozen=True)
class OpenBundle:
    """The readable parts of a bundle whose files were checked before any parser saw them.

    Attributes:
        files: every file that the manifest lists. Hashes of weights, which nothing parses, may
            still be computed; `VerifiedFiles.check_unchanged` waits for them.
        tokenizer: the model's tokenizer.
        template: the model's chat template; None if it has none.
        reasons: whether answers to chats may begin with reasoning.
    """

    files: VerifiedFiles
    tokenizer: Tokenizer
    template: ChatTemplate | None
    reasons: bool


@contextmanager
def open_bundle(path: Path, manifest: Manifest) -> Iterator[OpenBundle]:
    """Hash the files of a bundle, and read its texts; the files are closed with the context.

    Code that opens files by their paths, such as the engine, must do so within the context.

    Args:
        path: the bundle's directory.
        manifest: its manifest, which `edge.bundle.trust` has accepted.

    Raises:
        IntegrityError: `verify_files` refuses a file, or a file to read is not listed.
        BundleError: tokenizer or template cannot be used.
        DependencyError: a library that reads them is missing.
    """
    names = files_to_check(manifest)
    numbers = [name for name in names if name == EMBEDDINGS_NAME or name.endswith(".data")]
    with VerifiedFiles(path, manifest, names, later=numbers) as files:
        data, where = files.read(_TOKENIZER), str(path / _TOKENIZER)
        tokenizer = Tokenizer(data, manifest.tokens, where)
        template = None
        if _TEMPLATE in manifest.files:
            template = _read_template(path, files, manifest.tokens)
        reasons = template is not None and template_reasons(
            template.source, tokenizer.control_tokens
        )
        yield OpenBundle(files, tokenizer, template, reasons)


def _read_template(path: Path, files: VerifiedFiles, tokens: Tokens) -> ChatTemplate:
    try:
        source = decode_text(files.read(_TEMPLATE))
    except UnicodeDecodeError as error:
        raise BundleError(f"{path / _TEMPLATE} is not UTF-8; export again") from error
    return ChatTemplate(source, tokens)


def files_to_check(manifest: Manifest) -> list[str]:
    """List every listed file and every file that will be read; an unlisted one is refused."""
    return list(dict.fromkeys([*manifest.files, _TOKENIZER, EMBEDDINGS_NAME, manifest.graphs.cpu]))


def find_bundle(bundle: str | Path) -> Path:
    """Find a bundle by its directory, or by its name, with `edge.bundle.library.find_setting`.

    Raises:
        BundleError, ConfigError: `find_setting` finds none or several, or cannot read the path.
    """
    text = str(bundle)
    if not text.startswith("~") and is_file(Path(text) / MANIFEST_NAME):
        return Path(text)
    from edge.bundle.library import find_setting

    return find_setting(text, Path())
