"""Opens checkpoints that embed texts or judge documents, by sentence-transformers' files.

A checkpoint that embeds is recognised by ``modules.json`` and its pooling module. It may lack the
lm_head, and its tensors may lack the prefix ``model.``, since it was saved without the class that
has a head. One that judges documents (Qwen3-Reranker) looks like any other, so `open_checkpoint`
has to be told.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge.bundle.manifest import Embedding, Reranking
from edge.errors import BundleError, CheckpointError
from edge.files import MALFORMED, read_file
from edge.model.names import TOKEN_TABLE
from edge.model.spec import Task

from .checkpoint import Checkpoint, Transformed
from .checkpoint_text import CheckpointText, read_json, read_optional
from .quantization_config import WeightFormat
from .quantized_weight import QuantizedWeight

MODULES_NAME = "modules.json"
_POOLING_NAME = "1_Pooling/config.json"
_PROMPTS_NAME = "config_sentence_transformers.json"
_TEXTS_NAME = "sentence_bert_config.json"
_MAX_MODULES_BYTES = 1 << 20
_MODULE_KINDS = ("Transformer", "Pooling", "Normalize")
_POOLING_MODES = re.compile(r"pooling_mode_\w+")
_LAST_TOKEN = "pooling_mode_lasttoken"
# Their model cards say that vectors may be cut, and to what; none of their files does.
_MATRYOSHKA_FAMILIES = {"qwen3-embedding": 32}
_HEAD = "lm_head.weight"
# From the model card of Qwen3-Reranker.
_JUDGE_PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n"
)
_JUDGE_SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
_JUDGE_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
_JUDGE_CONTROL = ("<|im_start|>", "<|im_end|>")


def find_task(directory: Path) -> Task:
    """Tell what a directory is for: one of sentence-transformers embeds."""
    files = (directory / MODULES_NAME, directory / _POOLING_NAME)
    return "embed" if all(file.exists() for file in files) else "generate"


def read_embedding(
    directory: Path, config: Mapping[str, Any], text: CheckpointText, names: list[str]
) -> Embedding:
    """Read how a checkpoint embeds.

    Args:
        directory: holds, optionally, ``modules.json``, the ``config.json`` of its pooling module,
            ``config_sentence_transformers.json`` and ``sentence_bert_config.json``.
        config: content of ``config.json``.
        text: its tokenizer.
        names: names of the model, which tell its family.

    Raises:
        CheckpointError: a file is invalid, or needs what is not supported: pooling of other than
            the last token, a module after it, texts in lower case, or vectors that are cut.
    """
    normalize = True
    if (directory / MODULES_NAME).exists():
        normalize = _read_modules(directory)
    _refuse_lower_case(directory / _TEXTS_NAME)
    prompts = read_optional(directory / _PROMPTS_NAME)
    named = prompts.get("prompts") or {}
    default = prompts.get("default_prompt_name")
    where = directory / _PROMPTS_NAME
    if not isinstance(named, dict) or not all(isinstance(each, str) for each in named.values()):
        raise CheckpointError(f"{where}: prompts must be texts by name, found {named!r:.80}")
    if default is not None and not (isinstance(default, str) and default in named):
        raise CheckpointError(f"{where}: default_prompt_name {default!r} is none of the prompts")
    cut = prompts.get("truncate_dim")
    if cut not in (None, config.get("hidden_size")):
        raise CheckpointError(
            f"{where}: truncate_dim {cut!r} cuts every vector, a bundle those of requests that say "
            "so; in a local copy delete the key and name the number in matryoshka_dimensions "
            f"of config.json, then ask for dimensions {cut!r}"
        )
    found = Embedding(
        append=_appended(text, directory),
        normalize=normalize,
        prompts=named,
        default_prompt=default,
        least_dimensions=_least_dimensions(config, names, directory),
    )
    try:
        msgspec.json.decode(msgspec.json.encode(found), type=Embedding)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        raise CheckpointError(f"{where}: {error}") from error
    return found


def read_reranking(text: CheckpointText, where: str) -> Reranking:
    """Describe how Qwen3-Reranker judges.

    Raises:
        CheckpointError: the tokenizer lacks the tokens of its prompt.
    """
    try:
        tokenizer = text.tokenizer()
    except BundleError as error:
        raise CheckpointError(f"{where}: {error}") from error
    yes, no = tokenizer.id_of("yes"), tokenizer.id_of("no")
    lacking = [name for name in _JUDGE_CONTROL if name not in tokenizer.control_tokens]
    lacking += [name for name, id_ in (("yes", yes), ("no", no)) if id_ is None]
    if yes is None or no is None or lacking:
        raise CheckpointError(
            f"{where} cannot judge documents (--task rerank): the prompt of Qwen3-Reranker needs "
            f"the tokens {', '.join(lacking)}, which its tokenizer lacks"
        )
    return Reranking(yes, no, _JUDGE_PREFIX, _JUDGE_SUFFIX, _JUDGE_INSTRUCTION)


class Judge(Transformed):
    """A checkpoint whose lm_head keeps only the rows of two answers, ``no`` and ``yes``."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Take the two rows.

        Raises:
            CheckpointError: the tokenizer lacks the tokens that `read_reranking` needs.
        """
        super().__init__(checkpoint)
        self._tied = checkpoint.spec.tied_embeddings
        self.reranking = read_reranking(checkpoint.text, checkpoint.name)
        self.spec = msgspec.structs.replace(checkpoint.spec, task="rerank", tied_embeddings=False)

    def tensor(self, name: str) -> NDArray[Any]:
        """Read a tensor; the lm_head has two rows."""
        if name != _HEAD:
            return self.original.tensor(name)
        head = self.original.tensor(TOKEN_TABLE if self._tied else _HEAD)
        assert self.reranking is not None
        rows: NDArray[Any] = np.ascontiguousarray(head[[self.reranking.no, self.reranking.yes]])
        return rows

    def weight_format(self, name: str) -> WeightFormat | None:
        """Tell how a weight is stored; the lm_head is float here."""
        return None if name == _HEAD else self.original.weight_format(name)

    def quantized_weight(self, name: str) -> QuantizedWeight | None:
        """Read the original's integers."""
        return self.original.quantized_weight(name)


