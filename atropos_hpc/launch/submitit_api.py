"""submitit with heterogeneous jobs, which it does not have itself: an executor whose batch script is given, and job states by squeue."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from submitit.core import core, utils
from submitit.slurm import slurm as submitit_slurm

from atropos_hpc.launch.slurm import commands, sbatch


class SlurmhetInfoWatcher(submitit_slurm.SlurmInfoWatcher):
    """submitit's view of job states, from squeue instead of the accounting."""

    def _make_command(self) -> list[str] | None:
        return (
            ["squeue", "--me", "-h", "--states=all", "-o", "%i|%T|%N"]
            if self._registered - self._finished
            else None
        )

    def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
        text = string.decode() if isinstance(string, bytes) else string
        jobs: dict[str, list[list[str]]] = {}
        for line in text.splitlines():
            name, *rest = line.split("|")
            jobs.setdefault(name.partition("+")[0], []).append(rest)
        return {
            job: {
                "JobID": job,
                "State": commands.merge_states([state for state, _ in of]),
                "NodeList": ",".join(nodes for _, nodes in of),
            }
            for job, of in jobs.items()
        }


class SlurmhetJob(submitit_slurm.SlurmJob[core.R]):
    """A job whose function runs in the leader's batch step."""

    watcher = SlurmhetInfoWatcher(delay_s=30)

    def _interrupt(self, timeout: bool = False) -> None:
        """Send the warning that Slurm sends before the time limit."""
        commands.run_command("scancel", "--batch", "--signal=USR2", self.job_id)


class SlurmhetExecutor(submitit_slurm.SlurmExecutor):
    """submitit's executor for jobs whose script is given: heterogeneous ones, which submitit itself cannot make.

    The function runs once, in the leader's batch step, where submitit's own SlurmJobEnvironment serves it.
    """

    job_class = SlurmhetJob

    def __init__(self, folder: str | Path) -> None:
        super().__init__(
            folder, max_num_timeout=10_000
        )  # restarts without progress are limited by launch.requeues
        self._throttling = 0.0  # submitit waits 0.2 s between calls of sbatch; the controller says itself when it is too much

    def submit_with(
        self, script: Callable[[str, str], str], minutes: int, function: Callable[[], core.R]
    ) -> core.Job[core.R]:
        """Submit a function. `script`: the batch script, of the command that loads the pickled function and of the path for the job's
        output. `minutes`: its time limit.
        """
        self.script, self.parameters["time"] = script, minutes
        return self.submit(function)

    def _internal_process_submissions(
        self, delayed_submissions: list[utils.DelayedSubmission]
    ) -> list[core.Job[Any]]:
        return core.PicklingExecutor._internal_process_submissions(
            self, delayed_submissions
        )  # there are no arrays of het jobs

    def _num_tasks(self) -> int:
        return 1

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self.script(
            f"env SUBMITIT_EXECUTOR=slurm {command}",
            str(utils.JobPaths(self.folder).stdout).replace("%t", "0"),
        )

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        leaks = sorted(set(os.environ) - set(sbatch.submission_environment(os.environ)))
        return [
            *(["env", *(f"--unset={name}" for name in leaks)] if leaks else []),
            "sbatch",
            str(submission_file_path),
        ]
