"""A point of a sweep, as submitit pickles and runs it."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atropos_hpc.config import Config
from atropos_hpc.launch import run
from atropos_hpc.runtime import slurm


@dataclass
class Point:
    """A point of a sweep. submitit pickles it and calls it in the job's batch step."""

    num: int
    overrides: list[str]
    config: Config
    run_dir: Path

    def __call__(self) -> str:
        """Run or resume the point. Raises RuntimeError, which submitit keeps, if it fails."""
        code = run.launch(self.config, self.run_dir, self.requeue, checked=True)
        if code in (1, 2):
            how = "failed" if code == 1 else "was refused"
            raise RuntimeError(f"the run in {self.run_dir} {how}; see its logs")
        if code:
            # Stopped. submitit must not write a result: Slurm may start the job again.
            sys.exit(code)
        return str(self.run_dir)

    def requeue(self) -> None:
        """Let submitit requeue the job: its signal handler calls `checkpoint`, requeues, and exits.

        A no-op if Slurm has requeued the job already. Raises SlurmError.
        """
        if slurm.requeued_already(os.environ["SLURM_JOB_ID"]):
            return
        try:
            signal.raise_signal(signal.SIGUSR2)
        except (OSError, subprocess.SubprocessError) as error:
            raise slurm.SlurmError(str(error)) from None

    def checkpoint(self) -> Any:
        """Return what submitit calls after the requeue: this point, which then resumes."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)
