"""Verbs of a fleet whose head is gone, or hangs."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator

import pytest

from tests.edge_fleet.devices.local_fleet import LocalFleet, own_network

pytestmark = [
    pytest.mark.xdist_group("fleet"),
    pytest.mark.skipif(
        os.environ.get("EDGE_LLM_FLEET", "0") != "1",
        reason="a live fleet needs Ray; EDGE_LLM_FLEET=1 installs it",
    ),
]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    with own_network():
        yield LocalFleet(tmp_path_factory.mktemp("fleet"))


def test_without_a_head_a_verb_says_so_at_once(fleet: LocalFleet):
    began = time.monotonic()
    for verb in (("drain", "a"), ("status",)):
        done = fleet.run(*verb)
        assert done.returncode == 70, done.stdout + done.stderr
        assert "no head of the fleet answers at 127.0.0.1:6379: Connection refused" in done.stderr
        assert "edge-llm fleet up" in done.stderr
    assert time.monotonic() - began < 60  # of Ray's own quarter of an hour; it took 3 s


def test_a_head_that_hangs_is_given_up(fleet: LocalFleet):
    with socket.create_server(("127.0.0.1", 6379)):
        done = fleet.run("drain", "a")
    assert done.returncode == 70, done.stdout + done.stderr
    assert "cannot connect to Ray at 127.0.0.1:6379" in done.stderr
