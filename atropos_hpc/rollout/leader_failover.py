"""Who notices that the leader's node has died. Slurm may let the rest of the job run on without a batch step, for ever; only somebody
inside can have it started again, and a node agent is.
"""

import logging
import os
import time

from atropos_hpc.contracts.members import SupervisorState
from atropos_hpc.launch.slurm import commands
from atropos_hpc.runtime.membership import RosterReader, RosterWatch
from atropos_hpc.runtime.run_dir import RunDir

log = logging.getLogger(__name__)

SILENT_S = (
    20.0  # without a new roster, which the supervisor writes every 2 s, before Slurm is asked
)
ASK_S = 10.0
LAST_LOOK_S = 900.0  # Slurm itself may take minutes to notice a dead node (SlurmdTimeout)


class LeaderWatch:
    """An agent's look at its leader, in a job that both are in. Does nothing elsewhere: a job without its leader goes by itself."""

    def __init__(self, run: RunDir) -> None:
        shared = "SLURM_STEP_ID" in os.environ and run.config().launch.allocation in (
            "het",
            "single",
        )
        self.job = os.environ["SLURM_JOB_ID"] if shared else None
        self.roster = RosterReader(run.roster)
        self.watch, self._asked = RosterWatch(self.roster), 0.0

    def look(self) -> bool:
        """Have Slurm requeue the job if the supervisor is silent and, by Slurm's own word, its node is gone. True when that was done."""
        if self.job is None:
            return False
        now = time.monotonic()
        if self.watch.silent_s() < SILENT_S or now - self._asked < ASK_S:
            return False
        self._asked = now
        if not _is_lost(self.job):
            return False
        log.error("the node of the supervisor is gone: job %s is requeued", self.job)
        try:
            commands.requeue(self.job)
        except commands.SlurmError as error:  # also said when only the rest was left to requeue, or another agent was quicker
            log.info("%s", error)
        return True

    def last_look(self) -> None:
        """Before the agent ends, which may leave nobody else in the job: stay until the supervisor is seen alive, is known to end the run
        itself, or is lost and the job requeued.
        """
        beat, deadline = self.roster.read().beat, time.monotonic() + LAST_LOOK_S
        while self.job is not None and time.monotonic() < deadline:
            leader = self.roster.members(SupervisorState, alive=False)
            if (
                self.roster.read().beat != beat
                or not leader
                or leader[0].state != "running"
                or self.look()
            ):
                return
            time.sleep(0.2)


def _is_lost(job: str) -> bool:
    """Does Slurm hold that the node of our job's batch step is gone, and has left us running? False when Slurm cannot be asked.

    With --no-kill it leaves the whole job as it is; without, it may requeue the leader alone, which then waits for us for ever.
    """
    try:
        leader = commands.records(commands.ask("scontrol", "-o", "show", "job", job))[0]
        host = leader.get("BatchHost", "")
        gone = (
            leader["JobState"] == "RUNNING"
            and bool(host)
            and (host not in commands.expand(leader["NodeList"]) or commands.unreachable([host]))
        )
        return gone or leader["JobState"] == "PENDING"
    except (commands.SlurmError, LookupError):
        return False
