"""The rollout job of a split run. The trainer has a job of its own; both meet in the run directory.

The rollout job is an array with one node per task, so that Slurm requeues a task by itself when its node dies, and the others go on. Each
task runs

    python -m atropos_hpc.launch.slurm.rollout_job --run-dir DIR

which supervises its node's agent until the run is over. The trainer job's supervisor submits the rollout job, or adopts the one that it
submitted before Slurm started it again, watches it (`RolloutJob`), and cancels it in the end.
"""

import argparse
import contextlib
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from atropos_hpc.config import Config
from atropos_hpc.contracts.members import AnyMember, Done, RolloutJobRecord, SupervisorState
from atropos_hpc.launch.restart_policy import Action
from atropos_hpc.launch.slurm import commands, sbatch
from atropos_hpc.launch.slurm.sbatch import Group
from atropos_hpc.launch.slurm.slurm_job import ours
from atropos_hpc.launch.steps import agent_step
from atropos_hpc.launch.supervisor import Supervisor
from atropos_hpc.runtime import process
from atropos_hpc.runtime.membership import RosterReader, RosterWatch
from atropos_hpc.runtime.run_dir import RunDir, read_json, read_struct, write_file, write_struct
from atropos_hpc.runtime.waiting import wait_for

log = logging.getLogger(__name__)

LOOK_S = 5.0
LEADER_S = 3600.0  # how long the trainer job may take to make the run directory, where a person has submitted both
END_S = 30.0  # how long the rollout job may take to end by itself before it is cancelled


class RolloutJob:
    """The trainer's side. Building it submits the job, or adopts the one there is. Raises SlurmError when it cannot be submitted."""

    def __init__(self, config: Config, run: RunDir) -> None:
        self.note = run.path / "rollout_job.json"
        self.id = (read_struct(self.note, RolloutJobRecord) or RolloutJobRecord()).job
        self._next, self._states = 0.0, {}  # type: tuple[float, dict[str, str]]
        if self.id and commands.insist(self._going):
            log.info("rollout job %s goes on", self.id)
            return
        script = run.path / "rollout_job.sbatch"
        command = shlex.join(
            [
                sys.executable,
                "-u",
                "-m",
                "atropos_hpc.launch.slurm.rollout_job",
                "--run-dir",
                str(run.path),
            ]
        )
        write_file(
            script,
            sbatch.rollout_script(
                config, f"{run.path}/logs/rollout-job-%A_%a.log", command
            ).encode(),
        )
        self.id = commands.ask(
            "sbatch", "--parsable", str(script), env=sbatch.outside(os.environ)
        ).partition(";")[0]
        write_struct(self.note, RolloutJobRecord(job=self.id))
        log.info("submitted rollout job %s", self.id)

    def look(self) -> Action | None:
        """Every few seconds: tell what has changed, and end the run when the job has ended."""
        if time.monotonic() < self._next:
            return None
        self._next = time.monotonic() + LOOK_S
        try:
            now = self._tasks()
        except commands.SlurmError as error:
            log.warning("cannot ask for rollout job %s: %s", self.id, error)
            return None
        for task, state in now.items():
            if state != self._states.get(task):
                log.info("rollout job %s: %s", task, state)
            elif (
                state == "PENDING|BeginTime"
            ):  # seen twice: the old task is put away; sooner, Slurm fails the new one
                subprocess.run(
                    ["scontrol", "update", f"jobid={task}", "StartTime=now"],
                    capture_output=True,
                    timeout=60,
                    check=False,
                )
        self._states = now
        if any(state.partition("|")[0] not in commands.ENDED for state in now.values()):
            return None
        log.error(
            "rollout job %s has ended: %s",
            self.id,
            ", ".join(f"{task} {state}" for task, state in now.items()) or "not in the queue",
        )
        return (
            Action.STOP
            if any(state.startswith("CANCELLED") for state in now.values())
            else Action.FAIL
        )

    def end(self, at_once: bool) -> None:
        """Cancel it; unless `at_once`, wait until it has noticed the end of the run by itself, and cancel what is left."""
        deadline = time.monotonic() + (0 if at_once else END_S)
        with contextlib.suppress(commands.SlurmError):
            while time.monotonic() < deadline and any(
                state.startswith(("RUNNING", "COMPLETING")) for state in self._tasks().values()
            ):
                time.sleep(0.5)
        subprocess.run(["scancel", self.id], capture_output=True, timeout=60, check=False)

    def _going(self) -> bool:
        return any(
            state.partition("|")[0] not in commands.ENDED for state in self._tasks().values()
        )

    def _tasks(self) -> dict[str, str]:
        """Task -> "STATE|reason", of those that the controller remembers."""
        lines = commands.ask("squeue", "--me", "-h", "--states=all", "-o", "%i|%T|%r").splitlines()
        tasks = (line.split("|", 1) for line in lines)
        return {task: state for task, state in tasks if task.partition("_")[0] == self.id}


