"""Settings of the service that are more than a number."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from edge.errors import ConfigError
from edge_serve.inputs import read_inputs
from edge_serve.settings import ServerSettings, parse_keep_alive
from tests.conftest import write_secret


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ("5m", 300), ("1h30m", 5400), ("500ms", 0.5), ("1.5s", 1.5), ("300", 300), (300, 300),
        (0.5, 0.5), ("0", 0), (0, 0), ("0s", 0), (-1, math.inf), ("-1", math.inf),
        ("-1m", math.inf), ("-1h30m", math.inf), ("20us", 2e-5), ("20µs", 2e-5), ("+3s", 3),
    ],
)  # fmt: skip
def test_a_keep_alive_is_parsed_as_ollama_does(given: str | float, seconds: float):
    """Go's durations, numbers of seconds, and for ever where it is negative."""
    assert parse_keep_alive(given) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "given", ["", "m", "5 m", "5d", "5m3", "nan", "inf", "٣m", "1e999", "5-3s"]
)
def test_an_invalid_keep_alive_is_refused(given: str):
    with pytest.raises(ValueError, match="write a time such as 5m"):
        parse_keep_alive(given)
    with pytest.raises(ConfigError, match=r"keep_alive is .*: write a time such as 5m"):
        ServerSettings(keep_alive=given)


def test_admins_need_keys(tmp_path: Path):
    with pytest.raises(ConfigError, match="admin_keys names ann, and there are no API keys"):
        ServerSettings(admin_keys=["ann"])
    keys = tmp_path / "keys"
    write_secret(keys, "ann:the-key-of-the-operator\nbob:the-key-of-a-client\n")
    good = ServerSettings(admin_keys=["ann"], api_key_file=keys, model={"one": tmp_path})
    assert read_inputs(good).keys is not None
    wrong = replace(good, admin_keys=["anne", "bob", "carl"])
    with pytest.raises(ConfigError, match=r"names anne, carl, and .* no key .* has ann, bob$"):
        read_inputs(wrong)
