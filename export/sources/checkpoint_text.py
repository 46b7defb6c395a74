"""Reads tokenizer, chat template and generation defaults of a checkpoint directory."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge.bundle.manifest import SamplingDefaults, Tokens
from edge.errors import BundleError, CheckpointError
from edge.files import open_file, read_file
from edge.text.chat_template import ChatTemplate
from edge.text.known_templates import R1_WITHOUT_THINK, template_digest
from edge.text.tokenizer import Tokenizer
from edge_make.text_file import read_text_file

from .assumed_sampling import assume_sampling
from .weight_files import HEAD_BYTES, refuse_stand_in

_log = logging.getLogger(__name__)
_MAX_BYTES = 1 << 26
_MAX_TEMPLATE_BYTES = 1 << 20
_CARD_BYTES = 1 << 16
_TOKENIZER_FILES = ("*tokenizer*", "*vocab*", "*.model", "merges.txt")


@dataclass(frozen=True)
class CheckpointText:
    """Everything textual that goes into the bundle.

    Attributes:
        tokenizer_json: content of ``tokenizer.json``, for the ``tokenizers`` library.
        chat_template: Jinja source, or None if the model has none.
        tokens: ids of the special tokens.
        sampling: the model's own sampling parameters, or its family's if it states none.
        generation_config: content of ``generation_config.json``, unchanged.
    """

    tokenizer_json: bytes
    chat_template: str | None
    tokens: Tokens
    sampling: SamplingDefaults
    generation_config: dict[str, Any]

    def tokenizer(self) -> Tokenizer:
        """Open the tokenizer.

        Raises:
            BundleError: the ``tokenizers`` library or edge-llm refuses it.
        """
        return Tokenizer.from_bytes(self.tokenizer_json, self.tokens)

    def template(self) -> ChatTemplate | None:
        """Open the chat template; None if the model has none.

        Raises:
            BundleError: the template is refused.
        """
        return None if self.chat_template is None else ChatTemplate(self.chat_template, self.tokens)

    def check(self) -> None:
        """Open tokenizer and template as the runtime will, before hours of work.

        Raises:
            CheckpointError: one of them is refused.
        """
        try:
            self.tokenizer()
            self.template()
        except BundleError as error:
            raise CheckpointError(f"no bundle of this source could be opened: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file cannot be read or holds no JSON object.
    """
    try:
        data = read_file(path, _MAX_BYTES)
        refuse_stand_in(path, data[:HEAD_BYTES])
        value = json.loads(data)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value


def read_text(
    directory: Path, config: Mapping[str, Any], vocab_size: int, hub_id: str | None = None
) -> CheckpointText:
    """Read the tokenizer's and generation files of an HF directory.

    Args:
        directory: holds ``tokenizer.json`` and, optionally, ``tokenizer_config.json``,
            ``chat_template.jinja``, ``chat_template.json`` and ``generation_config.json``.
        config: content of ``config.json``.
        vocab_size: rows of the token table.
        hub_id: where the directory was downloaded from, or None.

    Raises:
        CheckpointError: no ``tokenizer.json``, an invalid file, a token that does not exist, or no
            token that ends an answer.
    """
    tokenizer_path = directory / "tokenizer.json"
    if not tokenizer_path.is_file():
        if not any(next(directory.glob(kind), None) for kind in _TOKENIZER_FILES):
            raise CheckpointError(
                f"{directory} has no file of a tokenizer: the download is incomplete; get every "
                "file of the checkpoint"
            )
        raise CheckpointError(
            f"{directory} has no tokenizer.json; make one with transformers: "
            f"AutoTokenizer.from_pretrained({str(directory)!r}).save_pretrained({str(directory)!r})"
        )
    tokenizer = read_json(tokenizer_path)
    tokenizer_config = read_optional(directory / "tokenizer_config.json")
    if tokenizer_config.get("auto_map") is not None:
        raise CheckpointError(
            f"{directory / 'tokenizer_config.json'}: auto_map asks for Python code from the "
            "checkpoint, which is never run; if tokenizer.json is the whole tokenizer, delete the "
            "key from a local copy"
        )
    generation_path = directory / "generation_config.json"
    generation = read_optional(generation_path)
    template = _chat_template(directory, tokenizer_config)
    origin = config.get("_name_or_path")
    return CheckpointText(
        tokenizer_json=read_file(tokenizer_path, _MAX_BYTES),
        chat_template=template,
        tokens=_tokens(directory, tokenizer, tokenizer_config, generation or config, vocab_size),
        sampling=assume_sampling(
            sampling_defaults(generation, str(generation_path)),
            generation,
            # A download's directory is called by a hash, a fine-tune's after its task.
            [hub_id, origin if isinstance(origin, str) else None, directory.resolve().name],
            template,
        ),
        generation_config=generation,
    )


