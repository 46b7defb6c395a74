"""The kernel enforces a limit of memory: the planned one is enough, one too small is explained."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from edge.errors import ResourceError
from edge_serve.models.limits import UnitLimits, check_room, unit_limits
from edge_serve.settings import ServerSettings
from tests.conftest import Bundles
from tests.control_groups import Group, limited_group
from tests.edge_serve.attacker import post
from tests.edge_serve.processes import Child, child

MIB = 1 << 20
CHAT = {"messages": [{"role": "user", "content": "what is a sky of blue " * 4}], "max_tokens": 48}
BOMB = {"type": "integer", "multipleOf": 999_983}  # compiles for minutes, in a child
_ATTACKS = (("texts", 8), ("long", 4), ("stalled", 200))
_SECONDS = 6.0


@contextmanager
def serving(bundle: Path, group: Group) -> Iterator[Child]:
    """`edge-llm serve` with a real engine, as the unit runs it, in a group."""
    arguments = ("-m", "edge.cli", "serve", str(bundle), "--port", "0", "--num-threads", "1")
    with child(*arguments, "--backend", "ort-cpu", group=group) as server:
        yield server


def good(server: Child, until_s: float) -> Counter[int]:
    """Chats, one after the other; what they were answered."""
    answers: Counter[int] = Counter()
    while time.monotonic() < until_s:
        answers[server.ask(body=CHAT)[0]] += 1
    return answers


def send_bomb(server: Child, stack: ExitStack) -> None:
    """A grammar that takes all that its child may have; nobody waits for the answer."""
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": BOMB}}
    request = json.dumps({**CHAT, "response_format": schema}).encode()
    sock = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 20))
    sock.sendall(post("/v1/chat/completions", request))


@pytest.mark.slow
def test_the_planned_limit_is_enough_under_good_and_hostile_load(tiny_bundles: Bundles):
    """What the unit gets as MemoryMax, and none of it is met: MemoryHigh, which only systemd's
    version 2 has, would not have held the service up either."""
    bundle = tiny_bundles("qwen2")
    printed = subprocess.run(
        [sys.executable, "-m", "edge.cli", "config", "unit", "--model", str(bundle)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    limits = UnitLimits(*(int(line.rpartition("=")[2]) for line in printed.splitlines()[2:]))
    with limited_group(limits.memory_max_bytes) as group, ExitStack() as stack:
        server = stack.enter_context(serving(bundle, group))
        server.wait_for("ready: ", 120)
        attackers = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.edge_serve.attacker", kind, str(server.port),
                     str(num), "127.0.0.2"],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                )
            )
            for kind, num in _ATTACKS
        ]  # fmt: skip
        until_s = time.monotonic() + _SECONDS
        for _ in range(2):
            send_bomb(server, stack)
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(good, server, until_s) for _ in range(4)]
        answers: Counter[int] = sum((each.result() for each in asked), Counter())
        hostile: Counter[str] = Counter()
        for attacker in attackers:
            hostile.update(json.loads(attacker.communicate()[0]))
        assert answers.keys() <= {200, 429}
        assert answers[200] >= 4
        assert not [status for status in hostile if status.startswith("5")], hostile
        assert hostile["400"] + hostile["429"] > 10
        assert server.ask("/ready")[0] == 200
        assert server.process.poll() is None
        assert group.num_killed == 0
        sys.stdout.write(f"{group.peak_bytes / MIB:.0f} MiB of {limits}\n")
        assert group.peak_bytes < limits.memory_high_bytes
        assert not [line for line in server.log if "memory limit" in line]


@pytest.mark.slow
def test_a_limit_far_below_the_need_is_refused_before_the_kernel_acts(tiny_bundles: Bundles):
    bundle = tiny_bundles("qwen2")
    with limited_group(1 << 40) as group:
        subprocess.run(group.command(sys.executable, "-c", "import edge_serve.run"), check=True)
        listening = group.peak_bytes
    with limited_group(listening + 12 * MIB) as group, serving(bundle, group) as server:
        assert server.process.wait(60) == ResourceError.exit_code
        server.wait_for(
            r"opening the bundles takes \d+ MB, and the memory limit of this process's control "
            r"group leaves \d+ MB, so the kernel would end it; raise it .*"
        )
        assert group.num_killed == 0


@pytest.fixture
def settings(tiny_bundles: Bundles) -> ServerSettings:
    return ServerSettings(model={"tiny": tiny_bundles("qwen2")}, backend="ort-cpu")


def test_weights_that_do_not_fit_are_refused(settings: ServerSettings):
    with pytest.raises(
        ResourceError, match=r"the weights take \d+ MB.* leaves 0 MB; raise it \(Mem"
    ):
        check_room(settings, 1000, 0)


def test_only_a_limit_that_is_too_small_is_reported(
    settings: ServerSettings, caplog: pytest.LogCaptureFixture
):
    limits = unit_limits(settings)
    bodies = 4 * settings.max_inflight_body_bytes
    check_room(settings, limits.memory_high_bytes - 100 * MIB, 60 * MIB)
    assert not caplog.records
    check_room(settings, bodies, 60 * MIB)
    (record,) = caplog.records
    assert "the kernel may end this process" in record.message
    assert "edge-llm config unit plans them" in record.message
    caplog.clear()
    check_room(settings, bodies, 1 << 40)  # they still take as much as their weights
    assert len(caplog.records) == 1


def test_a_hard_limit_below_what_opening_takes_is_refused(
    settings: ServerSettings, caplog: pytest.LogCaptureFixture
):
    """A soft one holds processes up, and a cache that fits when it is empty may never be full."""
    room = 1 << 40
    with pytest.raises(ResourceError, match=r"opening the bundles takes (\d+) MB") as caught:
        check_room(settings, room, 0, 20 * MIB)
    needed = int(str(caught.value).split("takes ")[1].split(" MB")[0]) * 10**6
    check_room(settings, room, 0, needed + 10**6)
    check_room(settings, room, 0, None)
    check_room(settings, room, needed + 10**6, 0)  # it has that much already
    large = replace(settings, kv_capacity=512, num_slots=64)
    check_room(large, room, 0, needed + 2 * 10**6)
    assert not caplog.records
    check_room(settings, 2 * needed, 0, 2 * needed)
    (record,) = caplog.records
    assert "the kernel may end this process" in record.message


def test_a_gpus_memory_is_not_in_the_group(
    settings: ServerSettings, caplog: pytest.LogCaptureFixture
):
    check_room(replace(settings, backend="tensorrt"), 1000, 0, 1000)
    assert not caplog.records
