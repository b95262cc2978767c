"""Measure weights through files, compared with what the disk can do.

(1) Publish a model of Qwen2.5-0.5B's shapes (988 MB of bf16) in full from two ranks, and read it in
    place. The reference is raw O_DIRECT writing and reading of as many bytes by two processes; both
    run one after the other in every round. Beside it, prime-rl's way as it is documented: every
    tensor is gathered on all ranks and kept by its owner (balanced by bytes), then safetensors'
    save_file, a rename, and a marker by rank 0. It syncs nothing, so its time is also given with an
    fsync. A publish counts from the snapshot in memory to latest.json.
(2) Deltas at real updates: a 13 M Qwen3, fp32 master weights, AdamW, at three learning rates.
    Sizes, the codec's rates on one core, and 200 versions read with random misses. For the time
    until a version is served, a shared filesystem of 200 MB/s with 8 readers is simulated: each
    reader gets an eighth of the rate. A version counts as served when the last of READERS nodes has
    a verified copy and the engine has read that copy. The model is that of (1), with as many
    elements changed as the smallest learning rate changed.
(3) The learner's step with and without publishing, alternating, where a publish takes as long as a
    step. The disk here is faster than that, so writes are delayed to the rate of a shared
    filesystem.
"""

import logging
import multiprocessing
import os
import random
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from atropos_hpc.contracts.policy import DeltaEntry, FileEntry, Manifest, PolicyVersion
from atropos_hpc.policy import delta, node_cache
from atropos_hpc.policy import shard_buffer as sharing
from atropos_hpc.policy.delta import Bytes
from atropos_hpc.policy.follower import Follower, LoadableVersion
from atropos_hpc.policy.leases import Lease
from atropos_hpc.policy.manifest import read_manifest
from atropos_hpc.policy.shard_buffer import (
    BLOCK,
    SEGMENT,
    ShardBuffer,
    TensorSpec,
    aligned,
    read_into,
    write_shard,
    xxh3,
)
from atropos_hpc.policy.store import PolicyStore
from atropos_hpc.runtime.run_dir import RunDir, read_json, write_file
from bench.result import Result

RANKS, ROUNDS, GROUPS = 2, 5, 8
TOKENS = (4, 128)  # sequences of a step in (3), and tokens of each
WRITING = 0.8  # of a step in (3), for writing a version
LEARNING_RATES = {
    1e-6: 0.03,
    3e-6: 0.06,
    1e-5: 0.14,
}  # and the bar: a delta's part of a full version
VERSIONS = 200
SHARED_MB_S, SHARED_READERS, READERS = 200, 8, 2
MEMORY = Path("/dev/shm")
HIDDEN, INNER, LAYERS, KEY_VALUE, VOCABULARY = 896, 4864, 24, 128, 151936  # Qwen2.5-0.5B


def half_billion(mesh: Any) -> Any:
    """Make a sharded float32 module of these shapes with random weights."""
    import torch
    from torch import nn
    from torch.distributed.fsdp import fully_shard

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.o_proj = (
                nn.Linear(HIDDEN, HIDDEN),
                nn.Linear(HIDDEN, HIDDEN, bias=False),
            )
            self.k_proj, self.v_proj = nn.Linear(HIDDEN, KEY_VALUE), nn.Linear(HIDDEN, KEY_VALUE)
            self.gate_proj, self.up_proj = (
                nn.Linear(HIDDEN, INNER, bias=False),
                nn.Linear(HIDDEN, INNER, bias=False),
            )
            self.down_proj = nn.Linear(INNER, HIDDEN, bias=False)
            self.input_layernorm, self.post_attention_layernorm = (
                nn.RMSNorm(HIDDEN),
                nn.RMSNorm(HIDDEN),
            )

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.device("meta"):
                self.embed_tokens, self.norm = nn.Embedding(VOCABULARY, HIDDEN), nn.RMSNorm(HIDDEN)
                self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
            for block in self.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(self, mesh=mesh)
            self.to_empty(device="cpu")
            for parameter in self.parameters():
                local: Any = parameter.data
                local.to_local().uniform_(-0.05, 0.05)

    return Model()


def on_disk() -> Path:
    """Return a directory on a disk; /tmp may be in memory."""
    Path("runs").mkdir(exist_ok=True)
    return Path("runs").absolute()


