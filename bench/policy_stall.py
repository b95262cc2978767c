"""Measure how long a live vLLM generates no token while it loads a version, per update mode.

A real server of the rollout role, with a Qwen3 of 60 M random parameters in bfloat16, serves
STREAMS concurrent requests of TOKENS tokens, each followed by another. Meanwhile versions are
published, followed and pushed as a node agent does. The stall of an update is the longest time
without a token of any request, from its first request to a second after its last. It is compared
with the engine's own load time: that of the request of the update in which the engine applies the
weights.

In mode wait, running requests end before the weights are loaded and new ones wait; in mode abort
they are aborted. What that costs a run beyond the stall is not measured."""

import asyncio
import contextlib
import dataclasses
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from atropos_hpc.config import Config
from atropos_hpc.contracts.policy import Manifest, PolicyVersion
from atropos_hpc.policy.follower import Follower
from atropos_hpc.policy.shard_buffer import ShardBuffer, TensorSpec, tensors_of, write_shard
from atropos_hpc.policy.store import PolicyStore
from atropos_hpc.policy.weight_update import UpdateOptions, push
from atropos_hpc.resources import HOME
from atropos_hpc.runtime import process
from atropos_hpc.runtime.run_dir import RunDir, write_json
from bench.parts.models import random_qwen3
from bench.result import Result

STREAMS, TOKENS, UPDATES = 4, 48, 5
MODES = ("keep", "wait", "abort")
START_S = 300.0


def make_model(directory: Path) -> None:
    from atropos_hpc.environments.make_base import make_tokenizer

    model = random_qwen3(32768, 512, 12, (8, 4), bos_token_id=None, eos_token_id=None)
    model.bfloat16().save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)


def publish(store: PolicyStore, share: ShardBuffer, version: int) -> None:
    """Publish the next version: the same weights, slightly changed."""
    numbers = share.buffer[len(share.header) : share.size].view(np.uint16)
    numbers[version::41] ^= np.uint16(1)
    key = PolicyVersion(version=version, attempt=1)
    file = write_shard(store.begin(key) / "model-00001-of-00001.safetensors", share)
    store.commit(Manifest(version=key, kind="full", files=(file,)))
    store.retire(1, 1)


