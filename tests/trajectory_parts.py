"""Shared parts of the trajectory tests: groups, a service behind HTTP, a server process."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any

import aiohttp

from atropos_hpc.contracts.group import Group
from atropos_hpc.contracts.messages import Registration
from atropos_hpc.runtime.run_dir import RunDir, read_json, write_json
from atropos_hpc.trajectories import events
from atropos_hpc.trajectories.client import groups_of
from atropos_hpc.trajectories.events import Environment
from atropos_hpc.trajectories.http_body import BodyLimits
from atropos_hpc.trajectories.journal import Place
from atropos_hpc.trajectories.pacing import Pacing
from atropos_hpc.trajectories.server import application, start
from atropos_hpc.trajectories.service import Service, ServiceSettings
from atropos_hpc.trajectories.state import QueuedGroup, TrajectoryState

TOKEN = "a-token"


def group(
    number: int, sequences: int = 4, length: int = 6, version: int | None = None, **more: Any
) -> dict[str, Any]:
    """A ScoredData whose first token id is its number; each sequence has two masked tokens."""
    tokens = [[number, row, *range(2, length)] for row in range(sequences)]
    value = {
        "tokens": tokens,
        "masks": [[-100, -100, *row[2:]] for row in tokens],
        "scores": [float(row % 2) for row in range(sequences)],
        "inference_logprobs": [[1.0, 1.0, *[-0.25] * (length - 2)] for _ in tokens],
        "generation_params": {"group_id": f"group-{number}"},
    }
    if version is not None:
        value["generation_params"]["policy_versions"] = [[version, version + 1]] * sequences
    return value | more


def registration(batch_size: int = 8, **more: Any) -> dict[str, Any]:
    return {
        "wandb_group": "group",
        "wandb_project": "project",
        "batch_size": batch_size,
        "max_token_len": 100,
        "checkpoint_dir": "checkpoints",
        "save_checkpoint_interval": 5,
        "starting_step": 0,
        "num_steps": 50,
    } | more


def environment(name: str = "env", group_size: int = 4, **more: Any) -> dict[str, Any]:
    return {
        "max_token_length": 100,
        "desired_name": name,
        "weight": 1.0,
        "group_size": group_size,
    } | more


def numbers(groups: list[Group]) -> list[int]:
    """The numbers that `group` was called with."""
    return [int(g.tokens[0]) for g in groups]


def item(
    gid: int,
    sequences: int = 4,
    tokens: int = 10,
    env_id: int = 0,
    oldest: int = -1,
    segment: int = 0,
) -> QueuedGroup:
    """A group as the server's state has it."""
    return QueuedGroup(gid, Place(segment, gid * 100, 100), sequences, tokens, env_id, oldest)


def paced(
    batch_size: int = 8,
    environments: Sequence[dict[str, Any]] = (),
    max_staleness: int = 0,
    **registration: Any,
) -> tuple[TrajectoryState, Pacing]:
    """A state with a trainer, and environments given as dicts, all heard of at time 0."""
    state = TrajectoryState()
    state.apply(events.TrainerRegistered(Registration(batch_size, 0, **registration)))
    pacing = Pacing(state, max_staleness)
    for env_id, more in enumerate(environments):
        values = {"max_token_length": 10, "group_size": 4, "weight": 1.0, **more}
        state.apply(events.EnvironmentAdded(Environment(env_id, "e", "e", **values)))
        pacing.connect(env_id, 0.0)
    return state, pacing


def add(to: TrajectoryState, *items: QueuedGroup) -> None:
    for one in items:
        to.add(one, payload_hash=one.gid)


