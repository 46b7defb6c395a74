"""``edge-llm fleet`` where something is missing or wrong: each error says what to do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command_line import Result, edge_llm, error_line  # noqa: F401
from tests.conftest import Bundles
from tests.edge_fleet.devices.live_endpoint import needs_haproxy
from tests.edge_serve.scripted import running

Run = Callable[..., Result]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.toml"
    path.write_text('state_dir = "/tmp/no-fleet"\n[devices.a]\nurl = "http://127.0.0.1:9"\n')
    return path


@pytest.mark.parametrize("verb", ["check", "up"])
def test_a_machine_without_haproxy_is_told_how_to_get_it(
    file: Path,
    edge_llm: Run,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    assert "sudo apt-get install haproxy" in error_line(edge_llm("fleet", verb, file), 69)


def test_vllm_router_needs_a_port_and_its_package(
    file: Path,
    edge_llm: Run,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
):
    assert "router_port = 30000" in error_line(edge_llm("fleet", "router", file), 64)
    file.write_text("router_port = 30000\n" + file.read_text())
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    assert "pip install vllm-router==" in error_line(edge_llm("fleet", "router", file), 69)


@pytest.mark.parametrize("verb", ["reload", "down"])
def test_without_an_endpoint_nothing_is_reloaded_or_ended(
    file: Path,
    edge_llm: Run,  # noqa: F811
    verb: str,
):
    assert "no endpoint runs here" in error_line(edge_llm("fleet", verb, file), 70)


@pytest.mark.live
@needs_haproxy
def test_a_state_directory_that_cannot_be_made_is_named(
    file: Path,
    edge_llm: Run,  # noqa: F811
):
    file.write_text(file.read_text().replace("/tmp/no-fleet", "/proc/no-fleet"))
    assert "cannot write /proc/no-fleet" in error_line(edge_llm("fleet", "check", file), 64)


@pytest.mark.live
def test_devices_that_serve_other_bundles_are_told(
    tmp_path: Path,
    edge_llm: Run,  # noqa: F811
    tiny_bundles: Bundles,
):
    """Where no endpoint runs, too: that is when somebody looks for the reason."""
    with running(tiny_bundles("qwen2")) as one, running(tiny_bundles("llama")) as two:
        file = tmp_path / "fleet.toml"
        text = 'state_dir = "/tmp/no-fleet"\n'
        for name, device in zip("ab", (one, two), strict=True):
            text += f'[devices.{name}]\nurl = "{device.url}"\n'
        file.write_text(text)
        result = edge_llm("fleet", "status", file)
    assert result.code == 75
    assert "devices serve different models or bundles" in result.err
    first, second = result.out.splitlines()
    assert first.startswith("a: unknown; 0 running, 0 waiting; edge-llm ")
    assert "; tiny:latest@" in first
    assert first.partition("@")[2] != second.partition("@")[2]
