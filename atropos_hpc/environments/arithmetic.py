"""Addition of two-digit numbers as an Atropos environment; `addition` describes the task."""

import random
from typing import Any

from atroposlib.envs.base import APIServerConfig, ScoredDataGroup
from pydantic import Field

from atropos_hpc.environments.addition import ANSWER_TOKENS, Problem, accepted, encode, problems
from atropos_hpc.environments.single_turn import RULE, SingleTurnConfig, SingleTurnEnv, Verdict


class ArithmeticConfig(SingleTurnConfig):
    """The environment's own config."""

    eval_temperature: float = Field(
        default=1.0, ge=0, description="Sampling temperature in evaluation; 0 is greedy."
    )
    eval_problems: int = Field(
        default=500,
        ge=1,
        description="How many held-out problems an evaluation samples, one answer each.",
    )
    train_problems: int | None = Field(
        default=None,
        ge=1,
        description="How many of the training problems an epoch has. None: all 9000 or so.",
    )
    tolerance: int = Field(
        default=0,
        ge=0,
        le=99,
        description="How far off the sum an answer may be and still count as right.",
    )


class ArithmeticEnv(SingleTurnEnv):
    """One prompt, `group_size` answers; reward 1 within `tolerance` of the sum, else 0."""

    name = "arithmetic"
    env_config_cls = ArithmeticConfig

    @classmethod
    def config_init(cls) -> tuple[ArithmeticConfig, list[APIServerConfig]]:
        return ArithmeticConfig(max_token_length=32, group_size=8), [APIServerConfig()]

    async def setup(self) -> None:
        await super().setup()
        self.training, self.held_out = problems(held_out=False), problems(held_out=True)
        if (count := self.config.train_problems) is not None:
            self.training = random.Random(0).sample(self.training, count)

    async def collect_trajectories(self, item: Problem) -> tuple[ScoredDataGroup, list[Problem]]:
        right = [encode(item.prompt + answer) for answer in accepted(item, self.config.tolerance)]
        return await self.sampled(item.prompt, ANSWER_TOKENS, lambda node: node.tokens in right), []

    async def evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Sample one answer to each of some held-out problems, the same at every evaluation."""
        chosen = random.Random(0).sample(
            self.held_out, min(self.config.eval_problems, len(self.held_out))
        )
        await self.report_accuracy(chosen, self._answer)

    async def _answer(self, problem: Problem, temperature: float) -> Verdict:
        completion = await self.server.completion(
            prompt=problem.prompt,
            n=1,
            max_tokens=ANSWER_TOKENS,
            temperature=temperature,
            split="eval",
        )
        choice = completion.choices[0]
        right = [answer.strip() for answer in accepted(problem, self.config.tolerance)]
        return {RULE: choice.finish_reason == "stop" and choice.text.strip() in right}
