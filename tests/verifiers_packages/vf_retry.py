"""A verifiers environment of several turns: a wrong sum may be tried once more."""

import verifiers.v1 as vf
from vf_sums import SumsTask, SumsTaskset

__all__ = ["RetryEnv", "RetryTaskset"]


class RetryTaskset(SumsTaskset):
    """The same tasks."""


class RetryConfig(vf.EnvConfig):
    """One agent."""

    agent: vf.AgentConfig = vf.AgentConfig()


class RetryEnv(vf.Env[RetryConfig]):
    """The user repeats the problem after a wrong answer."""

    async def run(self, task: SumsTask, agents: vf.Agents) -> None:
        async with agents.agent.interaction(task) as conversation:
            reply = await conversation.turn()
            if not reply.terminated and reply.last_reply != task.data.answer:
                await conversation.turn(task.data.prompt)