def note(result: Result, what: str, **values: float) -> None:
    """Add a row for each value."""
    result.rows += [
        {"what": what, "figure": name, "value": value} for name, value in values.items()
    ]


# --- (1)


def raw_write(path: Path, data: Bytes) -> None:
    """Write whole segments in parallel, bypassing the page cache, and sync."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)
    with ThreadPoolExecutor(4) as threads:
        list(
            threads.map(
                lambda at: os.pwritev(fd, [data[at : at + SEGMENT].data], at),
                range(0, len(data), SEGMENT),
            )
        )
    os.fsync(fd)
    os.close(fd)


def raw_read(path: Path, data: Bytes) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    with ThreadPoolExecutor(4) as threads:
        list(
            threads.map(
                lambda at: os.preadv(fd, [data[at : at + SEGMENT].data], at),
                range(0, len(data), SEGMENT),
            )
        )
    os.close(fd)


def gathered_and_saved(module: Any, directory: Path, rank: int, sync: bool) -> None:
    """Save as prime-rl does."""
    import torch.distributed as dist
    from safetensors.torch import save_file

    own, size = {}, [0] * dist.get_world_size()
    for name, tensor in module.state_dict().items():
        whole = tensor.full_tensor().bfloat16()
        owner = size.index(min(size))
        size[owner] += whole.nbytes
        if owner == rank:
            own[name] = whole
    temporary, path = directory / f".{rank}.safetensors", directory / f"{rank}.safetensors"
    save_file(own, temporary)
    if sync:
        fd = os.open(temporary, os.O_RDWR)
        os.fsync(fd)
        os.close(fd)
    temporary.rename(path)
    dist.barrier()
    if rank == 0:
        (directory / "STABLE").touch()


def publish_rank(rank: int, root: Path, rounds: int, report: Any) -> None:
    """Run one of the two ranks of (1)."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from atropos_hpc.policy.shard_writer import ShardWriter
    from atropos_hpc.policy.snapshot import snapshot

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(root / "meet"), RANKS), rank=rank, world_size=RANKS
    )
    torch.manual_seed(rank)
    module = half_billion(init_device_mesh("cpu", (RANKS,)))
    shares, store = ShardWriter(dist.new_group(backend="gloo")), PolicyStore(root)
    shot: Any = None
    times: list[dict[str, float]] = []

    def timed(work: Callable[[], Any]) -> float:
        dist.barrier()
        start = time.monotonic()
        work()
        dist.barrier()
        return time.monotonic() - start

    def publish(version: int) -> None:
        files = shares.write_full(store.begin(key_of(version)), shares.fill(shot))
        if rank == 0:
            store.commit(Manifest(version=key_of(version), kind="full", files=files))

    def all_ways(version: int) -> dict[str, float]:
        nonlocal shot
        start = time.monotonic()
        shot = snapshot(module, reuse=shot)
        row = {"snapshot": time.monotonic() - start, "publish": timed(lambda: publish(version))}
        share, raw = shares.shard, root / f"raw-{rank}"
        target = aligned(share.size)
        target[:] = 0  # allocate its pages
        row["raw write"] = timed(lambda: raw_write(raw, share.buffer))
        row["raw read"] = timed(lambda: raw_read(raw, target))
        mine = sorted((root / f"{version}-1").glob("*.safetensors"))[rank]
        found: list[str] = []
        row["read in place"] = timed(lambda: found.append(read_into(mine, target[: share.size])))
        assert found == [xxh3(share.bytes)]
        row["gather and save"] = timed(lambda: gathered_and_saved(module, root, rank, False))
        row["gather, save and sync"] = timed(lambda: gathered_and_saved(module, root, rank, True))
        return row

    for version in range(rounds + 1):
        times.append(all_ways(version))
        shutil.rmtree(root / f"{version}-1", ignore_errors=True)
    if rank == 0:
        report.put((shares.shard.size * RANKS, times[1:]))
    dist.barrier()


