"""The common part of environments with one question and one answer.

It samples groups, measures held-out accuracy, and logs both.
"""

import asyncio
import math
import random
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from atroposlib.envs.base import BaseEnv, BaseEnvConfig, ScoredDataGroup
from pydantic import Field

CONCURRENT_EVALUATIONS = 256
ORDERS = 2  # epochs whose order is kept
RULE = "percent_correct"  # the verdict by the rule of the reward

T = TypeVar("T")
# Whether an answer is right, by each rule; one of them is RULE.
Verdict = Mapping[str, bool]


class SingleTurnConfig(BaseEnvConfig):
    """The config of both."""

    temperature: float = Field(default=1.0, gt=0, description="Sampling temperature in training.")
    seed: int = Field(default=0, description="Seed of the order of training problems.")
    eval_temperature: float = Field(
        default=0.0, ge=0, description="Sampling temperature in evaluation; 0 is greedy."
    )
    eval_samples: int = Field(
        default=1,
        ge=1,
        description="Further answers to each held-out problem, at the training temperature, for "
        "eval/pass@k; 1: none. The run sets it to evaluation.samples.",
    )


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Estimate, without bias, that at least one of k answers is right (arXiv 2107.03374).

    `right` of `samples` answers were right.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 4), pass_at_k(4, 0, 4), round(pass_at_k(4, 2, 2), 3)
    (0.25, 1.0, 0.0, 0.833)
    """
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def ks(samples: int) -> list[int]:
    """Return the k of pass@k to report: powers of two, and the number of samples.

    >>> ks(6), ks(1)
    ([1, 2, 4, 6], [])
    """
    if samples == 1:
        return []
    return sorted({1 << i for i in range(samples.bit_length()) if 1 << i <= samples} | {samples})


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
        self, problems: Sequence[T], answer: Callable[[T, float], Coroutine[Any, Any, Verdict]]
    ) -> None:
        """Report eval/<rule>, a fraction of 1, for each rule of the verdicts.

        With `eval_samples`, eval/sampled_<rule> and eval/pass@k by the rule of the reward follow;
        pass@1 is the sampled accuracy. `answer` answers a problem once, at that temperature.
        """
        start, config = time.time(), self.config
        once = await _gather(problems, lambda each: answer(each, config.eval_temperature))
        metrics = {f"eval/{rule}": _mean(once, rule) for rule in once[0]}
        if sizes := ks(config.eval_samples):
            repeated = [problem for problem in problems for _ in range(config.eval_samples)]
            answers = await _gather(repeated, lambda each: answer(each, config.temperature))
            n, right = config.eval_samples, [verdict[RULE] for verdict in answers]
            counts = [sum(right[at : at + n]) for at in range(0, len(right), n)]
            for k in sizes:
                estimates = [pass_at_k(n, count, k) for count in counts]
                metrics[f"eval/pass@{k}"] = sum(estimates) / len(estimates)
            rules = answers[0].keys() - {RULE}
            metrics |= {f"eval/sampled_{rule}": _mean(answers, rule) for rule in sorted(rules)}
        self.eval_metrics += metrics.items()
        await self.evaluate_log(metrics, start_time=start, end_time=time.time())

    async def wandb_log(self, wandb_metrics: dict[str, object] | None = None) -> None:
        metrics: dict[str, object] = {**(wandb_metrics or {}), **dict(self.eval_metrics)}
        if self.rewards:
            metrics["train/percent_correct"] = sum(self.rewards) / len(self.rewards)
        self.rewards, self.eval_metrics = [], []
        await super().wandb_log(metrics)


def _mean(answers: Sequence[Verdict], rule: str) -> float:
    return sum(verdict[rule] for verdict in answers) / len(answers)


async def _gather(
    items: Sequence[T], answer: Callable[[T], Coroutine[Any, Any, Verdict]]
) -> list[Verdict]:
    """Answer every item, a bounded number at once, in order."""
    answers: list[Verdict] = []
    for at in range(0, len(items), CONCURRENT_EVALUATIONS):
        answers += await asyncio.gather(*map(answer, items[at : at + CONCURRENT_EVALUATIONS]))
    return answers
