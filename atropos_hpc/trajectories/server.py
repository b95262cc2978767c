"""The trajectory server's process: HTTP over `Service`, as a member of a run.

    python -m atropos_hpc.trajectories.server --run-dir RUN

It speaks Atropos' trajectory API, so unmodified environments and trainers work with it. Posted
groups may be JSON or binary records; GET /lease and POST /ack are for the learner. Every route but
GET /health asks for the run's token.
"""

import argparse
import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from atropos_hpc.contracts import messages
from atropos_hpc.contracts.members import TrajectoriesState
from atropos_hpc.contracts.metrics import EnvironmentMetrics
from atropos_hpc.contracts.prompts import DrawRequest
from atropos_hpc.contracts.scored_group import OPTIONAL_ARRAYS, RequestError
from atropos_hpc.contracts.wal_record import CONTENT_TYPE
from atropos_hpc.runtime import process
from atropos_hpc.runtime.membership import Member
from atropos_hpc.runtime.network import http_url, own_host
from atropos_hpc.runtime.run_dir import RunDir, Unreadable, append_record, read_struct
from atropos_hpc.runtime.token_check import authorized
from atropos_hpc.trajectories.connections import ConnectionLimits, LimitedSite, authenticate
from atropos_hpc.trajectories.decode import decode_json, decode_records, to_json
from atropos_hpc.trajectories.http_body import BodyLimits, BodyReader
from atropos_hpc.trajectories.journal import Damaged, InUse, Place
from atropos_hpc.trajectories.service import Service, ServiceSettings

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20  # of an answer, between which other requests are served
STATUS_S = 2.0  # between two updates of the queue depth in the member file
BACKLOG = 1024  # connections that wait to be accepted
CLOSE_S = 5.0  # for requests in progress at the end
EXAMPLE_FIELDS = (
    *("tokens", "masks", "scores", "generation_params", "messages", "images"),
    *OPTIONAL_ARRAYS,
)
NO_EXAMPLE: dict[str, list[object]] = {name: [] for name in EXAMPLE_FIELDS}

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def application(
    service: Service, token: str, bodies: BodyLimits, metrics: Path | None = None
) -> web.Application:
    """Build the aiohttp application; `start` runs it.

    Metrics of the environments are appended to the file `metrics`.
    """
    routes = Routes(service, token, bodies)
    app = web.Application(middlewares=[routes.guard], client_max_size=bodies.max_bytes)
    get, post, with_body = web.get, web.post, routes.with_body
    app.add_routes(
        [
            get("/", without_body(lambda: {"message": "AtroposLib API"})),
            get("/health", without_body(lambda: {"status": "ok"})),
            get("/info", without_body(service.info)),
            get("/wandb_info", without_body(service.wandb_info)),
            get("/status", without_body(service.status)),
            get("/latest_example", without_body(lambda: service.latest_example() or NO_EXAMPLE)),
            get("/status-env", with_body(messages.StatusRequest, service.environment_status)),
            get("/reset_data", routes.reset_data),
            get("/batch", routes.batch),
            get("/lease", routes.lease),
            post("/ack", routes.acknowledge),
            post("/register", with_body(messages.Registration, service.register)),
            post(
                "/register-env",
                with_body(messages.EnvironmentRegistration, service.register_environment),
            ),
            post(
                "/disconnect-env", with_body(messages.StatusRequest, service.disconnect_environment)
            ),
            post("/draws", with_body(DrawRequest, service.draws.draw)),
            post("/scored_data", routes.scored_data),
            post("/scored_data_list", routes.scored_data_list),
            post("/environment-metrics", routes.with_body(EnvironmentMetrics, keep_in(metrics))),
        ]
    )
    return app


