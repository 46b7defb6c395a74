"""Reads the files that the settings name, except bundles, so that errors stop a start at once."""

from __future__ import annotations

from dataclasses import dataclass

from edge.errors import ConfigError
from edge_lab.measure.drift import DriftMonitor, read_counts

from .http.access import APIKeys
from .models.route import AUTO, Rule, Split, read_routes
from .settings import ServerSettings


@dataclass(frozen=True)
class Inputs:
    """The inputs of a service besides bundles and a port.

    Attributes:
        rules: rules of the model ``auto``, in order.
        splits: A/B splits by their name.
        keys: keys that clients may use; None lets everyone in.
        drift: counts requests and compares them with the baseline, if there is one.
    """

    rules: list[Rule]
    splits: dict[str, Split]
    keys: APIKeys | None
    drift: DriftMonitor


def read_inputs(settings: ServerSettings) -> Inputs:
    """Check the settings against each other and read the files that they name.

    Raises:
        ConfigError: there is no model; the default model is not one of them; ``admin_keys`` or
            ``key_adapters`` names an unknown key; or the rules, splits, keys or the baseline cannot
            be used.
    """
    if not settings.model:
        raise ConfigError("no model to serve; give a bundle, or --model BUNDLE for each one")
    default = settings.default_model
    if default is not None and default not in {AUTO, *settings.model, *settings.split}:
        raise ConfigError(f"the default model {default!r} is not one of those to serve")
    rules, splits = read_routes(settings.auto, settings.split, settings.model)
    path, baseline = settings.api_key_file, settings.drift_baseline
    keys = None if path is None else APIKeys(path)
    for setting in ("admin_keys", "key_adapters"):
        if keys and (missing := [x for x in getattr(settings, setting) if x not in keys.names]):
            raise ConfigError(
                f"{setting} names {', '.join(missing)}, and {path} has no key of that name; it has "
                f"{', '.join(keys.names)}"
            )
    return Inputs(
        rules,
        splits,
        keys,
        DriftMonitor(None if baseline is None else read_counts(baseline), settings.drift_window),
    )
