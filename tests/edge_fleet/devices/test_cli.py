"""The verbs of a fleet, with what Ray does beside them in its place."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edge_fleet.cli import fleet as cli

STATUS: dict[str, Any] = {"devices": {}}


class Talkative:
    """A connected fleet whose Ray says on standard output what becomes of nodes."""

    def status(self) -> dict[str, Any]:
        print("(raylet) A node died", flush=True)  # noqa: T201
        return STATUS


def test_what_ray_prints_stays_out_of_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    @contextlib.contextmanager
    def connect(file: Path) -> Iterator[Talkative]:
        print("connected", flush=True)  # noqa: T201
        yield Talkative()

    monkeypatch.setattr("edge_fleet.devices.client.Fleet.connect", connect)
    file = tmp_path / "fleet.toml"
    file.touch()
    done = CliRunner().invoke(cli.fleet, ["status", str(file), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == STATUS
    assert done.stderr == "connected\n(raylet) A node died\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("up", "--wait-s"),
        ("join", "a", "--wait-s"),
        ("drain", "a", "--timeout-s"),
        ("rollout", "127.0.0.1:1/r1:stable", "--watch-s"),
    ],
)
def test_nobody_waits_for_nan_seconds(tmp_path: Path, arguments: tuple[str, ...]):
    file = tmp_path / "fleet.toml"
    file.touch()
    verb, *others = arguments
    done = CliRunner().invoke(cli.fleet, [verb, str(file), *others, "nan"])
    assert (done.exit_code, "nan is not a finite number" in done.output) == (2, True)