class Routes:
    """The handlers of the routes that need more than a JSON body and a method of the service."""

    def __init__(self, service: Service, token: str, bodies: BodyLimits) -> None:
        self.service, self.token = service, token
        self.bodies = BodyReader(bodies)

    @web.middleware
    async def guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Check the token, then call the route. Every error is answered with an ErrorBody."""
        header = request.headers.get("Authorization", "")
        if request.path != "/health" and not authorized(header, self.token):
            how = "Authorization: Bearer <token>, or as the password of Basic"
            response = self._reject(request, 401, f"this run's token is needed: {how}")
            response.force_close()
            return response
        if request.path != "/health":
            authenticate(request)
        try:
            return await handler(request)
        except RequestError as error:
            return self._reject(request, error.status, str(error))
        except web.HTTPException as error:
            detail = f"{request.method} {request.path}: {error.reason}"
            return self._reject(request, error.status, detail)

    def _reject(self, request: web.Request, status: int, detail: str) -> web.Response:
        self.service.rejections[status] += 1
        count = self.service.rejections[status]
        # Log the 1st, 2nd, 4th, 8th, ... of each status, so that a flood does not fill the disk.
        if status != 410 and count & (count - 1) == 0:
            log.warning(
                "rejected %s %s from %s (%d, number %d): %s",
                request.method,
                request.path,
                request.remote,
                status,
                count,
                detail,
            )
        response = json_response(messages.ErrorBody(detail), status)
        if status == 401:
            response.headers["WWW-Authenticate"] = "Bearer"
        return response

    def with_body(self, kind: type[T], method: Callable[[T], Awaitable[object]]) -> Handler:
        """Make a handler that decodes the body as `kind` and answers with the method's result."""

        async def handle(request: web.Request) -> web.Response:
            return json_response(
                await method(messages.decode_body(await self.bodies.read(request), kind))
            )

        return handle

    async def scored_data(self, request: web.Request) -> web.Response:
        await self._store(request, many=False)
        return json_response(messages.Stored("received"))

    async def scored_data_list(self, request: web.Request) -> web.Response:
        return json_response(messages.Stored("received", await self._store(request, many=True)))

    async def _store(self, request: web.Request, many: bool) -> int:
        limits = self.service.limits()
        body = await self.bodies.read(request)
        if request.content_type == CONTENT_TYPE:
            records = decode_records(body, limits)
        else:
            records = decode_json(body, many, limits)
        await self.service.store(records)
        return len(records)

    async def batch(self, request: web.Request) -> web.StreamResponse:
        """GET /batch, of Atropos' protocol."""
        if self.service.state.registration is None:
            message = "Trainer not registered. Call /register first."
            return json_response({"status": "error", "message": message, "batch": []})
        places = await self.service.batch()
        if places is None:
            return json_response({"batch": None})
        return await stream(request, "application/json", self._batch_json(places), None)

    def _batch_json(self, places: list[Place]) -> Iterable[bytes]:
        for index, place in enumerate(places):
            yield (b"," if index else b'{"batch":[') + to_json(self.service.journal.read(place))
        yield b"]}"

    async def lease(self, request: web.Request) -> web.StreamResponse:
        """GET /lease: the records of one rank's groups, or 204 if they are not there in time."""
        places = await self.service.lease(messages.decode_query(request.query, messages.LeaseQuery))
        if places is None:
            return web.Response(status=204)
        length = sum(place.size for place in places)
        return await stream(request, CONTENT_TYPE, self._records(places), length)

    def _records(self, places: list[Place]) -> Iterable[bytes]:
        """Yield the records at `places`, in chunks of about CHUNK_BYTES."""
        parts: list[bytes] = []
        for place in places:
            parts.append(self.service.journal.read(place))
            if sum(map(len, parts)) >= CHUNK_BYTES:
                yield b"".join(parts)
                parts = []
        if parts:
            yield b"".join(parts)

    async def acknowledge(self, request: web.Request) -> web.Response:
        query = messages.decode_query(request.query, messages.AcknowledgeQuery)
        return json_response(await self.service.acknowledge(query.batch))

    async def reset_data(self, request: web.Request) -> web.Response:
        """GET /reset_data, of Atropos' protocol."""
        await self.service.reset()
        return web.Response(text="Reset successful")


def keep_in(path: Path | None) -> Callable[[EnvironmentMetrics], Awaitable[messages.Stored]]:
    """Make the method that appends an environment's metrics to a file; None: to none."""

    async def keep(logged: EnvironmentMetrics) -> messages.Stored:
        if path is not None:
            timed = msgspec.structs.replace(logged, time=time.time())
            await asyncio.to_thread(append_record, path, timed)  # may wait for the filesystem
        return messages.Stored("received")

    return keep


def without_body(method: Callable[[], object]) -> Handler:
    """Make a handler that answers with the method's result."""

    async def handle(request: web.Request) -> web.Response:
        return json_response(method())

    return handle


def json_response(value: object, status: int = 200) -> web.Response:
    """Answer with a message, or with JSON that is encoded already."""
    body = value if isinstance(value, bytes) else msgspec.json.encode(value)
    return web.Response(body=body, status=status, content_type="application/json")


