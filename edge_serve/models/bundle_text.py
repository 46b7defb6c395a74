"""Reads the parts of a bundle for texts without its engine, for a model that is not loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edge.bundle.manifest import Manifest
from edge.bundle.verified_files import VerifiedFiles
from edge.errors import BundleError
from edge.files import decode_text
from edge.text.chat_template import ChatTemplate
from edge.text.reasoning import template_reasons
from edge.text.tokenizer import Tokenizer

_TOKENIZER, _TEMPLATE = "tokenizer.json", "chat_template.jinja"


@dataclass(frozen=True)
class BundleText:
    """The part of an `edge.runtime.llm.LLM` that needs no engine, with the same attributes."""

    manifest: Manifest
    tokenizer: Tokenizer
    template: ChatTemplate | None
    reasons: bool
    kv_capacity: int


def read_bundle_text(bundle: Path, manifest: Manifest, kv_capacity: int) -> BundleText:
    """Read the tokenizer and chat template of a bundle, and check them against the manifest.

    Raises:
        IntegrityError: a file is damaged.
        BundleError: a file is missing or cannot be read.
    """
    names = [name for name in (_TOKENIZER, _TEMPLATE) if name in manifest.files]
    with VerifiedFiles(bundle, manifest, names) as files:
        tokenizer = Tokenizer(files.read(_TOKENIZER), manifest.tokens, str(bundle / _TOKENIZER))
        template = None
        if _TEMPLATE in names:
            try:
                source = decode_text(files.read(_TEMPLATE))
            except UnicodeDecodeError as error:
                raise BundleError(f"{bundle / _TEMPLATE} is not UTF-8; export again") from error
            template = ChatTemplate(source, manifest.tokens)
    reasons = template is not None and template_reasons(template.source, tokenizer.control_tokens)
    return BundleText(manifest, tokenizer, template, reasons, kv_capacity)
