"""``edge-llm doctor``: does this machine run a bundle, and if not, why and what to do."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from edge.cli import echo_json
from edge.cli.options import BundlePath, json_option

from .options import Finite

if TYPE_CHECKING:
    from edge_lab.doctor import Check

_STYLES = {"ok": "green", "warn": "yellow", "fail": "red", "skip": "dim"}


@click.command()
@click.argument("bundle", required=False, type=BundlePath())
@json_option
@click.option(
    "--wait-gpu",
    type=Finite(0, 3600),
    metavar="SECONDS",
    help="Wait this long for the GPU, as after boot, and fail if there is none.",
)
@click.option(
    "--schemes/--no-schemes",
    default=True,
    help="Whether to build an engine of one layer for each precision, to see what TensorRT takes.",
)
def doctor(bundle: Path | None, as_json: bool, wait_gpu: float | None, schemes: bool) -> int:
    """Check driver, GPU, TensorRT, ONNX Runtime, power, memory, and BUNDLE, step by step.

    Exit codes: 0 nothing failed, 65 damaged file, 69 driver, GPU or library unavailable, 71 too
    little memory, 77 no permission for a device node, 78 no engine for this machine.
    """
    from edge_lab.doctor import exit_code, run_checks, summary
    from edge_lab.telemetry import read_snapshot

    checks = run_checks(bundle=bundle, wait_gpu_s=wait_gpu, schemes=schemes)
    code = exit_code(checks)
    if as_json:
        echo_json(
            {
                "exit_code": code,
                "summary": summary(checks),
                "checks": [asdict(check) for check in checks],
                "snapshot": msgspec.to_builtins(read_snapshot()),
            }
        )
    else:
        _print(checks)
    return code


def _print(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.text import Text

    from edge_lab.doctor import summary

    console = Console(markup=False, highlight=False)
    width = max(len(check.name) for check in checks)
    for check in checks:
        line = Text(f"{check.status:<5}", _STYLES[check.status])
        console.print(line + f"{check.name:<{width}}  {check.detail}", soft_wrap=True)
        if check.status in ("warn", "fail"):
            for label, text in (("cause", check.cause), ("cure", check.cure)):
                if text:
                    console.print(f"     {label:<5}  {text}", soft_wrap=True)
    console.print("", summary(checks), sep="\n", soft_wrap=True)
