"""A verifiers taskset of one turn: the sum of two numbers."""

from collections.abc import Iterable

import verifiers.v1 as vf

__all__ = ["SumsTaskset"]


class SumsData(vf.TaskData):
    """A problem and its answer."""

    answer: str = ""


class SumsTask(vf.Task[SumsData]):
    """Right is the sum, and nothing else."""

    @vf.reward
    async def is_right(self, trace: vf.Trace) -> float:
        return float(trace.last_reply == self.data.answer)

    @vf.metric
    async def length(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply))


class SumsConfig(vf.TasksetConfig):
    """How large the first number may be, and how the answer is written."""

    largest: int = 99
    backwards: bool = False
    """Three digits, the least significant first, as the demo's model writes them."""


class SumsTaskset(vf.Taskset[SumsTask, SumsConfig]):
    """Sums of two numbers of two digits."""

    def load(self) -> Iterable[SumsTask]:
        for a in range(10, self.config.largest + 1):
            for b in range(10, 100, 7):
                answer = f"{a + b:03d}"[::-1] if self.config.backwards else str(a + b)
                yield SumsTask(SumsData(prompt=f"{a}+{b}=", answer=answer), self.config.task)
