"""Reads recipes: the options of a quantization, in a TOML or JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from edge.bundle.quant_rules import Quant
from edge.errors import ConfigError, DependencyError, install_command
from edge.files import MALFORMED, read_file
from edge_make.recipe import Clip

_MAX_BYTES = 1 << 20


class _RecipeFile(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    quant: Quant | Literal["source"] | None = None
    method: Literal["rtn", "awq", "gptq", "awq+gptq"] | None = None
    group_size: int | None = None
    keep: dict[str, str] | None = None
    clip: Clip | None = None
    dtype: Literal["fp16", "bf16"] | None = None
    calibration: str | None = None
    calibration_tokens: int | None = None
    seed: int | None = None
    rotate: bool | None = None
    embeddings: Literal["fp16", "int8"] | None = None


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe in TOML or, if the file's name ends with ``.json``, in JSON.

    The keys are the options of ``edge-llm export`` in snake case; ``keep`` is a table from pattern
    to scheme. A relative ``calibration`` starts from the recipe's directory.

    Returns:
        Arguments of `pipeline.ExportConfig`, for the keys that the file has.

    Raises:
        ConfigError: the file cannot be read, or has an unknown key or a wrong value, which the
            message names.
        DependencyError: the file is TOML, on Python 3.10 without the package tomli.
    """
    decode = msgspec.json.decode if path.suffix.lower() == ".json" else msgspec.toml.decode
    try:
        recipe = decode(read_file(path, _MAX_BYTES), type=_RecipeFile)
    except OSError as error:
        raise ConfigError(f"--recipe {path} cannot be read: {error.strerror}") from error
    except ImportError as error:
        raise DependencyError(
            "recipes in TOML need the package tomli before Python 3.11; install it with: "
            f"{install_command('export')}"
        ) from error
    except MALFORMED as error:
        raise ConfigError(f"--recipe {path} is not valid: {error}") from error
    options: dict[str, Any] = {
        name: value for name, value in msgspec.structs.asdict(recipe).items() if value is not None
    }
    if "keep" in options:
        options["keep"] = tuple(options["keep"].items())
    if "calibration" in options:
        if "\0" in options["calibration"]:
            raise ConfigError(
                f"--recipe {path}: calibration is no path: {options['calibration']!r}"
            )
        options["calibration"] = path.parent / options["calibration"]
    return options
