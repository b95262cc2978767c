"""The restart policy as data: what is done when a process ends. No process, no file, no clock.

`classify` turns an exit into an event; `TABLE` has the action for every kind of process, event and
phase. docs/failures.md shows the same table.
"""

from dataclasses import dataclass
from enum import Enum

from atropos_hpc.runtime.process import DONE, GAVE_UP, REFUSED, STOPPED, STUCK


class Action(Enum):
    """What to do about a process that has ended."""

    FINISH = "end the others; the run is complete"
    STOP = "save, end the others; the run can be resumed"
    RESTART = "start it again"
    RESTART_ALL = "start it and the rollout nodes again"
    DROP = "go on without it"
    REQUEUE = "save, end the others, and let Slurm start the run again"
    FAIL = "save, end the others; the run has failed"
    END = "end the run as decided before"


class Kind(Enum):
    """The kinds of processes. The supervisor decides about the first four, a node agent about the
    others; there, FAIL means that the agent ends with REFUSED."""

    TRAINER = "trainer"  # all learner ranks together
    AGENT = "agent"  # a node agent, with everything on its node
    LAST_AGENT = "last agent"  # a node agent, when no other is left
    TRAJECTORIES = "trajectories"
    SERVER = "server"
    ENVIRONMENT = "environment"
    EVALUATOR = "evaluator"


class Event(Enum):
    """How a process has ended."""

    COMPLETED = "its work is done"
    STOPPED = "exit code 75"
    REFUSED = "its config cannot work, exit code 2"
    GAVE_UP = "every rollout of an environment worker fails, exit code 69"
    WAIT_TIMEOUT = "exit code 70"
    CRASHED = "any other exit code"
    KILLED = "by a signal"
    HUNG = "killed because it hung"
    CRASH_LIMIT = "more than `launch.restarts` failures without progress"
    HANG_LIMIT = "the same, the last one a hang or wait timeout, under Slurm"
    NODE_LOST = "according to Slurm"
    PREEMPTED = "or requeued by Slurm"
    CANCELLED = "its job or its het component"

    @property
    def label(self) -> str:
        """The event in words, for logs and docs."""
        return self.name.lower().replace("_", " ")


class Phase(Enum):
    """When it ended. A process is STARTING until it reports for work."""

    STARTING = "starting"
    RUNNING = "running"
    ENDING = "the run is ending"


_A = Action
_WHILE_RUNNING = {
    # the columns are those of Kind:
    # trainer, agent, last agent, trajectories, server, environment, evaluator
    Event.COMPLETED: (
        _A.FINISH, _A.RESTART, _A.RESTART, _A.RESTART, _A.RESTART, _A.DROP, _A.DROP,
    ),
    Event.STOPPED: (
        _A.STOP, _A.RESTART, _A.RESTART, _A.RESTART, _A.RESTART, _A.RESTART, _A.RESTART,
    ),
    # The member has logged why; starting it again would change nothing.
    Event.REFUSED: (_A.FAIL,) * 7,
    # Only an environment worker gives up; it has been patient already.
    Event.GAVE_UP: (_A.FAIL,) * 7,
    # The trainer may have waited for a rollout node that hangs.
    Event.WAIT_TIMEOUT: (
        _A.RESTART_ALL, _A.RESTART, _A.RESTART, _A.RESTART, _A.RESTART, _A.RESTART, _A.RESTART,
    ),
    Event.CRASHED: (_A.RESTART,) * 7,
    Event.KILLED: (_A.RESTART,) * 7,
    Event.HUNG: (_A.RESTART,) * 7,
    Event.CRASH_LIMIT: (_A.FAIL, _A.DROP, _A.FAIL, _A.FAIL, _A.FAIL, _A.FAIL, _A.FAIL),
    # Slurm may give the run other nodes.
    Event.HANG_LIMIT: (_A.REQUEUE, _A.DROP, _A.REQUEUE, _A.REQUEUE, _A.FAIL, _A.FAIL, _A.FAIL),
    Event.NODE_LOST: (_A.REQUEUE, _A.DROP, _A.REQUEUE, _A.REQUEUE, _A.DROP, _A.DROP, _A.DROP),
    Event.PREEMPTED: (_A.REQUEUE,) * 4 + (_A.DROP,) * 3,
    Event.CANCELLED: (_A.STOP,) * 4 + (_A.DROP,) * 3,
}  # fmt: skip
_BY_PHASE = {Phase.STARTING: _WHILE_RUNNING, Phase.RUNNING: _WHILE_RUNNING}
TABLE = {
    (kind, event, phase): action
    for phase, rows in _BY_PHASE.items()
    for event, actions in rows.items()
    for kind, action in zip(Kind, actions, strict=True)
}

