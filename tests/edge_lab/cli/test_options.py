"""What verbs of measuring, building and shipping share."""

from __future__ import annotations

import os
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from edge.errors import ConfigError
from edge_lab.cli.options import Finite, check_writable, given_flag


@click.command()
@click.option("--seconds", type=Finite(0, 10), default=1.0)
@click.option("--much", default=1)
def verb(seconds: float, much: int) -> None:
    click.echo(f"{seconds} {given_flag('seconds', 'much')}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "1.0 None"),
        (["--much", "1"], "1.0 --much"),  # given, though it is the default
        (["--much", "2", "--seconds", "3"], "3.0 --seconds"),
        (["--seconds", "nan"], "nan is not a finite number"),
        (["--seconds", "11"], "not in the range"),
    ],
)
def test_numbers_are_finite_and_flags_are_known(arguments: list[str], said: str):
    assert said in CliRunner().invoke(verb, arguments).output


def test_a_file_that_could_not_be_written_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    check_writable(None, "--html")
    check_writable(tmp_path / "new.html", "--html")
    with pytest.raises(ConfigError, match=r"--html .*x.html cannot be written: .*/none is no dir"):
        check_writable(tmp_path / "none" / "x.html", "--html")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match="make it first"):
        check_writable(tmp_path / "new.html", "--html")
