"""Opens what a bundle is before an engine runs it: files that were checked, tokenizer, template."""

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
    """What is read of a bundle whose files were held against its manifest before any parser.

    Attributes:
        files: every file that the manifest lists. The hashes of numbers, which nothing parses, may
            still be under way; `VerifiedFiles.check_unchanged` waits for them.
        tokenizer: the model's tokenizer.
        template: the model's chat template; None where it has none.
        reasons: whether answers to chats may begin with reasoning.
    """

    files: VerifiedFiles
    tokenizer: Tokenizer
    template: ChatTemplate | None
    reasons: bool


@contextmanager
def open_bundle(path: Path, manifest: Manifest) -> Iterator[OpenBundle]:
    """Hash the files of a bundle, and read its texts; the files are closed with the context.

    What opens files by their paths, engine and all, does so within the context.

    Args:
        path: the bundle's directory.
        manifest: its manifest, which `edge.bundle.trust` has let pass.

    Raises:
        IntegrityError: see `verify_files`; also for a file that is read and not listed.
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
    """List every file that is listed, and every file that is read: an unlisted one is refused."""
    return list(dict.fromkeys([*manifest.files, _TOKENIZER, EMBEDDINGS_NAME, manifest.graphs.cpu]))


def find_bundle(bundle: str | Path) -> Path:
    """Find a bundle by its directory, or by its name; see `edge.bundle.library.find_setting`.

    Raises:
        BundleError, ConfigError: see there.
    """
    text = str(bundle)
    if not text.startswith("~") and is_file(Path(text) / MANIFEST_NAME):
        return Path(text)
    from edge.bundle.library import find_setting

    return find_setting(text, Path())
