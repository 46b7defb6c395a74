"""Checks ``adapter_config.json`` of a LoRA in peft's layout, and reads its rank and scale.

The keys are those of ``peft.LoraConfig`` (0.21). An adapter that is more than a plain low-rank sum
is refused by the name of the key that makes it so. A key that this version does not know is refused
unless it is switched off. `export` uses it for adapters that it merges, and
`edge.adapters.peft_file` for adapters that are switched at run time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edge.errors import CheckpointError

Config = TypeVar("Config", bound="PeftConfig")

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Precedes a module's name in `ADAPTER_WEIGHTS`."""
PAIR = (".lora_A.weight", ".lora_B.weight")
"""Follow the name of a linear module in `ADAPTER_WEIGHTS`."""
_OFF: tuple[Any, ...] = (None, False, "", [], {})
# Without effect on a finished adapter: where it came from, how it was trained or initialized.
_INFORMATIVE = {
    "auto_mapping",
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
# These initializations take a part out of the base model's weights before training starts, so the
# adapter no longer fits the base model. LoftQ does too, but its base is a checkpoint of its own.
_MOVES_THE_BASE = ("pissa", "corda", "olora", "lora_ga", "mica")


class PeftConfig(msgspec.Struct, frozen=True):
    """The keys of ``adapter_config.json`` that decide what the adapter computes.

    ``fan_in_fan_out`` is not among them: it describes base models whose weights are ``[in, out]``,
    and peft switches it off for linear layers, which is all that our architectures have.
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
    base_model_name_or_path: str | None = None

    def factor(self, rank: int, alpha: float) -> float:
        """Return the factor on ``B @ A``: alpha / r; rsLoRA: alpha / sqrt(r) (arXiv 2312.03732)."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def parse_config(values: Mapping[str, Any], path: Path, kind: type[Config]) -> Config:
    """Check the content of ``adapter_config.json``.

    Args:
        values: the JSON object.
        path: the file's path, for messages.
        kind: the struct to return.

    Raises:
        CheckpointError: a value has a wrong type, or the adapter is not a plain LoRA; the message
            names the key.
    """
    peft_type = values.get("peft_type")
    if peft_type != "LORA":
        raise CheckpointError(
            f"{path}: peft_type is {peft_type!r:.80}, only LORA can be used; merge it with peft "
            "(merge_and_unload) and export the result"
        )
    known = {*PeftConfig.__struct_fields__, *_INFORMATIVE}
    for key, value in values.items():
        if key not in known and value not in _OFF:
            raise CheckpointError(
                f"{path}: {key:.80} is {value!r:.80}: not a plain LoRA, so it cannot be used here; "
                "merge it with peft (merge_and_unload) and export the result"
            )
    # peft writes null where a dictionary or a switch was left out.
    given = {key: value for key, value in values.items() if value is not None}
    try:
        config = msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path} does not fit a LoRA of peft: {error}") from error
    _check_values(config, path)
    return config


def _check_values(config: PeftConfig, path: Path) -> None:
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
