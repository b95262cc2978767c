"""Sizes, rates and delivery of deltas of real updates."""

import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from atropos_hpc.contracts.policy import FileEntry, PolicyVersion
from atropos_hpc.policy import delta, node_cache
from atropos_hpc.policy.delta import Bytes
from atropos_hpc.policy.follower import Follower, LoadableVersion
from atropos_hpc.policy.leases import Lease
from atropos_hpc.policy.manifest import read_manifest
from atropos_hpc.policy.shard_buffer import ShardBuffer, TensorSpec, xxh3
from atropos_hpc.policy.store import PolicyStore
from atropos_hpc.runtime.run_dir import RunDir
from bench.parts.policy import (
    HIDDEN,
    INNER,
    KEY_VALUE,
    LAYERS,
    VOCABULARY,
    note,
    on_disk,
    publish_share,
    training,
)
from bench.result import Result

LEARNING_RATES = {
    1e-6: 0.03,
    3e-6: 0.06,
    1e-5: 0.14,
}  # and the bar: a delta's part of a full version
VERSIONS = 200
SHARED_MB_S, SHARED_READERS, READERS = 200, 8, 2
MEMORY = Path("/dev/shm")


def cpu_rate(work: Callable[[], Any], size: int, times: int = 5) -> float:
    """Return the best rate on one core, in GB of the model per second."""
    best = float("inf")
    for _ in range(times):
        start = time.thread_time()
        work()
        best = min(best, time.thread_time() - start)
    return size / 1e9 / best


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
