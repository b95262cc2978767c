"""Shared parts of the rollout tests: run directories, rosters, versions, fake vLLM servers."""

import asyncio
import dataclasses
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from aiohttp import web

from atropos_hpc.config import Config
from atropos_hpc.contracts.members import AgentState, Roster, ServerState
from atropos_hpc.contracts.policy import DeltaEntry, FileEntry, Manifest, PolicyVersion
from atropos_hpc.policy import delta
from atropos_hpc.policy.delta import Region
from atropos_hpc.policy.shard_buffer import WIDTHS, tensors_of, xxh3
from atropos_hpc.policy.store import PolicyStore
from atropos_hpc.rollout.server_pool import GENERATE
from atropos_hpc.runtime.membership import RosterPublisher
from atropos_hpc.runtime.process import PARENT
from atropos_hpc.runtime.run_dir import RunDir, write_file, write_json, write_struct

ANSWER = {
    "choices": [
        {
            "token_ids": [7],
            "finish_reason": "stop",
            "weight_versions": [{"version": "1-1", "start": 0, "end": 1}],
        }
    ]
}
Behaviour = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_run(path: Path, **sections: dict[str, Any]) -> RunDir:
    """A run directory whose run.json has these changes to the default config."""
    run = RunDir(path)
    run.create()
    config = Config(run_dir=str(path))
    config.environment.target = "nowhere:Nothing"
    values = dataclasses.asdict(config)
    for section, changes in sections.items():
        values[section] |= changes
    write_json(run.run_json, {"config": values})
    return run


def list_servers(run: RunDir, versions: dict[str, int]) -> None:
    """A roster with one node agent that has these servers, URL -> version."""
    servers = [
        ServerState(url=url, version=PolicyVersion(version=version, attempt=1))
        for url, version in versions.items()
    ]
    write_struct(run.roster, Roster(members={"agent-a-0": AgentState(servers=servers)}))


@contextmanager
def leader(run: RunDir) -> Iterator[None]:
    """Publishes the roster, as the supervisor does."""
    stop, looking = threading.Event(), RosterPublisher(run)

    def look() -> None:
        while not stop.wait(0.05):
            looking.publish()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def module(
    name: str, *arguments: str, log: Path, python: str | Path = sys.executable, **variables: str
) -> Iterator["subprocess.Popen[bytes]"]:
    """`python -m name ...`, bound to this process; ended, and waited for."""
    env = {**os.environ, PARENT: str(os.getpid()), "OMP_NUM_THREADS": "1", **variables}
    with log.open("ab") as output:
        child = subprocess.Popen(
            [python, "-m", name, *arguments], env=env, stdout=output, stderr=output
        )
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def publish(run: RunDir, weights: Path, version: int, attempt: int = 1) -> Path:
    """The safetensors file `weights` as a published version; returns its directory."""
    key, store = PolicyVersion(version=version, attempt=attempt), PolicyStore(run.policy)
    directory = store.begin(key)
    shutil.copy(weights, directory / "part-0.safetensors")
    data = weights.read_bytes()
    entry = FileEntry("part-0.safetensors", len(data), xxhash.xxh3_64_hexdigest(data))
    store.commit(Manifest(version=key, kind="full", files=(entry,)))
    return directory


def publish_delta(run: RunDir, old: Path, new: Path, version: int) -> None:
    """Publish the delta from the safetensors file `old` (the version before) to `new`."""
    before, after = (np.fromfile(path, np.uint8) for path in (old, new))
    starts = [
        (name, first, last, WIDTHS[kind])
        for name, (kind, _, first, last) in tensors_of(after).items()
    ]
    regions = [Region(0, min(first for _, first, _, _ in starts), 1)]
    regions += [
        Region(first, last - first, width)
        for _, first, last, width in sorted(starts, key=lambda start: start[1])
    ]
    coded = delta.encode(before, after, regions)
    store = PolicyStore(run.policy)
    key, base = (PolicyVersion(version=v, attempt=1) for v in (version, version - 1))
    write_file(store.begin(key) / "part-0.delta", coded)
    full = FileEntry("part-0.safetensors", len(after), xxh3(after))
    digest = xxhash.xxh3_64_hexdigest(coded)
    change = DeltaEntry("part-0.delta", len(coded), digest, full.file)
    store.commit(Manifest(version=key, kind="delta", files=(full,), base=base, deltas=(change,)))


class FakeServer:
    """A vLLM server's token endpoint that does what `behave` does."""

    def __init__(self, behave: Behaviour) -> None:
        self.behave, self.served, self.aborted, self.tokens = behave, 0, 0, set[str | None]()
        self.routes: dict[str, Behaviour] = {}  # further ones

    async def __aenter__(self) -> "FakeServer":
        async def handle(request: web.Request) -> web.StreamResponse:
            self.served += 1
            self.tokens.add(request.headers.get("Authorization"))
            try:
                return await self.behave(request)
            except asyncio.CancelledError:
                self.aborted += 1
                raise

        async def further(request: web.Request) -> web.StreamResponse:
            return await self.routes[request.path](request)

        app = web.Application()
        app.router.add_post(GENERATE, handle)
        app.router.add_post("/{route:.*}", further)
        self.runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.runner.cleanup()


async def good(request: web.Request) -> web.StreamResponse:
    return web.json_response(ANSWER)


async def hang(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(3600)
    raise AssertionError("unreachable")


async def die(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    await asyncio.sleep(3600)
    raise AssertionError("unreachable")


def status(code: int) -> Behaviour:
    async def behave(request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": "x"}, status=code)

    return behave


def ks_distance(one: Sequence[int], other: Sequence[int]) -> float:
    """The Kolmogorov-Smirnov distance: the largest between the two empirical distributions."""
    at = np.union1d(one, other)
    cumulated = [np.searchsorted(np.sort(each), at, "right") / len(each) for each in (one, other)]
    return float(np.abs(cumulated[0] - cumulated[1]).max())


def ks_critical(size: int, alpha: float = 0.01) -> float:
    """What that distance exceeds with probability `alpha` for two samples of one distribution."""
    return math.sqrt(-math.log(alpha / 2) / size)