def _read_modules(directory: Path) -> bool:
    """Check the modules after the decoder; return whether vectors are normalized."""
    path = directory / MODULES_NAME
    try:
        data = read_file(path, _MAX_MODULES_BYTES)
        modules = msgspec.json.decode(data, type=list[dict[str, Any]])
        kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (KeyError, *MALFORMED) as error:
        raise CheckpointError(f"{path} is no list of modules ({error!r})") from error
    if tuple(kinds) not in (_MODULE_KINDS, _MODULE_KINDS[:2]):
        raise CheckpointError(
            f"{path} lists the modules {', '.join(kinds) or 'none'}; supported: Transformer, "
            "Pooling and, optionally, Normalize"
        )
    pooling_path = directory / _POOLING_NAME
    pooling = read_json(pooling_path)
    modes = [key for key, value in pooling.items() if _POOLING_MODES.fullmatch(key) and value]
    if pooling.get("pooling_mode") is not None:  # newer releases name one mode
        modes.append(f"pooling_mode_{pooling['pooling_mode']}")
    if set(modes) != {_LAST_TOKEN}:
        raise CheckpointError(
            f"{pooling_path} asks for {', '.join(modes) or 'no pooling'}; only {_LAST_TOKEN} is "
            "supported: every token sees those before it alone"
        )
    return len(kinds) == len(_MODULE_KINDS)


def _refuse_lower_case(path: Path) -> None:
    if read_optional(path).get("do_lower_case"):
        raise CheckpointError(
            f"{path}: do_lower_case is true, and no bundle changes its texts; delete the key from "
            "a local copy, and give texts in lower case"
        )


def _appended(text: CheckpointText, directory: Path) -> tuple[int, ...]:
    """Return the ids that the tokenizer's post-processor puts after a text."""
    processor = msgspec.json.decode(text.tokenizer_json).get("post_processor")
    found = _template_suffix(processor)
    if found is None:
        config = directory / "tokenizer_config.json"
        adds = read_optional(config).get("add_eos_token")
        return text.tokens.eos[:1] if adds is True else ()
    tokenizer = text.tokenizer()
    ids = [tokenizer.control_tokens.get(name) for name in found]
    if None in ids:
        raise CheckpointError(
            f"{directory / 'tokenizer.json'}: its post-processor appends {', '.join(found)}, and "
            "not all of these are control tokens"
        )
    return tuple(id_ for id_ in ids if id_ is not None)


def _template_suffix(processor: Any) -> list[str] | None:
    """List the special tokens that a post-processor appends; None without a template."""
    if not isinstance(processor, dict):
        return None
    processors = processor.get("processors")
    for each in processors if isinstance(processors, list) else ():
        found = _template_suffix(each)
        if found is not None:
            return found
    pieces = processor.get("single")
    if not isinstance(pieces, list):
        return None
    suffix: list[str] = []
    for piece in pieces:
        token = piece.get("SpecialToken") if isinstance(piece, dict) else None
        # Special tokens before the text are not appended.
        suffix = [*suffix, str(token.get("id"))] if isinstance(token, dict) else []
    return suffix


def _least_dimensions(config: Mapping[str, Any], names: list[str], directory: Path) -> int | None:
    """Return the fewest dimensions that vectors may be cut to; None if nothing allows cutting."""
    listed = config.get("matryoshka_dimensions")
    if listed is not None:
        if not isinstance(listed, list) or not listed or not all(type(n) is int for n in listed):
            raise CheckpointError(
                f"{directory / 'config.json'}: matryoshka_dimensions must be a list of integers, "
                f"found {listed!r:.80}"
            )
        return int(min(listed))
    if config.get("is_matryoshka") is True:
        return 1
    lowered = " ".join(names).lower()
    return next((n for family, n in _MATRYOSHKA_FAMILIES.items() if family in lowered), None)
