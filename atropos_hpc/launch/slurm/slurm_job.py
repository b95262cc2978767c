"""The Slurm job around this process, seen from its batch step: which nodes each role got, where they are, and why a step has ended.

Exit codes of srun decide nothing here: it returns 0 for aborted steps and for dead nodes.
"""

import logging
import os
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from atropos_hpc.launch.slurm import commands, sbatch
from atropos_hpc.launch.slurm.commands import SlurmError
from atropos_hpc.launch.slurm.sbatch import Group

log = logging.getLogger(__name__)

END_STEP_S = 60.0  # how long a killed step may take to go


@dataclass(frozen=True)
class Job:
    """The job whose batch step this process is, and the nodes each role got."""

    id: str  # the leader's, for a heterogeneous job
    groups: Mapping[str, Group]

    def fate(self, nodes: Sequence[str]) -> str | None:
        """Why a step on these nodes may have ended: "preempted", "cancelled", "node lost", or None when Slurm knows of no reason."""
        try:
            components = commands.records(commands.ask("scontrol", "-o", "show", "job", self.id))
            if any(
                _preempted(component) or commands.restarted(component) for component in components
            ):
                return "preempted"
            mine = next((c for c in components if c["JobId"] == self._job_of(nodes)), None)
            if mine is None or not nodes:
                return None
            if mine["JobState"].startswith("CANCELLED"):
                return "cancelled"
            if not set(nodes) <= set(
                commands.expand(mine.get("NodeList", ""))
            ) or commands.unreachable(nodes):
                return "node lost"
        except SlurmError as error:
            log.warning("cannot ask Slurm why a step has ended: %s", error)
        return None

    def end_step(self, name: str) -> None:
        """Make sure that no task of a step is left, even if its srun was killed. Raises SlurmError when one does not go."""
        jobs = ",".join(sorted({group.job for group in self.groups.values()}))
        deadline = time.monotonic() + END_STEP_S
        while True:
            steps = [
                line.split("|")
                for line in commands.ask(
                    "squeue", "-h", "-s", "-j", jobs, "-o", "%i|%j"
                ).splitlines()
            ]
            left = [step for step, of in steps if of == name]
            if not left:
                return
            if time.monotonic() > deadline:
                raise SlurmError(
                    f"step {left[0]} ({name}) is still there {END_STEP_S:.0f} s after it was killed"
                )
            subprocess.run(
                ["scancel", "--signal=KILL", *left],
                capture_output=True,
                timeout=commands.COMMAND_TIMEOUT_S,
                check=False,
            )
            time.sleep(0.5)

    def addresses(self, host: str | None) -> dict[str, str]:
        """Of every node of the job, as Slurm knows it, as a number; "" where cluster.host (`host`) says it, or what to look it up by.

        Raises SlurmError when a name does not resolve.
        """
        nodes = [node for group in self.groups.values() for node in group.nodes]
        if host is not None:
            return dict.fromkeys(nodes, "")
        found = {}
        for record in commands.records(
            commands.insist(lambda: commands.ask("scontrol", "-o", "show", "node", ",".join(nodes)))
        ):
            name, address = record["NodeName"], record.get("NodeAddr") or record["NodeName"]
            try:
                found[name] = str(
                    socket.getaddrinfo(address, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
                )
            except OSError as error:
                raise SlurmError(
                    f"node {name}: its address {address} does not resolve here ({error}); set cluster.host"
                ) from None
        return found

    def _job_of(self, nodes: Sequence[str]) -> str | None:
        return next(
            (group.job for group in self.groups.values() if set(nodes) <= set(group.nodes)), None
        )


def ours(groups: Mapping[str, Group]) -> Job:
    """The job around us. From here on our environment is one for its steps: the batch step's own counts are gone from it."""
    for name in set(os.environ) - set(sbatch.clean(os.environ)):
        del os.environ[name]
    return Job(os.environ["SLURM_JOB_ID"], groups)


def _preempted(component: Mapping[str, str]) -> bool:
    """Has Slurm begun to preempt it, since it was last started?"""
    since = component.get("PreemptTime", "None")
    return since not in ("None", "Unknown", "N/A", "") and since >= component.get("StartTime", "")
