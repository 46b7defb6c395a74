"""The last step of an export: ``edge-llm eval`` on the staged bundle, in a process of its own.

The process gives all its memory back, and the exporter needs nothing of the runtime.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from edge.cli.eval import EXIT_GATE_MISSED
from edge.errors import (
    BackendError,
    BundleError,
    ConfigError,
    DependencyError,
    EdgeError,
    ResourceError,
)

VERIFY_TOKENS = 4096
"""Of the held-out text; gives the KL divergence to about a tenth of its value."""
_WINDOW = 512
# What the child's exit code says of its error; every other one is the engine's.
_ERRORS = {
    kind.exit_code: kind for kind in (ConfigError, BundleError, DependencyError, ResourceError)
}


class GateError(EdgeError):
    """The finished bundle misses a threshold of its gate.

    Attributes:
        figures: everything that was measured, as ``edge-llm eval --json`` prints it.
    """

    exit_code = 65

    def __init__(self, message: str, figures: dict[str, Any]) -> None:
        super().__init__(message, figures)  # pickle and copy rebuild it from these
        self.message = message
        self.figures = figures

    def __str__(self) -> str:
        return self.message


def verify_bundle(
    staged: Path, reference: Path, gate: str, positions: int, target: Path
) -> dict[str, Any]:
    """Measure a bundle and store the result in its manifest, as ``edge-llm eval --save`` does.

    Args:
        staged: the bundle, complete but not in place.
        reference: bundle of the same model with float weights.
        gate: name or file, see `edge.evaluate.load_gate`.
        positions: tokens that the model can take at most.
        target: where the bundle would go, for messages.

    Returns:
        What was measured.

    Raises:
        GateError: a threshold was missed.
        BackendError: the measurement failed; its own message is on stderr. Where that was a
            `ConfigError`, `BundleError`, `DependencyError` or `ResourceError`, this one is it too.
    """
    command = [sys.executable, "-m", "edge.cli", "eval", str(staged), "--against", str(reference)]
    command += ["--gate", gate, "--save", "--json", "--tokens", str(VERIFY_TOKENS)]
    command += ["--window", str(min(_WINDOW, positions))]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode not in (0, EXIT_GATE_MISSED):
        raise _ERRORS.get(done.returncode, BackendError)(
            f"the bundle could not be verified (exit code {done.returncode}, see above), so "
            f"{target} was not written; export without --verify to have it anyway"
        )
    figures: dict[str, Any] = json.loads(done.stdout)
    if missed := figures["gate"]["missed"]:
        raise GateError(
            f"gate {gate} missed ({'; '.join(missed)}), so {target} was not written; use a recipe "
            "that keeps more bits, a --gate of your own, or leave out --verify",
            figures,
        )
    return figures
