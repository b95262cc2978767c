"""What the supervisor does on which event, as data; no process, no file, no clock."""

from enum import Enum

from atropos_hpc.runtime.process import REFUSED, STOPPED


class PointFailed(Exception):
    """A point of a multirun that was waited for did not complete."""


class Action(Enum):
    """What to do when a step has ended."""

    FINISH = "end the others, succeed"
    STOP = "end the others; the run can be resumed"
    RESTART = "start this step again"
    DROP = "go on without this node"
    REQUEUE = "save, end the others, and have Slurm start the run again"
    FAIL = "end the others, fail"


# (kind of step, how it ended) -> action. Exit codes alone do not tell: the learner is done when its done.json says so, and on Slurm it is
# Slurm that knows of preemptions and lost nodes. "last agent": no other rollout node is left.
TABLE = {
    ("trainer", "done"): Action.FINISH,
    ("trainer", "preempted"): Action.REQUEUE,
    ("trainer", "node lost"): Action.REQUEUE,
    ("trainer", "cancelled"): Action.STOP,
    ("trainer", "stopped"): Action.STOP,
    ("trainer", "crashed"): Action.RESTART,
    ("trainer", "crashed too often"): Action.FAIL,
    ("trainer", "hung too often"): Action.REQUEUE,  # on Slurm: perhaps other nodes are better
    ("trainer", "refused"): Action.FAIL,
    ("agent", "preempted"): Action.REQUEUE,
    ("agent", "node lost"): Action.DROP,
    ("agent", "cancelled"): Action.STOP,
    ("agent", "stopped"): Action.RESTART,
    ("agent", "crashed"): Action.RESTART,
    ("agent", "crashed too often"): Action.DROP,
    ("agent", "hung too often"): Action.DROP,
    ("agent", "refused"): Action.FAIL,
    ("last agent", "preempted"): Action.REQUEUE,
    ("last agent", "node lost"): Action.REQUEUE,
    ("last agent", "cancelled"): Action.STOP,
    ("last agent", "stopped"): Action.RESTART,
    ("last agent", "crashed"): Action.RESTART,
    ("last agent", "crashed too often"): Action.FAIL,
    ("last agent", "hung too often"): Action.REQUEUE,
    ("last agent", "refused"): Action.FAIL,
    ("trajectories", "preempted"): Action.REQUEUE,
    ("trajectories", "stopped"): Action.RESTART,
    ("trajectories", "crashed"): Action.RESTART,
    ("trajectories", "crashed too often"): Action.FAIL,
    ("trajectories", "hung too often"): Action.REQUEUE,
    ("trajectories", "refused"): Action.FAIL,
}


def how_it_ended(
    kind: str, code: int, *, done: bool, tries_left: int, fate: str | None = None
) -> str:
    """The second half of the table's key. `fate`: what Slurm knows of it, "preempted", "cancelled", "node lost" or None.

    >>> how_it_ended("trainer", 0, done=True, tries_left=5), how_it_ended("trainer", 0, done=False, tries_left=5)
    ('done', 'crashed')
    >>> how_it_ended("agent", -9, done=False, tries_left=1), how_it_ended("agent", -9, done=False, tries_left=0)
    ('crashed', 'crashed too often')
    >>> how_it_ended("trainer", 75, done=False, tries_left=1), how_it_ended("trainer", 75, done=False, tries_left=1, fate="preempted")
    ('stopped', 'preempted')
    """
    if kind == "trainer" and done:
        return "done"
    if fate is not None:
        return fate
    if code == STOPPED:
        return "stopped"
    if code == REFUSED:
        return "refused"  # the member has said why; starting it again would change nothing
    return "crashed" if tries_left > 0 else "crashed too often"


def given_up(starts: list[tuple[str | None, int]], requeues: int) -> bool:
    """Has Slurm started this job more than `requeues` times again without a durable step in between? `starts`: (job, durable step) of each
    start of the run so far, this one last.

    >>> given_up([("7", 3)] * 3, 2), given_up([("7", 3)] * 4, 2)
    (False, True)
    >>> given_up([("7", 3), ("7", 3), ("7", 6)], 1), given_up([("6", 3), ("7", 3)], 0)
    (False, False)
    """
    job, step = starts[-1]
    same = 0
    for start in reversed(starts):
        if start != (job, step):
            break
        same += 1
    return job is not None and same > requeues + 1
