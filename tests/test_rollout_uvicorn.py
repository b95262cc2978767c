"""Half-sent requests to the servers that uvicorn runs end; requests that take long do not."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn
import uvicorn.protocols.http.auto as auto

from atropos_hpc.runtime.token_check import TokenGuard
from atropos_hpc.runtime.uvicorn_limits import limit_half_sent_requests

IDLE_S = 0.3
GET = b"GET %s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n"


async def app(scope: Any, _receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
    if scope["path"] == "/slow":
        await asyncio.sleep(4 * IDLE_S)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"done"})


def exchange(data: bytes, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """What a server answers to bytes, until it closes the connection."""
    monkeypatch.setattr(auto, "AutoHTTPProtocol", auto.AutoHTTPProtocol)  # restored afterwards
    limit_half_sent_requests(IDLE_S)

    async def story() -> bytes:
        listener = socket.create_server(("127.0.0.1", 0))
        # uvicorn's own limit on idle connections is not what ends these
        config = uvicorn.Config(
            TokenGuard(app, "secret"), timeout_keep_alive=3600, log_config=None, lifespan="off"
        )
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(data)
        answer = await asyncio.wait_for(reader.read(), 30)
        writer.close()
        server.should_exit = True
        await serving
        return answer

    return asyncio.run(story())


@pytest.mark.parametrize(
    "data", [b"", b"GET /he", GET % b"/info"], ids=["silence", "half a line", "half the headers"]
)
def test_half_sent_request_to_uvicorn_is_closed_after_the_time_limit(
    data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert exchange(data, monkeypatch) == b""


def test_half_sent_request_after_a_whole_one_is_closed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = exchange(GET % b"/health" + b"\r\nGET /in", monkeypatch)
    assert answer.startswith(b"HTTP/1.1 200") and answer.count(b"HTTP/1.1") == 1


def test_half_sent_body_without_the_token_does_not_hold_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer = exchange(b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\nab", monkeypatch)
    assert answer.startswith(b"HTTP/1.1 401")


def test_request_that_takes_longer_than_the_limit_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert b"done" in exchange(GET % b"/slow" + b"\r\n", monkeypatch)


@pytest.mark.parametrize("header", [b"\xff", b"Bearer \xff\xfe", b"Basic \xff", b"Basic /////w=="])
def test_hostile_token_to_uvicorn_is_a_401(header: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    request = b"GET /x HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: %s\r\n\r\n"
    assert exchange(request % header, monkeypatch).startswith(b"HTTP/1.1 401")
