"""Detects members that hang, and describes who waits for whom.

Every wait has a deadline of its own and fails with a message. Two cases escape that:
  - a member that stops sending heartbeats (suspended, stuck in a filesystem): `SilenceWatch`
  - a learner that sends heartbeats, waits for nobody and makes no progress: `ProgressWatch`
"""

import time
from collections.abc import Callable, Iterable

from atropos_hpc.contracts.members import AnyMember, MemberState, TrainerState

HUNG_S = 90.0  # of silence, after the time at which a member no longer counts as alive


def describe_waits(members: Iterable[MemberState], now: float) -> list[str]:
    """One line for each member that waits or is silent. `now` is a Unix time.

    >>> from atropos_hpc.contracts.members import Wait
    >>> wait = Wait("batch 3", "the trajectory server", since=7.0)
    >>> describe_waits([TrainerState(name="trainer-n1-0", state="training", waiting=wait)], 67.0)
    ['trainer-n1-0 has waited 60 s for batch 3 from the trajectory server']
    """
    lines = []
    for member in members:
        wait = member.waiting
        if member.silent:
            lines.append(f"{member.name} sends no heartbeat")
        elif wait and member.alive:
            waited = f"{now - wait.since:.0f} s for {wait.what} from {wait.from_whom}"
            lines.append(f"{member.name} has waited {waited}")
    return lines


class SilenceWatch:
    """Finds members that have been silent for too long, by this process's own clock."""

    def __init__(self, hung_s: float = HUNG_S, clock: Callable[[], float] = time.monotonic) -> None:
        self.hung_s, self._clock = hung_s, clock
        self._since: dict[tuple[str, int], float] = {}

    def hung(self, members: Iterable[AnyMember]) -> list[AnyMember]:
        """Those of `members` that have been silent for more than `hung_s` seconds."""
        silent = {(member.name, member.pid): member for member in members if member.silent}
        now = self._clock()
        self._since = {who: self._since.get(who, now) for who in silent}
        return [m for who, m in silent.items() if now - self._since[who] > self.hung_s]


class ProgressWatch:
    """Measures for how long the learner has made no progress."""

    def __init__(
        self,
        start_timeout_s: float,
        step_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.start_timeout_s, self.step_timeout_s = start_timeout_s, step_timeout_s
        self._clock = clock
        self._last: list[tuple[str, int, str, int, int]] = []
        self._since = clock()

    def stalled_s(self, ranks: list[TrainerState]) -> float | None:
        """For how long the ranks have been in the same micro-batch, if that is too long. None
        while one of them waits for another member, as waits have deadlines of their own."""
        now = self._clock()
        seen = sorted((m.name, m.pid, m.state, m.step or 0, m.micro_batches) for m in ranks)
        if seen != self._last or any(m.waiting for m in ranks):
            self._last, self._since = seen, now
            return None
        training = all(m.state == "training" for m in ranks)
        limit = self.step_timeout_s if training else self.start_timeout_s
        return now - self._since if ranks and now - self._since > limit else None
