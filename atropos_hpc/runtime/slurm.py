"""Runs Slurm's commands and parses what they print: the states of jobs and nodes.

Only the controller is asked (squeue, scontrol, sinfo), never the accounting, which many sites lack.
"""

import logging
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from atropos_hpc.runtime import environment

log = logging.getLogger(__name__)
T = TypeVar("T")

COMMAND_TIMEOUT_S = 60.0
SUBMISSIONS = 5  # attempts at a submission to a controller that is busy
BUSY = (
    "Socket timed out",
    "Unable to contact slurm controller",
    "Slurm temporarily unable to accept job",
    "Resource temporarily unavailable",
    "timed out after",
)
ENDED = {
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY",
    "BOOT_FAIL", "DEADLINE", "LAUNCH_FAILED", "RECONFIG_FAIL", "REVOKED",
}  # fmt: skip
# of those that have not ended: a job in any other state holds nodes
PENDING = {
    "PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD",
    "SPECIAL_EXIT",
}  # fmt: skip
NEVER = "never starts"  # of a pending heterogeneous job that has lost a component


class SlurmError(RuntimeError):
    """A Slurm command failed; the message has its error output."""


def run_command(*command: str, env: Mapping[str, str] | None = None) -> str:
    """Run a Slurm command and return its output. Raises SlurmError."""
    env = environment.kept(os.environ if env is None else env, environment.SLURM)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False, env=env
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(f"{command[0]}: {error}") from None
    if done.returncode:
        output = "; ".join(done.stderr.strip().splitlines()) or f"exit code {done.returncode}"
        raise SlurmError(f"{shlex.join(command)}: {output}")
    return done.stdout.strip()


def submit(script: str, env: Mapping[str, str], pause_s: float = 5.0) -> str:
    """Submit a script with sbatch and return the job's id. Raises SlurmError.

    A controller that is busy is asked again. It may have queued the job before its answer was
    lost, so first the queue is searched for a job of this script, whose path must be unique; as
    long as the queue cannot be seen, nothing is submitted again.
    """
    failure = SlurmError()
    for _ in range(SUBMISSIONS):
        try:
            answer = run_command("sbatch", "--parsable", script, env=env)
            return answer.splitlines()[-1].partition(";")[0]
        except SlurmError as error:
            if not any(sign in str(error) for sign in BUSY):
                raise
            failure = error
            log.warning("%s; looking for its job in the queue in %.0f s", error, pause_s)
        time.sleep(pause_s)
        # Not %A: which component of a het job comes first differs between versions.
        list_jobs = partial(run_command, "squeue", "--me", "-h", "-o", "%i|%o")
        try:
            listing = retry(list_jobs, pause_s=pause_s)
        except SlurmError as error:
            raise SlurmError(f"{failure}; the job may be in the queue: {error}") from None
        for line in listing.splitlines():
            name, _, command = line.partition("|")
            if command == script:  # it has no arguments, and its path may have spaces
                return _number(name)
    raise failure


def try_command(*command: str) -> None:
    """Run a Slurm command whose failure does not matter."""
    try:
        run_command(*command)
    except SlurmError as error:
        log.info("%s", error)


