"""The processes of Ray, with another command in its place."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_fleet.devices import cluster
from edge_fleet.devices.config import FleetConfig
from tests.conftest import write_secret

_HEAD = """import time
print("Ray runtime started", flush=True)
time.sleep(600)
"""
_DEVICE = """import fcntl, os, pathlib, signal, sys
seen = "free"
try:
    fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    seen = "locked"
pathlib.Path(sys.argv[1], "seen").write_text(seen)
os.kill(os.getppid(), signal.SIGTERM)
"""


def is_locked(place: str | Path) -> bool:
    """Whether systemd-tmpfiles would leave a directory alone: it tries to lock each one, too."""
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FleetConfig:
    write_secret(tmp_path / "token", "0" * 64)
    (tmp_path / "place").mkdir()
    monkeypatch.setattr(cluster, "_directory", lambda *_: tmp_path / "place")
    return FleetConfig(token_file=str(tmp_path / "token"), devices={})


@pytest.fixture
def handlers() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_ray_kills_nothing_where_memory_is_short(config: FleetConfig):
    assert cluster.environment(config)["RAY_memory_monitor_refresh_ms"] == "0"


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_who_cleans_tmp_of_what_is_old_leaves_a_head_alone(
    config: FleetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cluster, "_ray_start", lambda _: [sys.executable, "-c", _HEAD])
    cluster.start_head(config)
    try:
        assert is_locked(tmp_path / "place")
        assert cluster.find_head(config) is not None
    finally:
        assert cluster.stop_head(config)
    assert not is_locked(tmp_path / "place")


_SESSION = """import pathlib, sys, time
place = pathlib.Path(sys.argv[1])
session = place / f"session_2026-01-01_{time.time_ns()}"
session.joinpath("logs").mkdir(parents=True)
latest = place / "session_latest"
if latest.exists():  # as Ray does
    latest.unlink()
if not latest.is_symlink():
    latest.symlink_to(session)
"""


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_of_what_earlier_heads_have_left_only_the_last_ones_stays(
    config: FleetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    place = tmp_path / "place"
    command = [sys.executable, "-c", _SESSION + _HEAD, str(place)]
    monkeypatch.setattr(cluster, "_ray_start", lambda _: command)
    for number in (1, 2, 2):
        cluster.start_head(config)
        assert cluster.stop_head(config)
        sessions = sorted(place.glob("session_2*"))
        assert len(sessions) == number
        assert (place / "session_latest").resolve() == sessions[-1]


@pytest.mark.usefixtures("handlers")
def test_who_cleans_tmp_of_what_is_old_leaves_a_device_alone(
    config: FleetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    place = tmp_path / "place"
    command = [sys.executable, "-c", _DEVICE, str(place)]
    monkeypatch.setattr(cluster, "_ray_start", lambda _: command)
    cluster.stay_joined(config, "one", {}, lambda _: None)
    assert (place / "seen").read_text() == "locked"
    assert not is_locked(place)


@pytest.mark.usefixtures("handlers")
def test_of_what_earlier_rays_of_a_device_have_left_only_the_last_ones_stays_unless_they_run(
    config: FleetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The last one's logs say why Ray has ended."""
    place = tmp_path / "place"
    command = [sys.executable, "-c", _SESSION + "sys.exit(1)", str(place)]
    monkeypatch.setattr(cluster, "_ray_start", lambda _: command)
    monkeypatch.setattr(cluster, "_REJOIN_S", (0.1, 0.1))
    found: list[int] = []

    def told(_: str) -> None:
        found.append(len(list(place.glob("session_2*"))))
        if len(found) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    cluster.stay_joined(config, "one", {}, told)
    assert found == [1, 2, 2]
    with cluster._kept(place):
        found.clear()
        cluster.stay_joined(config, "one", {}, told)
    assert found == [2, 3, 4]
