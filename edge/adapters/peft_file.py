"""Reads a LoRA as ``peft`` saves it: ``adapter_config.json`` and ``adapter_model.safetensors``.

Nothing is used before the whole file fits the bundle: its keys, the name and shape of every tensor,
and its rank. Values are checked while they are copied.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.bundle.linears import LinearSpec, linear_layers
from edge.bundle.manifest import Manifest
from edge.errors import CheckpointError
from edge.files import MALFORMED, is_file, read_file

from .peft_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PAIR, PREFIX, PeftConfig, parse_config
from .safetensors_header import TensorEntry, read_header
from .trust import check_trusted
from .weights import AdapterWeights, Floats

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
"""Types of the weights of an adapter."""
_MOST_CONFIG_BYTES, _MOST_HEADER_BYTES, _MOST_TOKENIZER_BYTES = 1 << 20, 1 << 24, 1 << 26
_HUB_ID = re.compile(r"[\w-][\w.-]*/([\w.-]+)", re.ASCII)
_PLAIN = re.compile(r"\^?(\w|\\?\.)+", re.ASCII)
_MERGE = "merge it instead: edge-llm export --lora"


def adapter_files(path: Path) -> tuple[Path, Path]:
    """Return the config and the weights of an adapter, given its directory or its weights file.

    Raises:
        CheckpointError: the files are missing, or the weights are pickled.
    """
    weights = path if path.suffix == ".safetensors" else path / ADAPTER_WEIGHTS
    config = weights.with_name(ADAPTER_CONFIG)
    if not is_file(weights):
        pickled = path if path.suffix == ".bin" else weights.with_suffix(".bin")
        if is_file(pickled):
            raise CheckpointError(
                f"{pickled} is pickled, can run code and is never opened; convert it where you "
                "trust it, with save_pretrained(..., safe_serialization=True) of peft"
            )
        raise CheckpointError(
            f"{path} has no {ADAPTER_WEIGHTS}; name the directory that save_pretrained of peft "
            "wrote, or the file of its weights"
        )
    if not is_file(config):
        raise CheckpointError(
            f"{weights} has no {ADAPTER_CONFIG} beside it, which says how its weights are scaled; "
            "copy the whole directory that save_pretrained of peft wrote"
        )
    return config, weights


def read_adapter(
    path: Path,
    name: str,
    manifest: Manifest,
    most_rank: int,
    *,
    bundle: Path | None = None,
    trusted_keys: Path | None = None,
    dtype: type[np.float16] | type[np.float32] = np.float32,
) -> AdapterWeights:
    """Read an adapter and check that it fits its bundle.

    Args:
        path: directory of the adapter, or the file of its weights.
        name: name by which requests choose it.
        manifest: manifest of the bundle.
        most_rank: the rank that the bundle was exported for.
        bundle: the bundle's directory; its tokenizer is compared with the adapter's, if it has one.
        trusted_keys: file of trusted keys, for `edge.adapters.trust`.
        dtype: type of the returned tensors.

    Raises:
        CheckpointError: the adapter is not a plain LoRA of linear layers, is for another base, has
            a higher rank or values that ``dtype`` cannot hold, or lacks a required signature.
        ConfigError: the file of trusted keys cannot be used.
    """
    config_path, weights_path = adapter_files(path)
    try:
        config_bytes = read_file(config_path, _MOST_CONFIG_BYTES)
        config = parse_adapter_config(config_bytes, config_path)
        _check_base(config, manifest, config_path)
        if bundle is not None and manifest.vocabulary is None:
            _check_tokenizer(weights_path.with_name("tokenizer.json"), bundle / "tokenizer.json")
        linears = [each for each in linear_layers(manifest.model) if each.name != "lm_head"]
        most = sum(len(each.rows) * each.shape[0] + each.shape[1] for each in linears) * most_rank
        data = read_file(weights_path, 4 * most + _MOST_HEADER_BYTES)
        hashes = [hashlib.sha256(each) for each in (config_bytes, data)]
        check_trusted(path, weights_path, hashes, trusted_keys)
        entries = read_header(io.BytesIO(data), weights_path, ITEM_BYTES)
    except OSError as error:
        raise CheckpointError(f"cannot read the adapter {path}: {error.strerror}") from error
    found = _sort(weights_path, entries, config, linears, most_rank)
    rank = max(entry.shape[0] for parts in found.values() for entry, _ in parts.values())
    tensors = {
        each.name: _join(weights_path, data, each, found[each.name], config, rank, dtype)
        for each in linears
        if found[each.name]
    }
    digest = hashlib.sha256(b"".join(each.digest() for each in hashes))
    return AdapterWeights(name, digest.hexdigest(), rank, tensors)


def parse_adapter_config(data: bytes, path: Path) -> PeftConfig:
    """Read ``adapter_config.json`` of an adapter that can be switched at run time.

    Args:
        data: its content.
        path: for messages.

    Raises:
        CheckpointError: it is no JSON, or of no such adapter.
    """
    try:
        values = json.loads(data)
    except MALFORMED as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(values).__name__}")
    config = parse_config(values, path, PeftConfig)
    for key, given in (("modules_to_save", config.modules_to_save), ("bias", config.bias)):
        if given not in (None, [], "none"):
            raise CheckpointError(
                f"{path}: {key} is {given!r:.80}, and only low-rank sums of linear layers can be "
                f"switched at run time; {_MERGE}"
            )
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        if not _PLAIN.fullmatch(pattern):
            raise CheckpointError(
                f"{path}: the pattern {pattern!r:.80} is a regular expression of a stranger, which "
                f"nothing runs here; write the names of the modules, or {_MERGE}"
            )
    return config


def _check_base(config: PeftConfig, manifest: Manifest, path: Path) -> None:
    """Compare the base model's name with the bundle's, if both are names of published models."""
    given = _HUB_ID.fullmatch(config.base_model_name_or_path or "")
    if given is None or manifest.source.kind != "hub":
        return
    theirs, ours = given[1].lower(), manifest.source.location.rpartition("/")[2].lower()
    if not (theirs.startswith(ours) or ours.startswith(theirs)):  # one may end with -bnb-4bit
        raise CheckpointError(
            f"{path}: the adapter was trained over {given[0]}, and this bundle is of "
            f"{manifest.source.location}; use a bundle of its base"
        )


def _check_tokenizer(theirs: Path, ours: Path) -> None:
    if not is_file(theirs):
        return
    try:
        pair = [json.loads(read_file(each, _MOST_TOKENIZER_BYTES)) for each in (theirs, ours)]
        given, known = (each["model"]["vocab"] for each in pair)
        known = known if isinstance(given, dict) else {str(token): token for token in known}
        wrong = next(
            (t for t in given if isinstance(given, dict) and known.get(t) != given[t]), None
        )
    except (*MALFORMED, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{theirs} cannot be compared with the bundle's tokenizer: {error!r:.80}; copy the "
            "adapter again, or leave its tokenizer out"
        ) from error
    if wrong is not None:
        raise CheckpointError(
            f"{theirs} has another id for {wrong!r:.40} than the bundle's tokenizer; the adapter "
            "is for another base model"
        )


def _sort(
    path: Path,
    entries: Mapping[str, TensorEntry],
    config: PeftConfig,
    linears: list[LinearSpec],
    most_rank: int,
) -> dict[str, dict[int, tuple[TensorEntry, TensorEntry]]]:
    """Find A and B of each module; returns them by joined linear and the module's place in it."""
    left = dict(entries)
    found: dict[str, dict[int, tuple[TensorEntry, TensorEntry]]] = {}
    for linear in linears:
        parts = found[linear.name] = {}
        for place, (weight, rows) in enumerate(zip(linear.weights, linear.rows, strict=True)):
            module = weight.removesuffix(".weight")
            names = [f"{PREFIX}{module}{ending}" for ending in PAIR]
            if left.keys().isdisjoint(names):
                continue
            rank = _of_module(config.rank_pattern, module, config.r)
            if rank > most_rank:
                raise CheckpointError(
                    f"{path}: {module} has rank {rank}, and this bundle takes adapters of rank "
                    f"{most_rank} at most; export it with --adapters {rank}"
                )
            shapes = (rank, linear.shape[0]), (rows, rank)
            for name, shape in zip(names, shapes, strict=True):
                if name not in left:
                    raise CheckpointError(f"{path} has no {name}, the other half of a pair")
                if left[name].shape != shape:
                    raise CheckpointError(
                        f"{path}: {name} has shape {list(left[name].shape)}, the bundle and r in "
                        f"the config ask for {list(shape)}; the adapter is for another base model"
                    )
            parts[place] = left.pop(names[0]), left.pop(names[1])
    if left:
        name = min(left)
        what = "belongs to no linear layer of this bundle; the adapter is for another base model"
        if "embed_tokens" in name or "lm_head" in name:
            what = f"is of a table of tokens, which no adapter changes at run time; {_MERGE}"
        raise CheckpointError(f"{path}: {name} {what}")
    if not any(found.values()):
        raise CheckpointError(f"{path} holds no tensors, so it changes nothing; copy it again")
    return found