# --- inside the rollout job


class Following:
    """This task's view of the run: it ends with it, and outlives its leader's restarts for a while."""

    def __init__(self, run: RunDir, steps: int, patience_s: float) -> None:
        self.run, self.steps, self.patience_s = run, steps, patience_s
        self.roster = RosterReader(run.roster)
        self.watch = RosterWatch(self.roster)
        self._first = self.roster.read().written  # may be left from an earlier start

    def look(self, _members: dict[str, AnyMember]) -> Action | None:
        """FINISH when the run is over, however it ended; FAIL when its supervisor has not been seen for too long."""
        roster = self.roster.read()
        supervisors = self.roster.members(SupervisorState, alive=False)
        leader = supervisors[0] if supervisors else SupervisorState()
        record = read_struct(self.run.done, Done)
        done = record is not None and record.version >= self.steps
        ended = (
            leader.state == "ended"
            and leader.outcome != "requeue"
            and roster.written != self._first
        )
        if done or ended:
            log.info("the run has ended: %s", "complete" if done else leader.outcome)
            return Action.FINISH
        silent = self.watch.silent_s()
        if silent > self.patience_s:
            log.error("the trainer job's supervisor has not been seen for %.0f s", silent)
            return Action.FAIL
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one rollout node's part of a run; the exit codes are the command's."""
    parser = argparse.ArgumentParser(
        prog="python -m atropos_hpc.launch.slurm.rollout_job",
        description="One task of a split run's rollout job.",
    )
    parser.add_argument("--run-dir", type=Path, required=True)
    run = RunDir(parser.parse_args(arguments).run_dir.absolute())
    process.log_to_stderr()
    there = lambda: read_json(run.run_json) and read_json(run.roster)  # noqa: E731
    wait_for(f"{run.run_json}", "the trainer job's supervisor", there, LEADER_S, poll_s=2.0)
    config = run.config()
    node, index = (
        commands.expand(os.environ["SLURM_JOB_NODELIST"])[0],
        int(os.environ.get("SLURM_ARRAY_TASK_ID", "0")),
    )
    job = ours({"rollout": Group((node,), os.environ["SLURM_JOB_ID"])})
    step = agent_step(
        config,
        run.path,
        job.groups["rollout"],
        node,
        job.addresses(config.cluster.host),
        run.logs.resolve(),
        index,
    )
    following = Following(run, config.trainer.steps, config.launch.start_timeout_s)
    action = Supervisor(run, config.launch, [step], following.look, job, leads=False).supervise()
    log.info("rollout node %d: %s", index, action.name.lower())
    if action is Action.REQUEUE:
        commands.insist(lambda: commands.requeue(job.id))
    return {Action.FINISH: process.DONE, Action.FAIL: 1}.get(action, process.STOPPED)


if __name__ == "__main__":
    sys.exit(main())
