"""The Slurm job that this process is the batch step of: its nodes per role, their addresses, and
why a step has ended.

Exit codes of srun decide nothing here: srun returns 0 for aborted steps and for dead nodes.
"""

import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from atropos_hpc.launch.slurm import srun
from atropos_hpc.launch.slurm.sbatch import Allocation
from atropos_hpc.runtime import slurm
from atropos_hpc.runtime.restart_policy import Event
from atropos_hpc.runtime.slurm import SlurmError
from atropos_hpc.runtime.waiting import Waiting, WaitTimeout

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """The job whose batch step this process is, with the allocation of each role."""

    id: str  # the leading component's, for a heterogeneous job
    allocations: Mapping[str, Allocation]

    def termination_cause(self, nodes: Sequence[str]) -> Event | None:
        """Why a step on these nodes may have ended: PREEMPTED, CANCELLED, NODE_LOST, or None when
        Slurm knows of no reason. Without nodes, only a preemption is looked for."""
        try:
            components = slurm.show_job(self.id)
            if any(_is_preempted(c) or slurm.was_restarted(c) for c in components):
                return Event.PREEMPTED
            mine = next((c for c in components if c["JobId"] == self._job_of(nodes)), None)
            if mine is None or not nodes:
                return None
            if mine["JobState"].startswith("CANCELLED"):
                return Event.CANCELLED
            allocated = set(slurm.expand_nodes(mine.get("NodeList", "")))
            if not set(nodes) <= allocated or slurm.is_unreachable(nodes):
                return Event.NODE_LOST
        except SlurmError as error:
            log.warning("cannot ask Slurm why a step has ended: %s", error)
        return None

    def end_step(self, name: str, timeout_s: float = 60.0) -> None:
        """Kill what is left of a step whose srun was killed. Raises SlurmError when a task of it
        does not disappear."""
        jobs = ",".join(sorted({allocation.job for allocation in self.allocations.values()}))
        with Waiting(f"the end of step {name}", "Slurm", timeout_s) as waiting:
            while True:
                listing = slurm.run_command("squeue", "-h", "-s", "-j", jobs, "-o", "%i|%j")
                steps = (line.split("|") for line in listing.splitlines())
                left = [step for step, of in steps if of == name]
                if not left:
                    return
                try:
                    waiting.check()
                except WaitTimeout as error:
                    raise SlurmError(f"{error}; step {left[0]} still exists") from None
                slurm.try_command("scancel", "--signal=KILL", *left)
                time.sleep(0.5)

    def addresses(self, host: str | None) -> dict[str, str]:
        """The address of every node of the job according to Slurm, of IPv4 if it has one; "" where
        cluster.host (`host`) decides. Raises SlurmError when a name does not resolve."""
        nodes = [node for allocation in self.allocations.values() for node in allocation.nodes]
        if host is not None:
            return dict.fromkeys(nodes, "")
        show_nodes = ("scontrol", "-o", "show", "node", ",".join(nodes))
        found = {}
        for record in slurm.parse_records(slurm.retry(lambda: slurm.run_command(*show_nodes))):
            name, address = record["NodeName"], record.get("NodeAddr") or record["NodeName"]
            try:
                resolved = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
            except OSError as error:
                raise SlurmError(
                    f"node {name}: its address {address} does not resolve here ({error}); set"
                    " cluster.host to the network interface that the nodes share, such as ib0"
                ) from None
            preferred = min(resolved, key=lambda entry: entry[0] != socket.AF_INET)
            found[name] = str(preferred[4][0])
        return found

    def _job_of(self, nodes: Sequence[str]) -> str | None:
        allocations = self.allocations.values()
        return next((each.job for each in allocations if set(nodes) <= set(each.nodes)), None)


def current_job(allocations: Mapping[str, Allocation]) -> Job:
    """The job that this process is in. Removes the batch step's own counts from the environment,
    which from here on is one for the job's steps."""
    for name in set(os.environ) - set(srun.step_environment(os.environ)):
        del os.environ[name]
    return Job(os.environ["SLURM_JOB_ID"], allocations)


def _is_preempted(component: Mapping[str, str]) -> bool:
    """Whether Slurm has begun to preempt the component since it was started last."""
    since = component.get("PreemptTime", "None")
    return since not in ("None", "Unknown", "N/A", "") and since >= component.get("StartTime", "")
