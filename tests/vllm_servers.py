"""Real vLLM servers for tests, with the demo's small model."""

import asyncio
import contextlib
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from rollout_parts import make_run, module, publish

from atropos_hpc.contracts.members import ServerState
from atropos_hpc.contracts.policy import ADAPTER_NAME, PolicyVersion
from atropos_hpc.environments.make_base import make_base
from atropos_hpc.policy.weight_update import UpdateOptions, push
from atropos_hpc.rollout.server_pool import GENERATE
from atropos_hpc.runtime.run_dir import RunDir

REQUESTS = 64  # of `update_under_load`
PROMPT = [7, 11, 2, 6, 12, 3]  # 37+28=
ENVIRONMENT = {"target": f"{Path(__file__).parent}/kinds_env.py:KindsEnv", "group_size": 4}
ROLLOUT = {
    "memory_utilization": 0.05,
    "kv_cache_bytes": 64 << 20,
    "enforce_eager": True,
    "variables": {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"},
}


@dataclass
class UnderLoad:
    """What an update during REQUESTS requests cost, and the lengths of their answers."""

    preempted: float
    prompt_tokens: float  # computed
    lengths: set[int]


class Served:
    """A running server and its run. It starts with `base`; `other` has the same shapes."""

    def __init__(
        self,
        run: RunDir,
        url: str,
        child: "subprocess.Popen[bytes]",
        base: Path,
        other: Path,
        log: Path,
    ) -> None:
        self.run, self.url, self.child, self.base, self.other = run, url, child, base, other
        self.pid, self.log = child.pid, log
        self.adapter = run.config().model.lora.rank > 0
        self.token = run.token()
        self.version = 0

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + 300
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                if self.ask("GET", "/health")[0] == 200:
                    return
            log = self.log.read_text()[-3000:]
            assert self.child.poll() is None and time.monotonic() < deadline, log
            time.sleep(0.3)

    def metric(self, name: str) -> float:
        """The sum of a metric of vLLM over its labels."""
        lines = self.ask("GET", "/metrics")[1].splitlines()
        found = [line for line in lines if re.match(rf"vllm:{name}\W", line)]
        return sum(float(line.rpartition(" ")[2]) for line in found)

    def ask(
        self, method: str, route: str, json: Any = None, token: str | None = None
    ) -> tuple[int, Any]:
        async def main() -> tuple[int, Any]:
            headers = {"Authorization": f"Bearer {token or self.token}"}
            async with (
                aiohttp.ClientSession() as session,
                session.request(method, self.url + route, json=json, headers=headers) as answer,
            ):
                return answer.status, await (
                    answer.json() if answer.content_type == "application/json" else answer.text()
                )

        return asyncio.run(main())

    def greedy(self) -> tuple[list[int], list[float], str]:
        """(tokens, log-probs, version) of the greedy answer to PROMPT; the adapter's, if any."""
        sampling = {"temperature": 0.0, "max_tokens": 4, "min_tokens": 4, "logprobs": 0}
        body = {"token_ids": PROMPT, "sampling_params": sampling}
        if self.adapter:
            body["model"] = ADAPTER_NAME
        status, answer = self.ask("POST", GENERATE, body)
        assert status == 200, answer
        (choice,) = answer["choices"]
        (span,) = choice["weight_versions"]
        return (
            choice["token_ids"],
            [position["logprob"] for position in choice["logprobs"]["content"]],
            span["version"],
        )

    @property
    def key(self) -> PolicyVersion:
        """The version that was published last."""
        return PolicyVersion(version=self.version, attempt=1)

    @property
    def state(self) -> ServerState:
        """What its node agent says of it after the last push."""
        return ServerState(url=self.url, version=self.key)

    def push(self, weights: Path, damage: bool = False) -> int:
        """Publish as the next version and push it."""
        self.version += 1
        directory = publish(self.run, weights / "model.safetensors", self.version)
        if damage:
            shard = directory / "part-0.safetensors"
            shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
        self.push_directory(directory)
        return self.version

    def update_under_load(self, weights: Path, keep_kv: bool) -> "UnderLoad":
        """Publish, and push until an update has met running requests."""
        self.version += 1
        directory = publish(self.run, weights / "model.safetensors", self.version)
        options = UpdateOptions(keep_kv=keep_kv)
        sampling = {"max_tokens": 24, "min_tokens": 24, "ignore_eos": True, "temperature": 1.0}
        body = {"token_ids": PROMPT, "sampling_params": sampling}
        names = ("num_preemptions_total", "prompt_tokens_total")

        async def one_round() -> tuple[bool, set[int]]:
            headers = {"Authorization": f"Bearer {self.token}"}
            async with aiohttp.ClientSession(headers=headers) as session:

                async def request() -> int:
                    async with session.post(self.url + GENERATE, json=body) as answer:
                        return len((await answer.json())["choices"][0]["token_ids"])

                requests = [asyncio.create_task(request()) for _ in range(REQUESTS)]
                await asyncio.sleep(0.05)
                await push(session, self.url, self.token, directory, self.key, options)
                under_way = any(not task.done() for task in requests)
                return under_way, set(await asyncio.gather(*requests))

        for _ in range(20):
            before = [self.metric(name) for name in names]
            under_way, lengths = asyncio.run(one_round())
            preempted, prompt = (self.metric(n) - b for n, b in zip(names, before, strict=True))
            if under_way and (keep_kv or preempted):
                return UnderLoad(preempted, prompt, lengths)
        raise AssertionError("no update met a running request")

    def push_directory(self, directory: Path) -> None:
        async def main() -> None:
            async with aiohttp.ClientSession() as session:
                options = UpdateOptions(adapter=self.adapter)
                await push(session, self.url, self.token, directory, self.key, options)

        asyncio.run(main())


@contextlib.contextmanager
def serving(root: Path, rank: int = 0) -> Iterator[Served]:
    """A server of a made model; of its adapters of that rank, if it is not 0."""
    make_base(root / "base", seed=0, steps=120)
    make_base(root / "other", seed=1, steps=20)
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (root / "base" / "chat_template.jinja").write_text(template)
    with _serving(root / "run", root / "base", root / "other", rank, 1) as server:
        yield server


@contextlib.contextmanager
def tensor_parallel(like: Served, root: Path) -> Iterator[Served]:
    """A server on two devices, otherwise like another one."""
    rank = like.run.config().model.lora.rank
    with _serving(root, like.base, like.other, rank, 2) as server:
        yield server


@contextlib.contextmanager
def _serving(
    root: Path, base: Path, other: Path, rank: int, tensor_parallel: int
) -> Iterator[Served]:
    run = make_run(
        root,
        model={
            "path": str(base),
            "max_length": 32,
            "dtype": "float32",
            "lora": {"rank": rank, "alpha": 8, "targets": []},
        },
        rollout={**ROLLOUT, "tensor_parallel": tensor_parallel},
        environment=ENVIRONMENT,
        evaluation={"before": True, "after": False},
        staleness={"max": 0},
    )
    with started(run, base, other, root.with_suffix(".log")) as server:
        server.wait_until_up()
        yield server


@contextlib.contextmanager
def started(run: RunDir, base: Path, other: Path, log: Path, **variables: str) -> Iterator[Served]:
    """A server that is starting."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ("--run-dir", str(run.path), "--port", str(port))
    with module("atropos_hpc.rollout.vllm_server", *arguments, log=log, **variables) as child:
        yield Served(run, f"http://127.0.0.1:{port}", child, base, other, log)