def retry(call: Callable[[], T], timeout_s: float = 120.0, pause_s: float = 5.0) -> T:
    """Return what `call` returns; call it again while it raises SlurmError, for `timeout_s`.

    For what a run cannot go on without. A controller that fails over is away for two minutes.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return call()
        except SlurmError as error:
            if time.monotonic() > deadline:
                raise
            log.warning("%s; trying again in %.0f s", error, pause_s)
            time.sleep(pause_s)


def expand_nodes(nodelist: str) -> list[str]:
    """The names in a node list such as n[0-3,7]. Raises SlurmError."""
    if not nodelist or nodelist == "(null)":
        return []
    return run_command("scontrol", "show", "hostnames", nodelist).split()


def parse_records(text: str) -> list[dict[str, str]]:
    """Parse what `scontrol -o show` prints: one record per line, of words key=value.

    >>> text = "JobId=7 JobState=RUNNING Reason=None\\nJobId=8 JobState=PENDING"
    >>> parse_records(text)[1]["JobState"]
    'PENDING'
    """
    pairs = re.compile(r"(?:^|\s)([\w:/]+)=(\S*)")
    return [dict(pairs.findall(line)) for line in text.splitlines() if line.strip()]


def show_job(job: str) -> list[dict[str, str]]:
    """The records of a job's components, the leader's first. Raises SlurmError."""
    return parse_records(run_command("scontrol", "-o", "show", "job", job))


def command_of(job: str) -> str | None:
    """The script of a job with its arguments, None if it has none or Slurm does not answer."""
    try:
        shown = run_command("scontrol", "-o", "show", "job", job)
    except SlurmError as error:
        log.info("%s", error)
        return None
    found = re.search(r"\bCommand=(/.*?) WorkDir=", shown)
    return found[1] if found else None


# --- nodes and jobs


def is_unreachable(nodes: Sequence[str]) -> bool:
    """Whether the controller has lost any of these nodes. Raises SlurmError."""
    states = run_command("sinfo", "-h", "-N", "-n", ",".join(nodes), "-o", "%T").split()
    return any(state.endswith("*") or state.startswith("down") for state in states)


def requeue(job: str) -> None:
    """Requeue the job that this process is in, with all its components.

    Slurm lets it wait for about two minutes. A no-op if that was done already. Raises SlurmError.
    """
    if not requeued_already(job):
        run_command("scontrol", "requeue", job)


def requeued_already(job: str) -> bool:
    """Whether Slurm has requeued the job that this process is in. Raises SlurmError.

    When only the daemon of the leader's node has died, Slurm requeues the leading component alone,
    which would wait for ever for the others. They are requeued here; Slurm reports an error for the
    leader, which is pending.
    """
    leader, *others = show_job(job)
    if not was_restarted(leader):
        return False
    if any(each["JobState"] == "RUNNING" and not was_restarted(each) for each in others):
        try_command("scontrol", "requeue", job)
    return True


def was_restarted(record: Mapping[str, str]) -> bool:
    """Whether Slurm has requeued the job that this process is in since it started this batch step.

    A preemption without grace time shows by nothing else.
    """
    started = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return int(record.get("Restarts", "0")) > started


def job_states(jobs: Iterable[str]) -> dict[str, str]:
    """The state of each job that the controller remembers, merged over components and array tasks.

    Runs one command. Raises SlurmError when the controller does not answer.
    """
    wanted = set(jobs)
    if not wanted:
        return {}
    found: dict[str, list[str]] = {}
    listing = run_command("squeue", "--me", "-h", "--states=all", "-o", "%i|%T")
    for line in listing.splitlines():
        name, state = line.split("|")
        number = _number(name)
        if number in wanted:
            found.setdefault(number, []).append(state)
    return {number: merge_states(states) for number, states in found.items()}


def _number(name: str) -> str:
    """The job of a het component such as 7+1, or of an array task such as 7_3."""
    return re.split(r"[+_]", name)[0]


def merge_states(states: Sequence[str]) -> str:
    """Merge the states of a job's components: active ones win, then failures, then success.

    >>> merge_states(["COMPLETED", "RUNNING"]), merge_states(["COMPLETED", "NODE_FAIL"])
    ('RUNNING', 'NODE_FAIL')
    >>> merge_states(["COMPLETED"] * 2), merge_states(["PENDING"] * 2)
    ('COMPLETED', 'PENDING')
    >>> merge_states(["PENDING", "FAILED"])
    'PENDING, but a component is FAILED: never starts'
    """
    active = [state for state in states if state not in ENDED]
    ended = next((state for state in states if state in ENDED - {"COMPLETED"}), "COMPLETED")
    if set(active) == {"PENDING"} and len(active) < len(states):
        return f"PENDING, but a component is {ended}: {NEVER}"
    if active:
        return "RUNNING" if "RUNNING" in active or len(active) < len(states) else active[0]
    return ended


def holds_nodes(state: str | None) -> bool:
    """Whether a job in a state, as `known_states` returns it, runs, begins or ends."""
    return state is not None and state not in ENDED | PENDING and not state.endswith(NEVER)


def is_installed() -> bool:
    """Whether Slurm's commands are on this machine."""
    return shutil.which("sbatch") is not None and shutil.which("srun") is not None


def is_reachable() -> bool:
    try:
        return bool(run_command("sinfo", "-h", "-o", "%R"))
    except SlurmError:
        return False


def known_states(jobs: Iterable[str | None]) -> dict[str, str | None]:
    """Return the state of each job, None where it was forgotten; {} without a controller."""
    wanted = [job for job in jobs if job]
    if not wanted or shutil.which("squeue") is None:
        return {}
    try:
        found = job_states(wanted)
    except SlurmError:
        return {}
    return {job: found.get(job) for job in wanted}
