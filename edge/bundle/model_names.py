"""Finds models of the catalogue by their names, and names their bundles."""

from __future__ import annotations

import difflib

from edge.errors import ConfigError

from .library import ALIKE, CATALOGUE, catalogue_line, named_models, size_fits


def bundle_name(hub_id: str, quantization: str) -> str:
    """Name the bundle of a model, e.g. ``deepseek-r1-distill-qwen-1.5b-int4``.

    Args:
        hub_id: the hub id, or a `hub_address`.
        quantization: the quantization, as in ``--quant``.
    """
    return f"{hub_id.rsplit('/', 1)[-1].lower().replace(':', '-')}-{quantization}"


def hub_id(name: str) -> str | None:
    """Return the hub id of a model of the `CATALOGUE`, by any of its names in any case.

    These are the short name, the hub id with or without its owner, and a family alone for its size
    in `LATEST`: ``qwen3:4b``, ``Qwen3-4B``, ``llama3.2``. An R1 distill has as names the words of
    both that include ``r1``, and its size alone: ``r1-qwen-1.5b``, ``1.5B``.

    Returns:
        None if no such model has this name.

    Raises:
        ConfigError: it could be more than one; the message names them.
    """
    found = named_models(name)
    if len(found) > 1:
        shown = (f"{short} ({CATALOGUE[short].rpartition('/')[2]})" for short in found)
        raise ConfigError(f"{name!r} could be {' or '.join(shown)}; give one of these names")
    return CATALOGUE[found[0]] if found else None


def nearest_model(name: str) -> str:
    """Say which name of the `CATALOGUE` is nearest to a name, or which names there are."""
    wanted = name.lower()
    fitting = [short for short in CATALOGUE if size_fits(wanted, short)]
    near = difflib.get_close_matches(wanted, fitting, 1, ALIKE)
    return f"did you mean {near[0]}?" if near else f"known: {catalogue_line()}"
