"""Environments that are broken in the ways that people's environments are."""

import asyncio
import sys
import time
from typing import Any, ClassVar

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, ScoredDataGroup

PROMPT = "47+38="


class Works(BaseEnv):
    """The base of all: it works, with scores that differ."""

    name = "works"

    @classmethod
    def config_init(cls) -> tuple[BaseEnvConfig, list[APIServerConfig]]:
        return BaseEnvConfig(max_token_length=32), [APIServerConfig()]

    async def setup(self) -> None:
        self.number = 0

    async def get_next_item(self) -> Any:
        self.number += 1
        return self.number

    def scores(self, n: int) -> list[Any]:
        return [float(i % 2) for i in range(n)]

    def prompt(self) -> str:
        return PROMPT

    sampling: ClassVar[dict[str, Any]] = {}

    async def collect_trajectories(self, item: Any) -> Any:
        n = self.config.group_size
        async with self.server.managed_server(tokenizer=self.tokenizer) as server:
            await server.completion(
                prompt=self.prompt(), n=n, max_tokens=4, temperature=1.0, **self.sampling
            )
            nodes = server.get_state()["nodes"]
        group = ScoredDataGroup(
            tokens=[node.tokens for node in nodes],
            masks=[node.masked_tokens for node in nodes],
            inference_logprobs=[node.logprobs for node in nodes],
            scores=self.scores(n),
        )
        return group, []

    async def evaluate(self, *args: Any, **kwargs: Any) -> None:
        raise LookupError("no held-out problems")


class RaisesAtOnce(Works):
    async def collect_trajectories(self, item: Any) -> Any:
        raise LookupError("no such tool")


class RaisesSometimes(Works):
    async def collect_trajectories(self, item: Any) -> Any:
        if item % 3 == 0:  # each is drawn again, up to three times
            raise LookupError("no such tool")
        return await super().collect_trajectories(item)


class ReturnsNone(Works):
    async def collect_trajectories(self, item: Any) -> Any:
        return None, []


class ReturnsNoPair(Works):
    async def collect_trajectories(self, item: Any) -> Any:
        return None


class CatchesItsErrors(Works):
    async def collect_trajectories(self, item: Any) -> Any:
        try:
            return await super().collect_trajectories(item)
        except Exception:
            return None, []

    def prompt(self) -> str:
        return PROMPT * 20


class LongPrompts(Works):
    def prompt(self) -> str:
        return PROMPT * 20


class WrongScores(Works):
    def scores(self, n: int) -> list[Any]:
        return [0.0, *super().scores(n)]


class WrongSize(Works):
    async def collect_trajectories(self, item: Any) -> Any:
        group, backlog = await super().collect_trajectories(item)
        return {key: rows[:-1] for key, rows in group.items()}, backlog


class BooleanScores(Works):
    def scores(self, n: int) -> list[Any]:
        return [bool(i % 2) for i in range(n)]


class NaNScores(Works):
    def scores(self, n: int) -> list[Any]:
        return [float("nan"), *super().scores(n)[1:]]


class Truncates(Works):
    sampling: ClassVar = {"top_p": 0.8, "top_k": 6}


class Penalizes(Works):
    sampling: ClassVar = {"presence_penalty": 0.5}


class EqualScores(Works):
    def scores(self, n: int) -> list[Any]:
        return [1.0] * n


class SystemTurn(Works):
    """Its tokenizer's template refuses a system turn."""

    async def setup(self) -> None:
        await super().setup()
        template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{{ m.content }}{% endfor %}"  # fmt: skip # noqa: E501
        for server in self.server.servers:
            server.tokenizer.chat_template = template

    async def collect_trajectories(self, item: Any) -> Any:
        messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": PROMPT}]
        await self.server.chat_completion(messages=messages, n=2, max_tokens=4)
        return await super().collect_trajectories(item)


class Hangs(Works):
    async def collect_trajectories(self, item: Any) -> Any:
        await asyncio.sleep(3600)  # the answer of a sandbox that has died


class Blocks(Works):
    async def collect_trajectories(self, item: Any) -> Any:
        time.sleep(3600)


class Exits(Works):
    async def collect_trajectories(self, item: Any) -> Any:
        sys.exit(0)


class ExitsInATask(Works):
    async def collect_trajectories(self, item: Any) -> Any:
        async def grade() -> None:
            sys.exit("no key")

        await asyncio.create_task(grade())


class NumbersForAnswers(Works):
    """Its data has numbers where it expects text."""

    async def setup(self) -> None:
        await super().setup()
        self.answers = [answer.strip() for answer in (85, 12)]  # type: ignore[attr-defined]


class NoPrompt(Works):
    async def get_next_item(self) -> Any:
        raise FileNotFoundError("/data/train.jsonl")


class Reports(Works):
    async def evaluate(self, *args: Any, **kwargs: Any) -> None:
        await self.evaluate_log({"eval/score": 0.5})


class HangsInEvaluation(Works):
    async def evaluate(self, *args: Any, **kwargs: Any) -> None:
        await asyncio.sleep(3600)