def _of_module(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of a module's name."""
    for pattern, value in patterns.items():
        stem = pattern.removeprefix("^").replace("\\.", ".")
        is_end = pattern[0] != "^" and module.endswith(f".{stem}")
        if module == stem or is_end:
            return value
    return default


def _join(
    path: Path,
    data: bytes,
    linear: LinearSpec,
    parts: Mapping[int, tuple[TensorEntry, TensorEntry]],
    config: PeftConfig,
    rank: int,
    dtype: type[np.float16] | type[np.float32],
) -> tuple[Floats, Floats]:
    """Stack the A of a joined linear's modules, and place their scaled B block-diagonally."""
    count = len(linear.rows)
    a = np.zeros((count * rank, linear.shape[0]), dtype)
    b = np.zeros((linear.shape[1], count * rank), dtype)
    for place, entries in parts.items():
        module = linear.weights[place].removesuffix(".weight")
        own = entries[0].shape[0]
        alpha = _of_module(config.alpha_pattern, module, config.lora_alpha)
        low, high = (_values(data, entry) for entry in entries)
        first, row = place * rank, sum(linear.rows[:place])
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused below
            a[first : first + own] = low
            scaled = high * np.float32(config.factor(own, alpha))
            b[row : row + linear.rows[place], first : first + own] = scaled
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise CheckpointError(
            f"{path}: the weights for {linear.name} hold a NaN or values beyond {np.dtype(dtype)}; "
            "train the adapter again, or copy it again"
        )
    return a, b


def _values(data: bytes, entry: TensorEntry) -> NDArray[np.float32]:
    raw = np.frombuffer(data, np.uint8, entry.end - entry.begin, entry.begin)
    if entry.dtype == "BF16":
        floats = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        floats = raw.view("<f2" if entry.dtype == "F16" else "<f4").astype(np.float32)
    return floats.reshape(entry.shape)
