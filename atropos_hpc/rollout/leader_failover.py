"""Failover when the leader's node dies: a node agent requeues the job, or ends.

Slurm may let the rest of a job run on for ever without its batch step. Only a process inside the
job can have it requeued then, and a node agent is one. Nor does Slurm end the processes of a node
whose daemons have died: there, an agent has to notice itself that the run goes on without it.
"""

import logging
import os
import time
from collections.abc import Callable

from atropos_hpc.contracts.members import MemberState, SupervisorState
from atropos_hpc.runtime import slurm
from atropos_hpc.runtime.membership import RosterReader, RosterWatch
from atropos_hpc.runtime.run_dir import RunDir
from atropos_hpc.runtime.waiting import Waiting

log = logging.getLogger(__name__)

SILENT_S = 20.0  # without a new roster, which is written every 2 s, before Slurm is asked
ASK_S = 10.0  # between two questions to Slurm
ENDED_S = 60.0  # without a new roster after a supervisor that has ended
LAST_LOOK_S = 900.0  # Slurm may take minutes to notice a dead node (SlurmdTimeout)


class LeaderFailover:
    """An agent's watch over the supervisor of its run.

    `poll` and `await_certainty` concern the job that both are in. They are no-ops in other jobs: a
    job of rollout nodes only ends by itself.
    """

    def __init__(
        self,
        run: RunDir,
        clock: Callable[[], float] = time.monotonic,
        silent_s: float = SILENT_S,
        ask_s: float = ASK_S,
    ) -> None:
        launch = run.config().launch
        shared = launch.allocation in ("het", "single")
        in_step = "SLURM_STEP_ID" in os.environ and shared
        self.job = os.environ["SLURM_JOB_ID"] if in_step else None
        self.run, self.attempt, self.shared = run, run.attempt(), shared
        self.patience_s, self.silent_s, self.ask_s = launch.start_timeout_s, silent_s, ask_s
        self.roster = RosterReader(run.roster)
        self.watch, self._asked = RosterWatch(self.roster, clock), 0.0
        self._abandoned = self._listed = False

    def abandoned(self, own: MemberState) -> str | None:
        """Return why the agent with this member state has to end: nobody supervises it any more,
        or another agent has its place. None while it is needed."""
        why = self._why_abandoned(own)
        self._abandoned = why is not None
        return why

    def _why_abandoned(self, own: MemberState) -> str | None:
        if self.shared and self.run.attempt() != self.attempt:
            return f"attempt {self.run.attempt()} of the run has begun without this agent"
        same = self.roster.read().members.get(own.name)
        # Clocks jump, so it has to have come after this one was listed as well.
        if same is not None and same.started == own.started:
            self._listed = True
        elif self._listed and same is not None and same.alive and same.started > own.started:
            return f"another {own.name}, pid {same.pid} on {same.host}, has its place"
        silent_s = self.watch.silent_s()
        leader = next(iter(self.roster.members(SupervisorState, alive=False)), None)
        ended = leader is not None and leader.state == "ended" and leader.outcome != "requeue"
        if silent_s > (ENDED_S if ended else self.patience_s):
            return f"the run's supervisor has been silent for {silent_s:.0f} s"
        return None

    def poll(self) -> bool:
        """Requeue the job if the supervisor is silent and Slurm says that its node is gone. Returns
        whether that was done."""
        if self.job is None:
            return False
        now = time.monotonic()
        if self.watch.silent_s() < self.silent_s or now - self._asked < self.ask_s:
            return False
        self._asked = now
        if not _lost_leader(self.job):
            return False
        log.error("the supervisor's node is gone: requeueing job %s", self.job)
        try:
            slurm.requeue(self.job)
        except slurm.SlurmError as error:
            # Also when only the rest of the job was left to requeue, or another agent was quicker.
            log.info("%s", error)
        return True

    def await_certainty(self) -> None:
        """Before the agent ends, which may leave nobody else in the job: wait until the supervisor
        is seen alive, or ends the run itself, or is lost and the job requeued."""
        if self.job is None or self._abandoned:
            return
        beat = self.roster.read().beat
        waiting = Waiting("a sign of life, or Slurm's word", "the supervisor", LAST_LOOK_S)
        while not waiting.expired:
            leader = self.roster.members(SupervisorState, alive=False)
            ending = not leader or leader[0].state != "running"
            if ending or self.roster.read().beat != beat or self.poll():
                return
            time.sleep(0.2)


def _lost_leader(job: str) -> bool:
    """Whether Slurm says that the node of our job's batch step is gone while this step goes on.
    False when Slurm does not answer.

    With --no-kill Slurm leaves the whole job as it is. Without, it may requeue the leading
    component alone, which then waits for this one for ever.
    """
    try:
        leader = slurm.show_job(job)[0]
        if leader["JobState"] == "PENDING":
            return True
        host = leader.get("BatchHost", "")
        if leader["JobState"] != "RUNNING" or not host:
            return False
        return host not in slurm.expand_nodes(leader["NodeList"]) or slurm.is_unreachable([host])
    except (slurm.SlurmError, LookupError):
        return False
