"""Every use of submitit's internals (submitit 1.5): an executor for heterogeneous jobs.

submitit itself cannot make heterogeneous jobs: this executor takes the text of the sbatch script.
"""

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from submitit.core import core, utils
from submitit.slurm import slurm as submitit_slurm

from atropos_hpc.launch.slurm import sbatch
from atropos_hpc.runtime import slurm


class SlurmhetExecutor(submitit_slurm.SlurmExecutor):
    """Submit jobs whose sbatch script is given.

    The function runs once, in the batch step of the first component, within submitit's own
    SlurmJobEnvironment.
    """

    def __init__(self, folder: str | Path) -> None:
        # launch.requeues limits restarts, submitit must not
        super().__init__(folder, max_num_timeout=10_000)
        # submitit waits 0.2 s between calls of sbatch; the controller itself rejects too many
        self._throttling = 0.0

    def submit_with(
        self, script: Callable[[str, str], str], minutes: int, function: Callable[[], core.R]
    ) -> core.Job[core.R]:
        """Submit a function. `script` returns the text of the sbatch script, given the command that
        loads the pickled function and the path of the job's output. `minutes`: its time limit."""
        self.script, self.parameters["time"] = script, minutes
        return self.submit(function)

    def _internal_process_submissions(
        self, delayed_submissions: list[utils.DelayedSubmission]
    ) -> list[core.Job[Any]]:
        # one by one: there are no arrays of heterogeneous jobs
        return core.PicklingExecutor._internal_process_submissions(self, delayed_submissions)

    def _num_tasks(self) -> int:
        return 1

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self.script(
            f"env SUBMITIT_EXECUTOR=slurm {command}",
            str(utils.JobPaths(self.folder).stdout).replace("%t", "0"),
        )

    def _submit_command(self, command: str) -> core.Job[Any]:
        """Write the script and call sbatch; as in the base class, but for `slurm.submit`."""
        uid = uuid.uuid4().hex
        script = self.folder / f".submission_file_{uid}.sh"
        script.write_text(self._make_submission_file_text(command, uid))
        job_id = slurm.submit(str(script), sbatch.submission_environment(os.environ))
        job: core.Job[Any] = self.job_class(folder=self.folder, job_id=job_id, tasks=[0])
        job.paths.move_temporary_file(script, "submission_file", keep_as_symlink=True)
        self._write_job_id(job.job_id, uid)
        self._set_job_permissions(job.paths.folder)
        return job