def full_publish(result: Result) -> None:
    with tempfile.TemporaryDirectory(dir=on_disk()) as scratch:
        run = RunDir(Path(scratch))
        run.create()
        context = multiprocessing.get_context("fork")
        report = context.Queue()
        ranks = [
            context.Process(target=publish_rank, args=(rank, run.policy, ROUNDS, report))
            for rank in range(RANKS)
        ]
        for process in ranks:
            process.start()
        size, times = report.get(timeout=900)
        for process in ranks:
            process.join()
    for what in times[0]:
        seconds = [row[what] for row in times]
        note(
            result,
            f"{what}, {RANKS} ranks",
            seconds=statistics.median(seconds),
            MB_per_s=size / 1e6 / statistics.median(seconds),
        )

    def against(what: str, raw: str) -> float:
        return statistics.median(row[raw] / row[what] for row in times)

    result.at_least(
        "full publish, share of the raw write rate", against("publish", "raw write"), 0.85
    )
    result.at_least(
        "read in place, share of the raw read rate", against("read in place", "raw read"), 0.85
    )
    result.at_least(
        "full publish, times as fast as gathering, saving and syncing",
        against("publish", "gather, save and sync"),
        1.0,
    )


# --- (2)


def small_model() -> Any:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=8192,
            hidden_size=320,
            intermediate_size=960,
            num_hidden_layers=8,
            num_attention_heads=5,
            num_key_value_heads=5,
            head_dim=64,
            max_position_embeddings=512,
            tie_word_embeddings=True,
        )
    )


def training(learning_rate: float) -> Callable[[], ShardBuffer]:
    """Return a function that takes a step and returns the weights to publish."""
    import torch

    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.01)
    generator = torch.Generator().manual_seed(1)
    parameters = dict(model.named_parameters())

    def step() -> ShardBuffer:
        tokens = torch.randint(0, 8192, (4, 32), generator=generator)
        tokens[:, 1::2] = tokens[:, ::2] // 3  # something to learn
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        share = ShardBuffer(
            [TensorSpec(name, "BF16", tuple(tensor.shape)) for name, tensor in parameters.items()]
        )
        for name, tensor in parameters.items():
            share.parts[name][:] = tensor.detach().bfloat16().reshape(-1).view(torch.uint8).numpy()
        return share

    return step


def cpu_rate(work: Callable[[], Any], size: int, times: int = 5) -> float:
    """Return the best rate on one core, in GB of the model per second."""
    best = float("inf")
    for _ in range(times):
        start = time.thread_time()
        work()
        best = min(best, time.thread_time() - start)
    return size / 1e9 / best


def publish_share(
    store: PolicyStore,
    version: int,
    share: ShardBuffer,
    base: tuple[int, ShardBuffer] | None,
    in_full: bool,
) -> int:
    """Publish from one rank, as the learner does. Returns the bytes of the delta."""
    directory = store.begin(key_of(version))
    file = "model-00001-of-00001.safetensors"
    changes: tuple[DeltaEntry, ...] = ()
    if base is not None:
        coded = delta.encode(base[1].bytes, share.bytes, share.regions)
        write_file(directory / "model-00001-of-00001.delta", coded)
        digest = xxh3(np.frombuffer(coded, np.uint8))
        changes = (DeltaEntry("model-00001-of-00001.delta", len(coded), digest, file),)
    whole = (
        write_shard(directory / file, share)
        if in_full
        else FileEntry(file, share.size, xxh3(share.bytes))
    )
    store.commit(
        Manifest(
            version=key_of(version),
            kind="full" if in_full else "delta",
            files=(whole,),
            base=key_of(base[0]) if base else None,
            deltas=changes,
        )
    )
    return changes[0].bytes if changes else 0


def key_of(version: int) -> PolicyVersion:
    return PolicyVersion(version=version, attempt=1)


