"""Publish and read a full version from two ranks, against raw O_DIRECT and gather-and-save."""

import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from atropos_hpc.contracts.policy import Manifest
from atropos_hpc.policy.delta import Bytes
from atropos_hpc.policy.shard_buffer import SEGMENT, aligned, read_into, xxh3
from atropos_hpc.policy.store import PolicyStore
from atropos_hpc.runtime.run_dir import RunDir
from bench.parts.policy import half_billion, key_of, note, on_disk
from bench.result import Result

RANKS, ROUNDS = 2, 5


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
