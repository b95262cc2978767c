"""An unmodified Atropos environment that walks `self.iter`, killed and resumed, over real HTTP."""

import asyncio
import random
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.vllm
pytest.importorskip("atroposlib")

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, ScoredDataGroup  # noqa: E402
from prompt_parts import journalled  # noqa: E402
from rollout_parts import make_run  # noqa: E402
from trajectory_parts import registration  # noqa: E402

from atropos_hpc.contracts.members import (  # noqa: E402
    AgentState,
    EnvironmentState,
    Roster,
    ServerState,
    TrajectoriesState,
)
from atropos_hpc.contracts.messages import LeaseQuery, Registration  # noqa: E402
from atropos_hpc.contracts.policy import PolicyVersion  # noqa: E402
from atropos_hpc.environments.make_base import make_tokenizer  # noqa: E402
from atropos_hpc.rollout.env_adapter import as_member  # noqa: E402
from atropos_hpc.rollout.prompt_draws import Drawer  # noqa: E402
from atropos_hpc.rollout.rollout_failures import Losses  # noqa: E402
from atropos_hpc.rollout.vllm_client import VllmServerConfig  # noqa: E402
from atropos_hpc.runtime.membership import Member  # noqa: E402
from atropos_hpc.runtime.run_dir import RunDir, write_struct  # noqa: E402
from atropos_hpc.trajectories.http_body import BodyLimits  # noqa: E402
from atropos_hpc.trajectories.prompts import Stream  # noqa: E402
from atropos_hpc.trajectories.server import application, start  # noqa: E402
from atropos_hpc.trajectories.service import Service, ServiceSettings  # noqa: E402

PROBLEMS, EPOCHS, BATCH = 80, 2, 4
NODES = ("a", "a", "b")


class UnmodifiedEnv(BaseEnv):
    """As those that come with Atropos, but for its answers, which no model generates."""

    name = "unmodified"

    @classmethod
    def config_init(cls) -> tuple[BaseEnvConfig, list[APIServerConfig]]:
        return BaseEnvConfig(group_size=2, max_token_length=32, max_num_workers=4), []

    async def setup(self) -> None:
        self.train = list(range(PROBLEMS))
        random.shuffle(self.train)
        self.iter = 0

    async def get_next_item(self) -> int:
        item = self.train[self.iter % len(self.train)]
        self.iter += 1
        return item

    async def collect_trajectories(self, item: int) -> tuple[ScoredDataGroup | None, list[Any]]:
        await asyncio.sleep(0.02 * random.random())
        if random.random() < 0.05:
            raise RuntimeError("a rollout that fails")
        rows = [[item, 5], [item, 6]]
        return ScoredDataGroup(tokens=rows, masks=rows, scores=[0.0, float(item % 5 > 0)]), []

    async def evaluate(self, *args: Any, **kwargs: Any) -> None: ...

    def save_checkpoint(self, step: int, data: Any = None) -> None:
        super().save_checkpoint(step, {"iter": self.iter})


class PlacedEnv(UnmodifiedEnv):
    """Keeps its place under a name of its own, so it is walked, from its checkpoint."""

    async def setup(self) -> None:
        await super().setup()
        del self.iter
        self.place = self.calls = 0

    async def get_next_item(self) -> int:
        self.place, self.calls = self.place + 1, self.calls + 1
        return self.train[(self.place - 1) % len(self.train)]

    def save_checkpoint(self, step: int, data: Any = None) -> None:
        BaseEnv.save_checkpoint(self, step, {"place": self.place})


