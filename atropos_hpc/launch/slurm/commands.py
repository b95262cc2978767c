"""Talking to Slurm: asking its commands, reading what they print, the states of jobs and nodes.

Everything is asked of the controller (squeue, scontrol, sinfo), never of the accounting, which many sites lack.
"""

import logging
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")

COMMAND_TIMEOUT_S = 60.0
AWAY_S, PAUSE_S = 120.0, 5.0  # a controller that fails over is away for about two minutes
ENDED = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
}


class SlurmError(RuntimeError):
    """A command of Slurm's failed; the message has what it said."""


def ask(*command: str, env: Mapping[str, str] | None = None) -> str:
    """The output of one of Slurm's commands. Raises SlurmError."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False, env=env
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(f"{command[0]}: {error}") from None
    if done.returncode:
        said = "; ".join(done.stderr.strip().splitlines()) or f"exit code {done.returncode}"
        raise SlurmError(f"{shlex.join(command)}: {said}")
    return done.stdout.strip()


def insist(call: Callable[[], T]) -> T:
    """What `call` returns, tried again while it raises SlurmError; raises it after AWAY_S. For what a run cannot go on without."""
    deadline = time.monotonic() + AWAY_S
    while True:
        try:
            return call()
        except SlurmError as error:
            if time.monotonic() > deadline:
                raise
            log.warning("%s; tried again in %.0f s", error, PAUSE_S)
            time.sleep(PAUSE_S)


def expand(nodelist: str) -> list[str]:
    """The names in a node list such as n[0-3,7]."""
    return (
        ask("scontrol", "show", "hostnames", nodelist).split()
        if nodelist and nodelist != "(null)"
        else []
    )


def records(text: str) -> list[dict[str, str]]:
    """What `scontrol -o show` prints: one record per line, of words key=value.

    >>> records("JobId=7 JobState=RUNNING Reason=None\\nJobId=8 JobState=PENDING")[1]["JobState"]
    'PENDING'
    """
    return [
        dict(re.findall(r"(?:^|\s)([\w:/]+)=(\S*)", line))
        for line in text.splitlines()
        if line.strip()
    ]


# --- nodes and jobs


def unreachable(nodes: Sequence[str]) -> bool:
    """Has the controller lost any of these nodes? Raises SlurmError."""
    states = ask("sinfo", "-h", "-N", "-n", ",".join(nodes), "-o", "%T").split()
    return any(state.endswith("*") or state.startswith("down") for state in states)


def requeue(job: str) -> None:
    """Have Slurm start the job around us again, all components of it, from the batch step on. Slurm lets it wait about two minutes.

    Nothing happens when that has been done already. Raises SlurmError.
    """
    if not restarted(records(ask("scontrol", "-o", "show", "job", job))[0]):
        ask("scontrol", "requeue", job)


def restarted(job: Mapping[str, str]) -> bool:
    """Has Slurm, by its record of the job around us, put it back in the queue since it started this batch step?

    A preemption without grace shows by nothing else.
    """
    return int(job.get("Restarts", "0")) > int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def states(jobs: Iterable[str]) -> dict[str, str]:
    """The state of each job that the controller still remembers; of several components or array tasks, the one that counts. One call.

    Raises SlurmError when the controller does not answer.
    """
    wanted = set(jobs)
    if not wanted:
        return {}
    found: dict[str, list[str]] = {}
    for line in ask("squeue", "--me", "-h", "--states=all", "-o", "%i|%T").splitlines():
        name, state = line.split("|")
        number = re.split(r"[+_]", name)[0]
        if number in wanted:
            found.setdefault(number, []).append(state)
    return {number: merged(of) for number, of in found.items()}


def merged(of: Sequence[str]) -> str:
    """The state of a job from its components': what still goes on comes before what has ended, and failure before success.

    >>> merged(["COMPLETED", "RUNNING"]), merged(["COMPLETED", "NODE_FAIL"]), merged(["COMPLETED"] * 2), merged(["PENDING"] * 2)
    ('RUNNING', 'NODE_FAIL', 'COMPLETED', 'PENDING')
    """
    going = [state for state in of if state not in ENDED]
    if going:
        return "RUNNING" if "RUNNING" in going or len(going) < len(of) else going[0]
    return next((state for state in of if state != "COMPLETED"), "COMPLETED")


def is_here() -> bool:
    """Are Slurm's commands on this machine?"""
    return shutil.which("sbatch") is not None and shutil.which("srun") is not None


def answers() -> bool:
    """Is there a controller that answers?"""
    try:
        return bool(ask("sinfo", "-h", "-o", "%R"))
    except SlurmError:
        return False


def known_states(jobs: Iterable[str | None]) -> dict[str, str | None]:
    """Return the state of each job, None where the controller has forgotten it; {} if unreachable."""
    wanted = [job for job in jobs if job]
    if not wanted or shutil.which("squeue") is None:
        return {}
    try:
        found = states(wanted)
    except SlurmError:
        return {}
    return {job: found.get(job) for job in wanted}