def sampling_defaults(generation: Mapping[str, Any], where: str) -> SamplingDefaults:
    """Read the sampling parameters of a generation config; neutral where it states none.

    ``do_sample`` is not read: ``transformers`` takes its absence as greedy, which is that library's
    default and not the authors' choice. vLLM and SGLang read the file this way too.

    Args:
        generation: content of ``generation_config.json``.
        where: path for error messages.

    Raises:
        CheckpointError: a parameter is out of range; the message names it.
    """

    def number(key: str, neutral: float, low: float, high: float) -> float:
        value = generation.get(key)
        if value is None:
            return neutral
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise CheckpointError(f"{where}: {key} must be a number, found {value!r}")
        if not low <= value <= high:
            raise CheckpointError(f"{where}: {key} must be in {low}..{high}, found {value}")
        return value

    top_k = number(
        "top_k", 0, -1, (1 << 31) - 1
    )  # -1 and 0 both mean "off" to one library or another
    if not isinstance(top_k, int):
        raise CheckpointError(f"{where}: top_k must be an integer, found {top_k}")
    return SamplingDefaults(
        temperature=float(number("temperature", 1.0, 0.0, 10.0)),
        top_k=max(top_k, 0),
        top_p=float(number("top_p", 1.0, 0.0, 1.0)),
        min_p=float(number("min_p", 0.0, 0.0, 1.0)),
        repetition_penalty=float(number("repetition_penalty", 1.0, 0.1, 10.0)),
    )


