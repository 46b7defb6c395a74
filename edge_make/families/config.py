"""Reads the numbers of a model, by the names that Hugging Face's ``config.json`` has for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from edge.errors import CheckpointError
from edge.model.spec import MAX_LAYERS

_MOST = {
    "num_hidden_layers": MAX_LAYERS,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 20,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "head_dim": 4096,
    "vocab_size": 1 << 22,
}


class Config:
    """Typed access to the numbers of a model; every error names the file and the key.

    Args:
        values: the numbers by key.
        where: path of the file, for errors.
        defaults: values of absent keys.
        name: tells what the file calls a key.
        remedy: what to do about a key that is missing.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        where: str,
        *,
        defaults: Mapping[str, Any] | None = None,
        name: Callable[[str], str] = str,
        remedy: str = "copy the config.json of the original model",
    ) -> None:
        self.values = values
        self.where = where
        self.defaults = defaults or {}
        self._name = name
        self._remedy = remedy

    def get(self, key: str) -> Any:
        """Return the raw value; absent and ``null`` are the same, as in ``transformers``."""
        return self.values.get(key)

    def error(self, key: str, problem: str) -> CheckpointError:
        """Return an error about a key."""
        return CheckpointError(f"{self.where}: {self._name(key)} {problem}")

    def integer(self, key: str, default: int | None = None) -> int:
        """Read a number of things, at least one.

        Raises:
            CheckpointError: it is something else, missing, or larger than of any model.
        """
        value = self._required(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(key, f"must be an integer, found {value!r:.80}")
        if value < 1:
            raise self.error(key, f"must be at least 1, found {value}")
        if value > _MOST.get(key, 1 << 62):
            raise self.error(key, f"must be at most {_MOST.get(key, 1 << 62)}, found {value:.4g}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Read a positive number.

        Raises:
            CheckpointError: it is something else, or missing.
        """
        value = self._required(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self.error(key, f"must be a number, found {value!r:.80}")
        try:
            number = float(value)
        except OverflowError:  # an integer of more than 308 digits
            number = math.inf
        if not (math.isfinite(number) and number > 0):
            raise self.error(key, f"must be positive and finite, found {value!r:.80}")
        return number

    def boolean(self, key: str, default: bool = False) -> bool:
        """Read a truth value.

        Raises:
            CheckpointError: it is something else.
        """
        value = self._required(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, found {value!r:.80}")
        return value

    def section(self, key: str) -> dict[str, Any]:
        """Read an object; an absent one is empty.

        Raises:
            CheckpointError: it is something else.
        """
        value = self._required(key, {})
        if not isinstance(value, dict):
            raise self.error(key, f"must be an object, found {value!r:.80}")
        return value

    def _required(self, key: str, default: Any) -> Any:
        for value in (self.get(key), self.defaults.get(key), default):
            if value is not None:
                return value
        raise self.error(key, f"is missing; {self._remedy}")