# While the run is ending, only the learner counts, which saves a checkpoint; the trajectory server
# is kept up for it.
_KEPT_UP = {Event.COMPLETED, Event.STOPPED, Event.WAIT_TIMEOUT, Event.CRASHED, Event.KILLED,
            Event.HUNG}  # fmt: skip
for _event in Event:
    for _kind in Kind:
        TABLE[_kind, _event, Phase.ENDING] = Action.DROP
    TABLE[Kind.TRAINER, _event, Phase.ENDING] = Action.END
    if _event in _KEPT_UP:
        TABLE[Kind.TRAJECTORIES, _event, Phase.ENDING] = Action.RESTART
TABLE[Kind.TRAINER, Event.COMPLETED, Phase.ENDING] = Action.FINISH


@dataclass(frozen=True)
class ExitFacts:
    """What is known about a process that has ended.

    `code` is its exit code (negative: a signal). `done`: the learner has declared its work done.
    `cause`: what Slurm knows about it. `slurm`: the run can be requeued.
    """

    code: int
    hung: bool = False
    done: bool = False
    restarts_left: int = 1
    cause: Event | None = None
    slurm: bool = False


_BY_CODE = {STOPPED: Event.STOPPED, REFUSED: Event.REFUSED, GAVE_UP: Event.GAVE_UP}


def classify(kind: Kind, exit: ExitFacts) -> Event:
    """The event behind the end of a process.

    Without Slurm there are no other nodes to try, so a hang counts as a crash at the limit.

    >>> classify(Kind.TRAINER, ExitFacts(0, done=True)), classify(Kind.TRAINER, ExitFacts(0))
    (<Event.COMPLETED: 'its work is done'>, <Event.CRASHED: 'any other exit code'>)
    >>> classify(Kind.TRAINER, ExitFacts(75, cause=Event.PREEMPTED)).name
    'PREEMPTED'
    >>> classify(Kind.TRAINER, ExitFacts(70, restarts_left=0)).name
    'CRASH_LIMIT'
    >>> classify(Kind.TRAINER, ExitFacts(70, restarts_left=0, slurm=True)).name
    'HANG_LIMIT'
    """
    if kind is Kind.TRAINER and exit.done:
        return Event.COMPLETED
    if exit.cause is not None:
        return exit.cause
    if exit.code == DONE and kind in (Kind.ENVIRONMENT, Kind.EVALUATOR):
        return Event.COMPLETED
    if (event := _BY_CODE.get(exit.code)) is not None:
        return event
    stuck = exit.hung or exit.code == STUCK
    if exit.restarts_left <= 0:
        return Event.HANG_LIMIT if stuck and exit.slurm else Event.CRASH_LIMIT
    if stuck:
        return Event.HUNG if exit.hung else Event.WAIT_TIMEOUT
    return Event.KILLED if exit.code < 0 else Event.CRASHED


class RunEnding:
    """How and by when the run ends early. Pure: times are monotonic seconds."""

    def __init__(self, save_timeout_s: float) -> None:
        self.save_timeout_s = save_timeout_s
        self.action: Action | None = None  # set once the run is to end
        self._deadline = 0.0

    def request(self, action: Action, now: float) -> bool:
        """Decide how the run ends once the learner has saved. The first decision stays; returns
        whether this was it."""
        if self.action is not None:
            return False
        self.action, self._deadline = action, now + self.save_timeout_s
        return True

    def expired(self, now: float) -> bool:
        """Whether the learner has had all the time that it may take to save."""
        return self.action is not None and now > self._deadline


def requeued_too_often(starts: list[tuple[str | None, int]], requeues: int) -> bool:
    """Whether Slurm has started this job again more than `requeues` times without a durable step in
    between. `starts`: (job, durable step) of each start of the run so far, this one last.

    >>> requeued_too_often([("7", 3)] * 3, 2), requeued_too_often([("7", 3)] * 4, 2)
    (False, True)
    >>> requeued_too_often([("7", 3), ("7", 3), ("7", 6)], 1)
    False
    >>> requeued_too_often([("6", 3), ("7", 3)], 0)
    False
    """
    job, step = starts[-1]
    same = 0
    for start in reversed(starts):
        if start != (job, step):
            break
        same += 1
    return job is not None and same > requeues + 1
