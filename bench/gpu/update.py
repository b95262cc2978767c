"""A running vLLM server takes new policy versions while it answers requests.

Requests run concurrently, each for a few hundred tokens; when one ends, the next begins. Versions
are published into a policy store, followed, and pushed as a node agent does. Per kind (full,
delta, adapter):

follow s      from the published version to the node's verified copy (for a delta: applied)
push s        from the first request of the update to the answer of the last
stall s       the longest time without a token of any request, from the start of the push to a
              second after it
preempted     running requests that lost their KV cache, by vLLM's counter
"""

import asyncio
import contextlib
import dataclasses
import json
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from atropos_hpc.config import Config
from atropos_hpc.contracts.policy import (
    ADAPTER_NAME,
    DeltaEntry,
    FileEntry,
    Manifest,
    PolicyVersion,
)
from atropos_hpc.policy import delta
from atropos_hpc.policy.delta import Region
from atropos_hpc.policy.follower import Follower
from atropos_hpc.policy.shard_buffer import WIDTHS, tensors_of, xxh3
from atropos_hpc.policy.store import PolicyStore
from atropos_hpc.policy.weight_update import UpdateOptions, push
from atropos_hpc.runtime import process
from atropos_hpc.runtime.run_dir import RunDir, write_file, write_json
from bench.gpu import parts

START_S = 180.0
RANK = 16
WEIGHTS = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Size:
    streams: int
    tokens: int
    updates: int
    max_length: int


SIZES = {True: Size(64, 256, 4, 2048), False: Size(4, 32, 1, 256)}


class Load:
    """Requests without a pause; `times` holds when tokens arrived."""

    def __init__(
        self, session: aiohttp.ClientSession, url: str, token: str, model: str | None
    ) -> None:
        self.session, self.url, self.headers = session, url, {"Authorization": f"Bearer {token}"}
        self.model, self.times, self.over, self.failed = model, list[float](), False, 0

    async def stream(self, seed: int, tokens: int) -> None:
        sampling = {
            "temperature": 1.0,
            "max_tokens": tokens,
            "min_tokens": tokens,
            "ignore_eos": True,
        }
        while not self.over:
            body: dict[str, Any] = {"sampling_params": {**sampling, "seed": seed}, "stream": True}
            body["token_ids"] = [seed % 50 + 3, *range(5, 69)]
            if self.model is not None:
                body["model"] = self.model
            try:
                async with self.session.post(
                    f"{self.url}/inference/v1/generate", json=body, headers=self.headers
                ) as answer:
                    if answer.status != 200:
                        raise aiohttp.ClientError(f"{answer.status}: {await answer.text()}")
                    async for line in answer.content:
                        if line.startswith(b"data: {"):
                            self.times.append(time.monotonic())
            except aiohttp.ClientError as error:
                self.failed += 1
                if self.failed < 5:
                    print(f"request failed: {error}", flush=True)
                await asyncio.sleep(0.5)

    def longest_gap(self, begin: float, end: float) -> float:
        within = [at for at in self.times if begin <= at <= end]
        before = max((at for at in self.times if at < begin), default=begin)
        return float(max(np.diff([before, *within, end]))) if within else end - begin

    def rate(self, begin: float, end: float) -> float:
        return sum(begin <= at <= end for at in self.times) / (end - begin)


