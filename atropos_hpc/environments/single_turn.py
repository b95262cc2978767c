"""The common part of environments with one question and one answer.

It samples groups, measures held-out accuracy, and logs both.
"""

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from atroposlib.envs.base import BaseEnv, BaseEnvConfig, ScoredDataGroup
from pydantic import Field

CONCURRENT_EVALUATIONS = 256
ORDERS = 2  # epochs whose order is kept

T = TypeVar("T")


class SingleTurnConfig(BaseEnvConfig):
    """The config of both."""

    temperature: float = Field(default=1.0, gt=0, description="Sampling temperature in training.")
    seed: int = Field(default=0, description="Seed of the order of training problems.")


class SingleTurnEnv(BaseEnv):
    """Base class; `collect_trajectories` and `evaluate` of a subclass call these methods.

    `setup` of a subclass sets `training`.
    """

    training: Sequence[Any]

    async def setup(self) -> None:
        """Start with empty metrics."""
        self.eval_metrics: list[tuple[str, float]] = []
        self.rewards: list[float] = []
        self.items_taken = 0
        self._orders: dict[int, list[int]] = {}

    @property
    def epoch_length(self) -> int:
        """Return the number of training problems, each of which comes once per epoch."""
        return len(self.training)

    def item_at(self, number: int) -> Any:
        """Return the training problem of a number, in an order that the seed and the epoch fix."""
        epoch, index = divmod(number, self.epoch_length)
        if epoch not in self._orders:
            order = random.Random(f"{self.config.seed}/{epoch}")
            self._orders[epoch] = order.sample(range(self.epoch_length), self.epoch_length)
            for old in sorted(self._orders)[:-ORDERS]:
                del self._orders[old]
        return self.training[self._orders[epoch][index]]

    async def get_next_item(self) -> Any:
        """Return the next training problem."""
        self.items_taken += 1
        return self.item_at(self.items_taken - 1)

    async def sampled(
        self, prompt: str, max_tokens: int, reward: Callable[[Any], float]
    ) -> ScoredDataGroup:
        """Sample `group_size` answers to a prompt; `reward` gets the node of each."""
        async with self.server.managed_server(tokenizer=self.tokenizer) as server:
            await server.completion(
                prompt=prompt,
                n=self.config.group_size,
                max_tokens=max_tokens,
                temperature=self.config.temperature,
            )
            nodes = server.get_state()["nodes"]
        rewards = [float(reward(node)) for node in nodes]
        self.rewards += rewards
        return ScoredDataGroup(
            tokens=[node.tokens for node in nodes],
            masks=[node.masked_tokens for node in nodes],
            scores=rewards,
            inference_logprobs=[node.logprobs for node in nodes],
        )

    async def report_accuracy(
        self, problems: Sequence[T], answers_right: Callable[[T], Coroutine[Any, Any, bool]]
    ) -> None:
        """Answer each problem once, and report eval/percent_correct, a fraction of 1."""
        start, right = time.time(), 0
        for at in range(0, len(problems), CONCURRENT_EVALUATIONS):
            right += sum(
                await asyncio.gather(
                    *map(answers_right, problems[at : at + CONCURRENT_EVALUATIONS])
                )
            )
        percent_correct = right / len(problems)
        self.eval_metrics.append(("eval/percent_correct", percent_correct))
        await self.evaluate_log(
            {"eval/percent_correct": percent_correct}, start_time=start, end_time=time.time()
        )

    async def wandb_log(self, wandb_metrics: dict[str, object] | None = None) -> None:
        """Log the metrics since the last call."""
        metrics: dict[str, object] = {**(wandb_metrics or {}), **dict(self.eval_metrics)}
        if self.rewards:
            metrics["train/percent_correct"] = sum(self.rewards) / len(self.rewards)
        self.rewards, self.eval_metrics = [], []
        await super().wandb_log(metrics)
