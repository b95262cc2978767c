"""Who hangs, and who waits for whom.

Every wait has a deadline of its own, and ends with its story. What is looked for here is what no wait notices: a process that lives and
  - gives no sign any more (stopped, stuck in a filesystem or in C): `Silence`;
  - gives signs, waits for nobody, and gets no further: `Progress`, for the learner.
Whoever is found is asked for its stacks, which go into its log, and is then ended; it is started again like one that crashed.
"""

import time
from collections.abc import Iterable
from typing import Any

from atropos_hpc.contracts.members import AnyMember, MemberState, TrainerState

HUNG_S = 90.0  # without a sign, beyond the time after which a member no longer counts as alive
DUMP_S = 2.0  # for stacks to be written before their process is ended


def waits(members: Iterable[MemberState], now: float) -> list[str]:
    """One line for each member that waits. `now`: Unix time.

    >>> from atropos_hpc.contracts.members import Wait
    >>> wait = Wait("batch 3", "the trajectory server", since=7.0)
    >>> waits([TrainerState(name="trainer-n1-0", state="training", waiting=wait)], 67.0)
    ['trainer-n1-0 has waited 60 s for batch 3 from the trajectory server']
    """
    lines = []
    for member in members:
        wait = member.waiting
        if member.silent:
            lines.append(f"{member.name} gives no sign")
        elif wait and member.alive:
            lines.append(
                f"{member.name} has waited {now - wait.since:.0f} s for {wait.what} from {wait.from_whom}"
            )
    return lines


class Silence:
    """Which members have given no sign for too long, by this reader's own clock."""

    def __init__(self) -> None:
        self._since: dict[tuple[str, int], float] = {}

    def hung(self, members: Iterable[AnyMember]) -> list[AnyMember]:
        """Those of `members` that have been silent for HUNG_S."""
        silent = {(m.name, m.pid): m for m in members if m.silent}
        now = time.monotonic()
        self._since = {who: self._since.get(who, now) for who in silent}
        return [member for who, member in silent.items() if now - self._since[who] > HUNG_S]


class Progress:
    """Whether the learner gets on."""

    def __init__(self, start_timeout_s: float, step_timeout_s: float) -> None:
        self.start_timeout_s, self.step_timeout_s = start_timeout_s, step_timeout_s
        self._last: Any = None
        self._since = time.monotonic()

    def missing_s(self, ranks: list[TrainerState]) -> float | None:
        """For how long the ranks have done the same thing, if that is too long; None while they wait for others, which has its own end."""
        now, seen = (
            time.monotonic(),
            sorted((m.name, m.pid, m.state, m.step or 0) for m in ranks),
        )
        if seen != self._last or any(m.waiting for m in ranks):
            self._last, self._since = seen, now
            return None
        limit = (
            self.step_timeout_s
            if all(m.state == "training" for m in ranks)
            else self.start_timeout_s
        )
        return now - self._since if ranks and now - self._since > limit else None
