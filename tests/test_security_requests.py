"""Hostile requests to the trajectory server, before and after its token check.

None may make it fail, hold what others need, keep the event loop busy, or write a token to the log.
"""

import asyncio
import gzip
import json
import logging
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest
from trajectory_parts import TOKEN, Http, group

from atropos_hpc.trajectories import http_body
from atropos_hpc.trajectories.connections import ConnectionLimits
from atropos_hpc.trajectories.http_body import BodyLimits
from atropos_hpc.trajectories.server import application, start
from atropos_hpc.trajectories.service import Service, ServiceSettings

AUTHORIZED = f"Authorization: Bearer {TOKEN}\r\n".encode()
QUICK = ConnectionLimits(idle_s=0.3)
LIMIT = 5


def against_server(
    directory: Path,
    story: Callable[[Http, int], Awaitable[None]],
    connections: ConnectionLimits = QUICK,
    bodies: BodyLimits | None = None,
) -> None:
    """Run `story` (a client, the port) against a server with these limits."""

    async def run() -> None:
        service = Service(directory, ServiceSettings(segment_bytes=1 << 20))
        listener = socket.create_server(("127.0.0.1", 0))
        app = application(service, TOKEN, bodies or BodyLimits(1 << 20))
        runner = await start(app, listener, connections)
        port = listener.getsockname()[1]
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client:
            await asyncio.wait_for(story(Http(service, client), port), 60)
        service.end_waits()
        await runner.cleanup()
        await service.close()

    asyncio.run(run())


async def exchange(port: int, data: bytes) -> bytes:
    """Send bytes on a connection of its own; return all that comes until it is closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    answer = await reader.read()
    writer.close()
    return answer


# what is sent -> the statuses that are right
BEFORE_TOKEN = {
    "no token": (b"GET /info HTTP/1.1\r\nHost: x\r\n\r\n", 401),
    "token that is not UTF-8": (
        b"GET /info HTTP/1.1\r\nHost: x\r\nAuthorization: \xff\r\n\r\n",
        401,
    ),
    "bearer that is not UTF-8": (
        b"GET /info HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\xfe\r\n\r\n",
        401,
    ),
    "basic that is not UTF-8": (
        b"GET /info HTTP/1.1\r\nHost: x\r\nAuthorization: Basic \xff\r\n\r\n",
        401,
    ),
    "basic of bytes": (
        b"GET /info HTTP/1.1\r\nHost: x\r\nAuthorization: Basic /////w==\r\n\r\n",
        401,
    ),
    "path that is not UTF-8": (b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "lines that end in LF": (b"GET /info HTTP/1.1\nHost: x\n" + AUTHORIZED[:-2] + b"\n\n", 400),
    "an endless line": (b"GET /info HTTP/1.1\r\nAuthorization: Bearer " + b"x" * 10_000, 400),
    "a NUL in the token": (
        b"GET /info HTTP/1.1\r\nHost: x\r\n" + AUTHORIZED[:-2] + b"\0\r\n\r\n",
        400,
    ),
    "another protocol": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9, 400),
    "an endless number of headers": (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200, 400),
    "two lengths": (b"POST /ack HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
}


@pytest.mark.parametrize("kind", BEFORE_TOKEN)
def test_hostile_request_before_the_token_check_is_a_4xx_and_logs_no_token(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, status = BEFORE_TOKEN[kind]

    async def story(_http: Http, port: int) -> None:
        answer = await exchange(port, data)
        assert int(answer.split(b" ")[1]) == status, answer[:300]
        body = answer.partition(b"\r\n\r\n")[2]
        assert json.loads(body)["detail"]

    with caplog.at_level(logging.DEBUG):
        against_server(tmp_path, story)
    assert TOKEN not in caplog.text
    assert "Traceback" not in caplog.text


AFTER_TOKEN = {
    "an encoding that is not UTF-8": b"Content-Encoding: \xff\r\nContent-Length: 2\r\n\r\n{}",
    "a content type that is not UTF-8": b"Content-Type: \xff/\xfe\r\nContent-Length: 2\r\n\r\n{}",
}


@pytest.mark.parametrize("kind", AFTER_TOKEN)
def test_hostile_header_after_the_token_check_is_a_4xx(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    head = b"POST /scored_data HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + AUTHORIZED

    async def story(_http: Http, port: int) -> None:
        answer = await exchange(port, head + AFTER_TOKEN[kind])
        assert 400 <= int(answer.split(b" ")[1]) < 500, answer[:300]

    against_server(tmp_path, story)
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    "part",
    [b"", b"GET /hea", b"GET /info HTTP/1.1\r\nHost: x\r\n" + AUTHORIZED],
    ids=["silence", "half a line", "half the headers"],
)
def test_half_sent_request_is_closed_after_the_time_limit(part: bytes, tmp_path: Path) -> None:
    async def story(http: Http, port: int) -> None:
        assert await exchange(port, part) == b""  # read() returns when the server closes
        assert (await http.raw("GET", "/health"))[0] == 200

    against_server(tmp_path, story)


def test_half_sent_requests_beyond_the_limit_push_out_the_oldest_not_who_has_the_token(
    tmp_path: Path,
) -> None:
    async def story(http: Http, port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /info HTTP/1.1\r\nHost: x\r\n" + AUTHORIZED + b"\r\n")
        assert b"200" in await reader.readline()
        strangers = []
        for _ in range(3 * LIMIT):
            strangers.append(await asyncio.open_connection("127.0.0.1", port))
            strangers[-1][1].write(b"GET /in")
        for stranger, _ in strangers[: 2 * LIMIT]:
            assert await stranger.read() == b""
        assert (await http.raw("GET", "/info"))[0] == 200
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert b"HTTP/1.1 200" in await reader.read()

    # only the number of connections closes any, not the time
    against_server(tmp_path, story, ConnectionLimits(30.0, LIMIT, grace_s=0.0))


def test_hostile_gzip_of_many_members_is_refused_after_a_few() -> None:
    body = gzip.compress(b"") * 200_000  # copying what follows each one would move 400 GB
    with pytest.raises(http_body.RequestError, match="members"):
        http_body.inflate(body, "gzip", 1 << 26)


def test_gzip_of_a_few_members_is_their_concatenation() -> None:
    members = [b"first " * 50_000, b"", b"second"]
    body = b"".join(gzip.compress(member) for member in members)
    assert http_body.inflate(body, "gzip", 1 << 20) == b"".join(members)


def test_hostile_body_that_never_arrives_delays_no_other_and_ends_at_its_deadline(
    tmp_path: Path,
) -> None:
    limits = BodyLimits(20_000, seconds=0.5, bytes_per_s=1e9)
    head = b"POST /scored_data HTTP/1.1\r\nHost: x\r\nContent-Length: 20000\r\n" + AUTHORIZED
    stalled = 3 * http_body.CONCURRENT_BODIES

    async def story(http: Http, port: int) -> None:
        waiting = [asyncio.create_task(exchange(port, head + b"\r\n[")) for _ in range(stalled)]
        while http.service.rejections[408] < stalled:
            assert (await http.raw("POST", "/scored_data", group(1)))[0] == 200
        for answer in await asyncio.gather(*waiting):
            assert b" 408 " in answer.partition(b"\r\n")[0]

    against_server(tmp_path, story, ConnectionLimits(), limits)
