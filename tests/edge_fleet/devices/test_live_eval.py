"""Bundles are evaluated on a real fleet; the tests run in their order, on one worker."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Bundles
from tests.edge_fleet.devices.local_fleet import LocalFleet, Process, own_network, run

pytestmark = [
    pytest.mark.xdist_group("fleet"),
    pytest.mark.skipif(
        os.environ.get("EDGE_LLM_FLEET", "0") != "1",
        reason="a live fleet needs Ray; EDGE_LLM_FLEET=1 installs it",
    ),
]
TEXT = ("--window=64", "--num-threads=1")


@pytest.fixture(scope="module")
def fleet(tiny_bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    with own_network():
        opened = LocalFleet(tmp_path_factory.mktemp("fleet"))
        opened.write('address = "127.0.0.1:6390"')  # the place of Ray's files is named after it
        try:
            for quant in ("fp16", "int4"):
                keep(opened.directory, tiny_bundles("qwen2", quant=quant), quant)
            keep(opened.directory / "c", tiny_bundles("qwen2", quant="fp16"), "fp16")
            opened.run("up", "--wait-s", "0")  # devices that join before there is a head wait long
            for name in "abc":
                opened.serve(name, tiny_bundles("qwen2"))
                opened.join(name, home=opened.directory / ("c" if name == "c" else ""))
            up = opened.run("up", "--wait-s", "150")
            assert up.returncode == 0, up.stdout + up.stderr
            yield opened
        finally:
            opened.close()


def keep(home: Path, bundle: Path, name: str) -> None:
    """Put a bundle where a user's devices keep theirs."""
    shutil.copytree(bundle, home / ".local/share/edge-llm/bundles" / name)


def lines(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def alone(fleet: LocalFleet, *arguments: str) -> list[dict[str, Any]]:
    """What this machine alone says; both find the bundles by their names."""
    return lines(run("eval", *arguments, "--json", home=fleet.directory))


def test_a_device_without_the_bundle_is_named(fleet: LocalFleet):
    refused = fleet.run("eval", "int4", *TEXT)
    assert refused.returncode == 65, refused.stderr
    assert "c: there is no bundle with the content of int4" in refused.stderr
    assert "fp16 (" in refused.stderr.partition(", only ")[2]
    unknown = fleet.run("eval", "fp16", "--device", "z")
    assert unknown.returncode == 64
    assert "no device 'z'; it has a, b, c" in unknown.stderr


def test_a_text_on_two_devices_comes_to_what_one_machine_says(fleet: LocalFleet):
    arguments = ("int4", "--against", "fp16", *TEXT)
    found = fleet.run("eval", *arguments, "--json", "--device", "a", "--device", "b")
    assert "on a, b: " in found.stderr
    assert lines(found) == alone(fleet, *arguments)


def test_a_device_that_dies_changes_no_figure(fleet: LocalFleet, tmp_path: Path):
    task = tmp_path / "task.jsonl"
    rows = [{"question": f"{i} + {i}?", "answer": str(2 * i)} for i in range(240)]
    task.write_text("\n".join(map(json.dumps, rows)))
    arguments = ("fp16", "--task", str(task), "--max-tokens", "60", "--num-threads=1")
    wanted = alone(fleet, *arguments)
    assert wanted[0]["items"] == len(rows)
    with ThreadPoolExecutor(1) as pool:
        evaluation = pool.submit(fleet.run, "eval", *arguments, "--json")
        wait_until(lambda: len(evaluations()) == 3)
        time.sleep(2)
        fleet.nodes["b"].kill()
        done = evaluation.result()
    assert "b is lost, the others go on" in done.stderr
    assert lines(done) == wanted


def test_a_driver_that_is_killed_leaves_no_evaluation(fleet: LocalFleet, tmp_path: Path):
    log = tmp_path / "eval.log"
    process = Process(log, "fleet", "eval", str(fleet.file), "fp16", *TEXT, home=fleet.directory)
    process.wait_for("on a, c: ")
    assert evaluations()
    process.kill()
    wait_until(lambda: not evaluations())


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def evaluations() -> list[str]:
    """The processes of evaluations that run on this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if "EvaluationActor" in command:
            found.append(command)
    return found
