"""Adding two numbers of two digits, as an Atropos environment. See `addition` for the task itself."""

import asyncio
import random
import time
from typing import Any

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, ScoredDataGroup
from pydantic import Field

from atropos_hpc.environments.addition import ANSWER_TOKENS, Problem, encode, problems


class ArithmeticConfig(BaseEnvConfig):
    eval_problems: int = Field(default=500, ge=1, description="How many held-out problems an evaluation samples, one answer each.")
    temperature: float = Field(default=1.0, gt=0, description="Sampling temperature in training.")
    seed: int = Field(default=0, description="Of the order in which training problems come.")


class ArithmeticEnv(BaseEnv):
    """One prompt, `group_size` sampled answers, reward 1 for the exact answer and 0 for any other."""

    name = "arithmetic"
    env_config_cls = ArithmeticConfig

    @classmethod
    def config_init(cls) -> tuple[ArithmeticConfig, list[APIServerConfig]]:
        return ArithmeticConfig(max_token_length=32, group_size=8), [APIServerConfig()]

    async def setup(self) -> None:
        self.training, self.held_out = problems(held_out=False), problems(held_out=True)
        self.order = random.Random(self.config.seed)
        self.eval_metrics: list[tuple[str, float]] = []
        self.rewards: list[float] = []

    async def get_next_item(self) -> Problem:
        return self.order.choice(self.training)

    async def collect_trajectories(self, item: Problem) -> tuple[ScoredDataGroup, list[Problem]]:
        async with self.server.managed_server(tokenizer=self.tokenizer) as server:
            await server.completion(
                prompt=item.prompt, n=self.config.group_size, max_tokens=ANSWER_TOKENS, temperature=self.config.temperature
            )
            sampled = server.get_state()["nodes"]
        rewards = [float(node.tokens == encode(item.prompt + item.answer)) for node in sampled]
        self.rewards += rewards
        group = ScoredDataGroup(
            tokens=[node.tokens for node in sampled],
            masks=[node.masked_tokens for node in sampled],
            scores=rewards,
            inference_logprobs=[node.logprobs for node in sampled],
        )
        return group, []

    async def evaluate(self, *args: Any, **kwargs: Any) -> None:
        """One answer to each of some held-out problems, the same at every evaluation, sampled at temperature 1."""
        start = time.time()
        chosen = random.Random(0).sample(self.held_out, min(self.config.eval_problems, len(self.held_out)))
        right = []
        for at in range(0, len(chosen), 256):  # as many requests at once
            right += await asyncio.gather(*(self._answers_right(problem) for problem in chosen[at : at + 256]))
        percent_correct = sum(right) / len(right)
        self.eval_metrics.append(("eval/percent_correct", percent_correct))
        await self.evaluate_log({"eval/percent_correct": percent_correct}, start_time=start, end_time=time.time())

    async def _answers_right(self, problem: Problem) -> bool:
        completion = await self.server.completion(prompt=problem.prompt, n=1, max_tokens=ANSWER_TOKENS, temperature=1.0, split="eval")
        choice = completion.choices[0]
        return choice.finish_reason == "stop" and choice.text.strip() == problem.answer.strip()

    async def wandb_log(self, wandb_metrics: dict[str, Any] | None = None) -> None:
        metrics = dict(wandb_metrics or {}) | dict(self.eval_metrics)
        if self.rewards:
            metrics["train/percent_correct"] = sum(self.rewards) / len(self.rewards)
        self.rewards, self.eval_metrics = [], []
        await super().wandb_log(metrics)
