"""The trajectory server's process: HTTP over `Service`, as a member of a run.

    python -m atropos_hpc.trajectories.server --run-dir RUN

It speaks Atropos' trajectory API, so that unmodified environments and trainers work with it, and two routes of its own for the
learner: GET /lease and POST /ack. Every route but GET /health asks for the run's token, as a bearer or as the password of Basic
authorization (Atropos environments can put user:password@ into their rollout_server_url).
"""

import argparse
import asyncio
import base64
import binascii
import contextlib
import ctypes
import gc
import hmac
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web
from isal import isal_zlib

from atropos_hpc.contracts import group
from atropos_hpc.contracts.group import Refused
from atropos_hpc.contracts.members import TrajectoriesState
from atropos_hpc.runtime import process
from atropos_hpc.runtime.membership import Member
from atropos_hpc.runtime.network import own_host
from atropos_hpc.runtime.run_dir import RunDir, Unreadable, read_struct
from atropos_hpc.trajectories.journal import Damaged, Place
from atropos_hpc.trajectories.service import Service

log = logging.getLogger(__name__)

NODE = "ATROPOS_HPC_NODE"
BODIES = 8  # bodies of the greatest size allowed, that may be under way at once
INFLATED = 2  # a body may inflate to this times what it may be on the wire
CHUNK_BYTES = 1 << 20  # of an answer, between two looks at other requests
DEPTH_S = 2.0  # between two reports of the queue's depth in the rendezvous
BACKLOG = 1024
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
GARBAGE = (
    10_000  # objects that may come into cycles before they are looked for: some dozens of requests
)
KEPT_BYTES = 32 << 20  # its maximum for the latter
CLOSE_S = 5.0  # for requests under way at the end
NO_EXAMPLE: dict[str, list[Any]] = {
    name: []
    for name in (
        "tokens",
        "masks",
        "scores",
        *group.FLOATS,
        "generation_params",
        "messages",
        "images",
    )
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def application(service: Service, token: str, max_body_bytes: int) -> web.Application:
    """The aiohttp application; `start` runs it."""
    under_way = 0  # bytes of bodies that are being received

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        """The token first, then the route; every refusal is JSON that says what is wrong."""
        if request.path != "/health" and not authorized(
            request.headers.get("Authorization", ""), token
        ):
            return refusal(
                request,
                401,
                "this run's token is needed: Authorization: Bearer <token>, or as the password of Basic",
            )
        try:
            return await handler(request)
        except Refused as error:
            return refusal(request, error.status, str(error))
        except web.HTTPException as error:
            return refusal(
                request, error.status, f"{request.method} {request.path}: {error.reason}"
            )

    def refusal(request: web.Request, status: int, why: str) -> web.Response:
        service.refusals[status] += 1
        count = service.refusals[status]
        if (
            status != 410 and count & (count - 1) == 0
        ):  # the 1st, 2nd, 4th, 8th, ...: a flood must not fill the disk
            log.warning(
                "%s %s from %s refused (%d, number %d): %s",
                request.method,
                request.path,
                request.remote,
                status,
                count,
                why,
            )
        headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
        return web.json_response({"detail": why}, status=status, headers=headers)

    async def read(request: web.Request) -> bytes:
        nonlocal under_way
        too_large = f"the body is larger than {max_body_bytes} bytes (trajectories.max_body_bytes)"
        if (request.content_length or 0) > max_body_bytes:
            raise Refused(413, too_large)
        size = max_body_bytes if request.content_length is None else request.content_length
        if under_way + size > BODIES * max_body_bytes:
            raise Refused(429, f"{under_way} bytes are being received already: send it again later")
        under_way += size
        parts, received = [], 0  # request.read() would copy twice more
        try:
            async for part in request.content.iter_any():
                parts.append(part)
                received += len(part)
                if received > max_body_bytes:
                    raise Refused(413, too_large)
        finally:
            under_way -= size
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        return inflate(body, request.headers.get("Content-Encoding", ""), INFLATED * max_body_bytes)

    def answer(value: Any) -> web.Response:
        return web.Response(
            body=value if isinstance(value, bytes) else orjson.dumps(value),
            content_type="application/json",
        )

    async def stream(
        request: web.Request, content_type: str, chunks: Iterable[bytes], length: int | None
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": content_type})
        response.content_length = length
        await response.prepare(request)
        for chunk in chunks:
            await response.write(chunk)
            await asyncio.sleep(0)
        await response.write_eof()
        return response

    def with_body(method: Callable[[bytes], Awaitable[Any]]) -> Handler:
        async def handle(request: web.Request) -> web.Response:
            return answer(await method(await read(request)))

        return handle

    def without_body(method: Callable[[], Any]) -> Handler:
        async def handle(request: web.Request) -> web.Response:
            return answer(method())

        return handle

    async def scored_data(request: web.Request) -> web.Response:
        await service.store(await read(request), many=False)
        return answer({"status": "received"})

    async def scored_data_list(request: web.Request) -> web.Response:
        count = await service.store(await read(request), many=True)
        return answer({"status": "received", "groups_processed": count})

    async def batch(request: web.Request) -> web.StreamResponse:
        if service.ledger.registration is None:
            return answer(
                {
                    "status": "error",
                    "message": "Trainer not registered. Call /register first.",
                    "batch": [],
                }
            )
        places = await service.batch()
        if places is None:
            return answer({"batch": None})
        return await stream(request, "application/json", _batch_json(service, places), None)

    async def lease(request: web.Request) -> web.StreamResponse:
        k, rank, world = (number(request, name) for name in ("batch", "rank", "world"))
        oldest, version, wait_s = (
            number(request, "oldest", 0),
            number(request, "version", k),
            number(request, "wait", 0, float),
        )
        places = await service.lease(k, rank, world, wait_s, oldest, version)
        if places is None:
            return web.Response(status=204)
        return await stream(
            request,
            "application/octet-stream",
            _records(service, places),
            sum(place.size for place in places),
        )

    async def ack(request: web.Request) -> web.Response:
        return answer(await service.acknowledge(number(request, "batch")))

    async def reset_data(request: web.Request) -> web.Response:
        await service.reset()
        return web.Response(text="Reset successful")

    app = web.Application(middlewares=[guard], client_max_size=max_body_bytes)
    app.add_routes(
        [
            web.get("/", without_body(lambda: {"message": "AtroposLib API"})),
            web.get("/health", without_body(lambda: {"status": "ok"})),
            web.get("/info", without_body(service.info)),
            web.get("/wandb_info", without_body(service.wandb_info)),
            web.get("/status", without_body(service.status)),
            web.get(
                "/latest_example", without_body(lambda: service.latest_example() or NO_EXAMPLE)
            ),
            web.get("/status-env", with_body(service.environment_status)),
            web.get("/reset_data", reset_data),
            web.get("/batch", batch),
            web.get("/lease", lease),
            web.post("/ack", ack),
            web.post("/register", with_body(service.register)),
            web.post("/register-env", with_body(service.register_environment)),
            web.post("/disconnect-env", with_body(service.disconnect_environment)),
            web.post("/scored_data", scored_data),
            web.post("/scored_data_list", scored_data_list),
        ]
    )
    return app


def authorized(header: str, token: str) -> bool:
    """Whether an Authorization header carries the token, as a bearer or as Basic's password."""
    scheme, _, credentials = header.partition(" ")
    if scheme.lower() == "basic":
        try:
            credentials = base64.b64decode(credentials, validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            return False
    elif scheme.lower() != "bearer":
        return False
    return hmac.compare_digest(credentials.strip().encode(), token.encode())


def inflate(body: bytes, encoding: str, limit: int) -> bytes:
    """Undo Content-Encoding. Never more than `limit` bytes come out, or are held on the way. Raises Refused (400, 413, 415)."""
    if encoding.lower() in ("", "identity"):
        return body
    if encoding.lower() not in ("gzip", "x-gzip"):
        raise Refused(415, f"content-encoding {encoding}: gzip or none is needed")
    parts, room = [], limit
    try:
        while body:
            member = isal_zlib.decompressobj(31)  # gzip's header and trailer
            part = member.decompress(body, room + 1)
            parts.append(part)
            room -= len(part)
            if room < 0:
                raise Refused(413, f"the body inflates to more than {limit} bytes")
            if not member.eof:
                raise Refused(400, "gzip: the body is cut short")
            body = member.unused_data
    except (isal_zlib.error, EOFError, ValueError) as error:  # type: ignore[misc]
        raise Refused(400, f"gzip: {error}") from None
    return parts[0] if len(parts) == 1 else b"".join(parts)


def number(
    request: web.Request,
    name: str,
    default: float | None = None,
    kind: Callable[[str], float] = int,
) -> Any:
    """A number of the query string. Raises Refused (422)."""
    text = request.query.get(name)
    if text is None and default is not None:
        return default
    try:
        value = kind(text or "")
        if not 0 <= value < 2**53:
            raise ValueError
        return value
    except ValueError:
        raise Refused(422, f"{name}={text}: a number from 0 is needed in the query") from None


def _records(service: Service, places: list[Place]) -> Iterable[bytes]:
    """The records at `places`, in chunks of about CHUNK_BYTES."""
    parts: list[bytes] = []
    for place in places:
        parts.append(service.journal.read(place))
        if sum(map(len, parts)) >= CHUNK_BYTES:
            yield b"".join(parts)
            parts = []
    if parts:
        yield b"".join(parts)


def _batch_json(service: Service, places: list[Place]) -> Iterable[bytes]:
    for index, place in enumerate(places):
        yield (b"," if index else b'{"batch":[') + group.as_json(service.journal.read(place))
    yield b"]}"


def listen(run: RunDir, member: str, host: str) -> socket.socket:
    """A bound socket on `host`: on the port that the member's previous process had if that is free, else on any."""
    try:
        known = read_struct(run.members / f"{member}.json", TrajectoriesState)
        previous = (known.url or "").rpartition(":")[2] if known else ""
    except Unreadable:  # damaged; this process will write it anew
        previous = ""
    family, _, _, _, address = socket.getaddrinfo(
        host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    for port in ([int(previous)] if previous.isdigit() else []) + [0]:
        server = socket.socket(family, socket.SOCK_STREAM)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind((address[0], port))
            return server
        except OSError as error:
            server.close()
            if port == 0:
                raise OSError(f"cannot listen on {host} (cluster.host): {error}") from None
            log.warning("port %d, which was ours, is taken (%s): taking another", port, error)
    raise AssertionError("unreachable")


def url_of(server: socket.socket, host: str) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{server.getsockname()[1]}"


async def start(app: web.Application, server: socket.socket) -> web.AppRunner:
    """Serve `app` on a bound socket, until the returned runner's cleanup(). Inflating bodies is left to `inflate`, which has a limit."""
    runner = web.AppRunner(
        app,
        access_log=None,
        auto_decompress=False,
        handler_cancellation=False,
        shutdown_timeout=CLOSE_S,
    )
    await runner.setup()
    await web.SockSite(runner, server, backlog=BACKLOG).start()
    return runner


async def tell_depth(
    member: Member[TrajectoriesState], depth: Callable[[], dict[str, int]], end: "asyncio.Task[Any]"
) -> None:
    """Until `end` has ended, keep the rendezvous told of the queue's depth."""
    while not (await asyncio.wait([end], timeout=DEPTH_S))[0]:
        await asyncio.to_thread(member.update_if_changed, **depth())


async def serve(run: RunDir, node: str) -> None:
    """Be the run's trajectory server until TERM."""
    config, token = run.config(), run.token()
    host = own_host(config.cluster.host)
    stop = asyncio.Event()
    for number_ in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number_, stop.set)
    process.tasks_on_request()
    server = listen(
        run, f"trajectories-{node}-0", host
    )  # before Member, which overwrites the record of the port
    member = Member(run, TrajectoriesState(), node)
    try:
        service = Service(
            run.trajectories, config.trajectories.segment_bytes, config.model.max_length
        )
    except Damaged as error:
        log.error("%s", error)
        member.leave(state="ended", error=str(error))
        raise SystemExit(1) from None
    runner = await start(application(service, token, config.trajectories.max_body_bytes), server)
    url = url_of(server, host)
    log.info("listening on %s", url)
    await asyncio.to_thread(member.update, state="serving", url=url, **service.depth())
    await tell_depth(member, service.depth, asyncio.create_task(stop.wait()))
    log.info("ending")
    service.end_waits()
    await runner.cleanup()
    await service.close()
    await asyncio.to_thread(member.leave, **service.depth())


def keep_memory() -> None:
    """Have glibc keep what is freed: bodies come and go, and to map each one's pages anew costs time. And have Python look for garbage
    less often, and not among what was imported. Together a sixth of the CPU time of a group.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE, 20, 50)
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def main(serve: Callable[[RunDir, str], Coroutine[Any, Any, None]], description: str) -> None:
    """The process of a trajectory server, this one's or upstream's."""
    process.die_with_parent(signal.SIGKILL)
    keep_memory()
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--run-dir", type=Path, required=True)
    arguments = parser.parse_args()
    process.log_to_stderr()
    asyncio.run(serve(RunDir(arguments.run_dir), os.environ.get(NODE, "local")))


if __name__ == "__main__":
    main(serve, "A run's trajectory server.")
