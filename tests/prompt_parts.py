"""A run in miniature for the tests of the prompt ledger: a trajectory server over a real journal,
workers with the real client of draws, a learner, and faults."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from trajectory_parts import environment, group, registration

from atropos_hpc.contracts.group import NO_LIMITS, read_group
from atropos_hpc.contracts.messages import EnvironmentRegistration, LeaseQuery, Registration
from atropos_hpc.contracts.prompts import DrawAnswer, DrawRequest
from atropos_hpc.contracts.scored_group import RequestError
from atropos_hpc.contracts.wal_record import GROUP, Record, scan
from atropos_hpc.rollout.prompt_draws import Drawer, Drawn, PromptDraws
from atropos_hpc.trajectories.decode import decode_json
from atropos_hpc.trajectories.prompts import Stream
from atropos_hpc.trajectories.service import Service, ServiceSettings

NAME, BATCH = "environment", 8


class Walker:
    """As Atropos' environments walk their problems: `iter` is an index into `train`."""

    def __init__(self, problems: int) -> None:
        self.env_id, self.backlog = 0, list[Any]()
        self.train = [{"question": f"q{number}"} for number in range(problems)]
        random.shuffle(self.train)  # as unmodified environments do, with the global generator
        self.iter = self.calls = 0

    async def get_next_item(self) -> dict[str, str]:
        item = self.train[self.iter % len(self.train)]
        self.iter += 1
        return item


class World:
    """What survives faults: the journal's directory, and which prompts were worked on."""

    def __init__(self, directory: Path, problems: int, epochs: int, seed: int) -> None:
        self.directory, self.problems, self.total = directory, problems, problems * epochs
        self.dice = random.Random(seed)
        self.items: dict[int, str] = {}  # number -> the question it named, in any worker
        self.version = self.attempt = self.restarts = 0
        self.workers: dict[str, Worker] = {}
        self.late: list[Worker] = []  # of lost nodes
        self.delivered_late = 0
        self.drop_answers = 0  # of the next requests: applied, and the sender does not hear of it
        self.refuse = self.fail = self.flat = 0  # of the next groups

    async def start_server(self) -> None:
        self.service = Service(self.directory, ServiceSettings(segment_bytes=1 << 30))
        await self.service.register(Registration(**registration(BATCH)))
        await self.lease()

    async def kill_server(self) -> None:
        """What it journalled stays; the workers of a new one have to register again."""
        self.restarts += 1
        await self.service.close()
        await self.start_server()
        for worker in self.workers.values():
            await worker.register()

    async def add(self, member: str) -> "Worker":
        worker = self.workers[member] = Worker(self, member)
        await worker.register()
        return worker

    async def lease(self, oldest: int = 0) -> None:
        """Form and acknowledge the batches that can be formed."""
        while True:
            batch = self.service.state.next_batch
            query = LeaseQuery(batch=batch, rank=0, world=1, oldest=oldest, version=batch)
            if await self.service.lease(query) is None:
                return
            if batch > 2:
                await self.service.acknowledge(batch - 2)  # the last two are leased again

    async def deliver_late(self) -> None:
        """Let the workers of lost nodes post what others were given since, or not yet."""
        while self.late and self.dice.random() < 0.5:
            for drawn in (lost := self.late.pop()).rollouts:
                await lost.finish(drawn)
                self.delivered_late += 1

    def attempt_of_worker(self) -> Callable[[], int]:
        """What tells a worker that starts now its attempt."""
        attempt = self.attempt
        return lambda: attempt

    def stream(self) -> Stream:
        return self.service.state.prompts.stream(NAME)

    def done(self) -> bool:
        return self.stream().lowest >= self.total


class Worker:
    """An environment worker process."""

    def __init__(self, world: World, member: str) -> None:
        self.world, self.member = world, member
        random.seed(7)  # as all workers of the environment
        self.env, attempt = Walker(world.problems), world.attempt_of_worker()
        self.draws = PromptDraws(self.env, Drawer(NAME, member, attempt), self.send)
        random.seed(world.dice.random())  # its rollouts draw other numbers
        self.rollouts: list[Drawn] = []

    async def register(self) -> None:
        body = EnvironmentRegistration(**environment(NAME), member=self.member)
        answer = await self.world.service.register_environment(body)
        assert answer.env_id is not None
        self.env.env_id = answer.env_id

    async def send(self, request: DrawRequest) -> DrawAnswer | None:
        answer = await self.world.service.draws.draw(request)
        if self.world.drop_answers:
            self.world.drop_answers -= 1
            return None
        return answer

    async def turn(self, concurrency: int) -> None:
        """Start rollouts, and finish some."""
        world = self.world
        stream = world.stream()
        left = max(0, world.total - stream.next_number) + len(stream.returned)
        want = min(concurrency - len(self.rollouts), left)
        for item, drawn in await self.draws.take(want):
            number = drawn.draw.number
            assert world.items.setdefault(number, item["question"]) == item["question"]
            self.rollouts.append(drawn)
        world.dice.shuffle(self.rollouts)
        for _ in range(world.dice.randint(0, len(self.rollouts))):
            await self.finish(self.rollouts.pop())

    async def finish(self, drawn: Drawn) -> None:
        world, number = self.world, drawn.draw.number
        if world.flat or world.fail:
            self.draws.finish(drawn, "no_signal" if world.flat else "failed")
            world.flat, world.fail = max(0, world.flat - 1), world.fail - (not world.flat)
            return
        value = group(number, version=world.version, env_id=self.env.env_id)
        value["generation_params"]["group_id"] = f"{world.dice.random()}"
        value["generation_params"]["draw"] = msgspec.to_builtins(drawn.draw)
        if world.refuse:
            world.refuse -= 1
            value["scores"] = [0.0]
        body = msgspec.json.encode(value)
        for _ in range(2 if world.drop_answers else 1):  # sent again where the answer is lost
            await self.draws.follow(drawn, self.post(body))

    async def post(self, body: bytes) -> bool:
        try:
            await self.world.service.store(decode_json(body, False, NO_LIMITS))
        except RequestError:
            return False
        return True


def journalled(directory: Path) -> list[Record | Any]:
    """All groups in the journal, in order."""
    groups = []
    for path in sorted(directory.glob("*.journal")):
        data = bytearray(path.read_bytes())
        groups += [read_group(data, at, head) for at, _, head in scan(data) if head.kind == GROUP]
    return groups


def trained_prompts(directory: Path) -> Counter[int]:
    """How many groups of each number are in the journal."""
    return Counter(group.generation_params["draw"]["number"] for group in journalled(directory))


async def run(world: World, members: Sequence[str], faults: Sequence[Any]) -> None:
    """Run until `total` prompts have their outcome, with the faults spread over it."""
    await world.start_server()
    for member in members:
        await world.add(member)
    left, between = list(faults), max(1, world.total // max(1, len(faults)))
    for _ in range(world.total):
        drawn = world.stream().next_number
        while left and drawn >= between * (len(faults) - len(left)):
            await left.pop(0)(world)
        await asyncio.gather(*(worker.turn(4) for worker in world.workers.values()))
        await world.deliver_late()
        await world.lease()
        world.version = max(0, world.service.state.next_batch - 2)
        if world.done():
            break
    assert world.done() and not left
