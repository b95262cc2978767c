"""Atropos' run-api and the project's trajectory server as processes, and groups to post."""

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from atropos_hpc.config import Config, TrajectoriesConf
from atropos_hpc.contracts.group import NO_LIMITS
from atropos_hpc.launch.steps import rollout_python
from atropos_hpc.runtime.network import free_port
from atropos_hpc.runtime.run_dir import RunDir, read_json, write_json
from atropos_hpc.runtime.waiting import wait_for
from atropos_hpc.trajectories.decode import decode_json

SEQUENCES, LENGTH = 8, 2048  # of a group
PLACE = b"000000000000"  # replaced in each group


@dataclass
class Server:
    """A running server, and one connection to it."""

    process: "subprocess.Popen[bytes]"
    port: int
    token: str | None  # None: run-api

    def __post_init__(self) -> None:
        self.connection = self.connect()

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        on: http.client.HTTPConnection | None = None,
    ) -> bytes:
        headers = {"Content-Type": "application/json", **(headers or {})}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        connection = on or self.connection
        connection.request(
            method,
            path,
            body if body is None or isinstance(body, bytes) else json.dumps(body),
            headers,
        )
        response = connection.getresponse()
        answer = response.read()
        assert response.status in (200, 204), (path, response.status, answer[:300])
        return answer

    def cpu_s(self) -> float:
        """Return the CPU time of all threads, in the scheduler's nanoseconds."""
        threads = Path(f"/proc/{self.process.pid}/task").glob("*/schedstat")
        return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9

    def resident_bytes(self) -> int:
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf(
            "SC_PAGE_SIZE"
        )

    def register(self, batch_size: int) -> None:
        """Reset the server, then register a trainer and an environment.

        On a new connection: run-api closes those that were idle for 5 s, during the other's round.
        """
        self.connection.close()
        self.connection = self.connect()
        self.call("GET", "/reset_data")
        self.call(
            "POST",
            "/register",
            {
                "wandb_group": "",
                "wandb_project": "",
                "batch_size": batch_size,
                "max_token_len": 1 << 20,
                "checkpoint_dir": "",
                "save_checkpoint_interval": 0,
                "starting_step": 0,
                "num_steps": 1000,
            },
        )
        self.call("GET", "/batch")
        environment = {
            "max_token_length": LENGTH,
            "desired_name": "e",
            "weight": 1.0,
            "group_size": SEQUENCES,
        }
        assert json.loads(self.call("POST", "/register-env", environment))["env_id"] == 0

    def pull(self, batch: int, sequences: int) -> None:
        """Pull a batch as a trainer does, and acknowledge it."""
        if self.token is None:
            assert (
                sum(
                    len(group["scores"])
                    for group in json.loads(self.call("GET", "/batch"))["batch"]
                )
                == sequences
            )
        else:
            assert self.call("GET", f"/lease?batch={batch}&rank=0&world=1")
            self.call("POST", f"/ack?batch={batch}")


@contextmanager
def started(
    command: list[str], port: Callable[[], int | None], token: str | None, cwd: Path
) -> Iterator[Server]:
    with (cwd / "server.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=cwd)

    def listens() -> int | None:
        assert process.poll() is None, (cwd / "server.log").read_text()
        return port()

    try:
        yield Server(process, wait_for("a server that listens", command[2], listens, 120), token)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


@contextmanager
def run_api(directory: Path) -> Iterator[Server]:
    number = free_port("127.0.0.1")
    command = [
        rollout_python(Config()),
        "-m",
        "atroposlib.cli.run_api",
        "--host",
        "127.0.0.1",
        "--port",
        str(number),
    ]

    def listens() -> int | None:
        connection = http.client.HTTPConnection("127.0.0.1", number, timeout=5)
        try:
            connection.request("GET", "/")
            return number if connection.getresponse().status == 200 else None
        except OSError:
            return None

    with started(command, listens, None, directory) as server:
        yield server


@contextmanager
def own_server(directory: Path) -> Iterator[Server]:
    run = RunDir(directory / "run")
    run.create()
    model = {"max_length": 1 << 20}
    write_json(
        run.run_json,
        {
            "config": {
                "cluster": {"host": None},
                "model": model,
                "trajectories": asdict(TrajectoriesConf()),
            }
        },
    )
    command = [sys.executable, "-m", "atropos_hpc.trajectories.server", "--run-dir", str(run.path)]

    def listens() -> int | None:
        url = read_json(run.members / "trajectories-local-0.json").get("url")
        return int(url.rpartition(":")[2]) if url else None

    with started(command, listens, run.token(), directory) as server:
        yield server


def body(sequences: int, length: int) -> bytes:
    """Return a group as environments post it, in JSON; `numbered` varies it."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 150_000, (sequences, length))
    masks = np.where(np.arange(length) < length // 4, -100, tokens)
    log_probs = np.where(masks == -100, 1.0, -rng.random((sequences, length)))
    return json.dumps(
        {
            "tokens": tokens.tolist(),
            "masks": masks.tolist(),
            "scores": rng.random(sequences).tolist(),
            "inference_logprobs": log_probs.tolist(),
            "generation_params": {"group_id": PLACE.decode()},
            "env_id": 0,
        }
    ).encode()


def numbered(template: bytes, number: int) -> bytes:
    return template.replace(PLACE, b"%012d" % number)


def record(group: bytes) -> bytes:
    """Return the binary record that an environment worker would post."""
    return decode_json(group, False, NO_LIMITS)[0].to_bytes()
