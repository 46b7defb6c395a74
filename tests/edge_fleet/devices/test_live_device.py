"""The fleet's part on a device, with a real service beside it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from edge import __version__
from edge_fleet.devices.config import Device, FleetConfig
from edge_fleet.devices.head import FleetHead
from edge_fleet.devices.members import Asked, Facts, Model, judge
from edge_serve.http.connections import Connections, listen
from edge_serve.http.messages import make_server
from tests.conftest import Bundles, write_secret
from tests.edge_serve.scripted import Live, running

pytestmark = pytest.mark.skipif(
    os.environ.get("EDGE_LLM_FLEET", "0") != "1",
    reason="a live fleet needs Ray; EDGE_LLM_FLEET=1 installs it",
)


def test_a_key_that_is_changed_at_both_ends_is_taken(
    tmp_path: Path, tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    from edge_fleet.devices import device

    monkeypatch.setattr(device, "_POLL_S", 0.02)
    monkeypatch.setattr(device, "_FACTS_S", 0.1)
    keys, own = tmp_path / "keys", tmp_path / "own"
    for path in (keys, own):
        write_secret(path, "fleet:the-old-key-of-both\n")

    async def test(live: Live) -> None:
        agent = device.DeviceAgent(live.url, str(own))

        async def until(wanted: str | None) -> None:
            while (await agent.look())["trouble"] != wanted:
                await asyncio.sleep(0.02)

        try:
            await until(None)
            write_secret(keys, "fleet:the-new-key-of-both\n")
            assert live.service._keys is not None
            live.service._keys.reread()
            await until("its service is none of edge-llm serve, or wants a key: /stats answers 401")
            write_secret(own, "fleet:the-new-key-of-both\n")
            await until(None)
            async for item in agent.ask(Asked("GET", "/v1/models", [], b"")):
                assert isinstance(item, bytes) or (item is not None and item[0] == 200)
        finally:
            await agent.close()

    with running(tiny_bundles("qwen2"), api_key_file=keys) as live:
        asyncio.run(asyncio.wait_for(test(live), 20))


@pytest.mark.parametrize(
    "body",
    [b"<html>", b'{"error": {"code": "\xff"}}', b'{"error": ' + b"[" * 100_000],
    ids=["another", "encoding", "depth"],
)
def test_whatever_answers_in_its_service_s_place_is_told_and_looked_at_again(
    body: bytes, monkeypatch: pytest.MonkeyPatch
):
    from aiohttp import web

    from edge_fleet.devices import device

    monkeypatch.setattr(device, "_POLL_S", 0.02)

    async def test() -> None:
        bodies = [body]

        async def answer(_: web.Request) -> web.Response:
            return web.Response(status=503, body=bodies[-1])

        app = web.Application()
        app.router.add_get("/ready", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        agent = device.DeviceAgent(f"http://127.0.0.1:{runner.addresses[0][1]}")
        try:
            while "none of edge-llm serve" not in (await agent.look())["trouble"]:
                await asyncio.sleep(0.02)
            bodies.append(b'{"error": {"code": "loading"}}')
            while (await agent.look())["trouble"] != "loading":
                await asyncio.sleep(0.02)
        finally:
            await agent.close()
            await runner.cleanup()

    asyncio.run(asyncio.wait_for(test(), 20))


def test_no_target_leads_anywhere_but_to_the_service(tiny_bundles: Bundles):
    from edge_fleet.devices.device import DeviceAgent

    async def test(url: str) -> None:
        found = []

        async def other(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            found.append(writer.get_extra_info("peername"))
            writer.close()

        foreign = await asyncio.start_server(other, "127.0.0.1", 0)
        host = f"127.0.0.1:{foreign.sockets[0].getsockname()[1]}"
        targets = [f"%2Fv1%2Fmodels%2F@{host}/x?y=1", "/v1/models/../../metrics",
                   "/v1/models/%2e%2e/%2e%2e/metrics", "%2Fv1%2Fmodels%2Fx"]  # fmt: skip
        config = FleetConfig(token_file="t", devices={"a": Device(url=url), "b": Device(url=url)})
        agents = {name: DeviceAgent(device.url) for name, device in config.devices.items()}
        head = FleetHead(config, agents)
        for member in head.members.values():
            member.saw(Facts(__version__, __version__, "k", {"tiny": Model("h", 2, 2, 9, "b")}))
        judge(head.members.values(), config)
        sock = listen("127.0.0.1", 0)
        server = make_server(head.app, head.settings, Connections(9, 9))
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        try:
            for target in [*targets, "/v1/models"]:
                reader, writer = await asyncio.open_connection(*sock.getsockname())
                lines = f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
                writer.write(lines.encode())
                status = (await reader.read()).split(b" ")[1]
                writer.close()
                assert status == (b"200" if target == "/v1/models" else b"404"), target
            # An agent needs no head that is as careful.
            for target in targets:
                asked = Asked("GET", target, [], b"")
                answered = [item async for item in agents["a"].ask(asked)]
                assert isinstance(answered[0], tuple), target
                assert answered[0][0] == 404, target
            assert not found
            assert [member.trouble for member in head.members.values()] == [None, None]
        finally:
            server.should_exit = True
            await serving
            for agent in agents.values():
                await agent.close()
            foreign.close()

    with running(tiny_bundles("qwen2")) as live:
        asyncio.run(asyncio.wait_for(test(live.url), 20))