def real_updates(result: Result) -> float:
    """Measure (2). Returns the part of the elements that the smallest rate changes."""
    import torch

    torch.set_num_threads(1)
    shares_changed = {}
    for rate, bar in LEARNING_RATES.items():
        step, sizes, changed, read = training(rate), [], [], 0
        rng = random.Random(0)
        with tempfile.TemporaryDirectory(dir=MEMORY) as scratch:
            run = RunDir(Path(scratch) / "run")
            run.create()
            store = PolicyStore(run.policy)
            follower = Follower(store, Path(scratch), "reader")
            old = None
            for version in range(VERSIONS):
                share = step()
                size = publish_share(
                    store, version, share, (version - 1, old) if old else None, version % 16 == 0
                )
                store.retire(2, 1)
                if old is not None:
                    sizes.append(size / share.size)
                    changed.append(
                        float(np.mean(old.bytes.view(np.uint16) != share.bytes.view(np.uint16)))
                    )
                if rng.random() < 0.4:
                    newest = follower.poll()
                    assert newest is not None and newest.version.version == version
                    assert np.array_equal(
                        np.fromfile(
                            newest.directory / "model-00001-of-00001.safetensors", np.uint8
                        ),
                        share.bytes,
                    )
                    read += 1
                previous, old = old, share
            follower.close()
        assert previous is not None and old is not None
        coded = delta.encode(previous.bytes, old.bytes, old.regions)
        target = previous.bytes.copy()

        def decode(into: Bytes = target, base: ShardBuffer = previous, data: bytes = coded) -> None:
            into[:] = base.bytes
            delta.apply(data, into)

        encoding = cpu_rate(
            lambda old=previous, new=old: delta.encode(old.bytes, new.bytes, new.regions), old.size
        )
        decoding = cpu_rate(decode, old.size)
        assert np.array_equal(target, old.bytes)
        shares_changed[rate] = statistics.median(changed)
        note(
            result,
            f"learning rate {rate:g}, {VERSIONS} versions, {read} read",
            changed=shares_changed[rate],
        )
        note(
            result,
            f"learning rate {rate:g}, delta / full",
            median=statistics.median(sizes),
            largest=max(sizes),
        )
        note(
            result,
            f"learning rate {rate:g}, GB/s of model and core",
            encode=encoding,
            decode=decoding,
        )
        result.at_most(
            f"delta at learning rate {rate:g}, share of full", statistics.median(sizes), bar
        )
        result.at_least(
            f"encode at learning rate {rate:g}, GB of model per second and core", encoding, 0.8
        )
        result.at_least(
            f"copy, decode and apply at learning rate {rate:g}, GB of model per second and core",
            decoding,
            2.0,
        )
    return min(shares_changed.values())


class Limited(node_cache.NodeCache):
    """A node cache that reads at this node's part of a shared filesystem's rate."""

    rate = SHARED_MB_S * 1e6 / SHARED_READERS

    def __init__(self, cache: Path, store: Path) -> None:
        super().__init__(cache, store)
        self._free_at, self._one = 0.0, threading.Lock()

    def _read(self, version: PolicyVersion, entry: FileEntry, into: Bytes, lease: Lease) -> None:
        with self._one:
            self._free_at = max(time.monotonic(), self._free_at) + len(into) / self.rate
            done = self._free_at
        super()._read(version, entry, into, lease)
        time.sleep(max(0.0, done - time.monotonic()))


