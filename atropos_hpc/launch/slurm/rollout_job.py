"""The rollout job of a split run. The trainer has a job of its own; both meet in the run directory.

The rollout job is an array with one node per task, so that Slurm requeues a task by itself when its
node dies, while the others go on. Each task runs

    python -m atropos_hpc.launch.slurm.rollout_job --run-dir DIR

which supervises its node's agent until the run is over. The trainer job's supervisor submits the
rollout job, or adopts the one that it submitted before Slurm requeued it, watches it
(`RolloutJob`), and cancels it in the end.
"""

import argparse
import contextlib
import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from atropos_hpc.config import Config
from atropos_hpc.contracts.members import AnyMember, Done, RolloutJobRecord, SupervisorState
from atropos_hpc.launch.slurm import sbatch
from atropos_hpc.launch.slurm.sbatch import Allocation
from atropos_hpc.launch.slurm.slurm_job import current_job
from atropos_hpc.launch.steps import SlurmSteps
from atropos_hpc.launch.supervisor import Supervisor
from atropos_hpc.runtime import environment, process, slurm
from atropos_hpc.runtime.membership import RosterReader, RosterWatch
from atropos_hpc.runtime.restart_policy import Action
from atropos_hpc.runtime.run_dir import RunDir, read_json, read_struct, write_file, write_struct
from atropos_hpc.runtime.waiting import Waiting, wait_for

log = logging.getLogger(__name__)

POLL_S = 5.0
LEADER_S = (
    3600.0  # for the trainer job to make the run directory, where both were submitted by hand
)
END_S = 30.0  # for the rollout job to end by itself before it is cancelled


class RolloutJob:
    """The trainer's side. The constructor submits the job, or adopts the existing one; it raises
    SlurmError when the job cannot be submitted."""

    def __init__(self, config: Config, run: RunDir) -> None:
        self.record = run.path / "rollout_job.json"
        self.id = (read_struct(self.record, RolloutJobRecord) or RolloutJobRecord()).job
        self._next_poll, self._states = 0.0, {}  # type: tuple[float, dict[str, str]]
        if self.id and slurm.retry(self._is_active):
            log.info("adopting rollout job %s", self.id)
            return
        self.id = self._submit(config, run)
        write_struct(self.record, RolloutJobRecord(job=self.id))
        log.info("submitted rollout job %s", self.id)

    def _submit(self, config: Config, run: RunDir) -> str:
        script = run.path / "rollout_job.sbatch"
        module = ["-u", "-m", "atropos_hpc.launch.slurm.rollout_job"]
        command = shlex.join([sys.executable, *module, "--run-dir", str(run.path)])
        output = f"{run.path}/logs/rollout-job-%A_%a.log"
        write_file(script, sbatch.rollout_script(config, output, command).encode())
        return slurm.submit(str(script), sbatch.submission_environment(os.environ))

    def poll(self) -> Action | None:
        """Every few seconds: log what has changed, and end the run when the job has ended."""
        if time.monotonic() < self._next_poll:
            return None
        self._next_poll = time.monotonic() + POLL_S
        try:
            states = self._tasks()
        except slurm.SlurmError as error:
            log.warning("cannot ask Slurm for rollout job %s: %s", self.id, error)
            return None
        for task, state in states.items():
            if state != self._states.get(task):
                log.info("rollout job %s: %s", task, state)
            elif state == "PENDING|BeginTime":
                # Seen twice, so the old task is gone; sooner, Slurm would fail the new one.
                slurm.try_command("scontrol", "update", f"jobid={task}", "StartTime=now")
        self._states = states
        if any(_is_active(state) for state in states.values()):
            return None
        shown = ", ".join(f"{task} {state}" for task, state in states.items())
        log.error("rollout job %s has ended: %s", self.id, shown or "not in the queue")
        cancelled = any(state.startswith("CANCELLED") for state in states.values())
        return Action.STOP if cancelled else Action.FAIL

    def end(self, at_once: bool) -> None:
        """Cancel the job; unless `at_once`, first wait for its tasks to notice the run's end."""
        waiting = Waiting("the end of the rollout job", "its tasks", 0 if at_once else END_S)
        with contextlib.suppress(slurm.SlurmError):
            while not waiting.expired and any(
                state.startswith(("RUNNING", "COMPLETING")) for state in self._tasks().values()
            ):
                time.sleep(0.5)
        slurm.try_command("scancel", self.id)

    def _is_active(self) -> bool:
        return any(_is_active(state) for state in self._tasks().values())

    def _tasks(self) -> dict[str, str]:
        """Task -> "STATE|reason", of those that the controller remembers."""
        listing = slurm.run_command("squeue", "--me", "-h", "--states=all", "-o", "%i|%T|%r")
        tasks = (line.split("|", 1) for line in listing.splitlines())
        return {task: state for task, state in tasks if task.partition("_")[0] == self.id}


