"""Which answers of a vLLM server count, and how long its node agent waits for one."""

import asyncio
import logging
import time
from unittest.mock import Mock

import aiohttp
import pytest
from aiohttp import web

from atropos_hpc.rollout import managed_server
from atropos_hpc.rollout.managed_server import ENGINE_ROUTE, ManagedServer
from atropos_hpc.runtime.supervision import Limits

# what the engine's route answers -> whether the server counts as working
STATUSES = {200: True, 404: True, 400: False, 401: False, 403: False, 429: False, 500: False}


@pytest.mark.parametrize("ready", [False, True], ids=["while it starts", "later"])
@pytest.mark.parametrize("status", STATUSES)
def test_server_that_answers_with_an_error_is_not_passing_although_its_health_is(
    status: int, ready: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> bool:
        async def health(_: web.Request) -> web.Response:
            return web.Response()

        async def engine(_: web.Request) -> web.Response:
            return web.Response(status=status)

        app = web.Application()
        app.add_routes([web.get("/health", health), web.get(ENGINE_ROUTE, engine)])
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        async with aiohttp.ClientSession() as http:
            context = Mock(http=http, token="token")
            server = ManagedServer("server-0-0", 0, Limits(1, 0.0), context)
            host, port = runner.addresses[0]
            server.url, server.managed.ready = f"http://{host}:{port}", ready
            answers = await server._answers()
        await runner.cleanup()
        return answers

    with caplog.at_level(logging.ERROR):
        assert asyncio.run(story()) is STATUSES[status]
    assert ("asks for another key" in caplog.text) == (status in (401, 403))


@pytest.mark.parametrize(
    ("step_s", "update", "killed"),
    [(0.4, False, False), (60.0, False, True), (60.0, True, False)],
    ids=["a long step", "a hang", "an update began meanwhile"],
)
def test_a_server_whose_engine_computes_for_longer_than_a_probe_is_not_killed(
    step_s: float, update: bool, killed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every request waits for the end of the engine's step, and none that was dropped counts."""
    monkeypatch.setattr(managed_server, "PROBE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(managed_server, "UNHEALTHY_S", 1.0)

    async def story() -> bool:
        async def engine(_: web.Request) -> web.Response:
            if update:
                server._updating = asyncio.ensure_future(asyncio.sleep(60))
            await asyncio.sleep(step_s)
            return web.Response()

        async def health(_: web.Request) -> web.Response:
            return web.Response()

        app = web.Application()
        app.add_routes([web.get(ENGINE_ROUTE, engine), web.get("/health", health)])
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with aiohttp.ClientSession() as http:
            context = Mock(http=http, token="token")
            server = ManagedServer("server-0-0", 0, Limits(1, 0.0), context)
            server.managed.children = [Mock()]
            host, port = runner.addresses[0]
            server.url, server.managed.ready = f"http://{host}:{port}", True
            server._answered = began = time.monotonic()
            while server._answered == began and not context.engine.kill_hung.called:
                await server._probe()
        await runner.cleanup()
        return context.engine.kill_hung.called

    assert asyncio.run(story()) is killed
