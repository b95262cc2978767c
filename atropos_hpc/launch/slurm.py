"""Talking to Slurm: what it says of our job and of others, requeueing, ending steps.

Everything is asked of the controller (squeue, scontrol), never of the accounting, which many sites lack. Exit codes of srun are not asked
for anything: it returns 0 for aborted steps and for dead nodes.
"""

import logging
import re
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it brings Hydra, which `atropos-hpc status` has no time for
    from atropos_hpc.launch.batch import Group

log = logging.getLogger(__name__)

COMMAND_TIMEOUT_S = 60.0
END_STEP_S = 60.0  # how long a killed step may take to go
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}


class SlurmError(RuntimeError):
    """A command of Slurm's failed; the message has what it said."""


def ask(*command: str, env: Mapping[str, str] | None = None) -> str:
    """The output of one of Slurm's commands. Raises SlurmError."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False, env=env)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(f"{command[0]}: {error}") from None
    if done.returncode:
        said = "; ".join(done.stderr.strip().splitlines()) or f"exit code {done.returncode}"
        raise SlurmError(f"{shlex.join(command)}: {said}")
    return done.stdout.strip()


def expand(nodelist: str) -> list[str]:
    """The names in a node list such as n[0-3,7]."""
    return ask("scontrol", "show", "hostnames", nodelist).split() if nodelist and nodelist != "(null)" else []


def records(text: str) -> list[dict[str, str]]:
    """What `scontrol -o show` prints: one record per line, of words key=value.

    >>> records("JobId=7 JobState=RUNNING Reason=None\\nJobId=8 JobState=PENDING")[1]["JobState"]
    'PENDING'
    """
    return [dict(re.findall(r"(?:^|\s)([\w:/]+)=(\S*)", line)) for line in text.splitlines() if line.strip()]


# --- the job around us


@dataclass(frozen=True)
class Job:
    """The job whose batch step this process is, and the nodes each role got."""

    id: str  # the leader's, for a heterogeneous job
    groups: "Mapping[str, Group]"

    def fate(self, nodes: Sequence[str]) -> str | None:
        """Why a step on these nodes may have ended: "preempted", "cancelled", "node lost", or None when Slurm knows of no reason."""
        try:
            components = records(ask("scontrol", "-o", "show", "job", self.id))
            if any(_preempted(component) for component in components):
                return "preempted"
            mine = next((c for c in components if c["JobId"] == self._job_of(nodes)), None)
            if mine is None or not nodes:
                return None
            if mine["JobState"].startswith("CANCELLED"):
                return "cancelled"
            if not set(nodes) <= set(expand(mine.get("NodeList", ""))) or _unreachable(nodes):
                return "node lost"
        except SlurmError as error:
            log.warning("cannot ask Slurm why a step has ended: %s", error)
        return None

    def end_step(self, name: str) -> None:
        """Make sure that no task of a step is left, even if its srun was killed. Raises SlurmError when one does not go."""
        jobs = ",".join(sorted({group.job for group in self.groups.values()}))
        deadline = time.monotonic() + END_STEP_S
        while True:
            steps = [line.split("|") for line in ask("squeue", "-h", "-s", "-j", jobs, "-o", "%i|%j").splitlines()]
            left = [step for step, of in steps if of == name]
            if not left:
                return
            if time.monotonic() > deadline:
                raise SlurmError(f"step {left[0]} ({name}) is still there {END_STEP_S:.0f} s after it was killed")
            subprocess.run(["scancel", "--signal=KILL", *left], capture_output=True, timeout=COMMAND_TIMEOUT_S, check=False)
            time.sleep(0.5)

    def addresses(self, host: str | None) -> dict[str, str]:
        """Of every node of the job, as Slurm knows it, as a number; "" where cluster.host (`host`) says it, or what to look it up by.

        Raises SlurmError when a name does not resolve.
        """
        nodes = [node for group in self.groups.values() for node in group.nodes]
        if host is not None:
            return dict.fromkeys(nodes, "")
        found = {}
        for record in records(ask("scontrol", "-o", "show", "node", ",".join(nodes))):
            name = record.get("NodeAddr") or record["NodeName"]
            try:
                found[record["NodeName"]] = str(socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
            except OSError as error:
                raise SlurmError(
                    f"node {record['NodeName']}: its address {name} does not resolve here ({error}); set cluster.host"
                ) from None
        return found

    def _job_of(self, nodes: Sequence[str]) -> str | None:
        return next((group.job for group in self.groups.values() if set(nodes) <= set(group.nodes)), None)


def _preempted(component: Mapping[str, str]) -> bool:
    """Has Slurm begun to preempt it, since it was last started?"""
    since = component.get("PreemptTime", "None")
    return since not in ("None", "Unknown", "N/A", "") and since >= component.get("StartTime", "")


def _unreachable(nodes: Sequence[str]) -> bool:
    states = ask("sinfo", "-h", "-N", "-n", ",".join(nodes), "-o", "%T").split()
    return any(state.endswith("*") or state.startswith("down") for state in states)


def requeue(job: str) -> None:
    """Have Slurm start a job again, all components of it, from the batch step on. Slurm lets it wait about two minutes."""
    ask("scontrol", "requeue", job)


def leader_is_lost(job: str) -> bool:
    """Does Slurm hold that the node of our job's batch step is gone, and has left us running? False when Slurm cannot be asked.

    With --no-kill it leaves the whole job as it is; without, it may requeue the leader alone, which then waits for us for ever.
    """
    try:
        leader = records(ask("scontrol", "-o", "show", "job", job))[0]
        host = leader.get("BatchHost", "")
        gone = leader["JobState"] == "RUNNING" and bool(host) and (host not in expand(leader["NodeList"]) or _unreachable([host]))
        return gone or leader["JobState"] == "PENDING"
    except (SlurmError, LookupError):
        return False


# --- the state of jobs, from outside


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
