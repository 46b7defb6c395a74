"""Reads documents to calibrate with, or to choose a vocabulary by, and encodes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.errors import ConfigError, RequestError
from edge.files import MALFORMED, read_file
from edge.text.chat_template import ChatTemplate, encode_chat
from edge.text.reasoning import THINK_END, THINK_START, prompt_opens_reasoning
from edge.text.tokenizer import Tokenizer

SEQ_LEN = 512
BUILT_IN_TOKENS, DEFAULT_TOKENS = 36864, 20480
"""Most tokens to calibrate with by default: of the built-in text, which tokenizers without Chinese
cut into 36,000, and of another text."""
_BUILT_IN = {False: ("built-in", "problems.jsonl"), True: ("built-in, mixed", "mixed.jsonl")}
MAX_TEXT_BYTES = 1 << 28
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class CalibrationText:
    """Documents to calibrate with.

    Attributes:
        name: ``built-in``, ``built-in, mixed`` or the file's name.
        sha256: SHA-256 of the file, in hex.
        documents: each ``{"text": ...}`` or ``{"messages": [...]}``; an assistant's message may
            have a ``reasoning`` beside its ``content``.
    """

    name: str
    sha256: str
    documents: tuple[Mapping[str, Any], ...]

    def encode(self, tokenizer: Tokenizer, template: ChatTemplate | None, index: int) -> list[int]:
        """Encode a document, as `encode_document` does.

        Raises:
            ConfigError: it cannot be encoded; the message names the text and the document's number.
        """
        try:
            return encode_document(tokenizer, template, self.documents[index])
        except RequestError as error:
            raise ConfigError(f"document {index + 1} of the text {self.name}: {error}") from error


def read_calibration_text(
    path: Path | None, option: str = "--calibration", *, mixed: bool = False
) -> CalibrationText:
    """Read the built-in text, or a file: plain text, or JSONL if its name ends in ``.jsonl``.

    Args:
        path: the file; None is the built-in text.
        option: name of the option, for messages.
        mixed: whether the built-in text has Chinese and more code, too.

    Raises:
        ConfigError: the file cannot be read, is empty, or has a line that is not a document.
    """
    if path is None:
        name, file = _BUILT_IN[mixed]
        data = (resources.files(__package__) / "calibration_text" / file).read_bytes()
        is_jsonl = True
    else:
        try:
            data = read_file(path, MAX_TEXT_BYTES)
        except OSError as error:
            raise ConfigError(f"{option} {path} cannot be read: {error.strerror}") from error
        name, is_jsonl = path.name, path.suffix.lower() in (".jsonl", ".ndjson")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{option} {path} is not UTF-8 text: {error}") from error
    documents: list[Mapping[str, Any]] = []
    if is_jsonl:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                documents.append(_document(line, f"{option} {path}: line {number}"))
    elif text.strip():
        documents.append({"text": text})
    if not documents:
        raise ConfigError(f"{option} {path} is empty; give some thousand words of text")
    return CalibrationText(name, hashlib.sha256(data).hexdigest(), tuple(documents))


def _document(line: str, where: str) -> Mapping[str, Any]:
    try:
        value = json.loads(line)
    except MALFORMED as error:
        raise ConfigError(f"{where} is not JSON: {error}") from error
    if isinstance(value, dict):
        if set(value) == {"text"} and isinstance(value["text"], str):
            return value
        if set(value) == {"messages"} and isinstance(value["messages"], list):
            if all(map(_is_message, value["messages"])):
                return value
            raise ConfigError(
                f"{where}: a message is an object whose role, content and reasoning are texts"
            )
    raise ConfigError(f'{where} must be {{"text": "..."}} or {{"messages": [...]}}')


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(key), str | None) for key in ("role", "content", "reasoning")
    )


def calibration_batches(
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    text: CalibrationText,
    num_tokens: int,
    seq_len: int = SEQ_LEN,
    seed: int = 0,
) -> NDArray[np.int64]:
    """Shuffle the documents, join them and cut them: token ids int64 ``[sequences, seq_len]``.

    Any beginning of the shuffled order has documents of all parts of the text, in proportion.
    Every sequence starts with bos if the model wants one: the first token of a context draws
    activations that no other token has.

    Args:
        tokenizer: the model's.
        template: the model's chat template; None writes messages as plain paragraphs.
        text: the documents.
        num_tokens: most tokens, in whole sequences; fewer if the text is shorter.
        seq_len: tokens of a sequence.
        seed: seed of the order of the documents.

    Raises:
        ConfigError: fewer tokens are asked for, or in the text, than one sequence has; or a
            document cannot be encoded.
    """
    if num_tokens < seq_len:
        raise ConfigError(
            f"--calibration-tokens {num_tokens} is less than one sequence of {seq_len} tokens"
        )
    bos = tokenizer.tokens.bos if tokenizer.tokens.add_bos else None
    body = seq_len if bos is None else seq_len - 1
    wanted = num_tokens // seq_len * body
    ids: list[int] = []
    for index in _spread_order(len(text.documents), seed):
        ids += text.encode(tokenizer, template, index)
        if len(ids) >= wanted:
            break
    rows = min(len(ids), wanted) // body
    if rows == 0:
        raise ConfigError(
            f"the calibration text {text.name} has {len(ids)} tokens, fewer than one sequence of "
            f"{seq_len}; give a longer text"
        )
    batch = np.array(ids[: rows * body], dtype=np.int64).reshape(rows, body)
    if bos is None:
        return batch
    return np.concatenate([np.full((rows, 1), bos, dtype=np.int64), batch], axis=1)


def _spread_order(count: int, seed: int) -> NDArray[np.intp]:
    """Return an order of numbers whose first ones are evenly spread over all, however many."""
    start = np.random.RandomState(seed).uniform()
    return np.argsort((start + _GOLDEN * np.arange(count)) % 1)


def encode_document(
    tokenizer: Tokenizer, template: ChatTemplate | None, document: Mapping[str, Any]
) -> list[int]:
    """Encode one document of a `CalibrationText`, as the model itself would read it.

    Raises:
        RequestError: the chat template refuses the messages, or a text is no Unicode.
    """
    if "text" in document:
        return tokenizer.encode(document["text"] + "\n\n")
    messages = document["messages"]
    if template is None or not messages or messages[-1].get("role") != "assistant":
        if template is not None:
            return encode_chat(tokenizer, template, messages, add_generation_prompt=False)
        return tokenizer.encode("".join(f"{message.get('content')}\n\n" for message in messages))
    # Templates cut the reasoning out of past answers. So the answer is put after the prompt here,
    # as the model itself would write it: no token reaches from one into the other.
    *prompt, answer = messages
    ids = encode_chat(tokenizer, template, prompt)
    control = tokenizer.control_tokens
    reasoning, content = answer.get("reasoning") or "", answer.get("content") or ""
    opened = prompt_opens_reasoning(tokenizer.decode(ids[-8:]))
    if opened or (reasoning and THINK_END in control):
        if not opened and THINK_START in control:
            ids += [control[THINK_START], *tokenizer.encode("\n")]
        ids += tokenizer.encode(f"{reasoning}\n")
        ids += tokenizer.encode(THINK_END, control=True)
        ids += tokenizer.encode(f"\n\n{content}")
    else:
        ids += tokenizer.encode(f"{reasoning}\n\n{content}" if reasoning else content)
    return [*ids, *tokenizer.tokens.eos[:1]]
