"""What a worker does with an environment's groups, backlog, and draws, in this process."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.vllm
pytest.importorskip("atroposlib")

from atroposlib.envs.base import BaseEnv  # noqa: E402

from atropos_hpc.config import RolloutConf  # noqa: E402
from atropos_hpc.contracts.messages import Quota  # noqa: E402
from atropos_hpc.contracts.prompts import DrawAnswer, DrawRequest, Reported  # noqa: E402
from atropos_hpc.rollout.env_adapter import RunEnvironment  # noqa: E402
from atropos_hpc.rollout.prompt_draws import Drawer, PromptDraws  # noqa: E402
from atropos_hpc.rollout.rollout_failures import Losses  # noqa: E402
from atropos_hpc.runtime.http import Answer  # noqa: E402

Found = tuple[Any, list[Any]]
Collect = Callable[["Environment", Any], Any]


class Environment(BaseEnv):
    """An environment of the numbers 0, 1, ..., whose rollouts do what `collect` does."""

    collect: Collect

    async def get_next_item(self) -> dict[str, int]:
        return {"number": next(self.numbers)}

    async def evaluate(self, *args: Any, **kwargs: Any) -> None: ...

    async def add_rollouts_for_wandb(self, *args: Any, **kwargs: Any) -> None: ...

    async def collect_trajectories(self, item: Any) -> Found:
        found: Found = await self.collect(item)
        return found


class Worker(RunEnvironment, Environment):
    """A worker without servers. `posted` has the groups that it sent."""

    def __init__(self, collect: Collect | None = None) -> None:
        self.collect = collect.__get__(self) if collect else None  # type: ignore[assignment]
        self.config: Any = SimpleNamespace(
            group_size=2, ensure_scores_are_not_same=True, include_messages=False, worker_timeout=0
        )
        self.posted: list[dict[str, Any]] = []
        self.requests: list[DrawRequest] = []
        self.numbers = itertools.count()
        self.hand_out = itertools.count()
        self.answering = True
        self.env_id, self.max_token_len, self.max_num_workers = 0, 100, 8
        self.items_sent_this_step, self.jsonl_writer = 0, None
        self.backlog, self.running_items, self.workers = [], {}, set()
        self.eval_workers, self._early = set(), None
        self.completion_lengths, self.task_duration, self.task_successful = [], [], []
        self.succeeded_task_duration, self.failed_task_duration = [], []
        self._rollout, self.label, self._sends = RolloutConf(), None, set()
        self._saved: Any = SimpleNamespace(follow=lambda rollout: rollout)
        self.pool: Any = SimpleNamespace(changed=asyncio.Event())
        self.losses = Losses("it")
        self.quota = Quota(1, 0)
        drawer = Drawer("environment", "environment-a-0", lambda: 1)
        self.draws = PromptDraws(self, drawer, self.draw)

    async def draw(self, request: DrawRequest) -> DrawAnswer | None:
        self.requests.append(request)
        if not self.answering:
            return None
        return DrawAnswer(numbers=list(itertools.islice(self.hand_out, request.want)))

    async def roll_out(self, rollouts: int = 1) -> None:
        for _ in range(rollouts):
            self.quota = Quota(1, 0)
            await self.add_train_workers()
            await asyncio.gather(*self.workers)

    def draws_posted(self) -> list[int | None]:
        params = [group["generation_params"] for group in self.posted]
        return [each["draw"]["number"] if "draw" in each else None for each in params]


class Posting(Worker):
    async def _send(self, groups: list[Any]) -> bool:
        self.posted += groups
        return True


def group(first: int) -> dict[str, Any]:
    tokens = [[first, 2], [first, 3]]
    return {"tokens": tokens, "masks": tokens, "scores": [0.0, 1.0], "group_overrides": {}}


def run(story: Any) -> None:
    asyncio.run(asyncio.wait_for(story, 60))


def test_groups_that_a_rollout_sends_by_itself_are_sent_once_and_block_no_later_ones() -> None:
    """The server takes a later group of a draw for that of a worker that was believed lost."""

    async def collect(self: Environment, item: Any) -> Found:
        extra = group(1)
        await self.handle_send_to_api(extra, item)
        return [extra, group(5)], []

    async def story() -> None:
        worker = Posting(collect)
        await worker.roll_out()
        assert [each["tokens"][0][0] for each in worker.posted] == [1, 5]
        assert worker.draws_posted() == [0, None]

    run(story())


@pytest.mark.parametrize("again", ["the item", "another item"])
def test_an_item_that_a_rollout_puts_into_the_backlog_goes_on_with_its_draw(again: str) -> None:
    """Otherwise its prompt would be drawn again, and be rolled out beside it."""

    async def collect(self: Environment, item: Any) -> Found:
        if item.setdefault("turn", 0) == 0:
            item["turn"] = 1
            return None, [item if again == "the item" else dict(item)]
        return group(7), []

    async def story() -> None:
        worker = Posting(collect)
        await worker.roll_out(2)
        assert worker.draws_posted() == [0]
        await worker.draws.report_last(10)
        assert all(not request.reports for request in worker.requests)
        await worker.roll_out(2)
        assert worker.draws_posted() == [0, 1]

    run(story())


def test_a_worker_that_leaves_reports_also_behind_a_request_that_was_not_answered() -> None:
    async def collect(self: Environment, item: Any) -> Found:
        return group(0) | {"scores": [1.0, 1.0]}, []

    async def story() -> None:
        worker = Posting(collect)
        await worker.roll_out()
        worker.answering = False
        await worker.draws.request_numbers(1)
        (reported,) = worker.requests[-1].reports
        worker.draws._reports.append(Reported(5, "no_signal"))  # of a rollout that ended since
        worker.answering = True
        await worker.draws.report_last(10)
        assert worker.requests[-2].reports == [reported]
        assert worker.requests[-1].reports == [Reported(5, "no_signal")]

    run(story())


def test_a_worker_that_leaves_after_an_outage_sends_without_registering_again() -> None:
    async def story() -> None:
        async def send(*args: Any, **kwargs: Any) -> Answer:
            return Answer(200, bytearray(), "")

        worker = Worker()
        worker.http = SimpleNamespace(outages=1, patience_s=3600, send=send)  # type: ignore[assignment]
        worker._outages_seen = 0
        sending = asyncio.create_task(worker._send([group(1)]))
        await asyncio.sleep(0)
        worker.draws.closing = True
        assert await sending and worker.losses.sent == 1

    run(story())


def test_a_worker_that_leaves_saves_answers_before_it_waits_for_the_trajectory_server() -> None:
    async def story() -> None:
        happened = []
        answered, saved = asyncio.Event(), asyncio.Event()

        @contextlib.asynccontextmanager
        async def stopping() -> AsyncIterator[None]:
            yield
            happened.append("saved")
            saved.set()

        async def send() -> None:
            await answered.wait()
            happened.append("sent")

        worker = Worker()
        worker._saved = SimpleNamespace(stopping=stopping)
        worker._sends.add(asyncio.create_task(send()))
        leaving = asyncio.create_task(worker.leave())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(10):
                await saved.wait()
        assert happened == ["saved"], "it waits for the send first, which may take long"
        answered.set()
        await asyncio.wait([leaving], timeout=10)
        assert happened == ["saved", "sent"]
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)

    run(story())
