"""A vLLM server that answers the run's token with an error does not count as one that works."""

import asyncio
import logging
from unittest.mock import Mock

import aiohttp
import pytest
from aiohttp import web

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
