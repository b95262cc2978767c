"""Record what the members do over time: activity.jsonl, the source of the report's timeline.

Every few seconds the supervisor writes how many members of each kind are in which state, and at
once for each process that was restarted. The learner's phases are in metrics.jsonl.
"""

import logging
import re
import time
from collections import Counter, defaultdict
from collections.abc import Mapping

from atropos_hpc.contracts.members import (
    AgentState,
    AnyMember,
    EnvironmentState,
    MemberState,
    ServerState,
)
from atropos_hpc.contracts.metrics import ActivityLine, ActivitySample, AttemptMark, RestartMark
from atropos_hpc.runtime.run_dir import RunDir, append_record

log = logging.getLogger(__name__)

MIN_INTERVAL_S, MAX_INTERVAL_S = 1.0, 10.0  # between two samples
INTERVAL_GROWTH = 1 / 500  # of the run's age: a run has a few hundred samples at any age


class ActivityRecorder:
    """Write activity.jsonl, in the supervisor."""

    def __init__(self, run: RunDir) -> None:
        self.path = run.activity
        self._pids: dict[str, int] = {}
        self._started, self._sampled = time.monotonic(), 0.0
        self._write(AttemptMark(_now(), f"attempt-{run.attempt()}"))

    def observe(self, members: Mapping[str, AnyMember]) -> None:
        """Write the restarts since the last call, and a sample if one is due."""
        pids = {name: pid for member in members.values() for name, pid in _processes(member)}
        for name in sorted(name for name, pid in pids.items() if self._pids.get(name, pid) != pid):
            self._write(RestartMark(_now(), name))
        self._pids |= pids
        now = time.monotonic()
        interval = max(MIN_INTERVAL_S, (now - self._started) * INTERVAL_GROWTH)
        if now - self._sampled >= min(MAX_INTERVAL_S, interval):
            self._sampled = now
            self._write(sample(members))

    def _write(self, line: ActivityLine) -> None:
        try:
            append_record(self.path, line)
        except OSError as error:  # a full disk must not end the run
            log.warning("cannot write %s: %s; the timeline lacks this line", self.path, error)


def _now() -> float:
    return round(time.time(), 3)


def sample(members: Mapping[str, AnyMember]) -> ActivitySample:
    """Count the members of each kind by state; vLLM servers are a kind of their own."""
    states: defaultdict[str, Counter[str]] = defaultdict(Counter)
    rate, continued, regenerated = 0.0, 0, 0
    for member in members.values():
        states[member.kind][state(member)] += 1
        for server in _servers(member):
            states["server"]["serving" if server.version is not None else "starting"] += 1
        if isinstance(member, EnvironmentState) and member.alive:
            rate += member.tokens_per_s or 0.0
        if isinstance(member, EnvironmentState):
            continued += member.continued_tokens or 0
            regenerated += member.regenerated_tokens or 0
    counts = {kind: dict(of_kind) for kind, of_kind in states.items()}
    return ActivitySample(_now(), counts, round(rate, 1), continued, regenerated)


def state(member: MemberState) -> str:
    """Return a member's state without numbers, which would make every moment a state of its own.

    >>> from atropos_hpc.contracts.members import EvaluatorState, TrainerState, Wait
    >>> state(EvaluatorState(state="evaluating version 40"))
    'evaluating version'
    >>> wait = Wait("batch 12", "the trajectory server", since=0.0)
    >>> state(TrainerState(state="training", waiting=wait))
    'waiting for batch'
    """
    if not member.alive:
        return "silent" if member.silent else "ended"
    wait = member.waiting
    text = f"waiting for {wait.what.partition(',')[0]}" if wait else member.state
    return " ".join(re.sub(r"\d+", "", text).split())


def _servers(member: AnyMember) -> list[ServerState]:
    return member.servers if isinstance(member, AgentState) else []


def _processes(member: AnyMember) -> list[tuple[str, int]]:
    """Return (name, pid) of a member and its vLLM servers; other children are members."""
    servers = [(s.name, s.pid) for s in _servers(member) if s.pid is not None]
    return [(member.name, member.pid), *servers]