def read_licence(directory: Path) -> str | None:
    """Read the licence in the front matter of ``README.md`` (the model card), or None."""
    try:
        with open_file(directory / "README.md") as file:
            # The front matter is short; a card can be long.
            head = file.read(_CARD_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return None
    front = re.match(r"\ufeff?---\r?\n(.*?)\r?\n---", head, re.DOTALL)
    if front is None:
        return None
    found = dict(re.findall(r"(?m)^(license|license_name): *['\"]?([^\s'\"#]+)", front.group(1)))
    licence: str | None = found.get("license")
    return found.get("license_name", licence) if licence == "other" else licence


def with_think(source: str) -> str:
    """Open the reasoning where DeepSeek-R1-Distill's template of January 2025 does not.

    The authors' template of February does. Without it these models tend to skip their reasoning
    ("usage recommendations" in DeepSeek-R1's README). Any other template stays as it is.
    """
    if template_digest(source) != R1_WITHOUT_THINK:
        return source
    head, mark, tail = source.rpartition("<｜Assistant｜>")
    return f"{head}{mark}<think>\\n{tail}"


def settle_template(template: str, where: str) -> str:
    """Return a template as it is, except for one that skips the reasoning; see `with_think`."""
    settled = with_think(template)
    if settled != template:
        _log.warning(
            "%s: the chat template is DeepSeek's of January 2025, which leaves it to the model "
            "whether to reason; the bundle gets the ending of February's, which opens <think>",
            where,
        )
    return settled


def read_optional(path: Path) -> dict[str, Any]:
    """Read a JSON object; a missing file counts as an empty one."""
    return read_json(path) if path.exists() else {}


def _chat_template(directory: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """Find the template in ``transformers``' order: a file of its own wins over the key."""
    jinja = directory / "chat_template.jinja"
    try:
        if jinja.exists():
            return settle_template(read_text_file(jinja, _MAX_TEMPLATE_BYTES), str(jinja))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {jinja}: {error}") from error
    template = tokenizer_config.get("chat_template")
    where = directory / "tokenizer_config.json"
    if template is None:
        where = directory / "chat_template.json"
        template = read_optional(where).get("chat_template")
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        named = {str(entry.get("name")): entry.get("template") for entry in template}
        if "default" not in named:
            raise CheckpointError(
                f"{where}: none of the chat templates is named 'default', found "
                f"{sorted(named)}; put the one you want into chat_template.jinja"
            )
        template = named["default"]
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{where}: chat_template must be a string, found {template!r:.80}")
    return None if template is None else settle_template(template, str(where))


def _tokens(
    directory: Path,
    tokenizer: Mapping[str, Any],
    tokenizer_config: Mapping[str, Any],
    ends: Mapping[str, Any],
    vocab_size: int,
) -> Tokens:
    # bos comes from the tokenizer alone: R1-Distill-Qwen's config.json names its eos id as bos.
    ids = _token_ids(tokenizer, directory / "tokenizer.json")
    text, largest = max(ids.items(), key=lambda item: item[1], default=("", -1))
    if largest >= vocab_size:
        raise CheckpointError(
            f"{directory / 'tokenizer.json'} has token id {largest} ({text!r}), but vocab_size in "
            f"config.json is {vocab_size}: the tokenizer is of another model, or tokens were added "
            "to it and no rows to the token table; then remove them from its added_tokens"
        )

    def special(key: str) -> tuple[int | None, str]:
        token = tokenizer_config.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        if text is None:
            return None, ""
        if not isinstance(text, str) or text not in ids:
            raise CheckpointError(
                f"{directory / 'tokenizer_config.json'}: {key} {text!r} is not in tokenizer.json"
            )
        return ids[text], text

    bos, bos_text = special("bos_token")
    eos, eos_text = special("eos_token")
    eos_ids = _eos_ids(ends.get("eos_token_id"), vocab_size, directory)
    if eos is not None:
        eos_ids.append(eos)
    if not eos_ids:
        raise CheckpointError(
            f"{directory} names no token that ends an answer; add eos_token_id to "
            "generation_config.json"
        )
    if eos is None:
        eos_text = {number: text for text, number in ids.items()}.get(eos_ids[0], "")
    add_bos = tokenizer_config.get("add_bos_token")
    if not isinstance(add_bos, bool):
        add_bos = bos is not None and bos_text in _template_prefix(tokenizer.get("post_processor"))
    return Tokens(
        bos=bos,
        bos_text=bos_text,
        eos=tuple(dict.fromkeys(eos_ids)),
        eos_text=eos_text,
        add_bos=add_bos and bos is not None,
    )


def _eos_ids(value: Any, vocab_size: int, directory: Path) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for item in ids:
        if type(item) is not int or not 0 <= item < vocab_size:
            raise CheckpointError(
                f"{directory}: eos_token_id must be token ids below {vocab_size}, found {value!r}"
            )
    return list(ids)


def _token_ids(tokenizer: Mapping[str, Any], path: Path) -> dict[str, int]:
    """Map texts to ids, for the vocabulary and the added tokens."""
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):
        ids = list(vocab.items())
    elif isinstance(vocab, list) and all(isinstance(entry, list) and entry for entry in vocab):
        ids = [(entry[0], index) for index, entry in enumerate(vocab)]  # Unigram: [text, score]
    else:
        raise CheckpointError(f"{path} has no model.vocab; save it with the tokenizers library")
    added = tokenizer.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise CheckpointError(f"{path}: added_tokens must be a list of objects")
    ids += [(token.get("content"), token.get("id")) for token in added]
    if not all(isinstance(text, str) and type(number) is int for text, number in ids):
        raise CheckpointError(f"{path}: a token has no text or no integer id")
    return dict(ids)


def _template_prefix(post_processor: Any) -> Iterator[str]:
    """Yield the special tokens that a post-processor puts before the text."""
    if not isinstance(post_processor, dict):
        return
    processors = post_processor.get("processors")
    if isinstance(processors, list):
        for processor in processors:
            yield from _template_prefix(processor)
    pieces = post_processor.get("single")
    for piece in pieces if isinstance(pieces, Iterable) else ():
        token = piece.get("SpecialToken") if isinstance(piece, dict) else None
        if not isinstance(token, dict):
            return  # this entry is the text itself
        yield str(token.get("id"))
