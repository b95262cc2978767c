"""Measure the seconds of an update, of all weights and of a LoRA adapter, at two base sizes.

Qwen2 models of 30 layers and random weights, 11 M and 135 M parameters, trained by one rank and
served by one vLLM server without other requests, on a CPU. After a change of the trained weights,
an update counts from the learner's snapshot until the server has resumed with the version:

publish s     snapshot, files synced, latest.json (learner/publisher.py)
copy s        the node's verified copy in memory (policy/follower.py)
load s        the server reads and applies it, or loads the adapter (policy/weight_update.py)

Medians of UPDATES updates after a first one. An adapter's own size grows with the width of the
base, and is given; the update is to cost the same for either base.
"""

import asyncio
import itertools
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp

from atropos_hpc.config import PolicyConf
from atropos_hpc.policy.follower import Follower
from atropos_hpc.policy.store import PolicyStore
from atropos_hpc.policy.weight_update import UpdateOptions, push
from atropos_hpc.resources import HOME
from atropos_hpc.runtime.run_dir import RunDir
from bench.gpu.parts import Shape, make_model
from bench.gpu.update import Size, make_run, ready, server
from bench.parts.policy import on_disk
from bench.result import Result

BASES = (
    Shape("11 M", 160, 480, 30, 5, 5, 8192),
    Shape("135 M", 576, 1536, 30, 9, 3, 49152),
)
RANK, UPDATES = 8, 7
LINEAR = ("q", "k", "v", "o", "gate", "up", "down")


def trained(directory: Path, adapter: bool) -> Any:
    """Load the model as the learner does: float32, sharded over one rank."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if adapter:
        targets = [f"{name}_proj" for name in LINEAR]
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


async def updates(run: RunDir, url: str, module: Any, log: Path, cache: Path) -> dict[str, float]:
    """Publish versions and push them into the server. Returns the seconds of each part."""
    import torch

    from atropos_hpc.learner.publisher import Publisher

    adapter = hasattr(module, "peft_config")
    backend: Any = type("Backend", (), {"module": module, "weights": lambda self: None})()
    publisher = Publisher(run.policy, PolicyConf(), "bfloat16")
    follower = Follower(PolicyStore(run.policy), cache, "bench")
    found: list[list[float]] = []
    async with aiohttp.ClientSession() as session:
        await ready(session, url, log)
        for version in range(1, UPDATES + 2):
            with torch.no_grad():
                for parameter in module.parameters():
                    if parameter.requires_grad:
                        parameter.add_(1e-3)
            times = [time.monotonic()]
            publisher.publish(backend, version)
            publisher.wait()
            times.append(time.monotonic())
            newest = follower.poll()
            assert newest is not None and newest.version.version == version, follower.failure
            times.append(time.monotonic())
            options = UpdateOptions(adapter=adapter, verified=True)
            await push(session, url, run.token(), newest.directory, newest.version, options)
            times.append(time.monotonic())
            found.append([end - begin for begin, end in itertools.pairwise(times)])
        size = sum(path.stat().st_size for path in newest.directory.iterdir())
    follower.close()
    parts = [statistics.median(part) for part in zip(*found[1:], strict=True)]
    total = statistics.median(sum(each) for each in found[1:])
    names = ("published MB", "publish s", "copy s", "load s", "update s")
    return dict(zip(names, (size / 1e6, *parts, total), strict=True))


def measure(base: Shape, adapter: bool, scratch: Path, cache: Path) -> dict[str, Any]:
    """Measure one kind of version of one base, with a server of its own."""
    what = "adapter" if adapter else "all weights"
    directory = scratch / f"{base.name} {what}"
    directory.mkdir()
    model = make_model(base, directory / "model", "cpu")
    run = make_run(directory / "run", model, False, Size(0, 0, 0, 256), RANK if adapter else 0)
    python, log = str(HOME / ".venv-rollout" / "bin" / "python"), directory / "log"
    with server(run, python, log) as url:
        row = asyncio.run(updates(run, url, trained(model, adapter), log, cache))
    return {"base": base.name, "published": what, **row}


def main() -> Result:
    import torch.distributed as dist

    logging.disable(logging.WARNING)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with (
        tempfile.TemporaryDirectory(dir=on_disk()) as scratch,
        tempfile.TemporaryDirectory(dir="/dev/shm") as cache,
    ):
        rows = [
            measure(base, adapter, Path(scratch), Path(cache))
            for adapter in (True, False)
            for base in BASES
        ]
    dist.destroy_process_group()
    result = Result(rows, details={"rank": RANK, "load": os.getloadavg()})
    ratios = [rows[i + 1]["update s"] / rows[i]["update s"] for i in (0, 2)]
    result.at_most("update of an adapter, of 135 M over of 11 M", ratios[0], 1.5)
    result.details["update of all weights, of 135 M over of 11 M"] = ratios[1]
    return result
