"""A verifiers taskset of several turns: numbers are to be added with a tool."""

import verifiers.v1 as vf

__all__ = ["CalculatorTaskset"]


class Calculator(vf.Toolset[vf.SharedToolsetConfig]):
    """One tool server for all tasks."""

    TOOL_PREFIX = "calculator"

    @vf.tool
    def add(self, a: int, b: int) -> str:
        """Add two numbers."""
        return str(a + b)


class CalculatorData(vf.TaskData):
    """A problem and its answer."""

    answer: str = ""


class CalculatorTask(vf.Task[CalculatorData]):
    """Half the reward is for the answer, half for having used the tool."""

    @vf.reward(weight=0.5)
    async def is_right(self, trace: vf.Trace) -> float:
        return float(trace.last_reply == self.data.answer)

    @vf.reward(weight=0.5)
    async def used_the_tool(self, trace: vf.Trace) -> float:
        return float(len(trace.tool_messages) > 0)


class CalculatorTaskset(vf.Taskset[CalculatorTask, vf.TasksetConfig]):
    """Some sums."""

    def load(self) -> list[CalculatorTask]:
        return [
            CalculatorTask(
                CalculatorData(prompt=f"Add {a} and 2.", answer=str(a + 2)), self.config.task
            )
            for a in range(10)
        ]

    @classmethod
    def toolsets(cls, config: vf.TasksetConfig) -> list[vf.Toolset]:
        return [Calculator(vf.SharedToolsetConfig())]


if __name__ == "__main__":
    Calculator.run()