async def stream(
    request: web.Request, content_type: str, chunks: Iterable[bytes], length: int | None
) -> web.StreamResponse:
    """Answer in chunks, serving other requests between them."""
    response = web.StreamResponse(headers={"Content-Type": content_type})
    response.content_length = length
    await response.prepare(request)
    for chunk in chunks:
        await response.write(chunk)
        await asyncio.sleep(0)
    await response.write_eof()
    return response


# --- the process


def listen(run: RunDir, member: str, host: str) -> socket.socket:
    """Bind a socket on `host`: on the port of the member's previous process, if that is free."""
    try:
        known = read_struct(run.members / f"{member}.json", TrajectoriesState)
        previous = (known.url or "") if known else ""
    except Unreadable:  # damaged; this process replaces it
        previous = ""
    port = previous.rpartition(":")[2]
    family, _, _, _, address = socket.getaddrinfo(
        host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    if port.isdigit():
        try:
            return _bound(family, address[0], int(port))
        except OSError as error:
            log.warning(
                "port %s of the previous server is taken (%s): choosing another", port, error
            )
    try:
        return _bound(family, address[0], 0)
    except OSError as error:
        raise OSError(f"cannot listen on {host} (cluster.host): {error}") from None


def _bound(family: socket.AddressFamily, host: Any, port: int) -> socket.socket:
    server = socket.socket(family, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((host, port))
    except OSError:
        server.close()
        raise
    return server


def url_of(server: socket.socket, host: str) -> str:
    """Return the URL of a bound socket."""
    return http_url(host, server.getsockname()[1])


async def start(
    app: web.Application, server: socket.socket, limits: ConnectionLimits | None = None
) -> web.AppRunner:
    """Serve `app` on a bound socket, until the returned runner's cleanup()."""
    runner = web.AppRunner(
        app,
        access_log=None,
        auto_decompress=False,  # `inflate` does it, with a limit
        handler_cancellation=False,
        shutdown_timeout=CLOSE_S,
    )
    await runner.setup()
    await LimitedSite(runner, server, limits or ConnectionLimits(), BACKLOG).start()
    return runner


async def report_status(
    member: Member[TrajectoriesState], status: Callable[[], dict[str, Any]], end: asyncio.Task[Any]
) -> None:
    """Keep the queue's counts in the member file up to date, until `end` is done."""
    while not (await asyncio.wait([end], timeout=STATUS_S))[0]:
        await asyncio.to_thread(member.update_if_changed, **status())


async def serve(run: RunDir, node: str) -> None:
    """Run the trajectory server until SIGTERM."""
    config, token = run.config(), run.token()
    host = own_host(config.cluster.host)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    process.dump_tasks_on_request()
    # Before Member, which overwrites the record of the previous port.
    server = listen(run, f"trajectories-{node}-0", host)
    member = Member(run, TrajectoriesState(), node)
    settings = ServiceSettings(
        config.trajectories.segment_bytes, config.model.max_length, config.staleness.max
    )
    try:
        service = Service(run.trajectories, settings)
    except Damaged as error:
        log.error("%s", error)
        member.leave(state="ended", error=str(error))
        raise SystemExit(1 if isinstance(error, InUse) else process.REFUSED) from None

    def status() -> dict[str, Any]:
        counts = msgspec.structs.asdict(service.status())
        known = TrajectoriesState.__struct_fields__
        shown = {name: n for name, n in counts.items() if name in known}
        return {**shown, "alarm": service.journal.alarm}

    bodies = BodyLimits(config.trajectories.max_body_bytes)
    app = application(service, token, bodies, run.environments)
    runner = await start(app, server)
    url = url_of(server, host)
    log.info("trajectory server listening on %s", url)
    await asyncio.to_thread(member.update, state="serving", url=url, **status())
    await report_status(member, status, asyncio.create_task(stop.wait()))
    log.info("trajectory server stopping")
    service.end_waits()
    await runner.cleanup()
    await service.close()
    await asyncio.to_thread(member.leave, **status())


def main(serve: Callable[[RunDir, str], Coroutine[Any, Any, None]], description: str) -> None:
    """Run the process of a trajectory server: this one, or Atropos' own."""
    process.die_with_parent(signal.SIGKILL)
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--run-dir", type=Path, required=True)
    arguments = parser.parse_args()
    process.log_to_stderr()
    asyncio.run(serve(RunDir(arguments.run_dir), os.environ.get(process.NODE, "local")))


if __name__ == "__main__":
    main(serve, "The trajectory server of a run.")