class Live:
    """A run without learner and vLLM: `train` leases what comes."""

    environment: type[BaseEnv] = UnmodifiedEnv
    longest = 100  # tokens of a sequence

    def __init__(self, path: Path, *vllm: str) -> None:
        self.run: RunDir = make_run(path / "run")
        self.tokenizer = path / "tokenizer"
        make_tokenizer().save_pretrained(self.tokenizer)
        self.attempt, self.listener = 0, socket.create_server(("127.0.0.1", 0))
        port = self.listener.getsockname()[1]
        version = PolicyVersion(version=0, attempt=1)
        urls = vllm or ("http://127.0.0.1:9",)
        servers = [ServerState(url=url, version=version) for url in urls]
        trajectories = TrajectoriesState(url=f"http://127.0.0.1:{port}")
        write_struct(
            self.run.roster,
            Roster(members={"t": trajectories, "agent-a-0": AgentState(servers=servers)}),
        )
        self.workers: dict[int, tuple[Any, asyncio.Task[None]]] = {}

    async def start_server(self) -> None:
        settings = ServiceSettings(segment_bytes=1 << 30, max_staleness=1 << 20)
        self.service = Service(self.run.trajectories, settings)
        folder = str(self.run.path / "environments")
        values = registration(BATCH, checkpoint_dir=folder, max_token_len=self.longest)
        await self.service.register(Registration(**values))
        app = application(self.service, self.run.token(), BodyLimits(1 << 20))
        self.runner = await start(app, socket.socket(fileno=socket.dup(self.listener.fileno())))
        await self.train()

    async def stop_server(self) -> None:
        self.service.end_waits()
        await self.runner.cleanup()
        await self.service.close()

    def start_worker(self, index: int) -> None:
        member = Member(self.run, EnvironmentState(), NODES[index], index)
        server = VllmServerConfig(
            run_dir=self.run.path,
            model_name=str(self.tokenizer),
            tokenizer_name=str(self.tokenizer),
            server_type="vllm",
        )
        config = self.environment.config_init()[0]
        values = {"tokenizer_name": str(self.tokenizer), "use_wandb": False, "steps_per_eval": 0}
        config = config.model_copy(update={**values, "max_batches_offpolicy": 0})
        random.seed(7)
        env = as_member(self.environment)(
            config,
            [server],
            member=member,
            token=self.run.token(),
            losses=Losses("environment"),
            drawer=Drawer("environment", member.name, lambda attempt=self.attempt: attempt),
        )
        random.seed(index)
        self.workers[index] = (env, asyncio.create_task(env.env_manager()))

    async def kill_worker(self, index: int) -> None:
        """End it without a word to anybody."""
        env, task = self.workers.pop(index)
        tasks = [each for each in (task, env._early, *env.workers, *env._sends) if each]
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await env.http.close()
        env.member.leave()

    async def train(self) -> None:
        while True:
            batch = self.service.state.next_batch
            if await self.service.lease(LeaseQuery(batch, 0, 1, version=batch)) is None:
                return

    async def until(self, drawn: int) -> Stream:
        """Train until so many prompts have their outcome."""
        for _ in range(6000):
            await self.train()
            stream = self.service.state.prompts.stream("environment")
            if stream.lowest >= drawn:
                return stream
            for _, task in self.workers.values():
                assert not task.done(), task.exception()
            await asyncio.sleep(0.01)
        raise AssertionError(f"prompt {drawn} has not come: {stream}")


@pytest.mark.timeout(180)
@pytest.mark.parametrize("kind", [UnmodifiedEnv, PlacedEnv])
def test_an_environment_that_walks_covers_each_epoch_however_often_it_is_killed(
    tmp_path: Path, kind: type[UnmodifiedEnv]
) -> None:
    live = Live(tmp_path)
    live.environment = kind

    async def story() -> Stream:
        await live.start_server()
        for index in range(3):
            live.start_worker(index)
        for drawn, index in ((15, 0), (30, 2), (45, 1)):
            await live.until(drawn)
            await live.kill_worker(index)
            live.start_worker(index)
        await live.until(60)
        await live.stop_server()
        await live.start_server()
        await live.until(90)
        for index in range(3):  # the run is requeued
            await live.kill_worker(index)
        await live.stop_server()
        live.attempt += 1
        await live.start_server()
        for index in range(3):
            live.start_worker(index)
        stream = await live.until(PROBLEMS * EPOCHS)
        if kind is PlacedEnv:
            env = live.workers[0][0]
            assert env.draws.stream.position == env.place > env.calls, "no checkpoint was loaded"
        for env, task in live.workers.values():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await env.leave()
            env.member.leave()
        await live.stop_server()
        return stream

    stream = asyncio.run(story())
    random.seed(7)
    order = list(range(PROBLEMS))
    random.shuffle(order)
    assert stream.unordered is None
    prompts: dict[int, Counter[int]] = {epoch: Counter() for epoch in range(EPOCHS)}
    for group in journalled(live.run.trajectories):
        number = group.generation_params["draw"]["number"]
        item = int(group.tokens[0])
        assert item == order[number % PROBLEMS], "the number does not name the prompt"
        if number < PROBLEMS * EPOCHS:
            prompts[number // PROBLEMS][item] += 1
    failed = 0
    for epoch, counted in prompts.items():
        assert set(counted.values()) == {1} and all(item % 5 for item in counted)
        failed += sum(item % 5 > 0 and item not in counted for item in range(PROBLEMS))
        if kind is UnmodifiedEnv:  # which tells the length of an epoch
            outcomes = {name: n for name, n in stream.epochs[epoch].items() if n}
            assert sum(outcomes.values()) == PROBLEMS and len(counted) == outcomes["accepted"]
    assert failed <= stream.outcomes.get("failed", 0) and stream.outcomes["no_signal"] > 0
