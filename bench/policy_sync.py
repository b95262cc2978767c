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
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atropos_hpc.policy import shard_buffer as sharing
from atropos_hpc.policy.delta import Bytes
from atropos_hpc.policy.shard_buffer import BLOCK, SEGMENT
from atropos_hpc.runtime.run_dir import RunDir, read_json
from bench.parts.deltas import real_updates, time_to_serve
from bench.parts.full_publish import full_publish
from bench.parts.policy import note, on_disk, small_model
from bench.result import Result

GROUPS = 8  # of steps in (3), each with and without publishing
TOKENS = (4, 128)  # sequences of a step in (3), and tokens of each
WRITING = 0.8  # of a step in (3), for writing a version


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
