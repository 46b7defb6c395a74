"""The fleet's file: every key is honoured or refused, with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge.errors import ConfigError
from edge_fleet.devices.config import Device, FleetConfig, read_config
from edge_fleet.devices.haproxy_file import configuration
from tests.conftest import write_secret

GOOD = """\
host = "0.0.0.0"
port = 9000
api_key_file = "keys"
session_header = "x-chat"
router_port = 30000
metrics_port = 9100
state_dir = "/run/fleet"

[devices.orin-1]
url = "http://10.0.0.9:8001"
key_file = "orin-1.key"
probe_port = 9001

[devices.orin-2]
url = "http://[::1]:8000"
"""
KEY = "key-of-orin-1-0123456789"


def written(tmp_path: Path, text: str) -> Path:
    write_secret(tmp_path / "orin-1.key", f"endpoint:{KEY}\n")
    path = tmp_path / "fleet.toml"
    path.write_text(text)
    return path


def test_every_key_is_read(tmp_path: Path):
    config = read_config(written(tmp_path, GOOD))
    assert config == FleetConfig(
        host="0.0.0.0",
        port=9000,
        api_key_file=str(tmp_path / "keys"),
        session_header="x-chat",
        router_port=30000,
        metrics_port=9100,
        state_dir="/run/fleet",
        devices={
            "orin-1": Device("http://10.0.0.9:8001", str(tmp_path / "orin-1.key"), 9001, KEY),
            "orin-2": Device("http://[::1]:8000"),
        },
    )
    assert config.devices["orin-1"].probe_address == ("10.0.0.9", 9001)
    assert config.devices["orin-2"].address == "[::1]:8000"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("port = 9000", "prot = 9000", "line 2: unknown key 'prot'; the nearest known one is"),
        ("port = 9000", "port = 0", "line 2: port is 0: Expected `int` >= 1"),
        ("port = 9000", 'port = "x"', "line 2: port is 'x': Expected `int`, got `str`"),
        ("port = 9000", "port = 30001", "line 5: port, router_port, the one after it"),
        ('"0.0.0.0"', '"0.0.0.0:1 ssl"', "line 1: host '0.0.0.0:1 ssl' is no address"),
        ('api_key_file = "keys"\n', "", "line 1: host 0.0.0.0 can be reached from other machines"),
        ('"x-chat"', '"a)b"', "line 4: 'a\\)b' is no name of a header"),
        ('"/run/fleet"', '"/run/f leet"', "line 7: the path '/run/f leet' has a character"),
        ('"/run/fleet"', f'"/{"x" * 60}"', "line 7: the path /x+ is longer than 50 characters"),
        ("port = 9000", 'certificate = "/a\\nb"', "line 2: the path '/a\\\\nb' has a character"),
        ("devices.orin-1", "devices.Orin_1", "line 9: the device name 'Orin_1' is not 1 to 32"),
        ("http://10", "https://10", "line 10: devices.orin-1.url is 'https://10"),
        ("10.0.0.9:8001", "10.0.0.9", "line 10: devices.orin-1.url is 'http://10.0.0.9'"),
        ("10.0.0.9:8001", "a b:1", "line 10: devices.orin-1.url is 'http://a b:1'"),
        ("10.0.0.9:8001", "a\\n:1", "line 10: devices.orin-1.url is"),
        ("10.0.0.9:8001", "a:1/v1", "line 10: devices.orin-1.url is 'http://a:1/v1'"),
        ("10.0.0.9:8001", "me@a:1", "line 10: devices.orin-1.url is 'http://me@a:1'"),
        ("10.0.0.9:8001", "[::1]:8000", "line 15: devices.orin-2 is the device orin-1 again"),
        ('url = "http://10.0.0.9:8001"\n', "", "line 9: devices.orin-1 has no url"),
        ("key_file =", "keyfile =", "line 11: unknown key 'keyfile'; the nearest known one is"),
        ('key_file = "orin-1.key"', 'key = "x"', "line 11: devices.orin-1: put the key into a"),
    ],
)  # fmt: skip
def test_a_wrong_key_is_named_with_its_line(tmp_path: Path, old: str, new: str, message: str):
    assert old in GOOD
    with pytest.raises(ConfigError, match=message):
        read_config(written(tmp_path, GOOD.replace(old, new)))


@pytest.mark.parametrize("devices", ["", "devices = 3", "[devices]"])
def test_a_fleet_has_devices(tmp_path: Path, devices: str):
    with pytest.raises(ConfigError, match=r"write a table \[devices.NAME\] for each device"):
        read_config(written(tmp_path, f"port = 9000\n{devices}\n"))


def test_a_fleet_without_keys_is_for_loopback_or_said_to_be_open(tmp_path: Path):
    bare = GOOD.replace('api_key_file = "keys"\n', "")
    assert read_config(written(tmp_path, bare.replace("0.0.0.0", "::1"))).host == "::1"
    assert read_config(written(tmp_path, "allow_open = true\n" + bare)).allow_open


@pytest.mark.parametrize(
    "held",
    [
        "endpoint:sha256:" + "0" * 64,
        f"endpoint:{KEY}\nother:{KEY}x",
        f"endpoint:{KEY}\"'",
        f"endpoint:{KEY}%[src]",
    ],
)
def test_a_devices_key_is_one_key_in_full_that_haproxy_reads_as_it_is(tmp_path: Path, held: str):
    file = written(tmp_path, GOOD)
    write_secret(tmp_path / "orin-1.key", held + "\n")
    with pytest.raises(ConfigError, match="does not hold one API key of its device"):
        read_config(file)


def test_all_slots_of_many_devices_can_be_connected():
    devices = {f"n{i}": Device(f"http://10.0.0.{i}:8000") for i in range(200)}
    text = configuration(FleetConfig(devices=devices), "secret", "fleet.toml")
    (limit,) = [line.split()[1] for line in text.splitlines() if line.startswith("    maxconn ")]
    assert int(limit) > 2 * (2 * 200 * 4 + 64)  # both parts, and their connections to devices
