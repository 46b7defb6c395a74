"""SIGHUP while a reload is under way: what it was sent for must not be missed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from edge.server.run import Service
from edge.server.settings import ServerSettings


def test_a_reload_that_comes_during_another_follows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    service = Service(
        ServerSettings(port=0, model={"tiny": tmp_path}), lambda _: pytest.fail("nothing is opened")
    )
    began: list[int] = []

    async def scenario() -> None:
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
