"""A real fleet whose head, nodes and drivers are killed; the tests run in their order.

``EDGE_LLM_FLEET_ROWS`` says how many rows the batch has; ``docs/batch.md`` has a run of 10,000.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Bundles
from tests.edge_fleet.devices.local_fleet import (
    HEAD_PORT,
    LocalFleet,
    Process,
    ask,
    own_network,
    run,
)

pytestmark = [
    pytest.mark.xdist_group("fleet"),
    pytest.mark.skipif(
        os.environ.get("EDGE_LLM_FLEET", "0") != "1",
        reason="a live fleet needs Ray; EDGE_LLM_FLEET=1 installs it",
    ),
]
ROWS = int(os.environ.get("EDGE_LLM_FLEET_ROWS", "300"))
PATH = "/v1/chat/completions"
CHAT = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 4}


@pytest.fixture(scope="module")
def fleet(tiny_bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    with own_network():
        opened = LocalFleet(tmp_path_factory.mktemp("kills"))
        try:
            for name in "abc":
                opened.serve(name, tiny_bundles("qwen2"))
            yield opened
        finally:
            opened.close()


def test_a_batch_loses_no_row_to_a_killed_node_and_a_killed_driver(fleet: LocalFleet):
    up = fleet.run("up", "--wait-s", "0")
    assert up.returncode == 75, up.stdout + up.stderr
    for name in "abc":
        fleet.join(name)
    fleet.wait(a="ready", b="ready", c="ready")
    source, output = fleet.directory / "in.jsonl", fleet.directory / "out.jsonl"
    with source.open("w") as file:
        for i in range(ROWS):
            body = {**CHAT, "messages": [{"role": "user", "content": f"row {i}"}]}
            row = {"custom_id": f"row-{i}", "method": "POST", "url": PATH, "body": body}
            file.write(json.dumps(row) + "\n")
    url = f"http://127.0.0.1:{HEAD_PORT}"
    command = ("batch", str(source), "-o", str(output), "--concurrency", "8", "--url", url)
    driver = Process(fleet.directory / "driver.log", *command, home=fleet.directory)
    wait_for_rows(output, ROWS // 4)
    fleet.nodes["b"].kill()
    fleet.services["b"].kill()
    wait_for_rows(output, ROWS // 2)
    driver.kill()
    fleet.wait(b="not ready")
    assert len(rows(output)) < ROWS  # else it was not killed under way
    done = run(*command, home=fleet.directory, timeout_s=600)
    assert done.returncode == 0, done.stderr
    assert Counter(row["custom_id"] for row in rows(output)) == {f"row-{i}": 1 for i in range(ROWS)}
    assert {row["response"]["status_code"] for row in rows(output)} == {200}
    assert not output.with_suffix(".errors.jsonl").exists()


def test_the_head_is_killed_and_the_devices_answer_until_it_is_back(
    fleet: LocalFleet, tiny_bundles: Bundles
):
    fleet.serve("b", tiny_bundles("qwen2"))
    fleet.join("b")
    fleet.wait(a="ready", b="ready", c="ready", timeout_s=120)
    fleet.kill_head()
    for name in "abc":
        assert ask(body=CHAT, port=fleet.port(name))[0] == 200
    up = fleet.run("up", "--wait-s", "200")
    assert up.returncode == 0, up.stdout + up.stderr
    fleet.wait(a="ready", b="ready", c="ready", timeout_s=120)
    served = {ask(body=CHAT, x_session_id=str(i))[1]["x-edge-device"] for i in range(24)}
    assert served == {"a", "b", "c"}


def rows(output: Path) -> list[dict[str, Any]]:
    """The rows of a file, but for a last one that was torn."""
    lines = output.read_bytes().splitlines(keepends=True) if output.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def wait_for_rows(output: Path, count: int) -> None:
    deadline = time.monotonic() + 300
    while not output.exists() or output.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline, output
        time.sleep(0.05)
