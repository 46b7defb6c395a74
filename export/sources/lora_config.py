"""Tells which modules a LoRA adapter in peft's layout changes, by ``peft.LoraConfig``'s rules.

`edge.adapters.peft_config` reads ``adapter_config.json`` and refuses unsupported keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from edge.adapters.peft_config import ADAPTER_CONFIG, PeftConfig, parse_config
from edge.errors import CheckpointError

from .checkpoint_text import read_json
from .untrusted_pattern import match

Number = TypeVar("Number", int, float)


class LoraConfig(PeftConfig, frozen=True):
    """The keys of ``adapter_config.json`` that decide the merge."""

    def rank(self, module: str) -> int:
        """Return the rank of a module's two matrices."""
        return _pattern_value(self.rank_pattern, module, self.r)

    def scaling(self, module: str) -> float:
        """Return the factor on ``B @ A`` of a module."""
        alpha = _pattern_value(self.alpha_pattern, module, self.lora_alpha)
        return self.factor(self.rank(module), alpha)

    def targets(self, module: str) -> bool:
        """Return whether a linear or embedding has low-rank matrices, by peft's rules."""
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
        """Return whether the adapter holds the module's whole weight (``modules_to_save``)."""
        # The name may begin anywhere, not only at a dot: peft takes "norm" for input_layernorm too.
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
            message names the key.
    """
    path = directory / ADAPTER_CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"--lora {directory} has no {ADAPTER_CONFIG}; name the directory that peft's "
            "save_pretrained wrote"
        )
    config = parse_config(read_json(path), path, LoraConfig)
    _check_patterns(config, path)
    return config


def _check_patterns(config: LoraConfig, path: Path) -> None:
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
    """Return the value of the first pattern that matches the end of the module's name."""
    for pattern, value in patterns.items():
        if match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _is_match(pattern: str, module: str) -> bool:
    """Return whether the pattern matches the whole name, as `re.fullmatch` tells."""
    return match(rf"(?:{pattern})\Z", module) is not None
