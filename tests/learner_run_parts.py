"""Runs of the learner as a process with a real trajectory server, without rollouts."""

import dataclasses
import json
import random
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atropos_hpc import config as schema
from atropos_hpc.policy.manifest import read_manifest
from atropos_hpc.policy.store import PolicyStore
from atropos_hpc.runtime import process
from atropos_hpc.runtime.membership import RosterPublisher, RosterReader
from atropos_hpc.runtime.run_dir import RunDir, write_json
from atropos_hpc.runtime.waiting import wait_for

STEPS, GROUPS, SIZE = 6, 4, 4


def new_run(path: Path, model: Path, ranks: int = 1, **trainer: Any) -> RunDir:
    run = RunDir(path)
    run.create()
    run.new_attempt()
    config = schema.Config(run_dir=str(path))
    config.model = schema.ModelConf(path=str(model), max_length=32, dtype="float32")
    config.environment = schema.EnvironmentConf(target="none:None", group_size=SIZE)
    config.algorithm = schema.AlgorithmConf(batch_size=GROUPS * SIZE, kl_coef=0.01)
    options = {
        "steps": STEPS,
        "learning_rate": 1e-3,
        "tokens_per_micro_batch": 128,
        "gradient_checkpointing": False,
        "threads": 1,
    }
    config.trainer = schema.TrainerConf(**{**options, "checkpoint_every": 2, **trainer})
    config.evaluation = schema.EvaluationConf(before=False, after=False)
    config.staleness = schema.StalenessConf(max=1000)
    config.roles.trainer.ranks_per_node = ranks
    write_json(run.run_json, {"id": "test", "config": dataclasses.asdict(config)})
    return run


def group(seed: int) -> dict[str, Any]:
    """Make a group as an environment posts it: a masked prompt, then trained, masked, trained."""
    rng = random.Random(seed)
    prompt = [rng.randrange(4, 13) for _ in range(6)]
    tokens, masks, logprobs = [], [], []
    for _ in range(SIZE):
        spans = [[rng.randrange(4, 13) for _ in range(rng.randrange(1, 5))] for _ in range(3)]
        tokens.append(prompt + spans[0] + spans[1] + spans[2])
        masks.append([-100] * len(prompt) + spans[0] + [-100] * len(spans[1]) + spans[2])
        logprobs.append([1.0 if label == -100 else -rng.random() * 4 for label in masks[-1]])
    scores = [float(i) for i in range(SIZE)]
    params = {"group_id": f"g{seed}", "policy_versions": [[0, 0]] * SIZE}
    return {
        "tokens": tokens,
        "masks": masks,
        "scores": scores,
        "inference_logprobs": logprobs,
        "generation_params": params,
    }


@contextmanager
def trajectory_server(run: RunDir) -> Iterator[str]:
    """The server's process, and a publisher of the roster meanwhile. Gives the URL."""
    publisher, over = RosterPublisher(run), threading.Event()

    def look() -> None:
        while not over.wait(0.05):
            publisher.publish()

    thread = threading.Thread(target=look)
    thread.start()
    command = [sys.executable, "-m", "atropos_hpc.trajectories.server", "--run-dir", str(run.path)]
    server = process.start("trajectories", command, run.logs / "trajectories.log")
    try:
        yield wait_for(
            "the URL", "the trajectory server", RosterReader(run.roster).trajectory_server, 60
        )
    finally:
        process.end([server], 10)
        over.set()
        thread.join()


def post(url: str, token: str, body: Any) -> None:
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/scored_data_list", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 200


def learn(run: RunDir, ranks: int = 1) -> list[process.Child]:
    step = f"step-{time.time_ns()}"
    children = []
    for rank in range(ranks):
        variables = {
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(ranks),
            "ATROPOS_HPC_STEP": step,
            "ATROPOS_HPC_NODE": "n0",
        }
        command = [sys.executable, "-m", "atropos_hpc.learner", "--run-dir", str(run.path)]
        children.append(
            process.start(f"trainer-{rank}", command, run.logs / f"trainer-{rank}.log", variables)
        )
    return children


def ended(run: RunDir, children: list[process.Child]) -> list[int]:
    try:
        return [child.process.wait(180) for child in children]
    except subprocess.TimeoutExpired:
        raise AssertionError(process.tail(run.logs / "trainer-0.log", 40)) from None
    finally:
        process.end(children, 1)


def weights(run: RunDir) -> tuple[int, list[str]]:
    store = PolicyStore(run.policy)
    latest = store.latest()
    assert latest is not None
    files = read_manifest(store.directory(latest)).files
    return latest.version, [file.xxh3 for file in files]
