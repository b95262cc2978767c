"""Resume a run with the config in its run.json: `atropos-hpc resume RUN [KEY=VALUE ...]`.

A run of this machine continues in this process. A run on Slurm becomes a new job, which takes its
place in the table of its sweep.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from atropos_hpc.config import Config
from atropos_hpc.contracts.metrics import SweepPoint
from atropos_hpc.launch import hydra_api, run, sweep
from atropos_hpc.launch.slurm import commands
from atropos_hpc.observe import report
from atropos_hpc.runtime import process
from atropos_hpc.runtime.run_dir import RunDir
from atropos_hpc.validate import REFUSED, refuse


def resume(directory: RunDir, overrides: Sequence[str]) -> int:
    """Resume a run. Returns train.py's exit code; 2 also if there is nothing to resume."""
    process.keep_files_private()
    path, known = directory.path, directory.info()
    if known is None:
        print(f"{path} has no run.json yet: repeat the command that started it", file=sys.stderr)
        return REFUSED
    before = directory.config()
    if before.model.make is not None:
        before.model.path = None  # create it again if the cache was emptied since
    try:
        config = hydra_api.change(before, overrides)
    except hydra_api.ERRORS as error:
        return refuse(hydra_api.problems(error))
    sweep_dir, row = _find_row(path)
    jobs = commands.known_states([row.job])
    state = report.run_state(row, jobs, config.trainer.steps, trained=True)
    if state in ("running", "queued") and (row.job or report.is_held(directory)):
        where = f"job {row.job}" if row.job else "here or on another machine"
        print(f"{path} is already {state} ({where}); nothing was started", file=sys.stderr)
        return REFUSED
    if state == "complete":
        print(
            f"{path} is complete at {config.trainer.steps} steps; "
            f"`atropos-hpc resume {path} trainer.steps=...` adds steps"
        )
        return 0
    return _start(config, directory, row, sweep_dir)


def _start(config: Config, directory: RunDir, row: SweepPoint, sweep_dir: Path) -> int:
    if config.launch.allocation == "local":
        requeue = lambda: commands.requeue(os.environ["SLURM_JOB_ID"])  # noqa: E731
        return run.launch(config, directory.path, requeue)
    point = sweep.Point(row.num, row.overrides, config, directory.path)
    sweep.on_slurm([point], sweep_dir, slots=0)
    return 0


def _find_row(path: Path) -> tuple[Path, SweepPoint]:
    """Return the run's row, and the directory whose table has it: the sweep's or the run's own."""
    in_sweep = any(Path(row.run_dir).resolve() == path for row in report.sweep_table(path.parent))
    return path.parent if in_sweep else path, report.find_points(path)[0]