@contextlib.contextmanager
def server(run: RunDir, python: str, log: Path) -> Iterator[str]:
    """A vLLM server of this run; gives its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [python, "-m", "atropos_hpc.rollout.vllm_server", "--run-dir", str(run.path)]
    child = process.start("server", [*command, "--port", str(port)], log)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.end([child], 10.0)


async def ready(session: aiohttp.ClientSession, url: str, log: Path) -> float:
    """Wait for the server; seconds that took."""
    start = time.monotonic()
    while True:
        with contextlib.suppress(aiohttp.ClientError):
            async with session.get(f"{url}/health") as answer:
                if answer.status == 200:
                    return time.monotonic() - start
        if time.monotonic() - start > START_S:
            raise TimeoutError(
                f"no server after {START_S:.0f} s; its log:\n{process.tail(log, 40)}"
            )
        await asyncio.sleep(0.3)


async def preemptions(session: aiohttp.ClientSession, url: str, token: str) -> float:
    headers = {"Authorization": f"Bearer {token}"}
    async with session.get(f"{url}/metrics", headers=headers) as answer:
        lines = (await answer.text()).splitlines()
    found = [line for line in lines if line.startswith("vllm:num_preemptions_total")]
    return sum(float(line.rpartition(" ")[2]) for line in found)


class Versions:
    """Publishes versions of one model: the same weights, a little moved each time."""

    def __init__(self, run: RunDir, model: Path, scratch: Path) -> None:
        self.store, self.number = PolicyStore(run.policy), 0
        self.weights = np.fromfile(model / WEIGHTS, np.uint8)
        tensors = tensors_of(self.weights)
        spans = sorted((first, last, WIDTHS[kind]) for kind, _, first, last in tensors.values())
        self.regions = [
            Region(0, spans[0][0], 1),
            *(Region(a, b - a, width) for a, b, width in spans),
        ]
        self.begin, self.scratch = spans[0][0], scratch
        self.tensors = tensors

    @property
    def key(self) -> PolicyVersion:
        """The version that was published last."""
        return PolicyVersion(version=self.number, attempt=1)

    def _move(self) -> None:
        numbers = self.weights[self.begin :].view(np.uint16)
        numbers[self.number :: 41] ^= np.uint16(1)

    def full(self) -> PolicyVersion:
        self.number += 1
        self._move()
        self.weights.tofile(self.store.begin(self.key) / WEIGHTS)
        file = FileEntry(WEIGHTS, len(self.weights), xxh3(self.weights))
        return self._commit(Manifest(version=self.key, kind="full", files=(file,)))

    def delta(self) -> PolicyVersion:
        before, base = self.weights.copy(), self.key
        self.number += 1
        self._move()
        coded = delta.encode(before, self.weights, self.regions)
        name = WEIGHTS.replace(".safetensors", ".delta")
        write_file(self.store.begin(self.key) / name, coded)
        change = DeltaEntry(name, len(coded), xxh3(np.frombuffer(coded, np.uint8)), WEIGHTS)
        file = FileEntry(WEIGHTS, len(self.weights), xxh3(self.weights))
        manifest = Manifest(
            version=self.key, kind="delta", files=(file,), base=base, deltas=(change,)
        )
        return self._commit(manifest)

    def adapter(self) -> PolicyVersion:
        from safetensors.numpy import save_file

        self.number += 1
        rng, low = np.random.default_rng(self.number), {}
        directory = self.store.begin(self.key)
        for name, span in self.tensors.items():
            shape = span.shape
            if ".layers." in name and name.endswith("proj.weight"):
                stem = f"base_model.model.{name.removesuffix('.weight')}"
                low[f"{stem}.lora_A.weight"] = rng.normal(0, 0.01, (RANK, shape[1])).astype("f4")
                low[f"{stem}.lora_B.weight"] = rng.normal(0, 0.01, (shape[0], RANK)).astype("f4")
        save_file(low, directory / "adapter_model.safetensors")
        targets = sorted({name.split(".")[-3] for name in low})
        conf = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets}
        conf |= {"bias": "none", "task_type": "CAUSAL_LM", "inference_mode": True}
        (directory / "adapter_config.json").write_text(json.dumps(conf))
        files = []
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            data = np.fromfile(directory / name, np.uint8)
            files.append(FileEntry(name, len(data), xxh3(data)))
        return self._commit(Manifest(version=self.key, kind="adapter", files=tuple(files)))

    def _commit(self, manifest: Manifest) -> PolicyVersion:
        self.store.commit(manifest)
        self.store.retire(2, 1)
        return manifest.version


async def measure(
    kind: str, versions: Versions, run: RunDir, url: str, log: Path, cache: Path, size: Size
) -> dict[str, Any]:
    figures: dict[str, list[float]] = {"follow s": [], "push s": [], "stall s": []}
    usual: list[float] = []
    adapter = kind == "adapter"
    follower = Follower(versions.store, cache, f"bench-{kind}")
    timeout = aiohttp.ClientTimeout(total=600)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        await ready(session, url, log)
        load = Load(session, url, run.token(), ADAPTER_NAME if adapter else None)
        streams: list[asyncio.Task[None]] = []

        async def update(publish: Any) -> tuple[float, float, float]:
            version = await asyncio.to_thread(publish)
            begin = time.monotonic()
            newest = await asyncio.to_thread(follower.poll)
            assert newest is not None and newest.version == version, follower.failure
            middle = time.monotonic()
            options = UpdateOptions(adapter=adapter)
            await push(session, url, run.token(), newest.directory, version, options)
            return begin, middle, time.monotonic()

        # the first version has no base, and an adapter is unknown until it is loaded once
        await update(versions.adapter if adapter else versions.full)
        if kind == "delta":
            await update(versions.delta)
        streams += [
            asyncio.create_task(load.stream(seed, size.tokens)) for seed in range(size.streams)
        ]
        await asyncio.sleep(3.0)
        calm = time.monotonic()
        before = await preemptions(session, url, run.token())
        for _ in range(size.updates):
            await asyncio.sleep(1.5)
            usual.append(load.longest_gap(time.monotonic() - 1.0, time.monotonic()))
            begin, middle, end = await update(getattr(versions, kind))
            await asyncio.sleep(1.0)
            figures["follow s"].append(middle - begin)
            figures["push s"].append(end - middle)
            figures["stall s"].append(load.longest_gap(middle, end + 1.0))
        rate = load.rate(calm, time.monotonic())
        preempted = await preemptions(session, url, run.token()) - before
        load.over = True
        await asyncio.gather(*streams)
    follower.close()
    return {
        "what": f"update: {kind}",
        **{name: statistics.median(values) for name, values in figures.items()},
        "longest gap without one s": statistics.median(usual),
        "tokens/s under updates": rate,
        "preempted": preempted,
        "requests failed": load.failed,
    }


@contextlib.asynccontextmanager
async def nothing() -> AsyncIterator[None]:
    yield


def make_run(path: Path, model: Path, gpu: bool, size: Size, rank: int) -> RunDir:
    run = RunDir(path)
    run.create()
    config = Config(run_dir=str(path))
    config.environment.target = "nowhere:Nothing"
    config.model.path, config.model.max_length = str(model), size.max_length
    config.model.lora.rank = rank
    config.rollout.enforce_eager = True
    if gpu:
        config.roles.rollout.gpus_per_node = 1
        config.rollout.memory_utilization = 0.5
    else:
        config.rollout.memory_utilization, config.rollout.kv_cache_bytes = 0.05, 64 << 20
        config.rollout.variables = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    write_json(run.run_json, {"config": dataclasses.asdict(config)})
    return run


def main() -> None:
    options, rows, gpu = parts.options(__doc__), [], parts.has_gpu()
    size = SIZES[gpu]
    shared = Path("/dev/shm") if gpu else None
    with (
        tempfile.TemporaryDirectory(dir=shared) as scratch,
        tempfile.TemporaryDirectory(dir="/dev/shm") as cache,
    ):
        root = Path(scratch)
        device = "cuda" if gpu else "cpu"
        model = options.model or parts.make_model(parts.SHAPES[device][0], root / "model", device)
        for name, kinds in (("full", ("full", "delta")), ("adapter", ("adapter",))):
            run = make_run(root / f"run-{name}", model, gpu, size, RANK if name == "adapter" else 0)
            versions = Versions(run, model, root)
            log = options.logs / f"server-{name}.log"
            started = time.monotonic()
            with server(run, options.rollout_python, log) as url:
                for kind in kinds:
                    row = asyncio.run(measure(kind, versions, run, url, log, Path(cache), size))
                    rows.append(row | {"model GiB": len(versions.weights) / 2**30})
                    rows[-1]["since server start s"] = time.monotonic() - started
                    parts.save_rows(options.out, rows)
                    print(rows[-1], flush=True)
            shutil.rmtree(run.policy)


if __name__ == "__main__":
    main()
