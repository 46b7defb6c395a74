"""SIGHUP while models are opened or replaced: what it was sent for must not be missed."""

from __future__ import annotations

import asyncio
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from edge_lab.telemetry import Snapshot
from edge_serve.run import Service
from edge_serve.settings import ServerSettings
from tests.conftest import Bundles
from tests.edge_serve.scripted import ScriptedEngine, tiny

pytestmark = pytest.mark.live


def test_a_reload_that_comes_during_another_follows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    service = Service(
        ServerSettings(port=0, model={"tiny": tmp_path}), lambda _: pytest.fail("nothing is opened")
    )
    began: list[int] = []

    async def scenario() -> None:
        service._loaded.set()
        gate = asyncio.Event()

        async def slow() -> None:
            began.append(1)
            await gate.wait()

        monkeypatch.setattr(service, "reload", slow)
        service._on_reload()
        await asyncio.sleep(0)
        for _ in range(3):  # however many come meanwhile, one look afterwards sees it all
            service._on_reload()
        assert len(began) == 1
        gate.set()
        assert service._reloading is not None
        await service._reloading
        assert len(began) == 2
        service._on_reload()
        await service._reloading
        assert len(began) == 3

    asyncio.run(scenario())
    service._socket.close()


@pytest.mark.parametrize("signals", [0, 1, 2])
def test_changes_while_models_are_opened_are_noticed_afterwards(
    tmp_path: Path, tiny_bundles: Bundles, signals: int
):
    """A take-back during the start; no signal is what systemd sends then."""
    for name in ("new", "old"):
        shutil.copytree(tiny_bundles("qwen2"), tmp_path / name)
    link = tmp_path / "r1"
    link.symlink_to("new")
    opened: list[str] = []
    begun, gate = threading.Event(), threading.Event()

    def opens(bundle: Path) -> Any:
        opened.append(bundle.name)
        begun.set()
        gate.wait(20)
        return ScriptedEngine().open(bundle, num_slots=2, queue_capacity=4)

    settings = tiny(link)
    service = Service(settings, opens, reread=lambda: settings, telemetry=Snapshot)

    async def scenario() -> None:
        serving = asyncio.create_task(service.run())
        while not begun.is_set():
            await asyncio.sleep(0.01)
        (tmp_path / "link").symlink_to("old")
        (tmp_path / "link").replace(link)
        for _ in range(signals):
            service._on_reload()
            await asyncio.sleep(0.05)
        gate.set()
        for _ in range(1000):
            if not service.models.is_loading and service.models.get("tiny").bundle.name == "old":
                break
            await asyncio.sleep(0.01)
        service.stop()
        await serving

    asyncio.run(scenario())
    assert service.models.get("tiny").bundle == tmp_path / "old"
    assert opened == ["new", "old"]
