"""What the supervisor does on which event, as data; no process, no file, no clock."""

from enum import Enum

DONE, STOPPED, REFUSED = 0, 75, 2  # exit codes with which a member says how it ended; anything else is a crash


class Action(Enum):
    """What to do when a step has ended."""

    FINISH = "end the others, succeed"
    STOP = "end the others; the run can be resumed"
    RESTART = "start this step again"
    FAIL = "end the others, fail"


# (kind of step, how it ended) -> action. Exit codes alone do not tell: the learner is done when its done.json says so.
TABLE = {
    ("trainer", "done"): Action.FINISH,
    ("trainer", "stopped"): Action.STOP,
    ("trainer", "crashed"): Action.RESTART,
    ("trainer", "crashed too often"): Action.FAIL,
    ("trainer", "refused"): Action.FAIL,
    ("agent", "stopped"): Action.RESTART,
    ("agent", "crashed"): Action.RESTART,
    ("agent", "crashed too often"): Action.FAIL,
    ("agent", "refused"): Action.FAIL,
    ("trajectories", "stopped"): Action.RESTART,
    ("trajectories", "crashed"): Action.RESTART,
    ("trajectories", "crashed too often"): Action.FAIL,
    ("trajectories", "refused"): Action.FAIL,
}


def how_it_ended(kind: str, code: int, *, done: bool, tries_left: int) -> str:
    """The second half of the table's key.

    >>> how_it_ended("trainer", 0, done=True, tries_left=5), how_it_ended("trainer", 0, done=False, tries_left=5)
    ('done', 'crashed')
    >>> how_it_ended("agent", -9, done=False, tries_left=1), how_it_ended("agent", -9, done=False, tries_left=0)
    ('crashed', 'crashed too often')
    """
    if kind == "trainer" and done:
        return "done"
    if code == STOPPED:
        return "stopped"
    if code == REFUSED:
        return "refused"  # the member has said why; starting it again would change nothing
    return "crashed" if tries_left > 0 else "crashed too often"


def backoff(base_s: float, restarts: int) -> float:
    """Seconds before the next restart, after so many without progress.

    >>> [backoff(1.0, n) for n in (0, 1, 2, 10)]
    [1.0, 2.0, 4.0, 60.0]
    """
    return float(min(60.0, base_s * 2**restarts))
