"""`atropos-hpc resume RUN`: go on with the config that the run has in its run.json, changed only where one says so.

A run of this machine goes on here, in this process. One of Slurm's becomes a new job, in its place in the table of its sweep.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from atropos_hpc.contracts.metrics import SweepPoint
from atropos_hpc.launch import hydra_api, run, sweep
from atropos_hpc.launch.slurm import commands
from atropos_hpc.observe import report
from atropos_hpc.runtime.run_dir import RunDir
from atropos_hpc.validate import refuse


def resume(directory: RunDir, overrides: Sequence[str]) -> int:
    """train.py's exit code; 2 when there is nothing to resume, or it runs, or an override is refused."""
    known = directory.info()
    if known is None:
        print(
            f"{directory.path} has no run.json yet: start it again with the command that started it",
            file=sys.stderr,
        )
        return 2
    if known.config.model.make is not None:
        known.config.model.path = None  # create it again if the cache was emptied since
    try:
        config = hydra_api.change(known.config, overrides)
    except hydra_api.ERRORS as error:
        return refuse(hydra_api.problems(error))
    sweep_dir, row = _place(directory.path)
    jobs = commands.known_states([row.job])
    state = report.run_state(row, jobs, config.trainer.steps, trained=True)
    if state in ("running", "queued") and (row.job or report.is_held(directory)):
        where = f"job {row.job}" if row.job else "here, or on another machine"
        print(
            f"{directory.path} is {state} already ({where}); nothing was started", file=sys.stderr
        )
        return 2
    if state == "complete":
        steps = f"{config.trainer.steps} steps"
        print(
            f"{directory.path} is complete at {steps}; `atropos-hpc resume {directory.path} trainer.steps=...` adds some"
        )
        return 0
    if config.launch.allocation == "local":
        return run.launch(
            config, directory.path, lambda: commands.requeue(os.environ["SLURM_JOB_ID"])
        )
    sweep.on_slurm(
        [sweep.Point(row.num, row.overrides, config, directory.path)], sweep_dir, slots=0
    )
    return 0


def _place(path: Path) -> tuple[Path, SweepPoint]:
    """The directory whose table of jobs the run stands in, its own if it is not of a sweep; and its row."""
    of_sweep = any(Path(row.run_dir).resolve() == path for row in report.sweep_table(path.parent))
    return path.parent if of_sweep else path, report.find_points(path)[0]
