"""A verifiers taskset of one turn: the sum of two numbers, as the demo's model writes it."""

from collections.abc import Iterable

import verifiers.v1 as vf

__all__ = ["SumsTaskset"]


class SumsData(vf.TaskData):
    """A problem and its answer."""

    answer: int = 0


class SumsTask(vf.Task[SumsData]):
    """Right is the sum, and nothing else."""

    @vf.reward
    async def is_right(self, trace: vf.Trace) -> float:
        reply = trace.last_reply.strip()
        return float(reply.isdigit() and int(reply) == self.data.answer)

    @vf.metric
    async def length(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply))


class SumsConfig(vf.TasksetConfig):
    """How large the first number may be."""

    largest: int = 99


class SumsTaskset(vf.Taskset[SumsTask, SumsConfig]):
    """All sums of a number and one of two digits."""

    def load(self) -> Iterable[SumsTask]:
        for a in range(10, self.config.largest + 1):
            for b in range(10, 100, 7):
                data = SumsData(prompt=f"{a}+{b}=", answer=a + b)
                yield SumsTask(data, self.config.task)