class Http:
    """Requests to a service that runs in this process and event loop."""

    def __init__(self, service: Service, client: aiohttp.ClientSession) -> None:
        self.service, self.client = service, client

    async def raw(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        data = json.dumps(body).encode() if isinstance(body, dict | list) else body
        response = await self.client.request(
            method, path, data=data, headers={"Authorization": f"Bearer {TOKEN}"} | (headers or {})
        )
        return response.status, await response.read()

    async def get(self, path: str, body: Any = None) -> Any:
        status, answer = await self.raw("GET", path, body)
        assert status == 200, (path, status, answer)
        return json.loads(answer)

    async def post(self, path: str, body: Any = None) -> Any:
        status, answer = await self.raw("POST", path, body)
        assert status == 200, (path, status, answer)
        return json.loads(answer)

    async def send(self, *groups: dict[str, Any]) -> None:
        for value in groups:
            assert await self.post("/scored_data", value) == {"status": "received"}

    async def lease(self, batch: int, **query: Any) -> list[Group] | None:
        """None for 204; raises AssertionError for what is neither 200 nor 204."""
        query = {"rank": 0, "world": 1} | query
        path = f"/lease?batch={batch}&" + "&".join(
            f"{name}={value}" for name, value in query.items()
        )
        status, body = await self.raw("GET", path)
        assert status in (200, 204), (path, status, body)
        return groups_of(bytearray(body)) if status == 200 else None

    async def start(self, batch_size: int = 8, **more: Any) -> None:
        """Register a trainer and let it lease once, so that environments may register."""
        await self.post("/register", registration(batch_size, **more))
        assert await self.lease(more.get("starting_step", 0)) is None


def with_service(
    directory: Path,
    story: Callable[[Http], Awaitable[None]],
    max_body_bytes: int = 1 << 20,
    **settings: Any,
) -> None:
    """Run `story` against a service over `directory`. A second call is a restart."""

    async def run() -> None:
        service = Service(directory, ServiceSettings(**{"segment_bytes": 1 << 20} | settings))
        listener = socket.create_server(("127.0.0.1", 0))
        runner = await start(application(service, TOKEN, BodyLimits(max_body_bytes)), listener)
        async with aiohttp.ClientSession(f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
            await story(Http(service, client))
        service.end_waits()
        await runner.cleanup()
        await service.close()

    asyncio.run(run())


@contextmanager
def serving(directory: Path, max_body_bytes: int = 1 << 20) -> Iterator[tuple[Service, int]]:
    """A service over `directory` behind HTTP, in a thread of its own: (service, port)."""
    made: Queue[tuple[Service, int, asyncio.AbstractEventLoop, asyncio.Event]] = Queue()

    async def run() -> None:
        service = Service(directory, ServiceSettings(segment_bytes=1 << 20))
        over = asyncio.Event()
        listener = socket.create_server(("127.0.0.1", 0))
        runner = await start(application(service, TOKEN, BodyLimits(max_body_bytes)), listener)
        made.put((service, listener.getsockname()[1], asyncio.get_running_loop(), over))
        await over.wait()
        await runner.cleanup()
        await service.close()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    service, port, loop, over = made.get(timeout=30)
    try:
        yield service, port
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(30)


def make_run(path: Path, **trajectories: Any) -> RunDir:
    """A run directory with as much of a config as a trajectory server reads."""
    run = RunDir(path)
    run.create()
    config = {
        "cluster": {"host": "127.0.0.1"},
        "model": {"max_length": 64},
        "trajectories": {
            "server": "durable",
            "max_body_bytes": 1 << 20,
            "segment_bytes": 1 << 20,
            **trajectories,
        },
    }
    write_json(run.run_json, {"config": config})
    return run


@contextmanager
def server_process(run: RunDir, module: str = "server") -> Iterator[subprocess.Popen[bytes]]:
    """The server of `run`, listening; killed at the end if it still runs."""
    with (run.path / "server.log").open("ab") as log:
        command = [
            sys.executable,
            "-m",
            f"atropos_hpc.trajectories.{module}",
            "--run-dir",
            str(run.path),
        ]
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    try:
        deadline = time.monotonic() + 60
        while (state := member(run)).get("state") != "serving" or state["pid"] != process.pid:
            assert process.poll() is None and time.monotonic() < deadline, (
                run.path / "server.log"
            ).read_text()
            time.sleep(0.02)
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()


def member(run: RunDir) -> dict[str, Any]:
    """What the server tells of itself in the rendezvous."""
    return read_json(run.members / "trajectories-local-0.json")