@contextlib.contextmanager
def served(run: RunDir, log: Path) -> Iterator[str]:
    """Start a server of this run, and yield its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["--run-dir", str(run.path), "--port", str(port)]
    python = str(HOME / ".venv-rollout" / "bin" / "python")
    child = process.start(
        "server", [python, "-m", "atropos_hpc.rollout.vllm_server", *arguments], log
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.end([child], 10.0)


class Load:
    """Send requests without pause; `times` has the arrival of every token."""

    def __init__(self, session: aiohttp.ClientSession, url: str, token: str) -> None:
        self.session, self.url, self.headers = session, url, {"Authorization": f"Bearer {token}"}
        self.times: list[float] = []
        self.over = False

    async def stream(self, seed: int) -> None:
        sampling = {
            "temperature": 1.0,
            "max_tokens": TOKENS,
            "min_tokens": TOKENS,
            "ignore_eos": True,
            "seed": seed,
        }
        while not self.over:
            body = {"token_ids": [seed + 3, 5, 7, 11], "sampling_params": sampling, "stream": True}
            with contextlib.suppress(aiohttp.ClientError):
                async with self.session.post(
                    f"{self.url}/inference/v1/generate", json=body, headers=self.headers
                ) as answer:
                    async for line in answer.content:
                        if line.startswith(b"data: {"):
                            self.times.append(time.monotonic())

    def longest_gap(self, begin: float, end: float) -> float:
        """Return the longest time between two tokens of any requests."""
        within = [time for time in self.times if begin <= time <= end]
        before = max((time for time in self.times if time < begin), default=begin)
        return float(max(np.diff([before, *within, end]))) if within else end - begin


async def up(session: aiohttp.ClientSession, url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        with contextlib.suppress(aiohttp.ClientError):
            async with session.get(f"{url}/health") as answer:
                if answer.status == 200:
                    return
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"no server after {START_S:.0f} s; the end of its log:\n{process.tail(log)}"
            )
        await asyncio.sleep(0.3)


async def measure(run: RunDir, url: str, log: Path, share: ShardBuffer, cache: Path) -> Result:
    store = PolicyStore(run.policy)
    follower = Follower(store, cache, "agent")
    took: dict[str, float] = {}

    async def begun(_session: Any, context: Any, parameters: Any) -> None:
        context.begin = time.monotonic()

    async def ended(_session: Any, context: Any, parameters: Any) -> None:
        took[parameters.url.path] = time.monotonic() - context.begin

    trace = aiohttp.TraceConfig()
    trace.on_request_start.append(begun)
    trace.on_request_end.append(ended)
    result, version = Result([]), 0
    async with (
        aiohttp.ClientSession(trace_configs=[trace]) as pushing,
        aiohttp.ClientSession() as asking,
    ):
        await up(asking, url, log)
        load = Load(asking, url, run.token())
        streams = [asyncio.create_task(load.stream(seed)) for seed in range(STREAMS)]
        await asyncio.sleep(3.0)
        for mode in MODES:
            stalls, loads, updates, usual = [], [], [], []
            for _ in range(UPDATES + 1):
                version += 1
                await asyncio.to_thread(publish, store, share, version)
                newest = await asyncio.to_thread(follower.poll)
                assert newest is not None and newest.version.version == version
                calm = time.monotonic()
                await asyncio.sleep(1.0)
                begin = time.monotonic()
                usual.append(load.longest_gap(calm, begin))
                options = UpdateOptions(mode=mode)
                await push(pushing, url, run.token(), newest.directory, newest.version, options)
                end = time.monotonic()
                await asyncio.sleep(1.0)
                stalls.append(load.longest_gap(begin, end + 1.0))
                loads.append(took["/finish_weight_update"])
                updates.append(took["/update_weights"])
            measured = {
                "stall s": stalls,
                "load s": loads,
                "read s": updates,
                "longest gap without an update s": usual,
            }
            middle = {name: statistics.median(values[1:]) for name, values in measured.items()}
            ratio = statistics.median(
                stall / own for stall, own in zip(stalls[1:], loads[1:], strict=True)
            )
            result.rows.append({"mode": mode, **middle, "stall / load": ratio})
        load.over = True
        await asyncio.gather(*streams)
    follower.close()
    result.at_most(
        "stall in mode keep, times the engine's own load time", result.rows[0]["stall / load"], 1.5
    )
    return result


def tensors_in(path: Path) -> list[tuple[TensorSpec, Any]]:
    """Return each tensor of a safetensors file, and its bytes."""
    data = np.fromfile(path, np.uint8)
    return [
        (TensorSpec(name, kind, shape), data[first:last])
        for name, (kind, shape, first, last) in tensors_of(data).items()
    ]


def main() -> Result:
    with (
        tempfile.TemporaryDirectory() as scratch,
        tempfile.TemporaryDirectory(dir="/dev/shm") as cache,
    ):
        root = Path(scratch)
        make_model(root / "model")
        run = RunDir(root / "run")
        run.create()
        config = Config(run_dir=str(run.path))
        config.environment.target = "nowhere:Nothing"
        config.model.path, config.model.max_length = str(root / "model"), 256
        (
            config.rollout.memory_utilization,
            config.rollout.kv_cache_bytes,
            config.rollout.enforce_eager,
        ) = 0.05, 64 << 20, True
        config.rollout.variables = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        write_json(run.run_json, {"config": dataclasses.asdict(config)})
        weights = tensors_in(root / "model" / "model.safetensors")
        share = ShardBuffer([tensor for tensor, _ in weights])
        for tensor, data in weights:
            share.parts[tensor.name][:] = data
        with served(run, root / "log") as url:
            result = asyncio.run(measure(run, url, root / "log", share, Path(cache)))
    result.details |= {"model, bytes": share.size, "streams": STREAMS, "load": os.getloadavg()}
    return result
