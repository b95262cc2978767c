"""An environment that generates in turn in each way that Atropos environments do."""

import itertools
from typing import Any

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, ScoredDataGroup

KINDS = ("managed", "tokens", "completion", "chat", "turns")
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
TOOL = "12+"  # what the "tool" answers between two turns


class KindsEnv(BaseEnv):
    name = "kinds"

    @classmethod
    def config_init(cls) -> tuple[BaseEnvConfig, list[APIServerConfig]]:
        return BaseEnvConfig(max_token_length=32, ensure_scores_are_not_same=False), [
            APIServerConfig()
        ]

    async def setup(self) -> None:
        self.kinds = itertools.cycle(KINDS)
        for tokenizer in (self.tokenizer, *(each.tokenizer for each in self.server.servers)):
            tokenizer.chat_template = TEMPLATE  # the demo's has none

    async def get_next_item(self) -> str:
        return next(self.kinds)

    async def collect_trajectories(self, item: str) -> tuple[ScoredDataGroup, list[Any]]:
        group = await getattr(self, item)("47+38=", self.config.group_size)
        group["scores"] = [float(i % 2) for i in range(len(group["tokens"]))]
        group["generation_params"] = {"kind": item}
        return group, []

    async def managed(self, prompt: str, n: int) -> ScoredDataGroup:
        async with self.server.managed_server(tokenizer=self.tokenizer) as server:
            options = {"top_p": 0.9, "min_p": 0.1}
            await server.completion(prompt=prompt, n=n, max_tokens=4, temperature=1.0, **options)
            return of_nodes(server.get_state()["nodes"])

    async def tokens(self, prompt: str, n: int) -> ScoredDataGroup:
        ids, outputs, logprobs, _ = await self.server.tokens_and_logprobs_completion(
            prompt=prompt, n=n, max_tokens=4, temperature=1.0, top_p=0.9
        )
        masked = len(ids)
        return ScoredDataGroup(
            tokens=[ids + out for out in outputs],
            masks=[[-100] * masked + out for out in outputs],
            inference_logprobs=[[1.0] * masked + each for each in logprobs],
        )

    async def completion(self, prompt: str, n: int) -> ScoredDataGroup:
        answer = await self.server.completion(prompt=prompt, n=n, max_tokens=4, temperature=1.0)
        return self.retokenized(prompt, [choice.text for choice in answer.choices])

    async def chat(self, prompt: str, n: int) -> ScoredDataGroup:
        answer = await self.server.chat_completion(
            messages=[{"role": "user", "content": prompt}], n=n, max_tokens=4, temperature=1.0
        )
        return self.retokenized(prompt, [choice.message.content for choice in answer.choices])

    async def turns(self, prompt: str, n: int) -> ScoredDataGroup:
        """Two turns each, with a tool's tokens between them, which are masked."""
        nodes = []
        for _ in range(n):
            async with self.server.managed_server(tokenizer=self.tokenizer) as server:
                messages = [{"role": "user", "content": prompt}]
                options = {"n": 1, "max_tokens": 4, "temperature": 1.0, "top_k": 6}
                answer = await server.chat_completion(messages=messages, **options)
                messages += [
                    {"role": "assistant", "content": answer.choices[0].message.content},
                    {"role": "tool", "content": TOOL},
                ]
                await server.chat_completion(messages=messages, **options)
                nodes += server.get_state()["nodes"]
        return of_nodes(nodes)

    def retokenized(self, prompt: str, texts: list[str]) -> ScoredDataGroup:
        """Tokenize again, as environments do that have the text only.

        There are no log-probs, and the token ids may differ from those sampled.
        """
        start = self.tokenizer.encode(prompt)
        outputs = [[*self.tokenizer.encode(text), self.tokenizer.eos_token_id] for text in texts]
        return ScoredDataGroup(
            tokens=[start + out for out in outputs],
            masks=[[-100] * len(start) + out for out in outputs],
        )

    def save_checkpoint(self, step: int, data: Any = None) -> None:
        super().save_checkpoint(step, {"saved_at": step})

    async def evaluate(self, *args: Any, **kwargs: Any) -> None:
        raise LookupError("this environment has no held-out problems")


def of_nodes(nodes: list[Any]) -> ScoredDataGroup:
    return ScoredDataGroup(
        tokens=[node.tokens for node in nodes],
        masks=[node.masked_tokens for node in nodes],
        inference_logprobs=[node.logprobs for node in nodes],
    )
