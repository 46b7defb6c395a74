"""``adapter_config.json`` of a LoRA adapter in peft's layout: which modules, what rank and scale.

The keys are those of ``peft.LoraConfig`` (0.21). A key that changes what the adapter computes and
is not a plain low-rank sum is refused by name, as is a key that this version does not know, unless
it is switched off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edge.errors import CheckpointError

from .checkpoint_text import read_json
from .untrusted_pattern import match

Number = TypeVar("Number", int, float)

ADAPTER_CONFIG = "adapter_config.json"
_OFF: tuple[Any, ...] = (None, False, "", [], {})
# Of no effect on a finished adapter: where it came from, how it was trained or initialized.
_INFORMATIVE = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
    "velora_config",
}
# These take a part out of the base model's weights before training starts, so that the adapter
# does not fit the base model any more. LoftQ does too, but its base is a checkpoint of its own.
_MOVES_THE_BASE = ("pissa", "corda", "olora", "lora_ga", "mica")


class LoraConfig(msgspec.Struct, frozen=True):
    """What of ``adapter_config.json`` decides the merge.

    ``fan_in_fan_out`` describes base models whose weights are ``[in, out]``; peft switches it off
    for linear layers, which is all that our architectures have, so it decides nothing.
    """

    r: int
    lora_alpha: float
    target_modules: str | list[str]
    use_rslora: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_lora_weights: bool | str | None = True
    ensure_weight_tying: bool = False

    def rank(self, module: str) -> int:
        """Rank of a module's two matrices."""
        return _pattern_value(self.rank_pattern, module, self.r)

    def scaling(self, module: str) -> float:
        """Factor on ``B @ A``: alpha / r, with rsLoRA alpha / sqrt(r) (arXiv 2312.03732)."""
        rank = self.rank(module)
        alpha = _pattern_value(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, module: str) -> bool:
        """Whether a linear or embedding module has low-rank matrices, by peft's rules."""
        saved = (rf"(^|.*\.){name}($|\..*)" for name in self.modules_to_save or ())
        if _names(self.exclude_modules, module) or any(match(name, module) for name in saved):
            return False
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == "all-linear":
                return not module.endswith(("lm_head", "embed_tokens"))
            return _is_match(self.target_modules, module)
        if module in self.target_modules:
            return True
        return _names(self.target_modules, module) and self._in_a_chosen_layer(module)

    def saves(self, module: str) -> bool:
        """Whether the adapter holds the module's whole weight (``modules_to_save``)."""
        # Not at a dot: peft takes "norm" for input_layernorm too.
        return any(module.endswith(name) for name in self.modules_to_save or ())

    def _in_a_chosen_layer(self, module: str) -> bool:
        chosen = self.layers_to_transform
        if chosen is None or chosen == []:
            return True
        patterns = self.layers_pattern or r"[^.]*"
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            layer = match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module)
            if layer is not None:
                number = layer[1] or ""
                if not number.isdecimal():
                    raise CheckpointError(
                        f"{ADAPTER_CONFIG}: layers_pattern {pattern!r:.80} has groups of its own; "
                        "write it without parentheses"
                    )
                return int(number) in ([chosen] if isinstance(chosen, int) else chosen)
        return False


def read_lora_config(directory: Path) -> LoraConfig:
    """Read and check ``adapter_config.json``.

    Raises:
        CheckpointError: no such file, a wrong type, or an adapter that is not a plain LoRA; the
            key is named.
    """
    path = directory / ADAPTER_CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"--lora {directory} has no {ADAPTER_CONFIG}; name the directory that peft's "
            "save_pretrained wrote"
        )
    values = read_json(path)
    kind = values.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{path}: peft_type is {kind!r}, only LORA can be merged; merge it with peft "
            "(merge_and_unload) and export the result"
        )
    known = {*LoraConfig.__struct_fields__, *_INFORMATIVE}
    for key, value in values.items():
        if key not in known and value not in _OFF:
            raise CheckpointError(
                f"{path}: {key} is {value!r:.80}: not a plain LoRA, so it cannot be merged here; "
                "merge it with peft (merge_and_unload) and export the result"
            )
    # peft writes null where a dictionary or a switch was left out.
    given = {key: value for key, value in values.items() if value is not None}
    try:
        config = msgspec.convert(given, LoraConfig)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path} does not fit a LoRA of peft: {error}") from error
    _check_values(config, path)
    return config


def _check_values(config: LoraConfig, path: Path) -> None:
    ranks = {"r": config.r, **{f"rank_pattern {k!r}": v for k, v in config.rank_pattern.items()}}
    for key, rank in ranks.items():
        if rank < 1:
            raise CheckpointError(f"{path}: {key} must be at least 1, found {rank}")
    for alpha in (config.lora_alpha, *config.alpha_pattern.values()):
        if not math.isfinite(alpha):
            raise CheckpointError(f"{path}: lora_alpha and alpha_pattern must be finite")
    method = config.init_lora_weights
    if isinstance(method, str) and method.lower().startswith(_MOVES_THE_BASE):
        raise CheckpointError(
            f"{path}: init_lora_weights is {method!r}, which changed the base model's weights too; "
            "convert the adapter (peft's save_pretrained with "
            "path_initial_model_for_weight_conversion), or export the changed base model with a "
            "config that says true"
        )
    if isinstance(config.target_modules, str) and config.layers_to_transform not in (None, []):
        raise CheckpointError(
            f"{path}: layers_to_transform has no effect where target_modules is one pattern; "
            "leave one of them out"
        )
    patterns: dict[str, Any] = {
        "target_modules": config.target_modules,
        "exclude_modules": config.exclude_modules,
        "layers_pattern": config.layers_pattern,
        "modules_to_save": config.modules_to_save,
        "rank_pattern": list(config.rank_pattern),
        "alpha_pattern": list(config.alpha_pattern),
    }
    for key, value in patterns.items():
        for pattern in [value] if isinstance(value, str) else value or ():
            try:
                match(pattern, "")
            except CheckpointError as error:
                raise CheckpointError(f"{path}: {key}: {error}") from error


def _names(choice: str | list[str] | None, module: str) -> bool:
    if isinstance(choice, str):
        return _is_match(choice, module)
    return any(module == name or module.endswith(f".{name}") for name in choice or ())


def _pattern_value(patterns: Mapping[str, Number], module: str, default: Number) -> Number:
    """The first pattern that matches the end of the module's name wins."""
    for pattern, value in patterns.items():
        if match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _is_match(pattern: str, module: str) -> bool:
    """Whether the pattern is the whole name, as `re.fullmatch` tells."""
    return match(rf"(?:{pattern})\Z", module) is not None
