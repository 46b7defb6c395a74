"""Runs the last step of an export: ``edge-llm eval`` on the staged bundle, in its own process.

The process gives all its memory back, and the exporter needs no runtime. ``--verify`` refuses a
bundle that misses its gate; by default fewer tokens show what the quantization cost.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge.bundle.linears import linear_layers
from edge.bundle.manifest import Dialect, TensorScheme
from edge.bundle.schemes import INT4_GROUP_SIZE
from edge.bundle.weights import Linear
from edge.device.memory import read_available_memory_bytes
from edge.errors import (
    EXIT_GATE_MISSED,
    BackendError,
    BundleError,
    ConfigError,
    DependencyError,
    EdgeError,
    GateError,
    ResourceError,
)
from edge.model.spec import ModelSpec
from edge_lab.measure.compare import CHUNK_TOKENS
from edge_lab.planner.memory import Deployment, plan_process_memory
from edge_make.recipe import Recipe, recipe_linears

from .config import AS_IN_SOURCE, DEFAULT_METHOD, ExportRecipe

VERIFY_TOKENS = 4096
"""Tokens of the held-out text with which the KL divergence is right to about a tenth."""
REPORT_TOKENS = 512
"""Tokens with which it is right to about a fifth: recipes can be told apart in seconds."""
_WINDOW = 512
# The error class of each exit code of the child; every other code is a `BackendError`.
_ERRORS = {
    kind.exit_code: kind for kind in (ConfigError, BundleError, DependencyError, ResourceError)
}


def verify_bundle(
    staged: Path, reference: Path, gate: str, positions: int, target: Path
) -> dict[str, Any]:
    """Measure a bundle and store the result in its manifest, as ``edge-llm eval --save`` does.

    Args:
        staged: the bundle, complete but not in place.
        reference: bundle of the same model with float weights.
        gate: name or file of the gate, as for `edge_lab.measure.evaluate.load_gate`.
        positions: most tokens that the model can take.
        target: where the bundle is to go, for messages.

    Returns:
        The figures, as ``edge-llm eval --json`` prints them.

    Raises:
        GateError: a threshold was missed.
        BackendError: the measurement failed; its own message is on stderr. If that was a
            `ConfigError`, `BundleError`, `DependencyError` or `ResourceError`, that class is
            raised.
    """
    try:
        figures = measure_bundle(staged, reference, positions, VERIFY_TOKENS, "--gate", gate)
    except EdgeError as error:
        raise type(error)(
            f"the bundle could not be verified ({error}), so {target} was not written; export "
            "without --verify to have it anyway"
        ) from error
    if missed := figures["gate"]["missed"]:
        raise GateError(
            f"gate {gate} missed ({'; '.join(missed)}), so {target} was not written; use a recipe "
            "that keeps more bits, a --gate of your own, or leave out --verify",
            figures,
        )
    return figures


def measure_bundle(
    staged: Path, reference: Path, positions: int, tokens: int, *options: str
) -> dict[str, Any]:
    """Measure a bundle and store the result in its manifest, as ``edge-llm eval --save`` does.

    Args:
        staged: the bundle, as in `verify_bundle`.
        reference: the float bundle, as in `verify_bundle`.
        positions: most tokens that the model can take.
        tokens: tokens of the held-out text to measure on.
        options: further options of ``edge-llm eval``.

    Returns:
        The figures, as ``edge-llm eval --json`` prints them.

    Raises:
        BackendError: the measurement failed; other errors are raised as in `verify_bundle`.
    """
    command = [sys.executable, "-m", "edge.cli", "eval", str(staged), "--against", str(reference)]
    command += ["--save", "--json", "--tokens", str(tokens), *options]
    command += ["--window", str(min(_WINDOW, positions))]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode not in (0, EXIT_GATE_MISSED):
        kind = _ERRORS.get(done.returncode, BackendError)
        raise kind(f"exit code {done.returncode}, see above")
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def check_memory(
    model: ModelSpec, schemes: Mapping[str, TensorScheme], dialect: Dialect, positions: int
) -> None:
    """Refuse to measure where both models would not fit into memory together.

    Args:
        model: dimensions of both.
        schemes: the scheme of every linear layer of the bundle, by name.
        dialect: dialect of the graph.
        positions: most tokens that the model can take.

    Raises:
        ResourceError: they would not fit.
    """
    free = read_available_memory_bytes()
    window = min(_WINDOW, positions)
    deployment = Deployment("ort-cpu", 1, window, min(CHUNK_TOKENS, window), dialect)
    quantized = [Linear(each.name, each.shape, schemes[each.name]) for each in linear_layers(model)]
    needed = sum(
        plan_process_memory(model, linears, positions, deployment).load_peak
        for linears in (quantized, recipe_linears(model, Recipe("fp16")))
    )
    if free is not None and needed > free:  # None: the system does not tell
        raise ResourceError(
            f"the bundle and its float model need {needed / 1e9:.1f} GB of memory together, "
            f"{free / 1e9:.1f} GB are free"
        )


def better_recipe(
    recipe: ExportRecipe, schemes: Mapping[str, TensorScheme], *, missed: bool
) -> str | None:
    """Suggest options that lose less, by the tables of docs/quantization.md; None if none is known.

    Args:
        recipe: how its numbers are stored, `ExportRecipe.resolved`.
        schemes: the scheme of every linear layer, by name.
        missed: whether a gate was missed, so that more bits are suggested, too.
    """
    if recipe.quant == AS_IN_SOURCE:
        return None  # nobody knows what the source lost
    int4 = {name: s for name, s in schemes.items() if s.kind == "int4"}
    if "lm_head" in int4:
        return "--keep lm_head=int8"
    if any(scheme.group_size > INT4_GROUP_SIZE for scheme in int4.values()):
        return f"--group-size {INT4_GROUP_SIZE}"
    if int4 and recipe.rounding != DEFAULT_METHOD:
        return f"--method {DEFAULT_METHOD}"
    if not missed:
        return None
    return "--quant int8" if int4 or recipe.quant == "int8-w8a8" else "--quant fp16"
