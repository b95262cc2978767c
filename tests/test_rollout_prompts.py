"""Prompts are drawn exactly once per epoch, whatever happens to workers, nodes and the server."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.vllm
pytest.importorskip("atroposlib")

from prompt_parts import World, run, trained_prompts  # noqa: E402

from atropos_hpc.config import Config, LaunchConf  # noqa: E402
from atropos_hpc.contracts.run_info import RunInfo  # noqa: E402
from atropos_hpc.rollout.prompt_draws import attempt_of  # noqa: E402
from atropos_hpc.rollout.prompt_stream import PromptStream, item_hash  # noqa: E402
from atropos_hpc.runtime.run_dir import RunDir  # noqa: E402

PROBLEMS, EPOCHS = 200, 3
MEMBERS = ("environment-a-0", "environment-a-1", "environment-b-2")  # on two nodes


# --- faults


async def kill_worker(world: World) -> None:
    await world.add(world.dice.choice(list(world.workers)))


async def lose_node(world: World) -> None:
    """Its workers fall silent, others come up on another node, and they deliver after all."""
    node = world.dice.choice(sorted({member.split("-")[1] for member in world.workers}))
    for member in [member for member in world.workers if member.split("-")[1] == node]:
        lost = world.workers.pop(member)
        world.service.pacing.presence[lost.env.env_id].heard = time.monotonic() - 1e6
        world.late.append(lost)
        await world.add(f"environment-n{world.dice.randrange(10**9)}-{member[-1]}")


async def kill_server(world: World) -> None:
    await world.kill_server()


async def requeue(world: World) -> None:
    """The whole run starts again, from its last checkpoint."""
    world.attempt += 1
    await world.kill_server()
    for member in list(world.workers):
        await world.add(member)


async def lose_answers(world: World) -> None:
    world.drop_answers = 2


async def refuse_group(world: World) -> None:
    world.refuse = 1


async def fail_rollout(world: World) -> None:
    world.fail = 1


async def no_signal(world: World) -> None:
    world.flat = 2


async def drop_stale(world: World) -> None:
    for worker in world.workers.values():
        await worker.turn(4)
        while worker.rollouts:
            await worker.finish(worker.rollouts.pop())
    await world.lease(oldest=world.version + 10)


FAULTS = (
    *(kill_worker, lose_node, kill_server, requeue, lose_answers),
    *(refuse_group, fail_rollout, no_signal, drop_stale),
)


def outcomes(world: World) -> dict[int, Counter[str]]:
    return {
        epoch: Counter({name: count for name, count in counts.items() if count})
        for epoch, counts in world.stream().epochs.items()
    }


def story(tmp_path: Path, seed: int, faults: int) -> World:
    """Run three epochs, and return the world after a replay of its journal."""
    world = World(tmp_path, PROBLEMS, EPOCHS, seed)
    chosen = world.dice.choices(FAULTS, k=faults)

    async def both() -> None:
        await run(world, MEMBERS, chosen)
        before = world.stream()
        await world.service.close()
        await world.start_server()
        assert world.stream() == before
        await world.service.close()

    asyncio.run(both())
    return world


def test_forty_faults_leave_each_prompt_drawn_once_per_epoch_with_one_outcome(
    tmp_path: Path,
) -> None:
    world = story(tmp_path / "faults", seed=1, faults=40)
    assert world.restarts >= 3
    groups = trained_prompts(tmp_path / "faults")
    assert set(groups.values()) == {1}, "a prompt has two groups in one epoch"
    for epoch in range(EPOCHS):
        assert sum(outcomes(world)[epoch].values()) == PROBLEMS, outcomes(world)
        numbers = range(epoch * PROBLEMS, (epoch + 1) * PROBLEMS)
        assert len({world.items[number] for number in numbers}) == PROBLEMS
        accepted = outcomes(world)[epoch]["accepted"] + outcomes(world)[epoch]["stale"]
        assert accepted == sum(number in groups for number in numbers)
    counts = world.stream().counts()
    assert counts.ordered and counts.no_signal > 0 and counts.stale > 0
    assert world.delivered_late > 0

    calm = story(tmp_path / "calm", seed=2, faults=0)
    numbers = range(EPOCHS * PROBLEMS)
    drawn = Counter(world.items[number] for number in numbers)
    assert drawn == Counter(calm.items[number] for number in numbers)
    assert all(outcomes(calm)[epoch] == {"accepted": PROBLEMS} for epoch in range(EPOCHS))


class SplitWorld(World):
    """The workers have a job of their own, which outlives attempts of the trainer's."""

    def __init__(self, directory: Path, problems: int, epochs: int, seed: int) -> None:
        super().__init__(directory, problems, epochs, seed)
        self.run = RunDir(directory / "run")
        self.run.create()
        launch = LaunchConf(allocation="split")
        self.run.write_info(RunInfo(Config(run_dir=str(self.run.path), launch=launch)))
        self.run.new_attempt()

    def attempt_of_worker(self) -> Callable[[], int]:
        return attempt_of(self.run)


