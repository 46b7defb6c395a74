"""``edge-llm prove``: one run that shows what a device does, and a report that can be sent."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge.cli import echo_json
from edge.cli.options import FILE, json_option
from edge.cli.sections import SectionCommand, option
from edge.errors import ConfigError

from .options import Finite, ask_password, given_flag

if TYPE_CHECKING:
    from edge_lab.prove.run import ProofPlan
    from edge_make.signing import Signer


@click.command(cls=SectionCommand)
@click.argument("reports", nargs=-1, type=FILE)
@option(
    "Output",
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("edge-llm-proof"),
    show_default=True,
    help="Directory of the report, and of the files made on the way.",
)
@option(
    "Runs",
    "--minutes",
    type=Finite(min=0),
    default=15.0,
    show_default=True,
    help="Begin no step after this time; the same command resumes with the missing steps.",
)
@option(
    "Device",
    "--power-modes",
    is_flag=True,
    help="Also measure in each power mode that needs no reboot, which takes root, and restore the "
    "present one.",
)
@option(
    "Output",
    "--key",
    "key_file",
    type=FILE,
    help="Sign the report with this secret key of minisign, into report.json.minisig.",
)
@option(
    "Expert",
    "--password-file",
    type=FILE,
    help="File of the key's password. Default: ask for it.",
)
@option("Output", "--dry-run", is_flag=True, help="Only print the steps, and how long they take.")
@json_option
def prove(
    reports: tuple[Path, ...],
    output: Path,
    minutes: float,
    power_modes: bool,
    key_file: Path | None,
    password_file: Path | None,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Prove that this device builds, computes right, is fast and keeps its memory.

    Nothing is downloaded: the model has the 1.5B's shape, 4 layers and random weights. The result
    is a report, report.json, that can be sent to anybody.

    With REPORTS, which may be of many devices, it runs nothing and prints them as a table.

    Exit codes: 0 all was proven; 3 something was missed or is left for the next run; 69 no GPU with
    TensorRT (the CPU's part is in the report); 71 too little disk.
    """
    if reports:
        _print_table(reports, as_json)
        return 0
    from edge_lab.prove.run import PAGE, REPORT, exit_code, make_plan
    from edge_lab.prove.run import prove as run_plan

    key = _read_key(key_file, password_file)  # before the minutes that a run takes
    plan = make_plan(output, minutes=minutes, power_modes=power_modes)
    if dry_run:
        _print_plan(plan, as_json)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the power mode is restored
    from edge_lab.prove.report import markdown
    from edge_make.signing import write_signature

    content = run_plan(plan, lambda line: click.echo(f"prove: {line}", err=True))
    page = markdown([content])
    (output / PAGE).write_text(page, "utf-8")
    if key is not None:
        signed = key.sign((output / REPORT).read_bytes(), f"edge-llm prove {content['started']}")
        write_signature(output / f"{REPORT}.minisig", signed)
    if as_json:
        echo_json(content)
    else:
        click.echo(page)
        click.echo(f"{output / REPORT} can be sent as it is.")
    return exit_code(content)


def _read_key(key_file: Path | None, password_file: Path | None) -> Signer | None:
    from edge_make.signing import open_signer

    if key_file is None:
        if password_file is not None:
            raise ConfigError("--password-file is the key's; give --key, too")
        return None
    return open_signer(key_file, lambda: ask_password(password_file))


def _print_table(reports: tuple[Path, ...], as_json: bool) -> None:
    from edge_lab.prove.report import COLUMNS, markdown, read_report, table

    if (idle := given_flag("output", "minutes", "power_modes", "key_file", "dry_run")) is not None:
        raise ConfigError(f"{idle} has no effect with REPORTS, which are only read")
    contents = [read_report(path) for path in reports]
    if as_json:
        echo_json([dict(zip(COLUMNS, row, strict=True)) for row in table(contents)])
    else:
        click.echo(markdown(contents), nl=False)


def _print_plan(plan: ProofPlan, as_json: bool) -> None:
    from edge_lab.prove.run import DISK_BYTES

    found: dict[str, Any] = {
        "gpu": plan.gpu,
        "steps": [{"step": step.name, "minutes": step.minutes} for step in plan.steps],
        "minutes": sum(step.minutes for step in plan.steps),
        "disk_bytes": DISK_BYTES,
    }
    if plan.power_modes:
        from edge_lab.prove.power import modes_without_reboot

        found["power_modes"] = list(modes_without_reboot().values())
    if as_json:
        echo_json(found)
        return
    if not plan.gpu:
        click.echo(
            "There is no NVIDIA GPU with TensorRT here: engines, own kernels, power and GPU memory "
            "cannot be proven; the CPU proves what it can."
        )
    for step in plan.steps:
        click.echo(f"{step.name:<18} {step.minutes:4.1f} min")
    for name in found.get("power_modes", ()):
        click.echo(f"{'mode ' + name:<18}  0.4 min")
    click.echo(
        f"{'all':<18} {found['minutes']:4.1f} min on an AGX Orin, predicted; "
        f"{DISK_BYTES / 1e9:.0f} GB of disk in {plan.output} until it is done"
    )