def time_to_serve(result: Result, changed: float) -> None:
    """Measure the time until the last reader serves a version, full and as a delta."""
    tensors = [TensorSpec("embed_tokens", "BF16", (VOCABULARY, HIDDEN))]
    for layer in range(LAYERS):
        sizes = {
            "q": (HIDDEN, HIDDEN),
            "k": (KEY_VALUE, HIDDEN),
            "v": (KEY_VALUE, HIDDEN),
            "o": (HIDDEN, HIDDEN),
            "gate": (INNER, HIDDEN),
            "up": (INNER, HIDDEN),
            "down": (HIDDEN, INNER),
        }
        tensors += [
            TensorSpec(f"layers.{layer}.{name}", "BF16", shape) for name, shape in sizes.items()
        ]
    rng = np.random.default_rng(0)
    old, new = ShardBuffer(tensors), ShardBuffer(tensors)
    numbers = old.buffer.view(np.uint16)[len(old.header) // 2 :]
    numbers[:] = (rng.standard_normal(len(numbers), np.float32) / 50).view(np.uint32) >> 16
    new.buffer[:] = old.buffer
    moved = new.buffer.view(np.uint16)[len(old.header) // 2 :]
    moved[rng.random(len(moved), np.float32) < changed] += np.uint16(1)
    seconds = {}
    for kind in ("full", "delta"):
        with (
            tempfile.TemporaryDirectory(dir=on_disk()) as scratch,
            tempfile.TemporaryDirectory(dir=MEMORY) as cache,
        ):
            run = RunDir(Path(scratch))
            run.create()
            store = PolicyStore(run.policy)
            publish_share(store, 0, old, None, True)
            nodes = [
                Follower(PolicyStore(run.policy), Path(cache), f"reader-{i}")
                for i in range(READERS)
            ]
            for node in nodes:
                node.cache.close()
                node.cache = limited = Limited(Path(cache), run.policy)
                limited.rate = 1e12  # for the version before, not measured
                assert node.poll() is not None
                limited.rate = SHARED_MB_S * 1e6 / SHARED_READERS
            start = time.monotonic()
            publish_share(store, 1, new, None if kind == "full" else (0, old), kind == "full")
            published = time.monotonic() - start
            with ThreadPoolExecutor(READERS) as threads:
                list(threads.map(serve, nodes))
            seconds[kind] = time.monotonic() - start
            for node in nodes:
                node.close()
        note(
            result,
            f"{kind} version of 988 MB, to the last reader",
            seconds=seconds[kind],
            publish_s=published,
        )
    result.at_least(
        "a delta is served so many times sooner than a full version",
        seconds["full"] / seconds["delta"],
        10.0,
    )


def serve(node: Follower) -> None:
    """Act as a node agent until the new version can be loaded."""
    while (newest := node.poll()) is None or newest.version.version != 1:
        time.sleep(0.01)
    _as_the_engine_reads(newest)


def _as_the_engine_reads(version: LoadableVersion) -> None:
    """Map the node's copy and compare its hash, as an engine does before it loads."""
    for file in read_manifest(version.directory).files:
        assert xxh3(np.memmap(version.directory / file.file, np.uint8, "r")) == file.xxh3


# --- (3)


@contextmanager
def no_faster_than(bytes_per_s: float) -> Iterator[None]:
    """Delay writes of shards to this rate."""
    real, one, free_at = sharing._transfer, threading.Lock(), 0.0

    def limited(call: Any, fd: int, part: Bytes, offset: int) -> None:
        nonlocal free_at
        with one:
            free_at = max(time.monotonic(), free_at) + len(part) / bytes_per_s
            done = free_at
        real(call, fd, part, offset)
        time.sleep(max(0.0, done - time.monotonic()))

    sharing._transfer = limited
    try:
        yield
    finally:
        sharing._transfer = real


def steps(result: Result) -> None:
    """Measure (3), with one rank on one thread."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from atropos_hpc.config import PolicyConf
    from atropos_hpc.learner.publisher import Publisher

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=on_disk()) as scratch:
        dist.init_process_group(
            "gloo", store=dist.FileStore(str(Path(scratch) / "meet"), 1), rank=0, world_size=1
        )
        run = RunDir(Path(scratch) / "run")
        run.create()
        model = small_model()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        optimizer = torch.optim.AdamW(model.parameters(), 1e-6)
        model_bytes = 2 * sum(parameter.numel() for parameter in model.parameters())
        backend: Any = type("Backend", (), {"module": model, "weights": lambda self: None})()

        def step(publishing: Publisher | None, version: int) -> float:
            start = time.monotonic()
            tokens = torch.randint(0, 8192, TOKENS)
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if publishing is not None:
                publishing.publish(backend, version)
            return time.monotonic() - start

        version = 0
        for sync in ("full", "delta"):
            publishing = Publisher(run.policy, PolicyConf(sync=sync), "bfloat16")
            ratios = []
            alone = statistics.median(step(None, 0) for _ in range(4))
            with no_faster_than(model_bytes / (WRITING * alone)):
                for number in range(GROUPS):
                    off = statistics.mean(step(None, 0) for _ in range(4))
                    on = []
                    for _ in range(5):
                        version += 1
                        on.append(step(publishing, version))
                    publishing.wait()
                    if number:
                        ratios.append(statistics.mean(on[1:]) / off)
                version += 1
                start = time.monotonic()
                publishing.publish(backend, version)
                held = time.monotonic() - start
                while read_json(run.policy / "latest.json").get("version") != version:
                    time.sleep(0.001)
                took = time.monotonic() - start
                publishing.wait()
            middle = statistics.median(ratios)
            note(
                result,
                f"step, sync={sync}",
                without_s=off,
                a_publish_takes_s=took,
                held_s=held,
                with_over_without=middle,
            )
            result.at_most(
                f"a step with publishing (sync={sync}), against one without", middle, 1.05
            )
        dist.destroy_process_group()


def main() -> Result:
    logging.disable(logging.WARNING)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    result = Result(
        [], details={"load before": os.getloadavg(), "block": BLOCK, "segment": SEGMENT}
    )
    full_publish(result)
    changed = real_updates(result)
    time_to_serve(result, changed)
    steps(result)
    result.details["load after"] = os.getloadavg()
    return result
