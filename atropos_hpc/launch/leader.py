"""Who notices that the leader's node has died. Slurm may let the rest of the job run on without a batch step, for ever; only somebody
inside can have it started again, and a node agent is.
"""

import logging
import os
import time

from atropos_hpc.launch import slurm
from atropos_hpc.rendezvous import Roster
from atropos_hpc.run_dir import RunDir

log = logging.getLogger(__name__)

SILENT_S = 20.0  # without a new roster, which the supervisor writes every 2 s, before Slurm is asked
ASK_S = 10.0


class LeaderWatch:
    """An agent's look at its leader. Does nothing outside Slurm."""

    def __init__(self, run: RunDir) -> None:
        self.job = os.environ.get("SLURM_JOB_ID") if "SLURM_STEP_ID" in os.environ else None
        self.roster = Roster(run.roster)
        self._beat, self._changed = -1, time.monotonic()

    def look(self) -> bool:
        """Have Slurm requeue the job if the supervisor is silent and, by Slurm's own word, its node is gone. True when that was done."""
        if self.job is None:
            return False
        now, beat = time.monotonic(), self.roster.read().get("beat", -1)
        if beat != self._beat:
            self._beat, self._changed = beat, now
        if now - self._changed < SILENT_S:
            return False
        self._changed = now - SILENT_S + ASK_S  # ask again then
        if not slurm.leader_is_lost(self.job):
            return False
        log.error("the node of the supervisor is gone: job %s is requeued", self.job)
        try:
            slurm.requeue(self.job)
        except slurm.SlurmError as error:  # also said when only the rest was left to requeue, or another agent was quicker
            log.info("%s", error)
        return True
