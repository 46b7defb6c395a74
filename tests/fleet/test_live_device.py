"""The fleet's part on a device, with a real service beside it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from fleet.members import Asked
from tests.conftest import Bundles, write_secret
from tests.edge.server.scripted import Live, running

pytestmark = pytest.mark.skipif(
    os.environ.get("EDGE_LLM_FLEET", "0") != "1",
    reason="a live fleet needs Ray; EDGE_LLM_FLEET=1 installs it",
)


def test_a_key_that_is_changed_at_both_ends_is_taken(
    tmp_path: Path, tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    from fleet import device

    monkeypatch.setattr(device, "_POLL_S", 0.02)
    monkeypatch.setattr(device, "_FACTS_S", 0.1)
    keys, own = tmp_path / "keys", tmp_path / "own"
    for path in (keys, own):
        write_secret(path, "fleet:the-old-key\n")

    async def test(live: Live) -> None:
        agent = device.DeviceAgent(live.url, str(own))

        async def until(wanted: str | None) -> None:
            while (await agent.look())["trouble"] != wanted:
                await asyncio.sleep(0.02)

        try:
            await until(None)
            write_secret(keys, "fleet:the-new-key\n")
            assert live.service._keys is not None
            live.service._keys.reread()
            await until("its service is none of edge-llm serve, or wants a key: /stats answers 401")
            write_secret(own, "fleet:the-new-key\n")
            await until(None)
            async for item in agent.ask(Asked("GET", "/v1/models", [], b"")):
                assert isinstance(item, bytes) or (item is not None and item[0] == 200)
        finally:
            await agent.close()

    with running(tiny_bundles("qwen2"), api_key_file=keys) as live:
        asyncio.run(asyncio.wait_for(test(live), 20))
