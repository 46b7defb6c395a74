"""A bundle comes to a real fleet from a real registry; the tests run in their order."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge.bundle.manifest import read_manifest
from edge_fleet.registry.client import Registry
from edge_fleet.registry.push import push
from edge_fleet.registry.reference import parse_reference
from tests.conftest import Bundles
from tests.edge_fleet.devices.local_fleet import EDGE_LLM, LocalFleet, Process, ask, own_network
from tests.edge_fleet.registry.live import LiveRegistry
from tests.manifests import replace_file

pytestmark = [
    pytest.mark.xdist_group("fleet"),
    pytest.mark.skipif(
        os.environ.get("EDGE_LLM_FLEET", "0") != "1",
        reason="a live fleet needs Ray; EDGE_LLM_FLEET=1 installs it",
    ),
]


class RolloutFleet(LocalFleet):
    """Devices whose services have links to bundles, and a registry with newer ones.

    Args:
        directory: for its files.
        bundle: what all serve first.
    """

    def __init__(self, directory: Path, bundle: Path) -> None:
        super().__init__(directory)
        self.registry = LiveRegistry(directory)
        self._bundle = bundle
        golden = directory / "golden.jsonl"
        rows = [{"id": str(n), "prompt": f"question {n}", "answer": None} for n in range(3)]
        golden.write_text("".join(json.dumps(row) + "\n" for row in rows))
        commands = {}
        for name in "abc":
            link = self.link(name)
            link.parent.mkdir()
            shutil.copytree(bundle, link.with_name("r1-first"))
            link.symlink_to("r1-first")
            self.serve(name, link, "--kv-capacity=128")
            command: list[str] = [str(EDGE_LLM), "bundle", "rollout", "--link", str(link)]
            command += ["--server", f"http://127.0.0.1:{self.port(name)}"]
            command += ["--reload", f"kill -HUP {self.services[name].pid}", "--no-build"]
            command += ["--golden", str(golden), "--max-tokens=8", "--switch-timeout-s=4"]
            commands[name] = f"rollout = {json.dumps([*command, '--kv-capacity=128'])}"
        self.write(**commands)

    def link(self, name: str) -> Path:
        """What a device's service serves."""
        return self.directory / name / "r1"

    def offer(self, version: str, **files: bytes) -> str:
        """Push a bundle that differs; returns its reference."""
        new = self.directory / version
        shutil.copytree(self._bundle, new)
        replace_file(new, "generation_config.json", json.dumps({"version": version}).encode())
        for file, data in files.items():
            replace_file(new, file.replace("_", "."), data)
        reference = parse_reference(f"{self.registry.address}/models/r1:{version}")
        with Registry(reference) as registry:
            push(new, reference, registry)
        return str(reference)

    def rollout(self, reference: str, *options: str) -> tuple[int, dict[str, Any], str]:
        """Roll out; returns exit code, the state of each device, and what was said."""
        done = self.run("rollout", reference, "--watch-s=0", "--json", *options)
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout)["devices"], done.stderr

    def leads(self) -> dict[str, str]:
        """Where the links lead."""
        return {name: self.link(name).readlink().name for name in "abc"}

    def close(self) -> None:
        """End everything."""
        super().close()
        self.registry.kill()


@pytest.fixture(scope="module")
def fleet(
    tiny_bundles: Bundles, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RolloutFleet]:
    with own_network():
        opened = RolloutFleet(tmp_path_factory.mktemp("rollout"), tiny_bundles("qwen2"))
        try:
            up = opened.run("up", "--wait-s", "0")
            assert up.returncode == 75, up.stderr
            for name in "ab":
                opened.join(name)
            opened.wait(a="ready", b="ready")
            yield opened
        finally:
            opened.close()


def test_a_driver_that_is_killed_is_called_again_and_who_was_off_catches_up(fleet: RolloutFleet):
    reference = fleet.offer("better")
    arguments = ("fleet", "rollout", str(fleet.file), reference, "--watch-s=0")
    driver = Process(fleet.directory / "driver.log", *arguments, home=fleet.directory)
    driver.wait_for("a (canary): running")
    driver.kill()
    fleet.join("c", timeout_s=0)
    code, devices, said = fleet.rollout(reference)
    if code == 75:  # c had not joined yet
        assert "c were off" in said
        assert devices["c"]["state"] == "off"
        fleet.wait(c="ready")
        code, devices, said = fleet.rollout(reference)
    assert code == 0, said
    assert {device["state"] for device in devices.values()} <= {"new", "unchanged"}
    assert len(set(fleet.leads().values())) == 1
    assert "r1-first" not in fleet.leads().values()
    found = fleet.wait(a="ready", b="ready", c="ready")
    new = read_manifest(fleet.directory / "better").self_sha256
    assert {device["models"]["tiny"]["sha256"] for device in found.values()} == {new}


def test_a_bad_bundle_is_taken_back_by_the_canary_and_nobody_else_sees_it(fleet: RolloutFleet):
    before = fleet.leads()
    # Without the golden set's process nobody sees before the trial that it cannot be opened.
    graphs = {"decoder_onnx": b"no graph", "decoder_cpu_onnx": b"no graph"}
    code, devices, said = fleet.rollout(fleet.offer("broken", **graphs), "--gate=none")
    assert code == 3, said
    assert {name: device["state"] for name, device in devices.items()} == {
        "a": "rejected",
        "b": "waiting",
        "c": "waiting",
    }
    assert "a (canary)" in said
    assert "not touched b c" in said
    assert fleet.leads() == before
    for name in "bc":
        journal = (fleet.directory / name / ".r1.edge-llm-rollout" / "journal.json").read_text()
        assert 'rejected": {}' in journal
    fleet.wait(a="ready", b="ready", c="ready")
    assert ask(body={"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2})[0] == 200