def test_workers_that_outlive_an_attempt_of_the_trainer_go_on_beside_restarted_ones(
    tmp_path: Path,
) -> None:
    async def tell() -> None:
        world = SplitWorld(tmp_path, PROBLEMS, 1, seed=3)
        await world.start_server()
        first, second = [await world.add(member) for member in MEMBERS[:2]]
        await first.turn(4)
        world.run.new_attempt()
        await world.kill_server()
        second = await world.add(second.member)
        held = {drawn.draw.number for drawn in first.rollouts}
        for _ in range(3):
            await asyncio.gather(first.turn(8), second.turn(8))
        assert len(await first.draws.take(4)) == 4
        assert not held & {drawn.draw.number for drawn in second.rollouts}
        await world.service.close()

    asyncio.run(tell())


# --- streams


class Counting:
    """An environment with a convention of its own; it counts the calls."""

    def __init__(self, items: int = 10) -> None:
        self.left: list[int] = []
        self.items, self.calls = items, list[None]()

    async def get_next_item(self) -> int:
        self.calls.append(None)
        if not self.left:
            self.left = random.sample(range(self.items), self.items)
        return self.left.pop()


class Indexed(Counting):
    def __init__(self, items: int = 10) -> None:
        super().__init__(items)
        self.iter, self.train = 0, random.sample(range(items), items)

    async def get_next_item(self) -> int:
        self.calls.append(None)
        item = self.train[self.iter % len(self.train)]
        self.iter += 1
        return item


class Reshuffling(Indexed):
    async def get_next_item(self) -> int:
        self.calls.append(None)
        if self.iter >= len(self.train):
            self.iter = 0
            random.shuffle(self.train)
        self.iter += 1
        return self.train[self.iter - 1]


class Templating(Indexed):
    """Not a function of the index alone."""

    async def get_next_item(self) -> Any:
        return await super().get_next_item(), random.random()


class Popping(Indexed):
    """Has an index and does not use it."""

    async def get_next_item(self) -> int:
        self.calls.append(None)
        self.iter += 1
        if not self.left:
            self.left = list(self.train)
        return self.left.pop()


def stream(kind: Callable[[int], Any], items: int = 500) -> PromptStream:
    random.seed(0)
    made = PromptStream(kind(items))
    random.seed()
    return made


def at(one: PromptStream, *numbers: int) -> list[Any]:
    async def story() -> list[Any]:
        found = [await one.item(number) for number in numbers]
        return [each[0] for each in found if each is not None]

    return asyncio.run(story())


@pytest.mark.parametrize("kind", [Counting, Indexed, Reshuffling, Templating, Popping])
def test_a_number_names_the_same_item_whatever_was_skipped(kind: Callable[[int], Any]) -> None:
    everything = at(stream(kind), *range(1700))
    numbers = (3, 4, 400, 499, 500, 501, 1000, 1650)
    assert at(stream(kind), *numbers) == [everything[number] for number in numbers]


@pytest.mark.parametrize(("kind", "most"), [(Indexed, 200), (Reshuffling, 200)])
def test_an_index_into_train_is_set_instead_of_walking(
    kind: Callable[[int], Any], most: int
) -> None:
    one = stream(kind)
    at(one, 1650)
    assert len(one.env.calls) < most
    walked = stream(Templating)
    at(walked, 1650)
    assert len(walked.env.calls) >= 1650


def test_what_another_worker_gave_up_can_still_be_drawn() -> None:
    one = stream(Counting, 5000)
    (late,) = at(one, 900)
    assert one.reach == 0 and at(one, 900, 10) == [late, at(stream(Counting, 5000), 10)[0]]
    at(one, 4000)
    assert one.reach == 4001 - 1024
    with pytest.raises(LookupError):
        at(one, 10)
    indexed = stream(Indexed, 5000)
    at(indexed, 4000)
    assert indexed.reach == 0 and at(indexed, 10) == at(stream(Indexed, 5000), 10)


def test_rollouts_that_use_the_global_generator_do_not_change_the_order() -> None:
    calm, busy = stream(Templating), stream(Templating)

    async def story() -> list[Any]:
        found = []
        for number in range(20):
            random.random()
            found.append((await busy.item(number) or [None])[0])
        return found

    assert asyncio.run(story()) == at(calm, *range(20))


def test_equal_items_have_equal_hashes_in_any_process() -> None:
    import numpy as np

    class Problem:
        def __init__(self, text: str) -> None:
            self.text = text

    def item(order: int) -> Any:
        roles = frozenset([("role", "user"), ("content", "2+2"), ("x", order)])
        return (roles, {"b": np.arange(3), "a": 1}, Problem("y"), object())

    assert item_hash(item(1)) == item_hash(item(1)) != item_hash(item(2))
