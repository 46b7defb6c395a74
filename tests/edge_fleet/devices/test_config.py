"""The fleet's file: every key is honoured or refused, with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge.errors import ConfigError
from edge_fleet.devices.config import Device, FleetConfig, check_token, read_config
from tests.conftest import write_secret

GOOD = """\
address = "10.0.0.1:7000"
token_file = "fleet.token"
host = "0.0.0.0"
port = 9000
api_key_file = "keys"
allow = ["version"]
min_slots = 2
beat_s = 0.25
rollout = ["edge-llm", "bundle", "rollout", "--link", "/r1"]

[devices.orin-1]
url = "http://127.0.0.1:8001"
key_file = "/etc/edge-llm/fleet.key"
rollout = ["sudo", "-n", "/usr/local/sbin/roll-out"]

[devices.orin-2]
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "fleet.toml"
    path.write_text(text)
    return path


def test_every_key_is_read(tmp_path: Path):
    command = ("edge-llm", "bundle", "rollout", "--link", "/r1")
    assert read_config(written(tmp_path, GOOD)) == FleetConfig(
        address="10.0.0.1:7000",
        token_file=str(tmp_path / "fleet.token"),
        host="0.0.0.0",
        port=9000,
        api_key_file=str(tmp_path / "keys"),
        allow=["version"],
        min_slots=2,
        beat_s=0.25,
        rollout=command,
        devices={
            "orin-1": Device(
                "http://127.0.0.1:8001",
                "/etc/edge-llm/fleet.key",
                ("sudo", "-n", "/usr/local/sbin/roll-out"),
            ),
            "orin-2": Device(rollout=command),
        },
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("port = 9000", "prot = 9000", "line 4: unknown key 'prot'; the nearest known one is"),
        ("port = 9000", "port = 0", "line 4: port is 0: Expected `int` >= 1"),
        ("port = 9000", 'port = "x"', "line 4: port is 'x': Expected `int`, got `str`"),
        ('token_file = "fleet.token"\n', "", "no token_file; whoever reaches a port of Ray"),
        ("10.0.0.1:7000", "10.0.0.1", "line 1: address is '10.0.0.1': use HOST:PORT"),
        ("10.0.0.1:7000", "head:70000", "line 1: address is 'head:70000': use HOST:PORT"),
        ('"version"', '"colour"', r"line 6: allow is \['colour'\]: Invalid enum value 'colour'"),
        ('api_key_file = "keys"\n', "", "line 3: host 0.0.0.0 can be reached from other machines"),
        ("beat_s = 0.25", "beat_s = 3.5", "beat_s 3.5, silent_s 3 and dead_s 15 must grow"),
        ("devices.orin-1", "devices.Orin_1", "line 11: the device name 'Orin_1' is not 1 to 63"),
        ("127.0.0.1:8001", "10.0.0.9:8001", "line 12: devices.orin-1.url is 'http://10.0.0.9:8001'"),
        ("http://127", "https://127", "line 12: devices.orin-1.url is 'https://127"),
        ("/etc/edge-llm/fleet.key", "key", "line 13: devices.orin-1.key_file is 'key': use an abs"),
        ('["sudo", "-n", "/usr/local/sbin/roll-out"]', "[]", "line 14: rollout names no command"),
        ('"edge-llm", "bundle"', '"", "bundle"', "line 9: rollout names no command"),
        ('["sudo", "-n", "/usr/local/sbin/roll-out"]', '"sh -c x"', "line 14: devices.orin-1.ro"),
        ("key_file =", "keyfile =", "line 13: unknown key 'keyfile'; the nearest known one is"),
    ],
)  # fmt: skip
def test_a_wrong_key_is_named_with_its_line(tmp_path: Path, old: str, new: str, message: str):
    assert old in GOOD
    with pytest.raises(ConfigError, match=message):
        read_config(written(tmp_path, GOOD.replace(old, new)))


@pytest.mark.parametrize("devices", ["", "devices = 3", "[devices]"])
def test_a_fleet_has_devices(tmp_path: Path, devices: str):
    with pytest.raises(ConfigError, match=r"no devices; write a table \[devices.NAME\]"):
        read_config(written(tmp_path, f'token_file = "t"\n{devices}\n'))


def test_a_fleet_without_keys_is_for_loopback_or_said_to_be_open(tmp_path: Path):
    bare = GOOD.replace('api_key_file = "keys"\n', "")
    assert read_config(written(tmp_path, bare.replace("0.0.0.0", "::1"))).host == "::1"
    assert read_config(written(tmp_path, "allow_open = true\n" + bare)).allow_open


def test_the_token_is_its_owners_alone_and_long(tmp_path: Path):
    config = read_config(written(tmp_path, GOOD))
    with pytest.raises(ConfigError, match="cannot read"):
        check_token(config)
    token = write_secret(tmp_path / "fleet.token", "0123456789abcdef")
    with pytest.raises(ConfigError, match="one token of at least 32 characters"):
        check_token(config)
    write_secret(token, "0123456789abcdef" * 4 + "\n")
    check_token(config)
    token.chmod(0o640)
    with pytest.raises(ConfigError, match="other users can use"):
        check_token(config)