def _is_active(state: str) -> bool:
    return state.partition("|")[0] not in slurm.ENDED


# --- inside the rollout job


class RunFollower:
    """A task's view of the run: the task ends with the run, and outlives restarts of its supervisor
    for `patience_s`."""

    def __init__(self, run: RunDir, steps: int, patience_s: float) -> None:
        self.run, self.steps, self.patience_s = run, steps, patience_s
        self.roster = RosterReader(run.roster)
        self.watch = RosterWatch(self.roster)
        self._first = self.roster.read().written  # may be left from an earlier start

    def poll(self, _members: dict[str, AnyMember]) -> Action | None:
        """FINISH when the run is over, however it ended; FAIL when its supervisor is silent."""
        silent_s = self.watch.silent_s()
        supervisors = self.roster.members(SupervisorState, alive=False)
        leader = supervisors[0] if supervisors else SupervisorState()
        record = read_struct(self.run.done, Done)
        done = record is not None and record.version >= self.steps
        is_new = self.roster.read().written != self._first
        if done or (leader.state == "ended" and leader.outcome != "requeue" and is_new):
            log.info("the run has ended: %s", "complete" if done else leader.outcome)
            return Action.FINISH
        if silent_s > self.patience_s:
            log.error("the trainer job's supervisor has been silent for %.0f s: ending", silent_s)
            return Action.FAIL
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one rollout node's part of a run. The exit codes are those of `atropos_hpc.train`."""
    parser = argparse.ArgumentParser(
        prog="python -m atropos_hpc.launch.slurm.rollout_job",
        description="One task of a split run's rollout job.",
    )
    parser.add_argument("--run-dir", type=Path, required=True)
    run = RunDir(parser.parse_args(arguments).run_dir.absolute())
    process.keep_files_private()
    environment.drop_from(os.environ)
    process.log_to_stderr()
    started = lambda: read_json(run.run_json) and read_json(run.roster)  # noqa: E731
    wait_for(str(run.run_json), "the trainer job's supervisor", started, LEADER_S, poll_s=2.0)
    config = run.config()
    if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):  # of a script that a person has submitted
        config.roles.rollout.cpus_per_task = int(cpus)
    node = slurm.expand_nodes(os.environ["SLURM_JOB_NODELIST"])[0]
    index = int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))
    job = current_job({"rollout": Allocation((node,), os.environ["SLURM_JOB_ID"])})
    addresses = job.addresses(config.cluster.host)
    steps = SlurmSteps(config, run.path, job.allocations, addresses, run.logs.resolve())
    follower = RunFollower(run, config.trainer.steps, config.launch.start_timeout_s)
    supervisor = Supervisor(
        run, config, [steps.agent(node, index)], follower.poll, job, leads=False
    )
    action = supervisor.supervise()
    log.info("rollout node %d: %s", index, action.name.lower())
    if action is Action.REQUEUE:
        slurm.retry(lambda: slurm.requeue(job.id))
    return {Action.FINISH: process.DONE, Action.FAIL: 1}.get(action, process.STOPPED)


if __name__ == "__main__":
    sys.exit(main())
